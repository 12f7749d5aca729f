"""Long runs: memory, file descriptors and threads stay as they are, and the logs grow by so much a step."""

import json
import subprocess
import sys

import runs

COUNT = 20  # epochs
STEPS_AN_EPOCH = 100
SETTLED = 2  # epochs until everything is in memory
LARGEST_GROWTH = 0.01  # of the memory
BYTES_A_STEP = 300  # of metrics and log

PROGRAM = """
import json, os, sys
from pathlib import Path
import psutil
from skipvit import train
from skipvit.log import run_command

def save(self, *arguments, original=train.Trainer.save):
    original(self, *arguments)
    process, folder = psutil.Process(), self.folder
    with open("measured.jsonl", "a") as file:
        print(json.dumps({
            "step": self.step_count,
            "memory": process.memory_info().rss,
            "descriptors": process.num_fds(),
            "threads": process.num_threads(),
            "logs": sum((folder / name).stat().st_size for name in ("train.log", "metrics.jsonl")),
        }), file=file)

train.Trainer.save = save
sys.exit(run_command(train.main, sys.argv[1:]))
"""


def measure(work, epochs, steps_an_epoch=STEPS_AN_EPOCH):
    """What a run's process takes at the end of each epoch: a list of mappings."""
    runs.write_images(work / "train", 4 * steps_an_epoch)
    runs.write_images(work / "val", 8, seed=1)
    runs.write_recipe(work / "recipe.yaml", train={"epochs": epochs})
    (work / "measured.jsonl").unlink(missing_ok=True)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, "recipe.yaml", "train.output=run", "train.resume=auto"],
        cwd=work,
        env=runs.environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in (work / "measured.jsonl").read_text().splitlines()]


def growth(measured, settled=SETTLED):
    """Of what is measured, from the ``settled``-th epoch to the last: a share of the memory, counts, bytes a step."""
    first, last = measured[settled - 1], measured[-1]
    return {
        "memory": round(last["memory"] / first["memory"] - 1, 5),
        "descriptors": last["descriptors"] - first["descriptors"],
        "threads": last["threads"] - first["threads"],
        "log_bytes_a_step": round((last["logs"] - first["logs"]) / (last["step"] - first["step"]), 1),
    }


def judge(grown, largest_growth=LARGEST_GROWTH):
    """Names of what grows."""
    limits = {"memory": largest_growth, "descriptors": 0, "threads": 0, "log_bytes_a_step": BYTES_A_STEP}
    return [name for name, limit in limits.items() if grown[name] > limit]


def run(work, count):
    """One run of ``count`` epochs."""
    measured = measure(work, count)
    grown = growth(measured)
    lost = judge(grown)
    return {
        "tried": len(grown),
        "survived": len(grown) - len(lost),
        "lost": len(lost),
        "steps": measured[-1]["step"],
        "epochs": count,
        "memory_bytes": measured[-1]["memory"],
        "growth": grown,
    }
