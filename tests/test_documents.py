"""What the documents tell to do is done: the guide's commands, the README's Python, the examples."""

import re
import shlex
import subprocess

import mindspore as ms
import numpy as np
import pytest
import reference
import runs

from skipvit import clutter, convert, evaluate, export, log, predict, runtime, train, visualize

COMMANDS = {
    "convert": convert,
    "evaluate": evaluate,
    "export": export,
    "predict": predict,
    "train": train,
    "visualize": visualize,
}

pytestmark = pytest.mark.usefixtures("graph_mode")


def blocks(document, language):
    """The code of a document, block by block."""
    text = (runs.ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def replaced(text, changes):
    """The text with small values for large ones, each of which must stand in it."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


# --------------------------------------------------------------------------------------------------- the guide

SMALL_RECIPE = {
    "embed_dim: 128, depth: 6": "embed_dim: 16, depth: 3",
    "{start: 2, end: 5,": "{start: 1, end: 2,",
    "batch_size: 64": "batch_size: 4",
    "epochs: 30": "epochs: 3",
    "image_size: 64": "image_size: 16",
    "patch_size: 8": "patch_size: 4",
}
SMALL_IMAGES = {"model.image_size=96": "model.image_size=24"}
# The weights below are of a ViT-tiny of two blocks.
SMALL_TUNING = [
    "model.depth=2",
    "model.image_size=32",
    "skip.start=1",
    "skip.end=2",
    "skip.align=1",
    "train.epochs=1",
    "data.batch_size=4",
]


def write_deit(path):
    safetensors = pytest.importorskip("safetensors.numpy")
    parameters = reference.init(0, image_size=32, patch_size=16, embed_dim=192, depth=2, num_classes=1000)
    safetensors.save_file({name: np.asarray(value, np.float32) for name, value in parameters.items()}, str(path))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as the guide asks for."""
    root = tmp_path_factory.mktemp("guide")
    for part, count in (("train", 12), ("val", 5)):
        runs.write_images(root / "photos" / part, count, side=40)
    write_deit(root / "deit_tiny_patch16_224.safetensors")
    (root / "configs").symlink_to(runs.ROOT / "configs")
    return root


@pytest.mark.slow
def test_the_guides_commands_one_after_the_other(place, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboardX")
    monkeypatch.chdir(place)
    done = []
    for block in blocks("docs/guide.md", "bash"):
        if block.startswith("cat >"):
            subprocess.run(["bash", "-c", replaced(block, SMALL_RECIPE)], check=True)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            module, arguments = command_of(replaced(line, SMALL_IMAGES) if "=96" in line else line)
            if module is None:
                continue
            if "finetune" in line:
                arguments += SMALL_TUNING
            code = log.run_command(module.main, arguments)
            out, err = capsys.readouterr()
            assert (code, err) == (0, ""), (line, err)
            assert out.splitlines()[-1].startswith("{"), line
            done.append(line.split()[2].removeprefix("skipvit."))
    assert {"visualize", "evaluate", "predict", "convert", "export"} <= set(done)
    for name in ("tokens.png", "curves.pdf", "compared.png", "photos.safetensors", "photos.mindir", "photos.json"):
        assert (place / name).stat().st_size > 100, name
    for run in ("photos", "profiled", "photos_96", "tuned"):
        assert {"last.ckpt", "curves.png", "tokens.png"} <= {path.name for path in (place / "runs" / run).iterdir()}

    (server,) = blocks("docs/guide.md", "python")
    names = {}
    exec(compile(server, "guide.md", "exec"), names)  # the document's code is ours
    image = next((place / "photos/val/heron").iterdir())
    assert log.run_command(predict.main, ["runs/photos/best.ckpt", str(image), "--top", "1", "--json"]) == 0
    assert f'"class": "{names["classify"](image)}"' in capsys.readouterr().out


def command_of(line):
    """The module and arguments of a command line of the guide; None for what another test runs."""
    words = shlex.split(line)
    if words[:2] == ["bash", "run_train.sh"]:
        return train, words[2:]
    if words[:2] == ["python", "examples/segment_clutter.py"]:
        return None, []
    assert words[:2] == ["python", "-m"], line
    if words[-1].endswith(".onnx") and not has_onnx():
        return None, []
    return COMMANDS[words[2].removeprefix("skipvit.")], words[3:]


def has_onnx():
    try:
        return export.import_onnx() is not None
    except export.UserError:
        return False


# --------------------------------------------------------------------------------------------------- README


def test_the_mindcv_example(tmp_path, monkeypatch):
    (example,) = (block for block in blocks("README.md", "python") if "mindcv" in block)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    runs.write_images(tmp_path / "photos/train", 8, side=40)
    monkeypatch.chdir(tmp_path)
    sizes = "image_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, skip={'start': 1, 'end': 2}"
    small = {
        "batch_size=32": "batch_size=4",
        '"skipvit_small_patch16_224"': f'"skipvit_tiny_patch16_224", {sizes}',
        "create_transforms(": "create_transforms(image_resize=16, ",
        ".train(10,": ".train(2,",
    }
    names = {}
    try:
        exec(compile(replaced(example, small), "README.md", "exec"), names)
    finally:
        runtime.start()
    steps = names["optimizer"].global_step.asnumpy()
    assert steps == 4
    assert all(np.isfinite(weight.asnumpy()).all() for weight in names["net"].get_parameters())


def test_the_python_example():
    (example,) = (block for block in blocks("README.md", "python") if "mindcv" not in block)
    sizes = ", image_size=16, patch_size=4, embed_dim=16, depth=12, num_heads=2"
    names = {"images": ms.Tensor(np.zeros((2, 3, 16, 16), np.float32))}
    exec(compile(replaced(example, {"num_classes=10": f"num_classes=10{sizes}"}), "README.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert names["patches"].shape == (2, 7)


# --------------------------------------------------------------------------------------------------- examples


def test_the_dense_head_learns_from_the_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(runs.ROOT / "examples"))
    import segment_clutter

    data = clutter.ensure(
        clutter.ClutterConfig(classes=2, train_images_per_class=10, val_images_per_class=10), tmp_path
    )
    sizes = {"image_size": 64, "patch_size": 8, "embed_dim": 48, "num_heads": 3}
    runs.write_checkpoint(tmp_path / "best.ckpt", ["a", "b"], model=sizes)
    monkeypatch.setattr(segment_clutter, "BATCH_SIZE", 10)
    segment_clutter.main(tmp_path / "best.ckpt", pictures=20, root=data)
    lines = capsys.readouterr().out.splitlines()
    result = segment_clutter.json.loads(lines[-1])
    sources = [f"{source}_{which}" for source in ("token", "parted", "patch") for which in ("kept", "skipped")]
    assert set(result) == {f"{task}_{source}" for task in ("object", "class") for source in sources}
    assert result["object_token_kept"] > 55, "better than chance, even with random weights"
