"""timm's weights in and out: nothing is lost on the way, and what does not fit is refused with the reason."""

import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest
import reference
import runs
from mindspore import Parameter, Tensor

from skipvit import checkpoint, config, convert, model, runtime
from skipvit.inference import Classify, look
from skipvit.log import run_command

safetensors = pytest.importorskip("safetensors.numpy")

# As timm's tiny, but of two blocks and small images.
DEPTH, PATCH_SIZE, IMAGE_SIZE, HEADS, CLASSES = 2, 4, 16, 3, 5
SIZES = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": 192, "depth": DEPTH, "num_classes": CLASSES}
ARRAYS = {name: np.asarray(value, np.float32) for name, value in reference.init(5, **SIZES).items()}


def write(path, arrays=ARRAYS, **changes):
    """A file as timm writes it, with tensors changed, or taken out by None."""
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.save_file(arrays, str(path), metadata={"format": "pt"})
    return path


def converted(capsys, *arguments):
    """Run the command; what it said, and its line of JSON."""
    assert run_command(convert.main, [str(argument) for argument in arguments]) == 0
    *said, last = capsys.readouterr().out.splitlines()
    return said, json.loads(last)


def logits_of(path, images):
    runtime.start()
    saved = checkpoint.load(path)
    classify = Classify(checkpoint.build_model(saved), saved.config)
    seen = list(look(classify, saved.config, images, len(images)))
    return np.stack([one.probabilities for one in seen])


def assert_same(arrays, expected):
    assert arrays.keys() == expected.keys()
    for name, value in expected.items():
        assert arrays[name].dtype == np.float32
        np.testing.assert_array_equal(arrays[name], value, err_msg=name)


# --------------------------------------------------------------------------------------------------- in and out


def test_a_round_trip_is_exact(tmp_path, capsys):
    source = write(tmp_path / "vit_tiny.safetensors")
    _, line = converted(capsys, source, tmp_path / "ours.ckpt")
    assert line == {
        "checkpoint": str(tmp_path / "ours.ckpt"),
        "model": "vit_tiny_patch16_224",
        "num_classes": CLASSES,
        "image_size": IMAGE_SIZE,
        "skip": None,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    _, line = converted(capsys, "--reverse", tmp_path / "ours.ckpt", tmp_path / "back.safetensors")
    assert_same(safetensors.load_file(str(tmp_path / "back.safetensors")), ARRAYS)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 192, "depth": 2, "num_heads": 3, "mlp_ratio": 4.0}
    assert line["timm"] == ["vit_tiny_patch16_224", {"num_classes": 5, **sizes}]
    with convert._safetensors().safe_open(str(tmp_path / "back.safetensors"), framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}, "which timm's and others' readers ask for"
    assert {path.name for path in tmp_path.iterdir()} == {"vit_tiny.safetensors", "ours.ckpt", "back.safetensors"}


def test_half_precision_keeps_its_values(tmp_path, capsys):
    halves = {name: value.astype(np.float16) for name, value in ARRAYS.items()}
    converted(capsys, write(tmp_path / "vit.safetensors", halves), tmp_path / "ours.ckpt")
    assert_same(
        checkpoint.load(tmp_path / "ours.ckpt").arrays, {name: a.astype(np.float32) for name, a in halves.items()}
    )


@pytest.mark.parametrize(
    ("overrides", "name", "spans"),
    [([], "vit", []), (["skip.start=1", "skip.end=2", "skip.keep_ratio=0.45"], "skipvit", [(1, 2, runs.KEPT_COUNT)])],
)
def test_the_model_computes_what_the_reference_does(overrides, name, spans, tmp_path, capsys):
    paths = sorted(runs.write_images(tmp_path / "images", 3).rglob("*.png"))
    source = write(tmp_path / "deit_tiny.safetensors")
    _, line = converted(capsys, source, tmp_path / "ours.ckpt", *overrides, "data.val_crop_ratio=1")
    assert line["model"] == f"{name}_tiny_patch16_224"
    result = runs.expected_of(ARRAYS, paths, spans, num_heads=HEADS)
    exponentials = np.exp(result.logits)
    expected = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_allclose(logits_of(tmp_path / "ours.ckpt", paths), expected, atol=1e-5)


def test_a_skipvits_name_brings_the_recipes_span(tmp_path, capsys):
    deep = {
        **ARRAYS,
        **{
            f"blocks.{i}{name[8:]}": value
            for name, value in ARRAYS.items()
            if name.startswith("blocks.1")
            for i in range(2, 12)
        },
    }
    source = write(tmp_path / "deit_tiny.safetensors", deep)
    _, line = converted(capsys, source, tmp_path / "ours.ckpt", "model.name=skipvit_tiny_patch16_224")
    assert (line["skip"][0]["start"], line["skip"][0]["end"]) == (config.SkipConfig.start, config.SkipConfig.end)


