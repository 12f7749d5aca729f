"""Is accuracy lost, what matters, and what is a minute worth: the runs of the study, their records, tables, pictures.

  python studies/accuracy.py prepare --cifar10 cifar10.tar.gz --work WORK   unpack the images, once
  python studies/accuracy.py plan [--question Q]                            every run, and which are done
  python studies/accuracy.py run --work WORK [--question Q] [--limit N]     the next missing runs, one on each core
  python studies/accuracy.py time                                           step times of all runs' shapes, interleaved
  python studies/accuracy.py choose SETTING[@KEEP] ... [--epochs E]         what question 1 is about, and keeps at test
  python studies/accuracy.py give-up REASON                                 the choice, before its runs have ended
  python studies/accuracy.py tables                                         tables and pictures in README and docs

Question 2 tries settings at half the epochs, what lost least there at all of them, and on fewer images that are seen
more often, at the same cost; there question 1 sets what was chosen against dense on paired seeds, question 3 Top-1
against cost, and `clutter` shows what each score keeps of the object. A run that was stopped goes on where it stopped;
what is done is in `results/study`, one JSON a run, and is not run again. WORK, outside the repository, holds images and
the runs' folders. Settings are compared on held-out images. The test images are for the runs of question 1 alone, which
there are none of before the choice is written down, and each of which looks once, at its end; what they saw is told
when all of a setting's and of dense's have ended. A choice that is given up before that stays on record, with the
reason; the next one has seeds of its own, and so has one at another length.
"""

import dataclasses
import datetime
import json
import os
import queue
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import yaml
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from skipvit import cost
from skipvit.config import Config, UserError, from_dict, span_shapes
from skipvit.log import Parser, run_command, write_whole

# ------------------------------------------------------------------------------- what the study is, in one place

HELD_OUT_A_CLASS = 500  # of 5,000 training images a class: to choose by
CLASSES = 10
TEST_IMAGES = 10_000
SEEDS = (0, 1, 2)
FIRST_PAIRED_SEED, PAIRS = 100, 10  # of question 1: each choice has the next ten seeds


class Length(NamedTuple):
    """How long a run trains: on how many images, the next ones of each class, and how often on each."""

    images: int
    epochs: int


FEW_PASSES, HALF_OF_THEM = Length(10_000, 12), Length(10_000, 6)
# About as many steps, on images that are seen more often.
MANY_PASSES, MORE_PASSES, MOST_PASSES = Length(2_500, 48), Length(1_600, 75), Length(1_250, 96)
LENGTHS = (FEW_PASSES, MANY_PASSES, MORE_PASSES, MOST_PASSES)
# Of question 3, each a schedule of its own.
COST_LENGTHS = (MANY_PASSES._replace(epochs=16), MANY_PASSES._replace(epochs=24), MANY_PASSES)
MORE_AT_TEST = 0.1  # of the tokens, that a setting of one span is also tested with

# Of FEW_PASSES; epochs of warm-up and between validations are as many more as the images are fewer.
RECIPE: dict[str, Any] = {
    "model": {
        "name": "skipvit_tiny_patch16_224",
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 96,
        "depth": 12,
        "num_heads": 3,
        "gelu": "sigmoid",
    },
    "data": {
        "batch_size": 64,
        "val_crop_ratio": 1.0,
        "mean": [0.4914, 0.4822, 0.4465],
        "std": [0.2470, 0.2435, 0.2616],
    },
    "augment": {"crop": "shift", "label_smoothing": 0.1},
    "optim": {"learning_rate": 1.0e-3, "warmup_epochs": 1, "clip_norm": 1.0},
    "train": {"validate_every_epochs": 2, "log_every_steps": 20},
}


def span(start: int, end: int, keep_ratio: float, score: str = "cls_attention", skipped: str = "rejoin") -> Any:
    """One span of a setting."""
    return {"start": start, "end": end, "keep_ratio": keep_ratio, "score": score, "skipped": skipped}


def phases(*parts: tuple[float, dict[str, Any]]) -> list[dict[str, Any]]:
    """Phases of a setting: (share of the epochs, what is other)."""
    return [{"share": share, **other} for share, other in parts]


