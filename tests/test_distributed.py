"""Training over two ranks for real: run_distribute_train.sh on this machine's CPU, from the table to the checkpoint.

Every path has a space in it. A stand-in for the ranks' Python runs the real training and lets something befall a rank
at a given step, so that nothing here depends on how fast the machine is. A start of two ranks is mostly waiting, so the
jobs that the selected tests ask for are all begun when the first test is, and run beside each other.
"""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import runs
from mindspore import Parameter, Tensor

from skipvit import checkpoint, clutter, config, data, evaluate, launch, log, runtime, train
from skipvit.config import UserError
from skipvit.runtime import Process
from skipvit.step import Sums

DOOR = "run_distribute_train.sh"
# Seconds until a test gives up, on a machine that is busy with other things; on MindSpore 2.0.0 ranks meet anew, in a
# minute each time, where its scheduler lost one.
PATIENCE = 600
CLASSES = tuple(f"bird {number}" for number in range(7))
TRAIN_IMAGES, VAL_IMAGES = 53, 37  # no multiples of the global batch
GLOBAL_BATCH, EPOCHS, STEPS_AN_EPOCH = 16, 4, 3
STEPS = EPOCHS * STEPS_AN_EPOCH
SEEDS = [["train.seed=11"], ["train.seed=97"]]  # of rank 0 and of rank 1

# The real training, with an order: `overrides` of each rank's own; `kill`: [rank, step] at which it is killed, as by
# the system when memory runs out; `hold`: where rank 0 waits for a signal, after a step or at "start" or "validation";
# `overflow`: the step in which rank 1 overflows; `pause`: [rank, step] at which it stands still for a while; `crash`:
# the rank that crashes while its process ends.
RANK = """
import atexit, json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
from mindspore import Tensor, ops

from skipvit import checkpoint, train
from skipvit.log import run_command

rank, record, order = int(os.environ["RANK_ID"]), Path(os.environ["RECORD"]), json.loads(os.environ["ORDER"])


def before(name, owner=train.Trainer):
    def wrap(action):
        original = getattr(owner, name)

        def both(self, *arguments):
            action(self, *arguments)
            return original(self, *arguments)

        setattr(owner, name, both)

    return wrap


def hold(trainer, place):
    if rank == 0 and order.get("hold") == place:
        (record / "held").touch()
        while trainer.stop.received is None:
            time.sleep(0.01)


@before("run")
def start(self):
    hold(self, "start")


@before("note_sink")
def step(self, *_):
    if order.get("kill") == [rank, self.step_count]:
        print("the last that was heard of it", file=sys.stderr, flush=True)
        (record / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    hold(self, self.step_count)


@before("note_sink")
def overflow(self, *_):
    # Rank 1 alone overflows in the forward pass of one step: a matrix is beyond float16 then.
    weight = next(weight for weight in self.step.weights if weight.name.endswith("patch_embed.proj.weight"))
    if rank == 1 and order.get("overflow") == self.step_count + 1:
        self.sound = weight.asnumpy().copy()
        ops.assign(weight, Tensor(self.sound + 1e6))
    if rank == 1 and order.get("overflow") == self.step_count:
        assert (weight.asnumpy() == self.sound + np.float32(1e6)).all()
        ops.assign(weight, Tensor(self.sound))


@before("note_sink")
def pause(self, *_):
    if order.get("pause") == [rank, self.step_count]:
        subprocess.Popen(["sh", "-c", f"sleep 8; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)


@before("stop_if_asked")
def validation(self):
    hold(self, "validation")


@before("save", owner=checkpoint)
def save(path, *_):
    with open(record / f"writes of {rank}", "a") as file:
        print(path, file=file)


def run(self, original=train.Trainer.run):
    code = original(self)
    state = {parameter.name: parameter.asnumpy() for parameter in self.step.get_parameters()}
    np.savez(record / f"rank {rank}.npz", step=self.step_count, **state)
    return code


train.Trainer.run = run
if order.get("crash") == rank:
    atexit.register(os.kill, os.getpid(), signal.SIGSEGV)
overrides = order["overrides"][rank] if "overrides" in order else []
sys.exit(run_command(train.main, sys.argv[3:] + overrides))
"""
# Runs everything but the ranks as it is: the door's look at its packages, the launcher, the scheduler.
STAND_IN = """#!/bin/sh
[ "$1 $2" = "-m skipvit.train" ] || exec "{python}" "$@"
exec "{python}" "{program}" "$@"
"""


