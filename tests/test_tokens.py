"""The token path against NumPy: score, order, split, rejoin, each alone and all in one compiled graph."""

import mindspore as ms
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mindspore import Tensor, nn, ops

from skipvit import tokens

# Axes that meet differ in length, so that none can be taken for another.
B, H, N, HEAD_DIM, D, K = 3, 2, 13, 5, 7, 4

both_dtypes = pytest.mark.parametrize("sort_dtype", [ms.float32, ms.float16], ids=["float32", "float16"])

pytestmark = pytest.mark.usefixtures("graph_mode")


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def permutations(seed, rows, length):
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(length) for _ in range(rows)]).astype(np.int32)


def take(values, index):
    return np.take_along_axis(values, index[:, :, None], axis=1)


def assert_permutations(order):
    assert order.dtype == np.int32
    np.testing.assert_array_equal(np.sort(order, axis=1), np.tile(np.arange(order.shape[1]), (len(order), 1)))


# ----------------------------------------------------------------- score


def test_cls_attention_is_the_softmax_row_of_the_cls_query():
    query, key = normal(0, B, H, 1 + N, HEAD_DIM), normal(1, B, H, 1 + N, HEAD_DIM)
    logits = np.einsum("bhd,bhkd->bhk", query[:, :, 0].astype(np.float64), key) / np.sqrt(HEAD_DIM)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)  # over CLS and patches
    score = tokens.cls_attention(Tensor(query), Tensor(key))
    assert score.dtype == ms.float32
    np.testing.assert_allclose(score.asnumpy(), weights.mean(axis=1)[:, 1:], rtol=1e-5)


def test_cls_attention_scores_in_float32_where_the_model_computes_in_float16():
    query, key = normal(0, B, H, 1 + N, HEAD_DIM), normal(1, B, H, 1 + N, HEAD_DIM)
    half = [tensor.astype(np.float16) for tensor in (query, key)]
    score = tokens.cls_attention(*(Tensor(tensor) for tensor in half))
    expected = tokens.cls_attention(*(Tensor(tensor.astype(np.float32)) for tensor in half))
    assert score.dtype == ms.float32
    np.testing.assert_array_equal(score.asnumpy(), expected.asnumpy())


every_score = pytest.mark.parametrize("kind", reference.SCORES)


def parts_of(seed, length):
    return tuple(normal(seed + i, B, H, length, HEAD_DIM) for i in range(3))


@every_score
@pytest.mark.parametrize("lead", [1, 3])
def test_each_score_is_the_reference_s(kind, lead):
    """Over all tokens, then the patches' columns; what adds up to more than 1 is scaled down to it."""
    query, key, value = parts_of(20, lead + N)
    logits = query.astype(np.float64) @ key.swapaxes(-1, -2) / np.sqrt(HEAD_DIM)
    saved = reference.AttentionSaved(None, query, key, value, reference.softmax(logits), None)
    # The reference has the patches right behind CLS.
    expected = reference.patch_score(kind, saved, lead - 1 + N)[:, lead - 1 :]
    expected = expected / np.maximum(expected.sum(axis=1, keepdims=True), 1)
    score = tokens.score(kind, tuple(Tensor(part) for part in (query, key, value)), lead)
    assert score.dtype == ms.float32
    np.testing.assert_allclose(score.asnumpy(), expected, rtol=2e-5)


@every_score
def test_no_gradient_flows_through_the_score(kind):
    factors = Tensor(normal(2, B, N))

    def loss(query, key, value):
        score = (tokens.score(kind, (query, key, value)) * factors).sum()
        return score + 3.0 * query.sum() + 5.0 * key.sum() + 7.0 * value.sum()

    parts = [Tensor(part) for part in parts_of(0, 1 + N)]
    for gradient, factor in zip(ops.GradOperation(get_all=True)(loss)(*parts), (3, 5, 7)):
        np.testing.assert_array_equal(gradient.asnumpy(), np.full(gradient.shape, factor, np.float32))


