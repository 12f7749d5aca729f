"""The training step against the NumPy reference, and what it does with gradients that overflow."""

import functools

import mindspore as ms
import numpy as np
import pytest
import reference
from mindspore import Tensor, ops
from reference import Span

from skipvit import config, model, optim, runtime
from skipvit import step as steps

# Axes that meet differ in length, so that none can be taken for another.
BATCH, IMAGE_SIZE, PATCH_SIZE, NUM_HEADS, WIDTH, DEPTH, NUM_CLASSES = 8, 12, 4, 2, 14, 2, 11
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SPANS = [Span(1, 2, 5)]
RATE = 1e-2
# An epsilon as large as the gradients makes AdamW's update follow their size, and not their sign alone, which for
# the vanishing gradient of a key's bias is chance.
OPTIM = {"weight_decay": 0.1, "epsilon": 3e-2, "ema_decay": 0.9, "clip_norm": 2.5}
# Scores are about 1/9, of which float16 has three digits.
FLOAT16_MARGIN = 2e-3

PARAMETERS = reference.init(
    0,
    image_size=IMAGE_SIZE,
    patch_size=PATCH_SIZE,
    embed_dim=WIDTH,
    depth=DEPTH,
    num_classes=NUM_CLASSES,
)
UNDECAYED = [name for name, value in PARAMETERS.items() if value.ndim == 1] + ["cls_token", "pos_embed"]


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled(graph_mode):
    yield
    compiled.cache_clear()


def recipe_of(precision="fp32", of_optim=(), start=1, end=2, **of_model):
    return config.from_dict(
        {
            "model": {
                "name": "skipvit_small_patch16_224",
                "num_classes": NUM_CLASSES,
                "image_size": IMAGE_SIZE,
                "patch_size": PATCH_SIZE,
                "embed_dim": WIDTH,
                "depth": DEPTH,
                "num_heads": NUM_HEADS,
                **of_model,
            },
            "skip": {"start": start, "end": end, "keep_ratio": 0.5},
            "data": {"mean": MEAN, "std": STD},
            "optim": {**OPTIM, **dict(of_optim)},
            "train": {"precision": precision},
        }
    )


class Run:
    """A training step with its state as it was before any step, to begin again from without compiling anew."""

    def __init__(self, precision="fp32", dropout=0.0, drop_path=0.0, **of_optim):
        recipe = recipe_of(precision, of_optim, dropout=dropout, drop_path=drop_path)
        net = model.VisionTransformer(recipe.model, recipe.skip, runtime.compute_dtype(precision))
        own = net.parameters_dict()
        assert set(own) == set(PARAMETERS)
        for name, value in PARAMETERS.items():
            own[name].set_data(Tensor(value.astype(np.float32)))
        self.step = steps.TrainStep(net, recipe)
        self.parameters = {parameter.name: parameter for parameter in self.step.get_parameters()}
        self.initial = self.state()

    def state(self):
        """Every parameter's value by name."""
        return {name: parameter.asnumpy().copy() for name, parameter in self.parameters.items()}

    def set(self, name, value):
        """In place: set_data would part the parameter from what a compiled graph with branches holds of it."""
        parameter = self.parameters[name]
        ops.assign(parameter, Tensor(np.asarray(value, parameter.asnumpy().dtype), parameter.dtype))

    def begin_again(self):
        for name, value in self.initial.items():
            self.set(name, value)
        return self

    def __call__(self, images, targets, *randomness, rate=RATE):
        """One step; its loss."""
        inputs = (images, targets, np.full(1, rate, np.float32), *randomness)
        return float(self.step(*(Tensor(value) for value in inputs)).asnumpy())


@functools.cache
def compiled(kind):
    """Runs that several tests share."""
    return {
        "single": lambda: Run(),
        "accumulating": lambda: Run(accumulate_steps=2, drop_path=0.2, clip_norm=1e3),
        "half": lambda: Run("fp16"),
        "half_accumulating": lambda: Run("fp16", accumulate_steps=2),
        "random": lambda: Run(drop_path=0.2, dropout=0.1),
    }[kind]()


