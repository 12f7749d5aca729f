"""What a run says: the terminal, its log file, its metrics, and how a command ends."""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, NoReturn, Optional

from tqdm import tqdm

from skipvit.config import UserError

METRICS = "metrics.jsonl"

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
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; nothing is wrong here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException:
        _log_traceback()
        raise


def one_line(message: Any) -> str:
    """A message with line breaks and the like folded to blanks, so that it stays one line whatever a name holds."""
    return " ".join(str(message).split())


class RunLog:
    """The messages of a run, on the terminal and in ``train.log``, and its ``metrics.jsonl``.

    Args:
        folder: the run's; None writes nothing (ranks other than 0).
        step: resumed from here: metrics of later steps, which will come again, are taken out.
        tensorboard: write the metrics for TensorBoard too, below ``tensorboard/``.
    """

    def __init__(self, folder: Optional[Path], step: int = 0, tensorboard: bool = False):
        global _log_file
        self.folder, self.events = folder, None
        if folder is not None:
            _log_file = folder / "train.log"
            _drop_metrics_after(folder, step)
            self.events = _event_writer(folder / "tensorboard", step) if tensorboard else None

    def say(self, message: str) -> None:
        """One line for people."""
        if self.folder is not None:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()
            _append(self.folder / "train.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def metrics(self, record: dict[str, Any]) -> None:
        """One line for programs."""
        if self.folder is not None:
            _append(self.folder / METRICS, json.dumps(record) + "\n")
        if self.events is not None:
            part = "validation" if "top1" in record else "training"
            for name in record.keys() - {"step", "epoch"}:
                self.events.add_scalar(f"{part}/{name}", record[name], record["step"])


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


def _event_writer(folder: Path, step: int) -> Any:
    """TensorBoard's; MindSpore's own SummaryRecord writes another format."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard: needs the package tensorboardX, which is not installed; "
            "pip install --no-deps tensorboardX, or leave train.tensorboard out"
        ) from None
    # Events of later steps, of a run that ended after this one was saved, will not be shown.
    return SummaryWriter(str(folder), purge_step=step + 1, flush_secs=1)


def _log_traceback() -> None:
    if _log_file is not None:
        with contextlib.suppress(OSError):  # a full disk: what went wrong is told all the same
            _append(_log_file, traceback.format_exc())


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def _drop_metrics_after(folder: Path, step: int) -> None:
    path = folder / METRICS
    if not path.exists():
        return
    kept = [record for record in read_metrics(folder) if record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)
