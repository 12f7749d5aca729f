"""Weights of timm's and DeiT's Vision Transformers to a checkpoint of ours, and back (--reverse).

Reads a .safetensors file of vit_* or deit_* tiny, small or base; sizes follow from the tensors. key=value sets keys of
the checkpoint's configuration, as in a recipe: a skip span, another number of classes (the head is then new), another
image size in pixels a side (the position embedding is resampled). What the pixels are normalised by comes from the
config.json beside the file, as the Hugging Face hub has it, otherwise from the name: deit_* ImageNet's mean and
deviation, vit_* one half; data.mean and data.std set it.

The format has no checksum: --sha256 takes the one that the weights were published with. Without it damage to the
numbers themselves goes unnoticed; the file's own checksum stands in the JSON line, to be compared.

Backwards it writes the weights under timm's names, which timm loads strictly; of a run with a moving average, that.

The last line is JSON: what was written, and of which sizes.

Example:
  python -m skipvit.convert deit_small_patch16_224.safetensors deit_small.ckpt --classes imagenet/val
  python -m skipvit.convert model.safetensors start.ckpt skip.start=3 skip.end=11 model.num_classes=10
  python -m skipvit.convert model.safetensors start.ckpt --sha256 5e5e9bcc...
  python -m skipvit.convert --reverse runs/cifar10/best.ckpt weights.safetensors
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import psutil

from skipvit import checkpoint, runtime
from skipvit.config import MAX_FILE_BYTES, SIZES, Config, DataConfig, UserError, from_dict
from skipvit.data import ImageFolder
from skipvit.log import Parser, run_command
from skipvit.model import VisionTransformer

DTYPES = ("F32", "F16")
# What other models of timm's vit_* and deit_* names have besides, and why it cannot be taken over.
FOREIGN = {
    "dist_token": "a distilled model has a second class token and head; take the one without _distilled",
    "head_dist": "a distilled model has a second class token and head; take the one without _distilled",
    "reg_token": "register tokens are not part of this model",
    "gamma": "LayerScale is not part of this model",
    "fc_norm": "it classifies by the mean of all tokens, this model by the CLS token",
    "norm_pre": "the norm before the blocks is not part of this model",
    "q_norm": "norms of query and key are not part of this model",
}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command; see ``--help``."""
    parser = Parser(prog="python -m skipvit.convert", description=__doc__)
    parser.add_argument("source", metavar="IN", type=Path, help="*.safetensors; with --reverse a checkpoint, *.ckpt")
    parser.add_argument("target", metavar="OUT", type=Path, help="*.ckpt; with --reverse *.safetensors")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="keys of the configuration, as in recipes"
    )
    parser.add_argument("--reverse", action="store_true", help="from a checkpoint of ours to timm's names")
    parser.add_argument(
        "--classes",
        type=Path,
        metavar="FILE|FOLDER",
        help="the classes' names in the logits' order: a text file with one a line, or an image folder "
        "<class>/<image>, sorted (default: their numbers)",
    )
    parser.add_argument("--sha256", metavar="DIGEST", help="of IN, 64 hexadecimal digits: another file is refused")
    arguments = parser.parse_args(argv)
    suffixes = (".ckpt", ".safetensors") if arguments.reverse else (".safetensors", ".ckpt")
    for path, suffix in zip((arguments.source, arguments.target), suffixes):
        if path.suffix != suffix:
            way = "with" if arguments.reverse else "without"
            raise UserError(f"{path}: its name does not end in {suffix}, as it must {way} --reverse")
    if not arguments.target.parent.is_dir():
        raise UserError(f"{arguments.target}: {arguments.target.parent} is not a folder; make it first")
    if arguments.reverse and (arguments.overrides or arguments.classes or arguments.sha256):
        raise UserError("--reverse: takes a checkpoint as it is; leave key=value, --classes and --sha256 out")
    runtime.start()
    summary = (
        to_timm(arguments.source, arguments.target)
        if arguments.reverse
        else from_timm(arguments.source, arguments.target, arguments.overrides, arguments.classes, arguments.sha256)
    )
    print(json.dumps(summary))


def from_timm(
    path: Path, target: Path, overrides: Sequence[str], classes: Optional[Path], sha256: Optional[str] = None
) -> dict[str, Any]:
    """Write the checkpoint; the JSON line's content."""
    digest = digest_of(path)
    if sha256 is not None and sha256.lower() != digest:
        raise UserError(f"{path}: its SHA-256 is {digest}, not {sha256[:64]}; the file is damaged or another")
    arrays = read(path)
    data, said = preprocessing(path)
    config = from_dict({"model": architecture(path, arrays, overrides), "data": data}, overrides)
    if config.model.num_classes is None:
        raise UserError(f"{path}: has no head; say for how many classes a new one is, as in model.num_classes=10")
    net = VisionTransformer(config.model, config.skip)
    unknown = sorted(arrays.keys() - {parameter.name for parameter in net.get_parameters()})
    if unknown:
        raise UserError(f"{path}: has {unknown[0]}, which this model has no place for")
    for change in checkpoint.transfer(net, arrays, path):
        print(change)
    print(f"pixels are normalised by mean {list(config.data.mean)} and std {list(config.data.std)} ({said})")
    meta = {
        "config": config.to_dict(),
        "classes": class_names(classes, config.model.num_classes),
        "converted_from": {"name": path.name, "sha256": digest},
        **runtime.versions(),
    }
    try:
        checkpoint.save(target, net.get_parameters(), meta)
    except OSError as error:
        raise UserError(str(error)) from None
    return {"checkpoint": str(target), **sizes(config), "skip": config.to_dict()["skip"], "sha256": digest}


