"""What this machine is: device, mode, ranks, precision, and the differences between MindSpore releases.

The only file that knows Ascend from CPU and one release from another (2.0.0 and 2.10.0 bracket those a 910A runs).
"""

import contextlib
import functools
import inspect
import itertools
import logging
import os
import platform
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Optional

# MindSpore prints its warnings to the terminal in between the progress; errors still come through.
os.environ.setdefault("GLOG_v", "3")

import mindspore as ms
import numpy as np
from mindspore import communication, ops
from mindspore import dtype as mstype

from skipvit.config import UserError


class Process(NamedTuple):
    """This process among those that train together."""

    rank: int
    ranks: int


def start(jit_level: Optional[str] = None) -> Process:
    """Choose device and graph mode, and join the other ranks where a launcher started several (launch.py).

    The device is the environment's DEVICE_TARGET, otherwise what MindSpore was built for and finds.
    """
    device = os.environ.get("DEVICE_TARGET") or ms.get_context("device_target")
    if device not in ("Ascend", "CPU"):
        raise UserError(f"DEVICE_TARGET={device}: is neither Ascend nor CPU")
    device_id = _whole_number("DEVICE_ID", 0) if device == "Ascend" else None
    ranks = _whole_number("RANK_SIZE", _whole_number("MS_WORKER_NUM", 1))
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        if hasattr(ms, "set_device"):
            ms.set_device(device, device_id)
        else:
            ms.set_context(device_target=device)
            if device_id is not None:
                ms.set_context(device_id=device_id)
    except (RuntimeError, ValueError) as error:  # followed by MindSpore's own call stack
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"DEVICE_TARGET: MindSpore cannot use {device} here ({reason}); give another, or none"
        ) from None
    if jit_level is not None:
        ms.set_context(jit_config={"jit_level": jit_level})
    if ranks == 1:
        return Process(rank=0, ranks=1)
    communication.init("hccl" if device == "Ascend" else "mccl")
    ms.set_auto_parallel_context(parallel_mode=ms.ParallelMode.DATA_PARALLEL, gradients_mean=True, device_num=ranks)
    if device == "Ascend":
        # Off unless asked for: gradients are reduced in blocks of this many MB.
        ms.set_auto_parallel_context(comm_fusion={"allreduce": {"mode": "size", "config": 32}})
    process = Process(rank=communication.get_rank(), ranks=communication.get_group_size())
    if os.environ.get("RANK_ID", str(process.rank)) != str(process.rank):
        # Log names and the terminal follow RANK_ID, checkpoints and metrics the rank.
        raise UserError(f"RANK_ID={os.environ['RANK_ID']}: MindSpore numbered this process {process.rank}; start again")
    return process


def _whole_number(name: str, default: int) -> int:
    """Of the environment; empty is as good as not set."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise UserError(f"{name}={text}: is no whole number; a launcher sets it, or leave it out")
    return int(text)


_forms_of_ascend = False


def assume_ascend() -> None:
    """From here on build what Ascend would run, to look at its graph; a CPU compiles it too."""
    global _forms_of_ascend
    _forms_of_ascend = True


def on_cpu() -> bool:
    """Whether the graph is to run on a CPU."""
    return not _forms_of_ascend and ms.get_context("device_target") == "CPU"


def sort_dtype():
    """What TopK sorts: float16 alone on Ascend's AI Core (ascend910.yaml)."""
    return mstype.float32 if on_cpu() else mstype.float16


def resolve_precision(precision: str) -> str:
    """``auto`` as what it stands for on this device: fp16 on Ascend, fp32 on CPU."""
    if precision != "auto":
        return precision
    return "fp32" if on_cpu() else "fp16"


def compute_dtype(precision: str):
    """The dtype of matrix products for ``train.precision``."""
    return mstype.float16 if resolve_precision(precision) == "fp16" else mstype.float32


def default_sink_steps() -> int:
    """Steps between two looks at the device: on Ascend the loop stays there (data sink), on CPU that does not exist."""
    return 1 if on_cpu() else 100


def sinks(step, dataset, sink_steps: int) -> Iterator[None]:
    """Run ``step`` over the dataset's rows, ``sink_steps`` at a time; yields after each sink.

    On Ascend the steps of a sink run on the device without the host (data sink; not run on Ascend); elsewhere they are
    called one by one, with the same numbers.
    """
    if not on_cpu():
        sink = ms.data_sink(step, dataset, sink_size=sink_steps)
        while True:
            sink()
            yield
    for taken, row in enumerate(dataset.create_tuple_iterator(num_epochs=1), 1):
        step(*row)
        if taken % sink_steps == 0:
            yield


