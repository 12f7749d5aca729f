"""What a command says and how it ends: exit codes, one line, the log, metrics without duplicates, progress."""

import errno
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time

import pytest
import runs
from PIL import Image

from skipvit import log
from skipvit.config import UserError


@pytest.fixture(autouse=True)
def _no_run_yet(monkeypatch):
    monkeypatch.setattr(log, "_log_file", None)


def raising(error):
    def main(argv):
        raise error

    return main


# ---------------------------------------------------------------------------------------------- how it ends


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (143, 143)])
def test_the_exit_code_is_what_main_returns(returned, code, capsys):
    seen = []

    def main(argv):
        seen.append(argv)
        return returned

    assert log.run_command(main, ["a", "b"]) == code
    assert seen == [["a", "b"]]
    assert capsys.readouterr() == ("", "")


def test_a_mistake_is_one_line_and_2(capsys):
    assert log.run_command(raising(UserError("a key\nover\r\n  lines\x0b\u2028and more"))) == 2
    assert capsys.readouterr() == ("", "error: a key over lines and more\n")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENAMETOOLONG])
def test_a_path_that_cannot_be_used_is_one_line_and_2(number, capsys):
    error = OSError(number, os.strerror(number), "some\nwhere")
    assert log.run_command(raising(error)) == 2
    assert capsys.readouterr().err == f"error: some where: {os.strerror(number)}; give a path that can be used\n"


def test_a_failed_run_is_one_line_and_1(capsys):
    assert log.run_command(raising(log.RunFailed("the loss\nis nan"))) == 1
    assert capsys.readouterr() == ("", "error: the loss is nan\n")


@pytest.mark.parametrize("error", [UserError("no such key"), log.RunFailed("the loss is nan")])
def test_the_traceback_goes_to_the_log_of_a_run_that_had_begun(error, tmp_path, capsys):
    log.RunLog(tmp_path)
    log.run_command(raising(error))
    written = (tmp_path / "train.log").read_text()
    assert "Traceback" in written
    assert str(error) in written
    assert "Traceback" not in "".join(capsys.readouterr())


def test_pillows_warning_of_a_vast_image_stands_in_no_commands_way(recwarn):
    """It is refused with a reason anyway."""

    def main(argv):
        with Image.open(io.BytesIO(b"P1 9500 9500 ")) as image:
            assert image.size == (9500, 9500)

    assert log.run_command(main) == 0
    assert not recwarn.list


def test_a_bug_is_not_hidden_and_is_in_the_log_too(tmp_path):
    log.RunLog(tmp_path)
    with pytest.raises(ZeroDivisionError):
        log.run_command(raising(ZeroDivisionError("of ours")))
    assert "ZeroDivisionError: of ours" in (tmp_path / "train.log").read_text()


def test_ctrl_c_is_no_error(capsys):
    assert log.run_command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")


# Stands in for MindSpore until the signal is there, then for the real one.
SLOW_IMPORT = """
import signal, sys, time
from pathlib import Path

here = Path(__file__).parent
(here / "importing").touch()
while not signal.sigpending():
    time.sleep(0.01)
sys.path.remove(str(here))
del sys.modules["mindspore"]
import mindspore
"""


