"""The benchmark as a user runs it, with contenders of our own where the numbers must be known."""

import json
import os
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor
from runs import SMALL_MODEL, run

from skipvit import benchmark, clutter, config, cost, runtime, train
from skipvit.log import RunFailed

SMALL = [*SMALL_MODEL, "model.num_classes=10", "skip.end=3", "data.batch_size=4"]
QUICK = ["--steps", "3", "--warmup", "1"]

# Speaks the protocol; its steps take what it is told. It dies at the step told, if any.
CONTENDER = """
import json, sys
request, steps, died_at = json.loads(sys.stdin.readline()), 0, int(sys.argv[2])
print("a library says something")
print(json.dumps({"first_step_seconds": 1.5}), flush=True)
for line in sys.stdin:
    if line.strip() == "end":
        print(json.dumps({"peak_mb": 100.0}), flush=True)
        break
    steps += 1
    if steps == died_at:
        sys.exit(7)
    print(json.dumps({"ms": float(sys.argv[1]) + steps}), flush=True)
"""


def stand_in(tmp_path, milliseconds, died_at=0):
    script = tmp_path / "contender.py"
    script.write_text(CONTENDER)
    return [sys.executable, str(script), str(milliseconds), str(died_at)]


def test_the_token_path_is_what_skip_has_more_outside_blocks():
    dense = {"groups": {"matrix products": 90.0, "other": 10.0}, "outside_blocks_ms": 2.0}
    skip = {"groups": {"matrix products": 40.0, "choosing tokens": 2.0, "other": 8.0}, "outside_blocks_ms": 5.0}
    assert benchmark.token_path_share(dense, skip) == pytest.approx(3 / 50)


