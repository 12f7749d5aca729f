"""What tests of several files begin with."""

import pytest
from hypothesis import HealthCheck, settings

# The same examples each time, and nothing that a busy machine fails: neither an example's time nor that of making it.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def graph_mode():
    """Before any operator runs: MindSpore's device and mode cannot be chosen after."""
    from skipvit import runtime  # MindSpore takes seconds to import, and not every test needs it

    runtime.start()
