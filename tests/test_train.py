"""Training through the real command: repeatable and resumed to the bit, stopped without loss, mistakes in one line.

The runs are tiny and shared: each scenario below is a fixture that trains in processes of its own, and all those that
the selected tests ask for start when the first test does, two at a time.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import reference
import runs
from mindspore import Parameter, Tensor, ops
from PIL import Image

from skipvit import checkpoint, config, log, runtime, train
from skipvit.data import resolve_folders
from skipvit.log import RunFailed, run_command

TRAINING_IMAGES, VALIDATION_IMAGES = 26, 7
STEPS_AN_EPOCH, STEPS = 6, 24  # of 4 images; 2 images are left over
EVERYTHING = {
    "model": {"dropout": 0.1, "drop_path": 0.2},
    "augment": {
        "rand_augment_magnitude": 9,
        "erase": 0.25,
        "mixup": 0.8,
        "cutmix": 1.0,
        "mix_probability": 0.9,
        "label_smoothing": 0.1,
    },
    "optim": {"accumulate_steps": 2, "ema_decay": 0.9, "clip_norm": 1.0},
}
# Small images with random scores, then full tokens, then the finished model's.
PHASES = [{"share": 0.25, "image_size": 8}, {"share": 0.5, "keep_ratio": 1.0}, {"share": 0.25}]
SCENARIOS = {}


class Lab:
    """A folder with images and recipes; commands run in it, two at a time."""

    def __init__(self, root):
        self.root = root
        self.executor = ThreadPoolExecutor(min(2, os.cpu_count() or 1))
        self.started = {}
        runs.write_images(root / "train", TRAINING_IMAGES)
        runs.write_images(root / "val", VALIDATION_IMAGES, seed=1)
        runs.write_recipe(root / "recipe.yaml")
        runs.write_recipe(root / "everything.yaml", **EVERYTHING)
        runs.write_recipe(root / "phased.yaml", PHASES, **EVERYTHING, skip={"score": "random"})

    def start(self, name):
        self.started[name] = self.executor.submit(SCENARIOS[name], self)

    def train(self, output, *overrides, recipe="recipe.yaml", code=0):
        """Run to the end; the exit code must be ``code``."""
        ended = runs.run("train", recipe, f"train.output={output}", *overrides, cwd=self.root)
        assert ended.returncode == code, ended.stderr
        return ended

    def signalled(self, number, after, output, *overrides):
        """Run, and once ``after`` has been said send a signal to all its processes, as Ctrl-C does."""
        process = subprocess.Popen(
            runs.command("train", "recipe.yaml", f"train.output={output}", *overrides),
            cwd=self.root,
            env=runs.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,
        )
        said = next((line for line in process.stdout if after in line), "")
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, said + out, err)

    def copy(self, source, target):
        shutil.copytree(self.root / source, self.root / target)
        return self.root / target


@pytest.fixture(scope="module")
def lab(request, tmp_path_factory):
    made = Lab(tmp_path_factory.mktemp("lab"))
    wanted = {name for item in request.session.items if item.fspath == request.fspath for name in item.fixturenames}
    for name in SCENARIOS:  # in order of definition: none waits for one that starts after it
        if name in wanted:
            made.start(name)
    yield made
    made.executor.shutdown(wait=True)


def scenario(work):
    """Make of a function that trains a fixture with what it returns."""

    def result(lab):
        return lab.started[work.__name__].result()

    SCENARIOS[work.__name__] = work
    return pytest.fixture(scope="module", name=work.__name__)(result)


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    """What a command run in this process sets."""
    monkeypatch.setattr(log, "_log_file", None)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@pytest.fixture
def here(lab, monkeypatch, capsys):
    """The command in this process: code, standard output and error."""
    monkeypatch.chdir(lab.root)

    def run_here(*arguments):
        capsys.readouterr()
        code = run_command(train.main, list(arguments))
        return (code, *capsys.readouterr())

    return run_here


def trainer_of(*overrides, recipe="recipe.yaml"):
    """A Trainer as the command makes it, before its first step."""
    recipe = config.load(recipe, overrides)
    process = runtime.start()
    folders = resolve_folders(recipe)
    stop = types.SimpleNamespace(received=None, agreed=None)
    return train.Trainer(train.resolve(recipe, folders, process), folders, process, stop)


def metrics_of(folder):
    """The lines of metrics.jsonl: those of training, and those of validation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "top1" in line]


