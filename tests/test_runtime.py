"""The machine: what the environment says of it is taken, or refused in one line."""

import pytest
import runs

from skipvit import runtime
from skipvit.config import UserError


@pytest.mark.parametrize(
    ("name", "text", "device"),
    [("RANK_SIZE", "two", "CPU"), ("MS_WORKER_NUM", "-1", "CPU"), ("DEVICE_ID", "0x1", "Ascend")],
)
def test_what_is_no_number_is_named(name, text, device, monkeypatch):
    monkeypatch.setenv("DEVICE_TARGET", device)
    monkeypatch.setenv(name, text)
    with pytest.raises(UserError, match=f"^{name}={text}: is no whole number"):
        runtime.start()


def test_on_a_cpu_no_device_id_is_read_and_empty_is_not_set(monkeypatch):
    for name, text in (("DEVICE_TARGET", "CPU"), ("DEVICE_ID", "none"), ("RANK_SIZE", "")):
        monkeypatch.setenv(name, text)
    assert runtime.start() == runtime.Process(rank=0, ranks=1)


def test_a_device_that_this_mindspore_has_not_is_one_line(tmp_path):
    ended = runs.run("evaluate", "x.ckpt", "--data", ".", cwd=tmp_path, DEVICE_TARGET="Ascend")
    *_, last = ended.stderr.splitlines()  # after MindSpore's own warnings of what it misses
    runs.assert_bad_input(ended.returncode, last, "DEVICE_TARGET: MindSpore cannot use Ascend here")
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
