"""SIGKILL at random moments of a run: each time train.resume=auto goes on, and ends with the unbroken run's bits."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import runs

COUNT = 60
IN_A_ROW = 12  # signals to one run before it is let end
EPOCHS, STEPS_AN_EPOCH = 12, 6
PLACES = ("step", "validation", "writing best", "between", "writing last", "renaming", "elsewhere")
PATIENCE = 120  # seconds for what takes some 10
LONGEST = 30  # seconds from a signal to the end
MARKED = Path(__file__).with_name("marked.py")
RECIPE = {
    "model": {"dropout": 0.1, "drop_path": 0.2},
    "augment": {"rand_augment_magnitude": 9, "mixup": 0.8, "cutmix": 1.0},
    "optim": {"accumulate_steps": 2, "ema_decay": 0.9, "clip_norm": 1.0},
    "data": {"num_workers": 2},
    "train": {"epochs": EPOCHS},
}


def write_inputs(work, sections=RECIPE):
    """Images and a recipe, by default one in which every kind of state is used."""
    runs.write_images(work / "train", 4 * STEPS_AN_EPOCH + 2)
    runs.write_images(work / "val", 7, seed=1)
    runs.write_recipe(work / "recipe.yaml", **sections)


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


def differences(work, output, number=signal.SIGKILL):
    """What a finished run has not in common with the unbroken one: arrays of its checkpoints, metrics, files left.

    A validation that SIGTERM or Ctrl-C has broken off is not made up for, so `best` may be another then.
    """
    whole, ours = work / "whole", work / output
    found = [f"last: {name}" for name in runs.differing(whole / "last.ckpt", ours / "last.ckpt")]
    metrics = [training(whole), training(ours)]
    if number == signal.SIGKILL:
        found += [f"best: {name}" for name in runs.differing(whole / "best.ckpt", ours / "best.ckpt")]
    else:
        metrics = [[line for line in lines if "loss" in line] for lines in metrics]
    if metrics[0] != metrics[1]:
        found.append("metrics")
    names = [sorted(path.name for path in folder.iterdir()) for folder in (whole, ours)]
    if names[0] != names[1]:
        found.append(f"files {sorted(set(names[0]) ^ set(names[1]))}")
    return found


class Chain:
    """Runs one after the other, each broken up to `IN_A_ROW` times and then let end; its records outlive it."""

    def __init__(self, work, index, numbers):
        self.work, self.index, self.numbers = work, index, numbers
        self.path = work / f"chain_{index}.jsonl"
        self.records = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def of_kind(self, key):
        return [record for record in self.records if key in record]

    def note(self, record):
        self.records.append(record)
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def run(self, count):
        """Until there are ``count`` trials, and the last of the runs has ended."""
        while len(self.of_kind("signal")) < count or "signal" in self.records[-1]:
            row = next((row for row, record in enumerate(reversed(self.records)) if "end" in record), len(self.records))
            output = f"run_{self.index}_{len(self.of_kind('end'))}"
            if row == 0:
                shutil.rmtree(self.work / output, ignore_errors=True)
            if row < IN_A_ROW and len(self.of_kind("signal")) < count and self.trial(output):
                continue
            ended, _, _ = start(self.work, output)
            failed = [f"exit code {ended.returncode}: {ended.stderr[-500:]}"] if ended.returncode else []
            wrong = failed or differences(self.work, output, self.numbers[0])
            self.note({"end": output, "wrong": wrong})
            if not wrong:
                shutil.rmtree(self.work / output)

    def trial(self, output):
        """One start and its signal; whether that came before the end."""
        typical = json.loads((self.work / "places.json").read_text())
        chance = random.Random(1000 * self.index + len(self.records))
        place = chance.choice([place for place in PLACES if place in typical])
        number = chance.choice(self.numbers)
        occurrence = chance.randint(2, STEPS_AN_EPOCH + 1) if place in ("step", "elsewhere") else 1
        delay = chance.uniform(0.0, typical[place])
        ended, marks, seconds = start(self.work, output, int(number), place, occurrence, delay)
        if seconds is None and ended.returncode == 0:
            return False  # the run came to its end before
        wrong = []
        wanted = -number if number == signal.SIGKILL else 128 + number
        if ended.returncode != wanted and not (ended.returncode == 0 and seconds < LONGEST):
            wrong.append(f"exit code {ended.returncode}: {ended.stderr[-500:]}")
        elif seconds > LONGEST:
            wrong.append(f"{seconds:.0f} s from the signal to the end")
        at = marks[-1][1] if number == signal.SIGKILL else place
        record = {"signal": signal.Signals(number).name, "place": at, "seconds": round(seconds or 0, 2), "wrong": wrong}
        self.note(record)
        return True


def run(work, count, numbers=(signal.SIGKILL,)):
    """Two chains side by side; what an interrupted call has done in the same folder counts."""
    prepare(work)
    chains = [Chain(work, index, numbers) for index in range(2)]
    with ThreadPoolExecutor() as executor:
        list(executor.map(lambda chain: chain.run(count // 2 + (chain.index < count % 2)), chains))
    trials = [record for chain in chains for record in chain.of_kind("signal")]
    ends = [record for chain in chains for record in chain.of_kind("end")]
    wrong = [text for record in trials + ends for text in record["wrong"]]
    lost = len(wrong)
    return {
        "tried": len(trials),
        "survived": len(trials) - lost,
        "lost": lost,
        "runs": len(ends),
        "places": dict(sorted(Counter(trial["place"] for trial in trials).items())),
        "longest_seconds_to_the_end": max(trial["seconds"] for trial in trials),
        "wrong": wrong,
    }