def timeless(folder):
    """The metrics, in order, without the only figure that two equal runs do not share."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def assert_same_run(ours, theirs):
    """Weights, moments, averages, counters, and all that is known of the run."""
    assert runs.differing(ours / "last.ckpt", theirs / "last.ckpt") == []
    for key in ("step", "epoch", "step_in_epoch", "best_top1", "classes", "training_images"):
        values = [checkpoint.load(folder / "last.ckpt").meta[key] for folder in (ours, theirs)]
        assert values[0] == values[1], key


# -------------------------------------------------------------------------------------------- the scenarios


@scenario
def whole(lab):
    """4 epochs in one go."""
    return lab.root / "whole", lab.train("whole")


@scenario
def stopped(lab):
    """The same, stopped after 2 epochs; its folder as it was then, and after going on."""
    lab.train("resumed", "train.stop_after_epochs=2")
    folder = lab.copy("resumed", "stopped")
    return folder, lab.root / "resumed", lab.train("resumed", "train.resume=auto")


@scenario
def everything(lab):
    """Every random and every stateful part on, in one go."""
    lab.train("everything", recipe="everything.yaml")
    return lab.root / "everything"


@scenario
def everything_parted(lab):
    """The same, stopped in the middle of an epoch and of an accumulated gradient."""
    lab.train("everything_parted", "train.max_steps=9", recipe="everything.yaml")
    folder = lab.copy("everything_parted", "everything_stopped")
    lab.train("everything_parted", "train.resume=auto", recipe="everything.yaml")
    return folder, lab.root / "everything_parted"


@scenario
def everything_by_processes(lab):
    """The same with two worker processes."""
    lab.train("everything_by_processes", "data.num_workers=2", "data.worker_processes=true", recipe="everything.yaml")
    return lab.root / "everything_by_processes"


@scenario
def phased(lab):
    """Three phases with everything on, in one go."""
    return lab.root / "phased", lab.train("phased", recipe="phased.yaml")


@scenario
def phased_parted(lab):
    """The same, stopped at the end of the first phase and within the second."""
    lab.train("phased_parted", "train.stop_after_epochs=1", recipe="phased.yaml")
    first = lab.copy("phased_parted", "phased_stopped")
    lab.train("phased_parted", "train.resume=auto", "train.max_steps=9", recipe="phased.yaml")
    lab.train("phased_parted", "train.resume=auto", "train.sink_steps=3", recipe="phased.yaml")
    return first, lab.root / "phased_parted"


@scenario
def by_mask(lab):
    """Scores from masks that are white on as many patches as are kept."""
    runs.write_images(lab.root / "masked", 8)
    for path in (lab.root / "masked").rglob("*.png"):
        mask = lab.root / "white_on_seven" / path.relative_to(lab.root / "masked")
        mask.parent.mkdir(parents=True, exist_ok=True)
        places = np.random.default_rng(int(path.stem)).permutation(runs.PATCH_COUNT) < runs.KEPT_COUNT
        Image.fromarray(np.uint8(255) * np.kron(places.reshape(4, 4), np.ones((4, 4), np.uint8))).save(mask)
    return lab.train(
        "by_mask",
        *("data.train=masked", "data.val=masked", "data.masks=white_on_seven", "data.train_masks=white_on_seven"),
        *("skip.score=mask", "skip.start=0", "train.epochs=1"),
    )


@scenario
def in_sinks(lab):
    """Three steps between two looks at the device, and two workers."""
    lab.train("in_sinks", "train.sink_steps=3", "data.num_workers=2")
    return lab.root / "in_sinks"


@scenario
def signals(lab):
    """Ctrl-C, then SIGTERM, both to worker processes too, then to the end."""
    workers = ("data.num_workers=2", "data.worker_processes=true")
    first = lab.signalled(signal.SIGINT, "first step", "signalled", *workers)
    after_first = checkpoint.load(lab.root / "signalled" / "last.ckpt").meta["step"]
    second = lab.signalled(signal.SIGTERM, "first step", "signalled", "train.resume=auto", *workers)
    after_second = checkpoint.load(lab.root / "signalled" / "last.ckpt").meta["step"]
    lab.train("signalled", "train.resume=auto")
    return lab.root / "signalled", (first, after_first), (second, after_second)


@scenario
def damaged(lab):
    """After two epochs `last` is damaged and the metrics end in half a line; every free key is another on resuming."""
    folder = lab.copy(lab.started["stopped"].result()[0], "damaged")
    content = bytearray((folder / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "last.ckpt").write_bytes(content)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    shutil.copytree(lab.root / "train", lab.root / "elsewhere" / "train")
    free = (
        "data.train=elsewhere/train",
        "data.num_workers=3",
        "data.max_unreadable_share=0.5",
        "train.log_every_steps=1",
        "train.validate_every_epochs=3",
        "train.max_steps=1000",
        "train.stop_after_epochs=9",
    )
    return folder, lab.train("damaged", "train.resume=auto", *free)


@scenario
def spoilt(lab):
    """A run whose weights are no numbers: before, and how it ended."""
    folder = lab.copy(lab.started["stopped"].result()[0], "spoilt")
    saved = checkpoint.load(folder / "last.ckpt")
    saved.arrays["head.weight"] = np.full_like(saved.arrays["head.weight"], np.nan)
    parameters = [Parameter(Tensor(value), name=name) for name, value in saved.arrays.items()]
    checkpoint.save(folder / "last.ckpt", parameters, saved.meta)
    before = runs.contents(folder)
    return folder, before, lab.train("spoilt", "train.resume=auto", code=1)


@scenario
def diverged(lab):
    """The second of two steps ruins the weights: the loss does not show it, validation does."""
    return lab.root / "diverged", lab.train("diverged", "data.batch_size=12", "optim.learning_rate=1e30", code=1)


@scenario
def profiled(lab):
    """A trace of three steps, and TensorBoard's events."""
    options = ["train.profile=3-5", "train.max_steps=7", "train.tensorboard=true"]
    return lab.root / "profiled", lab.train("profiled", *options)


@scenario
def overfitted(lab):
    """Eight images, trained and validated on; the masks say that all of each image is object."""
    runs.write_images(lab.root / "eight", 8, classes=("a", "b", "c", "d"))
    for path in (lab.root / "eight").rglob("*.png"):
        mask = lab.root / "eight_masks" / path.relative_to(lab.root / "eight")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 255).save(mask)
    return lab.train(
        "overfitted",
        *("data.train=eight", "data.val=eight", "data.masks=eight_masks", "data.batch_size=8"),
        *("augment.crop=none", "train.epochs=60", "train.validate_every_epochs=60", "optim.learning_rate=0.01"),
    )


@scenario
def half_precision(lab):
    """fp16, and two of the images cannot be read."""
    shutil.copytree(lab.root / "train", lab.root / "some_unreadable")
    broken = sorted((lab.root / "some_unreadable").rglob("*.png"))[3:5]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    names = [str(path.relative_to(lab.root)) for path in broken]
    overrides = ("data.train=some_unreadable", "data.max_unreadable_share=0.1", "train.precision=fp16")
    return lab.root / "half_precision", names, lab.train("half_precision", *overrides, "train.epochs=2")


@scenario
def unreadable(lab):
    """More images unreadable than allowed."""
    shutil.copytree(lab.root / "train", lab.root / "many_unreadable")
    for path in sorted((lab.root / "many_unreadable").rglob("*.png"))[:3]:
        path.write_bytes(b"no image")
    overrides = ("data.train=many_unreadable", "data.max_unreadable_share=0.1")
    return lab.root / "unreadable", lab.train("unreadable", *overrides, code=2)


# ------------------------------------------------------------------------------------- what a run leaves


def test_the_last_line_is_the_closing_json(whole):
    folder, ended = whole
    assert ended.stderr == ""
    closing = json.loads(ended.stdout.splitlines()[-1])
    assert list(closing)[:5] == ["top1", "epochs", "steps", "images_per_second", "checkpoint"]
    assert (closing["epochs"], closing["steps"], closing["checkpoint"]) == (4, STEPS, "whole/last.ckpt")
    assert isinstance(closing["steps"], int)
    assert closing["images_per_second"] > 0
    validations = metrics_of(folder)[1]
    assert closing["top1"] == validations[-1]["top1"]
    assert closing["best_top1"] == max(line["top1"] for line in validations)
    assert closing["top1"] in [round(100 * count / VALIDATION_IMAGES, 4) for count in range(VALIDATION_IMAGES + 1)]
    assert "object_kept" not in closing, "there are no masks"


