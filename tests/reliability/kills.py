"""SIGKILL at random moments of a run: each time train.resume=auto goes on, and ends with the unbroken run's bits."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import runs

COUNT = 60
IN_A_ROW = 6  # kills of one run before it may end
EPOCHS, STEPS_AN_EPOCH = 4, 6
PLACES = ("step", "validation", "writing best", "between", "writing last", "renaming", "elsewhere")
PATIENCE = 120  # seconds for what takes some 10
LONGEST = 30  # seconds from a signal to the end
END = 10  # seconds that a signal in the last step or after it may come too late by
MARKED = Path(__file__).with_name("marked.py")
RECIPE = {
    "model": {"dropout": 0.1, "drop_path": 0.2},
    "augment": {"rand_augment_magnitude": 9, "mixup": 0.8, "cutmix": 1.0},
    "optim": {"accumulate_steps": 2, "ema_decay": 0.9, "clip_norm": 1.0},
    "data": {"num_workers": 2},
    "train": {"epochs": EPOCHS},
}


def write_inputs(work):
    """Images and a recipe in which every kind of state is used."""
    runs.write_images(work / "train", 4 * STEPS_AN_EPOCH + 2)
    runs.write_images(work / "val", 7, seed=1)
    runs.write_recipe(work / "recipe.yaml", **RECIPE)


def prepare(work):
    """Images, a recipe, and the unbroken run with how long it was at each place; made once."""
    if not (work / "places.json").exists():
        write_inputs(work)
        shutil.rmtree(work / "whole", ignore_errors=True)
        ended, marks, _ = start(work, "whole")
        assert ended.returncode == 0, ended.stderr
        seconds = {place: [] for place in PLACES}
        for (at, place), (until, _) in zip(marks, marks[1:]):
            seconds[place].append(until - at)
        # The first step compiles, and so does the first validation.
        typical = {place: sorted(values)[len(values) // 2] for place, values in seconds.items() if values}
        (work / "places.json").write_text(json.dumps(typical))
    return json.loads((work / "places.json").read_text())


def start(work, output, *order):
    """Run to the end; ``order`` is that of ``marked.py``.

    Returns:
        The finished process, the places it came to with the time of each, and the seconds from the signal to its end
        (None: it had ended before).
    """
    path = work / f"{output}.marks"
    path.unlink(missing_ok=True)
    ended = subprocess.run(
        [sys.executable, MARKED, "recipe.yaml", f"train.output={output}", "train.resume=auto"],
        cwd=work,
        env=runs.environment(MARKS=str(path), **({"ORDER": ",".join(map(str, order))} if order else {})),
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE,
        check=False,
    )
    end = time.monotonic()
    marks = [(float(line.split(" ", 1)[0]), line.split(" ", 1)[1]) for line in path.read_text().splitlines()]
    path.unlink()
    if not order:
        return ended, marks, None
    _, place, occurrence, delay = order
    reached = [moment for moment, name in marks if name == place][occurrence - 1 : occurrence]
    return ended, marks, end - reached[0] - delay if reached else None


def training(folder):
    """What the metrics say of each step and validation, but for the speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def differences(work, output):
    """What a finished run has not in common with the unbroken one: arrays of its checkpoints, metrics, files left."""
    whole, ours = work / "whole", work / output
    found = [f"last: {name}" for name in runs.differing(whole / "last.ckpt", ours / "last.ckpt")]
    found += [f"best: {name}" for name in runs.differing(whole / "best.ckpt", ours / "best.ckpt")]
    if training(whole) != training(ours):
        found.append("metrics")
    names = [sorted(path.name for path in folder.iterdir()) for folder in (whole, ours)]
    if names[0] != names[1]:
        found.append(f"files {sorted(set(names[0]) ^ set(names[1]))}")
    return found


def series(work, index, numbers, kills=IN_A_ROW):
    """One run, broken ``kills`` times and then let end: each trial's signal and place, and what went wrong."""
    typical = prepare(work)
    chance, output = random.Random(index), f"run_{index}"
    shutil.rmtree(work / output, ignore_errors=True)
    trials, wrong = [], []
    for _ in range(kills):
        place = chance.choice([place for place in PLACES if place in typical])
        number = chance.choice(numbers)
        occurrence = chance.randint(2, STEPS_AN_EPOCH + 1) if place in ("step", "elsewhere") else 1
        ended, marks, seconds = start(work, output, int(number), place, occurrence, chance.uniform(0.0, typical[place]))
        if seconds is None and ended.returncode == 0:
            break  # it had come to its end
        trials.append({"signal": signal.Signals(number).name, "place": marks[-1][1] if marks else "the start"})
        wanted = -number if number == signal.SIGKILL else 128 + number
        if ended.returncode != wanted and not (ended.returncode == 0 and seconds < END):
            wrong.append(f"exit code {ended.returncode} after {trials[-1]}: {ended.stderr[-500:]}")
        elif seconds > LONGEST:
            wrong.append(f"{seconds:.0f} s from {trials[-1]} to the end")
    ended, _, _ = start(work, output)
    if ended.returncode:
        wrong.append(f"exit code {ended.returncode} at the end: {ended.stderr[-500:]}")
    else:
        wrong += differences(work, output)
    if not wrong:
        shutil.rmtree(work / output)
    return {"trials": trials, "wrong": wrong}


def run(work, count, numbers=(signal.SIGKILL,)):
    """Series of kills until there are ``count``; those of a run before, in the same folder, count too."""
    path = work / "series.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    while sum(len(item["trials"]) for item in done) < count:
        left = count - sum(len(item["trials"]) for item in done)
        done.append(series(work, len(done), numbers, min(IN_A_ROW, left)))
        with open(path, "a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(json.dumps(done[-1]), flush=True)
    trials = [trial for item in done for trial in item["trials"]]
    lost = sum(len(item["trials"]) for item in done if item["wrong"])
    return {
        "tried": len(trials),
        "survived": len(trials) - lost,
        "lost": lost,
        "places": dict(sorted(Counter(trial["place"] for trial in trials).items())),
        "wrong": [text for item in done for text in item["wrong"]],
    }
