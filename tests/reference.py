"""ViT and SkipViT in NumPy float64, forward and backward by hand: the yardstick of the parity tests.

Nothing here is shared with the package, so that an error in one does not hide in the other. The file reads
as a specification: one function a stage, in the order the data flows, each followed by its gradient.
Parameters are a dict under timm's names (`blocks.0.attn.qkv.weight`); images are (B, 3, height, width).

Shapes: B images, N patch tokens in image order (row by row), T tokens in the sequence (CLS first), D width,
H heads of d = D / H, C classes, K kept patch tokens. A function `stage` returns its output and what its
gradient needs; `stage_backward` takes the gradient of the output, adds those of the parameters it met to
`gradients` (each parameter is met once) and returns that of its input. The choice of tokens and their scores
are constants for the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import erf

Array = np.ndarray
Tensors = dict[str, Array]

LAYER_NORM_EPSILON = 1e-6
SCORES = ("cls_attention", "cls_attention_value", "key_norm", "mean_attention")
TREATMENTS = ("rejoin", "drop", "fuse")


class Span(NamedTuple):
    """Blocks `start` to `end - 1`, which run on CLS and `kept_count` patch tokens only.

    `skipped` says what becomes of the others: "rejoin" puts them back before block `end` (before the final
    norm where `end` is the depth), "drop" loses them, "fuse" leaves one token in their place, last in the
    sequence: the sum of score_i * token_i, as in EViT (arXiv 2202.07800), which does not divide by the sum of
    the scores; `fuse_normalised` does. (EViT sums between a block's attention and its MLP and lets gradients
    through the scores; here it is done between two blocks, with the scores held constant.) Under "drop" and
    "fuse" nothing comes back, so `end` has no effect.

    `score` is one of `SCORES`, taken from block `start - 1`, or an explicit (B, N) array. `kept`, (B, K)
    patch indices, overrules the choice but not the score: give the indices another model chose, and a near
    tie that float32 decides otherwise does not spoil the comparison.
    """

    start: int
    end: int
    kept_count: int
    skipped: str = "rejoin"
    score: str | Array = "cls_attention"
    kept: Array | None = None
    fuse_normalised: bool = False


class SpanResult(NamedTuple):
    """What a span chose, in patch indices of the whole image.

    `score` (B, N): -inf where an earlier span dropped the token. `kept` (B, K) and `skipped`: ascending.
    `margin` (B,): lowest score kept less highest score skipped, inf where nothing is skipped; float32 can
    decide otherwise only where this is within its rounding. Negative only where `Span.kept` overruled.
    """

    score: Array
    kept: Array
    skipped: Array
    margin: Array


@dataclass
class Result:
    """What `forward` returns.

    `logits` (B, C). `features` (B, 1+N, D): after the final norm, CLS first, patches in image order; after a
    drop or a fuse, what is left: CLS, the patches `live` (B, at most N; ascending), then fused tokens.
    """

    logits: Array
    features: Array
    live: Array
    spans: list[SpanResult]
    saved: Saved


# ----------------------------------------------------------------- pieces


def linear(parameters: Tensors, name: str, x: Array) -> Array:
    """`x W^T + b` over the last axis; W is (out, in)."""
    return x @ parameters[name + ".weight"].T + parameters[name + ".bias"]


def linear_backward(parameters: Tensors, gradients: Tensors, name: str, d_out: Array, x: Array) -> Array:
    """Gradient of `linear`."""
    rows = d_out.reshape(-1, d_out.shape[-1])
    gradients[name + ".weight"] = rows.T @ x.reshape(-1, x.shape[-1])
    gradients[name + ".bias"] = rows.sum(axis=0)
    return d_out @ parameters[name + ".weight"]


class NormSaved(NamedTuple):
    """What `layer_norm_backward` needs: the input made standard, and one over its deviation."""

    standard: Array
    inverse_deviation: Array


def layer_norm(parameters: Tensors, name: str, x: Array) -> tuple[Array, NormSaved]:
    """Each token to mean 0, variance 1 (of the population; epsilon inside the root), then scale and shift."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    inverse_deviation = 1 / np.sqrt(variance + LAYER_NORM_EPSILON)
    standard = centred * inverse_deviation
    out = standard * parameters[name + ".weight"] + parameters[name + ".bias"]
    return out, NormSaved(standard, inverse_deviation)


