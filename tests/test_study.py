"""The study: its runs are valid recipes, its tables say what the files say, the test images are for what was chosen."""

import importlib.util
import io
import json
import os
import re
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from skipvit.config import UserError

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("accuracy", ROOT / "studies" / "accuracy.py")
study = importlib.util.module_from_spec(specification)
specification.loader.exec_module(study)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository of its own for what the study writes."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    for name, path in (("RESULTS", "study"), ("README", "README.md"), ("LOG", "docs/LOG.md")):
        monkeypatch.setattr(study, name, tmp_path / path)
    for name in ("CHOSEN", "STEP_TIMES"):
        monkeypatch.setattr(study, name, tmp_path / "study" / getattr(study, name).name)
    for path in (study.README, study.LOG):
        path.write_text(f"before\n{study.BEGIN}\n{study.END}\nafter\n")
    return tmp_path


@pytest.fixture
def archive(tmp_path):
    """Two classes of eight training and two test images, which are the letters of their names."""
    path = tmp_path / "cifar10.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for split, count in (("train", 8), ("test", 2)):
            for part in ("crow", "owl"):
                for number in range(count):
                    name = f"cifar10/{split}/{part}/{number:04d}.jpg"
                    member = tarfile.TarInfo(name)
                    member.size = len(name)
                    tar.addfile(member, io.BytesIO(name.encode()))
    return path


def record(run, top1, **more):
    """A run's JSON with this Top-1."""
    shapes = [[study.shape_of(config), steps] for config, steps in study.steps_of(run.config(), 10)]
    content = {
        **run._asdict(),
        "top1": top1,
        "steps": shapes,
        "training_flops": study.training_flops(run.config(), 10),
        **more,
    }
    study.write(run.record, json.dumps(content).encode())


def test_every_setting_is_a_recipe_at_every_length():
    for name in study.SETTINGS:
        for length in {study.HALF_OF_THEM, *study.LENGTHS, *study.COST_LENGTHS}:
            config = study.Run(name, *length, 0).config()
            assert config.model.num_patches == 64
            assert sum(steps for _, steps in study.steps_of(config, 10)) == 10 * length.epochs
            warm_up = config.optim.warmup_epochs * length.images
            assert warm_up == 10_000 // length.images * length.images, "as many steps for all, in whole epochs"
    dense = study.training_flops(study.Run("dense", *study.FEW_PASSES, 0).config(), 10)
    for name in study.SETTINGS:
        share = study.training_flops(study.Run(name, *study.FEW_PASSES, 0).config(), 10) / dense
        assert share == 1 if name == "dense" else 0.25 < share < 1, name


def test_the_most_informative_runs_come_first_and_seeds_interleave(place):
    runs = study.runs_of("2")
    assert len(runs) == len(set(runs))
    assert {run.setting for run in runs} == set(study.SETTINGS) - set(study.OTHERS)
    assert {run.seed for run in runs if run[1:3] == study.HALF_OF_THEM} == {0, 1, 2}
    assert {run.seed for run in runs if run[1:3] == study.FEW_PASSES} == {100, 101, 102}
    assert [run.setting for run in runs[:3]] == ["dense", "paper", "corner"]
    assert [run.seed for run in runs[:24]] == [seed for seed in (0, 1, 2) for _ in range(8)]
    assert study.runs_of("1") == []
    assert all(run.epochs < 48 for run in study.runs_of("3")), "before the choice"
    study.choose(["corner@1"], study.MANY_PASSES)
    runs = study.runs_of("1")
    assert len(runs) == 20
    assert [(run.setting, run.seed) for run in runs[:4]] == [
        ("dense", 100),
        ("corner", 100),
        ("dense", 101),
        ("corner", 101),
    ]
    assert not {run.seed for run in runs} & set(study.SEEDS)
    assert {run for run in study.runs_of("3") if run.epochs == 48} == {
        study.Run(name, 2_500, 48, seed) for name in ("dense", "corner", *study.OTHERS) for seed in (100, 101, 102)
    }
    assert len(study.all_runs(None)) == len(set(study.all_runs(None)))


