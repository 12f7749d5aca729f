"""Evaluation: every image counted once, against labels by name; the command needs checkpoint and images alone."""

import dataclasses
import json

import numpy as np
import pytest
import reference
import runs
from mindspore import Parameter, Tensor
from PIL import Image

from skipvit import checkpoint, config, data, evaluate, runtime
from skipvit.config import UserError
from skipvit.data import ImageFolder
from skipvit.log import RunFailed, run_command

CONFIG = config.from_dict({**runs.RECIPE, "model": {**runs.RECIPE["model"], "num_classes": 7}})
CLASSES = [f"bird{index}" for index in range(7)]
IMAGE_COUNT = 37  # no multiple of any batch below


class Oracle:
    """In place of the network: says of an image what its red, its number, looks up in a table."""

    def __init__(self, logits, kept=None):
        self.logits, self.kept = np.asarray(logits, np.float32), kept

    def __call__(self, images, *scores):
        numbers = images.asnumpy()[:, 0, 0, 0]
        outputs = (Tensor(self.logits[numbers]),)
        return outputs if self.kept is None else (*outputs, Tensor(self.kept[numbers]))


def numbered_images(root, labels, classes):
    """Image i is of class ``classes[labels[i]]`` and has red i."""
    for index, label in enumerate(labels):
        folder = root / classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (index, 0, 0)).save(folder / f"{index:03d}.png")
    return ImageFolder(root)


def count(oracle, folder, classes, batch_size=4, recipe=CONFIG, **options):
    return evaluate.evaluate(oracle, folder, recipe, batch_size=batch_size, classes=classes, **options)


def percent(values):
    return round(100 * float(np.mean(values)), 4)


# ------------------------------------------------------------------------------------------------- counting


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """11 images of 7 classes with logits, and by hand: whether the label comes first, and among the first five."""
    generator = np.random.default_rng(3)
    labels = np.arange(11) % 7
    logits = generator.standard_normal((11, 7))
    places = [sorted(range(7), key=lambda c, row=row: -row[c]).index(label) for row, label in zip(logits, labels)]
    first, among_five = [place == 0 for place in places], [place < 5 for place in places]
    assert 0 < sum(first) < sum(among_five) < 11
    folder = numbered_images(tmp_path_factory.mktemp("seven"), labels, CLASSES)
    return folder, Oracle(logits), first, among_five


@pytest.mark.parametrize("batch_size", range(1, 13))
def test_the_count_is_exact_for_every_batch_size(seven, batch_size):
    folder, oracle, first, among_five = seven
    result = count(oracle, folder, CLASSES, batch_size)
    assert (result.top1, result.top5, result.images) == (percent(first), percent(among_five), 11)
    assert result.images_per_second > 0


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_ranks_together_count_each_image_once(seven, ranks, monkeypatch):
    folder, oracle, first, among_five = seven
    total = np.zeros(5)

    def add(counts, of):
        nonlocal total
        assert of == ranks
        total = total + counts
        return np.ones(5)

    monkeypatch.setattr(runtime, "sum_over_ranks", add)
    monkeypatch.setattr(runtime, "union_over_ranks", lambda numbers, size, ranks: numbers)
    for rank in range(ranks):
        count(oracle, folder, CLASSES, batch_size=2, rank=rank, ranks=ranks)
    assert total[:3].tolist() == [sum(first), sum(among_five), 11]


def test_with_fewer_than_five_classes_all_are_among_the_first_five(tmp_path):
    folder = numbered_images(tmp_path, [0, 1, 2, 0], CLASSES)
    result = count(Oracle(np.eye(3)[[0, 1, 0, 1]]), folder, CLASSES[:3])
    assert (result.top1, result.top5, result.images) == (50.0, 100.0, 4)


