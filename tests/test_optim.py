"""AdamW, the moving average and the schedule against NumPy."""

import dataclasses

import mindspore as ms
import numpy as np
import pytest
import reference
from mindspore import Parameter, Tensor, nn

from skipvit import model, optim
from skipvit.config import OptimConfig

# One parameter of each kind; shapes differ, so that none can be taken for another.
SHAPES = {
    "cls_token": (1, 1, 7),
    "pos_embed": (1, 5, 7),
    "patch_embed.proj.weight": (7, 3, 2, 2),
    "blocks.0.norm1.weight": (7,),
    "blocks.0.attn.qkv.weight": (21, 7),
    "blocks.0.attn.qkv.bias": (21,),
    "head.weight": (11, 7),
}
DECAYED = {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"}
UNDECAYED = sorted(set(SHAPES) - DECAYED)
STEPS = 8
RATES = 1e-2 * (1 + np.arange(STEPS)) / STEPS

pytestmark = pytest.mark.usefixtures("graph_mode")


def draw(seed, scale=1.0):
    """Values exact in float32, by name; `scale` may differ from step to step."""
    generator = np.random.default_rng(seed)
    values = {name: scale * generator.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: value.astype(np.float32).astype(np.float64) for name, value in values.items()}


def values_of(parameters):
    return {parameter.name: parameter.asnumpy().copy() for parameter in parameters}


class Update(nn.Cell):
    """The optimizer with gradients as inputs of the graph; a tuple of them would be constants, compiled anew."""

    def __init__(self, optimizer):
        super().__init__(auto_prefix=False)
        self.optimizer = optimizer

    def construct(self, rate, *gradients):
        return self.optimizer(gradients, rate)


class Run:
    """An optimizer of ours and all its parameters' values before the first update and after each."""

    def __init__(self, config, gradients):
        self.weights = [Parameter(Tensor(value.astype(np.float32)), name=name) for name, value in draw(0).items()]
        update = Update(optim.AdamW(self.weights, config))
        parameters = list(update.get_parameters())
        self.history = [values_of(parameters)]
        for step, of_step in enumerate(gradients):
            tensors = [Tensor(of_step[name].astype(np.float32)) for name in SHAPES]
            update(Tensor(RATES[step], ms.float32), *tensors)
            self.history.append(values_of(parameters))


def reference_history(config, gradients):
    parameters, state, history = draw(0), None, []
    for step, of_step in enumerate(gradients):
        parameters, state = reference.adamw(
            parameters,
            of_step,
            state,
            learning_rate=np.float64(np.float32(RATES[step])),
            weight_decay=config.weight_decay,
            undecayed=UNDECAYED,
            betas=(config.beta1, config.beta2),
            epsilon=config.epsilon,
        )
        history.append((parameters, state))
    return history


# Gradients whose size wanders, so that the moments' memory and the correction of their bias both count.
ORDINARY = [draw(1 + step, scale=10.0 ** (step % 3 - 1)) for step in range(STEPS)]
CASES = {
    "defaults": (OptimConfig(), ORDINARY),
    "decay_and_average": (OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.95, ema_decay=0.4), ORDINARY),
    # Where epsilon is as large as the gradients it matters that it is added after the bias is corrected.
    "tiny_gradients": (OptimConfig(epsilon=1e-8), [draw(1 + step, scale=1e-8) for step in range(4)]),
    "large_epsilon": (OptimConfig(epsilon=0.1), [draw(1 + step, scale=0.1) for step in range(4)]),
}


