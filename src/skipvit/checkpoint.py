"""Checkpoints: one ordinary MindSpore ``.ckpt``, written atomically, with its own checksum and configuration.

The file holds the model's weights under their own names, the rest of the training state (``adam_m.*``, ``ema.*``,
``state.*`` ...), the entry ``skipvit.meta`` (JSON as bytes) and ``skipvit.sha256`` over all other entries. Nothing in it
is ever executed.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Tuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from skipvit import runtime
from skipvit.config import Config, UserError, from_dict
from skipvit.model import VisionTransformer

META, DIGEST = "skipvit.meta", "skipvit.sha256"
FORMAT = 1
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        path: where it was.
        arrays: every tensor by name.
        meta: ``config``, ``classes``, ``step`` and whatever else the trainer wrote.
        config: the run's configuration.
    """

    path: Path
    arrays: Dict[str, np.ndarray]
    meta: Dict[str, Any]
    config: Config

    def weights(self, names: Iterable[str]) -> Dict[str, np.ndarray]:
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
    arrays[DIGEST] = np.frombuffer(_digest(arrays), np.uint8)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.ckpt")
    try:
        # Not to `path` itself: MindSpore deletes its target before it writes (DESIGN 5).
        entries = [{"name": name, "data": Tensor(array.copy())} for name, array in arrays.items()]
        try:
            ms.save_checkpoint(entries, str(temporary))
        except RuntimeError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        os.chmod(temporary, 0o644)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_last(folder: Path, parameters: Iterable[Parameter], meta: Mapping[str, Any]) -> Path:
    """Write ``last.ckpt``, the one before it becoming ``previous.ckpt``; killed at any moment, one of them is whole."""
    fresh = folder / ".fresh.ckpt"
    save(fresh, parameters, meta)
    last = folder / LAST
    if last.exists():
        os.replace(last, folder / PREVIOUS)
    os.replace(fresh, last)
    _sync(folder)
    return last


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and check all of it.

    Raises:
        UserError: missing, not a checkpoint of ours, truncated or altered.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file; a run's are <train.output>/last.ckpt and best.ckpt")
    if path.suffix != ".ckpt":
        raise UserError(f"{path}: not a checkpoint; its name would end in .ckpt")
    try:
        arrays = {name: value.asnumpy() for name, value in runtime.load_checkpoint(str(path)).items()}
    except Exception as error:  # MindSpore raises whatever its parser met
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be read as a checkpoint, it is truncated or something else ({reason})") from error
    if META not in arrays or DIGEST not in arrays:
        raise UserError(f"{path}: a MindSpore file, but no checkpoint of skipvit: it carries no configuration")
    if arrays.pop(DIGEST).tobytes() != _digest(arrays):
        raise UserError(f"{path}: its checksum does not match, the file is damaged; take previous.ckpt or best.ckpt")
    meta = json.loads(arrays.pop(META).tobytes().decode())
    if meta.get("format") != FORMAT:
        raise UserError(f"{path}: of format {meta.get('format')}, this release reads {FORMAT}")
    return Checkpoint(path, arrays, meta, from_dict(meta["config"]))


def find(folder: Path) -> Tuple[Optional[Checkpoint], List[str]]:
    """The checkpoint to go on from in a run's folder: ``last``, or ``previous`` where ``last`` is missing or damaged.

    Returns:
        The checkpoint, None where there is none, and warnings for the log.

    Raises:
        UserError: there are checkpoints, and none of them is whole.
    """
    warnings: List[str] = []
    for name in (LAST, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            found = load(folder / name)
        except UserError as error:
            warnings.append(str(error))
            continue
        if warnings:
            warnings.append(f"going on from {folder / name} instead")
        return found, warnings
    if warnings:
        raise UserError(warnings[0])
    return None, warnings


def restore(parameters: Iterable[Parameter], arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Give every parameter its value from a checkpoint.

    Raises:
        UserError: one is missing or has another shape; then no parameter was changed.
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
    for parameter in parameters:
        parameter.set_data(Tensor(arrays[parameter.name], parameter.dtype))


def _digest(arrays: Mapping[str, np.ndarray]) -> bytes:
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        sha.update(array.tobytes())
    return sha.digest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def build_model(checkpoint: Checkpoint, skip: bool = True) -> VisionTransformer:
    """The model of a checkpoint with the weights that are served, in float32.

    Args:
        checkpoint: read by `load`.
        skip: False runs the same weights on all tokens in every block.

    Raises:
        UserError: the weights are not those of the model that the configuration describes.
    """
    net = VisionTransformer(checkpoint.config.model, checkpoint.config.skip if skip else ())
    names = [parameter.name for parameter in net.get_parameters()]
    restore(net.get_parameters(), checkpoint.weights(names), checkpoint.path)
    return net
