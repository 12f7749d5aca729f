"""Training speed of the skip model against the dense one: real steps, interleaved, and the bound they could reach.

Each contender trains in a process of its own on random images, so that memory is its own too; the processes take turns
step by step, in an order that goes round. A step is the one that ``train`` takes: forward, backward, clip, update.

Examples:
  python -m skipvit.benchmark                                       ViT-S/16 at 224, blocks 3 to 10 skipped
  python -m skipvit.benchmark CONFIG data.batch_size=16 --against mindcv
  python -m skipvit.benchmark CONFIG --sweep --picture sweep.png    start x end x keep
  python -m skipvit.benchmark CONFIG --input-only data.train=DIR data.val=DIR
  python -m skipvit.benchmark CONFIG --input-only --against "OTHER_PYTHON results/pytorch_input.py" data.train=…
  python -m skipvit.benchmark CONFIG --audit                        every operator, and where a 910A runs it
  python -m skipvit.benchmark CONFIG --predict data.batch_size=128  what the roofline allows a 910A; a prediction
"""

import argparse
import contextlib
import csv
import dataclasses
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import yaml
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from tqdm import tqdm

from skipvit import audit, cost, data, draw, runtime
from skipvit.config import Config, SkipConfig, UserError, from_dict, given_spans, load
from skipvit.log import Parser, RunFailed, git_commit, run_command
from skipvit.model import VisionTransformer
from skipvit.step import TrainStep

BATCH_SIZE = 16  # where neither recipe nor command line says
PROFILED_STEPS = 2
INPUT_ROUNDS = 5  # of each input pipeline, in turn
SWEEP_START, SWEEP_END, SWEEP_KEEP_RATIO = (1, 3, 5), (9, 12), (0.25, 0.5)
# Which of MindSpore's operators make a group; what is in none is "other".
GROUPS = {
    "matrix products": ("MatMul", "BatchMatMul"),
    "norms": ("LayerNorm", "LayerNormGrad", "Rsqrt"),
    "softmax": ("Softmax", "SoftmaxGrad", "LogSoftmax", "LogSoftmaxGrad"),
    "activation": ("Erf", "Exp", "Tanh", "TanhGrad", "Sigmoid", "SigmoidGrad", "Pow"),
    "elementwise": ("Add", "AddN", "Sub", "Mul", "Div", "RealDiv", "Neg", "BiasAdd", "Square", "Cast"),
    "sums": ("ReduceSum", "ReduceMean", "BiasAddGrad"),
    "moving data": ("Transpose", "Gather", "Concat", "Split", "Slice", "StridedSlice", "StridedSliceGrad"),
    "choosing tokens": ("TopK",),
    "optimizer": ("Adam", "Assign", "AssignAdd"),
}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The command; see ``--help``."""
    arguments = _parse(argv)
    if arguments.worker:
        _serve()
        return
    config = _configuration(arguments)
    if arguments.audit:
        result = _audit(config)
    elif arguments.predict:
        result = predict(config)
    elif arguments.input_only and arguments.against:
        result = compare_input(config, arguments.steps, arguments.against)
    elif arguments.input_only:
        result = measure_input(config, arguments.steps)
    elif arguments.sweep:
        result = sweep(config, arguments)
    else:
        result = compare(config, arguments)
    result = {"command": _command_line(argv), **result, **surroundings(config)}
    if arguments.output:
        _write(arguments.output, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = Parser(prog="python -m skipvit.benchmark", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a recipe; none: ViT-S/16, 224, 1000 classes")
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="override any key, as in train")
    parser.add_argument("--steps", type=int, default=20, help="steps of each that are counted (default 20)")
    parser.add_argument("--warmup", type=int, default=8, help="steps before them that are not (default 8)")
    parser.add_argument("--against", help="another contender: `mindcv`, or a command (see results/pytorch_*.py)")
    parser.add_argument("--sweep", action="store_true", help="start x end x keep, each against the dense model")
    parser.add_argument("--processes", type=int, default=1, help="with --sweep: of each setting, for the median")
    parser.add_argument("--picture", type=Path, help="with --sweep: speed-up against its bound, as PNG")
    parser.add_argument("--input-only", action="store_true", help="the data pipeline alone, images/s")
    parser.add_argument("--audit", action="store_true", help="list the graph's operators and where a 910A runs them")
    parser.add_argument(
        "--predict", action="store_true", help="predict a 910A's speed from the arithmetic; not measured"
    )
    parser.add_argument("--profile", action="store_true", help="also where the time went, by operator group")
    parser.add_argument("--output", type=Path, help="write the JSON here too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args(argv)
    for name in ("steps", "warmup", "processes"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name}: {getattr(arguments, name)} is below 1; give 1 or more")
    return arguments


def _command(text: str) -> list[str]:
    """The words of a command of ``--against``, known to be a program before anything is built."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--against: {text} cannot be read as a command ({error})") from None
    if not words or shutil.which(words[0]) is None:
        program = words[0] if words else "an empty word"
        raise UserError(f"--against: {program} is no program here; give mindcv or a command (see results/pytorch_*.py)")
    return words