def test_ctrl_c_while_a_command_imports_what_it_needs_is_no_error(tmp_path):
    (tmp_path / "mindspore.py").write_text(SLOW_IMPORT)
    process = subprocess.Popen(
        runs.command("predict"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=runs.environment(PYTHONPATH=f"{tmp_path}:{runs.ROOT / 'src'}"),
        text=True,
    )
    deadline = time.monotonic() + 60
    try:
        while not (tmp_path / "importing").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 130
    finally:
        process.kill()


def test_no_log_is_written_where_no_run_had_begun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log.run_command(raising(UserError("no such key")))
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_does_not_hide_the_mistake(tmp_path, capsys):
    log.RunLog(tmp_path)
    (tmp_path / "train.log").mkdir()  # stands in for a full disk
    assert log.run_command(raising(UserError("no such key"))) == 2
    assert capsys.readouterr().err == "error: no such key\n"


def test_a_reader_that_has_gone_is_no_error():
    """As with ``| head -1``: the writer ends quietly."""
    program = (
        "import sys\nfrom skipvit.log import run_command\n"
        "def main(argv):\n    for _ in range(100000): print('many lines')\n"
        "sys.exit(run_command(main))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=runs.environment()
    )
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert (process.wait(timeout=60), stderr) == (1, b"")


# --------------------------------------------------------------------------------------------------- the log


def test_what_is_said_is_on_the_terminal_and_in_the_log_with_its_time(tmp_path, capsys):
    talk = log.RunLog(tmp_path)
    talk.say("first")
    talk.say("second: ü 鸟")
    assert capsys.readouterr().out == "first\nsecond: ü 鸟\n"
    lines = (tmp_path / "train.log").read_text(encoding="utf-8").splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines] == ["first", "second: ü 鸟"]
    assert all(line.startswith("2") for line in lines)


@pytest.mark.parametrize(
    ("message", "encoding", "shown"),
    [
        # Linux names are bytes; Python shows those that are not UTF-8 as lone surrogates, which no encoding takes.
        ("caf\udce9.png", "utf-8", "caf\\udce9.png"),
        ("鸟.png", "latin-1", "\\u9e1f.png"),
        ("鸟.png", "utf-8", "鸟.png"),
    ],
)
def test_a_name_that_the_terminal_cannot_show_is_told_all_the_same(message, encoding, shown, tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert log.run_command(lambda argv: log.RunLog(tmp_path).say(message)) == 0
    assert terminal.buffer.getvalue().decode(encoding) == shown + "\n"
    logged = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert logged.endswith(message.encode("utf-8", "backslashreplace").decode() + "\n")


def test_other_ranks_say_and_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    talk = log.RunLog(None)
    talk.say("unheard")
    talk.metrics({"step": 1})
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- the metrics


def test_metrics_are_a_line_each(tmp_path):
    talk = log.RunLog(tmp_path)
    for step in (1, 2):
        talk.metrics({"step": step, "loss": 0.5})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.5}\n'


def test_metrics_that_will_come_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 8)))
    log.RunLog(tmp_path, step=5)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    log.RunLog(tmp_path)
    assert path.read_text() == ""


def events_of(folder):
    """What TensorBoard would read, by its format: records of length, checksum, protobuf, checksum."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def scalars_of(folder):
    return [
        (event.step, value.tag, pytest.approx(value.simple_value))
        for event in events_of(folder)
        for value in event.summary.value
    ]


def test_tensorboard_has_the_metrics(tmp_path):
    pytest.importorskip("tensorboardX")
    talk = log.RunLog(tmp_path, tensorboard=True)
    talk.metrics({"step": 3, "epoch": 1, "loss": 0.5})
    talk.metrics({"step": 4, "epoch": 1.0, "top1": 25.0})
    talk.events.flush()
    assert scalars_of(tmp_path / "tensorboard") == [(3, "training/loss", 0.5), (4, "validation/top1", 25.0)]
    assert next(events_of(tmp_path / "tensorboard")).file_version == "brain.Event:2"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_what_a_resumed_run_takes_again_tensorboard_hides(tmp_path):
    """From the step of a session's START event on, TensorBoard leaves out what files before it have."""
    pytest.importorskip("tensorboardX")
    log.RunLog(tmp_path, step=5, tensorboard=True).events.flush()
    starts = [event.step for event in events_of(tmp_path / "tensorboard") if event.HasField("session_log")]
    assert starts == [6]