def test_dense_skip_and_a_third_step_by_step(tmp_path):
    third = shlex.join(stand_in(tmp_path, 50))
    output = tmp_path / "folder" / "result.json"
    done = run("benchmark", *SMALL, *QUICK, "--profile", "--against", third, "--output", str(output), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert result["command"].startswith("python -m skipvit.benchmark model.image_size=32")
    recipe = config.from_dict({}, SMALL)
    assert result["bound"] == round(cost.speed_up_bound(recipe.model, recipe.skip), 4)
    low, high = result["speed_up_quartiles"]
    assert low <= result["speed_up"] <= high
    assert result["efficiency"] == pytest.approx(result["speed_up"] / result["bound"], abs=1e-3)
    assert result["peak_memory_ratio"] == pytest.approx(
        result["skip"]["peak_memory_mb"] / result["dense"]["peak_memory_mb"], abs=0.02
    )
    # Warm-up discarded: steps 2, 3 and 4 of the third.
    assert result[third]["ms"] == 53
    dense_time = result["against"]["dense_time"]["ratio"]
    assert result["dense"]["quartiles_ms"][0] / 54 <= dense_time <= result["dense"]["quartiles_ms"][1] / 52
    assert result["dense"]["groups_ms"]["matrix products"] > 0
    assert result["skip"]["groups_ms"]["choosing tokens"] > result["dense"]["groups_ms"]["choosing tokens"] == 0
    assert abs(result["token_path_share"]) < 1
    assert {"cpu", "cores", "mindspore", "precision", "batch_size", "git_commit"} <= set(result)
    assert "efficiency" in done.stdout
    assert not (tmp_path / "rank_0").exists()


@pytest.mark.slow
def test_mindcv_at_the_same_size_trains(tmp_path):
    recipe = config.from_dict({}, SMALL)
    runtime.start()
    step, inputs = benchmark.mindcv_step(recipe)
    losses = [float(step(*inputs).asnumpy()) for _ in range(4)]
    assert losses[-1] < losses[0]
    names = {parameter.name for parameter in step.network.trainable_params()}
    weights = sum(parameter.size for parameter in step.network.trainable_params())
    assert len(names) > 30
    assert weights == cost.parameter_count(recipe.model)


def test_the_step_timed_is_the_step_of_train():
    """Not a likeness of it: the class, and the inputs that train gives it."""
    recipe = config.from_dict({}, [*SMALL, "model.drop_path=0.1", "model.dropout=0.1"])
    runtime.start()
    step, inputs = benchmark.training_step(recipe)
    assert type(step) is train.TrainStep
    assert [tuple(value.shape) for value in inputs] == [(4, 3, 32, 32), (4, 10), (1,), (3, 2, 4), (4, 3)]
    assert np.isfinite(step(*inputs).asnumpy())
    assert isinstance(inputs[0], Tensor)
    assert inputs[0].asnumpy().dtype == np.uint8


def test_turns_go_round_and_warm_up_is_not_counted(tmp_path):
    recipe = config.from_dict({}, SMALL)
    contenders = [benchmark.Contender(str(ms), recipe, "own", stand_in(tmp_path, ms)) for ms in (100, 50)]
    order = []
    for contender in contenders:
        take = contender.step

        def step(counted, take=take, name=contender.name):
            order.append(name)
            take(counted)

        contender.step = step
    benchmark.take_turns(contenders, warmup=2, steps=3)
    assert order == ["100", "50", "50", "100", "100", "50", "50", "100", "100", "50"]
    assert contenders[0].times == [103, 104, 105]
    assert benchmark.ratio(*contenders) == {
        "ratio": round(104 / 54, 4),
        "quartiles": pytest.approx([(104 / 54 + 105 / 55) / 2, (103 / 53 + 104 / 54) / 2], abs=1e-4),
    }
    assert benchmark.summary_of(contenders[1], 27) == {
        "ms": 54.0,
        "quartiles_ms": [53.5, 54.5],
        "images_per_second": 500.0,
        "first_step_seconds": 1.5,
        "compile_seconds": None,
    }
    assert [contender.end() for contender in contenders] == [100, 100]


def test_a_ratio_is_of_rounds_so_that_a_slow_while_bends_none():
    slow, fast = SimpleNamespace(times=[100, 310, 300, 300]), SimpleNamespace(times=[50, 155, 150, 151])
    assert benchmark.ratio(slow, fast) == {"ratio": 2.0, "quartiles": [1.9967, 2.0]}  # of the medians 1.993


def test_a_contender_that_dies_is_named(tmp_path):
    recipe = config.from_dict({}, SMALL)
    contender = benchmark.Contender("the third", recipe, "own", stand_in(tmp_path, 1, died_at=2))
    contender.step(counted=True)
    with pytest.raises(RunFailed, match=r"the third.* 7"):
        contender.step(counted=True)
    contender.close()


@pytest.mark.slow
def test_sweep_and_its_picture(tmp_path, monkeypatch, capsys):
    for name, values in (("START", (1, 2)), ("END", (3, 9)), ("KEEP_RATIO", (0.25,))):
        monkeypatch.setattr(benchmark, f"SWEEP_{name}", values)
    monkeypatch.chdir(tmp_path)
    benchmark.main([*SMALL, *QUICK, "--sweep", "--processes", "2", "--picture", str(tmp_path / "sweep.png")])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["start"], row["end"], row["kept"]) for row in result["sweep"]] == [(1, 3, 4), (2, 3, 4)]
    for row in result["sweep"]:
        assert row["speed_up"] == pytest.approx(np.median([one["ratio"] for one in row["processes"]]), abs=1e-4)
        assert len(row["processes"]) == 2
        assert row["efficiency"] == pytest.approx(row["speed_up"] / row["bound"], abs=1e-3)
    assert result["least_efficiency"] == min(row["efficiency"] for row in result["sweep"])
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_input_alone(tmp_path):
    done = run("benchmark", "--input-only", "--steps", "2", *SMALL, "data.train=clutter", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["input_images_per_second"] > 0


def test_input_against_anothers_on_one_core(tmp_path, monkeypatch, capsys):
    folder = clutter.ensure()
    other = tmp_path / "other.py"
    other.write_text(
        "import json, sys\n"
        f"assert sys.argv[1:] == [{str(folder / 'train')!r}, '4', '2'], sys.argv\n"
        "print('a library says something'); print(json.dumps({'input_images_per_second': 0.5}))\n"
    )
    pinned = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cores: pinned.append(cores))
    monkeypatch.setattr(benchmark, "INPUT_ROUNDS", 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # its own processes find the package as this one did
    images = [f"data.train={folder / 'train'}", f"data.val={folder / 'val'}", "augment.mixup=0.8"]
    command = ["--input-only", "--steps", "2", "--against", shlex.join([sys.executable, str(other)])]
    benchmark.main([*SMALL, *images, *command])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [len(cores) for cores in pinned] == [1]
    for key, name in (("input_speed_up", "own"), ("input_speed_up_unmixed", "own_unmixed")):
        assert result[key] == pytest.approx(result[name]["input_images_per_second"] / 0.5, rel=0.01)
    other.write_text("import sys; sys.exit(3)")
    with pytest.raises(RunFailed, match="ended with 3"):
        benchmark.main([*SMALL, *images, *command])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps"),
        (["skip=null"], "skip"),
        (["--against", "no-such-program file"], "no-such-program is no program here"),
        (["--against", "python 'file"], "No closing quotation"),
        (["--against", " "], "--against"),
        (["--sweep", "model.depth=8", "skip.end=7"], "model.depth is 8"),
        (["--input-only", "--against", "true", "data.train=clutter"], "data.train"),
        (["no/such.yaml"], "no/such.yaml"),
        (["model.deptg=3"], "model.depth"),
        (["--bogus"], "--bogus"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, said, capsys):
    from skipvit.log import run_command

    assert run_command(benchmark.main, arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_a_prediction_says_that_it_is_one(capsys):
    benchmark.main(["--predict", "data.batch_size=128"])
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["predicted"] is True
    assert "PREDICTED" in table[0]
    assert "not run on Ascend" in table[0]
    recipe = config.from_dict({"model": {"num_classes": 1000}})
    first = result["rows"][0]
    assert (first["start"], first["end"], first["kept"]) == (3, 11, 88)
    dense, skip = (cost.predict_910a(recipe.model, spans, 128).images_per_second for spans in ((), recipe.skip))
    assert first["speed_up"] == pytest.approx(skip / dense, abs=1e-3)
    by_span = {(row["start"], row["end"], row["kept"]): row["speed_up"] for row in result["rows"]}
    assert by_span[3, 11, 95] < by_span[3, 11, 88]