@pytest.fixture(scope="module")
def runs():
    return {case: Run(config, gradients) for case, (config, gradients) in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_updates_are_pytorch_s_adamw(case, runs):
    config, gradients = CASES[case]
    ours = runs[case].history
    for step, (parameters, state) in enumerate(reference_history(config, gradients)):
        for name, value in parameters.items():
            # float32 rounds weights of size 1 to 6e-8, and the second moment's bias, 0.001 at first, to 6e-5 of itself;
            # an update is at most about the rate.
            atol = 2e-4 * RATES[step] + 1e-6
            np.testing.assert_allclose(ours[1 + step][name], value, rtol=0, atol=atol, err_msg=f"{name}, step {step}")
            for moment, wanted in (("adam_m", state.first[name]), ("adam_v", state.second[name])):
                # 1 - beta2 is 0.001 less float32's rounding of beta2.
                atol = 5e-5 * np.abs(wanted).max()
                np.testing.assert_allclose(ours[1 + step][f"{moment}.{name}"], wanted, rtol=0, atol=atol)
        # The updates are large enough to be compared at all.
        moved = max(np.abs(ours[1 + step][name] - ours[step][name]).max() for name in SHAPES)
        assert moved > 0.05 * RATES[step]


def test_the_moving_average_is_short_at_first(runs):
    """decay = min(configured, (1 + n) / (10 + n)) at the n-th update, applied to the weights after it."""
    config = CASES["decay_and_average"][0]
    ours = runs["decay_and_average"].history
    averages = {name: ours[0][name].astype(np.float64) for name in SHAPES}
    decays = []
    for update in range(1, 1 + STEPS):
        decays.append(min(config.ema_decay, (1 + update) / (10 + update)))
        for name in SHAPES:
            averages[name] = decays[-1] * averages[name] + (1 - decays[-1]) * ours[update][name]
            np.testing.assert_allclose(ours[update][f"ema.{name}"], averages[name], rtol=0, atol=2e-6)
    assert decays[0] < config.ema_decay == decays[-1], "both sides of the minimum must count"
    for name in SHAPES:
        np.testing.assert_array_equal(ours[0][f"ema.{name}"], ours[0][name])
        assert np.abs(ours[-1][f"ema.{name}"] - ours[-1][name]).max() > 1e-3


def test_the_state_has_the_names_that_checkpoints_hold(runs):
    plain = {f"{kind}{name}" for name in SHAPES for kind in ("", "adam_m.", "adam_v.")}
    plain |= {"optimizer.updates", "optimizer.beta1_power", "optimizer.beta2_power"}
    assert set(runs["defaults"].history[0]) == plain
    assert set(runs["decay_and_average"].history[0]) == plain | {f"ema.{name}" for name in SHAPES}
    for case, (config, gradients) in CASES.items():
        last = runs[case].history[-1]
        assert last["optimizer.updates"] == len(gradients)
        np.testing.assert_allclose(last["optimizer.beta1_power"], config.beta1 ** len(gradients), rtol=1e-6)
        np.testing.assert_allclose(last["optimizer.beta2_power"], config.beta2 ** len(gradients), rtol=1e-6)


def test_where_there_is_no_gradient_matrices_alone_shrink():
    config = OptimConfig(weight_decay=0.5)
    zeros = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    before, after = Run(config, [zeros]).history
    for name in SHAPES:
        factor = np.float32(1 - RATES[0] * 0.5) if name in DECAYED else 1
        np.testing.assert_allclose(after[name], before[name] * factor, rtol=1e-7 if name in DECAYED else 0)


def test_decay_is_for_the_matrices_of_a_whole_model():
    net = model.create_model(
        "skipvit_small_patch16_224",
        11,
        {"start": 1, "end": 2, "keep_ratio": 0.5},
        image_size=6,
        patch_size=2,
        embed_dim=14,
        depth=2,
        num_heads=2,
    )
    block = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    expected = {"patch_embed.proj.weight", "head.weight", *(f"blocks.{i}.{name}" for i in range(2) for name in block)}
    assert {parameter.name for parameter in net.trainable_params() if optim.decays(parameter)} == expected


# ----------------------------------------------------------------- the schedule

SCHEDULE = OptimConfig(learning_rate=1e-3, warmup_epochs=4, warmup_learning_rate=1e-5, min_learning_rate=1e-4)
STEPS_PER_EPOCH, EPOCHS = 7, 20
WARMUP_STEPS, TOTAL_STEPS = 28, 140


def rate(step, config=SCHEDULE, images_an_update=64):
    return optim.learning_rate(config, step, STEPS_PER_EPOCH, EPOCHS, images_an_update)


def test_the_rate_at_the_corners_of_the_schedule():
    assert rate(0) == pytest.approx(1e-5)
    assert rate(WARMUP_STEPS // 2) == pytest.approx((1e-5 + 1e-3) / 2)
    assert rate(WARMUP_STEPS) == pytest.approx(1e-3)
    assert rate((WARMUP_STEPS + TOTAL_STEPS) // 2) == pytest.approx((1e-3 + 1e-4) / 2)
    # The cosine is nearly flat at its end: the last step is as good as there.
    assert 1e-4 < rate(TOTAL_STEPS - 1) < 1.01e-4
    assert rate(TOTAL_STEPS) == pytest.approx(1e-4)
    assert rate(2 * TOTAL_STEPS) == pytest.approx(1e-4)


def test_the_rate_of_every_step_is_the_reference_s():
    ours = [rate(step) for step in range(TOTAL_STEPS + 3)]
    expected = [
        reference.cosine_learning_rate(
            step, peak=1e-3, total_steps=TOTAL_STEPS, warmup_steps=WARMUP_STEPS, floor=1e-4, start=1e-5
        )
        for step in range(TOTAL_STEPS + 3)
    ]
    np.testing.assert_allclose(ours, expected, rtol=1e-12)
    assert (np.diff(ours[: WARMUP_STEPS + 1]) > 0).all()
    assert (np.diff(ours[WARMUP_STEPS : TOTAL_STEPS + 1]) < 0).all()


def test_a_schedule_without_warmup_starts_at_the_peak():
    assert rate(0, dataclasses.replace(SCHEDULE, warmup_epochs=0)) == pytest.approx(1e-3)


def test_warmup_may_last_a_part_of_an_epoch():
    config = dataclasses.replace(SCHEDULE, warmup_epochs=0.5)  # three steps and a half
    np.testing.assert_allclose([rate(step, config) for step in range(4)], 1e-5 + 9.9e-4 * np.arange(4) / 3.5)
    assert 0.99e-3 < rate(4, config) < 1e-3


def test_the_whole_schedule_scales_with_the_images_an_update():
    config = dataclasses.replace(SCHEDULE, reference_batch_size=512)
    for step in (0, 5, WARMUP_STEPS, 77, TOTAL_STEPS):
        assert rate(step, config, 512) == pytest.approx(rate(step))
        assert rate(step, config, 128) == pytest.approx(rate(step) / 4)
        assert rate(step, config, 2048) == pytest.approx(rate(step) * 4)
        # Without a reference the images do not matter.
        assert rate(step, SCHEDULE, 2048) == rate(step)
