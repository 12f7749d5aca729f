"""The watch over a run: its heartbeat, and what it says of a step that takes too long."""

import contextlib
import re
import time

import pytest

from skipvit import log, watch


@pytest.fixture(autouse=True)
def _no_run_yet(monkeypatch):
    monkeypatch.setattr(log, "_log_file", None)


@pytest.fixture
def watched():
    """Makes watches, and closes them."""
    with contextlib.ExitStack() as stack:
        yield lambda talk, stall_seconds: stack.enter_context(watch.Watch(talk, stall_seconds))


def read(folder):
    return "".join(path.read_text() for path in folder.glob("*.log"))


def wait_for(text, read, seconds=20):
    deadline = time.monotonic() + seconds
    while text not in read():
        assert time.monotonic() < deadline, read()
        time.sleep(0.01)
    return read()


def test_a_stall_is_told_once_with_the_stacks_and_so_is_its_end(tmp_path, watched, capsys):
    dog = watched(log.RunLog(tmp_path), 0.2)
    dog.done("step 12")
    wait_for("in wait_for", lambda: read(tmp_path))  # this thread's stack
    time.sleep(0.5)
    dog.done("step 13")
    written = wait_for("it goes on", lambda: read(tmp_path))
    assert len(re.findall(r"warning: nothing since step 12, \d s ago \(train\.stall_seconds\)", written)) == 1
    assert written.count("Current thread") == 1, "the stacks, the watch's own among them"
    assert re.search(r"it goes on, after \d s: step 13 is done", written)
    assert "warning: nothing since step 12" in capsys.readouterr().out, "and on the terminal"


def test_steps_in_time_are_no_stall_and_a_compilation_has_more(tmp_path, watched):
    dog = watched(log.RunLog(tmp_path), 0.6)
    for step in range(10):
        dog.done(f"step {step}")
        time.sleep(0.1)
    dog.done("the preparations", next_compiles=True)
    time.sleep(1.0)
    dog.done("step 11")
    time.sleep(0.2)
    assert not (tmp_path / "train.log").exists()


def test_the_heart_beats_in_each_rank_s_log(tmp_path, watched, monkeypatch, capsys):
    monkeypatch.setattr(watch, "HEARTBEAT_SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    watched(log.RunLog(tmp_path / "run"), 0).done("step 7")
    wait_for("alive; step 7 was done 0 s ago", lambda: read(tmp_path / "run"))
    assert "alive" not in capsys.readouterr().out, "nothing for the terminal"
    watched(log.RunLog(None), 0).done("step 8")  # its output is what the launcher logs
    time.sleep(0.5)
    assert "alive; step 8 was done 0 s ago" in capsys.readouterr().out


def test_without_a_limit_nothing_is_a_stall(tmp_path, watched, monkeypatch):
    monkeypatch.setattr(watch, "HEARTBEAT_SECONDS", 0.05)
    watched(log.RunLog(tmp_path), 0)
    written = wait_for("1 s ago", lambda: read(tmp_path))
    assert "warning" not in written
