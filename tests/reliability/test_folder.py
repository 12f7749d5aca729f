"""A run's folder: one run at a time, no space left, nothing half-written."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import pytest
import runs

from skipvit import checkpoint, config, draw, log, runtime, train
from skipvit.config import UserError
from skipvit.data import resolve_folders
from skipvit.log import RunFailed, run_command


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a Trainer as the command does, before its first step."""
    runs.write_images(tmp_path / "train", 8)
    runs.write_images(tmp_path / "val", 4, seed=1)
    runs.write_recipe(tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log, "_log_file", None)

    def make(*overrides):
        recipe = config.load("recipe.yaml", ["train.output=run", *overrides])
        process, folders = runtime.start(), resolve_folders(recipe)
        stop = types.SimpleNamespace(received=None, agreed=None)
        return train.Trainer(train.resolve(recipe, folders, process), folders, process, stop)

    return make


# ---------------------------------------------------------------------------------------------------- the lock

HOLDER = """
import fcntl, os, sys, time
lock = open("run/.lock", "a")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
worker = os.fork()  # as a data set's worker, which outlives a killed trainer
if worker:
    print(worker, flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_has_died(made, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        for resume in ("no", "auto"):
            code = run_command(train.main, ["recipe.yaml", "train.output=run", f"train.resume={resume}"])
            runs.assert_bad_input(code, capsys.readouterr().err, "train.output: another run is under way in run")
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # still there
        made()
        assert (tmp_path / "run" / "config.yaml").exists()
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_the_run_says_so_and_goes_on(number, made, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    made()
    assert "warning: run/.lock: this file system has no locks" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- space


def test_the_space_that_a_run_needs_is_told_and_bounded(made, tmp_path, monkeypatch, capsys):
    trainer = made("train.keep_checkpoints=3")
    said = capsys.readouterr().out
    for step in range(1, 7):
        trainer.step_count = step
        trainer.save(types.SimpleNamespace(top1=float(step)))
    names = ["best.ckpt", "last.ckpt", "previous.ckpt", "previous_2.ckpt"]
    assert sorted(path.name for path in tmp_path.glob("run/*.ckpt")) == names
    steps = [checkpoint.load(tmp_path / "run" / name).meta["step"] for name in names[1:]]
    assert steps == [6, 5, 4]
    size = (tmp_path / "run" / "last.ckpt").stat().st_size
    assert trainer.bytes_of_checkpoint() <= size <= trainer.bytes_of_checkpoint() + 20_000
    assert f"disk space: up to {5 * trainer.bytes_of_checkpoint() / 1e6:,.1f} MB in run, for 3 checkpoints" in said
    assert "are free" not in said

    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))
    made("train.resume=auto", "train.keep_checkpoints=3")
    assert "warning: only 0.0 MB are free in run" in capsys.readouterr().out


def test_one_checkpoint_alone_is_kept_where_no_more_are_wanted(made, tmp_path):
    trainer = made("train.keep_checkpoints=2")
    trainer.save(None)
    trainer.save(None)
    trainer = made("train.keep_checkpoints=1", "train.resume=auto")
    trainer.step_count = 3
    trainer.save(None)
    assert [path.name for path in tmp_path.glob("run/*.ckpt")] == ["last.ckpt"]
    assert checkpoint.load(tmp_path / "run" / "last.ckpt").meta["step"] == 3


def test_what_a_killed_run_was_writing_is_removed(made, tmp_path):
    made().save(None)
    for name in ("..fresh.123.ckpt", "..fresh.123.tmp", ".best.77.ckpt", ".config.yaml.tmp"):
        (tmp_path / "run" / name).write_bytes(b"half")
    made("train.resume=auto")
    assert sorted(path.name for path in tmp_path.glob("run/.*")) == [".lock"]


def test_of_several_damaged_the_newest_whole_one_is_taken_and_all_are_named(made, tmp_path, capsys):
    trainer = made("train.keep_checkpoints=3")
    for step in (1, 2, 3):
        trainer.step_count = step
        trainer.save(None)
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / "run" / name).write_bytes((tmp_path / "run" / name).read_bytes()[:-9])
    capsys.readouterr()
    trainer = made("train.resume=auto", "train.keep_checkpoints=3")
    said = capsys.readouterr().out
    assert trainer.step_count == 1
    for part in ("run/last.ckpt: ", "run/previous.ckpt: ", "going on from run/previous_2.ckpt instead"):
        assert f"warning: {part}" in said


# --------------------------------------------------------------------------------------------------- a full disk


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_a_full_disk_at_the_start_is_one_line_and_1(name, made, tmp_path, monkeypatch):
    made()
    before = runs.contents(tmp_path / "run")
    original = log.write_whole

    def full(path, text):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, text)

    monkeypatch.setattr(train, "write_whole", full)
    with pytest.raises(RunFailed, match=r"train\.output: run cannot be written \(No space left on device\)"):
        made()
    assert runs.contents(tmp_path / "run").keys() == before.keys()


def test_a_read_only_folder_is_one_line_and_2(made, tmp_path, monkeypatch):
    original = open

    def read_only(path, mode="r", *arguments, **options):
        if str(path).endswith(train.LOCK):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return original(path, mode, *arguments, **options)

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(UserError, match=r"train\.output: run cannot be written \(Read-only file system\)"):
        made()


WRITER = """
import resource, sys
from pathlib import Path
from skipvit import log
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir()
(folder / "whole").write_text("old")
log.EVENTS_FLUSHED_SECONDS = 0
talk = log.RunLog(folder, tensorboard=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
for step in range(40):
    talk.say("a" * 30)
    talk.metrics({"step": step, "loss": 0.5})
try:
    log.write_whole(folder / "whole", "new" * limit)
except OSError as error:
    print(error.strerror)
"""


def test_log_and_metrics_end_with_a_whole_line_and_the_run_goes_on(tmp_path):
    """A limit on the size of files stands in for the disk."""
    pytest.importorskip("tensorboardX")
    command = [sys.executable, "-c", WRITER, "run", "500"]
    options = {"cwd": tmp_path, "env": runs.environment(), "encoding": "utf-8", "check": False}
    ended = subprocess.run(command, capture_output=True, **options)
    assert (ended.returncode, ended.stderr) == (0, "")
    warnings = [line for line in ended.stdout.splitlines() if line.startswith("warning: ")]
    for name in ("train.log", "metrics.jsonl", "tensorboard"):
        (line,) = [line for line in warnings if f"run/{name} cannot be written (File too large)" in line]
        assert line.endswith("the run goes on without")
    assert ended.stdout.splitlines()[-1] == "File too large"
    assert (tmp_path / "run" / "whole").read_text() == "old"
    lines = (tmp_path / "run" / "train.log").read_text().splitlines(keepends=True)
    assert len(lines) == 500 // len(lines[0])
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(len(records)))
    assert len(records) > 10
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("metrics.jsonl", "tensorboard", "train.log", "whole")
    ]

    with open("/dev/full", "w") as full:  # standard output on a full disk
        ended = subprocess.run([*command[:3], "other", "9999999"], stdout=full, stderr=subprocess.PIPE, **options)
    assert "Traceback" not in ended.stderr
    assert len((tmp_path / "other" / "train.log").read_text().splitlines()) == 40


def test_a_trace_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path):
    def no_space():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(runtime, "StepTrace", lambda _: types.SimpleNamespace(start=lambda: None, end=no_space))
    trace = train.Trace("2-3", tmp_path, 0)
    for step in (1, 2, 3, 4):
        trace.before(step)
        said = trace.after(step)
        assert (said is not None) == (step == 3)
        if said:
            assert said == "warning: no trace of steps 2-3: [Errno 28] No space left on device"


def test_a_picture_that_cannot_be_written_leaves_the_one_before(monkeypatch, tmp_path):
    def half(path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "curves.png"
    path.write_bytes(b"before")
    with pytest.raises(UserError, match=r"curves\.png: cannot be written \(No space left on device\)"):
        draw.write(types.SimpleNamespace(savefig=half), path)
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == {"curves.png": b"before"}


def test_what_a_command_cannot_print_is_one_line_and_1():
    program = "import sys; from skipvit.log import run_command; sys.exit(run_command(lambda _: print('x', flush=True)))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            env=runs.environment(),
            encoding="utf-8",
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (1, "error: [Errno 28] No space left on device\n")
