"""Train a model: checkpoint, validate, resume.

The run's folder (train.output) gets last.ckpt, previous.ckpt, best.ckpt, config.yaml, run.json, train.log,
metrics.jsonl, and pictures: curves.png and, where tokens skip, tokens.png. Ctrl-C or SIGTERM ends the run with
last.ckpt written; train.resume=auto goes on from it. Where the disk is full, a run that cannot write its checkpoint
ends with exit code 1, the one before as it was; without log, metrics or pictures it goes on, and says so.

The last line is JSON: top1 (percent), epochs, steps, images_per_second (over all ranks), checkpoint.

Example:
  python -m skipvit.train configs/cifar10/skipvit.yaml data.train=cifar10/train data.val=cifar10/test
  python -m skipvit.train configs/clutter/skipvit.yaml train.epochs=2 train.output=runs/short
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Callable, NoReturn, Optional

import numpy as np
from mindspore import Tensor, ops

from skipvit import checkpoint, draw, runtime
from skipvit.config import Config, UserError, describe_keys, from_dict, load, span_shapes
from skipvit.data import (
    Folders,
    TrainBatches,
    UnreadableCount,
    drop_path_factors,
    dropout_seeds,
    first_names,
    resolve_folders,
    steps_per_epoch,
    to_dataset,
)
from skipvit.evaluate import Result, evaluate, summary
from skipvit.inference import Classify, views
from skipvit.log import (
    DISK_ERRORS,
    DONE,
    Parser,
    Progress,
    RunFailed,
    RunLog,
    git_commit,
    read_metrics,
    run_command,
    write_whole,
)
from skipvit.model import VisionTransformer
from skipvit.optim import learning_rate
from skipvit.step import MAX_OVERFLOWS_IN_A_ROW, TrainStep
from skipvit.watch import Watch

LOCK = ".lock"  # held by rank 0 of the run that writes into the folder
PICTURED = 8  # validation images in a run's picture of tokens


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; see ``--help``."""
    keys = f"keys, their defaults and what they are:\n{describe_keys()}"
    parser = Parser(prog="python -m skipvit.train", description=__doc__, epilog=keys)
    parser.add_argument("config", metavar="CONFIG", help="a recipe, such as configs/clutter/skipvit.yaml")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="override any key, such as train.epochs=10"
    )
    arguments = parser.parse_args(argv)

    config = load(arguments.config, arguments.overrides)
    stop = StopSignal()
    process = runtime.start(config.train.jit_level)
    folders = resolve_folders(config)
    config = resolve(config, folders, process)
    trainer = Trainer(config, folders, process, stop)
    with trainer.watch:
        code = trainer.run()
    if process.ranks > 1 and code == 0:
        with contextlib.suppress(OSError):
            sys.stderr.write(DONE + "\n")  # in one piece: MindSpore's threads write there, too
    return code