def test_a_mass_is_at_most_1_and_in_the_same_order():
    score = np.array([[0.1, 0.2, 0.3], [10, 0, 30], [0, 0, 0]], np.float32)
    expected = [[0.1, 0.2, 0.3], [0.25, 0, 0.75], [0, 0, 0]]
    np.testing.assert_allclose(tokens.as_mass(Tensor(score)).asnumpy(), expected, rtol=1e-6)


# ----------------------------------------------------------------- order


@both_dtypes
def test_rank_orders_from_the_highest_score_down(sort_dtype):
    score = (1 + permutations(0, B, N)) / (N * N)
    order = tokens.rank(Tensor(score.astype(np.float32)), sort_dtype).asnumpy()
    assert_permutations(order)
    np.testing.assert_array_equal(order, np.argsort(-score, axis=1))


@given(score=hnp.arrays(np.float32, (B, N), elements=st.floats(0, 1, width=16)))
@settings(max_examples=50)
def test_rank_is_a_permutation_whatever_the_scores(score):
    order = tokens.rank(Tensor(score), ms.float32).asnumpy()
    assert_permutations(order)
    assert (np.diff(np.take_along_axis(score, order, axis=1), axis=1) <= 0).all()


def test_rank_tells_apart_in_float16_scores_that_differ_by_one_percent():
    # Where attention gathers on a few tokens the others have a thousandth of 1/N: as float16 itself cannot hold
    # (its steps are 6e-8 there, of 1e-6), times N it can.
    steps = permutations(3, 2, 196)
    for least in (1e-6, 1e-4, 1 / 196 / 2):
        score = (least * 1.01**steps).astype(np.float32)
        order = tokens.rank(Tensor(score), ms.float16).asnumpy()
        np.testing.assert_array_equal(order, np.argsort(-score, axis=1), err_msg=f"scores from {least}")


@both_dtypes
def test_equal_scores_fall_the_same_way_each_time(sort_dtype):
    score = np.repeat(normal(4, B, 4) ** 2, (5, 1, 3, 4), axis=1)  # (B, 13)
    for tied in (score, np.full((B, N), 1 / N, np.float32), np.zeros((B, N), np.float32)):
        orders = [tokens.rank(Tensor(tied), sort_dtype).asnumpy() for _ in range(3)]
        assert_permutations(orders[0])
        np.testing.assert_array_equal(orders[0], orders[1])
        np.testing.assert_array_equal(orders[0], orders[2])
        assert (np.diff(np.take_along_axis(tied, orders[0], axis=1), axis=1) <= 0).all()


@both_dtypes
@pytest.mark.parametrize("length", [1, N, 196, 2048])
def test_inverse_undoes_a_permutation(length, sort_dtype):
    order = permutations(5, 2, length)
    positions = tokens.inverse(Tensor(order), sort_dtype).asnumpy()
    assert_permutations(positions)
    np.testing.assert_array_equal(positions, np.argsort(order, axis=1))


@both_dtypes
def test_ascending_sorts_indices(sort_dtype):
    index = permutations(6, B, 196)[:, :K]
    result = tokens.ascending(Tensor(index), sort_dtype).asnumpy()
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, np.sort(index, axis=1))


# ----------------------------------------------------------------- split and rejoin


@pytest.mark.parametrize("length", [1, K, N + 5])
def test_gather_picks_rows_of_each_image(length):
    values, index = normal(7, B, N, D), np.random.default_rng(8).integers(0, N, (B, length)).astype(np.int32)
    np.testing.assert_array_equal(tokens.gather(Tensor(values), Tensor(index)).asnumpy(), take(values, index))


class Path(nn.Cell):
    """Score to restored tokens in one graph, with the gradient of the split tokens for two given ones."""

    def __init__(self, kept_count, sort_dtype):
        super().__init__()
        self.split, self.sort_dtype = tokens.Split(kept_count), sort_dtype
        self.vjp = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, values, score, d_kept, d_skipped):
        order = tokens.rank(score, self.sort_dtype)
        positions = tokens.inverse(order, self.sort_dtype)
        kept, skipped = self.split(values, order, positions)
        restored = tokens.image_order(tokens.rejoin(kept, skipped), positions)
        gradient = self.vjp(self.split)(values, order, positions, (d_kept, d_skipped))[0]
        return order, kept, skipped, restored, gradient