def test_what_was_chosen_stays_or_is_given_up_with_a_reason(place):
    with pytest.raises(UserError, match="no choice to give up"):
        study.give_up("why not")
    study.choose(["corner"], study.MANY_PASSES)
    with pytest.raises(UserError, match="corner: is chosen already"):
        study.choose(["corner@1"], study.MANY_PASSES)
    with pytest.raises(UserError, match="dense: is no setting with skipping"):
        study.choose(["keep10", "dense"], study.MANY_PASSES)
    assert len(study.runs_of("1")) == 20, "nothing of a refused choice is taken"
    study.choose(["keep10"], study.MANY_PASSES)
    assert len(study.runs_of("1")) == 30
    assert {run.seed for run in study.runs_of("1")} == set(range(100, 110)), "dense's runs are shared"
    for name, top1 in (("dense", 60.0), ("corner", 55.0)):
        record(study.Run(name, *study.MANY_PASSES, 100), top1, test_top1=99.0)
    assert "less dense" not in study.settings_table(study.MANY_PASSES), (
        "question 1's runs are told in its verdict alone"
    )
    study.give_up("it loses 5 points")
    given_up = "48 epochs of 2,500 images, seeds 100 to 109. Given up: it loses 5 points."
    assert "\nNothing is chosen for question 1 now.\n\nChosen" in study.README.read_text()
    assert f"{given_up} Nothing is chosen for question 1 now.\n" in study.LOG.read_text()
    assert f"{given_up}\n" in study.README.read_text()
    assert study.runs_of("1") == []
    assert "| -5.00 |" in study.README.read_text()
    study.choose(["paper"], study.MANY_PASSES)
    assert {run.seed for run in study.runs_of("1")} == set(range(110, 120)), "seeds of its own"
    assert given_up in study.README.read_text()
    assert "Of 20 runs 0 are in" in study.README.read_text()
    for run in study.runs_of("1"):
        record(run, 50.0, test_top1=60.0)
    with pytest.raises(UserError, match="question 1 is answered, about paper; that stays"):
        study.give_up("the answer does not please")
    study.choose(["corner"], study.MANY_PASSES)
    readme = study.README.read_text()
    assert "tested with skipping as trained, when the answer about `paper` was known; against dense" in readme
    assert "| mean | 60.00 | 60.00 | +0.00 (+0.00 to +0.00) |" in readme, "an answer stays when another is asked for"
    assert "Of 30 runs 20 are in" in readme
    assert "99.0" not in study.README.read_text() + study.LOG.read_text()


def test_held_out_images_are_none_of_the_training_images(place, archive, monkeypatch):
    monkeypatch.setattr(study, "HELD_OUT_A_CLASS", 2)
    monkeypatch.setattr(study, "CLASSES", 2)
    monkeypatch.setattr(study, "TEST_IMAGES", 4)
    monkeypatch.setattr(study, "LENGTHS", (study.Length(8, 1), study.Length(4, 2), study.Length(2, 4)))
    study.prepare(archive, place / "work")
    found = {
        str(path.relative_to(place / "work/cifar10")): path.read_text() for path in (place / "work").rglob("*.jpg")
    }
    assert found == {
        f"{part}/{name}/{n:04d}.jpg": f"cifar10/train/{name}/{n:04d}.jpg"
        for part, numbers in (("held_out", (0, 1)), ("train_8", (2, 3, 4, 5)), ("train_4", (2, 3)), ("train_2", (2,)))
        for name in ("crow", "owl")
        for n in numbers
    } | {f"test/{name}/{n:04d}.jpg": f"cifar10/test/{name}/{n:04d}.jpg" for name in ("crow", "owl") for n in (0, 1)}
    with pytest.raises(UserError, match="is there already"):
        study.prepare(archive, place / "work")
    monkeypatch.setattr(study, "LENGTHS", (study.Length(20, 1),))
    with pytest.raises(UserError, match="gives 12 images for train_20, which has 20"):
        study.prepare(archive, place / "elsewhere")
    with tarfile.open(place / "official.tar.gz", "w:gz") as tar:
        tar.add(archive, "cifar-10-batches-py/data_batch_1")
    with pytest.raises(UserError, match="gives 0 images for held_out"):
        study.prepare(place / "official.tar.gz", place / "elsewhere")


