"""SIGTERM and Ctrl-C at random moments: ``last`` is written, exit 143 or 130 within 30 s, and no bit is lost."""

import signal

from reliability import kills

COUNT = 12


def run(work, count):
    """As `kills.run`."""
    return kills.run(work, count, (signal.SIGTERM, signal.SIGINT))