@pytest.fixture(
    scope="module", params=[(1, ms.float32), (K, ms.float16), (K, ms.float32), (N - 1, ms.float32)], ids=str
)
def path(request):
    """Inputs and outputs of a `Path`, as arrays."""
    kept_count, sort_dtype = request.param
    inputs = {
        "values": normal(9, B, 1 + N, D),
        "score": ((1 + permutations(10, B, N)) / N**2).astype(np.float32),
        "d_kept": normal(11, B, 1 + kept_count, D),
        "d_skipped": normal(12, B, N - kept_count, D),
    }
    outputs = Path(kept_count, sort_dtype)(*(Tensor(value) for value in inputs.values()))
    names = ("order", "kept", "skipped", "restored", "gradient")
    return {"kept_count": kept_count, **inputs, **{name: out.asnumpy() for name, out in zip(names, outputs)}}


def test_split_keeps_cls_first_then_the_highest_scores(path):
    order, kept_count = np.argsort(-path["score"], axis=1), path["kept_count"]
    np.testing.assert_array_equal(path["order"], order)
    np.testing.assert_array_equal(path["kept"][:, 0], path["values"][:, 0])
    np.testing.assert_array_equal(path["kept"][:, 1:], take(path["values"][:, 1:], order[:, :kept_count]))
    np.testing.assert_array_equal(path["skipped"], take(path["values"][:, 1:], order[:, kept_count:]))


def test_kept_and_skipped_are_a_permutation_of_the_tokens(path):
    together = np.concatenate([path["kept"], path["skipped"]], axis=1)
    assert together.shape == path["values"].shape
    for image, split in zip(path["values"], together):
        np.testing.assert_array_equal(sorted(split.tolist()), sorted(image.tolist()))


def test_image_order_undoes_the_split(path):
    np.testing.assert_array_equal(path["restored"], path["values"])


def test_the_gradient_of_split_is_the_scatter_it_stands_for(path):
    expected = np.zeros_like(path["values"])
    order, kept_count = path["order"], path["kept_count"]
    for image in range(B):
        expected[image, 0] += path["d_kept"][image, 0]
        np.add.at(expected[image], 1 + order[image, :kept_count], path["d_kept"][image, 1:])
        np.add.at(expected[image], 1 + order[image, kept_count:], path["d_skipped"][image])
    np.testing.assert_array_equal(path["gradient"], expected)


def test_the_gradient_of_split_is_the_reference_model_s(path):
    order, kept_count = path["order"].astype(np.int64), path["kept_count"]
    stay = np.concatenate([np.zeros((B, 1), np.int64), 1 + order[:, :kept_count]], axis=1)
    routing = reference.Routing(stay, 1 + order[:, kept_count:], "rejoin", None)
    expected = reference.split_backward(path["d_kept"], path["d_skipped"], routing)
    np.testing.assert_array_equal(path["gradient"], expected.astype(np.float32))


def test_the_gradient_of_split_where_the_skipped_tokens_are_dropped():
    values, order = normal(13, B, 1 + N, D), permutations(14, B, N)
    factors = Tensor(normal(15, B, 1 + K, D))
    split = tokens.Split(K)

    def loss(values, order, positions):
        return (split(values, order, positions)[0] * factors).sum()

    positions = np.argsort(order, axis=1).astype(np.int32)
    gradient = ops.GradOperation()(loss)(Tensor(values), Tensor(order), Tensor(positions)).asnumpy()
    expected = np.zeros_like(values)
    np.put_along_axis(expected, np.insert(1 + order[:, :K], 0, 0, axis=1)[:, :, None], factors.asnumpy(), axis=1)
    np.testing.assert_array_equal(gradient, expected)


