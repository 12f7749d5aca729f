"""Train a model: checkpoint, validate, resume.

The run's folder (train.output) gets last.ckpt, previous.ckpt, best.ckpt, config.yaml, run.json, train.log,
metrics.jsonl, and pictures: curves.png and, where tokens skip, tokens.png. Ctrl-C or SIGTERM ends the run with
last.ckpt written; train.resume=auto goes on from it.

The last line is JSON: top1 (percent), epochs, steps, images_per_second (over all ranks), checkpoint.

Example:
  python -m skipvit.train configs/cifar10/skipvit.yaml data.train=cifar10/train data.val=cifar10/test
  python -m skipvit.train configs/clutter/skipvit.yaml train.epochs=2 train.output=runs/short
"""

import dataclasses
import json
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np
from mindspore import Tensor, ops

from skipvit import checkpoint, draw, runtime
from skipvit.config import Config, UserError, describe_keys, load
from skipvit.data import (
    Folders,
    TrainBatches,
    UnreadableCount,
    drop_path_factors,
    dropout_seeds,
    resolve_folders,
    steps_per_epoch,
    to_dataset,
)
from skipvit.evaluate import Result, evaluate, summary
from skipvit.inference import Classify, views
from skipvit.log import Parser, Progress, RunFailed, RunLog, git_commit, read_metrics, run_command
from skipvit.model import VisionTransformer
from skipvit.optim import learning_rate
from skipvit.step import TrainStep

PICTURED = 8  # validation images in a run's picture of tokens


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; see ``--help``."""
    keys = f"keys, their defaults and what they are:\n{describe_keys()}"
    parser = Parser(prog="python -m skipvit.train", description=__doc__, epilog=keys)
    parser.add_argument("config", metavar="CONFIG", help="a recipe, such as configs/clutter/skipvit.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override any key, such as train.epochs=10")
    arguments = parser.parse_args(argv)

    config = load(arguments.config, arguments.overrides)
    stop = StopSignal()
    process = runtime.start(config.train.jit_level)
    folders = resolve_folders(config)
    config = resolve(config, folders, process)
    return Trainer(config, folders, process, stop).run()


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


class StopSignal:
    """SIGTERM and Ctrl-C, taken note of: the run ends after the sink that is running, having written ``last``.

    ``received`` is this process's own, ``agreed`` what all ranks end for (see `Trainer.ending`).
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C first, for it may have come to another rank as SIGTERM

    def __init__(self) -> None:
        self.received: Optional[int] = None
        self.agreed: Optional[int] = None
        for number in self.NUMBERS:
            # While a graph runs MindSpore 2.10 has a handler of its own for Ctrl-C, which makes SIGTERM of it.
            signal.signal(number, self._note)
        os.register_at_fork(after_in_child=_leave_signals_to_the_parent)

    def _note(self, number: int, _: Any) -> None:
        if self.received is not None:  # asked twice: at once
            sys.exit(128 + number)
        self.received = number