class Job:
    """The door's processes, all with a tag in their environment.

    Args:
        folder: where it is called from.
        *overrides: of the recipe.
        ranks: whose table.
        send: a signal for when rank 0 is held.
        stop_grace: the setting, to wait less for a rank that hangs.
        **order: to the stand-in; without one the ranks run the training itself.
    """

    def __init__(self, folder, *overrides, ranks=2, send=None, stop_grace="30", **order):
        self.folder, self.overrides, self.ranks, self.send, self.order = folder, overrides, ranks, send, order
        self.stop_grace = stop_grace
        self.tag = str(uuid.uuid4())
        self.record = self.folder / "record" / self.tag
        self.record.mkdir(parents=True)
        variables = {"DEVICE_TARGET": "CPU", "STOP_GRACE": self.stop_grace, "RECORD": str(self.record), "TAG": self.tag}
        variables |= {"PYTHON": sys.executable}
        if self.order:
            variables |= {"PYTHON": str(self.folder / "stand in"), "ORDER": json.dumps(self.order)}
        self.process = subprocess.Popen(
            ["bash", runs.ROOT / DOOR, f"{self.ranks} ranks.json", "the recipe.yaml", *self.overrides],
            cwd=self.folder,
            env=runs.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self):
        """The finished process, what each rank held then, and how long it took after one was killed or signalled.

        Nobody may be left then.
        """
        try:
            if self.send is not None:
                deadline = time.monotonic() + PATIENCE
                while not (self.record / "held").exists() and self.process.poll() is None:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
                self.process.send_signal(self.send)
            sent_at = time.time()  # where there was one to send
            out, err = self.process.communicate(timeout=PATIENCE)
            ended_at = time.time()
            assert not self.left()
        finally:
            self.process.kill()
            for process in self.left():
                process.kill()
        killed = self.record / "killed"
        states = [dict(np.load(path)) for path in sorted(self.record.glob("rank *.npz"))]
        return SimpleNamespace(
            code=self.process.returncode,
            out=out,
            err=err,
            record=self.record,
            states=states,
            seconds_after_kill=ended_at - killed.stat().st_mtime if killed.exists() else None,
            seconds_after_signal=ended_at - sent_at,
        )

    def left(self):
        """Processes of this job that still run."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TAG") == self.tag and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found


def closing(ended):
    """The JSON of the last line of standard output, which is the only one."""
    assert ended.code == 0, ended.err
    assert "was ended by" not in ended.err or launch.numbers_ranks_by_registration(), "only 2.0.0 crashes as it ends"
    lines = [line for line in ended.out.splitlines() if line.startswith("{")]
    assert lines == ended.out.splitlines()[-1:]
    return json.loads(lines[0])


def contents_but_logs(folder):
    return {name: text for name, text in runs.contents(folder).items() if not name.startswith("logs")}


def step_lines(folder):
    """The metrics of steps; the others are of validations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "top1" in line]


def assert_close(first, second):
    """All state of two checkpoints of the same training on different numbers of ranks, up to rounding.

    A float32 sum over the images of a batch, taken in another order, differs by some 1e-7 of its largest term. Adam
    then divides a gradient by its own size, so one that is nearly nothing would be all rounding, and move its weight by
    as much as any other. The recipe's epsilon prevents that: a gradient far below 1e-3 moves its weight in proportion.
    What is left is rounding that grows through 12 steps: 1e-6 of an array's largest value was measured here. Sums in
    place of means, or clipping before the mean, were tried too: 0.4 and more.
    """
    ours, theirs = checkpoint.load(first).arrays, checkpoint.load(second).arrays
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        largest = np.abs(theirs[name]).max()
        np.testing.assert_allclose(array, theirs[name], rtol=0, atol=5e-5 * largest, err_msg=name)