def test_a_run_is_recorded_from_what_the_commands_say(place, monkeypatch):
    run = study.Run("corner_full_end", 10_000, 6, 1)
    asked = []

    def command(arguments, work, log=None):
        asked.append(arguments)
        if arguments[0] == "evaluate":
            return {"top1": 40.0 + len(asked)}
        recipe = study.yaml.safe_load(Path(arguments[1]).read_text())
        assert (recipe["train"]["seed"], recipe["train"]["epochs"], recipe["train"]["resume"]) == (1, 6, "auto")
        folder = Path(recipe["train"]["output"])
        lines = [{"step": step, "epoch": 1 + step // 10, "loss": float(step)} for step in range(60)]
        lines += [{"step": 20 * i, "epoch": 2.0 * i, "top1": 10.0 * i, "top5": 0} for i in (1, 2, 3)]
        study.write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        study.write(folder / "run.json", b"{}")
        return {"steps": 60, "first_step_seconds": [5.0, 6.0]}

    monkeypatch.setattr(study, "command", command)
    study.train(run, place / "work")
    found = json.loads(run.record.read_text())
    assert "test_top1" not in found
    assert not any(Path(argument).name == "test" for arguments in asked for argument in arguments)
    assert (found["top1"], found["top1_no_skip"], found["top1_more"], found["top1_skip"]) == (30.0, 42.0, 43.0, 44.0)
    assert asked[1][-1] == "--no-skip"
    assert asked[3][-2:] == ["--keep-ratio", "0.25"]  # it ends on all tokens
    assert found["curve"] == [[2.0, 10.0], [4.0, 20.0], [6.0, 30.0]]
    assert found["losses"][:2] == [4.5, 14.5]
    assert [steps for _, steps in found["steps"]] == [50, 10]
    assert str(place) not in run.record.read_text()


def test_differences_are_paired_by_seed_with_students_interval(place, monkeypatch):
    dense, ours = [50.0, 52.0, 47.0], [50.5, 51.5, 48.5]
    for seed, (one, other) in enumerate(zip(dense, ours)):
        record(study.Run("dense", *study.HALF_OF_THEM, seed), one)
        record(study.Run("paper", *study.HALF_OF_THEM, seed), other, top1_no_skip=other - 1, top1_more=other + 1)
    record(study.Run("keep10", *study.HALF_OF_THEM, 0), 40.0, top1_no_skip=30.0)
    differences = np.subtract(ours, dense)
    low, high = stats.t.interval(0.95, 2, differences.mean(), differences.std(ddof=1) / np.sqrt(3))
    text = study.settings_table(study.HALF_OF_THEM)
    (row,) = [line for line in text.splitlines() if "`paper`" in line]
    assert f"| 50.17 | +0.50 ({low:+.2f} to {high:+.2f}) | 50.17 | 51.17 | 49.17 | 3 |" in row
    (row,) = [line for line in text.splitlines() if "`keep10`" in line]
    assert "| 40.00 | -10.00 | 40.00 |  | 30.00 | 1 |" in row
    assert "varies by 1.00 points between seeds" in text, "one seed says nothing of that"
    assert f"is known to {(high - low) / 2:.1f} either way" in text
    for seed, top1 in enumerate(dense[:2]):
        record(study.Run("keep25", *study.HALF_OF_THEM, seed), top1 + 3 * seed)
    assert f"varies by {((2 * 1.0 + 4.5) / 3) ** 0.5:.2f} points" in study.settings_table(study.HALF_OF_THEM)
    shape = study.shape_of(study.Run("paper", *study.HALF_OF_THEM, 0).config())
    times = {
        "ratios": {shape: 0.6, study.shape_of(study.Run("dense", *study.HALF_OF_THEM, 0).config()): 1.0},
        "dense_ms": [900, 1000, 2000],
    }
    study.write(study.STEP_TIMES, json.dumps(times).encode())
    (row,) = [line for line in study.settings_table(study.HALF_OF_THEM).splitlines() if "`paper`" in line]
    assert "| 0.60 | 50.17 |" in row
    monkeypatch.setattr(study, "OTHERS", ("evit",))  # which waits for its own runs alone
    for seed, top1 in enumerate(dense):
        assert study.cost_points() == {}, "other seeds for other methods would be no comparison"
        record(study.Run("dense", *study.COST_LENGTHS[1], seed), top1)
    assert study.cost_points() == {"dense": {4.0: dense}}, "240 steps of a second"


def test_question_3_tests_each_as_it_is_meant_to_be(place):
    item = {"setting": "tread", "top1": 1.0, "top1_more": 2.0, "top1_no_skip": 3.0}
    assert study.meant_top1(item) == 3.0
    assert study.meant_top1({**item, "setting": "random"}) == 1.0
    study.choose(["random@0.55", "keep10@1", "corner"], study.MANY_PASSES)
    tops = [study.meant_top1({**item, "setting": name}) for name in ("random", "keep10", "corner")]
    assert tops == [2.0, 3.0, 1.0]


def test_each_length_has_a_choice_and_an_answer_of_its_own(place):
    study.choose(["random"], study.MANY_PASSES)
    of_most = len(study.runs_of("3"))
    study.choose(["corner@0.35"], study.MOST_PASSES)
    runs = study.runs_of("1")
    assert [run[1:] for run in runs[20:22]] == [(1_250, 96, 110)] * 2
    assert len(study.runs_of("3")) == of_most, "question 3 is about what was chosen at its own lengths"
    assert study.checks_of(runs[21])["test_top1"] == ("test", ["--keep-ratio", "0.35"])
    for run in runs[20:]:
        record(run, 50.0, test_top1=60.0 + (run.setting == "corner"))
    study.tables()
    newest, older = study.README.read_text().split("Chosen by the held-out images")[1:3]
    assert "| mean | 60.00 | 61.00 | +1.00 (+1.00 to +1.00) |" in newest
    assert "Of 20 runs 0 are in" in older
    with pytest.raises(UserError, match="is answered, about corner"):
        study.give_up("the answer does not please")
    study.choose(["keep10"], study.MANY_PASSES)
    assert [(len(choice["settings"]), choice["seeds"][0]) for choice in study.choices()] == [(2, 100), (1, 110)]


def test_a_setting_whose_runs_did_not_see_the_test_images_joins_no_choice(place):
    study.choose(["random"], study.MANY_PASSES)
    record(study.Run("tread", *study.MANY_PASSES, 100), 50.0)  # question 3's
    with pytest.raises(UserError, match="tread: has runs on question 1's seeds already"):
        study.choose(["tread"], study.MANY_PASSES)


def test_the_test_images_are_for_the_runs_of_what_was_chosen(place, monkeypatch):
    run = study.Run("corner", *study.MANY_PASSES, 100)
    assert study.checks_of(run) == {
        "top1_no_skip": ("held_out", ["--no-skip"]),
        "top1_more": ("held_out", ["--keep-ratio", "0.35"]),
    }
    for names, message in (
        (["dense"], "dense: is no setting with skipping"),
        (["corner@1.5"], r"corner@1.5: was not tried on held-out images"),
        (["chosen_again@0.35"], "give chosen_again or chosen_again@1$"),
        (["corner", "corner@1"], "corner: is chosen already"),
    ):
        with pytest.raises(UserError, match=message):
            study.choose(names, study.MANY_PASSES)
    study.choose(["corner@0.35"], study.MANY_PASSES)
    assert study.checks_of(run)["test_top1"] == ("test", ["--keep-ratio", "0.35"])
    assert "tested with 35% of the tokens kept; against dense" in study.LOG.read_text()
    assert study.checks_of(run._replace(setting="dense")) == {"test_top1": ("test", [])}
    for other in (run._replace(seed=0), run._replace(epochs=6), run._replace(setting="paper")):
        assert "test_top1" not in study.checks_of(other)
    # The choice stands in the log before any of them is made.
    (place / "work/cifar10").mkdir(parents=True)
    study.LOG.write_text(study.LOG.read_text().replace("corner", "paper"))
    with pytest.raises(UserError, match="does not say what question 1 tests"):
        study.run_missing("1", place / "work", None, 1)


def test_the_verdict_is_told_when_all_of_its_runs_are_in(place):
    assert study.verdicts() == "Nothing is chosen for question 1 now."
    study.choose(["corner", "keep10@0.2"], study.MANY_PASSES)
    runs = study.runs_of("1")
    assert [run.setting for run in runs[:3]] == ["dense", "corner", "keep10"]
    less = {"dense": 0.0, "corner": -0.5, "keep10": -2.0}
    *most, dense, corner, keep10 = runs
    stages = ((most, []), ([corner], []), ([dense], ["corner"]), ([keep10], ["corner", "keep10"]))
    for come_in, told in stages:
        for run in come_in:
            record(run, 50.0, test_top1=60.0 + 0.1 * (run.seed - 100) + less[run.setting])
        assert study.answered(study.current_choices()[0]) == told
        study.tables()
        readme = study.README.read_text()
        assert ("| mean | 60.45 |" in readme) == bool(told)
        assert ("60." in readme) == bool(told)
        assert ("58.45" in readme) == ("keep10" in told)
        held_out = study.settings_table(study.MANY_PASSES)
        compared = [name for name in less if f"[`{name}`]" in held_out]
        assert compared == (["dense", *told] if told else []), "on held-out images too, with the answer"
    assert "Of 30 runs" not in readme
    assert "| 100 | 60.00 | 59.50 | -0.50 | 58.00 | -2.00 |" in readme
    assert "| mean | 60.45 | 59.95 | -0.50 (-0.50 to -0.50) | 58.45 | -2.00 (-2.00 to -2.00) |" in readme
    assert re.search(r"`corner` 0\.\d\d of the FLOPs, not measured of the time; `keep10` 0\.\d\d of", readme), (
        "not timed yet"
    )
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")


def test_runs_go_on_cores_of_their_own(place, monkeypatch):
    (place / "work/cifar10").mkdir(parents=True)
    together, seen = threading.Barrier(2), []

    def train(run, work):
        together.wait(60)
        seen.append(os.sched_getaffinity(0))
        record(run, 50.0)

    before = os.sched_getaffinity(0)
    if len(before) < 2:
        pytest.skip("this machine has one core")
    monkeypatch.setattr(study, "train", train)
    study.run_missing("2", place / "work", 2, 2)
    assert set.union(*seen) == before == os.sched_getaffinity(0)
    assert not set.intersection(*seen)
    with pytest.raises(UserError, match=r"--jobs: 0; give 1 to"):
        study.run_missing("2", place / "work", 1, 0)


def test_the_share_of_the_object_is_told_over_training(place):
    for seed in study.SEEDS:
        shares = [[float(epoch), (epoch + seed) / 10] for epoch in range(1, 7)]
        record(study.Run("random", 0, study.CLUTTER_EPOCHS, seed), 90.0, object_kept=shares)
    assert "| `random` | 20.0% (10.0 to 30.0) | 70.0% (60.0 to 80.0) |" in study.clutter_table()
    assert study.records() == {}


def test_pictures_are_drawn_and_shown(place, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(study, "OTHERS", ())
    for length in study.COST_LENGTHS:
        for seed in study.SEEDS:
            record(study.Run("dense", *length, seed), 50.0 + length.epochs + seed / 10)
    record(study.Run("random", 0, study.CLUTTER_EPOCHS, 0), 90.0, object_kept=[[1.0, 0.4], [2.0, 0.5]])
    dense = study.shape_of(study.Run("dense", *study.HALF_OF_THEM, 0).config())
    study.write(study.STEP_TIMES, json.dumps({"ratios": {dense: 1.0}, "dense_ms": [1000]}).encode())
    study.tables()
    for name in (study.COST_PICTURE, study.CLUTTER_PICTURE):
        assert (place / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in study.README.read_text()


def test_the_documents_say_what_the_files_say():
    for path, block in study.blocks().items():
        text = path.read_text()
        assert text.count(study.BEGIN) == text.count(study.END) == 1
        assert study.with_block(text, block) == text, "run: python studies/accuracy.py tables"
