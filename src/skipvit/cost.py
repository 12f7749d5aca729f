"""What a training step costs: its arithmetic counted, and a prediction from it for an Ascend 910A.

Counts are of the model as `model.py` computes it: the products of patches, blocks and head, at the token counts that
the spans leave. They give the bound that no skip path can beat, `speed_up_bound`, against which `benchmark` holds what
it measures. One multiply-accumulate is 2 floating-point operations.
"""

from collections.abc import Sequence
from typing import NamedTuple

from skipvit.config import ModelConfig, SkipConfig, block_lengths, span_shapes


class Product(NamedTuple):
    """Matrix products ``(rows, inner) @ (inner, columns)``, so many ``times`` an image.

    ``rows`` of a linear layer are an image's tokens, which the whole batch's share one product; the products of
    attention are each on their own (``batched``). ``gradients`` of the operands follow in training: 2, or 1 for the
    patches (an image has no gradient) and for fused tokens (nor have their weights), or 0 for scores.
    """

    group: str
    rows: int
    inner: int
    columns: int
    times: int = 1
    batched: bool = False
    gradients: int = 2

    @property
    def macs(self) -> int:
        """Multiply-accumulates forward, an image."""
        return self.rows * self.inner * self.columns * self.times


class Stage(NamedTuple):
    """A block as it runs: on ``tokens`` tokens, of which ``queries`` are computed (1 if the CLS token alone is)."""

    tokens: int
    queries: int


def stages(model: ModelConfig, spans: Sequence[SkipConfig]) -> list[Stage]:
    """Each block's token count."""
    last_block = model.depth - 1
    return [
        Stage(count, 1 if model.last_block_cls_only and block == last_block else count)
        for block, count in enumerate(block_lengths(spans, model.depth, model.num_patches))
    ]


def products(model: ModelConfig, spans: Sequence[SkipConfig] = (), num_classes: int = 1000) -> list[Product]:
    """Every matrix product of the forward pass of one image, in the order the data flows."""
    D, H, N = model.embed_dim, model.num_heads, model.num_patches
    d = D // H
    # The attention of all tokens, for `mean_attention`, is the block's own; norms and given scores need no product.
    of_cls = ("cls_attention", "cls_attention_value")
    scoring = {span.start - 1 for span, *_ in span_shapes(spans, N) if span.score in of_cls}
    found = [Product("patches", N, 3 * model.patch_size**2, D, gradients=1)]
    for block, (tokens, queries) in enumerate(stages(model, spans)):
        found += [
            Product("linear", queries, D, D),  # query
            Product("linear", tokens, D, 2 * D),  # key and value
            Product("attention", queries, d, tokens, H, batched=True),
            Product("attention", queries, tokens, d, H, batched=True),
            Product("linear", queries, D, D),  # projection
            Product("linear", queries, D, model.mlp_dim),
            Product("linear", queries, model.mlp_dim, D),
        ]
        if block in scoring:
            found.append(Product("scores", 1, d, tokens, H, batched=True, gradients=0))
        found += [
            Product("fuse", 1, shape.live - shape.kept, D, batched=True, gradients=1)
            for shape in span_shapes(spans, N)
            if shape.span.skipped == "fuse" and shape.span.start == block + 1
        ]
    return [*found, Product("head", 1, D, model.num_classes or num_classes)]


def forward_macs(model: ModelConfig, spans: Sequence[SkipConfig] = (), num_classes: int = 1000) -> int:
    """Multiply-accumulates of one image's forward pass."""
    return sum(product.macs for product in products(model, spans, num_classes))


def training_flops(model: ModelConfig, spans: Sequence[SkipConfig] = (), num_classes: int = 1000) -> dict[str, int]:
    """Floating-point operations of one image's training step, forward and backward, by group and in ``total``."""
    groups: dict[str, int] = {}
    for product in products(model, spans, num_classes):
        groups[product.group] = groups.get(product.group, 0) + 2 * product.macs * (1 + product.gradients)
    return {**groups, "total": sum(groups.values())}


def speed_up_bound(model: ModelConfig, spans: Sequence[SkipConfig], num_classes: int = 1000) -> float:
    """How many times fewer operations a training step has with ``spans`` than without."""
    dense = training_flops(model, (), num_classes)["total"]
    return dense / training_flops(model, spans, num_classes)["total"]