def test_labels_go_by_the_classes_names_not_by_their_place(tmp_path):
    """A folder with some of the classes, and a model that has them in another order."""
    folder = numbered_images(tmp_path, [1, 3, 3], CLASSES)
    model_classes = CLASSES[::-1]
    logits = np.eye(7)[[model_classes.index(CLASSES[label]) for label in (1, 3, 1)]]
    assert count(Oracle(logits), folder, model_classes).top1 == percent([1, 1, 0])


def test_a_class_beyond_the_folders_is_a_wrong_answer(tmp_path):
    folder = numbered_images(tmp_path, [0, 1], CLASSES[:2])
    assert count(Oracle(np.eye(9)[[8, 1]]), folder, CLASSES[:2]).top1 == 50.0


def test_a_class_that_the_model_does_not_know_is_named(tmp_path):
    folder = numbered_images(tmp_path, [0, 1], ["bird0", "wolf"])
    with pytest.raises(UserError, match=f"{tmp_path}: class wolf is none of the model's 7: bird0"):
        count(Oracle(np.eye(7)), folder, CLASSES)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_a_spoilt_model_is_not_taken_for_one_that_says_class_0(spoilt, tmp_path):
    folder = numbered_images(tmp_path, [0, 0], CLASSES)
    with pytest.raises(RunFailed, match="not finite"):
        count(Oracle(np.full((2, 7), spoilt)), folder, CLASSES)


# ---------------------------------------------------------------------------------------- unreadable images


@pytest.fixture
def with_unreadable(seven, tmp_path):
    _, oracle, first, _ = seven
    copy = numbered_images(tmp_path / "data", np.arange(11) % 7, CLASSES)
    broken = [copy.path(2), copy.path(10)]
    numbers = [int(path.stem) for path in broken]
    for path in broken:
        path.write_bytes(b"no image")
    return copy, oracle, broken, [hit for number, hit in enumerate(first) if number not in numbers]


def test_an_unreadable_image_is_an_error_that_names_it(with_unreadable):
    folder, oracle, broken, _ = with_unreadable
    with pytest.raises(UserError, match=f"{broken[0]}: cannot be read as an image.*--skip-unreadable"):
        count(oracle, folder, CLASSES)


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_unreadable_images_left_out_are_named_and_not_counted(with_unreadable, batch_size):
    folder, oracle, broken, first = with_unreadable
    result = count(oracle, folder, CLASSES, batch_size, skip_unreadable=True)
    assert (result.top1, result.images) == (percent(first), 9)
    assert result.unreadable == [str(path) for path in broken]
    assert evaluate.summary(result)["unreadable"] == 2


def test_an_image_whose_mask_cannot_be_read_is_left_out_and_the_mask_named(seven, tmp_path):
    folder, oracle, *_ = seven
    for name in folder.names:
        mask = data.mask_path(tmp_path, name)
        mask.parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16)).save(mask)
    broken = data.mask_path(tmp_path, folder.names[0])
    broken.write_bytes(b"no image")
    by_mask = dataclasses.replace(CONFIG.skip[0], score="mask")
    recipe = CONFIG.replace(skip=(by_mask,))
    result = count(oracle, folder, CLASSES, recipe=recipe, masks=tmp_path, skip_unreadable=True)
    assert (result.images, result.unreadable) == (10, [str(broken)])


def test_nothing_readable_is_an_error(tmp_path):
    folder = numbered_images(tmp_path, [0, 1], CLASSES)
    for index in (0, 1):
        folder.path(index).write_bytes(b"")
    with pytest.raises(UserError, match=f"{tmp_path}: none of its images can be read"):
        count(Oracle(np.eye(7)), folder, CLASSES, skip_unreadable=True)


# ------------------------------------------------------------------------------------------ object's patches


def save_mask(path, *rectangles):
    mask = Image.new("L", (16, 16))
    for rectangle in rectangles:
        mask.paste(255, rectangle)
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)


