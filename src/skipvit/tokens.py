"""SkipViT's token path: score the patch tokens, split off the unimportant ones, let them rejoin, or drop or fuse them.

This file is the method (arXiv 2401.15293, section 3): a ViT keeps training all tokens in its early and late blocks,
while in between only the CLS token and the patches it attends to most go on::

    tokens (B, 1+N, D) ── early blocks ──┬─ CLS + K kept patches ── middle blocks ──┬── late blocks ── head
                        CLS attention    └─ N-K skipped patches, untouched ─────────┘

Everything is a function of tensors whose shapes are known beforehand: ``K`` comes from the configuration, never from
the data, so the graph is compiled once. ``B`` images, ``N`` patch tokens, ``K`` kept of them, ``D`` width, ``H`` heads
of ``d = D / H``. Before the patches stand ``lead`` tokens that always go on: CLS, and those that spans before fused.

How it moves tokens is chosen for the 910A (ascend910.yaml) and costs the same on a CPU: Gather on axis 0 of the tokens
laid out as ``(B * (1+N), D)`` runs on its AI Core, where ``gather_elements`` and every kind of scatter do not; so the
gradient of a gather, by default a scatter, is written here as what it is for a permutation: another gather.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype


def score(kind, parts, lead=1):
    """Score of each patch by what the scoring block computed; no gradient flows through it.

    Args:
        kind: ``skip.score``, but for those that come with the batch.
        parts: the block's query, key and value, each ``(B, H, T, d)``.
        lead: tokens before the patches.

    Returns:
        ``(B, T - lead)`` float32, adding up to at most 1 in each row.
    """
    query, key, value = parts
    if kind == "cls_attention_value":
        return as_mass(cls_attention_value(query, key, value, lead))
    if kind == "key_norm":
        return as_mass(key_norm(key, lead))
    if kind == "mean_attention":
        return mean_attention(query, key, lead)
    return cls_attention(query, key, lead)


def cls_attention(query, key, lead=1):
    """The CLS query's softmax attention to each patch's key, mean over heads (SkipViT, section 3).

    query and key ``(B, H, T, d)`` to ``(B, T-lead)`` float32.
    """
    return _cls_row(query, key).mean(1)[:, 0, lead:]


def cls_attention_value(query, key, value, lead=1):
    """The same, each head's attention times the L2 norm of what it brings, the patch's value (ATS, arXiv 2111.15667).

    A patch that is looked at but has little to give counts less. query, key and value ``(B, H, T, d)`` to
    ``(B, T-lead)`` float32.
    """
    return (_cls_row(query, key)[:, :, 0] * _norm(value)).mean(1)[:, lead:]


def key_norm(key, lead=1):
    """The L2 norm of each patch's key, mean over heads: how much attention it can draw, before any query is known.

    Caches of language models are pruned by it (arXiv 2406.11430, which keeps the lowest, where this keeps the highest).
    key ``(B, H, T, d)`` to ``(B, T-lead)`` float32.
    """
    return _norm(key).mean(1)[:, lead:]


def mean_attention(query, key, lead=1):
    """The attention that each patch receives, mean over all queries and heads (LTP, arXiv 2107.00910).

    For models whose CLS token says nothing. query and key ``(B, H, T, d)`` to ``(B, T-lead)`` float32. The block's own
    attention is the same nodes of the graph, where it has them, so little is computed twice.
    """
    return _attention(query, key).mean((1, 2))[:, lead:]


def _cls_row(query, key):
    """The CLS query's attention to every key, ``(B, H, 1, T)``.

    It is computed here apart from the block's own attention: one row of it costs next to nothing, and the block is free
    to use a fused kernel that returns none.
    """
    return _attention(ops.stop_gradient(query)[:, :, :1], key)


def _attention(query, key):
    """Softmax over all keys, the CLS token's included: ``(B, H, Q, d)`` and ``(B, H, T, d)`` to ``(B, H, Q, T)``."""
    head_dim = query.shape[-1]
    query = ops.stop_gradient(query).astype(mstype.float32)
    key = ops.stop_gradient(key).astype(mstype.float32)
    return ops.Softmax(-1)(ops.BatchMatMul(transpose_b=True)(query * head_dim**-0.5, key))


def _norm(vectors):
    return ops.sqrt(ops.square(ops.stop_gradient(vectors).astype(mstype.float32)).sum(-1))


def as_mass(score):
    """Scores of any size as shares of a whole: divided by their sum where that is above 1. ``(B, N)`` to ``(B, N)``.

    Attention is such a share as it is. Order does not change; float16 can sort the result and `fuse` can weigh by it.
    """
    return score / ops.maximum(score.sum(1).reshape(-1, 1), Tensor(1.0, mstype.float32))


def rank(score, sort_dtype):
    """Order patches from the highest score to the lowest.

    Args:
        score: ``(B, N)``, about 1/N each.
        sort_dtype: what the device's TopK takes. On Ascend that is float16, in which scores about 1/N have few digits
            left: they are scaled by N first.

    Returns:
        ``(B, N)`` int32, a permutation of ``0 .. N-1`` in each row; equal scores fall as TopK has them.
    """
    num_patches = score.shape[1]
    scaled = (ops.stop_gradient(score) * float(num_patches)).astype(sort_dtype)
    _, order = ops.TopK(sorted=True)(scaled, num_patches)
    return ops.stop_gradient(order.astype(mstype.int32))