def test_the_moving_average_is_what_goes_out(tmp_path, capsys):
    runs.write_checkpoint(tmp_path / "run.ckpt", ["a", "b"])
    saved = checkpoint.load(tmp_path / "run.ckpt")
    averages = {f"ema.{name}": value + 1 for name, value in saved.arrays.items()}
    parameters = [Parameter(Tensor(value), name=name) for name, value in {**saved.arrays, **averages}.items()]
    checkpoint.save(tmp_path / "run.ckpt", parameters, saved.meta)
    converted(capsys, "--reverse", tmp_path / "run.ckpt", tmp_path / "out.safetensors")
    written = safetensors.load_file(str(tmp_path / "out.safetensors"))
    assert_same(written, {name: value + 1 for name, value in saved.arrays.items()})


def test_a_gelu_that_timm_has_not_is_told(tmp_path, capsys):
    runs.write_checkpoint(tmp_path / "run.ckpt", ["a", "b"], model={"gelu": "sigmoid"})
    said, _ = converted(capsys, "--reverse", tmp_path / "run.ckpt", tmp_path / "out.safetensors")
    assert "sigmoid" in said[0]


# ------------------------------------------------------------------------------------------------- what changes


def test_another_number_of_classes_has_a_new_head(tmp_path, capsys):
    (tmp_path / "names.txt").write_text("crow\n\nheron \nowl\n", encoding="utf-8")
    source = write(tmp_path / "vit.safetensors")
    options = ["model.num_classes=3", "--classes", tmp_path / "names.txt"]
    said, line = converted(capsys, source, tmp_path / "ours.ckpt", *options)
    assert said[0] == f"the head is new, for 3 classes; {source} has 5"
    assert line["num_classes"] == 3
    saved = checkpoint.load(tmp_path / "ours.ckpt")
    assert saved.meta["classes"] == ["crow", "heron", "owl"]
    head = {name: saved.arrays.pop(name) for name in ("head.weight", "head.bias")}
    assert head["head.weight"].shape == (3, 192)
    assert 0.015 < head["head.weight"].std() < 0.025
    assert_same(saved.arrays, {name: value for name, value in ARRAYS.items() if not name.startswith("head")})


def test_weights_without_a_head_get_one(tmp_path, capsys):
    source = write(tmp_path / "vit.safetensors", **{"head.weight": None, "head.bias": None})
    said, _ = converted(capsys, source, tmp_path / "ours.ckpt", "model.num_classes=3")
    assert said[0] == f"the head is new, for 3 classes; {source} has none"


def test_the_classes_of_an_image_folder(tmp_path, capsys):
    folder = runs.write_images(tmp_path / "val", 10, ["wren", "crow", "heron", "owl", "rook"])
    converted(capsys, write(tmp_path / "vit.safetensors"), tmp_path / "ours.ckpt", "--classes", folder)
    assert checkpoint.load(tmp_path / "ours.ckpt").meta["classes"] == ["crow", "heron", "owl", "rook", "wren"]


def bicubic(count, wanted):
    """The matrix ``(wanted, count)`` of bicubic resampling (a = -0.5), widened where it shrinks (antialiasing)."""
    scale = count / wanted
    width = max(scale, 1.0)
    distance = np.abs((np.arange(count)[None, :] + 0.5 - (np.arange(wanted)[:, None] + 0.5) * scale) / width)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("image_size", [12, 20, 28])
def test_another_image_size_has_the_position_embedding_resampled(image_size, tmp_path, capsys):
    grid = image_size // PATCH_SIZE
    source = write(tmp_path / "vit.safetensors")
    said, _ = converted(capsys, source, tmp_path / "ours.ckpt", f"model.image_size={image_size}")
    assert said[0] == f"the position embedding is resampled from 4 x 4 to {grid} x {grid}"
    arrays = checkpoint.load(tmp_path / "ours.ckpt").arrays
    ours = arrays.pop("pos_embed")
    matrix = bicubic(4, grid)
    expected = np.einsum("ai,bj,ijd->abd", matrix, matrix, ARRAYS["pos_embed"][0, 1:].reshape(4, 4, 192))
    np.testing.assert_allclose(ours[0, 1:].reshape(grid, grid, 192), expected, atol=1e-5)
    np.testing.assert_array_equal(ours[0, 0], ARRAYS["pos_embed"][0, 0])
    assert_same(arrays, {name: value for name, value in ARRAYS.items() if name != "pos_embed"})


