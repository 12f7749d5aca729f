"""What is no number: overflows that are skipped, losses that end a run, weights that are not written."""

import json
import math
import re
import signal
import types

import numpy as np
import pytest
import runs
from mindspore import Tensor, ops

from skipvit import checkpoint, config, log, runtime, train
from skipvit.data import TrainBatches, resolve_folders, to_dataset
from skipvit.log import RunFailed, run_command

STEPS_AN_EPOCH = 6


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The command in this process, in a folder with images and a recipe: code, standard output and error."""
    runs.write_images(tmp_path / "train", 4 * STEPS_AN_EPOCH + 2)
    runs.write_images(tmp_path / "val", 7, seed=1)
    runs.write_recipe(tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log, "_log_file", None)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def run_here(*overrides):
        code = run_command(train.main, ["recipe.yaml", "train.output=run", *overrides])
        return (code, *capsys.readouterr())

    yield run_here
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def plant(monkeypatch, before, after):
    """Have ``before(step, number)`` and ``after(step, number)`` called around each training step."""

    def sinks(step, dataset, sink_steps):
        for number, row in enumerate(dataset.create_tuple_iterator(num_epochs=1), 1):
            before(step, number)
            step(*row)
            after(step, number)
            if number % sink_steps == 0:
                yield

    monkeypatch.setattr(runtime, "sinks", sinks)


def assign(parameter, value):
    ops.assign(parameter, Tensor(np.broadcast_to(value, parameter.shape).astype(np.float32)))


def weight_of(step, name="patch_embed.proj.weight"):
    return next(weight for weight in step.weights if weight.name == name)


def trainer_of(*overrides):
    """A Trainer as the command makes it, before its first step."""
    recipe = config.load("recipe.yaml", ["train.output=run", *overrides])
    process, folders = runtime.start(), resolve_folders(recipe)
    stop = types.SimpleNamespace(received=None, agreed=None)
    return train.Trainer(train.resolve(recipe, folders, process), folders, process, stop)


def training(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "learning_rate" in line}


def names_of_batch(folder, number):
    """The files of training step ``number``."""
    saved = config.load(folder / "config.yaml")
    batches = TrainBatches(resolve_folders(saved).train, saved, batch_size=saved.data.batch_size, epochs=4)
    return [str(batches.folder.path(sample)) for sample in batches.samples(number - 1)]


def test_an_overflow_is_skipped_and_many_in_a_row_end_the_run(here, tmp_path, monkeypatch):
    """In the forward pass, where it leaves no loss either: once in step 3, and from step 9 on."""
    kept = {}

    def before(step, number):
        kept["weight"] = weight_of(step).asnumpy().copy()
        if number == 3 or number >= 9:
            assign(weight_of(step), 1e6)  # beyond float16

    def after(step, number):
        if number == 3 or number >= 9:
            assert (weight_of(step).asnumpy() == 1e6).all(), "an update was made"
            assign(weight_of(step), kept["weight"])

    plant(monkeypatch, before, after)
    monkeypatch.setattr(train, "MAX_OVERFLOWS_IN_A_ROW", 4)
    code, _, error = here("train.precision=fp16")
    assert code == 1, error
    found = training(tmp_path / "run")
    assert sorted(found) == list(range(1, 13)), "the last of them, step 13, ends the run"
    for number, line in found.items():
        overflowed = number == 3 or number >= 9
        assert (line["loss"] is None) == overflowed, line
        if overflowed:
            assert line["overflows"] == 1
            assert line["loss_scale"] == found[number - 1]["loss_scale"] / 2
    (line,) = error.splitlines()
    assert "the last 5 steps overflowed in fp16, more than 4 in a row" in line
    assert "at step 13, learning rate" in line
    assert "run/last.ckpt is from before" in line
    assert "optim.clip_norm=1" in line
    for name in names_of_batch(tmp_path / "run", 13):
        assert name in line
    saved = checkpoint.load(tmp_path / "run" / "last.ckpt")
    assert saved.meta["step"] == 12
    assert all(np.isfinite(array).all() for array in saved.arrays.values())


@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_a_loss_that_is_no_number_ends_the_run_at_the_end_of_the_sink(value, here, tmp_path, monkeypatch):
    def after(step, number):
        if number == 8:
            assign(step.loss_sum, float(value))

    plant(monkeypatch, lambda *_: None, after)
    code, _, error = here("train.sink_steps=3")
    assert code == 1
    (line,) = error.splitlines()
    assert re.match(rf"error: the loss is {value} at step 9, learning rate \d\.\d+e-\d+; the last batch was ", line), (
        line
    )
    assert "run/last.ckpt is from before" in line
    names = names_of_batch(tmp_path / "run", 9)
    assert len(names) == 4
    for name in names:
        assert name in line
    assert ", ".join(names) in (tmp_path / "run" / "train.log").read_text()
    assert checkpoint.load(tmp_path / "run" / "last.ckpt").meta["step"] == STEPS_AN_EPOCH
    assert max(training(tmp_path / "run")) == STEPS_AN_EPOCH


def test_spoilt_weights_are_not_written(here, tmp_path):
    trainer = trainer_of()
    trainer.save(None)
    before = runs.contents(tmp_path / "run")
    assign(weight_of(trainer.step, "head.bias"), math.inf)
    with pytest.raises(RunFailed, match=r"head\.bias is not finite after step 0, and nothing was written"):
        trainer.save(None)
    assert runs.contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("precision", "skipped"),
    [
        ("fp16", "rejoin"),
        pytest.param("fp32", "rejoin", marks=pytest.mark.slow),
        pytest.param("fp32", "fuse", marks=pytest.mark.slow),
        pytest.param("fp16", "drop", marks=pytest.mark.slow),
    ],
)
def test_a_single_kept_token_trains(precision, skipped, here):
    trainer = trainer_of(f"train.precision={precision}", f"skip.skipped={skipped}", "skip.keep_ratio=0.001")
    assert f"{runs.PATCH_COUNT - 1} of them" in trainer.describe_tokens(trainer.config)
    batches = TrainBatches(
        trainer.folders.train, trainer.config, batch_size=4, epochs=2, extra_columns=trainer.step_columns()
    )
    sums = [trainer.step.read_sums() for _ in runtime.sinks(trainer.step, to_dataset(batches), 1)]
    assert len(sums) == 2 * STEPS_AN_EPOCH
    assert all(of_step.steps == 1 and math.isfinite(of_step.loss) for of_step in sums)
    assert sum(of_step.overflows for of_step in sums) <= 1
    assert all(np.isfinite(parameter.asnumpy()).all() for parameter in trainer.step.get_parameters())