def test_other_ranks_write_no_events(tmp_path, monkeypatch):
    for name in ("tensorboardX", "tensorboardX.event_file_writer"):
        monkeypatch.setitem(sys.modules, name, None)
    log.RunLog(None, tensorboard=True).metrics({"step": 1, "loss": 0.5})
    with pytest.raises(UserError, match=r"train\.tensorboard: .*pip install --no-deps tensorboardX"):
        log.RunLog(tmp_path, tensorboard=True)


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', "\0\0\0\0", '{"loss": 1}', "7", "[1]", '{"step": "3"}', "\xff"])
def test_the_half_line_of_a_killed_run_is_dropped(rest, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + rest.encode("latin-1"))
    log.RunLog(tmp_path, step=5).metrics({"step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}, {"step": 3}]
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]


# ---------------------------------------------------------------------------------------------- the progress


def test_progress_without_a_terminal_is_a_line_now_and_then(tmp_path, capsys):
    progress = log.Progress(log.RunLog(tmp_path), total=20, done=3, every=5)
    for step in range(4, 21):
        progress.update(step, epoch=step // 10, loss=1 / step, rate=1e-3, images_per_second=64.25)
    progress.close()
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "step 5/20 epoch 1: loss 0.2000, learning rate 1.000e-03, 64.2 images/s",
        "step 10/20 epoch 2: loss 0.1000, learning rate 1.000e-03, 64.2 images/s",
        "step 15/20 epoch 2: loss 0.0667, learning rate 1.000e-03, 64.2 images/s",
        "step 20/20 epoch 3: loss 0.0500, learning rate 1.000e-03, 64.2 images/s",
    ]


def test_progress_in_sinks_that_do_not_hit_the_interval(tmp_path, capsys):
    progress = log.Progress(log.RunLog(tmp_path), total=28, done=0, every=10)
    for step in range(7, 29, 7):
        progress.update(step, epoch=0, loss=1.0, rate=1e-3, images_per_second=1.0)
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines()] == ["step 14", "step 21"]


def test_progress_on_a_terminal_is_a_bar(tmp_path, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = log.Progress(log.RunLog(tmp_path), total=20, done=10, every=1)
    progress.bar.mininterval = 0
    progress.bar.start_t -= 8
    progress.update(14, epoch=1, loss=0.25, rate=1e-3, images_per_second=64.0)
    progress.bar.refresh()
    progress.close()
    shown = terminal.getvalue().replace("\n", "\r").split("\r")[-2]
    for part in ("epoch 2", "14/20", "loss 0.250", "lr 1.00e-03", "64 images/s"):
        assert part in shown
    assert re.search(r"00:0[89]<00:1\d", shown), "4 steps took 8 seconds, 6 are left"
    assert capsys.readouterr().out == "", "no lines besides the bar"


def test_progress_of_other_ranks_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = log.Progress(log.RunLog(None), total=2, done=0, every=1)
    progress.update(1, epoch=0, loss=1.0, rate=1e-3, images_per_second=1.0)
    progress.close()
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ the commit


def test_the_commit_is_that_of_the_source(tmp_path, monkeypatch):
    def git(*arguments):
        return subprocess.run(
            ["git", "-c", "user.name=x", "-c", "user.email=x@y", "-C", str(tmp_path), *arguments],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    monkeypatch.setattr(log, "__file__", str(tmp_path / "log.py"))
    assert log.git_commit() is None, "no repository"
    git("init", "--quiet")
    (tmp_path / "log.py").write_text("1")
    git("add", "log.py")
    git("commit", "--quiet", "--message", "one")
    git("tag", "v1")
    assert log.git_commit() == git("rev-parse", "HEAD")
    (tmp_path / "log.py").write_text("2")
    assert log.git_commit() == git("rev-parse", "HEAD") + "-dirty"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert log.git_commit() is None


# ------------------------------------------------------------------------------------------- MindSpore's own


def test_mindspore_is_silent_where_a_command_tells_it_itself():
    """Also where it was imported first, by somebody's own script, and took its own level."""
    code = """
import mindspore
from skipvit import runtime
mindspore.log.critical("heard")
with runtime._without_log():
    mindspore.log.critical("unheard")
mindspore.log.critical("heard again")
"""
    ended = subprocess.run([sys.executable, "-c", code], env=runs.environment(), capture_output=True, text=True)
    assert [line.split("] ")[-1] for line in ended.stderr.splitlines()] == ["heard", "heard again"]
