"""Who watches a run: a heartbeat in each rank's log, and the stacks of all threads where a step takes too long."""

import threading
import time

from skipvit.log import RunLog

HEARTBEAT_SECONDS = 60.0
WHILE_COMPILING = 3.0  # so many times as long is allowed to what compiles a graph


class Watch:
    """A thread that looks how long ago something was done, while the context lasts. It ends nothing.

    Args:
        log: of this rank.
        stall_seconds: without a step until the stacks are written to the log; 0 leaves that out.
    """

    def __init__(self, log: RunLog, stall_seconds: float):
        self.log, self.stall_seconds = log, stall_seconds
        self.stalled = False
        self.closed = threading.Event()
        self.what, self.at, self.allowed = "the start", time.monotonic(), WHILE_COMPILING * stall_seconds

    def __enter__(self) -> "Watch":
        self.at = time.monotonic()
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.thread.join()  # a thread that is still ending while the interpreter does can crash the process

    def done(self, what: str, next_compiles: bool = False) -> None:
        """``what`` has just been done, such as ``step 12``; ``next_compiles``: what follows has a graph to compile."""
        seconds = time.monotonic() - self.at if self.stalled else 0.0
        self.what, self.at = what, time.monotonic()
        self.allowed = self.stall_seconds * (WHILE_COMPILING if next_compiles else 1.0)
        if self.stalled:
            self.stalled = False
            self._tell(f"it goes on, after {seconds:.0f} s: {what} is done")

    def _tell(self, message: str) -> None:
        """On the terminal too, where this rank has it."""
        if self.log.folder is not None:
            self.log.say(message)
        else:
            self.log.note(message)

    def _run(self) -> None:
        told = time.monotonic()
        while not self.closed.wait(min(HEARTBEAT_SECONDS, self.stall_seconds or HEARTBEAT_SECONDS) / 4):
            now = time.monotonic()
            if now - told >= HEARTBEAT_SECONDS:
                told = now
                self.log.note(f"alive; {self.what} was done {now - self.at:.0f} s ago")
            if self.stall_seconds and not self.stalled and now - self.at > self.allowed:
                self.stalled = True
                self._tell(
                    f"warning: nothing since {self.what}, {now - self.at:.0f} s ago (train.stall_seconds); the stacks "
                    "of all threads are in the log; the run waits on"
                )
                self.log.stacks()
