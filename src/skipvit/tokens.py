"""SkipViT's token path: score the patch tokens, split off the unimportant ones, let them rejoin.

This file is the method (arXiv 2401.15293, section 3): a ViT keeps training all tokens in its early and late blocks,
while in between only the CLS token and the patches it attends to most go on::

    tokens (B, 1+N, D) ── early blocks ──┬─ CLS + K kept patches ── middle blocks ──┬── late blocks ── head
                        CLS attention    └─ N-K skipped patches, untouched ─────────┘

Everything is a function of tensors whose shapes are known beforehand: ``K`` comes from the configuration, never from
the data, so the graph is compiled once. ``B`` images, ``N`` patch tokens, ``K`` kept of them, ``D`` width, ``H`` heads
of ``d = D / H``.

How it moves tokens is chosen for the 910A (DESIGN 4) and costs the same on a CPU: Gather on axis 0 of the tokens laid
out as ``(B * (1+N), D)`` runs on its AI Core, where ``gather_elements`` and every kind of scatter do not; so the
gradient of a gather, by default a scatter, is written here as what it is for a permutation: another gather.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype


def cls_attention(query, key):
    """Score of each patch: the CLS query's softmax attention to its key, mean over heads (SkipViT, section 3).

    The softmax runs over all keys, the CLS token's included, and is computed here apart from the block's own
    attention: one row of it costs next to nothing, and the block is free to use a fused kernel that returns none.

    Args:
        query: ``(B, H, 1+N, d)`` of the scoring block.
        key: ``(B, H, 1+N, d)`` of the scoring block.

    Returns:
        ``(B, N)`` float32; no gradient flows through it.
    """
    head_dim = query.shape[-1]
    cls_query = ops.stop_gradient(query)[:, :, :1].astype(mstype.float32)
    key = ops.stop_gradient(key).astype(mstype.float32)
    logits = ops.BatchMatMul(transpose_b=True)(cls_query * head_dim**-0.5, key)  # (B, H, 1, 1+N)
    attention = ops.Softmax(-1)(logits)
    return attention.mean(1)[:, 0, 1:]


def rank(score, sort_dtype):
    """Order patches from the highest score to the lowest.

    Args:
        score: ``(B, N)``.
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


class Split(nn.Cell):
    """Part all tokens into those that go on (CLS first, then the kept patches) and those that skip.

    Inputs:
        tokens ``(B, 1+N, D)``, order ``(B, N)`` from `rank`, positions ``(B, N)`` its `inverse`.

    Outputs:
        kept ``(B, 1+K, D)`` in falling score, skipped ``(B, N-K, D)``.

    Both together are a permutation of the tokens, so the gradient is the inverse permutation: a gather too.
    """

    def __init__(self, kept_count):
        super().__init__()
        self.kept_count = kept_count

    def construct(self, tokens, order, positions):
        """See the class."""
        kept_index = ops.concat((ops.ZerosLike()(order[:, :1]), order[:, : self.kept_count] + 1), 1)
        return gather(tokens, kept_index), gather(tokens, order[:, self.kept_count :] + 1)

    def bprop(self, tokens, order, positions, out, dout):
        """Put each token's gradient back where the token came from."""
        gradient = ops.concat(dout, 1)
        index = ops.concat((ops.ZerosLike()(positions[:, :1]), positions + 1), 1)
        return gather(gradient, index), ops.ZerosLike()(order), ops.ZerosLike()(positions)


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


def image_order(tokens, positions):
    """Undo the split: tokens in the order ``[CLS, order...]`` to image order.

    Args:
        tokens: ``(B, 1+N, D)``, CLS first.
        positions: ``(B, N)``, the inverse of the order they are in.

    Returns:
        ``(B, 1+N, D)``.
    """
    index = ops.concat((ops.ZerosLike()(positions[:, :1]), positions + 1), 1)
    return gather(tokens, index)
