"""The operators of a training step's graph, and where an Ascend 910A runs them.

The step is built in the forms meant for Ascend, in float16, and compiled on this machine; what is read is the last
graph of MindSpore's front end, before any device's compiler sees it. So the list says what the device's compiler is
given, not what it makes of it. Where each primitive runs comes from ``ascend910.yaml``.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from skipvit import runtime
from skipvit.config import Config
from skipvit.log import RunFailed

TABLE = Path(__file__).with_name("ascend910.yaml")
NODE = re.compile(r"^  %\d+\([^)]*\) = (?:PrimFunc_)?([A-Za-z]\w*)\(")
SHAPE = re.compile(r"<Tensor\[(\w+)\], (\([^)]*\)|TensorShape\w*)>")


class Operator(NamedTuple):
    """A primitive with its first input: ``dtype`` and ``shape`` as the graph has them."""

    name: str
    dtype: str
    shape: str


def read_graph(path: Path) -> Iterator[tuple[Operator, bool]]:
    """Each operator of a graph that MindSpore wrote as text, and whether some shape of it is dynamic."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines):
        node = NODE.match(line)
        if node is None:
            continue
        # The line of types is the first that begins so; constants with many values may lie between.
        types = next((text for text in lines[number + 1 : number + 200] if text.startswith("      : (")), "")
        inputs, _, outputs = types.partition(" -> ")
        tensors = SHAPE.findall(inputs) or SHAPE.findall(outputs)
        dtype, shape = tensors[0] if tensors else ("", "")
        dynamic = any("-" in found for _, found in SHAPE.findall(types))
        yield Operator(node.group(1), dtype, shape), dynamic


def operators(config: Config, build: Any) -> tuple[Counter[Operator], list[Operator]]:
    """Compile the recipe's training step as for Ascend; its operators with their counts, and those of dynamic shape.

    Args:
        config: the recipe.
        build: gives the step and its inputs for a configuration.

    Raises:
        RunFailed: MindSpore wrote no graph.
    """
    runtime.assume_ascend()
    with tempfile.TemporaryDirectory(prefix="skipvit-audit-") as folder:
        runtime.save_graphs(folder)
        step, inputs = build(config)
        step.compile(*inputs)
        graphs = sorted(Path(folder).rglob("*validate*.ir"))
        if not graphs:
            raise RunFailed("MindSpore wrote no graph of the front end; this release keeps it elsewhere")
        found = [item for graph in graphs for item in read_graph(graph)]
    return Counter(operator for operator, _ in found), [operator for operator, dynamic in found if dynamic]


def core_of(operator: Operator, table: dict[str, Any]) -> str:
    """``ai_core``, ``aicpu``, ``none`` (no kernel) or ``unknown``."""
    row = table.get(operator.name)
    if row is None:
        return "unknown"
    if row["core"] == "ai_core" and "dtypes" in row and operator.dtype and operator.dtype not in row["dtypes"]:
        return "aicpu"
    return row["core"]


def report(dense: tuple[Counter[Operator], list[Operator]], skip: tuple[Counter[Operator], list[Operator]]) -> dict:
    """Print the operators of the skip graph; what the skip path adds on AICPU or of dynamic shape is the verdict."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    print("front-end graph of the training step, forms for Ascend, float16; compiled here, not run on Ascend")
    print(f"{'primitive':24}{'count':>6}{'dense':>7}  {'runs on':9}{'dtype':9}shapes of the first input")
    in_dense = _by_name(dense[0], table)
    for (name, dtype, core), shapes in sorted(_by_name(skip[0], table).items()):
        count, before = sum(shapes.values()), sum(in_dense.get((name, dtype, core), {}).values())
        shown = ", ".join(f"{shape} x{times}" for shape, times in shapes.most_common(3))
        more = f" and {len(shapes) - 3} more" if len(shapes) > 3 else ""
        print(f"{name:24}{count:>6}{before:>7}  {core:9}{dtype:9}{shown}{more}")
    added = {core: _names(skip[0], core, table) - _names(dense[0], core, table) for core in ("aicpu", "unknown")}
    dynamic = sorted({operator.name for operator in skip[1]})
    print(f"the skip path adds on AICPU: {_listed(added['aicpu'])}; unknown: {_listed(added['unknown'])}; ", end="")
    print(f"dynamic shapes: {', '.join(dynamic) or 'none'}")
    return {
        "operators": {
            f"{name} {dtype}".strip(): {"count": sum(shapes.values()), "core": core}
            for (name, dtype, core), shapes in sorted(_by_name(skip[0], table).items())
        },
        "aicpu_in_both": _listed(_names(dense[0], "aicpu", table)),
        "added_aicpu": sorted(added["aicpu"]),
        "added_unknown": sorted(added["unknown"]),
        "dynamic_shapes": dynamic,
    }


def _by_name(counts: Counter[Operator], table: dict[str, Any]) -> dict[tuple[str, str, str], Counter[str]]:
    grouped: dict[tuple[str, str, str], Counter[str]] = {}
    for operator, count in counts.items():
        key = (operator.name, operator.dtype, core_of(operator, table))
        grouped.setdefault(key, Counter())[operator.shape] += count
    return grouped


def _names(counts: Counter[Operator], core: str, table: dict[str, Any]) -> Counter[str]:
    """How often each primitive and dtype occurs on ``core``; a difference of two is what one has beyond the other."""
    found: Counter[str] = Counter()
    for operator, count in counts.items():
        if core_of(operator, table) == core:
            found[f"{operator.name} {operator.dtype}".strip()] += count
    return found


def _listed(names: Counter[str]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in sorted(names.items())) or "none"