class Lab:
    """A folder with images, recipe, rank tables and the stand-in, and the jobs that are run in it."""

    def __init__(self, folder):
        self.folder = folder
        runs.write_images(folder / "some images/train", TRAIN_IMAGES, CLASSES)
        runs.write_images(folder / "some images/val", VAL_IMAGES, CLASSES, seed=1)
        runs.write_recipe(
            folder / "the recipe.yaml",
            data={"train": "some images/train", "val": "some images/val", "max_unreadable_share": 0.1},
            # The gradients' norms are 1.2 to 2.6, so some are clipped and some are not: where all are, a sum in place
            # of a mean changes nothing.
            optim={"clip_norm": 1.7, "epsilon": 1e-3},
        )
        # Rank 1 is the first to meet it: in its share of the first step.
        images = data.ImageFolder(folder / "some images/train")
        order = data.keyed_generator(data.ORDER, 11, 0).permutation(len(images))
        images.path(order[GLOBAL_BATCH - 1]).write_bytes(b"no image")
        shutil.copytree(folder / "some images/val", folder / "damaged val")
        self.left_out = data.ImageFolder(folder / "damaged val").path(GLOBAL_BATCH // 2)  # rank 1's first
        self.left_out.write_bytes(b"no image")
        for ranks in (1, 2):
            devices = [{"device_id": str(rank), "rank_id": str(rank)} for rank in range(ranks)]
            server = {"server_id": "node_0", "host_nic_ip": "reserve", "device": devices}
            table = {"version": "1.0", "server_count": "1", "server_list": [server], "status": "completed"}
            (folder / f"{ranks} ranks.json").write_text(json.dumps(table))
        (folder / "a program.py").write_text(RANK)
        stand_in = folder / "stand in"
        stand_in.write_text(STAND_IN.format(python=sys.executable, program=folder / "a program.py"))
        stand_in.chmod(0o755)
        self.executor = ThreadPoolExecutor()
        self.futures = {}

    def result(self, name):
        """What a scenario returned, when it has."""
        return self.futures[name].result()

    def job(self, output, *overrides, ranks=2, **order):
        """The recipe with the seed of the whole run, resumed where it can be."""
        overrides = (f"train.output={output}", f"data.batch_size={GLOBAL_BATCH // ranks}", "train.seed=11", *overrides)
        return Job(self.folder, *overrides, ranks=ranks, **order).finish()

    def step(self, output):
        """Where its last checkpoint is."""
        return checkpoint.load(self.folder / output / "last.ckpt").meta["step"]


SCENARIOS = {}


def scenario(work):
    """A fixture that runs ``work`` once, beside the others."""
    SCENARIOS[work.__name__] = work

    def result(jobs):
        return jobs.result(work.__name__)

    return pytest.fixture(scope="module", name=work.__name__)(result)


@pytest.fixture(scope="module")
def jobs(request, tmp_path_factory):
    made = Lab(tmp_path_factory.mktemp("a lab"))
    wanted = {name for item in request.session.items if item.fspath == request.fspath for name in item.fixturenames}
    for name in SCENARIOS:
        if name in wanted:
            made.futures[name] = made.executor.submit(SCENARIOS[name], made)
    yield made
    made.executor.shutdown(wait=True)


@pytest.fixture
def lab(jobs):
    return jobs.folder


@scenario
def broken(jobs):
    """One run with two breaks, one of them in the middle of an epoch; and what one rank makes of what was left then."""
    terminated = jobs.job("broken", hold=2, send=signal.SIGTERM), jobs.step("broken")
    killed = jobs.job("broken", "train.resume=auto", kill=[1, 5], stop_grace="3"), jobs.step("broken")
    shutil.copytree(jobs.folder / "broken", jobs.folder / "alone")
    alone = jobs.executor.submit(jobs.job, "alone", "train.resume=auto", ranks=1)
    end = jobs.job("broken", "train.resume=auto", overrides=[[], []])
    return SimpleNamespace(terminated=terminated, killed=killed, end=end, alone=alone.result())


@scenario
def one_rank(jobs):
    """All the images of a step on one rank."""
    ended = runs.run(
        *("train", "the recipe.yaml", "train.seed=11", f"data.batch_size={GLOBAL_BATCH}", "train.output=one rank"),
        cwd=jobs.folder,
        DEVICE_TARGET="CPU",
    )
    assert ended.returncode == 0, ended.stderr


@scenario
def whole(jobs):
    """Two ranks with seeds of their own."""
    overrides = (f"data.global_batch_size={GLOBAL_BATCH}", "train.output=two ranks")
    ended = Job(jobs.folder, *overrides, overrides=SEEDS).finish()
    assert ended.code == 0, ended.err
    return ended


@scenario
def odd_rank(jobs):
    """Rank 1 overflows in step 5, stands still for 8 seconds after step 8, cannot read an image to validate on, and
    crashes as it ends."""
    overrides = ("train.precision=fp16", "train.stall_seconds=2", "data.val=damaged val")
    return jobs.job("odd rank", *overrides, overflow=5, pause=[1, 8], crash=1)


@scenario
def interrupted(jobs):
    """Ctrl-C in the middle of the first validation."""
    return jobs.job("interrupted", hold="validation", send=signal.SIGINT), jobs.step("interrupted")


@scenario
def too_early(jobs):
    """SIGTERM before the first step."""
    return jobs.job("too early", hold="start", send=signal.SIGTERM)


@scenario
def refused(jobs):
    """Bad input that only the ranks can see, while other jobs run; and whether it changed the folder of a run."""
    indivisible = Job(jobs.folder, "data.global_batch_size=15", "train.output=none")
    jobs.result("whole")
    before = contents_but_logs(jobs.folder / "two ranks")
    repeated = jobs.job("two ranks")
    after = contents_but_logs(jobs.folder / "two ranks")
    messages = {
        "data.global_batch_size: 15 does not divide among 2 ranks": indivisible.finish(),
        "train.output: two ranks already holds a run; train.resume=auto goes on with it": repeated,
    }
    return messages, before == after


@scenario
def readme(jobs):
    """The README's commands, word for word, in a clone with a space in its path; on less data, with a smaller model."""
    clone = jobs.folder / "a clone"
    clone.mkdir()
    for name in ("run_distribute_train.sh", "run_setup.sh", "configs", "src"):
        (clone / name).symlink_to(runs.ROOT / name)
    images = clutter.ensure(clutter.ClutterConfig(train_images_per_class=13, val_images_per_class=2), clone)
    small = ["data.batch_size=32", "model.embed_dim=12", "model.depth=3", "skip.start=1", "skip.end=2"]
    small += [f"data.{key}={shlex.quote(str(images / key))}" for key in ("train", "val", "masks")]
    small[-1] += "/val"
    commands, shown = re.search(
        r"```bash\n(cat >rank_table.json.*?)\n```\n\n```text\n(.*?)```",
        runs.ROOT.joinpath("README.md").read_text(),
        re.S,
    ).groups()
    ended = subprocess.run(
        ["bash", "-c", " ".join([commands, *small])],
        cwd=clone,
        env=runs.environment(PYTHON=sys.executable),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return ended, shown


# --------------------------------------------------------------------------------------- two ranks are one training


@pytest.mark.slow
def test_the_readme_shows_what_its_command_prints(readme):
    ended, shown = readme
    assert ended.returncode == 0, ended.stderr
    for line, pattern in zip([*ended.stderr.splitlines(), *ended.stdout.splitlines()], shown.splitlines()):
        assert without_numbers(line) == without_numbers(pattern)
    assert len(ended.stdout.splitlines()) + 1 == len(shown.splitlines())


def without_numbers(line):
    return re.sub(r"MindSpore [0-9.]+|[0-9][0-9.,]*", "#", line)


def test_two_ranks_train_as_one_with_twice_the_images(whole, one_rank, lab):
    assert_close(lab / "two ranks/last.ckpt", lab / "one rank/last.ckpt")
    ours, theirs = (step_lines(lab / folder)[0] for folder in ("two ranks", "one rank"))
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=2e-5)


def test_ranks_with_seeds_of_their_own_have_equal_weights(whole, lab):
    """Rank 0's seed holds, as the comparison with one rank of that seed shows."""
    first, second = whole.states
    names = [name for name in first if name != "state.loss_sum"]
    assert len(names) > 50
    for name in names:
        assert first[name].tobytes() == second[name].tobytes(), name
    assert "seed: 11" in (lab / "two ranks/config.yaml").read_text()


def test_validation_counts_each_image_once(whole, lab, capsys, monkeypatch):
    monkeypatch.chdir(lab)
    evaluate.main(["two ranks/last.ckpt", "--data", "some images/val", "--batch-size", "5"])
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert alone["images"] == VAL_IMAGES
    assert 0 < alone["top1"] < alone["top5"]
    validations = step_lines(lab / "two ranks")[1]
    assert len(validations) == EPOCHS
    for key in ("top1", "top5", "images"):
        assert validations[-1][key] == alone[key]
    assert closing(whole)["top1"] == alone["top1"]


def test_rank_0_alone_writes_and_speaks(whole, lab):
    result, folder = closing(whole), lab / "two ranks"
    assert (result["steps"], result["epochs"], result["checkpoint"]) == (STEPS, EPOCHS, "two ranks/last.ckpt")
    steps, _ = step_lines(folder)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert (whole.record / "writes of 0").read_text().count(".fresh.ckpt") == EPOCHS
    assert not (whole.record / "writes of 1").exists()
    files = {"best.ckpt", "config.yaml", "last.ckpt", "metrics.jsonl", "previous.ckpt", "run.json", "train.log", "logs"}
    files |= {"curves.png", "tokens.png", ".lock"}
    assert {path.name for path in folder.iterdir()} == files
    assert "top1" not in (folder / "logs/rank_1.log").read_text()
    meta = checkpoint.load(folder / "last.ckpt").meta
    assert (meta["global_batch"], meta["ranks"], meta["step"]) == (GLOBAL_BATCH, 2, STEPS)


def test_the_log_says_what_depends_on_the_ranks(whole, lab):
    log = (lab / "two ranks/train.log").read_text()
    assert "3 steps an epoch of 2 x 8 images" in log
    assert "learning rate at most 0.003, not scaled by the 16 images an update; repeated augmentation off" in log
    assert log.count("warning: cannot be read, the next image took its place: some images/train/bird") == 1


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_skipped_on_all(odd_rank, lab):
    assert odd_rank.code == 0, odd_rank.err
    training = {line["step"]: line for line in step_lines(lab / "odd rank")[0]}
    assert sorted(training) == list(range(1, STEPS + 1))
    assert training[5]["overflows"] == 1
    assert training[5]["loss"] == pytest.approx(training[4]["loss"], rel=1), "rank 0's alone, and a number"
    assert training[5]["loss_scale"] == training[4]["loss_scale"] / 2
    first, second = odd_rank.states
    for name, value in first.items():
        if name not in ("state.loss_sum", "state.steps"):
            np.testing.assert_array_equal(value, second[name], err_msg=name)
    assert first["optimizer.updates"] == STEPS - sum(line["overflows"] for line in training.values())


@pytest.mark.slow
def test_a_rank_that_crashes_when_it_is_done_has_not_failed(odd_rank, jobs):
    assert odd_rank.code == 0, odd_rank.err
    assert jobs.step("odd rank") == STEPS
    assert "rank 1 (server node_0, device 1) was ended by SIGSEGV when it was done" in odd_rank.err
    assert log.DONE not in odd_rank.err


@pytest.mark.slow
def test_a_rank_that_stands_still_is_reported_by_the_one_that_waits_for_it(odd_rank, lab):
    """Which hangs in an all-reduce then: its stack is in its log, and the run goes on when the other does."""
    written = (lab / "odd rank" / "train.log").read_text()
    warned = written.index("warning: nothing since step 8, ")
    stacks = written[warned : written.index("it goes on, after ", warned)]
    assert "Current thread" in stacks
    assert "in train_phase" in stacks


@pytest.mark.slow
def test_an_image_that_another_rank_left_out_of_the_validation_is_named_once(odd_rank, jobs, lab):
    log = (lab / "odd rank/train.log").read_text()
    assert log.count(f"left out of the validation, cannot be read: {jobs.left_out.relative_to(lab)}\n") == 1
    for line in step_lines(lab / "odd rank")[1]:
        assert (line["images"], line["unreadable"]) == (VAL_IMAGES - 1, 1)


# ------------------------------------------------------------------------------------------------ broken and resumed


@pytest.mark.slow
def test_sigterm_to_the_script_ends_every_rank_after_the_same_step(broken):
    assert_stopped(*broken.terminated, signal.SIGTERM, at=2)


@pytest.mark.slow
def test_ctrl_c_breaks_a_validation_off(interrupted, lab):
    assert_stopped(*interrupted, signal.SIGINT, at=STEPS_AN_EPOCH)
    assert step_lines(lab / "interrupted")[1] == []


def assert_stopped(ended, step, number, at):
    assert ended.code == 128 + number, ended.err
    assert step == at
    assert [int(state["step"]) for state in ended.states] == [at, at]
    name = number.name
    assert ended.out.splitlines()[-1] == f"stopped by {name} after step {at}; resume with train.resume=auto"
    assert f"{name}: the ranks have 30 seconds to end" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_a_signal_before_the_first_step_ends_every_rank_unsaved(too_early, lab):
    assert too_early.code == 128 + signal.SIGTERM, too_early.err
    assert not list((lab / "too early").glob("*.ckpt"))
    assert too_early.seconds_after_signal < 10
    assert "Traceback" not in too_early.err


@pytest.mark.slow
def test_a_killed_rank_brings_the_other_down(broken):
    ended, step = broken.killed
    assert ended.code == 128 + signal.SIGKILL
    assert step == STEPS_AN_EPOCH, "the last end of an epoch"
    assert ended.seconds_after_kill < 60
    *_, verdict = ended.err.splitlines()
    assert "the last lines of broken/logs/rank_1.log:" in ended.err
    assert "    the last that was heard of it" in ended.err
    assert verdict.endswith("rank 1 (server node_0, device 1) was ended by SIGKILL; every other rank was stopped")


@pytest.mark.slow
def test_a_broken_run_ends_as_the_unbroken_one(broken, whole, jobs, lab):
    assert closing(broken.end)["steps"] == jobs.step("broken") == STEPS
    assert runs.differing(lab / "broken/last.ckpt", lab / "two ranks/last.ckpt") == []
    assert [line["step"] for line in step_lines(lab / "broken")[0]] == list(range(1, STEPS + 1))
    log = (lab / "broken/train.log").read_text()
    assert [f"going on from broken/last.ckpt, step {at}/{STEPS}\n" in log for at in (2, 3)] == [True] * 2


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(broken, whole, lab):
    assert closing(broken.alone)["steps"] == STEPS
    assert f"step 3/{STEPS}, with 1 rank; the run had 2" in broken.alone.out
    assert_close(lab / "alone/last.ckpt", lab / "two ranks/last.ckpt")
    assert checkpoint.load(lab / "alone/last.ckpt").meta["ranks"] == 1


@pytest.mark.slow
def test_bad_input_is_one_line_and_changes_nothing(refused):
    messages, left_as_it_was = refused
    for message, ended in messages.items():
        assert (ended.code, ended.out) == (2, ""), ended.err
        said, error = ended.err.splitlines()
        assert said.startswith("run_distribute_train: ranks 0, 1 of 2 on CPU")
        assert error.startswith(f"error: {message}")
    assert left_as_it_was


# ----------------------------------------------------------------------------- what a moment decides, without processes


@pytest.fixture
def trainer():
    """As much of a trainer on the first of two ranks as the tests below need."""
    trainer = object.__new__(train.Trainer)
    trainer.process = Process(rank=0, ranks=2)
    trainer.config = config.from_dict({**runs.RECIPE, "train": {"output": "run"}})
    trainer.folder, trainer.global_batch, trainer.steps_per_epoch, trainer.step_count = None, 8, 3, 1
    trainer.stop = SimpleNamespace(received=None, agreed=None, NUMBERS=train.StopSignal.NUMBERS)
    return trainer


def note_sink(trainer):
    trainer.step = SimpleNamespace(read_sums=lambda: Sums(1.0, 1, 0, 0), scales=False)
    trainer.log = SimpleNamespace(metrics=lambda record: None)
    clock = SimpleNamespace(images_per_second=lambda: 1.0)
    return trainer.note_sink(None, SimpleNamespace(update=lambda *_: None), clock)


def test_a_signal_that_came_too_late_for_this_step_waits_for_the_next(trainer, monkeypatch):
    """It arrives while the ranks agree that there is none: ending now, this rank would leave the other waiting."""

    def sum_over_ranks(values, ranks):
        trainer.stop.received = signal.SIGTERM
        return ranks * values

    monkeypatch.setattr(runtime, "sum_over_ranks", sum_over_ranks)
    assert not note_sink(trainer)
    assert note_sink(trainer)
    assert trainer.stop.agreed == signal.SIGTERM


def test_a_signal_that_another_rank_received_ends_this_one_alike(trainer, monkeypatch):
    def other_got_ctrl_c(values, ranks):
        return ranks * values + [0, 0, 1, 0]

    monkeypatch.setattr(runtime, "sum_over_ranks", other_got_ctrl_c)
    assert note_sink(trainer)
    assert trainer.stop.agreed == signal.SIGINT
    assert trainer.stop.received is None, "its own, when it comes, is the first and not the second"


def test_an_unfinished_accumulation_is_shared_before_it_is_written(trainer, monkeypatch):
    mine, others = np.array([1.0, 2.0, 3.0], np.float32), np.array([3.0, 6.0, -3.0], np.float32)
    monkeypatch.setattr(runtime, "sum_over_ranks", lambda values, ranks: values.astype(np.float64) + others)
    for waiting, expected in ((0, mine), (1, (mine + others) / 2)):
        total = Parameter(Tensor(mine), name="accumulated")
        trainer.step = SimpleNamespace(waiting=Tensor(waiting), accumulated=[total])
        trainer.share_accumulated()
        np.testing.assert_array_equal(total.asnumpy(), expected)


@pytest.mark.parametrize(
    ("differs", "message"),
    [
        (0, "train.output: run has step 0 here and step 3 where rank 0 runs; all servers must see the same folder"),
        (1, "data.train: the recipe here, or the images in some images or other images, are not those of rank 0"),
        (None, None),
    ],
)
def test_ranks_that_would_not_train_the_same_are_refused(trainer, monkeypatch, differs, message):
    trainer.folder, calls = "run", iter(range(2))
    images, others = (SimpleNamespace(fingerprint=lambda: "48", root=f"{which} images") for which in ("some", "other"))
    trainer.folders = SimpleNamespace(train=images, val=others)
    monkeypatch.setattr(runtime, "from_rank_0", lambda number, process: number + 3 * (next(calls) == differs))
    if message is None:
        trainer.check_same_start(None)
        return
    with pytest.raises(UserError) as caught:
        trainer.check_same_start(None)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_some_rank_knows_all_know(monkeypatch, ranks):
    known = [np.array(numbers, np.int64) for numbers in ([4], [], [0, 4], [6])][:ranks]
    whole = sorted({int(number) for numbers in known for number in numbers})
    replies = iter([np.array([sum(map(len, known))]), np.bincount(np.concatenate(known), minlength=7)])
    monkeypatch.setattr(runtime, "sum_over_ranks", lambda values, ranks: next(replies))
    assert runtime.union_over_ranks(known[0], 7, ranks).tolist() == whole


def test_a_global_batch_that_does_not_divide_is_refused_before_ranks_talk():
    recipe = config.from_dict(runs.RECIPE)
    recipe = recipe.replace(data=dataclasses.replace(recipe.data, global_batch_size=10))
    folders = SimpleNamespace(train=SimpleNamespace(classes=CLASSES))
    with pytest.raises(UserError, match=r"data\.global_batch_size: 10 does not divide among 4 ranks"):
        train.resolve(recipe, folders, Process(0, 4))
    assert train.resolve(recipe, folders, Process(0, 1)).data.batch_size == 10
    assert os.environ.get("MS_ROLE") is None