def test_rejoin_puts_the_skipped_tokens_behind_the_kept_ones():
    kept, skipped = normal(16, B, 1 + K, D), normal(17, B, N - K, D)
    joined = tokens.rejoin(Tensor(kept), Tensor(skipped)).asnumpy()
    np.testing.assert_array_equal(joined, np.concatenate([kept, skipped], axis=1))


def test_image_order_leaves_cls_in_front():
    in_image_order, order = normal(18, B, 1 + N, D), permutations(19, B, N)
    moved = np.concatenate([in_image_order[:, :1], take(in_image_order[:, 1:], order)], axis=1)
    positions = np.argsort(order, axis=1).astype(np.int32)
    restored = tokens.image_order(Tensor(moved), Tensor(positions)).asnumpy()
    np.testing.assert_array_equal(restored, in_image_order)


# ----------------------------------------------------------------- fuse, and what fused tokens change


class FusePath(nn.Cell):
    """Split and fuse behind ``lead`` tokens, with the gradient of a weighted sum of the result."""

    def __init__(self, kept_count, lead):
        super().__init__()
        self.split, self.lead = tokens.Split(kept_count, lead), lead
        self.gradient = ops.GradOperation()

    def fused(self, values, score):
        order = tokens.rank(score, ms.float32)
        kept, skipped = self.split(values, order, tokens.inverse(order, ms.float32))
        return tokens.fuse(kept, skipped, score, order, self.lead)

    def loss(self, values, score, factors):
        return (self.fused(values, score) * factors).sum()

    def construct(self, values, score, factors):
        return self.fused(values, score), self.gradient(self.loss)(values, score, factors)


@pytest.mark.parametrize("lead", [1, 3])
def test_fuse_is_the_reference_s_forward_and_backward(lead):
    values = normal(30, B, lead + N, D)
    score = (np.random.default_rng(31).random((B, N)) / N).astype(np.float32)
    factors = normal(32, B, lead + 1 + K, D)
    fused, gradient = (out.asnumpy() for out in FusePath(K, lead)(*(Tensor(x) for x in (values, score, factors))))

    order = np.argsort(-score, axis=1)
    first = np.tile(np.arange(lead), (B, 1))
    stay, leave = np.concatenate([first, lead + order[:, :K]], axis=1), lead + order[:, K:]
    weights = np.take_along_axis(score, order[:, K:], axis=1)
    routing = reference.Routing(stay, leave, "fuse", weights)
    expected = reference.split(values.astype(np.float64), routing)[0]  # the fused token last
    places = [*range(lead), lead + K, *range(lead, lead + K)]
    np.testing.assert_allclose(fused, expected[:, places], rtol=0, atol=1e-6)
    d_expected = factors[:, np.argsort(places)].astype(np.float64)
    np.testing.assert_allclose(gradient, reference.split_backward(d_expected, None, routing), rtol=0, atol=1e-6)


def test_fuse_keeps_the_mass_of_attention():
    """Tokens of ones: the fused one is the mass of the skipped, and with the kept ones' and CLS's it makes 1."""
    query, key, _ = parts_of(40, 1 + N)
    score = tokens.cls_attention(Tensor(query), Tensor(key))
    ones = Tensor(np.ones((B, 1 + N, D), np.float32))
    fused = FusePath(K, 1).fused(ones, score).asnumpy()[:, 1]
    falling = -np.sort(-score.asnumpy(), axis=1)
    logits = np.einsum("bhd,bhkd->bhk", query[:, :, 0].astype(np.float64), key) / np.sqrt(HEAD_DIM)
    of_cls = reference.softmax(logits).mean(axis=1)[:, 0]
    np.testing.assert_allclose(fused, np.tile(falling[:, K:].sum(axis=1)[:, None], (1, D)), rtol=1e-5)
    np.testing.assert_allclose(fused[:, 0] + falling[:, :K].sum(axis=1) + of_cls, np.ones(B), rtol=1e-5)