def resolve(config: Config, folders: Folders, process: runtime.Process) -> Config:
    """Fill in what follows from the data and the device, so that the run's folder says all of it."""
    model, data, train = config.model, config.data, config.train
    if model.num_classes is None:
        model = dataclasses.replace(model, num_classes=len(folders.train.classes))
    if data.global_batch_size is not None:
        if data.global_batch_size % process.ranks:
            raise UserError(
                f"data.global_batch_size: {data.global_batch_size} does not divide among {process.ranks} ranks"
            )
        data = dataclasses.replace(data, batch_size=data.global_batch_size // process.ranks)
    # Order, augmentation and initial weights follow from the seed: rank 0's holds for all.
    seed = runtime.from_rank_0(train.seed, process)
    train = dataclasses.replace(train, seed=seed, precision=runtime.resolve_precision(train.precision))
    if train.sink_steps is None:
        train = dataclasses.replace(train, sink_steps=runtime.default_sink_steps())
    return config.replace(model=model, data=data, train=train)


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A validation was broken off: all ranks have agreed to stop."""


class StopSignal:
    """SIGTERM and Ctrl-C, taken note of: the run ends after the sink that is running, having written ``last``.

    A thread waits for them; they are blocked in all others (``skipvit/__init__.py`` sees to those of libraries). A
    handler would not do: Python's run only between two calls of a graph, and with its first graph MindSpore 2.10 puts
    one of its own in the place of SIGINT's, which makes SIGTERM of a Ctrl-C.

    Attributes:
        received: this process's own signal.
        agreed: the one that all ranks end for (see `Trainer.meet`).
        can_be_awaited: whether there is something to write at the end of a sink. Before the first has returned there
            is not, and a signal ends the process at once; so does a second one.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C first, for a rank of another server may have got SIGTERM

    def __init__(self) -> None:
        self.received: Optional[int] = None
        self.agreed: Optional[int] = None
        self.can_be_awaited = False
        signal.pthread_sigmask(signal.SIG_BLOCK, self.NUMBERS)
        os.register_at_fork(after_in_child=_leave_signals_to_the_parent)
        threading.Thread(target=self._wait, name="signals", daemon=True).start()

    def _wait(self) -> None:
        while True:
            number = signal.sigwait(self.NUMBERS)
            if self.received is not None or not self.can_be_awaited:
                os._exit(128 + number)
            self.received = number


def _leave_signals_to_the_parent() -> None:
    """For the data set's worker processes: a signal to the group is the trainer's, and it ends them by SIGTERM."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


class Trainer:
    """One run, from its folder's state to its last step."""

    def __init__(self, config: Config, folders: Folders, process: runtime.Process, stop: StopSignal):
        self.config, self.folders, self.process, self.stop = config, folders, process, stop
        self.final = config.of_phase(-1)
        self.folder = Path(config.train.output)
        self.global_batch = config.data.batch_size * process.ranks
        self.steps_per_epoch = steps_per_epoch(len(folders.train), self.global_batch)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.best_top1 = -1.0
        self.validated = True  # whether what was due to be validated has been, at the last checkpoint
        self.left_out: set[str] = set()  # validation images that could not be read
        self.step_count = 0
        self.lock: Optional[IO[str]] = None
        self.changes: list[str] = []  # what is to be said of the initial weights
        resumed, begun, warnings = self.open_folder()
        self.check_same_start(resumed)

        if resumed is None:
            self.phase = 0
            self.step = TrainStep(begun, config.of_phase(0), process.ranks)
        else:
            self.phase = self.phase_at(resumed.meta["step"])
            self.step = self.phase_step(resumed.arrays, self.folder)
            self.step_count, self.best_top1 = resumed.meta["step"], resumed.meta["best_top1"]
            self.validated = resumed.meta.get("validated", True)
            known = resumed.meta.get("validation_images")
            if known is not None and known != folders.val.fingerprint():
                self.best_top1 = -1.0
                warnings.append(f"{folders.val.root}: other validation images than before; the best so far begins anew")
        self.log = RunLog(self.folder if process.rank == 0 else None, self.step_count, config.train.tensorboard)
        self.watch = Watch(self.log, config.train.stall_seconds)
        self.classify, self.refresh_weights = self.evaluation_model()

        for warning in warnings:
            self.log.say(f"warning: {warning}")
        parameters = sum(parameter.size for parameter in self.classify.net.get_parameters())
        self.log.say(f"{config.model.name}: {parameters:,} parameters, {self.describe_tokens(self.final)}")
        for index in range(len(config.phases)):
            self.log.say(self.describe_phase(index))
        self.log.say(
            f"{len(folders.train)} training and {len(folders.val)} validation images, {len(folders.train.classes)} "
            f"classes; {self.steps_per_epoch} steps an epoch of {process.ranks} x {config.data.batch_size} images; "
            f"MindSpore {runtime.versions()['mindspore']} on {runtime.versions()['device']}, {config.train.precision}"
        )
        self.log.say(self.describe_schedule())
        if process.rank == 0:
            self.say_space()
        for change in self.changes:
            self.log.say(change)
        if resumed is not None:
            before, now = resumed.meta.get("ranks", process.ranks), process.ranks
            other_ranks = f", with {now} rank{'s' * (now > 1)}; the run had {before}" if now != before else ""
            self.log.say(f"going on from {resumed.path}, step {self.step_count}/{self.total_steps}{other_ranks}")

    def phase_at(self, step: int) -> int:
        """The phase that the step after ``step`` steps belongs to; the last where the run is at its end."""
        ends = self.config.phase_ends()
        return next((index for index, end in enumerate(ends) if step < end * self.steps_per_epoch), len(ends) - 1)

    def phase_step(self, arrays: Mapping[str, np.ndarray], source: Path) -> TrainStep:
        """The training step of the current phase, a graph of its own, with the whole state of ``arrays`` (from
        ``source``) bit by bit, but for a position embedding of another size.
        """
        net = self.phase_model(self.phase)
        step = TrainStep(net, self.config.of_phase(self.phase), self.process.ranks)
        checkpoint.restore(step.get_parameters(), checkpoint.fit_positions(arrays, net.num_patches), source)
        return step

    def phase_model(self, phase: int) -> VisionTransformer:
        """A phase's model, with initial weights."""
        config = self.config.of_phase(phase)
        dtype = runtime.compute_dtype(config.train.precision)
        return VisionTransformer(config.model, config.skip, dtype, config.train.seed)

    def describe_tokens(self, config: Config) -> str:
        """What becomes of a model's tokens, in words."""
        spans = []
        for span, _, live, kept in span_shapes(config.skip, config.model.num_patches):
            how = {"rejoin": f"skip blocks {span.start}..{span.end - 1}"}
            spans.append(f"{live - kept} of them " + how.get(span.skipped, f"leave before block {span.start}"))
        return f"{config.model.num_patches} patch tokens, " + (", ".join(spans) or "no tokens skip")

    def describe_phase(self, index: int) -> str:
        """When a phase is, and what is different in it, in words."""
        ends, config = self.config.phase_ends(), self.config.of_phase(index)
        first = ends[index - 1] if index else 0
        return (
            f"phase {index + 1} of {len(ends)}, epochs {first + 1} to {ends[index]}: images of "
            f"{config.model.image_size} pixels a side, {self.describe_tokens(config)}"
        )

    def initial_model(self) -> VisionTransformer:
        """The model that a run begins with: the first phase's, with the weights of ``train.init_from`` where given.

        Raises:
            UserError: those are of a model that differs in more than classes and image size.
        """
        net, path = self.phase_model(0), self.config.train.init_from
        if path is not None:
            self.changes = self.take_weights(net, checkpoint.load(Path(path)))
        return net

    def take_weights(self, net: VisionTransformer, source: checkpoint.Checkpoint) -> list[str]:
        """Give ``net`` the weights of ``train.init_from``; what is to be said of it.

        Raises:
            UserError: see `initial_model`.
        """
        names = [name for name in (parameter.name for parameter in net.get_parameters()) if name in source.arrays]
        said = [f"initial weights from {source.path}"]
        said += checkpoint.transfer(net, source.weights(names), source.path)
        for name in ("mean", "std"):
            ours, theirs = list(getattr(self.config.data, name)), list(getattr(source.config.data, name))
            if ours != theirs:
                said.append(f"warning: data.{name} is {ours} here, and those weights know {theirs}")
        return said

    def describe_schedule(self) -> str:
        """What depends on the batch over all ranks, and what an epoch shows, in words."""
        optim, repeats = self.config.optim, self.config.augment.repeats
        images = self.global_batch * optim.accumulate_steps
        if optim.reference_batch_size:
            peak = optim.learning_rate * images / optim.reference_batch_size
            scaled = (
                f"{peak:g}, {optim.learning_rate:g} scaled by {images}/{optim.reference_batch_size} images an update"
            )
        else:
            scaled = f"{optim.learning_rate:g}, not scaled by the {images} images an update"
        augmented = f"on, {repeats} times an image" if repeats > 1 else "off"
        return f"learning rate at most {scaled}; repeated augmentation {augmented}"

    def bytes_of_checkpoint(self) -> int:
        """What a checkpoint takes on the disk, but for its few kilobytes of text."""
        # All of it is float32 and int32; to ask a parameter for its bytes would fetch it from the device.
        return sum(4 * parameter.size for parameter in self.step.get_parameters())

    def say_space(self) -> None:
        """Tell the space that the run takes, and whether the disk will be full before the run is at its end."""
        kept, size = self.config.train.keep_checkpoints, self.bytes_of_checkpoint()
        needed = (kept + 2) * size
        self.log.say(
            f"disk space: up to {needed / 1e6:,.1f} MB in {self.folder}, for {kept} checkpoint{'s' * (kept > 1)} "
            f"(train.keep_checkpoints), best and one being written, of {size / 1e6:,.1f} MB each"
        )
        there = sum(path.stat().st_size for path in self.folder.glob("*.ckpt"))
        free = shutil.disk_usage(self.folder).free
        if there + free < needed:
            self.log.say(
                f"warning: only {free / 1e6:,.1f} MB are free in {self.folder}; lower train.keep_checkpoints or make "
                "room"
            )

    def open_folder(self) -> tuple[Optional[checkpoint.Checkpoint], Optional[VisionTransformer], list[str]]:
        """Make the run's folder, or find what to go on from in it; no other run has it from here on.

        Returns:
            The checkpoint to go on from, or else the model to begin with, and None for the other; warnings.

        Raises:
            UserError: another run is under way in it, it holds a run and ``train.resume=no``, or one of another
                identity, or cannot be written.
            RunFailed: the disk is full.
        """
        # A mistake in the weights to begin with is told before there is a folder.
        begun = self.initial_model() if not self.folder.is_dir() else None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"train.output: {self.folder} cannot be made ({error.strerror}); choose another") from None
        warnings = self.take_lock() if self.process.rank == 0 else []
        resumed, more = checkpoint.find(self.folder)
        warnings += more
        if resumed is None:
            if begun is None:
                begun = self.initial_model()
            if self.process.rank == 0:
                self.write_description()
            return None, begun, warnings
        if self.config.train.resume == "no":
            raise UserError(
                f"train.output: {self.folder} already holds a run; train.resume=auto goes on with it, "
                "or choose another folder"
            )
        self.check_identity(resumed)
        if self.process.rank == 0:
            self.write_description()
        return resumed, None, warnings

    def take_lock(self) -> list[str]:
        """Keep other runs out of the folder until this process ends, however it does; warnings.

        A lock of the kind that belongs to one process, so that worker processes which outlive a killed trainer hold
        none, and that NFS passes on to its server. The file itself stays and means nothing.

        Raises:
            UserError: another run holds it, or the folder cannot be written.
        """
        path = self.folder / LOCK
        try:
            self.lock = open(path, "a")  # noqa: SIM115 - open for as long as the process runs
        except OSError as error:
            raise self.unwritable(error) from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"train.output: another run is under way in {self.folder}; wait for its end, or choose another"
                ) from None
            return [
                f"{path}: this file system has no locks ({error.strerror}), so nothing keeps a second run out of the "
                "folder"
            ]
        return []

    def unwritable(self, error: OSError) -> Exception:
        """What to raise where the folder cannot be written: a full disk is no mistake of the user's."""
        message = f"train.output: {self.folder} cannot be written ({error.strerror}); choose another"
        full = error.errno in DISK_ERRORS and error.errno != errno.EROFS
        return RunFailed(f"{message}, or make room") if full else UserError(message)

    def check_same_start(self, resumed: Optional[checkpoint.Checkpoint]) -> None:
        """Refuse ranks that would not train the same, where servers share no run's folder, recipe or data.

        Raises:
            UserError: this rank differs from rank 0.
        """
        step = resumed.meta["step"] if resumed is not None else 0
        of_rank_0 = runtime.from_rank_0(step, self.process)
        if step != of_rank_0:
            raise UserError(
                f"train.output: {self.folder} has step {step} here and step {of_rank_0} where rank 0 runs; "
                "all servers must see the same folder, or a copy of it"
            )
        train, val, config = self.folders.train, self.folders.val, self.config
        # How often ranks meet follows from these too, and one that met more often would wait for ever.
        length = [config.train.max_steps, config.train.stop_after_epochs]
        looks = [config.train.validate_every_epochs, config.train.sink_steps, config.data.max_unreadable_share]
        facts = [config.identity(), self.global_batch, train.fingerprint(), val.fingerprint(), length, looks]
        digest = zlib.crc32(json.dumps(facts).encode())
        if digest != runtime.from_rank_0(digest, self.process):
            raise UserError(
                f"data.train: the recipe here, or the images in {train.root} or {val.root}, are not those of rank 0; "
                "give every server the same"
            )

    def check_identity(self, resumed: checkpoint.Checkpoint) -> None:
        """Refuse to go on with a run that another configuration or other data began."""

        def facts(config: Config, global_batch: Optional[int], training_images: Optional[str]) -> dict[str, Any]:
            return {
                "skip, number of spans": len(config.skip),
                "phases, number of them": len(config.phases),
                **config.identity(),
                "global batch": global_batch,
                "training images": training_images,
            }

        meta = resumed.meta
        ours = facts(self.config, self.global_batch, self.folders.train.fingerprint())
        theirs = facts(from_dict(meta["config"]), meta.get("global_batch"), meta.get("training_images"))
        for key, value in ours.items():
            if value != theirs[key]:
                name = key.replace("skip.0.", "skip.") if len(self.config.skip) == 1 else key
                raise UserError(
                    f"{name}: {value!r} here, but the run in {self.folder} has {theirs[key]!r}; "
                    "give the same to go on with it, or choose another train.output"
                )

    def write_description(self) -> None:
        """The resolved configuration, and what it runs on."""
        try:
            checkpoint.remove_temporaries(self.folder)
            write_whole(self.folder / "config.yaml", self.config.to_yaml())
            about = {**runtime.versions(), "git_commit": git_commit(), "ranks": self.process.ranks}
            write_whole(self.folder / "run.json", json.dumps(about, indent=1) + "\n")
        except OSError as error:
            raise self.unwritable(error) from None

    def evaluation_model(self) -> tuple[Classify, Callable[[], None]]:
        """What is validated, and what brings its weights up to date.

        That is the model as it will be when finished: with EMA or phases it is another than the one that trains.
        """
        config = self.final
        if not config.optim.ema_decay and not self.config.phases:
            return Classify(self.step.loss.net, config), lambda: None
        served = VisionTransformer(config.model, config.skip, runtime.compute_dtype(config.train.precision))

        def refresh() -> None:
            state = {parameter.name: parameter for parameter in self.step.get_parameters()}
            for parameter in served.get_parameters():
                value = state.get(f"ema.{parameter.name}", state[parameter.name])
                if value.shape != parameter.shape:
                    arrays = checkpoint.fit_positions({value.name: value.asnumpy()}, config.model.num_patches)
                    value = Tensor(arrays[value.name])
                # In place: the graph that evaluates holds on to the parameter's memory.
                ops.assign(parameter, value)

        return Classify(served, config), refresh

    def run(self) -> int:
        """Train to the end, or until a signal; the exit code."""
        train = self.config.train
        last_step = self.total_steps
        if train.stop_after_epochs is not None:
            last_step = min(last_step, train.stop_after_epochs * self.steps_per_epoch)
        if train.max_steps is not None:
            last_step = min(last_step, train.max_steps)
        result: Optional[Result] = None
        clock = Clock(self.global_batch)
        if not self.validated and self.is_validation_due(last_step):
            result = self.validate()
            self.save(result)
        if self.step_count < last_step:
            result = self.train_until(last_step, clock)
        else:
            self.log.say(f"nothing to do: the run already has {self.step_count} steps")
        if self.stop.agreed is not None:
            name = signal.Signals(self.stop.agreed).name
            self.log.say(f"stopped by {name} after step {self.step_count}; resume with train.resume=auto")
            return 128 + self.stop.agreed
        if result is None:
            result = self.validate(record=False)
        closing = {
            "top1": result.top1,
            "epochs": self.step_count / self.steps_per_epoch,
            "steps": self.step_count,
            "images_per_second": round(clock.images_per_second(), 1),
            "checkpoint": str(self.folder / checkpoint.LAST),
            "best_top1": self.best_top1,
            "first_step_seconds": [round(seconds, 1) for seconds in clock.first_steps],
        }
        if result.object_kept is not None:
            self.log.say(
                f"of the object's patches {100 * result.object_kept:.1f}% were kept; "
                f"a random choice keeps {100 * (result.random_kept or 0):.1f}%"
            )
            closing.update(object_kept=result.object_kept, random_kept=result.random_kept)
        if self.process.rank == 0:
            self.draw_pictures()
            print(json.dumps(closing), flush=True)
        return 0

    def is_validation_due(self, last_step: int) -> bool:
        """Whether the run is at a step after which it validates."""
        epochs, within = divmod(self.step_count, self.steps_per_epoch)
        of_epoch = within == 0 and epochs > 0 and epochs % self.config.train.validate_every_epochs == 0
        return of_epoch or self.step_count >= last_step

    def draw_pictures(self) -> None:
        """How the run went and, where tokens skip, which ones in some validation images; a run never fails by it."""
        images, config = self.folders.val, self.final
        chosen = np.linspace(0, len(images) - 1, min(PICTURED, len(images))).round().astype(int)
        try:
            draw.write(draw.curves({str(self.folder): read_metrics(self.folder)}), self.folder / "curves.png")
            if self.classify.net.span_bounds:
                paths = [images.path(index) for index in chosen]
                # Of validation's batch size: its graph is there already.
                batch_size = min(config.data.batch_size, len(images))
                shown = views(self.classify, config, images.classes, paths, batch_size, skip_unreadable=True)
                rows = [draw.Row(str(path), of_image[:1]) for path, of_image in zip(paths, shown) if of_image]
                if rows:
                    draw.write(draw.tokens(rows), self.folder / "tokens.png")
        except (UserError, OSError) as error:
            self.log.say(f"warning: no pictures: {error}")

    def train_until(self, last_step: int, clock: "Clock") -> Optional[Result]:
        """The steps up to ``last_step``, phase by phase; the last validation's result."""
        folders, allowed = self.folders, self.config.data.max_unreadable_share
        unreadable = UnreadableCount(folders.train, allowed, folders.train_masks)
        progress = Progress(self.log, last_step, self.step_count, self.config.train.log_every_steps)
        trace = Trace(self.config.train.profile, self.folder / "profile", self.step_count)
        result = None
        while self.step_count < last_step and self.stop.agreed is None:
            phase = self.phase_at(self.step_count)
            if phase != self.phase:
                self.phase = phase
                state = {parameter.name: parameter.asnumpy() for parameter in self.step.get_parameters()}
                self.step = self.phase_step(state, self.folder)
                self.log.say(self.describe_phase(phase))
            result = self.train_phase(last_step, clock, progress, unreadable, trace)
        progress.close()
        told = trace.end(self.step_count)
        if told is not None:
            self.log.say(told)
        return result

    def train_phase(
        self, last_step: int, clock: "Clock", progress: Progress, unreadable: UnreadableCount, trace: "Trace"
    ) -> Optional[Result]:
        """The steps to the phase's end or ``last_step``, with validation and checkpoints at the epochs' ends."""
        train = self.config.train
        epoch, start = divmod(self.step_count, self.steps_per_epoch)
        end = self.config.phase_ends()[self.phase]
        source = TrainBatches(
            self.folders.train,
            self.config.of_phase(self.phase),
            batch_size=self.config.data.batch_size,
            epoch=epoch,
            start=start,
            epochs=end - epoch,
            rank=self.process.rank,
            ranks=self.process.ranks,
            extra_columns=self.step_columns(),
            masks=self.folders.train_masks,
        )
        sink_steps = largest_divisor(math.gcd(self.steps_per_epoch, self.step_count, last_step), train.sink_steps or 1)
        result = None
        trace.before(self.step_count + sink_steps)
        self.watch.done("the preparations", next_compiles=True)
        clock.start_compiling()
        for _ in runtime.sinks(self.step, to_dataset(source), sink_steps):
            self.stop.can_be_awaited = True
            first = clock.sink_done(sink_steps)
            if first is not None:
                self.log.say(f"first step, compilation included: {first:.1f} s")
            self.step_count += sink_steps
            self.watch.done(f"step {self.step_count}")
            clock.pause()
            told = trace.after(self.step_count)
            if told is not None:
                self.log.say(told)
            clock.start()
            stopping = self.note_sink(source, progress, clock)
            found = runtime.union_over_ranks(source.unreadable(), len(self.folders.train), self.process.ranks)
            for path in unreadable.update(found):
                self.log.say(f"warning: cannot be read, the next image took its place: {path}")
            at_end = self.step_count >= last_step
            if self.step_count % self.steps_per_epoch == 0 or at_end or stopping:
                clock.pause()
                result = None
                if not stopping and self.is_validation_due(last_step):
                    try:
                        # The last one is let finish: the run has nothing to go on with.
                        result = self.validate(can_stop=not at_end)
                    except Stopped:
                        stopping = True
                    except UserError:  # of images: what was trained is not lost by that
                        self.save(None)
                        raise
                self.save(result)
                self.watch.done(f"the checkpoint of step {self.step_count}")
                clock.start()
            if at_end or stopping or self.step_count == end * self.steps_per_epoch:
                break
            trace.before(self.step_count + sink_steps)
        return result

    def step_columns(self) -> list[tuple[str, Callable[[int], np.ndarray]]]:
        """What the step takes besides images and targets, as functions of the global step."""
        config, rank, B = self.config, self.process.rank, self.config.data.batch_size
        seed = config.train.seed

        def rate(step: int) -> np.ndarray:
            return np.array([self.rate_at(step)], np.float32)

        def factors(step: int) -> np.ndarray:
            return drop_path_factors(config.model, seed=seed, step=step, rank=rank, batch_size=B)

        def seeds(step: int) -> np.ndarray:
            return dropout_seeds(config.model, seed=seed, step=step, rank=rank)

        columns: list[tuple[str, Callable[[int], np.ndarray]]] = [("learning_rate", rate)]
        if config.model.drop_path > 0:
            columns.append(("drop_path", factors))
        if config.model.dropout > 0:
            columns.append(("dropout_seeds", seeds))
        return columns

    def rate_at(self, step: int) -> float:
        """The learning rate of a global step."""
        optim = self.config.optim
        images = self.global_batch * optim.accumulate_steps
        return learning_rate(optim, step, self.steps_per_epoch, self.config.train.epochs, images)

    def meet(self, *values: float) -> list[float]:
        """The sums of all ranks' values; and all agree here whether to stop, or one would end alone."""
        flags = [self.stop.received == number for number in self.stop.NUMBERS]
        sums = runtime.sum_over_ranks(np.array([*values, *flags], np.float64), self.process.ranks).tolist()
        counts = sums[len(values) :]
        self.stop.agreed = next((number for number, count in zip(self.stop.NUMBERS, counts) if count), None)
        return sums[: len(values)]

    def stop_if_asked(self) -> None:
        """For a long validation, in which a signal need not wait for the next step: raises `Stopped`."""
        self.meet()
        if self.stop.agreed is not None:
            raise Stopped

    def note_sink(self, batches: TrainBatches, progress: Progress, clock: "Clock") -> bool:
        """Look at the device once a sink, and at the other ranks; tell loss and speed.

        Returns:
            Whether to stop: some rank has received a signal. All ranks learn of it after the same step.

        Raises:
            RunFailed: the loss is not finite, or too many steps in a row overflowed.
        """
        sums = self.step.read_sums()
        total, steps = self.meet(sums.loss, sums.steps)
        loss = total / steps if steps else None  # all steps of the sink overflowed, and were skipped
        if loss is not None and not math.isfinite(loss):
            self.fail(f"the loss is {loss}", "a lower optim.learning_rate or optim.clip_norm=1 may help", batches)
        if sums.overflows_in_a_row > MAX_OVERFLOWS_IN_A_ROW:
            self.fail(
                f"the last {sums.overflows_in_a_row} steps overflowed in fp16, more than {MAX_OVERFLOWS_IN_A_ROW} in a "
                f"row, the last at a loss scale of {self.step.read_loss_scale():g}",
                "a lower optim.learning_rate, optim.clip_norm=1 or train.precision=fp32 may help",
                batches,
            )
        rate = self.rate_at(self.step_count - 1)
        epoch = (self.step_count - 1) // self.steps_per_epoch
        speed = clock.images_per_second()
        scaling = {"overflows": sums.overflows, "loss_scale": self.step.read_loss_scale()} if self.step.scales else {}
        progress.update(self.step_count, epoch, math.nan if loss is None else loss, rate, speed)
        self.log.metrics(
            {
                "step": self.step_count,
                "epoch": epoch + 1,
                "loss": None if loss is None else round(loss, 6),
                "learning_rate": rate,
                "images_per_second": round(speed, 1),
                **scaling,
            }
        )
        return self.stop.agreed is not None

    def fail(self, what: str, advice: str, batches: TrainBatches) -> NoReturn:
        """End the run: what is wrong, where, what it saw last, what there is to go on from, and what may help."""
        samples = batches.samples(self.step_count - 1 - batches.first_step)
        names = list(dict.fromkeys(str(self.folders.train.path(sample)) for sample in samples))
        self.log.note(f"the last batch of rank {self.process.rank}: {', '.join(names)}")
        last = self.folder / checkpoint.LAST
        before = f"{last} is from before" if last.exists() else "no checkpoint was written before"
        raise RunFailed(
            f"{what} at step {self.step_count}, learning rate {self.rate_at(self.step_count - 1):.3e}; the last batch "
            f"was {first_names(names)}; {before}; {advice}"
        )

    def validate(self, record: bool = True, can_stop: bool = False) -> Result:
        """Top-1 and Top-5 on the validation images, told and returned.

        Args:
            record: note them in the metrics, too.
            can_stop: a signal need not wait for the end.

        Raises:
            Stopped: there was one.
        """
        batches = 0

        def batch_done() -> None:
            nonlocal batches
            batches += 1
            self.watch.done(f"batch {batches} of the validation after step {self.step_count}")
            if can_stop:
                self.stop_if_asked()

        self.refresh_weights()
        self.watch.done(f"step {self.step_count}", next_compiles=True)
        result = evaluate(
            self.classify,
            self.folders.val,
            self.final,
            batch_size=min(self.config.data.batch_size, len(self.folders.val)),
            classes=self.folders.train.classes,
            masks=self.folders.masks,
            rank=self.process.rank,
            ranks=self.process.ranks,
            skip_unreadable=True,
            after_each_batch=batch_done,
        )
        self.note_left_out(result)
        epochs = self.step_count / self.steps_per_epoch
        self.log.say(f"epoch {epochs:g}/{self.config.train.epochs}: Top-1 {result.top1:.2f}%, Top-5 {result.top5:.2f}%")
        if record:
            self.log.metrics({"step": self.step_count, "epoch": epochs, **summary(result)})
        return result

    def note_left_out(self, result: Result) -> None:
        """Name the validation images that could not be read, each once.

        Raises:
            UserError: they are more than ``data.max_unreadable_share``; the same on every rank.
        """
        for path in result.unreadable:
            if path not in self.left_out:
                self.log.say(f"warning: left out of the validation, cannot be read: {path}")
        self.left_out.update(result.unreadable)
        total, allowed = len(self.folders.val), self.config.data.max_unreadable_share
        if total - result.images > allowed * total:
            raise UserError(
                f"data.val: {total - result.images} of {total} images cannot be read "
                f"(data.max_unreadable_share allows {allowed:.2%}), such as {', '.join(result.unreadable[:5])}; "
                "mend or remove them"
            )

    def save(self, result: Optional[Result]) -> None:
        """Write ``best`` where the result is the best so far, then ``last``.

        In this order: killed in between, the run goes on from the ``last`` before, comes here again and finds the
        same result to be the best again. Where a signal came before there was a result, the resumed run sees to it.
        """
        self.validated = result is not None
        better = result is not None and result.top1 > self.best_top1
        if result is not None and better:
            self.best_top1 = result.top1
        self.share_accumulated()
        if self.process.rank != 0:
            return
        parameters = list(self.step.get_parameters())
        spoilt = [weight.name for weight in self.step.weights if not np.isfinite(weight.asnumpy()).all()]
        if spoilt:  # the last update did it, and no loss has shown it yet
            raise RunFailed(
                f"{spoilt[0]} is not finite after step {self.step_count}, and nothing was written; a lower "
                "optim.learning_rate or optim.clip_norm=1 may help"
            )
        meta = self.meta()
        try:
            if better:
                checkpoint.save(self.folder / checkpoint.BEST, parameters, meta)
            checkpoint.save_last(self.folder, parameters, meta, self.config.train.keep_checkpoints)
        except OSError as error:
            raise RunFailed(
                f"{error}; the checkpoint before it is as it was, train.resume=auto goes on from it"
            ) from error

    def share_accumulated(self) -> None:
        """Give each rank the mean of what all have accumulated: rank 0 writes its own, and every rank reads that."""
        if self.process.ranks > 1 and int(self.step.waiting.asnumpy()) > 0:
            for total in self.step.accumulated:
                mean = runtime.sum_over_ranks(total.asnumpy(), self.process.ranks) / self.process.ranks
                ops.assign(total, Tensor(mean, total.dtype))

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {
            "config": self.config.to_dict(),
            "classes": list(self.folders.train.classes),
            "mean": list(self.config.data.mean),
            "std": list(self.config.data.std),
            "step": self.step_count,
            "epoch": self.step_count // self.steps_per_epoch,
            "step_in_epoch": self.step_count % self.steps_per_epoch,
            "best_top1": self.best_top1,
            "validated": self.validated,
            "validation_images": self.folders.val.fingerprint(),
            "global_batch": self.global_batch,
            "ranks": self.process.ranks,
            "training_images": self.folders.train.fingerprint(),
            **runtime.versions(),
            "git_commit": git_commit(),
        }