FULL = {"keep_ratio": 1.0}
SMALL_IMAGES_FIRST = phases((0.5, {"image_size": 24}), (0.5, {}))
GROWING_IMAGES = phases((0.25, {"image_size": 24}), (0.5, {}), (0.25, {"image_size": 40}))
LARGE_IMAGES_LAST = phases((0.75, {"keep_ratio": 0.25}), (0.25, {"image_size": 40}))
# What is other than in RECIPE. `paper` is what question 2 changes one thing at a time of, as is `corner`, the furthest
# out. (`skipped: drop` from block 3 computes what `end12` does: only the CLS token is read after the last block.)
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {"skip": None},
    "paper": {"skip": span(3, 11, 0.45)},
    "corner": {"skip": span(1, 12, 0.25)},
    "keep25": {"skip": span(3, 11, 0.25)},
    "start1": {"skip": span(1, 11, 0.45)},
    "random": {"skip": span(3, 11, 0.45, "random")},
    "corner_random": {"skip": span(1, 12, 0.25, "random")},
    "corner_full_end": {"skip": span(1, 12, 0.25), "phases": phases((5 / 6, {}), (1 / 6, FULL))},
    "full_end": {"skip": span(3, 11, 0.45), "phases": phases((5 / 6, {}), (1 / 6, FULL))},
    "small_images_first": {"skip": span(3, 11, 0.45), "phases": SMALL_IMAGES_FIRST},
    "dense_small_images_first": {"skip": None, "phases": SMALL_IMAGES_FIRST},
    "keep25_full_end": {"skip": span(3, 11, 0.25), "phases": phases((5 / 6, {}), (1 / 6, FULL))},
    "late25": {"skip": span(5, 12, 0.25)},
    "small_images_full_first": {
        "skip": span(3, 11, 0.45),
        "phases": phases((0.5, {"image_size": 24, **FULL}), (0.5, {})),
    },
    "small_images_late25": {"skip": span(5, 12, 0.25), "phases": SMALL_IMAGES_FIRST},
    # What skipping saves spent on more tokens of the same image at the end, where dense is at 32 px throughout.
    "growing_images": {"skip": span(3, 11, 0.45), "phases": GROWING_IMAGES},
    "large_images_last": {"skip": span(3, 11, 0.45), "phases": LARGE_IMAGES_LAST},
    # Other tokens skip in other blocks, so that none is left out of all: by chance in each as random-LTD has it (arXiv
    # 2211.11586), by attention after each block on all tokens as IdleViT has it (arXiv 2310.05654).
    "random_each_block": {"skip": [span(block, block + 1, 0.45, "random") for block in range(3, 11)]},
    "chosen_thrice": {"skip": [span(start, start + 2, 0.25) for start in (3, 6, 9)]},
    "random25": {"skip": span(3, 11, 0.25, "random")},
    # Tokens that skip do not come back, so that blocks behind do not learn to read a mixture, and all of them may be
    # used at test: by chance as PatchDropout (arXiv 2208.07220, there before block 0), or as EViT, with fewer kept.
    "random_end12": {"skip": span(3, 12, 0.45, "random")},
    "evit55": {
        "skip": [
            span(4, 7, 0.55, skipped="fuse"),
            span(7, 10, 0.3, skipped="fuse"),
            span(10, 12, 0.17, skipped="fuse"),
        ]
    },
    # As dear as `random`, where TREAD skips: the last third of the blocks computes on all tokens.
    "middle25": {"skip": span(2, 8, 0.25)},
    "middle25_random": {"skip": span(2, 8, 0.25, "random")},
    # As dear as `random`: fewer tokens while the rate is high, all of them when it is low.
    "random25_full_end": {"skip": span(3, 11, 0.25, "random"), "phases": phases((0.75, {}), (0.25, FULL))},
    # For twice dense's speed, ending as `random` does.
    "random_small_images_first": {"skip": span(3, 11, 0.45, "random"), "phases": SMALL_IMAGES_FIRST},
    # As fast, with what `random_growing_images` ends on.
    "random_small_then_large_images": {
        "skip": span(3, 11, 0.45, "random"),
        "phases": phases((0.8, {"image_size": 24}), (0.2, {"image_size": 40})),
    },
    # As fast, from smaller images on, so that there is more time for larger ones.
    "random_growing_from_16": {
        "skip": span(3, 11, 0.45, "random"),
        "phases": phases((0.3, {"image_size": 16}), (0.4, {"image_size": 24}), (0.3, {"image_size": 40})),
    },
    "random_growing_in_steps": {
        "skip": span(3, 11, 0.45, "random"),
        "phases": phases((0.3, {"image_size": 16}), (0.3, {"image_size": 24}), (0.2, {}), (0.2, {"image_size": 40})),
    },
    # As dear as `random`: what small images first save is spent on keeping more tokens throughout.
    "random65_small_images_first": {"skip": span(3, 11, 0.65, "random"), "phases": SMALL_IMAGES_FIRST},
    # As dear as `random`, ending on larger images, whose kept tokens cost at test what all of dense's do.
    "random_growing_images": {"skip": span(3, 11, 0.45, "random"), "phases": GROWING_IMAGES},
    "random_large_images_last": {"skip": span(3, 11, 0.45, "random"), "phases": LARGE_IMAGES_LAST},
    "random10_first": {
        "skip": span(3, 11, 0.45, "random"),
        "phases": phases((0.5, {"keep_ratio": 0.10}), (0.5, {})),
    },
    "full_start": {"skip": span(3, 11, 0.45), "phases": phases((1 / 6, FULL), (5 / 6, {}))},
    "end12": {"skip": span(3, 12, 0.45)},
    "fuse": {"skip": span(3, 12, 0.45, skipped="fuse")},
    "cls_attention_value": {"skip": span(3, 11, 0.45, "cls_attention_value")},
    "key_norm": {"skip": span(3, 11, 0.45, "key_norm")},
    "mean_attention": {"skip": span(3, 11, 0.45, "mean_attention")},
    "start2": {"skip": span(2, 11, 0.45)},
    "start5": {"skip": span(5, 11, 0.45)},
    "end9": {"skip": span(3, 9, 0.45)},
    "keep10": {"skip": span(3, 11, 0.10)},
    "keep65": {"skip": span(3, 11, 0.65)},
    "corner_keep45": {"skip": span(1, 12, 0.45)},
    "chosen_again": {"skip": [span(1, 6, 0.25), span(7, 12, 0.25)]},  # IdleViT's idea: those skipped once come back
    # Others' settings. EViT (arXiv 2202.07800): keep 0.7 in blocks 3, 6 and 9, of what is left each time, fused; it
    # drops between attention and MLP of those blocks, this behind them. TREAD (arXiv 2501.04765): half of the tokens by
    # chance past blocks 2 to 7 of 12, all at test.
    "evit": {
        "skip": [
            span(4, 7, 0.7, skipped="fuse"),
            span(7, 10, 0.49, skipped="fuse"),
            span(10, 12, 0.343, skipped="fuse"),
        ]
    },
    "tread": {"skip": span(2, 8, 0.5, "random")},
}
OTHERS = ("evit", "tread")
# Question 2's, the most informative first: length, seeds, and settings, all of which run on one seed before the next.
TIERS = (
    (HALF_OF_THEM, SEEDS, "dense paper corner keep25 start1 random corner_random corner_full_end"),
    (MANY_PASSES, SEEDS, "dense random paper random25 random_end12 evit55 middle25_random middle25 random25_full_end"),
    (MORE_PASSES, SEEDS, "dense random random_small_images_first random25 random10_first"),
    (MOST_PASSES, SEEDS, "dense random random25"),
    (MANY_PASSES, SEEDS, "random_growing_images random_large_images_last random65_small_images_first"),
    (MANY_PASSES, SEEDS, "random_small_then_large_images"),
    (MANY_PASSES, SEEDS[:1], "random_growing_from_16 random_growing_in_steps"),  # two points behind on it
    (MANY_PASSES, SEEDS, "random_small_images_first random10_first"),
    (
        FEW_PASSES,
        (100, 101, 102),  # those of question 1's first choice, which was given up
        "dense paper random small_images_first growing_images large_images_last random_each_block chosen_thrice",
    ),
    (HALF_OF_THEM, SEEDS, "full_end small_images_first dense_small_images_first keep25_full_end late25"),
    (HALF_OF_THEM, SEEDS, "small_images_full_first small_images_late25 random25 full_start end12 fuse"),
    (HALF_OF_THEM, SEEDS, "cls_attention_value key_norm mean_attention start2 start5 end9 keep10 keep65"),
    (HALF_OF_THEM, SEEDS, "corner_keep45 chosen_again"),
)