def run_of(kind):
    return compiled(kind).begin_again()


def batch(seed, size=BATCH):
    """Bytes and soft targets of rows that add up to 1."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (size, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    targets = generator.random((size, NUM_CLASSES)) ** 4
    return images, (targets / targets.sum(axis=1, keepdims=True)).astype(np.float32)


def drop_path_factors(seed, size=BATCH):
    return np.random.default_rng(seed).choice([0.0, 1.25], size=(DEPTH, 2, size), p=[0.2, 0.8]).astype(np.float32)


class ReferenceRun:
    """The same by the reference."""

    def __init__(self, clip_norm=OPTIM["clip_norm"], margin=1e-5):
        self.parameters, self.state, self.clip_norm = PARAMETERS, None, clip_norm
        self.margin = margin  # that the choice of tokens needs, to be the same in the precision it is held against

    def gradients(self, images, targets, drop_path=None):
        """Loss and gradients, not clipped."""
        normal = (images / 255 - np.reshape(MEAN, (1, 3, 1, 1))) / np.reshape(STD, (1, 3, 1, 1))
        sizes = {"patch_size": PATCH_SIZE, "num_heads": NUM_HEADS}
        result = reference.forward(self.parameters, normal, spans=SPANS, drop_path=drop_path, **sizes)
        assert result.spans[0].margin.min() > self.margin, "a near tie: choose other images"
        d_logits = reference.cross_entropy_backward(result.logits, targets)
        gradients = reference.backward(self.parameters, d_logits, result)
        return reference.cross_entropy(result.logits, targets), gradients

    def update(self, gradients, rate=RATE):
        self.parameters, self.state = reference.adamw(
            self.parameters,
            gradients,
            self.state,
            learning_rate=rate,
            weight_decay=OPTIM["weight_decay"],
            undecayed=UNDECAYED,
            epsilon=OPTIM["epsilon"],
            clip_norm=self.clip_norm,
        )

    def __call__(self, images, targets, drop_path=None, rate=RATE):
        loss, gradients = self.gradients(images, targets, drop_path)
        self.update(gradients, rate)
        return loss


def assert_weights(state, wanted, share, moved_by=RATE):
    """Weights equal to a share of how far an update may move them, and float32's rounding of values about 3."""
    for name, value in wanted.items():
        np.testing.assert_allclose(state[name], value, rtol=0, atol=share * moved_by + 1e-6, err_msg=name)


def assert_equal_states(one, other, names=None):
    assert set(one) == set(other)
    for name in names or one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def trained(state):
    """Names of what an update changes."""
    return [name for name in state if not name.startswith(("state.", "accumulated."))]


# ----------------------------------------------------------------- parity


def test_normalize_is_the_usual_one():
    images, _ = batch(0)
    normal = steps.Normalize(MEAN, STD)(Tensor(images))
    assert normal.dtype == ms.float32
    for channel in range(3):
        expected = (images[:, channel] / 255 - MEAN[channel]) / STD[channel]
        np.testing.assert_allclose(normal.asnumpy()[:, channel], expected, rtol=0, atol=2e-6)


def test_one_step_is_the_reference_s():
    run, expected = run_of("single"), ReferenceRun()
    images, targets = batch(0)
    loss, gradients = expected.gradients(images, targets)
    norm = reference.global_norm(gradients)
    # More than the clip norm, but not twice that: a gradient taken for half or twice what it is comes out wrong.
    assert 1.2 < norm / OPTIM["clip_norm"] < 1.8
    expected.update(gradients)
    assert run(images, targets) == pytest.approx(loss, rel=1e-5)
    state = run.state()
    for name, gradient in gradients.items():
        clipped = gradient * OPTIM["clip_norm"] / norm
        # The first moment is a tenth of the gradient now.
        atol = 1e-3 * 0.1 * np.abs(clipped).max()
        np.testing.assert_allclose(state[f"adam_m.{name}"], 0.1 * clipped, rtol=0, atol=atol, err_msg=name)
    assert_weights(state, expected.parameters, 1e-3)
    assert max(np.abs(state[name] - run.initial[name]).max() for name in PARAMETERS) > 0.1 * RATE


