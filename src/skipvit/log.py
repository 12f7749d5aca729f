"""What a run says: the terminal, its log file, its metrics, and how a command ends."""

import argparse
import contextlib
import errno
import faulthandler
import io
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable, NoReturn, Optional

from tqdm import tqdm

from skipvit.config import UserError

EVENTS_FLUSHED_SECONDS = 1.0
LOG, METRICS = "train.log", "metrics.jsonl"
# What a rank says on standard error at last, for the launcher: whatever becomes of its process, its work is done.
DONE = "skipvit: this rank is done"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)  # of the disk, not of the program
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)  # of what the user gave

_log_file: Optional[Path] = None


class Parser(argparse.ArgumentParser):
    """A command's arguments; wrong ones are a user's mistake like others, told in one line."""

    def __init__(self, **options: Any) -> None:
        """With the description printed as it is written: a command's docstring, its example included."""
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Options may stand anywhere between a list's items, such as images or key=value."""
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Instead of the usage."""
        raise UserError(f"{message}; {self.prog} --help tells what there is")


class RunFailed(Exception):  # noqa: N818 - it is the run that failed
    """A run that cannot go on through no fault of its input (exit 1): what happened, and what may help."""


def run_command(main: Callable[[Optional[Sequence[str]]], Any], argv: Optional[Sequence[str]] = None) -> int:
    """Run a command's ``main``; the exit code: 2 and one line on standard error for a user's mistake.

    The traceback of a mistake goes to the run's log, where a run had begun.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A file name may be no text, or none that the terminal's encoding has.
        sys.stdout.reconfigure(errors="backslashreplace")
    for message in (
        "Image size .* could be decompression bomb",  # Pillow's; we refuse those
        "Glyph .* missing from",  # matplotlib's; a box stands for it in the picture
    ):
        warnings.filterwarnings("ignore", message)
    try:
        code = main(argv)
        return 0 if code is None else code
    except (UserError, RunFailed) as error:
        _log_traceback()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except MemoryError as error:
        _log_traceback()
        reason = f" ({one_line(error)})" if str(error) else ""
        print(f"error: out of memory{reason}; give a smaller batch, smaller images or a smaller model", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; nothing is wrong here.
        _silence_output()
        return 1
    except OSError as error:
        _log_traceback()
        if error.errno in PATH_ERRORS and error.filename is not None:
            print(f"error: {one_line(error.filename)}: {error.strerror}; give a path that can be used", file=sys.stderr)
            return 2
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        _silence_output()  # it may be what is full
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        _log_traceback()
        raise


def one_line(message: Any) -> str:
    """A message that stays one line, and does nothing to a terminal, whatever a file's name in it holds."""
    folded = " ".join(str(message).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in folded)


class RunLog:
    """The messages of a run, on the terminal and in ``train.log``, and its ``metrics.jsonl``.

    None of them is worth a run: where one cannot be written (a full disk), the terminal says so once, and the run goes
    on without.

    Args:
        folder: the run's; None writes nothing (ranks other than 0).
        step: resumed from here: metrics of later steps, which will come again, are taken out.
        tensorboard: write the metrics for TensorBoard too, below ``tensorboard/``.

    Raises:
        RunFailed: those metrics cannot be taken out.
    """

    def __init__(self, folder: Optional[Path], step: int = 0, tensorboard: bool = False):
        global _log_file
        self.folder, self.events = folder, None
        self.failed: set[str] = set()
        if folder is not None:
            _log_file = folder / LOG
            try:
                _drop_metrics_after(folder, step)
            except OSError as error:
                raise RunFailed(f"{folder / METRICS}: cannot be written ({error.strerror})") from error
            if tensorboard:
                with self._going_on("tensorboard"):
                    self.events = _Events(folder / "tensorboard", step)

    def say(self, message: str) -> None:
        """One line for people."""
        if self.folder is not None:
            message = one_line(message)
            self._show(message)
            self._log(message)

    def note(self, message: str) -> None:
        """One line for this rank's own log alone: ``train.log``, or what the launcher keeps of a rank's output."""
        if self.folder is not None:
            self._log(message)
        else:
            print(f"{_now()} {message}", flush=True)

    def stacks(self) -> None:
        """What every thread of this process is doing, for this rank's own log."""
        with contextlib.ExitStack() as closing, self._going_on(LOG):
            file = sys.stdout if self.folder is None else closing.enter_context(open(self.folder / LOG, "a"))
            faulthandler.dump_traceback(file, all_threads=True)

    def metrics(self, record: dict[str, Any]) -> None:
        """One line for programs."""
        if self.folder is not None:
            with self._going_on(METRICS):
                _append(self.folder / METRICS, json.dumps(record) + "\n")
        if self.events is not None:
            part = "validation" if "top1" in record else "training"
            values = {f"{part}/{name}": value for name, value in record.items() if name not in ("step", "epoch")}
            with self._going_on("tensorboard"):
                self.events.write(values, record["step"])
            if "tensorboard" in self.failed:  # a file that ends in half a record takes no more
                self.events = None

    def _log(self, message: str) -> None:
        if self.folder is not None:
            with self._going_on(LOG):
                _append(self.folder / LOG, f"{_now()} {message}\n")

    def _show(self, message: str) -> None:
        try:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in DISK_ERRORS:  # output may go to a disk, which may be full
                raise

    @contextlib.contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        """Go on where ``name`` cannot be written, having said so once."""
        try:
            yield
        except OSError as error:
            if name not in self.failed:
                self.failed.add(name)
                self._show(
                    f"warning: {self.folder}/{name} cannot be written ({error.strerror}); the run goes on without"
                )


class Progress:
    """A bar with loss, learning rate, images/s and time left; without a terminal, a line now and then.

    Args:
        log: where the lines go.
        total: steps of the whole run.
        done: steps already taken by the run that this one goes on from.
        every: steps between two lines.
    """

    def __init__(self, log: RunLog, total: int, done: int, every: int):
        self.log, self.every, self.total = log, every, total
        terminal = log.folder is not None and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="step", disable=not terminal, dynamic_ncols=True)
        self.shown = done

    def update(self, step: int, epoch: int, loss: float, rate: float, images_per_second: float) -> None:
        """After ``step`` steps."""
        self.bar.set_description(f"epoch {epoch + 1}")
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {rate:.2e}, {images_per_second:.0f} images/s")
        self.bar.update(step - self.bar.n)
        if self.bar.disable and step // self.every > self.shown // self.every:
            self.log.say(
                f"step {step}/{self.total} epoch {epoch + 1}: loss {loss:.4f}, learning rate {rate:.3e}, "
                f"{images_per_second:.1f} images/s"
            )
        self.shown = step

    def close(self) -> None:
        """Leave the bar as it stands."""
        self.bar.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``; the half line of a run that was killed or still writes is left out."""
    records = []
    for line in (folder / METRICS).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def git_commit() -> Optional[str]:
    """The commit of the source this runs from, with ``-dirty`` behind it where it was changed; None outside git."""
    try:
        described = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


class _Events:
    """TensorBoard's files; MindSpore's own SummaryRecord writes another format.

    By the writer below tensorboardX's own, whose thread dies of a full disk in silence, after which its queue fills up
    and the next record waits for ever.

    Raises:
        UserError: tensorboardX is not installed.
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, step: int):
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog
            from tensorboardX.summary import scalar
        except ImportError:
            raise UserError(
                "train.tensorboard: needs the package tensorboardX, which is not installed; "
                "pip install --no-deps tensorboardX, or leave train.tensorboard out"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        self.event, self.scalar, self.flushed = Event, scalar, 0.0
        self.writer = EventsWriter(str(folder / "events"))
        # Events of later steps, of a run that ended after this one was saved, will not be shown.
        self.writer.write_event(
            Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
        )
        self.flush()

    def write(self, values: dict[str, Any], step: int) -> None:
        """Scalars of a step; those that are None are left out."""
        for name, value in values.items():
            if value is not None:
                event = self.event(wall_time=time.time(), step=step, summary=self.scalar(name, value))
                self.writer.write_event(event)
        if time.monotonic() > self.flushed + EVENTS_FLUSHED_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Bring what was written to the disk."""
        self.writer.flush()
        self.flushed = time.monotonic()


def _log_traceback() -> None:
    if _log_file is not None:
        with contextlib.suppress(OSError):  # a full disk: what went wrong is told all the same
            _append(_log_file, traceback.format_exc())


def _silence_output() -> None:
    """Nothing more reaches standard output, not even what still waits in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _append(path: Path, text: str) -> None:
    """Write at the file's end, all of it or nothing.

    Raises:
        OSError: it could not be written; the file is as it was.
    """
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        content = text.encode(errors="backslashreplace")
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write to for what is to be at ``path``: there it is complete, or not at all.

    Raises:
        OSError: it could not be put there; what was at ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file; see `whole`."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _drop_metrics_after(folder: Path, step: int) -> None:
    path = folder / METRICS
    if not path.exists():
        return
    kept = [record for record in read_metrics(folder) if record["step"] <= step]
    write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
