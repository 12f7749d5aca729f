"""A disk that becomes full at every moment of a run, and one that cannot be written at all.

Needs leave to mount (root, or CAP_SYS_ADMIN): each trial has a tmpfs of its own, filled but for a share of what the run
takes. The write that fails is then that of the description, the log, the metrics, a checkpoint or a picture.
"""

import json
import os
import shutil
import subprocess

import runs
import yaml

from skipvit import checkpoint

COUNT = 12
PAGE = 4096
EPOCHS = 2


def train(work, output, *overrides):
    return runs.run("train", "recipe.yaml", f"train.output={output}", "train.tensorboard=true", *overrides, cwd=work)


def size_of(folder):
    """What a folder takes on a tmpfs, which deals in pages."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*"))


def mount(folder, size):
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True, capture_output=True)


def unmount(folder):
    subprocess.run(["umount", folder], check=True, capture_output=True)


def can_mount(folder):
    """Whether this process may."""
    try:
        mount(folder, PAGE * 16)
        unmount(folder)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def half_written(folder):
    """What in a run's folder is not whole."""
    wrong = []
    for path in folder.rglob("*"):
        try:
            if path.suffix == ".ckpt":
                checkpoint.load(path)
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".yaml":
                assert isinstance(yaml.safe_load(path.read_text()), dict)
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text().splitlines()]
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
            elif path.suffix == ".log":
                assert path.read_text().endswith("\n") or path.stat().st_size == 0
            elif path.name.startswith(".") and path.name != ".lock":
                wrong.append(f"{path.name} was left")
        except Exception as error:
            wrong.append(f"{path.name}: {error!r}")
    return wrong


def trial(work, free):
    """A run on a disk with ``free`` bytes, and then with room again; what went wrong, and how it ended."""
    disk = work / "disk"
    mount(disk, 8 * size_of(work / "whole"))
    try:
        with open(disk / "filler", "wb") as filler:
            space = shutil.disk_usage(disk).free
            filler.write(bytes(max(0, space - free)))
        ended = train(work, "disk/run")
        wrong = half_written(disk / "run")
        if ended.returncode not in (0, 1):
            wrong.append(f"exit code {ended.returncode}")
        if ended.returncode and (len(ended.stderr.splitlines()) != 1 or "No space left" not in ended.stderr):
            wrong.append(f"said: {ended.stderr[-300:]}")
        if not ended.returncode and ended.stderr:
            wrong.append(f"said besides: {ended.stderr[-300:]}")
        os.unlink(disk / "filler")
        again = train(work, "disk/run", "train.resume=auto")
        if again.returncode:
            wrong.append(f"afterwards exit code {again.returncode}: {again.stderr[-300:]}")
        else:
            wrong += runs.differing(disk / "run" / "last.ckpt", work / "whole" / "last.ckpt")
        told = ended.stderr.strip() or "; ".join(line for line in ended.stdout.splitlines() if "cannot be" in line)
        return {"free": free, "code": ended.returncode, "told": told, "wrong": wrong}
    finally:
        unmount(disk)


def read_only(work):
    """Going on with a run in a folder that has become read-only."""
    disk = work / "disk"
    mount(disk, 8 * size_of(work / "whole"))
    try:
        shutil.copytree(work / "whole", disk / "run")
        before = runs.contents(disk)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        ended = train(work, "disk/run", "train.resume=auto")
        wrong = [] if ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 else [ended.stderr[-300:]]
        if runs.contents(disk) != before:
            wrong.append("something was written")
        return {"free": "read-only", "code": ended.returncode, "told": ended.stderr.strip(), "wrong": wrong}
    finally:
        unmount(disk)


def run(work, count):
    """As many disks, each with room for a larger share of the run than the one before, and one that is read-only."""
    path = work / "trials.jsonl"
    while os.path.ismount(work / "disk"):  # an interrupted call's
        unmount(work / "disk")
    if not can_mount(work / "disk"):
        raise SystemExit("disk: mounting a tmpfs is not permitted here")
    if not (work / "whole" / "last.ckpt").exists():
        runs.write_images(work / "train", 26)
        runs.write_images(work / "val", 7, seed=1)
        runs.write_recipe(work / "recipe.yaml", train={"epochs": EPOCHS})
        ended = train(work, "whole")
        assert ended.returncode == 0, ended.stderr
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    size = size_of(work / "whole")
    while len(done) < count + 1:
        done.append(trial(work, int(size * len(done) / count)) if len(done) < count else read_only(work))
        with open(path, "a") as file:
            file.write(json.dumps(done[-1]) + "\n")
        print(json.dumps(done[-1]), flush=True)
    lost = sum(bool(item["wrong"]) for item in done)
    return {
        "tried": len(done),
        "survived": len(done) - lost,
        "lost": lost,
        "ended": sum(item["code"] == 1 for item in done),
        "went_on": sum(item["code"] == 0 for item in done),
        "wrong": [text for item in done for text in item["wrong"]],
    }