def test_the_share_of_the_object_that_was_kept(tmp_path):
    """Patches are 4 pixels a side, 4 in a row. The last image has no object, and does not count."""
    folder = numbered_images(tmp_path / "data", [0] * 5, CLASSES)
    masks = tmp_path / "masks"
    save_mask(masks / "bird0/000.png", (0, 0, 4, 4))  # patch 0
    save_mask(masks / "bird0/001.png", (12, 12, 16, 16))  # patch 15
    save_mask(masks / "bird0/002.png", (4, 0, 8, 4), (0, 4, 2, 6))  # patch 1, and a quarter of patch 4
    save_mask(masks / "bird0/003.png", (8, 0, 16, 4))  # patches 2 and 3
    save_mask(masks / "bird0/004.png")
    kept = np.array([[0, 9, 8], [0, 1, 2], [7, 1, 6], [3, 4, 5], [0, 1, 2]], np.int32)
    expected = np.mean([1, 0, 0.8, 0.5])
    for batch_size in (1, 2, 5, 6):
        result = count(Oracle(np.eye(7)[[0] * 5], kept), folder, CLASSES, batch_size, masks=masks)
        assert result.object_kept == pytest.approx(expected, abs=1e-4)
        assert result.random_kept == pytest.approx(3 / 16, abs=1e-4)
    assert {"object_kept", "random_kept"} < set(evaluate.summary(result))


def test_an_image_left_out_does_not_shift_the_masks(tmp_path):
    folder = numbered_images(tmp_path / "data", [0] * 3, CLASSES)
    folder.path(0).write_bytes(b"no image")
    for index, patch in enumerate((0, 1, 2)):
        save_mask(tmp_path / f"masks/bird0/00{index}.png", (4 * patch, 0, 4 * patch + 4, 4))
    kept = np.array([[0], [1], [2]], np.int32)
    oracle = Oracle(np.eye(7)[[0] * 3], kept)
    result = count(oracle, folder, CLASSES, 3, masks=tmp_path / "masks", skip_unreadable=True)
    assert (result.images, result.object_kept) == (2, 1.0)


def test_a_random_choice_keeps_what_random_kept_says(tmp_path):
    folder = numbered_images(tmp_path / "data", [0] * 200, CLASSES)
    generator = np.random.default_rng(0)
    for index in range(200):
        left, top = generator.integers(0, 12, 2).tolist()
        save_mask(tmp_path / "masks" / "bird0" / f"{index:03d}.png", (left, top, left + 4, top + 4))
    kept = np.stack([generator.permutation(16)[:7] for _ in range(200)]).astype(np.int32)
    result = count(Oracle(np.eye(7)[[0] * 200], kept), folder, CLASSES, 64, masks=tmp_path / "masks")
    assert result.random_kept == 0.4375
    assert abs(result.object_kept - 0.4375) < 0.06, "3 deviations of the mean"


def test_without_masks_or_without_skipping_nothing_is_said_of_objects(tmp_path):
    folder = numbered_images(tmp_path / "data", [0], CLASSES)
    save_mask(tmp_path / "masks/bird0/000.png", (0, 0, 4, 4))
    kept = np.zeros((1, 3), np.int32)
    for oracle, masks in ((Oracle(np.eye(7), kept), None), (Oracle(np.eye(7)), tmp_path / "masks")):
        result = count(oracle, folder, CLASSES, masks=masks)
        assert set(evaluate.summary(result)) == {"top1", "top5", "images", "images_per_second"}


def test_a_missing_mask_is_named(tmp_path):
    folder = numbered_images(tmp_path / "data", [0], CLASSES)
    with pytest.raises(UserError, match=r"bird0/000\.png"):
        count(Oracle(np.eye(7), np.zeros((1, 3), np.int32)), folder, CLASSES, masks=tmp_path)


