"""Tiny training runs for the tests of the commands: images, a recipe, processes, and what a folder then holds."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import reference
import yaml
from mindspore import Parameter, Tensor
from PIL import Image

from skipvit import checkpoint, config

ROOT = Path(__file__).resolve().parent.parent
PATCH_COUNT, KEPT_COUNT = 16, 7  # of the recipe's model
RECIPE = {
    "model": {
        "name": "skipvit_tiny_patch16_224",
        "image_size": 16,
        "patch_size": 4,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
    },
    "skip": {"start": 1, "end": 2, "keep_ratio": 0.45},
    "data": {"train": "train", "val": "val", "batch_size": 4, "num_workers": 1, "val_crop_ratio": 1.0},
    "optim": {"learning_rate": 0.003, "warmup_epochs": 1},
    "train": {"epochs": 4, "output": "run"},
}
# For the shipped recipes, which are larger.
SMALL_MODEL = [
    "model.image_size=32",
    "model.patch_size=8",
    "model.embed_dim=48",
    "model.num_heads=3",
    "model.depth=3",
    "skip.start=1",
]


def write_recipe(path, phases=None, **sections):
    """The recipe with some keys of its sections replaced, and phases."""
    recipe = {**RECIPE, **{name: {**RECIPE.get(name, {}), **keys} for name, keys in sections.items()}, "phases": phases}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def write_checkpoint(path, classes, seed=17, **sections):
    """A checkpoint of the recipe's model, some keys replaced, with the reference's parameters; these are returned."""
    keys = {**RECIPE, **{name: {**RECIPE.get(name, {}), **keys} for name, keys in sections.items() if name != "skip"}}
    keys["skip"] = sections.get("skip", RECIPE["skip"])
    recipe = config.from_dict({**keys, "model": {"num_classes": len(classes), **keys["model"]}})
    model = recipe.model
    parameters = reference.init(
        seed,
        image_size=model.image_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_classes=model.num_classes,
    )
    saved = [Parameter(Tensor(np.asarray(value, np.float32)), name=name) for name, value in parameters.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, saved, {"config": recipe.to_dict(), "classes": list(classes)})
    return parameters


def expected_of(parameters, paths, spans=((1, 2, KEPT_COUNT),), data=None, **model):
    """What the NumPy reference makes of image files that have the model's size already."""
    data = data or config.DataConfig()
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]) / 255
    images = ((pixels - np.array(data.mean)) / np.array(data.std)).transpose(0, 3, 1, 2)
    sizes = {**RECIPE["model"], **model}
    return reference.forward(
        parameters, images, patch_size=sizes["patch_size"], num_heads=sizes["num_heads"], spans=spans
    )


def write_images(root, count, classes=("crow", "heron"), side=16, seed=0):
    """``count`` noisy images dealt out to the classes, each class with a channel of its own dark."""
    generator = np.random.default_rng(seed)
    for index in range(count):
        name = classes[index % len(classes)]
        pixels = generator.integers(0, 256, (side, side, 3), np.uint8)
        pixels[:, :, index % len(classes) % 3] //= 4
        folder = Path(root, name)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return Path(root)


def command(module, *arguments):
    """What a person would type, with this Python."""
    return [sys.executable, "-m", f"skipvit.{module}", *map(str, arguments)]


def environment(**variables):
    """This process's, as one that no launcher started."""
    strange = ("RANK_", "MS_", "DEVICE_", "SERVER_ID", "GLOG_", "PYTHON")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(strange)}
    return {**kept, "PYTHONPATH": str(ROOT / "src"), **variables}


def run(module, *arguments, cwd, timeout=300, **variables):
    """Run a command to its end; standard output and error as text."""
    return subprocess.run(
        command(module, *arguments),
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


def contents(folder):
    """The digest of every file below a folder, by name; folders count too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


def state_of(path):
    """Every array of a checkpoint: type, shape, and the digest of its bits."""
    arrays = checkpoint.load(path).arrays
    return {
        name: (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in arrays.items()
    }


def differing(first, second):
    """Names of what two checkpoints do not have bitwise in common."""
    ours, theirs = state_of(first), state_of(second)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def assert_bad_input(code, stderr, *parts):
    """Exit 2, and one line on standard error that says ``parts``."""
    assert code == 2, stderr
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: "), stderr
    for part in parts:
        assert str(part) in lines[0], f"{part!r} is not in {lines[0]!r}"
