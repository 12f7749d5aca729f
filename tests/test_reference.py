"""The reference is right: forward against a ViT written another way, gradients against differences."""

import numpy as np
import pytest
import reference
from reference import Span
from scipy.special import erf

pytestmark = pytest.mark.slow  # the same on every MindSpore: not in the fast part for 2.0.0

# Axes that meet differ in length, so that none can be taken for another.
BATCH, GRID, PATCH_SIZE, NUM_HEADS, WIDTH, DEPTH, NUM_CLASSES = 3, (5, 7), 2, 2, 14, 5, 11
PATCH_COUNT = GRID[0] * GRID[1]
IMAGE_SIZE = (GRID[0] * PATCH_SIZE, GRID[1] * PATCH_SIZE)
MODEL = {"patch_size": PATCH_SIZE, "num_heads": NUM_HEADS}


@pytest.fixture(scope="module")
def parameters():
    return reference.init(
        0,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_classes=NUM_CLASSES,
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((BATCH, 3, *IMAGE_SIZE))


@pytest.fixture(scope="module")
def labels():
    labels = np.random.default_rng(2).random((BATCH, NUM_CLASSES))
    return labels / labels.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def drop_path():
    factors = np.random.default_rng(3).choice([0.0, 1.25], size=(DEPTH, 2, BATCH), p=[0.2, 0.8])
    assert (factors == 0).any(), "nothing is dropped: choose another seed"
    return factors


RANDOM_SCORE = np.random.default_rng(4).random((BATCH, PATCH_COUNT))

CASES = {
    "dense": [],
    "rejoin": [Span(2, 4, 17)],
    "rejoin_before_the_norm": [Span(1, DEPTH, 13, score="key_norm")],
    "drop": [Span(2, DEPTH, 17, "drop", "mean_attention")],
    "fuse": [Span(2, DEPTH, 17, "fuse", "cls_attention_value")],
    "fuse_normalised": [Span(2, DEPTH, 17, "fuse", fuse_normalised=True)],
    "rejoin_twice": [Span(1, 2, 17), Span(3, 5, 13, score="key_norm")],
    "rejoin_twice_adjoining": [Span(1, 3, 17), Span(3, 4, 13, score=RANDOM_SCORE)],
    "drop_twice": [Span(1, DEPTH, 23, "drop"), Span(3, DEPTH, 11, "drop")],
    "fuse_then_rejoin_then_fuse": [
        Span(1, DEPTH, 29, "fuse"),
        Span(2, 3, 19, score="mean_attention"),
        Span(4, DEPTH, 13, "fuse"),
    ],
}
every_case = pytest.mark.parametrize("spans", CASES.values(), ids=CASES.keys())


def frozen(spans, result):
    """The spans with scores, choices and fuse weights as constants, as the gradient assumes."""
    return [
        span._replace(score=np.where(np.isfinite(chosen.score), chosen.score, 0.0), kept=chosen.kept)
        for span, chosen in zip(spans, result.spans)
    ]


def masked_vit(parameters, images, drop_path=None, active=None):
    """Logits and features of a ViT written differently: loops, full token grid, absent tokens masked.

    `active[i]` (B, 1+N) are the tokens that take part in block i: others are no keys and are not changed.
    """
    batch = len(images)
    head_width = WIDTH // NUM_HEADS

    def norm(x, name):
        deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
        return (x - x.mean(axis=-1, keepdims=True)) / deviation * parameters[name + ".weight"] + parameters[
            name + ".bias"
        ]

    def dense(x, name):
        return np.einsum("...i,oi->...o", x, parameters[name + ".weight"]) + parameters[name + ".bias"]

    tokens = np.zeros((batch, 1 + PATCH_COUNT, WIDTH))
    tokens[:, 0] = parameters["cls_token"][0, 0]
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            y, x = row * PATCH_SIZE, column * PATCH_SIZE
            patch = images[:, :, y : y + PATCH_SIZE, x : x + PATCH_SIZE]
            tokens[:, 1 + row * GRID[1] + column] = (
                np.einsum("bcyx,dcyx->bd", patch, parameters["patch_embed.proj.weight"])
                + parameters["patch_embed.proj.bias"]
            )
    tokens = tokens + parameters["pos_embed"]
    for i in range(DEPTH):
        here = np.ones(tokens.shape[:2], bool) if active is None else active[i]
        factors = np.ones((2, batch)) if drop_path is None else drop_path[i]
        qkv = dense(norm(tokens, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        mixed = np.zeros_like(tokens)
        for h in range(NUM_HEADS):
            columns = np.arange(h * head_width, (h + 1) * head_width)
            q, k, v = (qkv[..., part * WIDTH + columns] for part in range(3))
            exponential = np.exp(np.einsum("bqd,bkd->bqk", q, k) / np.sqrt(head_width)) * here[:, None, :]
            weights = exponential / exponential.sum(axis=2, keepdims=True)
            mixed[..., h * head_width : (h + 1) * head_width] = np.einsum("bqk,bkd->bqd", weights, v)
        tokens = tokens + (factors[0][:, None] * here)[..., None] * dense(mixed, f"blocks.{i}.attn.proj")
        hidden = dense(norm(tokens, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        tokens = tokens + (factors[1][:, None] * here)[..., None] * dense(hidden, f"blocks.{i}.mlp.fc2")
    features = norm(tokens, "norm")
    return dense(features[:, 0], "head"), features


def kept_mask(kept):
    mask = np.zeros((BATCH, 1 + PATCH_COUNT), bool)
    mask[:, 0] = True
    np.put_along_axis(mask, 1 + kept, True, axis=1)
    return mask


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("fuse")])
def test_forward_equals_a_masked_vit(case, parameters, images, drop_path):
    spans = CASES[case]
    result = reference.forward(parameters, images, spans=spans, drop_path=drop_path, **MODEL)
    active = np.ones((DEPTH, BATCH, 1 + PATCH_COUNT), bool)
    for span, chosen in zip(spans, result.spans):
        end = DEPTH if span.skipped == "drop" else span.end
        active[span.start : end] &= kept_mask(chosen.kept)
    logits, features = masked_vit(parameters, images, drop_path, active)
    np.testing.assert_allclose(result.logits, logits, rtol=1e-9, atol=1e-12)
    sequence = np.concatenate([np.zeros((BATCH, 1), int), 1 + result.live], axis=1)
    expected = np.take_along_axis(features, sequence[:, :, None], axis=1)
    np.testing.assert_allclose(result.features, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("score", reference.SCORES)
def test_score_is_what_its_definition_says(score, parameters, images):
    spans = [Span(2, 4, 17, score=score)]
    result = reference.forward(parameters, images, spans=spans, **MODEL)
    saved = result.saved.blocks[1].attention
    expected = np.zeros((BATCH, PATCH_COUNT))
    for b in range(BATCH):
        for j in range(PATCH_COUNT):
            for h in range(NUM_HEADS):
                key, value = saved.key[b, h, 1 + j], saved.value[b, h, 1 + j]
                products = np.exp(saved.query[b, h] @ saved.key[b, h].T / np.sqrt(WIDTH // NUM_HEADS))
                received = (products / products.sum(axis=1, keepdims=True))[:, 1 + j]
                expected[b, j] += {
                    "cls_attention": received[0],
                    "cls_attention_value": received[0] * np.sqrt(value @ value),
                    "key_norm": np.sqrt(key @ key),
                    "mean_attention": received.mean(),
                }[score]
    np.testing.assert_allclose(result.spans[0].score, expected / NUM_HEADS, rtol=1e-12)


@every_case
def test_choice_is_the_highest_scores_ascending(spans, parameters, images):
    result = reference.forward(parameters, images, spans=spans, **MODEL)
    alive = np.full((BATCH, PATCH_COUNT), True)
    for span, chosen in zip(spans, result.spans):
        assert chosen.kept.shape == (BATCH, span.kept_count)
        assert (np.diff(chosen.kept, axis=1) > 0).all()
        assert (np.diff(chosen.skipped, axis=1) > 0).all()
        assert (np.isfinite(chosen.score) == alive).all()
        for b in range(BATCH):
            assert sorted([*chosen.kept[b], *chosen.skipped[b]]) == list(np.flatnonzero(alive[b]))
            gap = chosen.score[b, chosen.kept[b]].min() - chosen.score[b, chosen.skipped[b]].max()
            assert gap > 0
            assert gap == chosen.margin[b]
            if span.skipped != "rejoin":
                alive[b, chosen.skipped[b]] = False
    assert (result.live == np.stack([np.flatnonzero(row) for row in alive])).all()


@every_case
def test_gradients_equal_finite_differences(spans, parameters, images, labels, drop_path):
    arguments = {**MODEL, "drop_path": drop_path}
    result = reference.forward(parameters, images, spans=spans, **arguments)
    _, gradients = reference.loss_and_gradients(parameters, images, labels, spans=spans, **arguments)
    constant_spans = frozen(spans, result)
    assert gradients.keys() == parameters.keys()

    def loss_at(name, direction, step):
        moved = {**parameters, name: parameters[name] + step * direction}
        return reference.cross_entropy(
            reference.forward(moved, images, spans=constant_spans, **arguments).logits, labels
        )

    h = 2e-3  # central differences of fourth order: the error is of order h**4
    generator = np.random.default_rng(5)
    for name, gradient in gradients.items():
        assert gradient.shape == parameters[name].shape
        everywhere = generator.standard_normal(gradient.shape)
        one_entry = np.zeros(gradient.shape)
        one_entry.flat[generator.integers(gradient.size)] = 1.0
        for direction in (everywhere / np.linalg.norm(everywhere), one_entry):
            near = loss_at(name, direction, h) - loss_at(name, direction, -h)
            far = loss_at(name, direction, 2 * h) - loss_at(name, direction, -2 * h)
            slope = (gradient * direction).sum()
            assert slope == pytest.approx((8 * near - far) / (12 * h), rel=1e-6, abs=1e-10), name


@every_case
def test_every_parameter_has_a_gradient(spans, parameters, images, labels):
    _, gradients = reference.loss_and_gradients(parameters, images, labels, spans=spans, **MODEL)
    for name, gradient in gradients.items():
        if name.endswith("qkv.bias"):  # softmax does not see a constant added to all keys' products
            assert np.abs(gradient[WIDTH : 2 * WIDTH]).max() < 1e-12
            assert (gradient[:WIDTH] != 0).all()
            assert (gradient[2 * WIDTH :] != 0).all()
        else:
            assert np.isfinite(gradient).all(), name
            assert (gradient != 0).all(), name


@pytest.mark.parametrize("skipped", reference.TREATMENTS)
def test_keeping_all_is_dense(skipped, parameters, images, labels):
    spans = [Span(1, DEPTH, PATCH_COUNT, skipped)]
    dense = reference.forward(parameters, images, **MODEL)
    kept_all = reference.forward(parameters, images, spans=spans, **MODEL)
    assert (kept_all.logits == dense.logits).all()
    assert (kept_all.features == dense.features).all()
    assert (kept_all.spans[0].kept == np.arange(PATCH_COUNT)).all()
    _, expected = reference.loss_and_gradients(parameters, images, labels, **MODEL)
    _, gradients = reference.loss_and_gradients(parameters, images, labels, spans=spans, **MODEL)
    assert all((gradients[name] == expected[name]).all() for name in expected)


@every_case
def test_order_of_patches_does_not_matter(spans, parameters, images):
    """Patches moved about the image together with their positions: same logits, same tokens, moved alike."""
    order = np.random.default_rng(6).permutation(PATCH_COUNT)
    new_place = np.argsort(order)
    grid = images.reshape(BATCH, 3, GRID[0], PATCH_SIZE, GRID[1], PATCH_SIZE).transpose(0, 2, 4, 1, 3, 5)
    grid = grid.reshape(BATCH, PATCH_COUNT, 3, PATCH_SIZE, PATCH_SIZE)[:, order]
    grid = grid.reshape(BATCH, *GRID, 3, PATCH_SIZE, PATCH_SIZE).transpose(0, 3, 1, 4, 2, 5)
    positions = parameters["pos_embed"][:, np.r_[0, 1 + order]]
    moved_spans = [s if isinstance(s.score, str) else s._replace(score=s.score[:, order]) for s in spans]

    here = reference.forward(parameters, images, spans=spans, **MODEL)
    there = reference.forward(
        {**parameters, "pos_embed": positions}, grid.reshape(images.shape), spans=moved_spans, **MODEL
    )
    np.testing.assert_allclose(there.logits, here.logits, rtol=1e-9, atol=1e-12)
    for chosen, moved in zip(here.spans, there.spans):
        assert (np.sort(new_place[chosen.kept], axis=1) == moved.kept).all()
    live_order = np.argsort(new_place[here.live], axis=1)
    patches = slice(1, 1 + here.live.shape[1])
    expected = np.take_along_axis(here.features[:, patches], live_order[:, :, None], axis=1)
    np.testing.assert_allclose(there.features[:, patches], expected, rtol=1e-9, atol=1e-12)


def test_skipped_tokens_pass_the_middle_blocks_unchanged(parameters, images):
    start = 2
    result = reference.forward(parameters, images, spans=[Span(start, DEPTH, 17)], **MODEL)
    early_only = {
        name: value
        for name, value in parameters.items()
        if not (name.startswith("blocks.") and int(name.split(".")[1]) >= start)
    }
    early = reference.forward(early_only, images, **MODEL)
    skipped = 1 + result.spans[0].skipped[:, :, None]
    np.testing.assert_array_equal(
        np.take_along_axis(result.features, skipped, axis=1),
        np.take_along_axis(early.features, skipped, axis=1),
    )
    kept = 1 + result.spans[0].kept[:, :, None]
    changes = np.take_along_axis(result.features - early.features, kept, axis=1)
    assert (np.abs(changes).max(axis=2) > 1e-3).all()


@pytest.mark.parametrize("normalised", [False, True])
def test_fused_token_is_the_weighted_sum_placed_last(normalised, parameters, images):
    span = Span(DEPTH - 1, DEPTH, 17, "fuse", fuse_normalised=normalised)
    result = reference.forward(parameters, images, spans=[span], **MODEL)
    tokens = np.random.default_rng(7).standard_normal((BATCH, 1 + PATCH_COUNT, WIDTH))
    going_on, _ = reference.split(tokens, result.saved.routings[0])
    chosen = result.spans[0]
    assert result.features.shape == going_on.shape == (BATCH, 1 + 17 + 1, WIDTH)
    for b in range(BATCH):
        weights = chosen.score[b, chosen.skipped[b]]
        if normalised:
            weights = weights / weights.sum()
        np.testing.assert_allclose(going_on[b, -1], weights @ tokens[b, 1 + chosen.skipped[b]], rtol=1e-12)
        np.testing.assert_array_equal(going_on[b, 1:-1], tokens[b, 1 + chosen.kept[b]])
        np.testing.assert_array_equal(going_on[b, 0], tokens[b, 0])


def test_kept_overrules_the_choice_but_not_the_score(parameters, images):
    other = np.tile(np.arange(0, PATCH_COUNT, 5), (BATCH, 1))
    spans = [Span(2, 4, other.shape[1])]
    free = reference.forward(parameters, images, spans=spans, **MODEL)
    forced = reference.forward(parameters, images, spans=[spans[0]._replace(kept=other)], **MODEL)
    assert (forced.spans[0].kept == other).all()
    assert (forced.spans[0].score == free.spans[0].score).all()
    assert (forced.spans[0].margin < 0).any()
    assert np.abs(forced.logits - free.logits).max() > 1e-3
    by_mask = spans[0]._replace(score=kept_mask(other)[:, 1:].astype(float))
    assert (reference.forward(parameters, images, spans=[by_mask], **MODEL).logits == forced.logits).all()


def test_plain_tuples_are_spans(parameters, images):
    as_tuple = reference.forward(parameters, images, spans=[(2, 4, 17)], **MODEL)
    as_span = reference.forward(parameters, images, spans=[Span(2, 4, 17)], **MODEL)
    assert (as_tuple.logits == as_span.logits).all()


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([Span(0, 3, 17)], "no block before it"),
        ([Span(3, 3, 17)], "does not lie within"),
        ([Span(2, DEPTH + 1, 17)], "does not lie within"),
        ([Span(2, 4, 0)], "cannot be kept"),
        ([Span(2, 4, PATCH_COUNT + 1)], "cannot be kept"),
        ([Span(2, 4, 17, "lose")], "skipped 'lose'"),
        ([Span(2, 4, 17, score="loudness")], "score 'loudness'"),
        ([Span(1, 3, 17), Span(2, 4, 13, score=RANDOM_SCORE)], "must start from block 3 on"),
        ([Span(1, 3, 17), Span(3, 4, 13)], "must start from block 4 on"),  # block 2 is not whole
        ([Span(3, 4, 17), Span(1, 2, 13)], "must ascend"),
        ([Span(2, 4, 17, kept=np.zeros((BATCH, 3), int))], "kept is"),
    ],
)
def test_spans_without_meaning_are_refused(spans, message, parameters, images):
    with pytest.raises(ValueError, match=message):
        reference.forward(parameters, images, spans=spans, **MODEL)


def test_init_is_repeatable_exact_in_float32_and_nowhere_trivial(parameters):
    again = reference.init(
        0,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_classes=NUM_CLASSES,
    )
    for name, value in parameters.items():
        assert (value == again[name]).all()
        assert (value == value.astype(np.float32)).all()
        assert (value != 0).all()
        assert (value != 1).all()
    assert len(parameters) == 8 + 12 * DEPTH


def test_vit_small_has_its_parameter_count():
    shapes = reference.init(0, image_size=224, patch_size=16, embed_dim=384, depth=12, num_classes=1000)
    assert sum(value.size for value in shapes.values()) == 22_050_664


def test_adamw_follows_its_formula():
    parameters = {"a": np.array([1.0, -2.0]), "b": np.array([3.0])}
    gradients = {"a": np.array([0.6, 0.0]), "b": np.array([-0.8])}
    arguments = {"learning_rate": 0.1, "weight_decay": 0.5, "undecayed": ["b"], "epsilon": 0.0}
    once, state = reference.adamw(parameters, {**gradients, "a": np.array([0.6, 0.3])}, **arguments)
    # Corrected for bias the first step is the sign of the gradient.
    np.testing.assert_allclose(once["a"], [0.95 - 0.1, -1.9 - 0.1])
    np.testing.assert_allclose(once["b"], [3.0 + 0.1])
    twice, state = reference.adamw(once, {"a": np.zeros(2), "b": np.array([-0.8])}, state, **arguments)
    first_hat = 0.9 * 0.1 * 0.6 / (1 - 0.9**2)
    second_hat = 0.999 * 0.001 * 0.6**2 / (1 - 0.999**2)
    np.testing.assert_allclose(twice["a"][0], once["a"][0] * 0.95 - 0.1 * first_hat / np.sqrt(second_hat))
    assert state.step == 2
    assert parameters["a"][0] == 1.0

    # A norm of 1 clipped to 0.5 is half the gradient; a limit above the norm does nothing.
    _, clipped = reference.adamw(parameters, gradients, learning_rate=0.1, clip_norm=0.5)
    np.testing.assert_allclose(clipped.first["a"], [0.03, 0.0])
    _, unclipped = reference.adamw(parameters, gradients, learning_rate=0.1, clip_norm=2.0)
    np.testing.assert_allclose(unclipped.first["b"], [-0.08])


def test_gradients_and_adamw_lower_the_loss(parameters, images, labels):
    spans = CASES["rejoin"]
    first_loss, _ = reference.loss_and_gradients(parameters, images, labels, spans=spans, **MODEL)
    state = None
    for step in range(20):
        rate = reference.cosine_learning_rate(step, peak=1e-2, total_steps=20, warmup_steps=4, start=1e-3)
        loss, gradients = reference.loss_and_gradients(parameters, images, labels, spans=spans, **MODEL)
        parameters, state = reference.adamw(parameters, gradients, state, learning_rate=rate, clip_norm=5.0)
    entropy = -(labels * np.log(labels)).sum(axis=1).mean()
    assert entropy < loss < entropy + 0.2 * (first_loss - entropy)


def test_cosine_learning_rate_at_its_corners():
    arguments = {"peak": 1.0, "total_steps": 30, "warmup_steps": 10, "floor": 0.1, "start": 0.2}
    rates = [reference.cosine_learning_rate(step, **arguments) for step in (0, 5, 10, 20, 30, 40)]
    np.testing.assert_allclose(rates, [0.2, 0.6, 1.0, 0.55, 0.1, 0.1])
    assert reference.cosine_learning_rate(0, peak=1.0, total_steps=3) == 1.0