def _configuration(arguments: argparse.Namespace) -> Config:
    overrides = list(arguments.overrides)
    if arguments.config and "=" in arguments.config:
        overrides.insert(0, arguments.config)
        arguments.config = None
    if arguments.config:
        config = load(arguments.config, overrides)
    else:
        defaults = {"model": {"num_classes": 1000}, "data": {"batch_size": BATCH_SIZE}}
        config = from_dict(defaults, overrides)
    if config.model.num_classes is None:
        config = config.replace(model=dataclasses.replace(config.model, num_classes=1000))
    if not config.skip and not arguments.audit and not arguments.input_only:
        raise UserError("skip: the recipe is the plain ViT, with nothing to compare; give one with a skip section")
    return config


def _command_line(argv: Optional[Sequence[str]]) -> str:
    return shlex.join(["python", "-m", "skipvit.benchmark", *(sys.argv[1:] if argv is None else argv)])


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def surroundings(config: Config) -> dict[str, Any]:
    """What a measurement was made on and with."""
    return {
        **runtime.versions(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "cann": runtime.cann_version(),
        "precision": runtime.resolve_precision(config.train.precision),
        "batch_size": config.data.batch_size,
        "model": {
            key: getattr(config.model, key)
            for key in ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "gelu", "last_block_cls_only")
        },
        "git_commit": git_commit(),
    }


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor()


# ------------------------------------------------------------------------------------------ steps, in processes


def _environment() -> dict[str, str]:
    """For a process that is to find this package from any folder, and asks for memory as `run_train.sh` does."""
    search = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    memory = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    return {**memory, **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}


