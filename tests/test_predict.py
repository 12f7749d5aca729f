"""Prediction: a table for people, lines of JSON for programs, both the NumPy model's."""

import json

import numpy as np
import pytest
import runs

from skipvit import predict
from skipvit.log import run_command

CLASSES = ["crow", "heron", "owl", "rook"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    root = tmp_path_factory.mktemp("scene")
    parameters = runs.write_checkpoint(root / "best.ckpt", CLASSES[:3], model={"num_classes": 4})
    folder = runs.write_images(root / "images", 5, CLASSES[:2])
    paths = sorted(folder.rglob("*.png"))
    expected = {
        name: runs.expected_of(parameters, paths, spans) for name, spans in (("skip", [(1, 2, 7)]), ("dense", []))
    }
    return root, paths, {name: probabilities(result.logits) for name, result in expected.items()}


def probabilities(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def predicted(capsys, *arguments):
    assert run_command(predict.main, [str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out.splitlines()


def assert_lines(lines, paths, expected, top):
    """The last class has no name, as training had no folder for it."""
    names = [*CLASSES[:3], "3"]
    assert len(lines) == len(paths)
    for line, path, wanted in zip(map(json.loads, lines), paths, expected):
        assert line["image"] == str(path)
        order = np.argsort(-wanted)[:top]
        assert [item["class"] for item in line["predictions"]] == [names[index] for index in order]
        given = [item["probability"] for item in line["predictions"]]
        np.testing.assert_allclose(given, wanted[order], atol=1e-5)


def test_a_table_and_then_json(scene, capsys):
    root, paths, expected = scene
    lines = predicted(capsys, root / "best.ckpt", paths[0], root / "images", "--batch-size", "4")
    assert len(lines) == 2 * (1 + len(paths))
    table, lines = lines[: 1 + len(paths)], lines[1 + len(paths) :]
    assert_lines(lines, [paths[0], *paths], expected["skip"][[0, *range(5)]], top=4)
    for row, line in zip(table, map(json.loads, lines)):
        best = line["predictions"][0]
        assert row.startswith(line["image"])
        assert f"  {best['class']} {100 * best['probability']:.1f}%  " in row
        assert row.count("%") == 4
    assert len({row.index(" ") for row in table}) <= 2
    assert len({row.index("%") for row in table if row.split()[1] == table[0].split()[1]}) == 1, "columns"


def test_for_programs_only_and_without_skipping(scene, capsys):
    root, paths, expected = scene
    lines = predicted(capsys, root / "best.ckpt", root / "images", "--json", "--top", "2", "--no-skip")
    assert_lines(lines, paths, expected["dense"], top=2)
    assert np.abs(expected["dense"] - expected["skip"]).max() > 1e-3, "or the comparison shows nothing"


def test_a_model_that_chooses_by_masks_predicts_without_skipping(scene, tmp_path, capsys):
    _, paths, expected = scene
    runs.write_checkpoint(
        tmp_path / "best.ckpt", CLASSES[:3], model={"num_classes": 4}, skip={**runs.RECIPE["skip"], "score": "mask"}
    )
    code = run_command(predict.main, [str(tmp_path / "best.ckpt"), str(paths[0])])
    runs.assert_bad_input(code, capsys.readouterr().err, "masks", "--no-skip", "skipvit.evaluate")
    lines = predicted(capsys, tmp_path / "best.ckpt", paths[0], "--json", "--no-skip")
    assert_lines(lines, paths[:1], expected["dense"], top=4)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{root}/best.ckpt"], ["required", "IMAGE"]),
        (["{root}/no.ckpt", "{root}/images"], ["{root}/no.ckpt", "no such checkpoint"]),
        (["{root}/best.ckpt", "{root}/no.png"], ["{root}/no.png", "no such file"]),
        (["{root}/best.ckpt", "{root}/best.ckpt"], ["{root}/best.ckpt", "cannot be read as an image"]),
        (["{root}/best.ckpt", "{root}/images", "--top", "0"], ["--top", "0"]),
        (["{root}/best.ckpt", "{root}/images", "--batch-size", "0"], ["--batch-size", "0"]),
    ],
)
def test_bad_input_is_one_line(arguments, parts, scene, capsys):
    code = run_command(predict.main, [argument.format(root=scene[0]) for argument in arguments])
    out, err = capsys.readouterr()
    runs.assert_bad_input(code, err, *[part.format(root=scene[0]) for part in parts])
    assert out == ""