def test_several_steps_are_the_reference_s():
    run, expected = run_of("single"), ReferenceRun()
    averages = dict(PARAMETERS)
    for step, rate in enumerate((RATE, RATE / 2, 2 * RATE, RATE)):
        images, targets = batch(1 + step)
        assert run(images, targets, rate=rate) == pytest.approx(expected(images, targets, rate=rate), rel=1e-4)
        decay = min(OPTIM["ema_decay"], (2 + step) / (11 + step))
        for name, value in expected.parameters.items():
            averages[name] = decay * averages[name] + (1 - decay) * value
    state = run.state()
    assert_weights(state, expected.parameters, 3e-3)
    assert_weights(state, {f"ema.{name}": value for name, value in averages.items()}, 3e-3)
    assert state["optimizer.updates"] == 4


def test_dropout_and_drop_path_come_in_their_places():
    run = compiled("random")
    images, targets = batch(0)
    kept = np.ones((DEPTH, 2, BATCH), np.float32)
    seeds = [np.random.default_rng(seed).random((1 + DEPTH, 3), np.float32) for seed in range(2)]
    losses = [
        run.begin_again()(images, targets, *randomness)
        for randomness in ((kept, seeds[0]), (kept, seeds[1]), (0 * kept, seeds[0]), (kept, seeds[0]))
    ]
    assert losses[0] == losses[3]
    assert len({round(loss, 4) for loss in losses}) == 3
    plain = ReferenceRun().gradients(images, targets)[0]
    assert losses[0] != pytest.approx(plain, rel=1e-3)


# ----------------------------------------------------------------- accumulation


def test_two_halves_are_one_batch():
    """The mean of equal halves' mean gradients is the whole's, which the reference takes in one; float32 rounds.

    Gradients below the clip norm stay as they are, and drop path's factors go to the blocks.
    """
    run, expected = run_of("accumulating"), ReferenceRun(clip_norm=None)
    for update in range(2):
        images, targets = batch(10 + update, 2 * BATCH)
        factors = drop_path_factors(update, 2 * BATCH)
        halves = (slice(0, BATCH), slice(BATCH, None))
        losses = [run(images[half], targets[half], factors[:, :, half]) for half in halves]
        without = expected.gradients(images, targets)[0]
        loss = expected(images, targets, factors)
        assert abs(loss - without) > 5e-3 * loss, "drop path has changed nothing"
        assert np.mean(losses) == pytest.approx(loss, rel=1e-4)
        assert_weights(run.state(), expected.parameters, 1e-3)
        assert run.state()["optimizer.updates"] == 1 + update


def test_the_accumulated_gradients_wait_and_are_cleared():
    run = run_of("accumulating")
    accumulated = [name for name in run.initial if name.startswith("accumulated.")]
    assert sorted(accumulated) == sorted(f"accumulated.{name}" for name in PARAMETERS)
    images, targets = batch(13)
    factors = drop_path_factors(2)
    run(images, targets, factors)
    waiting = run.state()
    assert_equal_states(waiting, run.initial, trained(waiting))
    assert waiting["state.waiting"] == 1
    _, gradients = ReferenceRun().gradients(images, targets, factors)
    for name, gradient in gradients.items():
        atol = 1e-3 * np.abs(gradient).max()
        np.testing.assert_allclose(waiting[f"accumulated.{name}"], gradient / 2, rtol=0, atol=atol, err_msg=name)
    run(*batch(14), factors)
    done = run.state()
    assert done["state.waiting"] == 0
    for name in accumulated:
        assert not done[name].any(), name
    assert (done["head.weight"] != waiting["head.weight"]).any()


# ----------------------------------------------------------------- repeatability and state


@pytest.mark.parametrize("kind", ["single", "random", "half"])
def test_two_runs_are_bitwise_equal(kind):
    randomness = ()
    if kind == "random":
        randomness = (drop_path_factors(3), np.random.default_rng(5).random((1 + DEPTH, 3), np.float32))
    run = compiled(kind)
    losses, states = [], []
    for _ in range(2):
        run.begin_again()
        losses.append([run(*batch(step), *randomness) for step in range(3)])
        states.append(run.state())
    assert losses[0] == losses[1]
    assert_equal_states(*states)
    assert states[0]["optimizer.updates"] > 0


