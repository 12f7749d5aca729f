"""What the commands see of images: in order, whatever the batch, and as the NumPy reference sees it."""

import os

import numpy as np
import pytest
import runs
from PIL import Image

from skipvit import checkpoint, inference, runtime
from skipvit.config import UserError
from skipvit.log import RunFailed

CLASSES = ["crow", "heron", "owl"]
DEPTH = 4
SPANS = [
    {"start": 1, "end": 2, "keep_ratio": 0.45},
    {"start": 3, "end": 4, "keep_ratio": 0.3},
]
MODEL = {"depth": DEPTH}


@pytest.fixture(scope="module", autouse=True)
def _graph_mode():
    runtime.start()


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Images, and a checkpoint of a model that chooses twice; with what the reference makes of them."""
    root = tmp_path_factory.mktemp("scene")
    parameters = runs.write_checkpoint(root / "best.ckpt", CLASSES, model=MODEL, skip=SPANS)
    folder = runs.write_images(root / "images", 7, CLASSES)
    paths = sorted(folder.rglob("*.png"))
    expected = runs.expected_of(parameters, paths, spans=[(1, 2, 7), (3, 4, 5)], **MODEL)
    return root, paths, expected


@pytest.fixture(scope="module")
def looked(scene):
    root, paths, _ = scene
    saved = checkpoint.load(root / "best.ckpt")
    classify = inference.Classify(checkpoint.build_model(saved), saved.config)
    return saved, classify, list(inference.look(classify, saved.config, paths, batch_size=3))


def test_probabilities_choices_and_scores_are_the_references(scene, looked):
    """Seven images in batches of three: the last is padded."""
    _, paths, expected = scene
    seen = looked[2]
    assert len(seen) == len(paths)
    for index, one in enumerate(seen):
        exponentials = np.exp(expected.logits[index])
        np.testing.assert_allclose(one.probabilities, exponentials / exponentials.sum(), atol=1e-5)
        assert len(one.kept) == len(one.scores) == 2
        for span, kept, score in zip(expected.spans, one.kept, one.scores):
            np.testing.assert_array_equal(np.flatnonzero(kept), span.kept[index])
            np.testing.assert_allclose(score, span.score[index], atol=1e-5)  # in image order, the second too


def test_views_are_in_the_images_order_and_grid(scene, looked):
    _, paths, expected = scene
    saved, classify, seen = looked
    shown = inference.views(classify, saved.config, CLASSES[:2], paths, batch_size=3)
    for index, of_image in enumerate(shown):
        assert len(of_image) == 2
        best = expected.logits[index].argmax()
        assert of_image[0].class_name == (CLASSES[best] if best < 2 else "2")
        assert of_image[0].probability == pytest.approx(seen[index].probabilities.max(), abs=1e-6)
        assert of_image[0].kept.shape == of_image[1].score.shape == (4, 4)
        np.testing.assert_array_equal(of_image[0].kept.reshape(-1), seen[index].kept[0])


def test_what_is_displayed_is_what_the_model_sees_only_sharper(looked, tmp_path):
    """Of a wide image the middle, which is red here; 14 times the model's 16 pixels, where the file has so many."""
    for side, expected in ((300, 224), (70, 64), (30, 16), (10, 16)):
        wide = Image.new("RGB", (3 * side, side), "blue")
        wide.paste("red", (side, 0, 2 * side, side))
        wide.save(tmp_path / "wide.png")
        shown = inference.displayed(tmp_path / "wide.png", looked[0].config)
        assert shown.shape == (expected, expected, 3)
        edge = expected // 8
        assert shown[:, edge:-edge].reshape(-1, 3).min(0).tolist() == [255, 0, 0]


def test_spoilt_weights_are_told(looked, scene):
    saved, classify, _ = looked

    class Spoilt:
        def __call__(self, images):
            outputs = classify(images)
            return (outputs[0] * float("nan"), *outputs[1:])

    with pytest.raises(RunFailed, match="not finite"):
        list(inference.look(Spoilt(), saved.config, scene[1][:1], 3))


def test_images_and_folders_of_them_in_order(scene, tmp_path):
    root, paths, _ = scene
    (root / "images" / ".hidden").mkdir(exist_ok=True)
    (root / "images" / "notes.txt").write_text("no image")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert inference.list_images([tmp_path / "b.png", root / "images"]) == [tmp_path / "b.png", *paths]


@pytest.mark.parametrize(
    ("name", "said"), [("no.png", "no such file"), ("pipe.png", "no such file"), ("empty", "holds no images")]
)
def test_a_path_without_images_is_named(name, said, tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=f"{tmp_path / name}: .*{said}"):
        inference.list_images([tmp_path / name])
