"""The short form of kills and signals: planted places, one after the other in one run."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from reliability import kills


@pytest.mark.slow
def test_killed_where_it_hurts_the_run_ends_with_the_same_bits(tmp_path):
    kills.write_inputs(tmp_path, {})  # a simple recipe, which compiles faster
    with ThreadPoolExecutor() as executor:
        whole = executor.submit(kills.start, tmp_path, "whole")
        for place, occurrence, delay in (
            ("between", 1, 0.0),  # only the first validation is sure to be the best so far
            ("writing last", 2, 0.001),
            ("validation", 1, 0.001),
            ("step", 4, 0.001),
        ):
            ended, marks, _ = kills.start(tmp_path, "run", int(signal.SIGKILL), place, occurrence, delay)
            assert ended.returncode == -signal.SIGKILL, (place, ended.stderr)
            assert place in [name for _, name in marks]
        ended, _, _ = kills.start(tmp_path, "run")
        assert ended.returncode == 0, ended.stderr
        assert whole.result()[0].returncode == 0
    assert kills.differences(tmp_path, "run") == []