class Contender:
    """A process that takes a training step when told to, and says how long it took.

    It reads one line of JSON (what to build), then ``step``, ``profile`` or ``end`` a line; it answers each with a line
    of JSON: once built ``first_step_seconds`` (and ``compile_seconds``, a part of it), a step's ``ms``, the
    ``profile``, the ``peak_mb`` at the end. A command given to ``--against`` speaks the same.
    """

    def __init__(self, name: str, config: Config, kind: str, command: Optional[Sequence[str]] = None):
        self.name = name
        self.times: list[float] = []
        self.folder = tempfile.TemporaryDirectory(prefix="skipvit-benchmark-")
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "skipvit.benchmark", "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
            cwd=None if command else self.folder.name,  # MindSpore leaves files where it runs
        )
        ready = self.ask(json.dumps({"kind": kind, "config": config.to_dict()}))
        self.first_step_seconds = ready["first_step_seconds"]
        self.compile_seconds = ready.get("compile_seconds")

    def ask(self, line: str) -> dict[str, Any]:
        """Send a line, and wait for the answer.

        Raises:
            RunFailed: the process has ended.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        for answer in self.process.stdout:
            if answer.startswith("{"):
                return json.loads(answer)
        code = self.process.wait()
        raise RunFailed(f"{self.name}: its process ended with {code}; what it said is above")

    def step(self, counted: bool) -> None:
        """One training step."""
        milliseconds = self.ask("step")["ms"]
        if counted:
            self.times.append(milliseconds)

    def end(self) -> float:
        """Stop; the process's peak memory in MB above what imports take."""
        peak = self.ask("end")["peak_mb"]
        self.close()
        return peak

    def close(self) -> None:
        """Stop, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


def take_turns(contenders: Sequence[Contender], warmup: int, steps: int) -> None:
    """Step by step in turn; who begins changes from round to round.

    MindSpore's CPU kernels try numbers of threads during their first launches (five steps of ViT-S went by before it
    ended), so a shorter warm-up measures the search.
    """
    for turn in tqdm(range(warmup + steps), unit="round", disable=not sys.stderr.isatty()):
        first = turn % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            contender.step(counted=turn >= warmup)


def summary_of(contender: Contender, batch_size: int) -> dict[str, Any]:
    """Median and quartiles in ms, images/s at the median, the first step, and compilation as a part of it."""
    low, median, high = _quartiles(contender.times, 1)
    return {
        "ms": median,
        "quartiles_ms": [low, high],
        "images_per_second": round(1e3 * batch_size / float(np.median(contender.times)), 2),
        "first_step_seconds": round(contender.first_step_seconds, 1),
        "compile_seconds": round(contender.compile_seconds, 1) if contender.compile_seconds else None,
    }


def ratio(slow: Contender, fast: Contender) -> dict[str, Any]:
    """How many times faster: median and quartiles over the rounds, since a machine's drift is in both of a round."""
    low, median, high = _quartiles(np.array(slow.times) / np.array(fast.times), 4)
    return {"ratio": median, "quartiles": [low, high]}


def _quartiles(values: Sequence[float], digits: int) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, median, high = (round(float(np.percentile(values, share)), digits) for share in (25, 50, 75))
    return low, median, high