def inverse(order, sort_dtype):
    """The inverse permutation of each row, by sorting the permutation itself (a scatter would leave the AI Core).

    Args:
        order: ``(B, N)`` int32 permutations.
        sort_dtype: as in `rank`; float16 counts exactly up to N = 2048.

    Returns:
        ``(B, N)`` int32 with ``inverse[b, order[b, i]] == i``.
    """
    num_patches = order.shape[1]
    _, positions = ops.TopK(sorted=True)(
        (float(num_patches) - order.astype(mstype.float32)).astype(sort_dtype), num_patches
    )
    return ops.stop_gradient(positions.astype(mstype.int32))


def ascending(index, sort_dtype):
    """Sort each row's indices ascending. ``(B, K)`` int32 to ``(B, K)`` int32."""
    _, place = ops.TopK(sorted=True)((-index.astype(mstype.float32)).astype(sort_dtype), index.shape[1])
    return gather(ops.expand_dims(index, -1), place)[:, :, 0]


def gather(values, index):
    """Pick rows of each image: ``values (B, M, D)`` at ``index (B, L)`` gives ``(B, L, D)``.

    Laid out as ``(B * M, D)`` so that the device gathers whole rows on axis 0.
    """
    B, M, D = values.shape
    L = index.shape[1]
    rows = index + Tensor(np.arange(B, dtype=np.int32)[:, None] * M)
    return ops.Gather()(values.reshape(B * M, D), rows.reshape(-1), 0).reshape(B, L, D)


def behind_lead(index, lead, offset):
    """Places of the ``lead`` first tokens as they are, then ``index (B, L)`` moved by ``offset``: ``(B, lead+L)``."""
    first = ops.ZerosLike()(index[:, :1]) + Tensor(np.arange(lead, dtype=np.int32))
    return ops.concat((first, index + offset), 1)


class Split(nn.Cell):
    """Part all tokens into those that go on (the leading ones first, then the kept patches) and those that skip.

    Args:
        kept_count: K.
        lead: tokens before the patches, which go on.

    Inputs:
        tokens ``(B, lead+N, D)``, order ``(B, N)`` from `rank`, positions ``(B, N)`` its `inverse`.

    Outputs:
        kept ``(B, lead+K, D)`` in falling score, skipped ``(B, N-K, D)``.

    Both together are a permutation of the tokens, so the gradient is the inverse permutation: a gather too.
    """

    def __init__(self, kept_count, lead=1):
        super().__init__()
        self.kept_count, self.lead = kept_count, lead

    def construct(self, tokens, order, positions):
        """See the class."""
        kept_index = behind_lead(order[:, : self.kept_count], self.lead, self.lead)
        return gather(tokens, kept_index), gather(tokens, order[:, self.kept_count :] + self.lead)

    def bprop(self, tokens, order, positions, out, dout):
        """Put each token's gradient back where the token came from."""
        gradient = gather(ops.concat(dout, 1), behind_lead(positions, self.lead, self.lead))
        return gradient, ops.ZerosLike()(order), ops.ZerosLike()(positions)


def rejoin(kept, skipped):
    """The skipped tokens come back, as they were when they left.

    A ViT block does not care about the order of tokens, so they are put behind the kept ones and stay there; only what
    leaves the model is put in image order.

    Args:
        kept: ``(B, 1+K, D)`` after the middle blocks.
        skipped: ``(B, N-K, D)``.

    Returns:
        ``(B, 1+N, D)``.
    """
    return ops.concat((kept, skipped), 1)


def fuse(kept, skipped, score, order, lead=1):
    """One token in place of the skipped: their sum, weighted by score (EViT, arXiv 2202.07800, section 3.3).

    The weights are not made to add up to 1: with the scores of the kept they keep the mass that attention had. EViT
    fuses between a block's attention and its MLP, this between two blocks; no gradient flows through the score.

    Args:
        kept: ``(B, lead+K, D)``.
        skipped: ``(B, N-K, D)``.
        score: ``(B, N)``.
        order: ``(B, N)`` from `rank`.
        lead: tokens before the kept patches.

    Returns:
        ``(B, lead+1+K, D)``: the leading tokens, the fused one, the kept patches.
    """
    falling = gather(ops.expand_dims(ops.stop_gradient(score), -1), order)
    weights = falling[:, -skipped.shape[1] :]  # (B, N-K, 1)
    fused = ops.BatchMatMul(transpose_a=True)(weights, skipped)
    return ops.concat((kept[:, :lead], fused, kept[:, lead:]), 1)


def image_order(tokens, positions):
    """Undo the split: tokens in the order ``[CLS, order...]`` to image order.

    Args:
        tokens: ``(B, 1+N, D)``, CLS first.
        positions: ``(B, N)``, the inverse of the order they are in.

    Returns:
        ``(B, 1+N, D)``.
    """
    return gather(tokens, behind_lead(positions, 1, 1))
