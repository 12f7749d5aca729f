"""A file for serving: loaded again it is the model, and what stands beside it is enough to use it."""

import json
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import runs
from mindspore import Tensor, nn
from PIL import Image

from skipvit import checkpoint, export, runtime
from skipvit.log import RunFailed, run_command

CLASSES = ["crow", "heron", "owl"]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    root = tmp_path_factory.mktemp("scene")
    parameters = runs.write_checkpoint(root / "best.ckpt", CLASSES, model={"num_classes": 4})
    runs.write_checkpoint(root / "mask.ckpt", CLASSES, skip={**runs.RECIPE["skip"], "score": "mask"})
    return root, parameters


def exported(capsys, *arguments):
    """Run the command; its line of JSON, and the description beside the file."""
    assert run_command(export.main, [str(argument) for argument in arguments]) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    with open(line["description"], encoding="utf-8") as file:
        return line, json.load(file)


def serve(description, paths):
    """Prepare images as somebody would who has the description alone: ``(B, 3, S, S)``."""
    steps, prepared = description["preprocessing"], []
    for path in paths:
        image = Image.open(path).convert("RGB")
        side, crop = steps["resize_shorter_side_to"], steps["crop_from_the_centre"]
        scale = side / min(image.size)
        image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BICUBIC)
        left, top = ((length - crop) // 2 for length in image.size)
        pixels = np.asarray(image.crop((left, top, left + crop, top + crop))) / steps["divide_by"]
        normalised = (pixels - steps["then_subtract_mean"]) / steps["then_divide_by_std"]
        prepared.append(normalised.transpose(2, 0, 1))
    return np.array(prepared, np.float32)


def test_mindir_loaded_again_is_the_model_and_its_description_tells_how_to_use_it(scene, tmp_path, monkeypatch, capsys):
    """Also under a name that MindSpore's own export would refuse."""
    root, parameters = scene
    paths = sorted(runs.write_images(tmp_path / "images", 4, CLASSES[:2]).rglob("*.png"))
    monkeypatch.chdir(tmp_path)
    Path("with a blank").mkdir()
    line, description = exported(capsys, root / "best.ckpt", "with a blank/größe.mindir", "--batch-size", "4")
    assert (line["difference"], line["compared_images"]) == (0.0, 100)
    # The operators as they are, not the forms that a CPU trains fastest by.
    assert b"BiasAdd" in Path("with a blank/größe.mindir").read_bytes()
    assert description["input"]["shape"] == [4, 3, 16, 16]
    assert description["output"]["shape"] == [4, 4]
    assert description["classes"] == [*CLASSES, "3"]
    assert description["blocks_that_tokens_skip"] == [[1]]
    runtime.start()
    graph = nn.GraphCell(ms.load("with a blank/größe.mindir"))
    logits = graph(Tensor(serve(description, paths))).asnumpy()
    np.testing.assert_allclose(logits, runs.expected_of(parameters, paths).logits, atol=1e-4)
    assert {path.name for path in Path("with a blank").iterdir()} == {"größe.mindir", "größe.json"}
    assert Path.cwd() == tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("options", "spans"), [(["--precision", "fp16"], [(1, 2, 7)]), (["--no-skip"], [])])
def test_precision_and_skipping_are_choices(options, spans, scene, tmp_path, capsys):
    root, parameters = scene
    paths = sorted(runs.write_images(tmp_path / "images", 2, CLASSES[:2]).rglob("*.png"))
    _, description = exported(capsys, root / "best.ckpt", tmp_path / "m.mindir", "--batch-size", "2", *options)
    logits = nn.GraphCell(ms.load(str(tmp_path / "m.mindir")))(Tensor(serve(description, paths))).asnumpy()
    expected = runs.expected_of(parameters, paths, spans).logits
    differences = np.abs(logits - expected).max()
    if "fp16" in options:
        assert 1e-5 < differences < 0.05 * np.abs(expected).max()
    else:
        assert differences < 1e-4
    assert description["precision"] == ("fp16" if "fp16" in options else "fp32")


def test_a_file_that_is_not_the_model_does_not_get_its_name(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nn, "GraphCell", lambda graph: lambda images: Tensor(np.zeros((1, 4), np.float32)))
    assert run_command(export.main, [str(scene[0] / "best.ckpt"), str(tmp_path / "m.mindir")]) == 1
    assert "not written: the MINDIR loaded again gives logits that differ by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- ONNX