def compare(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Dense, skip and, where asked for, a third, in turn."""
    command = _command(arguments.against) if arguments.against not in (None, "mindcv") else None
    skip = Contender("skip", config, "own")  # first, so that its first step has the machine to itself
    dense = Contender("dense", config.replace(skip=()), "own")
    contenders = [dense, skip]
    if arguments.against:
        contenders.append(Contender(arguments.against, config.replace(skip=()), "mindcv", command))
    try:
        take_turns(contenders, arguments.warmup, arguments.steps)
        profiles = [contender.ask("profile") for contender in (dense, skip)] if arguments.profile else []
        memory = [contender.end() for contender in contenders]
    finally:
        for contender in contenders:
            contender.close()

    speed_up, bound = ratio(dense, skip), cost.speed_up_bound(config.model, config.skip)
    size = config.data.batch_size
    result: dict[str, Any] = {
        "speed_up": speed_up["ratio"],
        "speed_up_quartiles": speed_up["quartiles"],
        "bound": round(bound, 4),
        "efficiency": round(speed_up["ratio"] / bound, 4),
        "peak_memory_ratio": round(memory[1] / memory[0], 4),
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "spans": [dataclasses.asdict(span) for span in config.skip],
        "gflops_an_image": {
            "dense": round(cost.training_flops(config.model)["total"] / 1e9, 3),
            "skip": round(cost.training_flops(config.model, config.skip)["total"] / 1e9, 3),
        },
    }
    for contender, peak in zip(contenders, memory):
        result[contender.name] = {**summary_of(contender, size), "peak_memory_mb": round(peak)}
    for other in contenders[2:]:
        result["against"] = {
            "name": other.name,
            "dense_time": ratio(dense, other),
            "skip_time": ratio(skip, other),
        }
    if profiles:
        for contender, profile in zip((dense, skip), profiles):
            result[contender.name]["groups_ms"] = profile["groups"]
        result["token_path_share"] = round(token_path_share(*profiles), 5)
    _print_comparison(result, [contender.name for contender in contenders])
    return result


def _print_comparison(result: dict[str, Any], names: Sequence[str]) -> None:
    print(f"{'':24}{'ms a step':>12}{'quartiles':>20}{'images/s':>10}{'first step':>12}{'peak MB':>9}")
    for name in names:
        row = result[name]
        quartiles = "{:.0f} .. {:.0f}".format(*row["quartiles_ms"])
        print(
            f"{name[:23]:24}{row['ms']:>12.0f}{quartiles:>20}{row['images_per_second']:>10.2f}"
            f"{row['first_step_seconds']:>10.1f} s{row['peak_memory_mb']:>9}"
        )
    print(
        f"speed-up {result['speed_up']:.3f} of at most {result['bound']:.3f} by arithmetic: "
        f"efficiency {result['efficiency']:.3f}; memory {result['peak_memory_ratio']:.2f} of the dense model's"
    )
    if "token_path_share" in result:
        print(f"choosing, parting and rejoining tokens: {100 * result['token_path_share']:.2f}% of the skip step")
        for group in result["dense"]["groups_ms"]:
            print(
                f"  {group:18}{result['dense']['groups_ms'][group]:>10.1f} ms dense"
                f"{result['skip']['groups_ms'].get(group, 0):>10.1f} ms skip"
            )
    if "against" in result:
        against = result["against"]
        print(
            f"of the time of {against['name']}: dense {against['dense_time']['ratio']:.3f}, "
            f"skip {against['skip_time']['ratio']:.3f}"
        )


def sweep(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each start x end x keep against the one dense model, in turn with it, and all of it as often as asked for.

    A process is a few hundredths faster or slower than another that does the same (docs/LOG.md, *The sweep twice*), so
    a setting's speed-up is the median over processes of its own.
    """
    if arguments.picture:
        draw.check_output(arguments.picture)
    found: dict[SkipConfig, list[dict[str, Any]]] = {span: [] for span in _sweep_spans(config)}
    if not found:
        raise UserError(
            f"--sweep: model.depth is {config.model.depth}, and the spans end at blocks {min(SWEEP_END)} up"
        )
    print(f"{'start':>5}{'end':>5}{'keep':>6}{'speed-up':>10}{'bound':>8}{'efficiency':>12}")
    for _ in range(arguments.processes):
        dense = Contender("dense", config.replace(skip=()), "own")
        try:
            for _ in range(arguments.warmup):
                dense.step(counted=False)
            for span, speed_ups in found.items():
                speed_ups.append(_sweep_one(config, span, dense, arguments))
                row = _sweep_row(config, span, speed_ups[-1:])
                print(
                    f"{row['start']:>5}{row['end']:>5}{row['keep_ratio']:>6}{row['speed_up']:>10.3f}"
                    f"{row['bound']:>8.3f}{row['efficiency']:>12.3f}",
                    flush=True,
                )
        finally:
            dense.close()
    rows = [_sweep_row(config, span, speed_ups) for span, speed_ups in found.items()]
    if arguments.picture:
        draw.write(draw.speed_ups(rows), arguments.picture)
    least = min(row["efficiency"] for row in rows)
    print(f"least efficiency of {len(rows)} settings: {least:.3f}")
    return {"sweep": rows, "least_efficiency": least, "steps": arguments.steps, "warmup": arguments.warmup}


def _sweep_spans(config: Config) -> list[SkipConfig]:
    return [
        dataclasses.replace(config.skip[0], start=start, end=end, keep_ratio=keep, align=1)
        for start in SWEEP_START
        for end in SWEEP_END
        for keep in SWEEP_KEEP_RATIO
        if end <= config.model.depth
    ]


def _sweep_one(config: Config, span: SkipConfig, dense: Contender, arguments: argparse.Namespace) -> dict[str, Any]:
    skip = Contender("skip", config.replace(skip=(span,)), "own")
    try:
        for _ in range(arguments.warmup):
            skip.step(counted=False)
        dense.times = []
        take_turns([dense, skip], 0, arguments.steps)
    finally:
        skip.close()
    return ratio(dense, skip)


def _sweep_row(config: Config, span: SkipConfig, speed_ups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    speed_up, bound = float(np.median([one["ratio"] for one in speed_ups])), cost.speed_up_bound(config.model, (span,))
    return {
        "start": span.start,
        "end": span.end,
        "keep_ratio": span.keep_ratio,
        "kept": span.kept_count(config.model.num_patches),
        "speed_up": round(speed_up, 4),
        "processes": speed_ups,
        "bound": round(bound, 4),
        "efficiency": round(speed_up / bound, 4),
    }


# ------------------------------------------------------------------------------------------ the process that steps


def _serve() -> None:
    """Build what the first line of standard input says, and do as the others do."""
    request = json.loads(sys.stdin.readline())
    config = from_dict(request["config"])
    runtime.start(config.train.jit_level)
    before = resident_mb()
    step, inputs = (mindcv_step if request["kind"] == "mindcv" else training_step)(config)
    started = time.perf_counter()
    step.compile(*inputs)
    compiled = time.perf_counter()
    runtime.wait_for(step(*inputs))
    ended = time.perf_counter()
    print(json.dumps({"compile_seconds": compiled - started, "first_step_seconds": ended - started}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"peak_mb": peak - before}), flush=True)
            return
        if line.strip() == "profile":
            print(json.dumps(profile(step, inputs)), flush=True)
            continue
        started = time.perf_counter()
        runtime.wait_for(step(*inputs))
        print(json.dumps({"ms": 1e3 * (time.perf_counter() - started)}), flush=True)


def resident_mb() -> float:
    """Memory this process has resident, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def training_step(config: Config) -> tuple[nn.Cell, list[Tensor]]:
    """The step that ``train`` takes, and a batch for it: random images, soft targets, drop path's factors."""
    net = VisionTransformer(config.model, config.skip, runtime.compute_dtype(config.train.precision), config.train.seed)
    inputs = [*random_batch(config), Tensor([config.optim.learning_rate], mstype.float32)]
    B, seed = config.data.batch_size, config.train.seed
    if config.model.drop_path > 0:
        inputs.append(Tensor(data.drop_path_factors(config.model, seed=seed, step=0, rank=0, batch_size=B)))
    if config.model.dropout > 0:
        inputs.append(Tensor(data.dropout_seeds(config.model, seed=seed, step=0, rank=0)))
    if given_spans(config):
        maps = np.random.default_rng(0).random((B, config.model.num_patches), np.float32)
        inputs.append(Tensor(data.given_scores(config, B, (data.SCORE, seed, 0, 0), maps)))
    return TrainStep(net, config), inputs


def random_batch(config: Config) -> list[Tensor]:
    """Bytes ``(B, 3, S, S)`` and one-hot targets ``(B, C)``."""
    B, S, C = config.data.batch_size, config.model.image_size, config.model.num_classes or 1000
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (B, 3, S, S), dtype=np.uint8)
    targets = np.eye(C, dtype=np.float32)[generator.integers(0, C, B)]
    return [Tensor(images), Tensor(targets)]