# ---------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder of images, checkpoints each alone in another, and the figures of the NumPy model."""
    root = tmp_path_factory.mktemp("scene")
    model = CONFIG.model
    parameters = reference.init(32, image_size=16, patch_size=4, embed_dim=16, depth=2, num_classes=7)
    saved = [Parameter(Tensor(np.asarray(value, np.float32)), name=name) for name, value in parameters.items()]
    (span,) = CONFIG.skip
    for name, spans in (
        ("skip", (span,)),
        ("keep_all", (dataclasses.replace(span, keep_ratio=1.0),)),
        ("dense", ()),
        ("mask", (dataclasses.replace(span, score="mask"),)),
    ):
        meta = {"config": CONFIG.replace(skip=spans).to_dict(), "classes": CLASSES}
        (root / name).mkdir()
        checkpoint.save(root / name / "best.ckpt", saved, meta)
    runs.write_images(root / "data", IMAGE_COUNT, CLASSES)

    folder = ImageFolder(root / "data")
    pixels = np.stack([np.asarray(Image.open(folder.path(index))) for index in range(IMAGE_COUNT)])
    images = (pixels / 255 - np.array(CONFIG.data.mean)) / np.array(CONFIG.data.std)
    results = {}
    for name, spans in (("skip", [(1, 2, runs.KEPT_COUNT)]), ("dense", []), ("fewer", [(1, 2, 2)])):
        logits = reference.forward(
            parameters, images.transpose(0, 3, 1, 2), patch_size=4, num_heads=model.num_heads, spans=spans
        ).logits
        best = np.argsort(-logits, axis=1)
        labels = folder.labels[:, None]
        results[name] = (percent(best[:, :1] == labels), percent((best[:, :5] == labels).any(1)))
    assert len({top1 for top1, _ in results.values()}) == len(results), "choose other parameters"
    return root, results


def figures(line):
    result = json.loads(line)
    assert list(result) == ["top1", "top5", "images", "images_per_second"]
    assert all(isinstance(value, (int, float)) for value in result.values())
    assert result["images"] == IMAGE_COUNT
    return result["top1"], result["top5"]


def test_the_command_needs_the_checkpoint_and_the_images_alone(scene, tmp_path):
    root, results = scene
    ended = runs.run("evaluate", root / "skip" / "best.ckpt", "--data", root / "data", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert figures(lines[-1]) == results["skip"]
    assert f"of {IMAGE_COUNT} images" in lines[-2]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("skip", [], "skip"),
        ("skip", ["--no-skip"], "dense"),
        ("keep_all", [], "dense"),
        ("skip", ["--keep-ratio", "1"], "dense"),
        ("skip", ["--keep-ratio", "0.1"], "fewer"),
        ("keep_all", ["--keep-ratio", "0.45"], "skip"),
    ],
)
def test_the_figures_are_the_numpy_models(name, options, expected, scene, capsys):
    """In batches of 5, the command above in one of 37; and no skipping is keeping all."""
    root, results = scene
    arguments = [str(root / name / "best.ckpt"), "--data", str(root / "data"), "--batch-size", "5", *options]
    assert run_command(evaluate.main, arguments) == 0
    assert figures(capsys.readouterr().out.splitlines()[-1]) == results[expected]


@pytest.fixture
def _no_network(monkeypatch):
    """Bad input is to be told by what comes before and after the network."""
    monkeypatch.setattr(evaluate, "Classify", lambda net, config: Oracle(np.eye(7)[np.zeros(256, int)]))