def test_the_top1_is_told_after_each_epoch(whole):
    folder, ended = whole
    told = re.findall(r"^epoch (\d)/4: Top-1 (\d+\.\d\d)%", ended.stdout, flags=re.MULTILINE)
    assert told == [(str(line["epoch"])[0], f"{line['top1']:.2f}") for line in metrics_of(folder)[1]]
    assert len(told) == 4


def test_a_runs_folder_tells_how_it_was_made(whole):
    folder, ended = whole
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.yaml", "run.json", "metrics.jsonl", "train.log", ".lock"),
        *("last.ckpt", "previous.ckpt", "best.ckpt"),
        *("curves.png", "tokens.png"),
    }
    about = json.loads((folder / "run.json").read_text())
    assert about["mindspore"] == ms.__version__
    assert about["ranks"] == 1
    git = subprocess.run(["git", "-C", str(runs.ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if git.returncode == 0:
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", about["git_commit"])
    else:
        assert about["git_commit"] is None
    saved = checkpoint.load(folder / "last.ckpt")
    assert (saved.meta["mindspore"], saved.meta["git_commit"]) == (about["mindspore"], about["git_commit"])
    logged = (folder / "train.log").read_text()
    for line in ended.stdout.splitlines()[:-1]:
        assert line in logged


def test_a_run_leaves_its_pictures(whole):
    for name, least in (("curves.png", (1000, 600)), ("tokens.png", (1000, 600))):
        with Image.open(whole[0] / name) as picture:
            picture.load()
            assert picture.size >= least, name


def test_a_run_whose_pictures_cannot_be_drawn_ends_well(lab, whole, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(lab.root)
    assert run_command(train.main, ["recipe.yaml", "train.output=plain", "train.max_steps=1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("warning: no pictures: pictures need matplotlib")
    assert json.loads(lines[-1])["steps"] == 1
    assert not list((lab.root / "plain").glob("*.png"))


def test_the_resolved_configuration_is_kept_and_can_be_loaded_again(lab, whole):
    folder, _ = whole
    kept = config.load(folder / "config.yaml")
    assert kept == checkpoint.load(folder / "last.ckpt").config
    asked = config.load(lab.root / "recipe.yaml", ["train.output=whole"])
    resolved = {"model": {"num_classes": 2}, "train": {"precision": "fp32", "sink_steps": 1}}
    for section, values in resolved.items():
        asked = asked.replace(**{section: dataclasses.replace(getattr(asked, section), **values)})
    assert kept == asked


def test_a_checkpoint_says_where_it_stands(whole, stopped):
    saved = checkpoint.load(whole[0] / "last.ckpt")
    expected = {"step": STEPS, "epoch": 4, "step_in_epoch": 0, "classes": ["crow", "heron"], "global_batch": 4}
    assert {key: saved.meta[key] for key in expected} == expected
    assert (saved.meta["mean"], saved.meta["std"]) == (list(saved.config.data.mean), list(saved.config.data.std))
    assert checkpoint.load(whole[0] / "previous.ckpt").meta["step"] == STEPS - STEPS_AN_EPOCH
    assert checkpoint.load(stopped[0] / "last.ckpt").meta["step"] == 2 * STEPS_AN_EPOCH


def test_best_is_the_first_of_the_best_epochs(whole):
    validations = metrics_of(whole[0])[1]
    best = max(validations, key=lambda line: line["top1"])
    saved = checkpoint.load(whole[0] / "best.ckpt")
    assert (saved.meta["step"], saved.meta["best_top1"]) == (best["step"], best["top1"])


def test_every_line_of_the_metrics_is_json(lab, whole):
    training, validation = metrics_of(whole[0])
    assert len((whole[0] / "metrics.jsonl").read_text().splitlines()) == len(training) + len(validation)
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in training] == [1 + step // STEPS_AN_EPOCH for step in range(STEPS)]
    assert [line["step"] for line in validation] == [6, 12, 18, 24]
    assert all(line["images"] == VALIDATION_IMAGES for line in validation)
    assert all(set(line) == {"step", "epoch", "loss", "learning_rate", "images_per_second"} for line in training)
    assert all(0 < line["loss"] < 5 for line in training)
    optim = config.load(lab.root / "recipe.yaml").optim
    rates = [
        reference.cosine_learning_rate(
            step,
            peak=optim.learning_rate,
            total_steps=STEPS,
            warmup_steps=STEPS_AN_EPOCH,
            floor=optim.min_learning_rate,
            start=optim.warmup_learning_rate,
        )
        for step in range(STEPS)
    ]
    assert [line["learning_rate"] for line in training] == pytest.approx(rates)


@pytest.mark.slow
def test_a_trace_of_the_steps_asked_for(profiled):
    folder, ended = profiled
    assert "trace of steps 3-5: profiled/profile\n" in ended.stdout
    (table,) = folder.glob("profile/**/cpu_op_type_info_0.csv")
    header, *rows = [line.split(",") for line in table.read_text().splitlines()]
    of_adam = next(row for row in rows if row[0] == "Adam")
    weights = 2 + 2 + 2 * 12 + 2 + 2  # of the model: so many updates a step
    assert int(of_adam[header.index("type_occurrences")]) == 3 * weights
    assert any("MatMul" in path.read_text() for path in folder.glob("profile/**/*.json")), "the trace itself"
    assert [path.name.split(".")[:3] for path in (folder / "tensorboard").iterdir()] == [["events", "out", "tfevents"]]


# ------------------------------------------------------------------------------------- from other weights


def test_a_run_may_begin_with_other_weights_for_other_classes_and_images(lab, whole, monkeypatch, capsys):
    """At a learning rate of 0, what it ends with is what it began with."""
    monkeypatch.chdir(lab.root)
    for part, count in (("train", 8), ("val", 4)):
        runs.write_images(lab.root / "birds" / part, count, classes=("owl", "rook", "tit"))
    rates = [f"optim.{name}=0" for name in ("learning_rate", "warmup_learning_rate", "min_learning_rate")]
    folders = ["data.train=birds/train", "data.val=birds/val", "data.mean=[0.5,0.5,0.5]", "model.image_size=20"]
    options = [*rates, *folders, "train.init_from=whole/best.ckpt", "train.output=tuned", "train.max_steps=1"]
    assert run_command(train.main, ["recipe.yaml", *options]) == 0
    said = capsys.readouterr().out
    assert "initial weights from whole/best.ckpt\n" in said
    assert "the position embedding is resampled from 4 x 4 to 5 x 5\n" in said
    assert "the head is new, for 3 classes; whole/best.ckpt has 2\n" in said
    assert "warning: data.mean is [0.5, 0.5, 0.5] here, and those weights know [0.485, 0.456, 0.406]" in said
    before, after = checkpoint.load(whole[0] / "best.ckpt").arrays, checkpoint.load(lab.root / "tuned/last.ckpt").arrays
    assert after["head.weight"].shape == (3, 16)
    assert after["pos_embed"].shape == (1, 26, 16)
    same = [name for name in after if name.startswith(("blocks", "patch_embed", "norm", "cls_token"))]
    assert len(same) == 2 * 12 + 2 + 2 + 1
    for name in same:
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    assert after["optimizer.updates"] == 1

    # On a resume the file is not needed any more, but the run's identity stays.
    options[options.index("train.max_steps=1")] = "train.max_steps=2"
    os.rename(lab.root / "whole/best.ckpt", lab.root / "whole/moved.ckpt")
    try:
        assert run_command(train.main, ["recipe.yaml", *options, "train.resume=auto"]) == 0
    finally:
        os.rename(lab.root / "whole/moved.ckpt", lab.root / "whole/best.ckpt")
    assert "initial weights" not in capsys.readouterr().out


def test_weights_of_a_larger_model_are_refused(lab, whole, monkeypatch, capsys):
    """And the run that is not begun leaves no folder, nor anything in one that is there."""
    monkeypatch.chdir(lab.root)
    arguments = ["recipe.yaml", "model.embed_dim=32", "train.init_from=whole/last.ckpt", "train.output=larger"]
    code = run_command(train.main, arguments)
    runs.assert_bad_input(code, capsys.readouterr().err, "whole/last.ckpt", "of another model")
    assert not (lab.root / "larger").exists()
    (lab.root / "larger").mkdir()
    (lab.root / "larger" / "config.yaml").write_text("of another run")
    code = run_command(train.main, arguments)
    runs.assert_bad_input(code, capsys.readouterr().err, "whole/last.ckpt", "of another model")
    assert (lab.root / "larger" / "config.yaml").read_text() == "of another run"


# ------------------------------------------------------------------------------------- the same to the bit


def test_a_run_stopped_after_two_epochs_and_resumed_is_the_unbroken_one(whole, stopped):
    before, resumed, ended = stopped
    assert runs.differing(before / "last.ckpt", whole[0] / "last.ckpt") != [], "or the comparison shows nothing"
    assert_same_run(resumed, whole[0])
    assert runs.differing(resumed / "best.ckpt", whole[0] / "best.ckpt") == []
    assert timeless(resumed) == timeless(whole[0])
    assert "going on from resumed/last.ckpt, step 12/24" in ended.stdout
    assert json.loads(ended.stdout.splitlines()[-1])["steps"] == STEPS


@pytest.mark.slow
def test_a_run_stopped_in_mid_epoch_with_everything_on_is_the_unbroken_one(everything, everything_parted):
    before, resumed = everything_parted
    stopped_state = checkpoint.load(before / "last.ckpt")
    assert (stopped_state.meta["step"], stopped_state.meta["epoch"], stopped_state.meta["step_in_epoch"]) == (9, 1, 3)
    assert stopped_state.arrays["state.waiting"] == 1, "half of an update's gradient waits"
    assert stopped_state.arrays["accumulated.head.weight"].any()
    kinds = {name.split(".")[0] for name in stopped_state.arrays}
    assert {"adam_m", "adam_v", "ema", "accumulated", "state", "optimizer", "cls_token", "blocks"} <= kinds
    assert stopped_state.arrays["optimizer.updates"] == 4
    assert runs.differing(resumed / "last.ckpt", everything / "last.ckpt") == []
    assert checkpoint.load(resumed / "last.ckpt").arrays["optimizer.updates"] == STEPS // 2
    training = [[(line["step"], line["loss"]) for line in metrics_of(folder)[0]] for folder in (resumed, everything)]
    assert training[0] == training[1]


@pytest.mark.slow
def test_a_run_of_phases_stopped_within_one_and_between_two_is_the_unbroken_one(phased, phased_parted):
    before, resumed = phased_parted
    assert checkpoint.load(before / "last.ckpt").arrays["pos_embed"].shape == (1, 1 + 4, 16)
    assert_same_run(resumed, phased[0])
    ends = [
        [(line["step"], line["top1"]) for line in metrics_of(folder)[1] if line["epoch"] % 1 == 0]
        for folder in (phased[0], resumed)
    ]
    assert ends[0] == ends[1]
    assert len(ends[0]) == 4


@pytest.mark.slow
def test_a_run_of_phases_says_what_each_is_and_how_long_it_compiled(phased, everything):
    folder, ended = phased
    told = [line for line in ended.stdout.splitlines() if line.startswith("phase ")]
    expected = [
        "phase 1 of 3, epochs 1 to 1: images of 8 pixels a side, 4 patch tokens, 2 of them skip blocks 1..1",
        "phase 2 of 3, epochs 2 to 3: images of 16 pixels a side, 16 patch tokens, no tokens skip",
        "phase 3 of 3, epochs 4 to 4: images of 16 pixels a side, 16 patch tokens, 9 of them skip blocks 1..1",
    ]
    assert told[:3] == expected
    assert told[3:] == expected[1:]  # again where they begin
    assert len(re.findall(r"^first step, compilation included: \d", ended.stdout, flags=re.MULTILINE)) == 3
    assert len(json.loads(ended.stdout.splitlines()[-1])["first_step_seconds"]) == 3
    rates = [[line["learning_rate"] for line in metrics_of(run)[0]] for run in (folder, everything)]
    assert rates[0] == rates[1], "the schedule knows nothing of phases"


@pytest.mark.slow
def test_what_is_validated_between_phases_is_the_finished_model(phased, phased_parted):
    """Whatever phase a checkpoint is of, what it is evaluated as gives the Top-1 that was told."""
    runtime.start()
    for folder in (phased_parted[0], phased[0]):
        saved = checkpoint.load(folder / "last.ckpt")
        assert (saved.config.model.image_size, saved.config.skip[0].keep_ratio, saved.config.phases) == (16, 0.45, ())
        net = checkpoint.build_model(saved)
        assert net.kept_tokens(Tensor(np.zeros((1, 3, 16, 16), np.float32))).shape == (1, runs.KEPT_COUNT)
        ended = runs.run("evaluate", "last.ckpt", "--data", folder.parent / "val", cwd=folder)
        validation = metrics_of(folder)[1][-1]
        assert validation["step"] == saved.meta["step"]
        assert json.loads(ended.stdout.splitlines()[-1])["top1"] == validation["top1"]


def test_the_whole_state_goes_from_phase_to_phase_bit_by_bit(lab, monkeypatch):
    """But for position embeddings of another size, with their moments, average and accumulated gradient."""
    monkeypatch.chdir(lab.root)
    trainer = trainer_of("train.output=carried", recipe="phased.yaml")
    assert trainer.phase == 0
    generator = np.random.default_rng(0)
    state = {
        parameter.name: generator.standard_normal(parameter.shape).astype(parameter.asnumpy().dtype)
        for parameter in trainer.step.get_parameters()
    }
    resized = {f"{kind}pos_embed" for kind in ("", "adam_m.", "adam_v.", "ema.", "accumulated.")}
    for phase, changed in ((1, resized), (2, set())):
        trainer.phase = phase
        carried = {p.name: p.asnumpy() for p in trainer.phase_step(state, lab.root).get_parameters()}
        assert set(carried) == set(state)
        differing = {name for name in state if carried[name].tobytes() != state[name].tobytes()}
        assert differing == changed
        state = carried
    assert all(state[name].shape == (1, 1 + runs.PATCH_COUNT, 16) for name in resized)


@pytest.mark.slow
def test_one_worker_two_workers_and_worker_processes_train_the_same(
    whole, in_sinks, everything, everything_by_processes
):
    assert_same_run(in_sinks, whole[0])
    assert_same_run(everything_by_processes, everything)
    assert timeless(everything_by_processes) == timeless(everything)


@pytest.mark.slow
def test_the_metrics_of_a_sink_are_means_over_its_steps(whole, in_sinks):
    one_by_one, by_three = metrics_of(whole[0])[0], metrics_of(in_sinks)[0]
    assert [line["step"] for line in by_three] == list(range(3, STEPS + 1, 3))
    means = np.reshape([line["loss"] for line in one_by_one], (-1, 3)).mean(1)
    np.testing.assert_allclose([line["loss"] for line in by_three], means, rtol=1e-5)
    assert [line["top1"] for line in metrics_of(in_sinks)[1]] == [line["top1"] for line in metrics_of(whole[0])[1]]


def test_a_sink_never_crosses_the_end_of_an_epoch():
    assert [train.largest_divisor(number, limit) for number, limit in ((12, 5), (12, 100), (7, 6), (1, 3))] == [
        4,
        12,
        1,
        1,
    ]


# ----------------------------------------------------------------------------------------------- stopping


@pytest.mark.slow
def test_ctrl_c_and_sigterm_write_last_and_the_run_goes_on_as_if_nothing_had_been(whole, signals):
    folder, (interrupted, after_first), (terminated, after_second) = signals
    assert interrupted.returncode == 130
    assert terminated.returncode == 143
    for ended in (interrupted, terminated):
        assert "Traceback" not in ended.stderr
        assert "error" not in ended.stderr
        assert "resume with train.resume=auto" in ended.stdout.splitlines()[-1]
    assert 0 < after_first < after_second < STEPS
    assert_same_run(folder, whole[0])
    assert timeless(folder)[-1] == timeless(whole[0])[-1]
    steps = [line["step"] for line in metrics_of(folder)[0]]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("can_be_awaited", "code"), [(True, 130), (False, 143)])
def test_asked_twice_or_with_nothing_to_write_it_ends_at_once(can_be_awaited, code):
    """In a process of its own, whose threads all have the signals blocked then."""
    program = f"""
import os, signal, time
from skipvit import train
stop = train.StopSignal()
stop.can_be_awaited = {can_be_awaited}
os.kill(os.getpid(), signal.SIGTERM)
while stop.received is None:
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
    ended = subprocess.run([sys.executable, "-c", program], env=runs.environment(), timeout=120, check=False)
    assert ended.returncode == code


@pytest.mark.slow
def test_a_finished_run_has_nothing_to_do_and_says_so_once(lab, whole, here):
    folder = lab.copy("whole", "finished")
    state, metrics = runs.state_of(folder / "last.ckpt"), timeless(folder)
    code, out, err = here("recipe.yaml", "train.output=finished", "train.resume=auto")
    assert (code, err) == (0, "")
    assert "nothing to do" in out
    closing = json.loads(out.splitlines()[-1])
    assert (closing["top1"], closing["steps"]) == (metrics[-1]["top1"], STEPS)
    assert runs.state_of(folder / "last.ckpt") == state
    assert timeless(folder) == metrics


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["in the last step of the epoch", "during the validation"])
def test_a_validation_that_a_signal_came_before_is_made_by_the_resumed_run(moment, lab, whole, here, monkeypatch):
    """Both where the run is at its end then, and where it goes on."""
    name = moment.replace(" ", "_")

    def broken_off(trainer):
        trainer.stop.agreed = signal.SIGTERM
        raise train.Stopped

    def last_step(trainer, *arguments, original=train.Trainer.note_sink):
        stopping = original(trainer, *arguments)
        if trainer.step_count == STEPS_AN_EPOCH:
            trainer.stop.agreed, stopping = signal.SIGTERM, True
        return stopping

    options = ["recipe.yaml", f"train.output={name}", "train.resume=auto"]
    with monkeypatch.context() as patch:
        if moment == "during the validation":
            patch.setattr(train.Trainer, "stop_if_asked", broken_off)
        else:
            patch.setattr(train.Trainer, "note_sink", last_step)
        assert here(*options)[0] == 143
    folder = lab.root / name
    assert not metrics_of(folder)[1]
    assert not (folder / "best.ckpt").exists()
    lab.copy(name, f"{name}_on")
    first = metrics_of(whole[0])[1][0]

    code, out, _ = here(*options, "train.stop_after_epochs=1")
    assert (code, json.loads(out.splitlines()[-1])["best_top1"]) == (0, first["top1"])
    assert [(line["step"], line["top1"]) for line in metrics_of(folder)[1]] == [(STEPS_AN_EPOCH, first["top1"])]
    assert checkpoint.load(folder / "best.ckpt").meta["step"] == STEPS_AN_EPOCH

    options[1] += "_on"
    assert here(*options, "train.stop_after_epochs=2")[0] == 0
    steps = [line["step"] for line in metrics_of(lab.root / f"{name}_on")[1]]
    assert steps == [STEPS_AN_EPOCH, 2 * STEPS_AN_EPOCH]


@pytest.mark.slow
def test_with_other_validation_images_the_best_begins_anew(lab, stopped, here):
    folder = lab.copy("stopped", "other_val")
    shutil.copytree(lab.root / "val", lab.root / "val_again")
    (image, *_) = sorted((lab.root / "val_again").rglob("*.png"))
    image.unlink()
    options = ["train.output=other_val", "train.resume=auto", "train.stop_after_epochs=3"]
    code, out, _ = here("recipe.yaml", *options, "data.val=val_again")
    assert code == 0
    assert "warning: val_again: other validation images than before; the best so far begins anew" in out
    assert json.loads(out.splitlines()[-1])["best_top1"] == metrics_of(folder)[1][-1]["top1"]
    assert checkpoint.load(folder / "best.ckpt").meta["step"] == 3 * STEPS_AN_EPOCH


@pytest.mark.parametrize(
    "other",
    [
        "train.max_steps=9",
        "train.stop_after_epochs=1",
        "train.validate_every_epochs=2",
        "train.sink_steps=2",
        "data.val=train",
    ],
)
def test_ranks_that_would_not_meet_as_often_are_refused(other, lab, monkeypatch):
    monkeypatch.chdir(lab.root)
    seen = []

    def from_rank_0(number, process):
        seen.append(number)
        if len(seen) % 3 == 0:  # the seed, the step, and what a rank is
            raise RunFailed("known")
        return number

    monkeypatch.setattr(runtime, "from_rank_0", from_rank_0)
    for number, override in enumerate(("train.log_every_steps=3", other)):
        with pytest.raises(RunFailed, match="known"):
            trainer_of(f"train.output=rank{number}_{other}", override)
    assert seen[2] != seen[5]


@pytest.mark.parametrize(
    ("steps", "last", "said"),
    [("3-9", 5, "trace of steps 3-5, where training ended,: "), ("7-9", 5, "warning: no trace of steps 7-9: ")],
)
def test_a_trace_that_training_ends_before_is_told(steps, last, said, tmp_path, monkeypatch):
    calls = []
    profiler = types.SimpleNamespace(start=lambda: calls.append("start"), end=lambda: calls.append("end"))
    monkeypatch.setattr(runtime, "StepTrace", lambda folder: profiler)
    trace = train.Trace(steps, tmp_path, 0)
    for step in range(1, last + 1):
        trace.before(step)
        assert trace.after(step) is None
    assert trace.end(last).startswith(said)
    assert calls == (["start", "end"] if steps == "3-9" else [])
    assert trace.end(last) is None or not calls


# --------------------------------------------------------------------------------------- damage and failure


@pytest.mark.slow
def test_a_damaged_last_is_told_and_the_run_goes_on_from_previous(whole, damaged):
    """And the keys that are free to change change nothing."""
    folder, ended = damaged
    warnings = [line for line in ended.stdout.splitlines() if line.startswith("warning: ")]
    assert any("damaged/last.ckpt" in line and "checksum" in line for line in warnings)
    assert any("damaged/previous.ckpt" in line for line in warnings)
    assert "going on from damaged/previous.ckpt, step 6/24" in ended.stdout
    assert runs.differing(folder / "last.ckpt", whole[0] / "last.ckpt") == []
    training, validation = metrics_of(folder)
    assert [(line["step"], line["loss"]) for line in training] == [
        (line["step"], line["loss"]) for line in metrics_of(whole[0])[0]
    ]
    assert [line["step"] for line in validation] == [6, 18, 24]
    assert json.loads(ended.stdout.splitlines()[-1])["steps"] == STEPS


@pytest.mark.slow
def test_a_loss_that_is_no_number_ends_the_run_and_harms_nothing(spoilt):
    folder, before, ended = spoilt
    assert re.fullmatch(r"error: the loss is nan at step 13, .*learning_rate.*\n", ended.stderr)
    after = runs.contents(folder)
    for name in ("last.ckpt", "previous.ckpt", "best.ckpt", "metrics.jsonl"):
        assert after[name] == before[name], name
    assert "RunFailed" in (folder / "train.log").read_text()


@pytest.mark.slow
def test_weights_that_give_no_numbers_are_not_saved(diverged):
    folder, ended = diverged
    assert re.fullmatch(r"error: .*not finite.*\n", ended.stderr)
    assert not list(folder.glob("*.ckpt"))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(lab, stopped, monkeypatch):
    monkeypatch.chdir(lab.root)
    folder = lab.copy("stopped", "full_disk")
    before = runs.contents(folder)
    trainer = trainer_of("train.output=full_disk", "train.resume=auto")

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ms, "save_checkpoint", no_space)
    with pytest.raises(RunFailed, match="No space left on device"):
        trainer.save(None)
    after = runs.contents(folder)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"config.yaml", "run.json", "train.log"}


def test_both_damaged_is_an_error_and_nothing_is_touched(lab, stopped, here):
    folder = lab.copy("stopped", "both_damaged")
    for name in ("last.ckpt", "previous.ckpt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    before = runs.contents(folder)
    for resume in ("no", "auto"):
        code, out, err = here("recipe.yaml", "train.output=both_damaged", f"train.resume={resume}")
        runs.assert_bad_input(code, err, "both_damaged/last.ckpt")
        assert out == ""
    assert runs.contents(folder) == before


def test_a_checkpoint_without_a_runs_state_is_no_run_to_go_on_with(lab, stopped, here):
    """As weights from elsewhere are, which someone calls last.ckpt."""
    folder = lab.copy("stopped", "weights_only")
    saved = checkpoint.load(folder / "last.ckpt")
    names = [name for name in saved.arrays if name.split(".")[0] not in ("adam_m", "adam_v", "state", "optimizer")]
    parameters = [Parameter(Tensor(saved.arrays[name]), name=name) for name in names]
    checkpoint.save(
        folder / "last.ckpt", parameters, {"config": saved.meta["config"], "classes": saved.meta["classes"]}
    )
    before = runs.contents(folder)
    code, _, err = here("recipe.yaml", "train.output=weights_only", "train.resume=auto")
    runs.assert_bad_input(code, err, "weights_only")
    assert runs.contents(folder) == before


# ----------------------------------------------------------------------------------------------- resuming


def test_resume_no_refuses_a_folder_with_a_run(lab, whole, here):
    before = runs.contents(whole[0])
    code, out, err = here("recipe.yaml", "train.output=whole")
    runs.assert_bad_input(code, err, "train.output: whole", "train.resume=auto")
    assert out == ""
    assert runs.contents(whole[0]) == before


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.seed=1", "train.seed"),
        ("train.epochs=5", "train.epochs"),
        ("train.precision=fp16", "train.precision"),
        ("optim.learning_rate=0.01", "optim.learning_rate"),
        ("optim.ema_decay=0.9", "optim.ema_decay"),
        ("skip.keep_ratio=0.5", "skip.keep_ratio: 0.5 here"),
        ("skip=", "skip, number of spans: 0 here"),
        ("phases=[{share: 0.5}, {share: 0.5}]", "phases, number of them: 2 here"),
        ("model.embed_dim=32", "model.embed_dim"),
        ("augment.mixup=0.8", "augment.mixup"),
        ("data.mean=[0, 0, 0]", "data.mean"),
        ("data.batch_size=8", "global batch"),
        ("data.train=more", "training images"),
        ("data.train=renamed", "training images"),
    ],
)
def test_another_identity_is_refused_by_name(override, key, lab, whole, here):
    if not (lab.root / "more").exists():
        runs.write_images(lab.root / "more", TRAINING_IMAGES + 1)
        first = shutil.copytree(lab.root / "train", lab.root / "renamed") / "crow" / "000.png"
        first.rename(first.with_name("0.png"))
    before = runs.contents(whole[0])
    code, out, err = here("recipe.yaml", "train.output=whole", "train.resume=auto", override)
    runs.assert_bad_input(code, err, f"error: {key}", "the run in whole has", "another train.output")
    assert out == ""
    assert runs.contents(whole[0]) == before


def test_what_a_run_that_never_saved_left_is_no_run(lab, monkeypatch):
    monkeypatch.chdir(lab.root)
    trainer_of("train.output=unsaved").log.metrics({"step": 1, "loss": 1.0})
    assert trainer_of("train.output=unsaved").step_count == 0
    assert (lab.root / "unsaved" / "metrics.jsonl").read_text() == ""


# ------------------------------------------------------------------------------------- averages, precision


@pytest.mark.slow
def test_the_averages_are_what_is_validated_and_served(lab, everything, monkeypatch):
    """Also after they have changed: the compiled graph must not hold on to old ones."""
    monkeypatch.chdir(lab.root)
    lab.copy("everything", "averages")
    trainer = trainer_of("train.output=averages", "train.resume=auto", recipe="everything.yaml")
    saved = checkpoint.load(everything / "last.ckpt")
    names = [name for name in saved.arrays if f"ema.{name}" in saved.arrays]
    assert any((saved.arrays[name] != saved.arrays[f"ema.{name}"]).any() for name in names)
    served = checkpoint.build_model(saved)
    for name, parameter in served.parameters_dict().items():
        np.testing.assert_array_equal(parameter.asnumpy(), saved.arrays[f"ema.{name}"])

    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), np.uint8)
    mean, std = (np.reshape(values, (3, 1, 1)) for values in (saved.config.data.mean, saved.config.data.std))
    averages = {name: saved.arrays[f"ema.{name}"] for name in names}
    later = {name: value * np.float32(2) for name, value in averages.items()}
    for values in (averages, later):
        for average in trainer.step.optimizer.averages:
            ops.assign(average, Tensor(values[average.name[4:]]))  # as the training step does
        trainer.refresh_weights()
        found = trainer.classify(Tensor(pixels))[0].asnumpy()
        expected = reference.forward(
            values, (pixels / 255 - mean) / std, patch_size=4, num_heads=2, spans=[(1, 2, runs.KEPT_COUNT)]
        ).logits
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_half_precision_runs_with_a_loss_scale_in_the_metrics(half_precision):
    folder, _, ended = half_precision
    training, _ = metrics_of(folder)
    assert len(training) == 2 * STEPS_AN_EPOCH
    assert all(line["loss_scale"] >= 1 for line in training)
    assert {line["overflows"] for line in training} <= {0, 1}
    assert training[-1]["loss"] < training[0]["loss"]
    saved = checkpoint.load(folder / "last.ckpt")
    assert saved.config.train.precision == "fp16"
    assert saved.arrays["state.loss_scale"] == training[-1]["loss_scale"]
    assert all(str(value.dtype) != "float16" for value in saved.arrays.values()), "the weights stay in float32"
    assert "fp16" in ended.stdout


# ------------------------------------------------------------------------------------------------- images


@pytest.mark.slow
def test_overfits_eight_images_and_reports_the_objects(overfitted):
    closing = json.loads(overfitted.stdout.splitlines()[-1])
    assert (closing["top1"], closing["epochs"], closing["steps"]) == (100.0, 60, 60)
    share = runs.KEPT_COUNT / runs.PATCH_COUNT
    assert (closing["object_kept"], closing["random_kept"]) == (share, share), "all of every image is object"
    assert "of the object's patches 43.8% were kept; a random choice keeps 43.8%" in overfitted.stdout


@pytest.mark.slow
def test_masks_choose_the_patches_they_show(by_mask):
    closing = json.loads(by_mask.stdout.splitlines()[-1])
    assert (closing["object_kept"], closing["random_kept"]) == (1.0, runs.KEPT_COUNT / runs.PATCH_COUNT)


@pytest.mark.slow
def test_unreadable_images_are_named_once_and_replaced(half_precision):
    folder, names, ended = half_precision
    warnings = [line for line in ended.stdout.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    for name in names:
        assert sum(name in line for line in warnings) == 1
        assert name in (folder / "train.log").read_text()
    assert json.loads(ended.stdout.splitlines()[-1])["steps"] == 2 * STEPS_AN_EPOCH


@pytest.mark.slow
def test_too_many_unreadable_images_stop_the_run_and_the_traceback_is_in_its_log(unreadable):
    folder, ended = unreadable
    runs.assert_bad_input(ended.returncode, ended.stderr, "data.train", "3 of 26", "data.max_unreadable_share")
    assert "many_unreadable/crow/000.png" in ended.stderr
    assert "Traceback" in (folder / "train.log").read_text()
    assert not list(folder.glob("*.ckpt"))


# ---------------------------------------------------------------------------------------------- bad input


def test_a_mistake_through_the_real_command(lab):
    before = set(os.listdir(lab.root))
    ended = runs.run("train", "recipe.yaml", "train.epoch=3", "train.output=never", cwd=lab.root)
    runs.assert_bad_input(ended.returncode, ended.stderr, "train.epoch", "train.epochs")
    assert ended.stdout == ""
    assert "never" not in set(os.listdir(lab.root)) - before


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    """Folders and files to be refused."""
    root = tmp_path_factory.mktemp("mistakes")
    runs.write_images(root / "train", 8)
    runs.write_images(root / "val", 4)
    runs.write_images(root / "other", 4, classes=("crow", "owl"))
    runs.write_images(root / "mixed", 4)
    (root / "empty").mkdir()
    (root / "mixed" / "bare").mkdir()
    (root / "file").write_text("here before")
    runs.write_recipe(root / "recipe.yaml")
    runs.write_recipe(root / "phased.yaml", PHASES)
    (root / "broken.yaml").write_text("model: {depth: 3")
    (root / "list.yaml").write_text("- model\n")
    (root / "binary.yaml").write_bytes(bytes(range(256)))
    (root / "code.yaml").write_text("model: !!python/object/apply:os.system ['touch executed']\n")
    return root


BAD_INPUT = [
    ([], ["CONFIG", "--help"]),
    (["recipe.yaml", "--epochs=3"], ["--epochs=3"]),
    (["missing.yaml"], ["missing.yaml"]),
    (["."], ["is a folder"]),
    (["broken.yaml"], ["broken.yaml", "not valid YAML"]),
    (["list.yaml"], ["list.yaml"]),
    (["binary.yaml"], ["binary.yaml", "not valid YAML"]),
    (["code.yaml"], ["code.yaml"]),
    (["recipe.yaml", "train.epochs"], ["train.epochs", "key=value"]),
    (["recipe.yaml", "train.epoch=3"], ["train.epoch", "train.epochs"]),
    (["recipe.yaml", "modle.depth=3"], ["modle", "model"]),
    (["recipe.yaml", "train.epochs=many"], ["train.epochs", "many"]),
    (["recipe.yaml", "train.resume=perhaps"], ["train.resume", "auto"]),
    (["recipe.yaml", "train.precision=bf16"], ["train.precision", "fp16"]),
    (["recipe.yaml", "skip.start=2"], ["skip.start", "2", "skip.end"]),
    (["recipe.yaml", "skip.end=3"], ["skip.end", "2 blocks"]),
    (["recipe.yaml", "skip.keep_ratio=0"], ["skip.keep_ratio", "(0, 1]"]),
    (["recipe.yaml", "skip.keep_ratio=1.1"], ["skip.keep_ratio", "(0, 1]"]),
    (["recipe.yaml", "skip.start=0"], ["skip.start", "cls_attention", "random"]),
    (["recipe.yaml", "skip.score=mask"], ["data.masks", "skip.score=mask"]),
    (["recipe.yaml", "skip.score=mask", "data.masks=val"], ["data.train_masks"]),
    (["recipe.yaml", "skip.score=mask", "data.masks=no"], ["data.masks", "no is not a folder; give the masks' folder"]),
    (["recipe.yaml", "data.masks=other"], ["data.masks", "heron/001", "under the image's name"]),
    (["recipe.yaml", "skip.score=mask", "data.masks=other", "data.train_masks=train"], ["data.masks", "heron/001"]),
    (["phased.yaml", "phases.1.share=0.4"], ["phases", "0.9", "1"]),
    (["phased.yaml", "phases.0.image_size=6"], ["phases.0.image_size", "6", "patch_size"]),
    (["recipe.yaml", "model.num_heads=3"], ["model.num_heads", "model.embed_dim"]),
    (["recipe.yaml", "model.patch_size=5"], ["model.image_size", "model.patch_size"]),
    (["recipe.yaml", "model.num_classes=1"], ["model.num_classes", "2 classes"]),
    (["recipe.yaml", "data.train=missing"], ["data.train", "missing", "does not exist"]),
    (["recipe.yaml", "data.train=file"], ["data.train", "file", "not a folder"]),
    (["recipe.yaml", "data.train=empty"], ["data.train", "empty", "no class folders"]),
    (["recipe.yaml", "data.val=missing"], ["data.val", "missing"]),
    (["recipe.yaml", "data.val="], ["data.val", "not given"]),
    (["recipe.yaml", "data.val=mixed"], ["data.val", "mixed", "without images", "bare"]),
    (["recipe.yaml", "data.val=other"], ["data.val", "owl", "heron"]),
    (["recipe.yaml", "data.masks=missing"], ["data.masks", "missing"]),
    (["recipe.yaml", "data.batch_size=9"], ["data.batch_size", "9", "8"]),
    (["recipe.yaml", "train.init_from=missing.ckpt"], ["missing.ckpt", "no such checkpoint"]),
    (["recipe.yaml", "train.output=file"], ["train.output", "file"]),
    (["recipe.yaml", "train.output=file/run"], ["train.output", "file/run"]),
    (["recipe.yaml", "train.output=/proc/skipvit"], ["train.output", "/proc/skipvit"]),
    (["recipe.yaml", "train.output=/proc/self"], ["train.output", "/proc/self", "written"]),
]


@pytest.mark.parametrize(("arguments", "parts"), BAD_INPUT, ids=[" ".join(arguments) for arguments, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_harms_nothing(arguments, parts, mistakes, monkeypatch, capsys):
    if any("/proc" in argument for argument in arguments) and not Path("/proc/self").exists():
        pytest.skip("no /proc to be refused by")
    monkeypatch.chdir(mistakes)
    before = runs.contents(mistakes)
    code = run_command(train.main, arguments)
    out, err = capsys.readouterr()
    runs.assert_bad_input(code, err, *parts)
    assert out == ""
    assert runs.contents(mistakes) == before
