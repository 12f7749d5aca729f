"""The command that draws: what its line of JSON tells is the NumPy model's choice, and the picture is written."""

import json

import numpy as np
import pytest
import runs
from PIL import Image

from skipvit import visualize
from skipvit.log import run_command

pytest.importorskip("matplotlib")

CLASSES = ["crow", "heron", "owl"]
SPANS = [{"start": 1, "end": 2, "keep_ratio": 0.45}, {"start": 3, "end": 4, "keep_ratio": 0.3}]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    root = tmp_path_factory.mktemp("scene")
    paths = sorted(runs.write_images(root / "images", 3, CLASSES).rglob("*.png"))
    first = runs.write_checkpoint(root / "a/best.ckpt", CLASSES)
    second = runs.write_checkpoint(root / "b/best.ckpt", CLASSES, seed=18, model={"depth": 4}, skip=SPANS)
    runs.write_checkpoint(root / "dense/best.ckpt", CLASSES, skip=None)
    expected = {
        "a": runs.expected_of(first, paths),
        "b": runs.expected_of(second, paths, [(1, 2, 7), (3, 4, 5)], depth=4),
    }
    for run in ("run", "other run"):
        (root / run).mkdir()
        lines = [{"step": step, "loss": 1.0, "learning_rate": 0.1, "images_per_second": 3.0} for step in range(1, 9)]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 8, "epoch": 2.0, "top1": 50.0}])
        (root / run / "metrics.jsonl").write_text(text + '{"step": 9, "lo', encoding="utf-8")
    return root, paths, expected


def drawn(capsys, *arguments):
    """Run the command; its line of JSON."""
    assert run_command(visualize.main, [str(argument) for argument in arguments]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    with Image.open(line["output"]) as picture:
        picture.load()
    return line


def assert_choices(line, paths, expected):
    """``expected``: for each choice its title, the reference's result, and the span."""
    assert [item["image"] for item in line["images"]] == [str(path) for path in paths]
    for index, item in enumerate(line["images"]):
        assert len(item["choices"]) == len(expected)
        for choice, (title, result, span) in zip(item["choices"], expected):
            assert choice.get("of", "") == title
            assert choice["kept"] == result.spans[span].kept[index].tolist()
            assert choice["class"] == CLASSES[result.logits[index].argmax()]
            exponentials = np.exp(result.logits[index])
            assert choice["probability"] == pytest.approx(exponentials.max() / exponentials.sum(), abs=1e-5)


def test_a_checkpoints_choice(scene, tmp_path, capsys):
    root, paths, expected = scene
    line = drawn(capsys, root / "a/best.ckpt", paths[0], paths[1], "-o", tmp_path / "a.png")
    assert_choices(line, paths[:2], [("", expected["a"], 0)])


def test_two_checkpoints_side_by_side_with_all_their_spans(scene, tmp_path, capsys):
    root, paths, expected = scene
    compared = ["--compare", root / "a/best.ckpt", root / "b/best.ckpt"]
    line = drawn(capsys, root / "images", *compared, "--spans", "-o", tmp_path / "a.png")
    titles = ["a/best.ckpt, blocks 1 to 1", "b/best.ckpt, blocks 1 to 1", "b/best.ckpt, blocks 3 to 3"]
    results = [expected["a"], expected["b"], expected["b"]]
    assert_choices(line, paths, list(zip(titles, results, [0, 0, 1])))


def test_two_scores_of_one_checkpoint(scene, tmp_path, capsys):
    """The images may stand behind the options too."""
    root, paths, expected = scene
    compared = ["--compare", "cls_attention", "cls_attention"]
    line = drawn(capsys, root / "a/best.ckpt", *compared, *paths, "-o", tmp_path / "a.png")
    assert_choices(line, paths, [("cls_attention", expected["a"], 0)] * 2)


def test_runs(scene, tmp_path, capsys):
    root = scene[0]
    line = drawn(capsys, root / "run", root / "other run", "-o", tmp_path / "curves.png")
    assert line["runs"] == [str(root / "run"), str(root / "other run")]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{root}/a/best.ckpt", "{root}/images"], ["required", "--output"]),
        (["{root}/a/best.ckpt", "{root}/images", "-o", "{tmp}/a.gif"], ["{tmp}/a.gif", ".png .pdf .svg"]),
        (["{root}/a/best.ckpt", "{root}/images", "-o", "{tmp}/no/a.png"], ["{tmp}/no is not a folder"]),
        (["{root}/a/best.ckpt", "-o", "{tmp}/a.png"], ["0 images", "1 to 64"]),
        (["{root}/a/best.ckpt", "{root}/no.png", "-o", "{tmp}/a.png"], ["{root}/no.png", "no such file"]),
        (["{root}/images", "{root}/images", "-o", "{tmp}/a.png"], ["{root}/images", "no such checkpoint"]),
        (["{root}/dense/best.ckpt", "{root}/images", "-o", "{tmp}/a.png"], ["dense/best.ckpt", "no token skips"]),
        (["{root}/run", "{root}/images", "-o", "{tmp}/a.png"], ["{root}/images", "metrics.jsonl"]),
        (
            ["{root}/a/best.ckpt", "{root}/images", "--compare", "cls_attention", "size", "-o", "{tmp}/a.png"],
            ["--compare", "size is no score", "cls_attention"],
        ),
    ],
)
def test_bad_input_is_one_line(arguments, parts, scene, tmp_path, capsys):
    places = {"root": scene[0], "tmp": tmp_path}
    code = run_command(visualize.main, [argument.format(**places) for argument in arguments])
    out, err = capsys.readouterr()
    runs.assert_bad_input(code, err, *[part.format(**places) for part in parts])
    assert out == ""
    assert not list(tmp_path.iterdir())