CLUTTER_SCORES = ("cls_attention", "cls_attention_value", "key_norm", "mean_attention", "random")
CLUTTER_EPOCHS = 6

RESULTS = ROOT / "results" / "study"
CHOSEN, STEP_TIMES = (RESULTS / name for name in ("chosen.json", "step_times.json"))
README, LOG = ROOT / "README.md", ROOT / "docs" / "LOG.md"
BEGIN, END = "<!-- study -->", "<!-- /study -->"
QUESTIONS = ("1", "2", "3", "clutter")


# ------------------------------------------------------------------------------------------------------- the runs


class Run(NamedTuple):
    """One training run; its name is its identity."""

    setting: str
    images: int  # that it trains on; 0 for all of clutter's
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        """Of its JSON and its folder."""
        images = f"{self.images}images" if self.images else "clutter"
        return f"{self.setting}_{images}_{self.epochs}epochs_seed{self.seed}"

    @property
    def record(self) -> Path:
        """Its JSON."""
        return RESULTS / f"{self.name}.json"

    def recipe(self) -> dict[str, Any]:
        """What it trains by, but for where images and folder lie."""
        if self.images:
            recipe = {**RECIPE, **SETTINGS[self.setting]}
            for section, key in (("optim", "warmup_epochs"), ("train", "validate_every_epochs")):
                epochs = recipe[section][key] * FEW_PASSES.images // self.images
                recipe[section] = {**recipe[section], key: epochs}
        else:
            recipe = yaml.safe_load((ROOT / "configs/clutter/skipvit.yaml").read_text())
            recipe["skip"]["score"] = self.setting
        return {**recipe, "train": {**recipe["train"], "epochs": self.epochs, "seed": self.seed}}

    def config(self) -> Config:
        """The recipe, checked."""
        config = from_dict(self.recipe())
        return config.replace(model=dataclasses.replace(config.model, num_classes=CLASSES))


def runs_of(question: str) -> list[Run]:
    """A question's runs in the order in which they are made; those of one that nothing was chosen for are left out."""
    if question == "2":
        return [Run(name, *length, seed) for length, seeds, names in TIERS for seed in seeds for name in names.split()]
    if question == "clutter":
        return [Run(score, 0, CLUTTER_EPOCHS, seed) for seed in SEEDS for score in CLUTTER_SCORES]
    if question == "1":
        return [run for choice in current_choices() for run in runs_of_choice(choice)]
    chosen = choice_of(MANY_PASSES, choices())
    methods = dict.fromkeys(("dense", *OTHERS, *tested_keep_ratios(chosen)))
    seeds = {length: SEEDS for length in COST_LENGTHS if length != MANY_PASSES}
    if chosen:
        seeds[MANY_PASSES] = chosen["seeds"]  # the longest share question 1's runs, and wait for the choice as those do
    return [
        Run(name, *length, of_length[i])
        for i in range(len(SEEDS))
        for length, of_length in seeds.items()
        for name in methods
    ]


