"""What tests of several files begin with."""

import pytest


@pytest.fixture(scope="module")
def graph_mode():
    """Before any operator runs: MindSpore's device and mode cannot be chosen after."""
    from skipvit import runtime  # MindSpore takes seconds to import, and not every test needs it

    runtime.start()