def digest_of(path: Path) -> str:
    """The file's SHA-256, in hexadecimal digits.

    Raises:
        UserError: no such file, or it is larger than the memory.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give timm's weights as .safetensors")
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > psutil.virtual_memory().available:
                raise UserError(f"{path}: is larger than this machine's free memory")
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as float32; its reader refuses a size that does not add up.

    Raises:
        UserError: not safetensors, tensors that a ViT of ours has not, or values that are no numbers.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                reason = next((why for part, why in FOREIGN.items() if part in name.split(".")), None)
                if reason is not None:
                    raise UserError(f"{path}: has {name}: {reason}")
                dtype = file.get_slice(name).get_dtype()
                if dtype not in DTYPES:
                    raise UserError(f"{path}: {name} is of type {dtype}; save the weights as F32 or F16 first")
            arrays = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
    spoilt = next((name for name, array in arrays.items() if not np.isfinite(array).all()), None)
    if spoilt is not None:
        raise UserError(f"{path}: {spoilt} has values that are no finite numbers; the weights are spoilt")
    return arrays


def architecture(path: Path, arrays: Mapping[str, np.ndarray], overrides: Sequence[str]) -> dict[str, Any]:
    """The section ``model`` that the tensors' shapes tell; a span among the overrides makes it a ``skipvit_*``."""
    shapes = {name: array.shape for name, array in arrays.items()}
    patches, positions = shapes.get("patch_embed.proj.weight", ()), shapes.get("pos_embed", ())
    if "cls_token" not in shapes or len(patches) != 4 or len(positions) != 3 or shapes.get("head.weight") == ():
        raise UserError(f"{path}: is no Vision Transformer with a CLS token as timm names it")
    embed_dim, _, patch_size, _ = patches
    size = next((name for name, (width, _, _) in SIZES.items() if width == embed_dim), None)
    if size is None:
        widths = ", ".join(f"{name} {width}" for name, (width, _, _) in SIZES.items())
        raise UserError(f"{path}: tokens of width {embed_dim} are none of the models' here: {widths}")
    grid = math.isqrt(max(1, positions[1]) - 1)
    if 1 + grid**2 != positions[1]:
        raise UserError(f"{path}: pos_embed has {positions[1]} places, which is not CLS and a square of patches")
    head = {"num_classes": shapes["head.weight"][0]} if "head.weight" in shapes else {}
    kind = "skipvit" if any(override.startswith("skip") for override in overrides) else "vit"
    return {
        "name": f"{kind}_{size}_patch16_224",
        **head,
        "image_size": grid * patch_size,
        "patch_size": patch_size,
        "depth": len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
    }


def preprocessing(path: Path) -> tuple[dict[str, Any], str]:
    """Keys of the section ``data``, and where they come from, in words."""
    beside = path.with_name("config.json")
    try:
        if not beside.is_file() or beside.stat().st_size > MAX_FILE_BYTES:
            raise ValueError
        given = json.loads(beside.read_text(encoding="utf-8"))["pretrained_cfg"]
        keys = {"mean": "mean", "std": "std", "interpolation": "interpolation", "crop_pct": "val_crop_ratio"}
        return {ours: given[theirs] for theirs, ours in keys.items()}, f"from {beside}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    half = path.name.startswith("vit_")
    mean, std = ([0.5] * 3, [0.5] * 3) if half else (list(DataConfig.mean), list(DataConfig.std))
    usual = "timm's vit_*" if half else "timm's deit_*"
    said = f"as is usual for {usual}, for want of a config.json; data.mean=[...] and data.std=[...] set others"
    return {"mean": mean, "std": std, "val_crop_ratio": 0.9}, said


def class_names(path: Optional[Path], count: int) -> list[str]:
    """The classes' names from a text file or an image folder, or their numbers."""
    if path is None:
        return [str(index) for index in range(count)]
    if path.is_dir():
        names = list(ImageFolder(path, "--classes").classes)
    else:
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--classes: {path} cannot be read ({error}); give a text file or an image folder"
            ) from None
    if len(names) != count:
        raise UserError(f"--classes: {path} names {len(names)} classes, the model has {count}")
    return names


def to_timm(path: Path, target: Path) -> dict[str, Any]:
    """Write a checkpoint's weights; the JSON line's content."""
    safetensors = _safetensors()
    saved = checkpoint.load(path)
    net = checkpoint.build_model(saved)
    weights = {parameter.name: parameter.asnumpy() for parameter in net.get_parameters()}
    if saved.config.model.gelu != "exact":
        print(f"timm's GELU is exact, this model's is the {saved.config.model.gelu} form: timm's logits will differ")
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.safetensors")
    try:
        safetensors.numpy.save_file(weights, str(temporary), metadata={"format": "pt"})
        os.replace(temporary, target)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{target}: cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)
    model = saved.config.model
    arguments = {
        "num_classes": model.num_classes,
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "embed_dim": model.embed_dim,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "mlp_ratio": model.mlp_ratio,
    }
    return {"weights": str(target), "timm": [model.name.replace("skipvit", "vit"), arguments]}


def sizes(config: Config) -> dict[str, Any]:
    """Of the model, for the JSON line."""
    model = config.model
    return {"model": model.name, "num_classes": model.num_classes, "image_size": model.image_size}


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError:
        raise UserError("safetensors is not installed; pip install --no-deps safetensors") from None
    return safetensors


if __name__ == "__main__":
    sys.exit(run_command(main))