class _SumOverRanks(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.all_reduce = ops.AllReduce()

    def construct(self, values):
        return self.all_reduce(values)


@functools.cache
def _sum_of_ranks() -> _SumOverRanks:
    return _SumOverRanks()  # one for all calls: another Cell would be another graph to compile


def sum_over_ranks(values: np.ndarray, ranks: int) -> np.ndarray:
    """The elementwise sum of every rank's ``values``, in float32: exact for whole numbers below 2**24."""
    if ranks == 1:
        return values
    return _sum_of_ranks()(ms.Tensor(values.astype(np.float32))).asnumpy().astype(np.float64)


def union_over_ranks(numbers: np.ndarray, size: int, ranks: int) -> np.ndarray:
    """The whole numbers below ``size`` that some rank has in ``numbers``; ascending, the same on every rank."""
    if ranks == 1 or sum_over_ranks(np.array([len(numbers)]), ranks)[0] == 0:
        return numbers
    present = np.zeros(size)
    present[numbers] = 1
    return np.flatnonzero(sum_over_ranks(present, ranks))


def from_rank_0(number: int, process: Process) -> int:
    """Rank 0's value of a whole number in [0, 2**32)."""
    halves = np.array(divmod(number, 2**16)) * (process.rank == 0)
    high, low = sum_over_ranks(halves, process.ranks)
    return int(high) * 2**16 + int(low)


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Without what MindSpore's Python part would say on the terminal meanwhile."""
    level = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(level)


def save_checkpoint(entries, path: str) -> None:
    """``mindspore.save_checkpoint`` without its own complaint on the terminal; what cannot be written raises."""
    with _without_log():
        ms.save_checkpoint(entries, path)


def compile_sharing(cells: Iterable[ms.nn.Cell], compile_graph: Callable[[], None]) -> None:
    """Compile a graph, where ``cells``, all alike, share what the front end makes of one of them.

    It is put in each one's place before the back end sees it (``mindspore.lazy_inline(policy="front")``), so the graph
    that runs is the same. MindSpore keeps the shared part by a cell's name alone, for other graphs of the process too,
    whatever their shapes; so the name is another each time and is taken away again. On Ascend it was never run, so it
    is not used there.

    MindSpore may take the shapes of one cell for another's, and its compilation then fails: one in some ten of graphs
    with branches on values, whose sides it looks at in threads of their own (so not for these), and one in some
    hundred of others. What fails is compiled anew without sharing, and raises what is wrong with the graph itself.
    """
    marked = list(cells) if on_cpu() and "policy" in _parameters_of_lazy_inline() else []
    if marked:
        with contextlib.suppress(Exception), _sharing(marked):  # whatever operator meets the wrong shape first
            return compile_graph()
    return compile_graph()


@contextlib.contextmanager
def _sharing(cells: list[ms.nn.Cell]) -> Iterator[None]:
    name = f"lazy_inline_{next(_compilations)}"
    for cell in cells:
        cell.cell_init_args, cell.no_inline = name, False
    try:
        yield
    finally:
        for cell in cells:
            del cell._cell_init_args, cell.no_inline


_compilations = itertools.count()


def _parameters_of_lazy_inline() -> Collection[str]:
    return inspect.signature(ms.lazy_inline).parameters if hasattr(ms, "lazy_inline") else ()


def wait_for(output: ms.Tensor) -> None:
    """Until the device has computed it: a graph may return before."""
    output.asnumpy()


def save_graphs(folder: str) -> None:
    """Have MindSpore write the graphs it compiles from here on as text; the front end's last is ``*validate*.ir``."""
    os.environ["MS_DEV_SAVE_GRAPHS"], os.environ["MS_DEV_SAVE_GRAPHS_PATH"] = "1", folder
    if not hasattr(ms, "set_device"):  # the older releases read no environment
        ms.set_context(save_graphs=1, save_graphs_path=folder)


def cann_version() -> Optional[str]:
    """CANN's, where its environment is set; None elsewhere."""
    home = os.environ.get("ASCEND_HOME_PATH") or os.environ.get("ASCEND_TOOLKIT_HOME")
    for path in Path(home).rglob("version.cfg") if home else ():
        found = re.search(r"[0-9]+\.[0-9A-Za-z.]+", path.read_text(errors="replace"))
        if found:
            return found.group(0)
    return None


class StepTrace:
    """MindSpore's profiler over some steps; what it finds is written below ``folder`` when it ends."""

    def __init__(self, folder: Path):
        """To be made before the first step."""
        with _without_log():  # the newer releases would have it called another name
            self.profiler = ms.Profiler(output_path=str(folder.absolute()), start_profile=False)

    def start(self) -> None:
        """From here on steps are looked at."""
        self.profiler.start()

    def end(self) -> None:
        """Write what was found."""
        with _without_log():
            if hasattr(ms, "set_device") or ms.get_context("device_target") != "CPU":
                self.profiler.stop()  # on CPU the older releases fail there, and analyse stops it
            self.profiler.analyse()


def export_onnx(net, images: ms.Tensor, path: str) -> None:
    """Write the graph that ``net`` is for ``images``, by MindSpore's own exporter."""
    with _without_log():  # the newer releases would have it called another name, which the older do not have
        ms.export(net, images, file_name=path, file_format="ONNX")


def versions() -> dict[str, str]:
    """What a run or a measurement was made with."""
    return {
        "mindspore": ms.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "device": ms.get_context("device_target"),
        "machine": platform.machine(),
    }