def layer_norm_backward(
    parameters: Tensors,
    gradients: Tensors,
    name: str,
    d_out: Array,
    saved: NormSaved,
) -> Array:
    """Gradient of `layer_norm`: what would change a token's mean or variance is projected out."""
    standard = saved.standard
    token_axes = tuple(range(d_out.ndim - 1))
    gradients[name + ".weight"] = (d_out * standard).sum(axis=token_axes)
    gradients[name + ".bias"] = d_out.sum(axis=token_axes)
    d_standard = d_out * parameters[name + ".weight"]
    along_mean = d_standard.mean(axis=-1, keepdims=True)
    along_variance = standard * (d_standard * standard).mean(axis=-1, keepdims=True)
    return saved.inverse_deviation * (d_standard - along_mean - along_variance)


def gelu(x: Array) -> Array:
    """`x * Phi(x)`, Phi the distribution function of the standard normal: the exact form, through erf."""
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def gelu_backward(d_out: Array, x: Array) -> Array:
    """Gradient of `gelu`: `Phi(x) + x * phi(x)`."""
    distribution = 0.5 * (1 + erf(x / math.sqrt(2)))
    density = np.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return d_out * (distribution + x * density)


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    exponential = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponential / exponential.sum(axis=-1, keepdims=True)


def softmax_backward(d_out: Array, out: Array) -> Array:
    """Gradient of `softmax`."""
    return out * (d_out - (d_out * out).sum(axis=-1, keepdims=True))


# ----------------------------------------------------------------- images to tokens


def patch_rows(images: Array, patch_size: int) -> Array:
    """(B, 3, height, width) to (B, N, 3*p*p): a patch's values by channel, row, column."""
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height}x{width} are not made of whole patches of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return grid.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def patch_embed(parameters: Tensors, images: Array, patch_size: int) -> tuple[Array, Array]:
    """Images to (B, 1+N, D): the strided convolution as a matrix product, CLS in front, positions added."""
    patches = patch_rows(images, patch_size)
    weight = parameters["patch_embed.proj.weight"]
    embedded = patches @ weight.reshape(weight.shape[0], -1).T + parameters["patch_embed.proj.bias"]
    cls_token = np.broadcast_to(parameters["cls_token"], (len(images), 1, weight.shape[0]))
    return np.concatenate([cls_token, embedded], axis=1) + parameters["pos_embed"], patches


def patch_embed_backward(parameters: Tensors, gradients: Tensors, d_tokens: Array, patches: Array) -> None:
    """Gradient of `patch_embed` (none for the images)."""
    d_embedded = d_tokens[:, 1:]
    gradients["pos_embed"] = d_tokens.sum(axis=0, keepdims=True)
    gradients["cls_token"] = d_tokens[:, :1].sum(axis=0, keepdims=True)
    d_weight = np.einsum("bnd,bnp->dp", d_embedded, patches)
    gradients["patch_embed.proj.weight"] = d_weight.reshape(parameters["patch_embed.proj.weight"].shape)
    gradients["patch_embed.proj.bias"] = d_embedded.sum(axis=(0, 1))


# ----------------------------------------------------------------- a block


class AttentionSaved(NamedTuple):
    """Input (B, T, D); query, key, value (B, H, T, d); weights (B, H, query, key); heads merged (B, T, D)."""

    x: Array
    query: Array
    key: Array
    value: Array
    weights: Array
    merged: Array