def train(run: Run, work: Path) -> None:
    """Make a run, or go on with it, and record it."""
    folder = work / "runs" / run.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = run.recipe()
    if run.images:
        images = {"train": f"train_{run.images}", "val": "held_out"}
        recipe["data"] = {**recipe["data"], **{key: str(work / "cifar10" / name) for key, name in images.items()}}
    recipe["train"] = {**recipe["train"], "output": str(folder), "resume": "auto"}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    started = time.time()
    closing = command(["train", str(path)], work, log=folder.with_suffix(".log"))
    seconds = time.time() - started

    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validations = [item for item in metrics if "top1" in item]
    record = {
        **run._asdict(),
        "top1": validations[-1]["top1"],
        "curve": [[item["epoch"], item["top1"]] for item in validations],
        "losses": mean_losses(metrics),
        "training_flops": training_flops(run.config(), closing["steps"] // run.epochs),
        "steps": [
            [shape_of(config), steps] for config, steps in steps_of(run.config(), closing["steps"] // run.epochs)
        ],
        "seconds": round(seconds, 1),  # of the last start alone, where it was stopped; other work may have run beside
        "first_step_seconds": closing["first_step_seconds"],
        "environment": json.loads((folder / "run.json").read_text()),
        "config": run.recipe(),
    }
    if "object_kept" in validations[-1]:
        record["object_kept"] = [[item["epoch"], item["object_kept"]] for item in validations]
        record["random_kept"] = validations[-1]["random_kept"]
    else:
        for key, (folder_of_images, options) in checks_of(run).items():
            place = ["--data", str(work / "cifar10" / folder_of_images)]
            record[key] = command(["evaluate", str(folder / "last.ckpt"), *place, *options], work)["top1"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_whole(run.record, json.dumps(record, indent=1) + "\n")


def checks_of(run: Run) -> dict[str, tuple[str, list[str]]]:
    """What a finished run is evaluated on besides: by the record's key the images, and evaluate's options."""
    checks: dict[str, tuple[str, list[str]]] = {}
    spans = run.config().skip
    if spans:
        checks["top1_no_skip"] = ("held_out", ["--no-skip"])
        more = more_at_test(SETTINGS[run.setting])
        if more:
            checks["top1_more"] = ("held_out", ["--keep-ratio", more])
        if run.config().of_phase(-1).skip != spans:  # it ends on all tokens
            checks["top1_skip"] = ("held_out", ["--keep-ratio", str(spans[0].keep_ratio)])
    chosen = choice_of(Length(run.images, run.epochs), choices())
    if chosen and run in runs_of_choice(chosen):
        kept = tested_keep_ratios(chosen).get(run.setting)
        checks["test_top1"] = ("test", ["--keep-ratio", str(kept)] if kept else [])
    return checks


def more_at_test(setting: dict[str, Any]) -> Optional[str]:
    """The greater share of the tokens that a setting is also tested with; None for one of several spans."""
    skip = setting["skip"]
    return f"{skip['keep_ratio'] + MORE_AT_TEST:g}" if isinstance(skip, dict) else None


def command(arguments: Sequence[str], work: Path, log: Optional[Path] = None) -> dict[str, Any]:
    """Run one of the project's commands on the cores of this thread; what its last line says."""
    threads = str(len(os.sched_getaffinity(0)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": threads}
    module, *rest = arguments
    ended = subprocess.run(
        [sys.executable, "-m", f"skipvit.{module}", *rest], cwd=work, env=environment, text=True, capture_output=True
    )
    if log is not None:
        with open(log, "a", encoding="utf-8") as file:
            file.write(ended.stdout + ended.stderr)
    if ended.returncode:
        raise UserError(f"{' '.join(arguments)}: ended with {ended.returncode}: {ended.stderr.strip()[-500:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def mean_losses(metrics: Sequence[dict[str, Any]]) -> list[float]:
    """The training loss of each epoch."""
    epochs: dict[int, list[float]] = {}
    for item in metrics:
        if "loss" in item:
            epochs.setdefault(item["epoch"], []).append(item["loss"])
    return [round(sum(losses) / len(losses), 4) for _, losses in sorted(epochs.items())]


# ------------------------------------------------------------------------------------------------------- its cost


def steps_of(config: Config, steps_per_epoch: int) -> Iterator[tuple[Config, int]]:
    """Each phase as it trains, and its steps."""
    ends = config.phase_ends()
    for index, (start, end) in enumerate(zip([0, *ends], ends)):
        yield config.of_phase(index), (end - start) * steps_per_epoch


def training_flops(config: Config, steps_per_epoch: int) -> float:
    """Floating-point operations of a whole run, in 1e12."""
    total = sum(
        steps * config.data.batch_size * cost.training_flops(phase.model, phase.skip)["total"]
        for phase, steps in steps_of(config, steps_per_epoch)
    )
    return round(total / 1e12, 3)


def shape_of(config: Config) -> str:
    """What a step's time depends on, as the key of its measurement."""
    model = config.model
    spans = [
        f"{shape.span.start}-{shape.span.end}:{shape.kept}:{shape.span.score}:{shape.span.skipped}"
        for shape in span_shapes(config.skip, model.num_patches)
    ]
    return " ".join([f"{model.embed_dim}x{model.depth}/{model.image_size}px/{config.data.batch_size}", *spans])


def measure(groups_of: int, warmup: int, steps: int) -> None:
    """Step times of every shape that question 1 to 3 may have, in groups beside the dense model, step by step in turn.

    A shape's time is its ratio to the dense model of its own group times the dense model's median over all groups, so
    that a machine that was busy for a while does not bend one of them. What is measured already stays. All take turns
    on one core, as runs are made: two would spend a part of such small operators' time on waiting for each other.
    """
    from skipvit import benchmark

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["OMP_NUM_THREADS"] = "1"
    known = step_times()
    wanted: dict[str, Config] = {}
    for name in SETTINGS:
        for config, _ in steps_of(Run(name, *MANY_PASSES, 0).config(), 1):
            wanted.setdefault(shape_of(config), config)
    dense = Run("dense", *MANY_PASSES, 0).config()
    missing = [shape for shape in wanted if shape not in known["ratios"] and shape != shape_of(dense)]
    for first in range(0, len(missing), groups_of):
        group = missing[first : first + groups_of]
        configs = [dense, *(wanted[shape] for shape in group)]
        contenders = []
        try:
            for shape, config in zip(["dense", *group], configs):
                contenders.append(benchmark.Contender(shape, config, "own"))
            benchmark.take_turns(contenders, warmup, steps)
            for shape, contender in zip(group, contenders[1:]):
                known["ratios"][shape] = round(benchmark.ratio(contender, contenders[0])["ratio"], 4)
            known["dense_ms"].append(benchmark.summary_of(contenders[0], dense.data.batch_size)["ms"])
        finally:
            for contender in contenders:
                contender.close()
        known["ratios"][shape_of(dense)] = 1.0
        known["environments"].append(benchmark.surroundings(dense))
        RESULTS.mkdir(parents=True, exist_ok=True)
        STEP_TIMES.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{min(first + groups_of, len(missing))} of {len(missing)} shapes measured", flush=True)


def seconds_of(record: dict[str, Any], times: dict[str, Any]) -> Optional[float]:
    """A run's training by measured step times, without validation and compilation; None while one is missing."""
    if not all(shape in times["ratios"] for shape, _ in record["steps"]):
        return None
    dense = float(np.median(times["dense_ms"]))
    return sum(steps * times["ratios"][shape] * dense / 1e3 for shape, steps in record["steps"])


def step_times() -> dict[str, Any]:
    """What `time` has measured so far: by shape the ratio to dense, and of each group dense's ms and the machine."""
    return (
        json.loads(STEP_TIMES.read_text())
        if STEP_TIMES.exists()
        else {"ratios": {}, "dense_ms": [], "environments": []}
    )


# ------------------------------------------------------------------------------------------------ images, choice


def prepare(archive: Path, work: Path) -> None:
    """Unpack the images to train on, those held out of them, and the test images."""
    target = work / "cifar10"
    if target.exists():
        raise UserError(f"{target}: is there already; delete it to have it made anew")
    parts = {"held_out": (0, HELD_OUT_A_CLASS)}
    for length in LENGTHS:
        parts[f"train_{length.images}"] = (HELD_OUT_A_CLASS, HELD_OUT_A_CLASS + length.images // CLASSES)
    unfinished = work / ".cifar10.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    for part, name, content in images_in(archive, "train"):
        for folder, (first, end) in parts.items():
            if first <= int(Path(name).stem) < end:
                write(unfinished / folder / part / name, content)
    for part, name, content in images_in(archive, "test"):
        write(unfinished / "test" / part / name, content)
    wanted = {folder: (end - first) * CLASSES for folder, (first, end) in parts.items()}
    for folder, images in {**wanted, "test": TEST_IMAGES}.items():
        found = sum(1 for _ in (unfinished / folder).glob("*/*"))
        if found != images:
            raise UserError(
                f"--cifar10: {archive} gives {found} images for {folder}, which has {images}; "
                "they are read from cifar10/{train,test}/<class>/<n>.jpg, 10 classes, numbered from 0"
            )
    unfinished.rename(target)


def images_in(archive: Path, split: str) -> Iterator[tuple[str, str, bytes]]:
    """Class, name and content of each image of `cifar10/<split>/<class>/<n>.jpg` in a tar file."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                place = Path(member.name).parts
                content = tar.extractfile(member)
                if len(place) == 4 and place[1] == split and Path(place[3]).stem.isdecimal() and content is not None:
                    yield place[2], place[3], content.read()
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"--cifar10: {archive} cannot be read as a tar file: {error}") from None


def write(path: Path, content: bytes) -> None:
    """A file and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def choices() -> list[dict[str, Any]]:
    """What was ever chosen for question 1."""
    return json.loads(CHOSEN.read_text()) if CHOSEN.exists() else []


def current_choices() -> list[dict[str, Any]]:
    """What question 1 is about, one choice a length: those that were not given up."""
    return [choice for choice in choices() if "given_up" not in choice]


def choice_of(length: Length, among: Sequence[dict[str, Any]]) -> Optional[dict[str, Any]]:
    """Of these choices what question 1 is about at this length."""
    return next((choice for choice in among if "given_up" not in choice and length_of(choice) == length), None)


def length_of(choice: dict[str, Any]) -> Length:
    """How long its runs train."""
    return Length(choice["images"], choice["epochs"])


def tested_keep_ratios(choice: Optional[dict[str, Any]]) -> dict[str, Optional[float]]:
    """A choice's settings, and what each keeps at test; None: as trained."""
    return {item["setting"]: item["tested_keep_ratio"] for item in choice["settings"]} if choice else {}


def runs_of_choice(choice: dict[str, Any]) -> list[Run]:
    """Its runs, pair by pair."""
    names = ("dense", *tested_keep_ratios(choice))
    return [Run(name, *length_of(choice), seed) for seed in choice["seeds"] for name in names]


def choose(names: Sequence[str], length: Length) -> None:
    """Record settings that question 1 holds against dense, before any of their runs; as SETTING@RATIO if tested so.

    Others may join them, on the same seeds: they share dense's runs. What was told by then is recorded with them.
    """
    items = choices()
    item = choice_of(length, items)
    if item is None:
        first = FIRST_PAIRED_SEED + PAIRS * len(items)
        item = {"settings": [], **length._asdict(), "seeds": list(range(first, first + PAIRS))}
        items.append(item)
    settings, told = item["settings"], answered(item)
    for name, _, kept in (text.partition("@") for text in names):
        if name not in SETTINGS or not SETTINGS[name]["skip"]:
            raise UserError(f"{name}: is no setting with skipping; there are {', '.join(SETTINGS)}")
        if name in {one["setting"] for one in settings}:
            raise UserError(f"{name}: is chosen already, and each is tested in one way")
        if any(Run(name, *length, seed).record.exists() for seed in item["seeds"]):
            raise UserError(f"{name}: has runs on question 1's seeds already, which did not look at the test images")
        ratios = [ratio for ratio in (more_at_test(SETTINGS[name]), "1") if ratio]
        if kept and kept not in ratios:
            known = " or ".join([name, *(f"{name}@{ratio}" for ratio in ratios)])
            raise UserError(f"{name}@{kept}: was not tried on held-out images; give {known}")
        settings.append(
            {
                "setting": name,
                "recipe": SETTINGS[name],
                "tested_keep_ratio": float(kept) if kept else None,
                "date": datetime.date.today().isoformat(),
                "told_before": told,
            }
        )
    write(CHOSEN, (json.dumps(items, indent=1) + "\n").encode())
    tables()


def answered(choice: dict[str, Any]) -> list[str]:
    """Its settings that question 1 is answered about: all of their runs are in, and all of dense's."""
    missing = {run.setting for run in runs_of_choice(choice) if not run.record.exists()}
    return [name for name in tested_keep_ratios(choice) if not {name, "dense"} & missing]


def untold() -> set[Run]:
    """Runs of question 1 that are to be compared with dense when the answer is there, and not before."""
    waiting: set[Run] = set()
    for choice in current_choices():
        told = answered(choice)
        compared = {"dense", *told} if told else set()
        waiting.update(run for run in runs_of_choice(choice) if run.setting not in compared)
    return waiting


def give_up(reason: str) -> None:
    """Record why question 1 is no longer about the newest choice, which an answer rules out."""
    items = choices()
    if not items or "given_up" in items[-1]:
        raise UserError(f"{CHOSEN}: there is no choice to give up")
    told = answered(items[-1])
    if told:
        raise UserError(f"{CHOSEN}: question 1 is answered, about {' and '.join(told)}; that stays")
    items[-1]["given_up"] = reason
    write(CHOSEN, (json.dumps(items, indent=1) + "\n").encode())
    tables()


# ----------------------------------------------------------------------------------------------- tables, pictures


def interval(differences: Sequence[float]) -> str:
    """Mean and the 95% interval of paired differences, by Student's t."""
    mean = float(np.mean(differences))
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = half_width(float(np.std(differences, ddof=1)), len(differences) - 1, len(differences))
    return f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f})"


def half_width(deviation: float, freedom: int, count: int) -> float:
    """Of the 95% interval of a mean of so many, by the standard deviation of one and its degrees of freedom."""
    return float(stats.t.ppf(0.975, freedom) * deviation / np.sqrt(count))


def records() -> dict[Run, dict[str, Any]]:
    """What is recorded of CIFAR-10."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*_seed*.json"))]
    return {Run(*(item[field] for field in Run._fields)): item for item in found if item["images"]}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def link(run: Run) -> str:
    """A run's setting, and where README finds its record."""
    return f"[`{run.setting}`](results/study/{run.name}.json)"


def costs(ours: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    """A run's FLOPs and time by measured steps, as shares of a dense run's."""
    seconds = [seconds_of(record, step_times()) for record in (ours, dense)]
    measured = f"{seconds[0] / seconds[1]:.2f}" if seconds[0] and seconds[1] else ""
    return [f"{ours['training_flops'] / dense['training_flops']:.2f}", measured]


def settings_table(length: Length) -> str:
    """Every setting against dense on the seeds that both have, on the held-out images; but for what is not told yet."""
    waiting = untold()
    known = {
        (run.setting, run.seed): item
        for run, item in records().items()
        if (run.images, run.epochs) == length and run not in waiting
    }
    rows, all_differences = [], []
    for name in SETTINGS:
        seeds = sorted(seed for setting, seed in known if setting == name and ("dense", seed) in known)
        if not seeds:
            continue
        ours, dense = ([known[key, seed] for seed in seeds] for key in (name, "dense"))
        as_tested = (
            [item.get("top1_skip", item["top1"]) for item in ours],
            *([item.get(key) for item in ours] for key in ("top1_more", "top1_no_skip")),
        )
        differences = [item["top1"] - other["top1"] for item, other in zip(ours, dense)]
        if name != "dense" and len(differences) > 1:
            all_differences.append(differences)
        rows.append(
            [
                link(Run(name, *length, seeds[0])),
                describe(SETTINGS[name]),
                *costs(ours[0], dense[0]),
                f"{np.mean([item['top1'] for item in ours]):.2f}",
                interval(differences) if name != "dense" else "",
                *(f"{np.mean(top1):.2f}" if SETTINGS[name]["skip"] and None not in top1 else "" for top1 in as_tested),
                str(len(seeds)),
            ]
        )
    tests = ["with skipping", f"{MORE_AT_TEST:g} more kept", "without"]
    header = ["setting", "", "FLOPs", "time", "Top-1", "less dense", *tests, "seeds"]
    return "\n\n".join([table(header, rows), *how_sure(all_differences)]) if rows else "No run yet."


def how_sure(all_differences: Sequence[Sequence[float]]) -> list[str]:
    """What so few seeds can tell: a sentence on how paired differences vary, over all settings; none without any.

    With two or three seeds a setting's own interval is mostly chance; what all of them vary by is known better.
    """
    freedom = sum(len(differences) - 1 for differences in all_differences)
    if not freedom:
        return []
    pooled = np.sqrt(sum((len(item) - 1) * np.var(item, ddof=1) for item in all_differences) / freedom)
    half = half_width(float(pooled), freedom, len(SEEDS))
    return [
        f"Over all settings of this table a difference varies by {pooled:.2f} points between seeds (pooled standard "
        f"deviation), so that a mean of {len(SEEDS)} seeds is known to {half:.1f} either way."
    ]


def describe(setting: dict[str, Any]) -> str:
    """A setting in a few words."""
    spans = setting["skip"] if isinstance(setting["skip"], list) else [setting["skip"]] if setting["skip"] else []
    words = [
        f"{item['start']}→{item['end']} at {item['keep_ratio']:g}"
        + (f", {item['score']}" if item["score"] != "cls_attention" else "")
        + (f", {item['skipped']}" if item["skipped"] != "rejoin" else "")
        for item in spans
    ]
    parts = [
        " ".join(
            [f"{phase['share']:.0%}"]
            + ([f"keeping {phase['keep_ratio']:g}"] if "keep_ratio" in phase else [])
            + ([f"of {phase['image_size']} px"] if "image_size" in phase else [])
        )
        for phase in setting.get("phases", [])
    ]
    return "; ".join(words + ([f"phases {', '.join(parts)}"] if parts else [])) or "no token skips"


def meant_top1(item: dict[str, Any]) -> float:
    """Held-out Top-1 as the setting is meant to be tested: TREAD's on all tokens, a chosen one's as chosen."""
    ratio = {"tread": 1.0, **tested_keep_ratios(choice_of(MANY_PASSES, choices()))}.get(item["setting"])
    return item["top1" if ratio is None else "top1_no_skip" if ratio == 1 else "top1_more"]


def cost_points() -> dict[str, dict[float, list[float]]]:
    """By method: minutes of training by measured steps to the Top-1 of each seed, of lengths that it has all of."""
    known, times = records(), step_times()
    points: dict[str, dict[float, list[float]]] = {}
    runs = runs_of("3")
    unfinished = {(run.setting, run.epochs) for run in runs if run not in known}
    for run in runs:
        seconds = seconds_of(known[run], times) if (run.setting, run.epochs) not in unfinished else None
        if seconds:
            of_method = points.setdefault(run.setting, {})
            of_method.setdefault(round(seconds / 60, 2), []).append(meant_top1(known[run]))
    return {name: dict(sorted(of_method.items())) for name, of_method in points.items()}


def cost_table() -> str:
    """Question 3."""
    rows = [
        [f"`{name}`", f"{minutes:.1f}", f"{np.mean(tops):.2f}", f"{min(tops):.2f} to {max(tops):.2f}", str(len(tops))]
        for name, of_method in cost_points().items()
        for minutes, tops in of_method.items()
    ]
    return table(["method", "minutes", "Top-1", "seeds' range", "seeds"], rows) if rows else "No run yet."


def verdicts() -> str:
    """Question 1: each choice with its answer, the newest first, and last those that were given up."""
    ordered = sorted(choices(), key=lambda choice: "given_up" not in choice)[::-1]
    return "\n\n".join([*nothing_chosen(), *map(verdict_of, ordered)])


def verdict_of(choice: dict[str, Any]) -> str:
    """The paired differences on the test images, of each of its settings whose runs are all in."""
    said = choice_in_words(choice)
    if "given_up" in choice:
        return said
    runs, names, known = runs_of_choice(choice), answered(choice), records()
    done = sum(run.record.exists() for run in runs)
    if done < len(runs):
        said += f" Of {len(runs)} runs {done} are in; what they saw is told when all of a setting's and of dense's are."
    if not names:
        return said
    seeds, length = choice["seeds"], length_of(choice)
    of_seeds = [[known[Run(name, *length, seed)] for name in ("dense", *names)] for seed in seeds]
    tops = np.array([[record["test_top1"] for record in records_of_seed] for records_of_seed in of_seeds])
    differences = tops[:, 1:] - tops[:, :1]
    rows = [
        [str(seed), f"{of_seed[0]:.2f}"]
        + [text for pair in zip(of_seed[1:], less) for text in (f"{pair[0]:.2f}", f"{pair[1]:+.2f}")]
        for seed, of_seed, less in zip(seeds, tops, differences)
    ]
    means = [text for top1, less in zip(tops.T[1:], differences.T) for text in (f"{top1.mean():.2f}", interval(less))]
    rows.append(["mean", f"{tops[:, 0].mean():.2f}", *means])
    spent = [costs(record, of_seeds[0][0]) for record in of_seeds[0][1:]]
    in_words = [
        f"`{name}` {flops} of the FLOPs, {time or 'not measured'} of the time"
        for name, (flops, time) in zip(names, spent)
    ]
    dense_link, *links = (link(Run(name, *length, seeds[0])) for name in ("dense", *names))
    header = ["seed", dense_link, *(text for each in links for text in (each, "difference"))]
    return (
        f"{said} Test images: all 10,000; with the 95% interval. Training cost of dense: "
        f"{'; '.join(in_words)}.\n\n{table(header, rows)}"
    )


def choice_in_words(choice: dict[str, Any]) -> str:
    """What was chosen for question 1, and when, and why it was given up, if it was."""
    settings = []
    for one in choice["settings"]:
        kept = one["tested_keep_ratio"]
        tested = f"{kept:.0%} of the tokens kept" if kept else "skipping as trained"
        told = " and ".join(f"`{name}`" for name in one.get("told_before", []))
        settings.append(
            f"on {one['date']} `{one['setting']}` ({describe(one['recipe'])}), tested with {tested}"
            + (f", when the answer about {told} was known" if told else "")
        )
    seeds = choice["seeds"]
    return (
        f"Chosen by the held-out images: {'; '.join(settings)}; against dense, {choice['epochs']} "
        f"epochs of {choice['images']:,} images, seeds {seeds[0]} to {seeds[-1]}."
        + (f" Given up: {choice['given_up']}." if "given_up" in choice else "")
    )


def all_choices_in_words() -> str:
    """As the log has them."""
    return " ".join([*(choice_in_words(choice) for choice in choices()), *nothing_chosen()])


def nothing_chosen() -> list[str]:
    """A sentence where question 1 is about nothing."""
    return [] if current_choices() else ["Nothing is chosen for question 1 now."]


def clutter_curves() -> dict[str, list[tuple[float, float, float, float]]]:
    """By score: epoch, and mean, least and largest share over the seeds of the object's patches that were kept."""
    found: dict[str, list[list[Any]]] = {}
    for run in runs_of("clutter"):
        if run.record.exists():
            found.setdefault(run.setting, []).append(json.loads(run.record.read_text())["object_kept"])
    return {
        score: [
            (points[0][0], float(np.mean(shares)), min(shares), max(shares))
            for points in zip(*curves)
            for shares in [[share for _, share in points]]
        ]
        for score, curves in found.items()
    }


def clutter_table() -> str:
    """The shares after the first and the last epoch."""
    rows = [
        [
            f"`{score}`",
            *(f"{100 * points[i][1]:.1f}% ({100 * points[i][2]:.1f} to {100 * points[i][3]:.1f})" for i in (0, -1)),
        ]
        for score, points in clutter_curves().items()
    ]
    return table(["score", "after 1 epoch", f"after {CLUTTER_EPOCHS}"], rows) if rows else "No run yet."


COST_PICTURE, CLUTTER_PICTURE = "docs/study_cost.png", "docs/study_clutter.png"


def draw() -> None:
    """The two pictures, where there is something to draw."""
    points, curves = cost_points(), clutter_curves()
    if points:
        figure, axes = picture("minutes of training steps on one CPU core", "Top-1 on held-out images, %")
        for name, of_method in points.items():
            means = [float(np.mean(tops)) for tops in of_method.values()]
            below = [mean - min(tops) for mean, tops in zip(means, of_method.values())]
            above = [max(tops) - mean for mean, tops in zip(means, of_method.values())]
            axes.errorbar(list(of_method), means, (below, above), fmt="o-", capsize=3, label=name)
        axes.legend(frameon=False)
        figure.savefig(ROOT / COST_PICTURE, dpi=120)
    if curves:
        figure, axes = picture("epochs", "share of the object's patches kept")
        for score, of_score in curves.items():
            epochs, shares, least, largest = zip(*of_score)
            axes.plot(epochs, shares, "o-", label=score)
            axes.fill_between(epochs, least, largest, alpha=0.2)
        axes.set_ylim(0, 1)
        axes.legend(frameon=False)
        figure.savefig(ROOT / CLUTTER_PICTURE, dpi=120)


def picture(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    """An empty figure and its axes."""
    from matplotlib.figure import Figure  # slow to import, and needed here alone

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    return figure, figure.add_subplot(xlabel=xlabel, ylabel=ylabel)


def blocks() -> dict[Path, str]:
    """What stands between the markers of each document."""
    pictures = {
        COST_PICTURE: "Top-1 on held-out images against minutes of training, by method",
        CLUTTER_PICTURE: "Share of the object's patches that each score keeps, over training",
    }
    shown = [f"![{alt}]({name})" for name, alt in pictures.items() if (ROOT / name).exists()]
    by_length = [
        f"{length.epochs} epochs of {length.images:,} images, Top-1 on held-out ones:\n\n{settings_table(length)}"
        for length in (*reversed(LENGTHS), HALF_OF_THEM)
    ]
    readme = [verdicts(), *shown, *by_length]
    return {README: "\n\n".join(readme), LOG: "\n\n".join([all_choices_in_words(), cost_table(), clutter_table()])}


def with_block(text: str, block: str) -> str:
    """A document with its block brought up to date."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def tables() -> None:
    """Pictures first, then both documents."""
    draw()
    for path, block in blocks().items():
        path.write_text(with_block(path.read_text(), block))


# ---------------------------------------------------------------------------------------------------- the command


def run_missing(question: Optional[str], work: Path, limit: Optional[int], jobs: int) -> None:
    """The next runs that are not recorded yet, so many at a time, each on cores of its own."""
    if not (work / "cifar10").is_dir() and question != "clutter":
        raise UserError(f"--work: {work / 'cifar10'} is not there; `prepare` makes it")
    missing = [run for run in all_runs(question) if not run.record.exists()][:limit]
    if set(missing) & set(runs_of("1")) and all_choices_in_words() not in LOG.read_text():
        raise UserError(f"{LOG}: does not say what question 1 tests; `choose` wrote it there, and that line is to stay")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= jobs <= len(cores):
        raise UserError(f"--jobs: {jobs}; give 1 to {len(cores)}, as each run has a core of its own")
    shares: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    for job in range(jobs):
        shares.put(set(cores[job::jobs]))

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M')} {text}\n", end="", flush=True)  # one piece: others say something too

    def make(run: Run) -> None:
        say(run.name)
        train(run, work)
        say(f"{run.name}: Top-1 {json.loads(run.record.read_text())['top1']}")

    # A thread's cores are those of the processes it starts.
    with ThreadPoolExecutor(jobs, initializer=lambda: os.sched_setaffinity(0, shares.get())) as executor:
        list(executor.map(make, missing))


def all_runs(question: Optional[str]) -> list[Run]:
    """Of one question, or of all in the order they are to be answered, each run once."""
    questions = [question] if question else ["2", "clutter", "1", "3"]
    return list(dict.fromkeys(run for name in questions for run in runs_of(name)))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """See the module."""
    parser = Parser(prog="studies/accuracy.py", description=__doc__)
    parser.add_argument("command", choices=("prepare", "plan", "run", "time", "choose", "give-up", "tables"))
    parser.add_argument("what", nargs="*", help=f"for give-up: why; for choose: of {', '.join(SETTINGS)}")
    parser.add_argument("--work", type=Path, help="folder of images and runs, outside the repository")
    parser.add_argument("--cifar10", type=Path, help="tar file of cifar10/{train,test}/<class>/<n>.jpg")
    parser.add_argument("--question", choices=QUESTIONS, help="none: 2, clutter, 1, 3")
    parser.add_argument("--limit", type=int, help="make at most so many runs")
    lengths = {length.epochs: length for length in LENGTHS}
    parser.add_argument("--epochs", type=int, choices=lengths, default=MANY_PASSES.epochs, help="of what is chosen")
    jobs = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=jobs, help="runs at a time (default: as many as there are cores)")
    arguments = parser.parse_args(argv)
    needed = {"prepare": ("work", "cifar10"), "run": ("work",), "choose": ("what",), "give-up": ("what",)}
    for name in needed.get(arguments.command, ()):
        if not getattr(arguments, name):
            missing = f"--{name}" if name != "what" else "a setting" if arguments.command == "choose" else "a reason"
            raise UserError(f"{arguments.command}: needs {missing}; see --help")
    work: Any = arguments.work and arguments.work.absolute()

    if arguments.command == "prepare":
        prepare(arguments.cifar10, work)
    elif arguments.command == "plan":
        for run in all_runs(arguments.question):
            print(f"{'done' if run.record.exists() else '    '} {run.name}")
    elif arguments.command == "run":
        run_missing(arguments.question, work, arguments.limit, arguments.jobs)
    elif arguments.command == "time":
        measure(groups_of=4, warmup=8, steps=12)
    elif arguments.command == "choose":
        choose(arguments.what, lengths[arguments.epochs])
    elif arguments.command == "give-up":
        give_up(" ".join(arguments.what))
    else:
        tables()


if __name__ == "__main__":
    sys.exit(run_command(main))
