"""Checkpoints: one ordinary MindSpore ``.ckpt``, written atomically, with its own checksum and configuration.

The file holds the model's weights under their own names, the rest of the training state (``adam_m.*``, ``ema.*``,
``state.*`` ...), the entry ``skipvit.meta`` (JSON as bytes) and last ``skipvit.sha256``, over the file before it.
Nothing in it is ever executed. Read it is without MindSpore, whose reader a file made for the purpose can crash.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import psutil
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype
from PIL import Image

from skipvit import cost, runtime
from skipvit.config import Config, UserError, from_dict
from skipvit.model import VisionTransformer

META, DIGEST = "skipvit.meta", "skipvit.sha256"
FORMAT = 1
# The last entry as MindSpore writes it (protobuf: name, shape, type), up to its 32 bytes.
DIGEST_HEADER = b"\n=\n\x0eskipvit.sha256\x12+\x08 \x12\x05UInt8\x1a "
DIGEST_ENTRY_BYTES = len(DIGEST_HEADER) + 32
MAX_META_BYTES = 1 << 24
MUCH = 100_000_000  # numbers; a model that has so many more than its file does is refused before it is made
# MindSpore's names of the types that a checkpoint of ours has.
DTYPES = {"Float32": np.float32, "Float16": np.float16, "Int32": np.int32, "UInt8": np.uint8}
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
FRESH = ".fresh.ckpt"  # whole, and about to become last


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        path: where it was.
        arrays: every tensor by name.
        meta: ``config``, ``classes``, ``step`` and whatever else the trainer wrote.
        config: of the finished model: the run's configuration, where that has phases as the last of them has it.
    """

    path: Path
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    config: Config

    def weights(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """What is evaluated and served: the moving average of each weight where there is one, else the weight."""
        names = list(names)
        missing = [name for name in names if name not in self.arrays]
        if missing:
            raise UserError(f"{self.path}: the checkpoint has no {missing[0]}; it is of another model")
        return {name: self.arrays.get(f"ema.{name}", self.arrays[name]) for name in names}


def save(path: Path, parameters: Iterable[Parameter], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint: complete under its name, or not at all.

    Raises:
        OSError: it could not be written (a full disk, a read-only folder); what was at ``path`` is as it was.
    """
    arrays = {parameter.name: parameter.asnumpy() for parameter in parameters}
    arrays[META] = np.frombuffer(json.dumps({"format": FORMAT, **meta}).encode(), np.uint8)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.ckpt")
    try:
        # Not to `path` itself: MindSpore deletes its target before it writes.
        entries = [{"name": name, "data": Tensor(array.copy())} for name, array in arrays.items()]
        runtime.save_checkpoint(entries, str(temporary))
        with open(temporary, "rb+") as file:
            file.write(_digest_entry(file.read()))
        os.chmod(temporary, 0o644)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        for left in (temporary, temporary.with_suffix(".tmp")):  # the latter is what MindSpore 2.10 writes to first
            left.unlink(missing_ok=True)


def save_last(folder: Path, parameters: Iterable[Parameter], meta: Mapping[str, Any], keep: int = 2) -> Path:
    """Write ``last.ckpt``, the one before it becoming ``previous.ckpt``; killed at any moment, one of them is whole.

    ``keep`` of them stay: 1 is ``last`` alone, 3 has ``previous_2.ckpt`` too, and so on.
    """
    fresh = folder / FRESH
    try:
        save(fresh, parameters, meta)
    except OSError as error:
        raise OSError(str(error).replace(FRESH, LAST)) from error  # the name that people know
    last = folder / LAST
    names = [path.name for path in kept(folder)]
    # From the oldest on, so that each makes room for the next; only a row without gaps is moved.
    for index in reversed(range(min(len(names), keep - 1))):
        os.replace(folder / names[index], folder / _previous(index + 1))
    os.replace(fresh, last)
    for path in kept(folder)[keep:]:
        path.unlink()
    _sync(folder)
    return last


def kept(folder: Path) -> list[Path]:
    """A run's checkpoints besides ``best``, the newest first."""
    numbered = []
    for path in folder.glob("previous*.ckpt"):
        found = re.fullmatch(r"previous(?:_([2-9]|[1-9][0-9]+))?\.ckpt", path.name)
        if found:
            numbered.append((int(found.group(1) or 1), path))
    last = [folder / LAST] if (folder / LAST).exists() else []
    return last + [path for _, path in sorted(numbered)]


def _previous(index: int) -> str:
    return PREVIOUS if index == 1 else f"previous_{index}.ckpt"


def remove_temporaries(folder: Path) -> None:
    """Remove what a killed run had begun to write; the folder must be nobody else's."""
    for pattern in (".*.ckpt", ".*.tmp"):
        for path in folder.glob(pattern):
            if path.name != FRESH:
                path.unlink()


def load(path: Path) -> Checkpoint:
    """Read the checkpoint at ``path`` and check all of it.

    Raises:
        UserError: missing, not a checkpoint of ours, truncated or altered.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; a run's are <train.output>/last.ckpt and best.ckpt")
    if path.suffix != ".ckpt":
        raise UserError(f"{path}: not a checkpoint; its name would end in .ckpt")
    content = _whole(path)
    try:
        arrays = _arrays(memoryview(content)[:-DIGEST_ENTRY_BYTES])
        meta = _checked_meta(arrays.pop(META))
        return Checkpoint(path, arrays, meta, from_dict(meta["config"]).of_phase(-1))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whole, but not written by `save`
        raise UserError(f"{path}: cannot be read as a checkpoint of skipvit ({type(error).__name__})") from error


def _whole(path: Path) -> bytes:
    """The file's content, once its end and its checksum are right.

    Raises:
        UserError: they are not, or the machine has not the memory.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - DIGEST_ENTRY_BYTES))
            if not file.read().startswith(DIGEST_HEADER):
                raise UserError(
                    f"{path}: no checkpoint of skipvit, or truncated, for its checksum is not at its end; "
                    "take previous.ckpt or best.ckpt"
                )
            if size > psutil.virtual_memory().available:
                raise UserError(f"{path}: its {size} bytes are more than this machine's free memory")
            file.seek(0)
            content = file.read(size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if content[-DIGEST_ENTRY_BYTES:] != _digest_entry(memoryview(content)[:-DIGEST_ENTRY_BYTES]):
        raise UserError(
            f"{path}: its checksum does not match, the file is truncated or damaged; take previous.ckpt or best.ckpt"
        )
    return content


def _arrays(content: memoryview) -> dict[str, np.ndarray]:
    """Every tensor by name, from MindSpore's `checkpoint.proto`: Checkpoint{Value{tag=1, TensorProto=2}=1}.

    A large tensor comes in several entries of the same name, each with the whole's shape.

    Raises:
        Exception: it is something else.
    """
    tensors: dict[str, tuple[list[int], str, list[memoryview]]] = {}
    for number, value in _fields(content):
        if number != 1:
            raise ValueError(f"field {number} in a checkpoint")
        entry = dict(_fields(value))
        shape, dtype, parts = [], "", []
        for kind, item in _fields(entry[2]):  # TensorProto: dims=1, tensor_type=2, tensor_content=3
            if kind == 1:
                shape.append(int(item))
            elif kind == 2:
                dtype = str(item, "utf-8")
            else:
                parts.append(item)
        known = tensors.setdefault(str(entry[1], "utf-8"), (shape, dtype, []))
        if known[:2] != (shape, dtype):
            raise ValueError("two entries of one name")
        known[2].extend(parts)
    arrays = {}
    for name, (shape, dtype, parts) in tensors.items():
        # The older releases write the shape of a scalar as [0]. What the content is too short or too long for fails.
        joined = np.frombuffer(b"".join(parts), DTYPES[dtype])
        arrays[name] = joined.reshape([] if shape == [0] else shape)
    return arrays


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Number and value of a protobuf message's fields: whole numbers and bytes, all that a checkpoint has."""
    place = 0

    def varint() -> int:
        nonlocal place
        number, shift = 0, 0
        while True:
            byte = message[place]
            place += 1
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while place < len(message):
        number, kind = divmod(varint(), 8)
        value = varint()
        if kind == 0:
            yield number, value
        elif kind == 2 and value <= len(message) - place:
            yield number, message[place : place + value]
            place += value
        else:
            raise ValueError(f"a field of kind {kind}, or one that is cut")


def _checked_meta(encoded: np.ndarray) -> dict[str, Any]:
    """The entry `META`, in which everything that is used later has its type.

    Raises:
        Exception: it is none.
    """
    if encoded.dtype != np.uint8 or encoded.size > MAX_META_BYTES:
        raise ValueError("no meta entry")
    meta = json.loads(encoded.tobytes())
    if meta["format"] != FORMAT:
        raise UserError(f"of format {str(meta['format'])[:20]}, this release reads {FORMAT}")
    types: dict[str, Any] = {"config": dict, "classes": list, "step": int, "best_top1": (int, float), "ranks": int}
    for key in ("config", "classes", *(types.keys() & meta.keys())):
        if not isinstance(meta[key], types[key]):
            raise TypeError(key)
    if not all(isinstance(name, str) for name in meta["classes"]):
        raise TypeError("classes")
    return meta


def find(folder: Path) -> tuple[Optional[Checkpoint], list[str]]:
    """The checkpoint to go on from in a run's folder: ``last``, or the one before it where it is missing or damaged.

    Failing both, one that was killed before it became ``last``: where ``last`` was damaged, it takes the place of
    ``previous`` for a moment.

    Returns:
        The checkpoint, None where there is none, and warnings for the log.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    warnings: list[str] = []
    for path in [*kept(folder), folder / FRESH]:
        if not path.exists():
            continue
        try:
            found = load(path)
        except UserError as error:
            warnings.append(str(error))
            continue
        if warnings:
            warnings.append(f"going on from {path} instead")
        return found, warnings
    if warnings:
        raise UserError(warnings[0])
    return None, warnings


def restore(parameters: Iterable[Parameter], arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Give every parameter its value from a checkpoint.

    Raises:
        UserError: one is missing or has another shape or kind of number; then no parameter was changed.
    """
    parameters = list(parameters)
    for parameter in parameters:
        array = arrays.get(parameter.name)
        if array is None:
            raise UserError(f"{path}: the checkpoint has no {parameter.name}; it is of another model")
        if tuple(array.shape) != tuple(parameter.shape):
            raise UserError(
                f"{path}: {parameter.name} has shape {tuple(array.shape)} there and {tuple(parameter.shape)} here; "
                "it is of another model"
            )
        if (array.dtype.kind == "f") != str(parameter.dtype).startswith("Float"):
            raise UserError(f"{path}: {parameter.name} is of type {array.dtype} there, which is no weight's")
    for parameter in parameters:
        parameter.set_data(Tensor(arrays[parameter.name], parameter.dtype))


def fit_positions(arrays: Mapping[str, np.ndarray], num_patches: int) -> dict[str, np.ndarray]:
    """The same arrays for images of ``num_patches`` patches: the position embedding, and what goes with it, resampled.

    Weights and their average bicubically, as is usual. Adam's moments and accumulated gradients linearly: with weights
    that are not negative the second moment stays above the first's square, and no step is out of proportion. What
    fits already is the same array.
    """
    return {
        name: _resample(array, num_patches, name) if name.split(".")[-1] == "pos_embed" else array
        for name, array in arrays.items()
    }


def _resample(positions: np.ndarray, num_patches: int, name: str) -> np.ndarray:
    """``(1, 1+N, D)`` to ``(1, 1+num_patches, D)``, CLS's as it is, the others as a picture of D channels."""
    _, length, D = positions.shape
    if length == 1 + num_patches:
        return positions
    method = Image.Resampling.BICUBIC if name in ("pos_embed", "ema.pos_embed") else Image.Resampling.BILINEAR
    old, new = math.isqrt(length - 1), math.isqrt(num_patches)
    channels = positions[0, 1:].astype(np.float32).reshape(old, old, D).transpose(2, 0, 1)
    resized = [np.asarray(Image.fromarray(channel).resize((new, new), method)) for channel in channels]
    patches = np.stack(resized, axis=-1).reshape(1, num_patches, D)
    return np.concatenate([positions[:, :1], patches], axis=1)


def transfer(net: VisionTransformer, arrays: Mapping[str, np.ndarray], path: Path) -> list[str]:
    """Give a model the weights of another that may have another number of classes or image size.

    Args:
        net: its head stays as it is where the number of classes differs.
        arrays: the other's weights by name; without a head, this model's stays too.
        path: where they are from.

    Returns:
        What is not as it was, a line each.

    Raises:
        UserError: they are of a model that differs in more than that.
    """
    own = {parameter.name: parameter for parameter in net.get_parameters()}
    changes = []
    arrays = dict(arrays)
    if "pos_embed" in arrays and arrays["pos_embed"].shape[1] != 1 + net.num_patches:
        old, new = math.isqrt(arrays["pos_embed"].shape[1] - 1), math.isqrt(net.num_patches)
        arrays = fit_positions(arrays, net.num_patches)
        changes.append(f"the position embedding is resampled from {old} x {old} to {new} x {new}")
    classes, theirs = own["head.weight"].shape[0], arrays.get("head.weight")
    if theirs is None or theirs.shape[0] != classes:
        had = "has none" if theirs is None else f"has {theirs.shape[0]}"
        changes.append(f"the head is new, for {classes} classes; {path} {had}")
        arrays.update({name: own[name].asnumpy() for name in ("head.weight", "head.bias")})
    restore(own.values(), arrays, path)
    return changes


def _digest_entry(before: Union[bytes, memoryview]) -> bytes:
    return DIGEST_HEADER + hashlib.sha256(before).digest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build_model(checkpoint: Checkpoint, skip: bool = True, dtype=mstype.float32) -> VisionTransformer:
    """The model of a checkpoint with the weights that are served.

    Args:
        checkpoint: read by `load`.
        skip: False runs the same weights on all tokens in every block.
        dtype: of the matrix products.

    Raises:
        UserError: the weights are not those of the model that the configuration describes.
    """
    model = checkpoint.config.model
    if model.num_classes is None:
        raise UserError(f"{checkpoint.path}: its configuration has no model.num_classes")
    # Before memory is taken for a model that the file does not hold; what is not much fails below, by its name.
    held = sum(array.size for array in checkpoint.arrays.values())
    if cost.parameter_count(model) > held + MUCH:
        raise UserError(f"{checkpoint.path}: holds {held} numbers, fewer than its configuration's model has")
    net = VisionTransformer(checkpoint.config.model, checkpoint.config.skip if skip else (), dtype)
    weights = checkpoint.weights(parameter.name for parameter in net.get_parameters())
    if checkpoint.meta["config"].get("phases"):  # a phase before the last may have had other images
        weights = fit_positions(weights, net.num_patches)
    restore(net.get_parameters(), weights, checkpoint.path)
    return net