def _leave_signals_to_the_parent() -> None:
    """For the data set's worker processes: a signal to the group is the trainer's, and it ends them by SIGTERM."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Trainer:
    """One run, from its folder's state to its last step."""

    def __init__(self, config: Config, folders: Folders, process: runtime.Process, stop: StopSignal):
        self.config, self.folders, self.process, self.stop = config, folders, process, stop
        self.folder = Path(config.train.output)
        self.global_batch = config.data.batch_size * process.ranks
        self.steps_per_epoch = steps_per_epoch(len(folders.train), self.global_batch)
        self.total_steps = config.train.epochs * self.steps_per_epoch
        self.best_top1 = -1.0
        self.step_count = 0
        self.source: Optional[checkpoint.Checkpoint] = None  # of the initial weights, for a run that begins
        resumed, warnings = self.open_folder()
        self.check_same_start(resumed)

        net = VisionTransformer(
            config.model, config.skip, runtime.compute_dtype(config.train.precision), config.train.seed
        )
        changes: list[str] = self.take_weights(net, self.source) if self.source is not None else []
        self.step = TrainStep(net, config, process.ranks)
        if resumed is not None:
            checkpoint.restore(self.step.get_parameters(), resumed.arrays, resumed.path)
            self.step_count, self.best_top1 = resumed.meta["step"], resumed.meta["best_top1"]
        self.log = RunLog(self.folder if process.rank == 0 else None, self.step_count, config.train.tensorboard)
        self.classify, self.refresh_weights = self.evaluation_model(net)

        for warning in warnings:
            self.log.say(f"warning: {warning}")
        parameters = sum(parameter.size for parameter in net.get_parameters())
        self.log.say(
            f"{config.model.name}: {parameters:,} parameters, {config.model.num_patches} patch tokens, "
            + (", ".join(self.describe_span(span) for span in config.skip) or "no tokens skip")
        )
        self.log.say(
            f"{len(folders.train)} training and {len(folders.val)} validation images, {len(folders.train.classes)} "
            f"classes; {self.steps_per_epoch} steps an epoch of {process.ranks} x {config.data.batch_size} images; "
            f"MindSpore {runtime.versions()['mindspore']} on {runtime.versions()['device']}, {config.train.precision}"
        )
        self.log.say(self.describe_schedule())
        for change in changes:
            self.log.say(change)
        if resumed is not None:
            before, now = resumed.meta.get("ranks", process.ranks), process.ranks
            other_ranks = f", with {now} rank{'s' * (now > 1)}; the run had {before}" if now != before else ""
            self.log.say(f"going on from {resumed.path}, step {self.step_count}/{self.total_steps}{other_ranks}")

    def take_weights(self, net: VisionTransformer, source: checkpoint.Checkpoint) -> list[str]:
        """Begin with the weights of ``train.init_from``; what is to be said of it.

        Raises:
            UserError: they are of a model that differs in more than classes and image size.
        """
        names = [name for name in (parameter.name for parameter in net.get_parameters()) if name in source.arrays]
        said = [f"initial weights from {source.path}"]
        said += checkpoint.transfer(net, source.weights(names), source.path)
        for name in ("mean", "std"):
            ours, theirs = list(getattr(self.config.data, name)), list(getattr(source.config.data, name))
            if ours != theirs:
                said.append(f"warning: data.{name} is {ours} here, and those weights know {theirs}")
        return said

    def describe_span(self, span: Any) -> str:
        """A span in words."""
        N = self.config.model.num_patches
        return f"{N - span.kept_count(N)} of them skip blocks {span.start}..{span.end - 1}"

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

    def open_folder(self) -> tuple[Optional[checkpoint.Checkpoint], list[str]]:
        """Make the run's folder, or find what to go on from in it.

        Raises:
            UserError: it holds a run and ``train.resume=no``, or one of another identity, or cannot be written.
        """
        resumed, warnings = checkpoint.find(self.folder)
        if resumed is None and self.config.train.init_from is not None:
            self.source = checkpoint.load(Path(self.config.train.init_from))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"train.output: {self.folder} cannot be made ({error.strerror}); choose another") from None
        if resumed is None:
            if self.process.rank == 0:
                self.write_description()
            return None, warnings
        if self.config.train.resume == "no":
            raise UserError(
                f"train.output: {self.folder} already holds a run; train.resume=auto goes on with it, "
                "or choose another folder"
            )
        self.check_identity(resumed)
        if self.process.rank == 0:
            self.write_description()
        return resumed, warnings

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
        images = self.folders.train
        digest = zlib.crc32(json.dumps([self.config.identity(), self.global_batch, images.fingerprint()]).encode())
        if digest != runtime.from_rank_0(digest, self.process):
            raise UserError(
                f"data.train: the recipe here, or the images in {images.root}, are not those of rank 0; "
                "give every server the same"
            )

    def check_identity(self, resumed: checkpoint.Checkpoint) -> None:
        """Refuse to go on with a run that another configuration or other data began."""
        theirs, ours = resumed.config.identity(), self.config.identity()
        for key in sorted(set(theirs) | set(ours)):
            if theirs.get(key) != ours.get(key):
                raise UserError(
                    f"{key}: {ours.get(key)!r} here, but the run in {self.folder} has {theirs.get(key)!r}; "
                    "give the same to go on with it, or choose another train.output"
                )
        facts = {"global batch": self.global_batch, "training images": self.folders.train.fingerprint()}
        saved = {
            "global batch": resumed.meta.get("global_batch"),
            "training images": resumed.meta.get("training_images"),
        }
        for name, value in facts.items():
            if saved[name] != value:
                raise UserError(
                    f"{name}: {value} here, but the run in {self.folder} has {saved[name]}; "
                    "give the same to go on with it, or choose another train.output"
                )

    def write_description(self) -> None:
        """The resolved configuration, and what it runs on."""
        try:
            (self.folder / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
            about = {**runtime.versions(), "git_commit": git_commit(), "ranks": self.process.ranks}
            (self.folder / "run.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"train.output: {self.folder} cannot be written ({error.strerror}); choose another"
            ) from None

    def evaluation_model(self, net: VisionTransformer) -> tuple[Classify, Callable[[], None]]:
        """What is validated, and what brings its weights up to date: with EMA a second model with the averages."""
        config = self.config
        if not config.optim.ema_decay:
            return Classify(net, config), lambda: None
        averaged = VisionTransformer(config.model, config.skip, runtime.compute_dtype(config.train.precision))

        average_of = {average.name: average for average in self.step.optimizer.averages}

        def refresh() -> None:
            for parameter in averaged.get_parameters():
                # In place: the graph that evaluates holds on to the parameter's memory.
                ops.assign(parameter, average_of[f"ema.{parameter.name}"])

        return Classify(averaged, config), refresh

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
        if self.step_count < last_step:
            result = self.train_until(last_step, clock)
        else:
            self.log.say(f"nothing to do: the run already has {self.step_count} steps")
        ending = self.ending()
        if ending is not None:
            self.log.say(f"stopped by signal {ending} after step {self.step_count}; resume with train.resume=auto")
            return 128 + ending
        if result is None:
            result = self.validate(record=False)
        closing = {
            "top1": result.top1,
            "epochs": self.step_count / self.steps_per_epoch,
            "steps": self.step_count,
            "images_per_second": round(clock.images_per_second(), 1),
            "checkpoint": str(self.folder / checkpoint.LAST),
            "best_top1": self.best_top1,
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

    def draw_pictures(self) -> None:
        """How the run went and, where tokens skip, which ones in some validation images; a run never fails by it."""
        images, config = self.folders.val, self.config
        chosen = np.linspace(0, len(images) - 1, min(PICTURED, len(images))).round().astype(int)
        try:
            draw.write(draw.curves({str(self.folder): read_metrics(self.folder)}), self.folder / "curves.png")
            if self.classify.net.span_bounds:
                paths = [images.path(index) for index in chosen]
                # Of validation's batch size: its graph is there already.
                batch_size = min(config.data.batch_size, len(images))
                shown = views(self.classify, config, images.classes, paths, batch_size)
                rows = [draw.Row(str(path), of_image[:1]) for path, of_image in zip(paths, shown)]
                draw.write(draw.tokens(rows), self.folder / "tokens.png")
        except (UserError, OSError) as error:
            self.log.say(f"warning: no pictures: {error}")

    def train_until(self, last_step: int, clock: "Clock") -> Optional[Result]:
        """The steps up to ``last_step``, with validation and checkpoints at the epochs' ends."""
        train = self.config.train
        epoch, start = divmod(self.step_count, self.steps_per_epoch)
        source = TrainBatches(
            self.folders.train,
            self.config,
            batch_size=self.config.data.batch_size,
            epoch=epoch,
            start=start,
            epochs=train.epochs - epoch,
            rank=self.process.rank,
            ranks=self.process.ranks,
            extra_columns=self.step_columns(),
        )
        sink_steps = largest_divisor(math.gcd(self.steps_per_epoch, self.step_count, last_step), train.sink_steps or 1)
        unreadable = UnreadableCount(self.folders.train, self.config.data.max_unreadable_share)
        progress = Progress(self.log, last_step, self.step_count, train.log_every_steps)
        result = None
        trace = Trace(train.profile, self.folder / "profile", self.step_count)
        trace.before(self.step_count + sink_steps)
        clock.start()
        for _ in runtime.sinks(self.step, to_dataset(source), sink_steps):
            first = clock.sink_done(sink_steps)
            if first is not None:
                self.log.say(f"first step, compilation included: {first:.1f} s")
            self.step_count += sink_steps
            clock.pause()
            if trace.after(self.step_count):
                self.log.say(f"trace of steps {train.profile}: {trace.folder}")
            clock.start()
            stopping = self.note_sink(progress, clock)
            found = runtime.union_over_ranks(source.unreadable(), len(self.folders.train), self.process.ranks)
            for path in unreadable.update(found):
                self.log.say(f"warning: cannot be read, the next image took its place: {path}")
            at_end = self.step_count >= last_step
            if self.step_count % self.steps_per_epoch == 0 or at_end or stopping:
                clock.pause()
                epochs = self.step_count // self.steps_per_epoch
                if not stopping and (at_end or epochs % train.validate_every_epochs == 0):
                    result = self.validate()
                self.save(result)
                clock.start()
            if at_end or stopping:
                break
            trace.before(self.step_count + sink_steps)
        progress.close()
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

    def note_sink(self, progress: Progress, clock: "Clock") -> bool:
        """Look at the device once a sink, and at the other ranks; tell loss and speed.

        Returns:
            Whether to stop: some rank has received a signal. All ranks learn of it after the same step.

        Raises:
            RunFailed: the loss is not finite.
        """
        loss, overflows = self.step.read_sums()
        if self.process.ranks > 1:
            flags = [self.stop.received == number for number in self.stop.NUMBERS]
            loss_sum, *counts = runtime.sum_over_ranks(np.array([loss, *flags]), self.process.ranks)
            loss = loss_sum / self.process.ranks
            self.stop.agreed = next((number for number, count in zip(self.stop.NUMBERS, counts) if count), None)
        rate = self.rate_at(self.step_count - 1)
        if not math.isfinite(loss):
            raise RunFailed(
                f"the loss is {loss} at step {self.step_count}, learning rate {rate:.3e}; "
                f"{self.folder / checkpoint.LAST} is from before; a lower optim.learning_rate or "
                "optim.clip_norm=1 may help"
            )
        epoch = (self.step_count - 1) // self.steps_per_epoch
        speed = clock.images_per_second()
        progress.update(self.step_count, epoch, loss, rate, speed)
        self.log.metrics(
            {
                "step": self.step_count,
                "epoch": epoch + 1,
                "loss": round(loss, 6),
                "learning_rate": rate,
                "images_per_second": round(speed, 1),
                **({"overflows": overflows, "loss_scale": self.step.read_loss_scale()} if self.step.scales else {}),
            }
        )
        return self.ending() is not None

    def ending(self) -> Optional[int]:
        """The signal that the run ends for. With several ranks all must have agreed on it, or one would end alone."""
        return self.stop.received if self.process.ranks == 1 else self.stop.agreed

    def validate(self, record: bool = True) -> Result:
        """Top-1 and Top-5 on the validation images, told and returned; ``record``: and noted in the metrics."""
        self.refresh_weights()
        result = evaluate(
            self.classify,
            self.folders.val,
            self.config,
            batch_size=min(self.config.data.batch_size, len(self.folders.val)),
            classes=self.folders.train.classes,
            masks=self.folders.masks,
            rank=self.process.rank,
            ranks=self.process.ranks,
        )
        epochs = self.step_count / self.steps_per_epoch
        self.log.say(f"epoch {epochs:g}/{self.config.train.epochs}: Top-1 {result.top1:.2f}%, Top-5 {result.top5:.2f}%")
        if record:
            self.log.metrics({"step": self.step_count, "epoch": epochs, **summary(result)})
        return result

    def save(self, result: Optional[Result]) -> None:
        """Write ``best`` where the result is the best so far, then ``last``.

        In this order: killed in between, the run goes on from the ``last`` before, comes here again and finds the
        same result to be the best again.
        """
        better = result is not None and result.top1 > self.best_top1
        if result is not None and better:
            self.best_top1 = result.top1
        self.share_accumulated()
        if self.process.rank != 0:
            return
        parameters = list(self.step.get_parameters())
        meta = self.meta()
        try:
            if better:
                checkpoint.save(self.folder / checkpoint.BEST, parameters, meta)
            checkpoint.save_last(self.folder, parameters, meta)
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
        self.folder, self.running = folder, False
        self.first, self.last = (int(step) for step in steps.split("-")) if steps else (0, 0)
        self.profiler = runtime.StepTrace(folder) if self.last > done else None

    def before(self, step: int) -> None:
        """A sink that ends with ``step`` is about to begin."""
        if self.profiler is not None and not self.running and step >= self.first:
            self.profiler.start()
            self.running = True

    def after(self, step: int) -> bool:
        """A sink has ended with ``step``; whether the trace is complete now."""
        if self.profiler is None or not self.running or step < self.last:
            return False
        self.profiler.end()
        self.profiler = None
        return True


class Clock:
    """Training time without compilation, validation and checkpoints."""

    def __init__(self, global_batch: int):
        self.global_batch = global_batch
        self.compiled = False
        self.seconds, self.images = 0.0, 0
        self.started = 0.0

    def start(self) -> None:
        """From here on time is training."""
        self.started = time.perf_counter()

    def pause(self) -> None:
        """What follows is something else."""
        self.seconds += time.perf_counter() - self.started

    def sink_done(self, steps: int) -> Optional[float]:
        """A sink has ended; for the first, which compiled, its seconds, and the clock begins anew."""
        if not self.compiled:
            self.compiled = True
            first = time.perf_counter() - self.started
            self.start()
            return first
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