# ------------------------------------------------------------------------------------------------- the pixels


@pytest.mark.parametrize(("name", "mean"), [("vit_tiny", [0.5] * 3), ("deit_tiny", [0.485, 0.456, 0.406])])
def test_the_name_tells_how_pixels_are_normalised(name, mean, tmp_path, capsys):
    said, _ = converted(capsys, write(tmp_path / f"{name}.safetensors"), tmp_path / "ours.ckpt")
    assert f"mean {mean}" in said[-1]
    assert "for want of a config.json" in said[-1]
    data = checkpoint.load(tmp_path / "ours.ckpt").config.data
    assert (list(data.mean), data.val_crop_ratio) == (mean, 0.9)


def test_a_config_json_beside_it_knows_better_and_an_override_best(tmp_path, capsys):
    given = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 0.95}
    source = write(tmp_path / "vit_tiny.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny", "pretrained_cfg": given}))
    said, _ = converted(capsys, source, tmp_path / "ours.ckpt", "data.std=[1,1,1]")
    assert f"from {tmp_path / 'config.json'}" in said[-1]
    data = checkpoint.load(tmp_path / "ours.ckpt").config.data
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    assert (data.interpolation, data.val_crop_ratio) == ("bilinear", 0.95)


def test_a_run_stopped_while_its_images_were_smaller_goes_out_at_the_last_size(tmp_path, capsys):
    recipe = config.from_dict({**runs.RECIPE, "phases": [{"share": 0.5, "image_size": 8}, {"share": 0.5}]})
    recipe = recipe.replace(model=dataclasses.replace(recipe.model, num_classes=2))
    small = model.VisionTransformer(recipe.of_phase(0).model)
    checkpoint.save(tmp_path / "a.ckpt", small.get_parameters(), {"config": recipe.to_dict(), "classes": ["a", "b"]})
    _, line = converted(capsys, "--reverse", tmp_path / "a.ckpt", tmp_path / "out.safetensors")
    assert line["timm"][1]["img_size"] == 16
    out = safetensors.load_file(str(tmp_path / "out.safetensors"))
    assert out["pos_embed"].shape == (1, 1 + runs.PATCH_COUNT, 16)


# ------------------------------------------------------------------------------------------------- bad input

ROW = np.zeros((1, 1, 192), np.float32)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dist_token": ROW}, ["dist_token", "distilled", "without _distilled"]),
        ({"head_dist.weight": ROW[0]}, ["head_dist.weight", "distilled"]),
        ({"reg_token": ROW}, ["reg_token", "register"]),
        ({"blocks.0.ls1.gamma": ROW[0, 0]}, ["blocks.0.ls1.gamma", "LayerScale"]),
        ({"fc_norm.weight": ROW[0, 0]}, ["fc_norm.weight", "CLS token"]),
        ({"surprise": ROW}, ["surprise", "no place"]),
        ({"cls_token": None}, ["CLS token"]),
        ({"patch_embed.proj.weight": None}, ["Vision Transformer"]),
        ({"blocks.1.norm1.bias": None}, ["has no blocks.1.norm1.bias"]),
        ({"blocks.1.mlp.fc1.bias": ROW[0, 0]}, ["blocks.1.mlp.fc1.bias", "(192,)", "(768,)"]),
        ({"pos_embed": np.zeros((1, 16, 192), np.float32)}, ["pos_embed", "16 places"]),
        ({"patch_embed.proj.weight": np.zeros((48, 3, 4, 4), np.float32)}, ["width 48", "tiny 192"]),
        ({"norm.weight": np.ones(192)}, ["norm.weight", "F64", "F32"]),
        ({"head.weight": None, "head.bias": None}, ["no head", "model.num_classes=10"]),
    ],
)
def test_what_is_no_vit_of_ours_is_refused_with_the_reason(changes, parts, tmp_path, capsys):
    source = write(tmp_path / "in.safetensors", **changes)
    code = run_command(convert.main, [str(source), str(tmp_path / "out.ckpt")])
    runs.assert_bad_input(code, capsys.readouterr().err, source, *parts)
    assert not (tmp_path / "out.ckpt").exists()


def huge_header(content):
    return (1 << 62).to_bytes(8, "little") + content[8:]