def attention(parameters: Tensors, name: str, x: Array, num_heads: int) -> tuple[Array, AttentionSaved]:
    """Multi-head self-attention; the rows of `qkv` are ordered by (q k v, head, d)."""
    batch, length, width = x.shape
    qkv = linear(parameters, name + ".qkv", x).reshape(batch, length, 3, num_heads, width // num_heads)
    query, key, value = qkv.transpose(2, 0, 3, 1, 4)
    weights = softmax(query @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5)
    merged = (weights @ value).transpose(0, 2, 1, 3).reshape(batch, length, width)
    out = linear(parameters, name + ".proj", merged)
    return out, AttentionSaved(x, query, key, value, weights, merged)


def attention_backward(
    parameters: Tensors, gradients: Tensors, name: str, d_out: Array, saved: AttentionSaved
) -> Array:
    """Gradient of `attention`."""
    batch, num_heads, length, head_width = saved.query.shape
    d_merged = linear_backward(parameters, gradients, name + ".proj", d_out, saved.merged)
    d_mixed = d_merged.reshape(batch, length, num_heads, head_width).transpose(0, 2, 1, 3)
    d_value = saved.weights.swapaxes(-1, -2) @ d_mixed
    d_weights = d_mixed @ saved.value.swapaxes(-1, -2)
    d_products = softmax_backward(d_weights, saved.weights) * head_width**-0.5
    d_query = d_products @ saved.key
    d_key = d_products.swapaxes(-1, -2) @ saved.query
    d_qkv = np.stack([d_query, d_key, d_value]).transpose(1, 3, 0, 2, 4).reshape(batch, length, -1)
    return linear_backward(parameters, gradients, name + ".qkv", d_qkv, saved.x)


class MlpSaved(NamedTuple):
    """Input of fc1, and hidden units before and after GELU."""

    x: Array
    hidden: Array
    activated: Array


def mlp(parameters: Tensors, name: str, x: Array) -> tuple[Array, MlpSaved]:
    """`fc2(gelu(fc1(x)))`."""
    hidden = linear(parameters, name + ".fc1", x)
    activated = gelu(hidden)
    return linear(parameters, name + ".fc2", activated), MlpSaved(x, hidden, activated)


def mlp_backward(parameters: Tensors, gradients: Tensors, name: str, d_out: Array, saved: MlpSaved) -> Array:
    """Gradient of `mlp`."""
    d_activated = linear_backward(parameters, gradients, name + ".fc2", d_out, saved.activated)
    d_hidden = gelu_backward(d_activated, saved.hidden)
    return linear_backward(parameters, gradients, name + ".fc1", d_hidden, saved.x)


class BlockSaved(NamedTuple):
    """What each part of a block saved; `factors` (2, B, 1, 1) multiply the attention and the MLP branch."""

    norm1: NormSaved
    attention: AttentionSaved
    norm2: NormSaved
    mlp: MlpSaved
    factors: Array


def block(
    parameters: Tensors,
    name: str,
    tokens: Array,
    num_heads: int,
    factors: Array,
) -> tuple[Array, BlockSaved]:
    """A pre-norm block: `x += f0 * attention(norm1(x))`, then `x += f1 * mlp(norm2(x))`; f from drop path."""
    factors = factors[:, :, None, None]  # (2, B) to (2, B, 1, 1)
    normed, norm1_saved = layer_norm(parameters, name + ".norm1", tokens)
    branch, attention_saved = attention(parameters, name + ".attn", normed, num_heads)
    tokens = tokens + factors[0] * branch
    normed, norm2_saved = layer_norm(parameters, name + ".norm2", tokens)
    branch, mlp_saved = mlp(parameters, name + ".mlp", normed)
    tokens = tokens + factors[1] * branch
    return tokens, BlockSaved(norm1_saved, attention_saved, norm2_saved, mlp_saved, factors)


def block_backward(
    parameters: Tensors,
    gradients: Tensors,
    name: str,
    d_tokens: Array,
    saved: BlockSaved,
) -> Array:
    """Gradient of `block`."""
    d_normed = mlp_backward(parameters, gradients, name + ".mlp", saved.factors[1] * d_tokens, saved.mlp)
    d_tokens = d_tokens + layer_norm_backward(parameters, gradients, name + ".norm2", d_normed, saved.norm2)
    d_branch = saved.factors[0] * d_tokens
    d_normed = attention_backward(parameters, gradients, name + ".attn", d_branch, saved.attention)
    return d_tokens + layer_norm_backward(parameters, gradients, name + ".norm1", d_normed, saved.norm1)


# ----------------------------------------------------------------- the method: score, select, split, rejoin


def patch_score(kind: str, saved: AttentionSaved, patch_count: int) -> Array:
    """(B, patches now in the sequence): how much each matters to the block whose attention was saved.

    Keys and queries are all tokens of the sequence, CLS and fused ones too, so softmax is over them all; only
    then are the columns of the patches taken. Per head:

    - cls_attention: attention of the CLS query to the patch;
    - cls_attention_value: that, times the L2 norm of the patch's value vector;
    - key_norm: the L2 norm of the patch's key vector;
    - mean_attention: attention the patch receives, mean over all queries, CLS and itself included;

    then the mean over heads.
    """
    patches = slice(1, 1 + patch_count)
    if kind == "cls_attention":
        of_heads = saved.weights[:, :, 0, patches]
    elif kind == "cls_attention_value":
        of_heads = saved.weights[:, :, 0, patches] * np.linalg.norm(saved.value[:, :, patches], axis=-1)
    elif kind == "key_norm":
        of_heads = np.linalg.norm(saved.key[:, :, patches], axis=-1)
    elif kind == "mean_attention":
        of_heads = saved.weights[:, :, :, patches].mean(axis=2)
    else:
        raise ValueError(f"score {kind!r} is none of {', '.join(SCORES)}")
    return of_heads.mean(axis=1)


def span_score(span: Span, previous: BlockSaved | None, live: Array, patch_count: int) -> Array:
    """(B, N): the span's score over the whole image, -inf for tokens dropped earlier (not in `live`)."""
    if not isinstance(span.score, str):
        of_live = np.take_along_axis(np.asarray(span.score, np.float64), live, axis=1)
    elif previous is None:
        raise ValueError(f"a span from block 0 has no block before it to give the score {span.score!r}")
    else:
        of_live = patch_score(span.score, previous.attention, live.shape[1])
    score = np.full((len(live), patch_count), -np.inf)
    np.put_along_axis(score, live, of_live, axis=1)
    return score


def select(span: Span, score: Array, live: Array) -> SpanResult:
    """Part the `live` patches: the `kept_count` of highest score (in a tie: lowest index), and the rest."""
    if span.kept is None:
        kept_count = min(span.kept_count, live.shape[1])
        kept = np.sort(np.argsort(-score, axis=1, kind="stable")[:, :kept_count], axis=1)
    else:
        kept = np.sort(np.asarray(span.kept, np.int64), axis=1)
        if kept.shape != (len(live), span.kept_count):
            raise ValueError(f"kept is {kept.shape}, not (batch, kept_count): {(len(live), span.kept_count)}")
    skipped = np.stack([np.setdiff1d(all_of, some) for all_of, some in zip(live, kept)])
    lowest_kept = np.take_along_axis(score, kept, axis=1).min(axis=1)
    highest_skipped = np.take_along_axis(score, skipped, axis=1).max(axis=1, initial=-np.inf)
    return SpanResult(score, kept, skipped, margin=lowest_kept - highest_skipped)


class Routing(NamedTuple):
    """Where in the sequence the tokens are that `stay` (B, S; CLS first, fused ones last) and that `leave`.

    `weights` (B, L) is None unless those that leave are fused.
    """

    stay: Array
    leave: Array
    skipped: str
    weights: Array | None


def route(span: Span, choice: SpanResult, live: Array, length: int) -> Routing:
    """Patch indices to places in a sequence: CLS, the `live` patches, and fused tokens, which always stay."""
    batch, live_count = live.shape
    place_of_patch = np.zeros(choice.score.shape, np.int64)
    np.put_along_axis(place_of_patch, live, np.arange(1, 1 + live_count)[None], axis=1)
    always = np.broadcast_to(np.r_[0, 1 + live_count : length], (batch, length - live_count))
    stay = np.concatenate([always, np.take_along_axis(place_of_patch, choice.kept, axis=1)], axis=1)
    leave = np.take_along_axis(place_of_patch, choice.skipped, axis=1)
    weights = None
    if span.skipped == "fuse":
        weights = np.take_along_axis(choice.score, choice.skipped, axis=1)
        if span.fuse_normalised:
            weights = weights / weights.sum(axis=1, keepdims=True)
    return Routing(np.sort(stay, axis=1), leave, span.skipped, weights)


def take(tokens: Array, places: Array) -> Array:
    """(B, T, D) at (B, L) to (B, L, D)."""
    return np.take_along_axis(tokens, places[:, :, None], axis=1)


def put(tokens: Array, places: Array, values: Array) -> None:
    """Write (B, L, D) into (B, T, D) at (B, L)."""
    np.put_along_axis(tokens, places[:, :, None], values, axis=1)


def split(tokens: Array, routing: Routing) -> tuple[Array, Array]:
    """(B, T, D) to the sequence that goes on (the fused token last) and the tokens that leave it."""
    going_on, skipped = take(tokens, routing.stay), take(tokens, routing.leave)
    if routing.weights is not None:
        fused = (routing.weights[:, :, None] * skipped).sum(axis=1, keepdims=True)
        going_on = np.concatenate([going_on, fused], axis=1)
    return going_on, skipped


def split_backward(d_going_on: Array, d_skipped: Array | None, routing: Routing) -> Array:
    """Gradient of `split`; `d_skipped` comes from `rejoin_backward` and is None under drop and fuse."""
    stay_count, leave_count = routing.stay.shape[1], routing.leave.shape[1]
    d_tokens = np.zeros((len(d_going_on), stay_count + leave_count, d_going_on.shape[2]))
    put(d_tokens, routing.stay, d_going_on[:, :stay_count])
    if routing.weights is not None:
        d_skipped = routing.weights[:, :, None] * d_going_on[:, stay_count:]
    if d_skipped is not None:
        put(d_tokens, routing.leave, d_skipped)
    return d_tokens


def rejoin(going_on: Array, skipped: Array, routing: Routing) -> Array:
    """The opposite of `split` under "rejoin": every token back in its place."""
    batch, _, width = going_on.shape
    tokens = np.full((batch, going_on.shape[1] + skipped.shape[1], width), np.nan)
    put(tokens, routing.stay, going_on)
    put(tokens, routing.leave, skipped)
    return tokens


def rejoin_backward(d_tokens: Array, routing: Routing) -> tuple[Array, Array]:
    """Gradient of `rejoin`: for the sequence that went on, and for the tokens that had left."""
    return take(d_tokens, routing.stay), take(d_tokens, routing.leave)


# ----------------------------------------------------------------- head and loss


def head(parameters: Tensors, tokens: Array) -> tuple[Array, Array, NormSaved]:
    """Tokens to logits (B, C) of the normed CLS token, and features, all tokens normed."""
    features, norm_saved = layer_norm(parameters, "norm", tokens)
    return linear(parameters, "head", features[:, 0]), features, norm_saved


def head_backward(
    parameters: Tensors, gradients: Tensors, d_logits: Array, features: Array, norm_saved: NormSaved
) -> Array:
    """Gradient of `head` (from the logits alone)."""
    d_features = np.zeros_like(features)
    d_features[:, 0] = linear_backward(parameters, gradients, "head", d_logits, features[:, 0])
    return layer_norm_backward(parameters, gradients, "norm", d_features, norm_saved)


def cross_entropy(logits: Array, labels: Array) -> float:
    """Mean over the batch of `-sum_c labels_c * log_softmax(logits)_c`; `labels` (B, C) may be soft."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-(labels * log_probabilities).sum(axis=1).mean())


def cross_entropy_backward(logits: Array, labels: Array) -> Array:
    """Gradient of `cross_entropy`."""
    return (softmax(logits) * labels.sum(axis=1, keepdims=True) - labels) / len(logits)


# ----------------------------------------------------------------- the whole model


@dataclass
class Saved:
    """What `backward` needs of a `forward`: `routings[i]` is None where span i skips nothing."""

    spans: list[Span]
    routings: list[Routing | None]
    patches: Array
    blocks: list[BlockSaved]
    norm: NormSaved


def depth_of(parameters: Tensors) -> int:
    """How many blocks the parameters are for."""
    return sum(name.endswith(".norm1.weight") for name in parameters)


def check_spans(spans: Sequence[Span], depth: int, patch_count: int) -> None:
    """Raise ValueError where spans say something that has no meaning."""
    for span in spans:
        if not 0 <= span.start < span.end <= depth:
            raise ValueError(f"a span {span.start}..{span.end} does not lie within {depth} blocks")
        if not 1 <= span.kept_count <= patch_count:
            raise ValueError(f"of {patch_count} patches {span.kept_count} cannot be kept")
        if span.skipped not in TREATMENTS:
            raise ValueError(f"skipped {span.skipped!r} is none of {', '.join(TREATMENTS)}")
    for earlier, later in zip(spans, spans[1:]):
        if later.start <= earlier.start:
            raise ValueError(f"spans start at {earlier.start}, then {later.start}: they must ascend")
        # A score is that of block start-1 on every live token, so that block must not be a middle block.
        whole_from = earlier.end + 1 if isinstance(later.score, str) else earlier.end
        if earlier.skipped == "rejoin" and later.start < whole_from:
            raise ValueError(f"a span from block {later.start} must start from block {whole_from} on")


def forward(
    parameters: Tensors,
    images: Array,
    *,
    patch_size: int,
    num_heads: int,
    spans: Sequence[Span | tuple] = (),
    drop_path: Array | None = None,
) -> Result:
    """Run the model.

    Spans are given in ascending order of `start`; each begins once the one before it has rejoined, or goes on
    with what it dropped or fused gone (a fused token then always stays). A span that keeps all tokens is
    nothing, though its score is reported. `drop_path` (depth, 2, B) multiplies the attention branch and the
    MLP branch of each block, image by image: 0, or one over the probability to survive.
    """
    parameters = as_float64(parameters)
    all_spans = [Span(*span) for span in spans]
    depth, batch = depth_of(parameters), len(images)
    patch_count = parameters["pos_embed"].shape[1] - 1
    check_spans(all_spans, depth, patch_count)
    factors = np.ones((depth, 2, batch)) if drop_path is None else np.asarray(drop_path, np.float64)

    tokens, patches = patch_embed(parameters, np.asarray(images, np.float64), patch_size)
    live = np.broadcast_to(np.arange(patch_count), (batch, patch_count))  # patches in the sequence
    blocks: list[BlockSaved] = []
    choices: list[SpanResult] = []
    routings: list[Routing | None] = []
    aside: dict[int, Array] = {}  # span to the tokens that will rejoin
    for i in range(depth + 1):
        for s, routing in enumerate(routings):
            if routing is not None and routing.skipped == "rejoin" and all_spans[s].end == i:
                tokens = rejoin(tokens, aside.pop(s), routing)
        if i == depth:
            break
        for s, span in enumerate(all_spans):
            if span.start == i:
                score = span_score(span, blocks[-1] if blocks else None, live, patch_count)
                choice = select(span, score, live)
                routing = route(span, choice, live, tokens.shape[1]) if choice.skipped.size else None
                choices.append(choice)
                routings.append(routing)
                if routing is not None:
                    tokens, skipped = split(tokens, routing)
                    if span.skipped == "rejoin":
                        aside[s] = skipped
                    else:
                        live = choice.kept
        tokens, block_saved = block(parameters, f"blocks.{i}", tokens, num_heads, factors[i])
        blocks.append(block_saved)
    logits, features, norm_saved = head(parameters, tokens)
    return Result(logits, features, live, choices, Saved(all_spans, routings, patches, blocks, norm_saved))


def backward(parameters: Tensors, d_logits: Array, result: Result) -> Tensors:
    """Gradients of every parameter from those of the logits: `forward` line by line from its end."""
    parameters = as_float64(parameters)
    saved = result.saved
    gradients: Tensors = {}
    d_aside: dict[int, Array] = {}
    d_tokens = head_backward(parameters, gradients, d_logits, result.features, saved.norm)
    for i in reversed(range(len(saved.blocks) + 1)):
        if i < len(saved.blocks):
            d_tokens = block_backward(parameters, gradients, f"blocks.{i}", d_tokens, saved.blocks[i])
            for s, routing in enumerate(saved.routings):
                if routing is not None and saved.spans[s].start == i:
                    d_tokens = split_backward(d_tokens, d_aside.pop(s, None), routing)
        for s, routing in enumerate(saved.routings):
            if routing is not None and routing.skipped == "rejoin" and saved.spans[s].end == i:
                d_tokens, d_aside[s] = rejoin_backward(d_tokens, routing)
    patch_embed_backward(parameters, gradients, d_tokens, saved.patches)
    return gradients


def loss_and_gradients(
    parameters: Tensors,
    images: Array,
    labels: Array,
    *,
    patch_size: int,
    num_heads: int,
    spans: Sequence[Span | tuple] = (),
    drop_path: Array | None = None,
) -> tuple[float, Tensors]:
    """Cross entropy against soft `labels` (B, C), mean over the batch, and every parameter's gradient."""
    result = forward(
        parameters,
        images,
        patch_size=patch_size,
        num_heads=num_heads,
        spans=spans,
        drop_path=drop_path,
    )
    labels = np.asarray(labels, np.float64)
    gradients = backward(parameters, cross_entropy_backward(result.logits, labels), result)
    return cross_entropy(result.logits, labels), gradients


def as_float64(parameters: Tensors) -> Tensors:
    """The same parameters in float64; no copy where they are already."""
    return {name: np.asarray(value, np.float64) for name, value in parameters.items()}


# ----------------------------------------------------------------- parameters and training


def init(
    seed: int,
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_classes: int,
    mlp_ratio: int = 4,
) -> Tensors:
    """Random parameters for parity tests, not for training: nothing is 0 or 1, so nothing agrees by being so.

    Weights have variance 1 / (values summed), which keeps activations of order 1 and lets attention, hence
    scores, differ between tokens. Values are float64 but exact in float32, so both models hold the same.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    patch_count = (height // patch_size) * (width // patch_size)
    hidden = mlp_ratio * embed_dim
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, embed_dim),
        "pos_embed": (1, 1 + patch_count, embed_dim),
        "patch_embed.proj.weight": (embed_dim, 3, patch_size, patch_size),
        "patch_embed.proj.bias": (embed_dim,),
    }
    for i in range(depth):
        name = f"blocks.{i}."
        for layer, outputs, inputs in (
            ("attn.qkv", 3 * embed_dim, embed_dim),
            ("attn.proj", embed_dim, embed_dim),
            ("mlp.fc1", hidden, embed_dim),
            ("mlp.fc2", embed_dim, hidden),
        ):
            shapes[name + layer + ".weight"], shapes[name + layer + ".bias"] = (outputs, inputs), (outputs,)
        for layer in ("norm1", "norm2"):
            shapes[name + layer + ".weight"] = shapes[name + layer + ".bias"] = (embed_dim,)
    shapes["norm.weight"] = shapes["norm.bias"] = (embed_dim,)
    shapes["head.weight"], shapes["head.bias"] = (num_classes, embed_dim), (num_classes,)

    generator = np.random.default_rng(seed)
    parameters: Tensors = {}
    for name, shape in shapes.items():
        value = generator.standard_normal(shape)
        if name in ("cls_token", "pos_embed"):
            value = 0.5 * value
        elif len(shape) > 1:
            value = value / math.sqrt(math.prod(shape[1:]))
        elif name.endswith(".weight"):  # of a norm
            value = 1 + 0.2 * value
        else:
            value = 0.2 * value
        parameters[name] = value.astype(np.float32).astype(np.float64)
    return parameters


class AdamState(NamedTuple):
    """Steps taken so far, and running means of the gradient and of its square."""

    step: int
    first: Tensors
    second: Tensors


def global_norm(gradients: Tensors) -> float:
    """L2 norm of all gradients as one vector."""
    return math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))


def adamw(
    parameters: Tensors,
    gradients: Tensors,
    state: AdamState | None = None,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    undecayed: Sequence[str] = (),
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    clip_norm: float | None = None,
) -> tuple[Tensors, AdamState]:
    """One step of AdamW as PyTorch writes it; returns new parameters and state, changes nothing it was given.

    `p *= 1 - lr * wd`, then `p -= lr * m_hat / (sqrt(v_hat) + epsilon)`, epsilon outside the root and after
    the correction of v. `undecayed` names parameters without decay. `clip_norm` first scales all gradients by
    `min(1, clip_norm / norm)`; PyTorch's clip_grad_norm_ adds 1e-6 to the norm there, which is left out.
    """
    if clip_norm is not None:
        norm = global_norm(gradients)
        scale = clip_norm / norm if norm > clip_norm else 1.0
        gradients = {name: scale * gradient for name, gradient in gradients.items()}
    if state is None:
        zeros = {name: np.zeros_like(value, np.float64) for name, value in parameters.items()}
        state = AdamState(0, zeros, zeros)
    step = state.step + 1
    updated: Tensors = {}
    first: Tensors = {}
    second: Tensors = {}
    for name, value in parameters.items():
        first[name] = betas[0] * state.first[name] + (1 - betas[0]) * gradients[name]
        second[name] = betas[1] * state.second[name] + (1 - betas[1]) * gradients[name] ** 2
        first_hat = first[name] / (1 - betas[0] ** step)
        second_hat = second[name] / (1 - betas[1] ** step)
        decay = 0.0 if name in undecayed else weight_decay
        updated[name] = value * (1 - learning_rate * decay)
        updated[name] = updated[name] - learning_rate * first_hat / (np.sqrt(second_hat) + epsilon)
    return updated, AdamState(step, first, second)


def cosine_learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: int = 0, floor: float = 0.0, start: float = 0.0
) -> float:
    """Rate of step 0, 1, ...: linear from `start` to `peak` at `warmup_steps`, then half a cosine to `floor`.

    `floor` is reached at `total_steps`, the step after the last, and held.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))