class Trace:
    """``train.profile``: MindSpore's profiler, on in the sinks that hold the steps asked for.

    Args:
        steps: ``FIRST-LAST``, or None for no trace.
        folder: where it is written.
        done: steps already taken; a trace of none but these is not made.
    """

    def __init__(self, steps: Optional[str], folder: Path, done: int):
        self.steps, self.folder, self.running = steps, folder, False
        self.first, self.last = (int(step) for step in steps.split("-")) if steps else (0, 0)
        self.profiler = runtime.StepTrace(folder) if self.last > done else None

    def before(self, step: int) -> None:
        """A sink that ends with ``step`` is about to begin."""
        if self.profiler is not None and not self.running and step >= self.first:
            self.profiler.start()
            self.running = True

    def after(self, step: int) -> Optional[str]:
        """A sink has ended with ``step``; what to say where the trace is complete now. A run never fails by it."""
        if self.profiler is None or not self.running or step < self.last:
            return None
        return self._write(self.steps)

    def end(self, step: int) -> Optional[str]:
        """Training has ended with ``step``; what to say of a trace that is not complete."""
        if self.profiler is None:
            return None
        if not self.running:
            return f"warning: no trace of steps {self.steps}: training ended with step {step}"
        return self._write(f"{self.first}-{step}, where training ended,")

    def _write(self, steps: Optional[str]) -> str:
        profiler, self.profiler = self.profiler, None
        assert profiler is not None
        try:
            profiler.end()
        except (OSError, RuntimeError) as error:
            return f"warning: no trace of steps {steps}: {error}"
        return f"trace of steps {steps}: {self.folder}"