@pytest.mark.parametrize(
    ("model", "skip"),
    [
        ({"gelu": "exact"}, {"start": 1, "end": 2, "keep_ratio": 0.45}),
        ({"gelu": "sigmoid"}, None),
        (
            {"gelu": "tanh", "depth": 4},
            [
                {"start": 1, "end": 2, "keep_ratio": 0.45},
                {"start": 3, "end": 4, "keep_ratio": 0.3, "skipped": "drop"},
            ],
        ),
    ],
)
def test_onnx_is_the_model_on_a_hundred_images(model, skip, tmp_path, capsys):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    runs.write_checkpoint(tmp_path / "best.ckpt", CLASSES, model=model, skip=skip)
    line, description = exported(capsys, tmp_path / "best.ckpt", tmp_path / "m.onnx", "--batch-size", "7")
    assert line["compared_images"] == 105
    assert line["difference"] < 1e-4
    images = np.random.default_rng(9).standard_normal((7, 3, 16, 16)).astype(np.float32)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    name, shape = description["input"]["name"], description["input"]["shape"]
    assert [(item.name, item.shape) for item in session.get_inputs()] == [(name, shape)]
    (logits,) = session.run([description["output"]["name"]], {name: images})
    net = checkpoint.build_model(checkpoint.load(tmp_path / "best.ckpt"))
    np.testing.assert_allclose(logits, net(Tensor(images)).asnumpy(), atol=1e-4)


def test_a_wrong_onnx_is_not_written(scene, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "ONNX_TOLERANCE", 1e-12)
    assert run_command(export.main, [str(scene[0] / "best.ckpt"), str(tmp_path / "m.onnx"), "--batch-size", "50"]) == 1
    assert "not written: the ONNX graph's logits differ by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_few_images_may_have_another_patch_kept():
    """Where two scores are equal but for rounding; more of them, or one of a model that chooses none, are a fault."""
    expected = np.random.default_rng(0).standard_normal((50, 2, 7))
    assert export.compare(expected + 1e-6, expected, chooses=False) == {"difference": pytest.approx(1e-6)}
    three, four = expected.copy(), expected.copy()
    three[3, 1], three[20] = 0, 0
    four[:2] = 0
    assert export.compare(three, expected, chooses=True) == {"difference": 0, "chosen_otherwise": 3}
    spoilt = expected.copy()
    spoilt[0, 0, 0] = np.nan
    for given, chooses in ((three, False), (four, True), (spoilt, True)):
        with pytest.raises(RunFailed, match="not written: the ONNX graph's logits differ by"):
            export.compare(given, expected, chooses)


def test_without_onnx_the_way_out_is_told(scene, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    code = run_command(export.main, [str(scene[0] / "best.ckpt"), str(tmp_path / "m.onnx")])
    runs.assert_bad_input(code, capsys.readouterr().err, "pip install onnx onnxruntime", ".mindir")


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{root}/best.ckpt"], ["required", "OUT"]),
        (["{root}/best.ckpt", "{tmp}/m.air"], ["{tmp}/m.air", ".mindir", ".onnx"]),
        (["{root}/best.ckpt", "{tmp}/no/m.mindir"], ["{tmp}/no is not a folder"]),
        (["{root}/best.ckpt", "{tmp}/m.mindir", "--batch-size", "0"], ["--batch-size", "0"]),
        (["{root}/best.ckpt", "{tmp}/m.mindir", "--precision", "bf16"], ["--precision", "bf16", "fp16"]),
        (["{root}/best.ckpt", "{tmp}/m.onnx", "--precision", "fp16"], ["fp16", "ONNX", ".mindir"]),
        (["{root}/no.ckpt", "{tmp}/m.mindir"], ["{root}/no.ckpt", "no such checkpoint"]),
        (["{root}/mask.ckpt", "{tmp}/m.mindir"], ["by masks", "--no-skip"]),
        (["{root}/best.ckpt", "/proc/m.mindir"], ["/proc/m.mindir: cannot be written"]),
    ],
)
def test_bad_input_is_one_line(arguments, parts, scene, tmp_path, capsys):
    places = {"root": scene[0], "tmp": tmp_path}
    code = run_command(export.main, [argument.format(**places) for argument in arguments])
    out, err = capsys.readouterr()
    runs.assert_bad_input(code, err, *[part.format(**places) for part in parts])
    assert out == ""
    assert not list(tmp_path.iterdir())