def mindcv_step(config: Config) -> tuple[nn.Cell, list[Tensor]]:
    """The VisionTransformer of mindcv at the same size, its AdamW, and MindSpore's own training step."""
    from mindcv.models.vit import VisionTransformer as MindcvVisionTransformer
    from mindcv.optim import create_optimizer

    model = config.model
    net = MindcvVisionTransformer(
        image_size=model.image_size,
        patch_size=model.patch_size,
        embed_dim=model.embed_dim,
        depth=model.depth,
        num_heads=model.num_heads,
        mlp_ratio=model.mlp_ratio,
        drop_path_rate=model.drop_path,
        num_classes=model.num_classes,
    )
    optimizer = create_optimizer(net.trainable_params(), "adamw", lr=1e-3, weight_decay=config.optim.weight_decay)
    step = nn.TrainOneStepCell(nn.WithLossCell(net, nn.CrossEntropyLoss()), optimizer)
    step.set_train()
    images, targets = random_batch(config)
    return step, [Tensor((images.asnumpy() / 255).astype(np.float32)), targets]


def profile(step: nn.Cell, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Milliseconds of a step by operator group, and those outside blocks, patches, head and update.

    Raises:
        RunFailed: the profiler wrote no table (it does on CPU).
    """
    from mindspore.profiler import Profiler

    with tempfile.TemporaryDirectory() as folder:
        profiler = Profiler(output_path=folder, data_process=False)
        for _ in range(PROFILED_STEPS):
            runtime.wait_for(step(*inputs))
        profiler.analyse()
        tables = sorted(Path(folder).rglob("cpu_op_detail_info_*.csv"))
        if not tables:
            raise RunFailed("MindSpore's profiler wrote no table of operators; --profile works on CPU only")
        with open(tables[0], newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    group_of = {operator: group for group, operators in GROUPS.items() for operator in operators}
    groups: dict[str, float] = {**dict.fromkeys(GROUPS, 0.0), "other": 0.0}
    outside = 0.0
    for row in rows:
        milliseconds = float(row["op_avg_time(ms)"])
        groups[group_of.get(row["op_type"], "other")] += milliseconds
        if re.search(r"net-VisionTransformer/(?!blocks-|patch_embed-|norm-|head-)", row["full_op_name"]):
            outside += milliseconds
    return {
        "groups": {name: round(value, 2) for name, value in sorted(groups.items(), key=lambda item: -item[1])},
        "outside_blocks_ms": round(outside, 3),
    }


def token_path_share(dense: dict[str, Any], skip: dict[str, Any]) -> float:
    """What choosing, parting and rejoining tokens take of a skip step, by the `profile` of both steps.

    Outside blocks, patches, head and update the two graphs differ by that alone. It is the difference of two measured
    times, so on a busy machine it may be below 0.
    """
    return (skip["outside_blocks_ms"] - dense["outside_blocks_ms"]) / sum(skip["groups"].values())


# ------------------------------------------------------------------------------------------ input, graph


def measure_input(config: Config, steps: int) -> dict[str, Any]:
    """Images/s of the training input alone: reading, decoding, augmenting, mixing, as ``train`` does them."""
    runtime.start()
    folders = data.resolve_folders(config)
    batch = config.data.batch_size
    epochs = 1 + (steps + 2) * batch // max(1, len(folders.train))
    source = data.TrainBatches(folders.train, config, batch_size=batch, epochs=epochs)
    times = []
    last = time.perf_counter()
    for _ in zip(range(steps + 2), data.to_dataset(source).create_tuple_iterator(num_epochs=1)):
        now = time.perf_counter()
        times.append(now - last)
        last = now
    # Over all of them, since batches made ahead come in bursts; the first two start the workers.
    rate = batch * (len(times) - 2) / sum(times[2:])
    print(f"input alone: {rate:.1f} images/s, {config.data.num_workers} workers of {folders.train.root}")
    return {"input_images_per_second": round(rate, 1), "workers": config.data.num_workers, "images": len(folders.train)}


def compare_input(config: Config, steps: int, against: str) -> dict[str, Any]:
    """Images/s of the training input with one worker on one core, and of another's, in turn.

    Each runs in a process of its own, alone, for what was made ahead in another's turn would count as made at once.
    ``against`` is a command that takes a folder, a batch size and a number of batches.

    Raises:
        UserError: the recipe has no folder of its own for it to read.
        RunFailed: a process failed.
    """
    if config.data.train == "clutter":
        raise UserError("data.train: is clutter; --input-only --against needs a folder of JPEGs")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # and so for all that is started from here
    single = config.replace(data=dataclasses.replace(config.data, num_workers=1))
    unmixed = single.replace(augment=dataclasses.replace(config.augment, mixup=0.0, cutmix=0.0))
    rates: dict[str, list[float]] = {"own": [], "own_unmixed": [], against: []}
    with tempfile.TemporaryDirectory(prefix="skipvit-benchmark-") as folder:
        commands = {against: [*_command(against), config.data.train, str(config.data.batch_size), str(steps)]}
        for name, contender in (("own", single), ("own_unmixed", unmixed)):
            recipe = Path(folder, f"{name}.yaml")
            recipe.write_text(yaml.safe_dump(contender.to_dict()))
            own = [sys.executable, "-m", "skipvit.benchmark", str(recipe), "--input-only", "--steps", str(steps)]
            commands[name] = own
        for _ in tqdm(range(INPUT_ROUNDS), unit="round", disable=not sys.stderr.isatty()):
            for name, of_rounds in rates.items():
                command = commands[name]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=_environment(), check=False)
                if done.returncode:
                    raise RunFailed(f"{name}: its process ended with {done.returncode}; what it said is above")
                of_rounds.append(json.loads(done.stdout.splitlines()[-1])["input_images_per_second"])
    result: dict[str, Any] = {"steps": steps, "rounds": INPUT_ROUNDS, "simplejpeg": data.simplejpeg is not None}
    for name, of_rounds in rates.items():
        low, median, high = _quartiles(of_rounds, 1)
        result[name] = {"input_images_per_second": median, "quartiles": [low, high]}
    theirs = np.array(rates[against])
    for key, name in (("input_speed_up", "own"), ("input_speed_up_unmixed", "own_unmixed")):
        low, result[key], high = _quartiles(np.array(rates[name]) / theirs, 3)
        result[f"{key}_quartiles"] = [low, high]
        print(f"{name}: {result[name]['input_images_per_second']} images/s, {result[key]:.2f} times {against}")
    return result


def predict(config: Config) -> dict[str, Any]:
    """What the roofline allows a 910A, for the recipe and around it: predictions, nothing measured."""
    model, batch = config.model, config.data.batch_size
    dense = cost.predict_910a(model, (), batch)
    base = config.skip[0]
    chosen = [dataclasses.replace(base, align=align) for align in (1, 16)]
    lengths = [dataclasses.replace(base, start=3, end=3 + blocks, align=1) for blocks in range(1, model.depth - 3)]
    print(f"PREDICTED for one Ascend 910A, float16, {batch} images a step; not run on Ascend. Dense: ", end="")
    print(
        f"{dense.images_per_second:.0f} images/s at most "
        f"({dense.cube_ms:.1f} ms products, {dense.memory_ms:.1f} ms rest)"
    )
    print(f"{'start':>5}{'end':>5}{'kept':>6}{'images/s':>10}{'speed-up':>10}{'by arithmetic':>15}")
    rows = []
    for span in dict.fromkeys([*config.skip[:1], *chosen, *lengths, *_sweep_spans(config)]):
        prediction = cost.predict_910a(model, (span,), batch)
        rows.append(
            {
                "start": span.start,
                "end": span.end,
                "kept": span.kept_count(model.num_patches),
                "images_per_second": round(prediction.images_per_second),
                "speed_up": round(prediction.images_per_second / dense.images_per_second, 3),
                "bound": round(cost.speed_up_bound(model, (span,)), 3),
            }
        )
        row = rows[-1]
        print(
            f"{row['start']:>5}{row['end']:>5}{row['kept']:>6}{row['images_per_second']:>10}"
            f"{row['speed_up']:>10.3f}{row['bound']:>15.3f}"
        )
    return {
        "predicted": True,
        "dense_images_per_second": round(dense.images_per_second),
        "rows": rows,
        "assumed": {
            "cube_flops": cost.CUBE_FLOPS,
            "cube_efficiency": cost.CUBE_EFFICIENCY,
            "hbm_bytes_per_second": cost.HBM_BYTES_PER_SECOND,
            "hbm_efficiency": cost.HBM_EFFICIENCY,
        },
    }


def _audit(config: Config) -> dict[str, Any]:
    """The recipe's graph as for Ascend, with and without the skip path."""
    runtime.start(config.train.jit_level)
    config = config.replace(train=dataclasses.replace(config.train, precision="fp16"))
    dense, skip = (audit.operators(config.replace(skip=spans), training_step) for spans in ((), config.skip))
    return audit.report(dense, skip)


if __name__ == "__main__":
    sys.exit(run_command(main))