@pytest.mark.slow
def test_two_steps_compiled_apart_are_bitwise_equal():
    states = []
    for run in (run_of("single"), Run()):
        for step in range(2):
            run(*batch(step))
        states.append(run.state())
    assert_equal_states(*states)


def test_blocks_compiled_once_are_blocks_compiled_one_by_one(monkeypatch):
    recipe = recipe_of(start=2, end=4, depth=5, gelu="sigmoid")

    def numbers():
        """Of two steps of one size, two of another, and of the model alone with a third: each is a graph."""
        net = model.VisionTransformer(recipe.model, recipe.skip)
        step = steps.TrainStep(net, recipe)
        rate = Tensor(np.full(1, RATE, np.float32))
        batches = [batch(seed, size) for seed, size in enumerate((BATCH, BATCH, BATCH // 2, BATCH // 2))]
        losses = [float(step(*(Tensor(value) for value in inputs), rate).asnumpy()) for inputs in batches]
        logits = net(Tensor(np.linspace(-1, 1, 3 * 3 * IMAGE_SIZE**2, dtype=np.float32).reshape(3, 3, 12, 12)))
        assert not any(hasattr(block, "cell_init_args") for block in net.blocks)
        return losses, logits.asnumpy(), {item.name: item.asnumpy() for item in step.get_parameters()}

    once = numbers()
    monkeypatch.setattr(runtime, "compile_sharing", lambda cells, compile_graph: compile_graph())
    one_by_one = numbers()
    assert once[0] == one_by_one[0]
    np.testing.assert_array_equal(once[1], one_by_one[1])
    assert_equal_states(once[2], one_by_one[2])


def test_a_step_with_branches_compiles_its_blocks_one_by_one(monkeypatch):
    """Shared, they took each other's shapes in one compilation of some ten, as the branches' sides run in threads."""
    shared = []

    monkeypatch.setattr(runtime, "compile_sharing", lambda cells, compile_graph: shared.append(len(list(cells))))
    for kind in ({}, {"precision": "fp16"}, {"accumulate_steps": 2}):
        Run(**kind).step.compile()
    assert shared == [DEPTH, 0, 0]


@pytest.mark.skipif("policy" not in runtime._parameters_of_lazy_inline(), reason="this MindSpore shares no blocks")
def test_a_step_that_cannot_share_its_blocks_is_compiled_without(monkeypatch, tmp_path):
    """MindSpore fails so at random; here an operator that no shape fits stands in the graph as long as they share."""
    monkeypatch.chdir(tmp_path)  # it leaves what it failed at in the working directory
    compile_graph, shared = ms.nn.Cell.compile, []

    def compile_or_fail(cell, *inputs):
        shared.append(all(hasattr(block, "cell_init_args") for block in cell.loss.net.blocks))
        with monkeypatch.context() as patch:
            if shared[-1]:
                patch.setattr(cell.loss, "log_softmax", ops.LogSoftmax(7))
            compile_graph(cell, *inputs)

    monkeypatch.setattr(ms.nn.Cell, "compile", compile_or_fail)
    run, images, targets = Run(), *batch(0)
    loss = run(images, targets)
    assert shared == [True, False]
    assert loss == pytest.approx(ReferenceRun().gradients(images, targets)[0], rel=1e-4)
    with pytest.raises(ValueError, match="broadcast"):  # what is wrong with the graph itself
        run(images, targets[:, 1:])


@pytest.mark.parametrize("kind", ["single", "half_accumulating"])
def test_every_parameter_of_the_step_has_a_name_of_its_own(kind):
    run = compiled(kind)
    names = [parameter.name for parameter in run.step.get_parameters()]
    assert len(names) == len(set(names))
    kinds = ["", "adam_m.", "adam_v.", "ema.", *(["accumulated."] if "accumulating" in kind else [])]
    optimizer = {f"optimizer.{name}" for name in ("updates", "beta1_power", "beta2_power")}
    counters = {name for name in names if name.startswith("state.")}
    assert set(names) == {f"{kind}{name}" for kind in kinds for name in PARAMETERS} | optimizer | counters
    assert {"state.loss_scale", "state.loss_scale_counter"} <= counters


def test_the_log_s_sums_begin_anew_when_they_are_read():
    run = run_of("single")
    losses = [run(*batch(step)) for step in range(3)]
    assert run.step.read_sums() == (pytest.approx(sum(losses), rel=1e-6), 3, 0, 0)
    last = run(*batch(3))
    assert run.step.read_sums() == (pytest.approx(last, rel=1e-6), 1, 0, 0)
    assert run.step.read_sums() == (0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["single", "half", "half_accumulating"])
def test_reading_the_sums_does_not_touch_the_training(kind):
    run = run_of(kind)
    unread = [run(*batch(step)) for step in range(4)] + [run.state()]
    run.begin_again()
    read, sums = [], []
    for step in range(4):
        read.append(run(*batch(step)))
        sums.append(run.step.read_sums().loss)
    read.append(run.state())
    assert read[:-1] == unread[:-1] == pytest.approx(sums, rel=1e-6)
    assert_equal_states(read[-1], unread[-1], trained(read[-1]))
    assert read[-1]["optimizer.updates"] > 1


def test_eight_images_are_learnt_by_heart():
    run = run_of("single")
    images, _ = batch(20)
    targets = np.eye(NUM_CLASSES, dtype=np.float32)[np.arange(BATCH)]
    losses = [run(images, targets, rate=3e-3) for _ in range(250)]
    assert losses[0] > 1.0
    assert losses[-1] < 0.05


# ----------------------------------------------------------------- float16 and overflow


def half_run(kind="half", loss_scale=2.0**10):
    run = run_of(kind)
    run.set("state.loss_scale", loss_scale)
    return run


@pytest.mark.parametrize("loss_scale", [2.0**4, 2.0**13])
def test_the_loss_scale_is_undone_before_clipping(loss_scale):
    run, expected = half_run(loss_scale=loss_scale), ReferenceRun(margin=FLOAT16_MARGIN)
    images, targets = batch(0)
    loss, gradients = expected.gradients(images, targets)
    assert run(images, targets) == pytest.approx(loss, rel=1e-2)
    expected.update(gradients)
    state = run.state()
    for name, value in expected.state.first.items():
        distance = np.linalg.norm(state[f"adam_m.{name}"] - value)
        assert distance < 5e-2 * np.linalg.norm(value), name
    assert_weights(state, expected.parameters, 0.1)
    assert run.step.read_loss_scale() == loss_scale
    assert run.step.read_sums().overflows == 0


def test_an_overflow_skips_the_update_and_halves_the_scale():
    run = half_run()
    run(*batch(0))
    before = run.state()
    run.set("state.loss_scale", 2.0**40)
    loss = run(*batch(1))
    after = run.state()
    assert_equal_states(after, before, trained(before))
    assert after["optimizer.updates"] == 1
    assert run.step.read_loss_scale() == 2.0**39
    # The loss itself was finite, and is told unscaled.
    assert loss == pytest.approx(half_run()(*batch(1)), rel=0.2)


def test_overflows_are_counted_until_the_log_reads_them():
    run = half_run(loss_scale=2.0**40)
    losses = [run(*batch(step)) for step in range(2)]
    run.set("state.loss_scale", 2.0**10)
    losses.append(run(*batch(2)))
    assert run.step.read_sums() == (pytest.approx(sum(losses), rel=1e-5), 3, 2, 0)
    assert run.step.read_sums() == (0, 0, 0, 0)
    assert run.state()["optimizer.updates"] == 1


@pytest.mark.parametrize("kind", ["half", "half_accumulating"])
def test_an_overflow_in_the_forward_pass_is_no_loss(kind):
    """Weights beyond float16's range give no logits: the step is skipped and its loss not counted."""
    run = half_run(kind)
    sound = run.state()["patch_embed.proj.weight"].copy()
    losses = []
    for step in range(4):
        run.set("patch_embed.proj.weight", sound + 1e6 if step in (1, 2) else run.state()["patch_embed.proj.weight"])
        before = run.state()
        losses.append(run(*batch(step)))
        if step in (1, 2):
            assert not np.isfinite(losses[-1])
            assert_equal_states(run.state(), before, trained(before))
            assert run.step.read_loss_scale() == before["state.loss_scale"] / 2
            run.set("patch_embed.proj.weight", sound if step == 2 else before["patch_embed.proj.weight"])
    assert run.step.read_sums() == (pytest.approx(losses[0] + losses[3], rel=1e-5), 2, 2, 0)


def test_overflows_in_a_row_are_counted_beyond_a_look_and_end_with_a_sound_step():
    run = half_run(loss_scale=2.0**40)
    seen = []
    for step in range(5):
        if step in (2, 3):
            run.set("state.loss_scale", 2.0**10 if step == 2 else 2.0**40)
        run(*batch(step))
        seen.append(run.step.read_sums().overflows_in_a_row)
    assert seen == [1, 2, 0, 1, 2]


def test_training_goes_on_after_an_overflow_as_if_it_had_not_been():
    spoilt = half_run(loss_scale=2.0**40)
    spoilt(*batch(0))
    spoilt.set("state.loss_scale", 2.0**10)
    spoilt(*batch(1))
    after = spoilt.state()
    sound = half_run()
    sound(*batch(1))
    assert_equal_states(after, sound.state(), trained(after))


def test_the_scale_is_doubled_after_a_window_without_overflow():
    """And the update at which it is doubled is that of the scale its gradients were computed with."""
    images, targets = batch(0)
    run = half_run()
    loss = run(images, targets)
    wanted = run.state()
    run = half_run()
    run.set("state.loss_scale_counter", steps.LOSS_SCALE_WINDOW - 1)
    assert run(images, targets) == loss
    assert run.step.read_loss_scale() == 2.0**11
    assert_equal_states(run.state(), wanted, trained(wanted))
    assert run.state()["state.loss_scale_counter"] == 0
    run(images, targets)
    assert run.step.read_loss_scale() == 2.0**11


@pytest.mark.parametrize("spoilt", [0, 1])
def test_an_overflow_in_one_step_spoils_the_whole_update(spoilt):
    run = half_run("half_accumulating")
    for step in range(2):
        run.set("state.loss_scale", 2.0**40 if step == spoilt else 2.0**10)
        run(*batch(step))
    after = run.state()
    assert_equal_states(after, run.initial, trained(after))
    assert after["state.waiting"] == 0
    assert not any(after[name].any() for name in after if name.startswith("accumulated."))
    assert run.step.read_sums().overflows == 1
    # The next update is as if nothing had been.
    run.set("state.loss_scale", 2.0**10)
    run(*batch(2))
    run(*batch(3))
    after = run.state()
    sound = half_run("half_accumulating")
    sound(*batch(2))
    sound(*batch(3))
    assert_equal_states(after, sound.state(), trained(after))
    assert after["optimizer.updates"] == 1


def test_steps_of_one_update_may_have_different_scales():
    """Each step's gradients are brought to scale 1 before they are added."""
    run, expected = half_run("half_accumulating"), ReferenceRun(margin=FLOAT16_MARGIN)
    images, targets = batch(177, 2 * BATCH)
    run(images[:BATCH], targets[:BATCH])
    run.set("state.loss_scale", 2.0**13)
    run(images[BATCH:], targets[BATCH:])
    expected(images, targets)
    state = run.state()
    for name, value in expected.state.first.items():
        assert np.linalg.norm(state[f"adam_m.{name}"] - value) < 5e-2 * np.linalg.norm(value), name


def test_float32_does_no_scaling():
    run = run_of("single")
    run.set("state.loss_scale", 2.0**40)
    run(*batch(0))
    assert run.step.read_loss_scale() == 2.0**40
    assert run.state()["optimizer.updates"] == 1


def test_weights_that_decay_are_the_matrices():
    run = compiled("single")
    undecayed = {weight.name for weight in run.step.weights if not optim.decays(weight)}
    assert undecayed == set(UNDECAYED)
