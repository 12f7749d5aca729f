"""The short form: nothing grows from epoch to epoch."""

import pytest

from reliability import endurance


@pytest.mark.slow
def test_a_run_takes_no_more_the_longer_it_runs(tmp_path):
    measured = endurance.measure(tmp_path, epochs=6, steps_an_epoch=25)
    assert [item["step"] for item in measured] == [25, 50, 75, 100, 125, 150]
    assert endurance.judge(endurance.growth(measured, settled=3)) == []


def test_what_grows_is_noticed():
    sound = {"step": 100, "memory": 10**9, "descriptors": 20, "threads": 9, "logs": 10_000}
    later = {**sound, "step": 200, "logs": 20_000}
    assert endurance.judge(endurance.growth([sound, later], settled=1)) == []
    for name, value in (("memory", 1.02e9), ("descriptors", 21), ("threads", 10), ("logs", 10**6)):
        grown = endurance.growth([sound, {**later, name: value}], settled=1)
        assert len(endurance.judge(grown)) == 1
