"""The training command, which notes in the file ``MARKS`` what it is about to do, and when, a line each.

``ORDER``, where it is given: signal, place, occurrence, seconds. When that place is come to for so many times the
kernel is told to send this process the signal so much later, whatever it is doing then.
"""

import ctypes
import os
import sys
import time

from skipvit import checkpoint, runtime, train
from skipvit.log import run_command

MARKS = os.open(os.environ["MARKS"], os.O_WRONLY | os.O_CREAT)
ORDER = os.environ.get("ORDER", "0,nowhere,0,0").split(",")
left = int(ORDER[2])


class Event(ctypes.Structure):
    """struct sigevent: timer_create(2)."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("how", ctypes.c_int),
        ("rest", ctypes.c_byte * 48),
    )


def send(number, seconds):
    """Have the kernel send this process a signal after ``seconds``: a thread would have to wait for its turn."""
    library, timer, event = ctypes.CDLL("librt.so.1"), ctypes.c_void_p(), Event(signal=number)
    nanoseconds = max(1, int(seconds * 1e9))
    times = (ctypes.c_long * 4)(0, 0, nanoseconds // 10**9, nanoseconds % 10**9)
    assert library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) == 0
    assert library.timer_settime(timer, 0, ctypes.byref(times), None) == 0


def mark(name):
    """Note where it is, and set the alarm where that is the place."""
    global left
    os.write(MARKS, f"{time.monotonic()} {name}\n".encode())
    left -= name == ORDER[1]
    if left == 0 and name == ORDER[1]:
        send(int(ORDER[0]), float(ORDER[3]))


def marked(owner, name, before, after="elsewhere"):
    """``owner.name``, with a mark before and after."""
    original = getattr(owner, name)

    def both(*arguments, **options):
        mark(before(*arguments) if callable(before) else before)
        try:
            return original(*arguments, **options)
        finally:
            mark(after(*arguments) if callable(after) else after)

    setattr(owner, name, both)


def sinks(*arguments, original=runtime.sinks):
    mark("step")
    for _ in original(*arguments):
        mark("elsewhere")
        yield
        mark("step")


def writing(path, *_):
    return f"writing {'best' if path.name == checkpoint.BEST else 'last'}"


def written(path, *_):
    return "between" if path.name == checkpoint.BEST else "renaming"


runtime.sinks = sinks
marked(train.Trainer, "validate", "validation")
marked(checkpoint, "save", writing, written)
marked(checkpoint, "save_last", "elsewhere")
sys.exit(run_command(train.main, sys.argv[1:]))