class Clock:
    """Training time without compilation, validation and checkpoints."""

    def __init__(self, global_batch: int):
        self.global_batch = global_batch
        self.compiling = True
        self.first_steps: list[float] = []  # seconds of each graph's first sink, which compiles it
        self.seconds, self.images = 0.0, 0
        self.started = 0.0

    def start_compiling(self) -> None:
        """From here on time is training, by a graph that its first sink will compile."""
        self.compiling = True
        self.start()

    def start(self) -> None:
        """From here on time is training."""
        self.started = time.perf_counter()

    def pause(self) -> None:
        """What follows is something else."""
        self.seconds += time.perf_counter() - self.started

    def sink_done(self, steps: int) -> Optional[float]:
        """A sink has ended; for the first of a graph, which compiled, its seconds, and the clock begins anew."""
        if self.compiling:
            self.compiling = False
            self.first_steps.append(time.perf_counter() - self.started)
            self.start()
            return self.first_steps[-1]
        self.images += steps * self.global_batch
        self.pause()
        self.start()
        return None

    def images_per_second(self) -> float:
        """Over all ranks; 0 before there is anything to tell."""
        return self.images / self.seconds if self.images else 0.0


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of ``number`` that is not above ``limit``: sinks must not cross an epoch's end."""
    return max(item for item in range(1, min(number, limit) + 1) if number % item == 0)


if __name__ == "__main__":
    sys.exit(run_command(main))