# What the prediction for 910A assumes. Not one of these was measured by us: nothing here has run on Ascend.
CUBE_FLOPS = 256e12  # float16 peak of the cube unit (Huawei's data sheet of the Ascend 910)
CUBE_EFFICIENCY = 0.6  # the share of it that large products reach: assumed
CUBE_BLOCK = 16  # it multiplies 16 x 16 blocks: dimensions are padded to that
HBM_BYTES_PER_SECOND = 1.2e12  # often given for its HBM2; unconfirmed
HBM_EFFICIENCY = 0.7  # assumed
OPTIMIZER_BYTES = 46  # a parameter and step: AdamW's reads and writes, decay, unscaling, the float16 copy


class Prediction(NamedTuple):
    """Milliseconds of a step on one 910A, and images a second; a prediction."""

    cube_ms: float
    memory_ms: float
    images_per_second: float


def predict_910a(
    model: ModelConfig, spans: Sequence[SkipConfig], batch_size: int, num_classes: int = 1000
) -> Prediction:
    """What the roofline allows one 910A for a step in float16: a prediction, not a measurement.

    A product takes the longer of its arithmetic, with its sides padded to 16, and its operands' traffic; everything
    else takes its traffic alone, each operator reading and writing global memory once, the backward pass moving twice
    the bytes of the forward pass. Launches, the input pipeline and all-reduce are left out: an upper limit.
    """
    cube = sum(product_seconds(product, batch_size) for product in products(model, spans, num_classes))
    traffic = 3.0 * batch_size * sum(_elementwise_bytes(model, stage) for stage in stages(model, spans))
    traffic += OPTIMIZER_BYTES * parameter_count(model, num_classes)
    memory = traffic / (HBM_BYTES_PER_SECOND * HBM_EFFICIENCY)
    return Prediction(1e3 * cube, 1e3 * memory, batch_size / (cube + memory))


def padded_flops(product: Product, batch_size: int) -> float:
    """What the cube unit computes for a product of a batch, forward: its sides padded to 16."""
    rows, copies = _rows_and_copies(product, batch_size)
    padded = [-(-side // CUBE_BLOCK) * CUBE_BLOCK for side in (rows, product.inner, product.columns)]
    return 2.0 * copies * padded[0] * padded[1] * padded[2]


def product_seconds(product: Product, batch_size: int) -> float:
    """Seconds of a product and its gradients on a 910A: of its arithmetic or of its traffic, what is longer."""
    rows, copies = _rows_and_copies(product, batch_size)
    arithmetic = padded_flops(product, batch_size) / (CUBE_FLOPS * CUBE_EFFICIENCY)
    values = rows * product.inner + product.inner * product.columns + rows * product.columns
    transfer = 2.0 * copies * values / (HBM_BYTES_PER_SECOND * HBM_EFFICIENCY)
    return (1 + product.gradients) * max(arithmetic, transfer)


def _rows_and_copies(product: Product, batch_size: int) -> tuple[int, int]:
    if product.batched:
        return product.rows, product.times * batch_size
    return product.rows * batch_size, product.times


def _elementwise_bytes(model: ModelConfig, stage: Stage) -> float:
    """Bytes that a block's operators between the products read and write forward, an image (float16 activations)."""
    D = model.embed_dim
    wide, narrow = stage.tokens * D, stage.queries * D
    norms = 6 * wide + 6 * narrow  # float32 in, float16 out
    qkv = (2 * wide + narrow) * (4 + 4) + narrow * 4  # bias, transposition; scaling of the query
    softmax = model.num_heads * stage.queries * stage.tokens * (6 + 8 + 6)  # to float32, softmax, to float16
    projections = 2 * narrow * (4 + 6 + 12) + narrow * 4  # bias, to float32, residual sum; heads joined
    mlp = stage.queries * model.mlp_dim * (4 + 4)  # bias, GELU
    return norms + qkv + softmax + projections + mlp


def parameter_count(model: ModelConfig, num_classes: int = 1000) -> int:
    """Parameters of the model; skipping adds none."""
    D, M, C = model.embed_dim, model.mlp_dim, model.num_classes or num_classes
    block = 3 * D * D + 3 * D + D * D + D + 2 * D * M + M + D + 4 * D
    patches = 3 * model.patch_size**2 * D + D
    return patches + D + (1 + model.num_patches) * D + model.depth * block + 2 * D + D * C + C