@pytest.mark.usefixtures("_no_network")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["required", "--data", "--help"]),
        (["{scene}/skip/best.ckpt"], ["required", "--data"]),
        (["{scene}/skip/best.ckpt", "--data", "{scene}/data", "--top", "5"], ["--top"]),
        (["{scene}/skip/best.ckpt", "--data", "{scene}/data", "--batch-size", "many"], ["--batch-size", "many"]),
        (["{scene}/skip/best.ckpt", "--data", "{scene}/data", "--batch-size", "0"], ["--batch-size", "0"]),
        (["{tmp}/no.ckpt", "--data", "{scene}/data"], ["{tmp}/no.ckpt", "no such checkpoint"]),
        (["{scene}/skip", "--data", "{scene}/data"], ["{scene}/skip", "best.ckpt"]),
        (["{tmp}/cut.ckpt", "--data", "{scene}/data"], ["{tmp}/cut.ckpt", "truncated"]),
        (["{tmp}/" + 300 * "a" + ".ckpt", "--data", "{scene}/data"], ["aaa.ckpt: File name too long"]),
        (["{tmp}/other.ckpt", "--data", "{scene}/data"], ["{tmp}/other.ckpt", "of another model"]),
        (["{scene}/skip/best.ckpt", "--data", "{tmp}/no"], ["--data", "{tmp}/no", "does not exist"]),
        (["{scene}/skip/best.ckpt", "--data", "{tmp}/cut.ckpt"], ["--data", "{tmp}/cut.ckpt", "not a folder"]),
        (["{scene}/skip/best.ckpt", "--data", "{tmp}/empty"], ["--data", "{tmp}/empty", "no class folders"]),
        (["{scene}/skip/best.ckpt", "--data", "{tmp}/strange"], ["{tmp}/strange", "wolf"]),
        (["{scene}/skip/best.ckpt", "--data", "{tmp}/broken"], ["{tmp}/broken/bird0/x.png", "--skip-unreadable"]),
        (["{scene}/skip/best.ckpt", "--data", "{scene}/data", "--masks", "{tmp}/no"], ["--masks", "{tmp}/no"]),
        (["{scene}/skip/best.ckpt", "--data", "{scene}/data", "--keep-ratio", "0"], ["--keep-ratio", "0.0", "(0, 1]"]),
        (["{scene}/skip/best.ckpt", "--data", "{scene}/data", "--keep-ratio", "1", "--no-skip"], ["--no-skip"]),
        (["{scene}/dense/best.ckpt", "--data", "{scene}/data", "--keep-ratio", "0.5"], ["--keep-ratio", "no token"]),
        (["{scene}/skip/best.ckpt", "--data", "{scene}/data", "--masks", "{tmp}/empty"], ["--masks", "bird0/000.png"]),
        (["{scene}/mask/best.ckpt", "--data", "{scene}/data"], ["--masks", "not given"]),
        (["{scene}/mask/best.ckpt", "--data", "{scene}/data", "--masks", "{tmp}/empty"], ["--masks", "bird0/000.png"]),
    ],
)
def test_bad_input_is_one_line(arguments, parts, scene, tmp_path, capsys):
    root, _ = scene
    (tmp_path / "cut.ckpt").write_bytes((root / "skip/best.ckpt").read_bytes()[:-9])
    wide = CONFIG.replace(model=dataclasses.replace(CONFIG.model, embed_dim=32))
    saved = checkpoint.load(root / "skip/best.ckpt")
    parameters = [Parameter(Tensor(value), name=name) for name, value in saved.arrays.items()]
    checkpoint.save(tmp_path / "other.ckpt", parameters, {"config": wide.to_dict(), "classes": CLASSES})
    for name in ("empty", "strange/wolf", "broken/bird0"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "strange/wolf/x.png")
    (tmp_path / "broken/bird0/x.png").write_bytes(b"no image")

    places = {"scene": root, "tmp": tmp_path}
    code = run_command(evaluate.main, [argument.format(**places) for argument in arguments])
    out, err = capsys.readouterr()
    runs.assert_bad_input(code, err, *[part.format(**places) for part in parts])
    assert out == ""


@pytest.mark.usefixtures("_no_network")
def test_images_left_out_are_told(scene, tmp_path, capsys):
    root, _ = scene
    numbered_images(tmp_path, [0, 0, 1], CLASSES)
    (tmp_path / "bird0" / "000.png").write_bytes(b"no image")
    arguments = [str(root / "skip/best.ckpt"), "--data", str(tmp_path), "--skip-unreadable"]
    assert run_command(evaluate.main, arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(str(tmp_path / "bird0" / "000.png"))
    result = json.loads(lines[-1])
    assert (result["images"], result["unreadable"], result["top1"]) == (2, 1, 50.0)
