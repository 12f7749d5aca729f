"""What this machine is: device, mode, ranks, precision, and the differences between MindSpore releases.

The only file that knows Ascend from CPU and one release from another (2.0.0 and 2.10.0 bracket those a 910A runs).
"""

import logging
import os
import platform
from typing import Dict, Iterator, NamedTuple, Optional

# MindSpore prints its warnings to the terminal in between the progress; errors still come through.
os.environ.setdefault("GLOG_v", "3")

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import dtype as mstype  # noqa: E402
from mindspore import ops  # noqa: E402

from skipvit.config import UserError  # noqa: E402


def device_target() -> str:
    """``Ascend`` or ``CPU``: the environment's DEVICE_TARGET, otherwise what MindSpore was built for and finds."""
    wanted = os.environ.get("DEVICE_TARGET")
    if wanted is None:
        return ms.get_context("device_target")
    if wanted not in ("Ascend", "CPU"):
        raise UserError(f"DEVICE_TARGET={wanted}: is neither Ascend nor CPU")
    return wanted


class Process(NamedTuple):
    """This process among those that train together."""

    rank: int
    ranks: int


class Sink(NamedTuple):
    """What the host learns of a sink that has ended."""

    unreadable: np.ndarray  # samples of the folder that could not be read, -1 where none


def start(jit_level: Optional[str] = None) -> Process:
    """Choose device and graph mode, and join the other ranks where there are any."""
    device = device_target()
    if hasattr(ms, "set_device"):
        if device == "Ascend" and "DEVICE_ID" in os.environ:
            ms.set_device(device, int(os.environ["DEVICE_ID"]))
        else:
            ms.set_device(device)
        ms.set_context(mode=ms.GRAPH_MODE)
    else:
        ms.set_context(mode=ms.GRAPH_MODE, device_target=device)
        if device == "Ascend":
            ms.set_context(device_id=int(os.environ.get("DEVICE_ID", "0")))
    if jit_level is not None:
        ms.set_context(jit_config={"jit_level": jit_level})
    return Process(rank=0, ranks=1)


def default_sink_steps() -> int:
    """Steps between two looks at the device: on Ascend the loop stays there (data sink), on CPU there is no such thing."""
    return 100 if ms.get_context("device_target") == "Ascend" else 1


def sinks(step, dataset, sink_steps: int) -> Iterator[Sink]:
    """Run ``step`` over the dataset, ``sink_steps`` at a time; yields after each sink.

    On Ascend the steps of a sink run on the device without the host (not run on Ascend); elsewhere they are called
    one by one, with the same numbers.
    """
    if ms.get_context("device_target") == "Ascend":
        columns = [name for name in dataset.get_col_names() if name != "unreadable"]
        sink = ms.data_sink(step, dataset.project(columns), sink_size=sink_steps)
        while True:
            sink()
            yield Sink(np.full(1, -1, np.int32))
    taken = []
    for images, targets, unreadable, *rest in dataset.create_tuple_iterator(num_epochs=1):
        step(images, targets, *rest)
        taken.append(unreadable.asnumpy())
        if len(taken) == sink_steps:
            yield Sink(np.concatenate(taken))
            taken = []


def on_cpu() -> bool:
    """Whether the graph will run on a CPU."""
    return ms.get_context("device_target") == "CPU"


def sort_dtype():
    """What TopK sorts: float16 alone on Ascend's AI Core (DESIGN 4)."""
    return mstype.float16 if ms.get_context("device_target") == "Ascend" else mstype.float32


def compute_dtype(precision: str):
    """The dtype of matrix products for ``train.precision``; ``auto`` is fp16 on Ascend and fp32 on CPU."""
    return mstype.float16 if resolve_precision(precision) == "fp16" else mstype.float32


def resolve_precision(precision: str) -> str:
    """``auto`` as what it stands for on this device."""
    if precision != "auto":
        return precision
    return "fp16" if ms.get_context("device_target") == "Ascend" else "fp32"


def load_checkpoint(path: str):
    """``mindspore.load_checkpoint`` without its own complaint on the terminal; a bad file raises some exception."""
    logger = logging.getLogger("ME")  # MindSpore's
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        return ms.load_checkpoint(path)
    finally:
        logger.setLevel(level)


def versions() -> Dict[str, str]:
    """What a run or a measurement was made with."""
    return {
        "mindspore": ms.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "device": ms.get_context("device_target"),
        "machine": platform.machine(),
    }


def sum_over_ranks(values: np.ndarray, ranks: int) -> np.ndarray:
    """The elementwise sum of every rank's ``values``: exact for counts, in float64 where there is one rank."""
    if ranks == 1:
        return values
    total = ops.AllReduce()(ms.Tensor(values.astype(np.float32)))
    return total.asnumpy().astype(np.float64)