def bfloat16(content):
    header = json.dumps({"cls_token": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda content: b"", "safetensors"),
        (lambda content: content[:-1], "safetensors"),
        (lambda content: content + b"x", "safetensors"),
        (lambda content: content[:100], "safetensors"),
        (huge_header, "safetensors"),
        (lambda content: b"\x80\x04" + content, "safetensors"),
        (bfloat16, "BF16"),
    ],
)
def test_a_damaged_file_is_refused(damage, part, tmp_path, capsys):
    source = write(tmp_path / "in.safetensors")
    source.write_bytes(damage(source.read_bytes()))
    code = run_command(convert.main, [str(source), str(tmp_path / "out.ckpt")])
    runs.assert_bad_input(code, capsys.readouterr().err, source, part)


def test_the_checksum_it_was_published_with_tells_damage(tmp_path, capsys):
    source = write(tmp_path / "in.safetensors")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    converted(capsys, source, tmp_path / "out.ckpt", "--sha256", digest.upper())
    (tmp_path / "out.ckpt").unlink()
    content = bytearray(source.read_bytes())
    content[-7] ^= 1  # in the numbers: the file is sound in all else
    source.write_bytes(content)
    code = run_command(convert.main, [str(source), str(tmp_path / "out.ckpt"), "--sha256", digest])
    runs.assert_bad_input(code, capsys.readouterr().err, source, digest, "damaged")
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"head.bias": np.array([0, 1, np.nan, 3, 4], np.float32)}, "head.bias has values that are no finite numbers"),
        ({"pos_embed": np.zeros((1, 0, 192), np.float32)}, "pos_embed has 0 places"),
        ({"head.weight": np.zeros((), np.float32)}, "is no Vision Transformer"),
    ],
)
def test_tensors_of_absurd_shape_or_value_are_refused(changes, part, tmp_path, capsys):
    source = write(tmp_path / "in.safetensors", **changes)
    code = run_command(convert.main, [str(source), str(tmp_path / "out.ckpt")])
    runs.assert_bad_input(code, capsys.readouterr().err, source, part)


def test_a_config_json_that_is_no_small_file_is_passed_over(tmp_path, capsys):
    source = write(tmp_path / "vit.safetensors")
    for content in (b"[" * 60_000, b" " * 1_000_000, None):
        beside = tmp_path / "config.json"
        beside.unlink(missing_ok=True)
        os.mkfifo(beside) if content is None else beside.write_bytes(content)
        said, _ = converted(capsys, source, tmp_path / "ours.ckpt")
        assert "for want of a config.json" in said[-1]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["{tmp}/in.safetensors"], ["required: OUT; "]),
        (["{tmp}/no.safetensors", "{tmp}/out.ckpt"], ["{tmp}/no.safetensors", "no such file"]),
        (["{tmp}/in.pth", "{tmp}/out.ckpt"], ["{tmp}/in.pth", ".safetensors", "without --reverse"]),
        (["{tmp}/in.safetensors", "{tmp}/out.safetensors"], ["{tmp}/out.safetensors", ".ckpt"]),
        (["{tmp}/in.safetensors", "{tmp}/no/out.ckpt"], ["{tmp}/no is not a folder"]),
        (["--reverse", "{tmp}/in.safetensors", "{tmp}/out.ckpt"], ["{tmp}/in.safetensors", ".ckpt", "with --reverse"]),
        (["--reverse", "{tmp}/no.ckpt", "{tmp}/out.safetensors"], ["{tmp}/no.ckpt", "no such checkpoint"]),
        (["--reverse", "{tmp}/no.ckpt", "{tmp}/out.safetensors", "model.num_classes=3"], ["--reverse", "key=value"]),
        (["{tmp}/in.safetensors", "{tmp}/out.ckpt", "model.dept=3"], ["model.dept", "model.depth"]),
        (["{tmp}/in.safetensors", "{tmp}/out.ckpt", "model.depth=1"], ["no place"]),
        (["{tmp}/in.safetensors", "{tmp}/out.ckpt", "model.image_size=17"], ["model.image_size", "17", "16"]),
        (["{tmp}/in.safetensors", "{tmp}/out.ckpt", "--classes", "{tmp}/names.txt"], ["1 classes", "5"]),
        (["{tmp}/in.safetensors", "{tmp}/out.ckpt", "--classes", "{tmp}/no.txt"], ["--classes", "{tmp}/no.txt"]),
    ],
)
def test_bad_arguments_are_one_line(arguments, parts, tmp_path, capsys):
    write(tmp_path / "in.safetensors")
    (tmp_path / "names.txt").write_text("crow\n")
    code = run_command(convert.main, [argument.format(tmp=tmp_path) for argument in arguments])
    runs.assert_bad_input(code, capsys.readouterr().err, *[part.format(tmp=tmp_path) for part in parts])
