"""The Vision Transformer with and without the skip path.

Parameters bear timm's names (``blocks.0.attn.qkv.weight`` ...), so weights map one to one; the skip path adds none.
``B`` images, ``N`` patches, ``T`` tokens present, ``D`` width, ``H`` heads of ``d = D / H``, ``C`` classes.
"""

import math

import numpy as np
from mindcv.models.registry import register_model
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from skipvit import tokens as token_path
from skipvit.config import (
    GIVEN_SCORES,
    MODEL_NAMES,
    ModelConfig,
    UserError,
    check_spans,
    default_skip,
    model_config,
    skip_spans,
    span_shapes,
)
from skipvit.kernels import (
    SQRT_HALF,
    ExactGelu,
    affine_kernel,
    attention_kernel,
    layer_norm_kernel,
    scale_samples_kernel,
    swap_kernel,
)
from skipvit.runtime import sort_dtype


class Linear(nn.Cell):
    """``x @ weight.T + bias`` over the last axis: ``(B, T, I)`` to ``(B, T, O)`` in ``dtype``.

    Two-dimensional MatMul is what both the cube unit and the CPU's library do best.
    """

    def __init__(self, in_dim, out_dim, dtype):
        super().__init__()
        self.weight = Parameter(Tensor(np.zeros((out_dim, in_dim), np.float32)))
        self.bias = Parameter(Tensor(np.zeros(out_dim, np.float32)))
        self.in_dim, self.dtype = in_dim, dtype
        self.affine = affine_kernel()

    def construct(self, x):
        """See the class."""
        return self.project(x, self.weight, self.bias)

    def project(self, x, weight, bias):
        """By some rows of the weight ``(O', I)`` and of the bias ``(O',)``: ``(B, T, I)`` to ``(B, T, O')``."""
        rows = x.reshape(-1, self.in_dim).astype(self.dtype)
        y = self.affine(rows, weight.astype(self.dtype), bias.astype(self.dtype))
        return y.reshape(x.shape[:-1] + weight.shape[:1])


class LayerNorm(nn.Cell):
    """Layer norm over the last axis, in float32 whatever the precision (eps 1e-6, as timm's ViT)."""

    def __init__(self, dim):
        super().__init__()
        self.weight = Parameter(Tensor(np.ones(dim, np.float32)))
        self.bias = Parameter(Tensor(np.zeros(dim, np.float32)))
        self.normalize = layer_norm_kernel()

    def construct(self, x):
        """``(..., D)`` to ``(..., D)``."""
        return self.normalize(x, self.weight, self.bias)


GELU_FACTORS = {"exact": (SQRT_HALF, SQRT_HALF), "sigmoid": (1.702, 1 / 1.702), "tanh": (1.0, 0.5)}


class Gelu(nn.Cell):
    """GELU (arXiv 1606.08415), exact or one of its two approximations, but for two factors.

    With ``f, g = GELU_FACTORS[form]``, ``gelu(x)`` is ``g`` times this of ``f * x``.
    """

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.exact = ExactGelu()

    def construct(self, u):
        """``(...)`` to ``(...)``."""
        if self.form == "sigmoid":
            return u * ops.sigmoid(u)
        if self.form == "tanh":
            return u * (1.0 + ops.tanh(0.7978845608028654 * (u + 0.044715 * u * u * u)))
        return self.exact(u)


def _fraction(x):
    return x - ops.floor(x)


def dropout(x, rate, seed):
    """Zero a share ``rate`` of ``x (B, T, D)`` and scale up the rest, by a hash of (place, seed).

    A dropout kernel's state can be neither read nor set, so a resumed run would draw otherwise. Here the place in the
    tensor and the seed, an input of the graph, are hashed in float32 by multiply, add and floor alone, which every
    device has (the "hash without sine" family). Rows and columns lie irrational steps apart, so that none comes twice,
    and are mixed three times, as after once some pairs of columns are still kept and zeroed together.
    """
    B, T, D = x.shape
    row = Tensor((np.arange(B * T, dtype=np.float64) * 0.6180339887498949 % 1.0).astype(np.float32)[:, None])
    column = Tensor((np.arange(D, dtype=np.float64) * 0.7548776662466927 % 1.0).astype(np.float32)[None, :])
    mixed = row * (seed + 33.33) + column * (column + 33.33) + seed * (row + 33.33)  # (B*T, D)
    first = _fraction((row + column + 2.0 * mixed) * (seed + mixed))
    second = _fraction((first + row) * 91.3458 * (first + column + seed + 1.5))
    third = _fraction(second * 47.4537 * (second + 1.0 + first))
    kept = (third >= rate).astype(x.dtype) * (1.0 / (1.0 - rate))
    return x * kept.reshape(B, T, D)


class Attention(nn.Cell):
    """Multi-head self-attention; also gives what tokens are scored from."""

    def __init__(self, config: ModelConfig, dtype):
        super().__init__()
        D = config.embed_dim
        self.num_heads, self.head_dim = config.num_heads, D // config.num_heads
        self.dtype = dtype
        self.qkv = Linear(D, 3 * D, dtype)
        self.proj = Linear(D, D, dtype)
        self.attend, self.swap = attention_kernel(), swap_kernel()

    def construct(self, x, cls_only=False):
        """``(B, T, D)`` to output ``(B, Q, D)``, and a tuple of query ``(B, H, Q, d)``, key and value ``(B, H, T, d)``.

        All tokens are queries, Q = T, or with ``cls_only`` the CLS token alone, Q = 1.
        """
        B, _, D = x.shape
        if cls_only:
            query_weight, key_weight, value_weight = ops.split(self.qkv.weight, D, 0)
            query_bias, key_bias, value_bias = ops.split(self.qkv.bias, D, 0)
            query = self.qkv.project(x[:, :1], query_weight, query_bias)
            key = self.qkv.project(x, key_weight, key_bias)
            value = self.qkv.project(x, value_weight, value_bias)
        else:
            query, key, value = ops.split(self.qkv(x), D, -1)
        query, key, value = self.heads(query), self.heads(key), self.heads(value)
        out = self.attend(query * self.head_dim**-0.5, key, value)  # (B, H, Q, d)
        out = self.swap(out).reshape(B, query.shape[2], D)
        return self.proj(out), (query, key, value)

    def heads(self, x):
        """``(B, T, D)`` to ``(B, H, T, d)``."""
        B, T, _ = x.shape
        return self.swap(x.reshape(B, T, self.num_heads, self.head_dim))


class Mlp(nn.Cell):
    """The block's two-layer perceptron, ``(B, T, D)`` to ``(B, T, D)``."""

    def __init__(self, config: ModelConfig, dtype):
        super().__init__()
        self.fc1 = Linear(config.embed_dim, config.mlp_dim, dtype)
        self.act = Gelu(config.gelu)
        # GELU's factors are taken into the weights: far fewer numbers than the tokens.
        self.factor_in, self.factor_out = GELU_FACTORS[config.gelu]
        self.fc2 = Linear(config.mlp_dim, config.embed_dim, dtype)
        self.dropout = config.dropout

    def construct(self, x, seed=None):
        """``seed`` is given in training with dropout."""
        fc1, fc2 = self.fc1, self.fc2
        hidden = self.act(fc1.project(x, fc1.weight * self.factor_in, fc1.bias * self.factor_in))
        if seed is not None:
            hidden = dropout(hidden, self.dropout, seed)
        return fc2.project(hidden, fc2.weight * self.factor_out, fc2.bias)


class Block(nn.Cell):
    """Pre-norm transformer block; the residual stream stays in float32."""

    def __init__(self, config: ModelConfig, dtype):
        super().__init__()
        self.norm1 = LayerNorm(config.embed_dim)
        self.attn = Attention(config, dtype)
        self.norm2 = LayerNorm(config.embed_dim)
        self.mlp = Mlp(config, dtype)
        self.scale_samples = scale_samples_kernel()
        self.dropout = config.dropout

    def construct(self, x, branch_factors, seeds, cls_only):
        """One block.

        Args:
            x: ``(B, T, D)``.
            branch_factors: drop path's factor of each sample, ``(2, B)`` for attention and MLP; None: 1.
            seeds: dropout's, ``(3,)``; None: no dropout.
            cls_only: compute the CLS token alone, for which the others are keys and values.

        Returns:
            ``(B, Q, D)``, and the attention's query ``(B, H, Q, d)``, key and value ``(B, H, T, d)``; Q is T, or 1.
        """
        branch, parts = self.attn(self.norm1(x), cls_only)
        if cls_only:
            x = x[:, :1]
        x = x + self._regularize(branch, branch_factors, seeds, 0)
        branch = self.mlp(self.norm2(x), None if seeds is None else seeds[2])
        x = x + self._regularize(branch, branch_factors, seeds, 1)
        return x, parts

    def _regularize(self, branch, branch_factors, seeds, which):
        branch = branch.astype(mstype.float32)
        if seeds is not None:
            branch = dropout(branch, self.dropout, seeds[which])
        if branch_factors is not None:
            branch = self.scale_samples(branch, branch_factors[which])
        return branch


class PatchEmbed(nn.Cell):
    """Images to patch tokens by reshape and matrix product: a strided convolution's numbers at a fraction of its cost.

    The weight keeps the convolution's shape ``(D, 3, p, p)``, as timm has it.
    """

    def __init__(self, config: ModelConfig, dtype):
        super().__init__()
        self.proj = PatchProjection(config, dtype)
        self.patch_size = config.patch_size
        self.grid = config.image_size // config.patch_size

    def construct(self, images):
        """``(B, 3, S, S)`` to ``(B, N, D)``."""
        B = images.shape[0]
        g, p = self.grid, self.patch_size
        patches = images.reshape(B, 3, g, p, g, p).transpose(0, 2, 4, 1, 3, 5)
        return self.proj(patches.reshape(B, g * g, 3 * p * p))


class PatchProjection(nn.Cell):
    """The linear map of flattened patches; apart only so that its parameters are called ``patch_embed.proj.*``."""

    def __init__(self, config: ModelConfig, dtype):
        super().__init__()
        p, D = config.patch_size, config.embed_dim
        self.weight = Parameter(Tensor(np.zeros((D, 3, p, p), np.float32)))
        self.bias = Parameter(Tensor(np.zeros(D, np.float32)))
        self.dtype, self.dim = dtype, D
        self.affine = affine_kernel()

    def construct(self, patches):
        """``(B, N, 3*p*p)`` to ``(B, N, D)``."""
        B, N, P = patches.shape
        weight = self.weight.reshape(self.dim, P).astype(self.dtype)
        rows = patches.reshape(B * N, P).astype(self.dtype)
        return self.affine(rows, weight, self.bias.astype(self.dtype)).reshape(B, N, self.dim)


class VisionTransformer(nn.Cell):
    """ViT whose patch tokens may skip spans of blocks (SkipViT, arXiv 2401.15293).

    ``net(images)`` gives logits ``(B, C)`` float32 for normalised images ``(B, 3, S, S)``.

    Args:
        config: sizes; ``num_classes`` must be known by now.
        spans: the SkipConfigs, in order; none is the plain ViT, and so is a span that keeps every token.
        dtype: of the matrix products; softmax, norms and the residual stream stay float32.
        seed: of the initial weights.
    """

    def __init__(self, config: ModelConfig, spans=(), dtype=mstype.float32, seed=0):
        super().__init__()
        check_spans(spans, config.depth)
        N, D = config.num_patches, config.embed_dim
        # Plain numbers and words, because graph mode reads no dataclasses.
        shapes = span_shapes(spans, N)
        self.span_places = _places_among(spans, [shape.span for shape in shapes])
        spans = tuple(shape.span for shape in shapes)
        self.span_bounds = tuple((span.start, span.end) for span in spans)
        self.span_leads = tuple(shape.lead for shape in shapes)
        self.span_kept = tuple(shape.kept for shape in shapes)
        self.span_scores = tuple(span.score for span in spans)
        self.span_skipped = tuple(span.skipped for span in spans)
        # For each span the place of its scores among the given ones; -1: it scores by block start-1.
        given = [index for index, span in enumerate(spans) if span.score in GIVEN_SCORES]
        self.span_given = tuple(given.index(index) if index in given else -1 for index in range(len(spans)))
        self.needs_scores = any(span.score == "mask" for span in spans)
        # Where none come with the images `random` is this one choice for all.
        fixed = [np.random.default_rng(index).permutation(N) / N for index in given]
        self.fixed_scores = Tensor(np.array(fixed, np.float32)[:, None]) if given else None  # (G, 1, N)
        self.depth, self.num_patches = config.depth, N
        self.last_block_cls_only = config.last_block_cls_only
        self.dropout, self.sort_dtype = config.dropout, sort_dtype()
        # What sorts places: float16 counts exactly up to 2048 only.
        self.place_dtype = self.sort_dtype if N <= 2048 else mstype.float32

        self.cls_token = Parameter(Tensor(np.zeros((1, 1, D), np.float32)))
        self.pos_embed = Parameter(Tensor(np.zeros((1, 1 + N, D), np.float32)))
        self.patch_embed = PatchEmbed(config, dtype)
        self.blocks = nn.CellList([Block(config, dtype) for _ in range(config.depth)])
        self.splits = nn.CellList([token_path.Split(shape.kept, shape.lead) for shape in shapes])
        self.norm = LayerNorm(D)
        self.head = Linear(D, config.num_classes, dtype)
        initialize(self, seed)
        # Past Cell's bookkeeping: they hold this model, not the other way round.
        object.__setattr__(self, "features_graph", Features(self))
        object.__setattr__(self, "kept_tokens_graph", KeptTokens(self))

    def construct(self, images, drop_path=None, dropout_seeds=None, scores=None):
        """Logits.

        Args:
            images: ``(B, 3, S, S)``, normalised.
            drop_path: in training, the factor of each residual branch, ``(depth, 2, B)``: 0 or 1 / (1 - rate).
            dropout_seeds: in training with dropout, ``(1 + depth, 3)`` in [0, 1).
            scores: ``(G, B, N)`` float32 for the G spans whose score is ``random`` or ``mask``. None: ``random`` is
                one fixed choice for all images.

        Returns:
            ``(B, C)`` float32.

        Raises:
            ValueError: a span scores by ``mask`` and there are no scores.
        """
        return self.classify(self.run(images, drop_path, dropout_seeds, scores, self.last_block_cls_only)[0])

    def run(self, images, drop_path=None, dropout_seeds=None, scores=None, cls_only=False):
        """From images through the last block.

        Args:
            images: as in `construct`, and so are the next three.
            drop_path: see there.
            dropout_seeds: see there.
            scores: see there.
            cls_only: only the CLS token is wanted, so the last block computes no other.

        Returns:
            A tuple of the tokens ``(B, T, D)``, CLS first, then those fused, then patches in no particular order
            (``(B, 1, D)`` if ``cls_only``); the place ``(B, L)`` that each of the patches in this order has in the
            image; for each span that skips the places ``(B, K)`` kept; and for each of them the scores ``(B, L)`` it
            chose by and these patches' places ``(B, L)``.
        """
        if scores is None and self.needs_scores:
            raise ValueError("skip.score=mask: the masks' scores (G, B, N) must come with the images, as scores=")
        if scores is None and self.fixed_scores is not None:
            scores = self.fixed_scores + ops.zeros((1, images.shape[0], 1), mstype.float32)
        x = self.embed(images, dropout_seeds)  # (B, 1+N, D)
        places = ops.zeros((images.shape[0], 1), mstype.int32) + Tensor(np.arange(self.num_patches, dtype=np.int32))
        kept_places, chosen_by = (), ()
        parts = ()
        block = 0
        for index, (start, end) in enumerate(self.span_bounds):
            # Early blocks, all tokens there are; the last of them scores.
            for i in range(block, start):
                x, parts = self.run_block(i, x, drop_path, dropout_seeds, cls_only)
            score = self.score(index, parts, scores, places)
            chosen_by += (score, places)  # type: ignore[assignment]
            order = token_path.rank(score, self.sort_dtype)
            positions = token_path.inverse(order, self.place_dtype)
            places = token_path.gather(ops.expand_dims(places, -1), order)[:, :, 0]
            kept_places += (places[:, : self.span_kept[index]],)  # type: ignore[assignment]
            kept, skipped = self.splits[index](x, order, positions)
            if self.span_skipped[index] == "fuse":
                kept = token_path.fuse(kept, skipped, score, order, self.span_leads[index])
            # Middle blocks, kept tokens only; the next span may begin right behind and be scored by the last of them.
            for i in range(start, end):
                kept, parts = self.run_block(i, kept, drop_path, dropout_seeds, cls_only)
            rejoins = self.span_skipped[index] == "rejoin"
            if not rejoins:
                places = kept_places[index]
            x = token_path.rejoin(kept, skipped) if rejoins and not (cls_only and end == self.depth) else kept
            block = end
        # Late blocks.
        for i in range(block, self.depth):
            x, _ = self.run_block(i, x, drop_path, dropout_seeds, cls_only)
        return (x, places) + kept_places + chosen_by  # noqa: RUF005 - MindSpore 2.0.0 parses no starred tuple

    def score(self, index, parts, scores, places):
        """Score of each patch for span number ``index``: ``(B, L)`` float32, in the order of ``places (B, L)``."""
        given = self.span_given[index]
        if given < 0:
            return token_path.score(self.span_scores[index], parts, self.span_leads[index])
        of_places = token_path.gather(ops.expand_dims(scores[given], -1), places)[:, :, 0]
        return token_path.as_mass(of_places)

    def classify(self, tokens):
        """Norm and head on the CLS token: ``(B, T, D)`` to ``(B, C)`` float32."""
        return self.head(self.norm(tokens[:, 0])).astype(mstype.float32)

    def embed(self, images, dropout_seeds=None):
        """Patches, CLS token in front, position embedding: ``(B, 3, S, S)`` to ``(B, 1+N, D)``."""
        patches = self.patch_embed(images).astype(mstype.float32)
        B, _, D = patches.shape
        x = ops.concat((ops.broadcast_to(self.cls_token, (B, 1, D)), patches), 1) + self.pos_embed
        if dropout_seeds is not None:
            x = dropout(x, self.dropout, dropout_seeds[0, 0])
        return x

    def run_block(self, i, x, drop_path, dropout_seeds, cls_only):
        """Block ``i`` with its share of this step's randomness."""
        branch_factors = None if drop_path is None else drop_path[i]
        seeds = None if dropout_seeds is None else dropout_seeds[i + 1]
        return self.blocks[i](x, branch_factors, seeds, cls_only and i == self.depth - 1)

    def forward_features(self, images, scores=None):
        """All tokens after the final norm, in image order: ``(B, 3, S, S)`` to ``(B, 1+N, D)``, CLS first.

        A head for a dense task (segmentation, detection) works on ``[:, 1:]``, the patches row by row. ``scores`` as in
        `construct`.

        Raises:
            ValueError: the tokens of a span are dropped or fused, so no full grid exists.
        """
        if any(skipped != "rejoin" for skipped in self.span_skipped):
            raise ValueError("forward_features: skip.skipped drops tokens, so no full grid exists; use skipped=rejoin")
        return self.features_graph(images, scores)

    def kept_tokens(self, images, span=0, scores=None):
        """Which patches pass span number ``span``: ``(B, K)`` int32 indices in image order (ascending).

        Raises:
            ValueError: the model has no such span.
        """
        if span < 0 or span >= len(self.span_places):
            raise ValueError(f"kept_tokens: the model skips in {len(self.span_places)} spans, there is no span {span}")
        return self.kept_tokens_graph(images, self.span_places[span], scores)


class Features(nn.Cell):
    """`VisionTransformer.forward_features` as one graph; outside a Cell each block would be compiled by itself."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, images, scores=None):
        """``(B, 3, S, S)`` to ``(B, 1+N, D)``."""
        results = self.net.run(images, scores=scores)
        tokens, places = self.net.norm(results[0]), results[1]
        if not self.net.span_bounds:
            return tokens
        return token_path.image_order(tokens, token_path.inverse(places, self.net.place_dtype))


class KeptTokens(nn.Cell):
    """`VisionTransformer.kept_tokens` as one graph."""

    def __init__(self, net):
        super().__init__(auto_prefix=False)
        self.net = net

    def construct(self, images, place, scores=None):
        """``(B, 3, S, S)`` to ``(B, K)`` int32; ``place`` is the span's among those that skip, -1: it keeps all."""
        if place < 0:
            all_places = Tensor(np.arange(self.net.num_patches, dtype=np.int32))
            return ops.zeros((images.shape[0], 1), mstype.int32) + all_places
        return token_path.ascending(self.net.run(images, scores=scores)[2 + place], self.net.place_dtype)


def _places_among(spans, skipping):
    """For each span its place among those that skip.

    One that keeps all patches there are has that of the span before it which dropped the others, or -1 for all N.
    """
    places, dropped = [], -1
    for span in spans:
        place = skipping.index(span) if span in skipping else dropped
        places.append(place)
        if span in skipping and span.skipped != "rejoin":
            dropped = place
    return tuple(places)


def initialize(net, seed):
    """Give ``net`` the initial weights of timm's ViT, each a function of (seed, parameter name) alone.

    Linear weights and position embedding normal with deviation 0.02, CLS token 1e-6, the patch projection uniform as
    PyTorch's convolution, biases 0, norms 1 and 0.
    """
    for name, parameter in net.parameters_and_names():
        generator = np.random.default_rng([seed, *name.encode()])
        if name.startswith("patch_embed"):
            bound = 1 / math.sqrt(np.prod(net.patch_embed.proj.weight.shape[1:]))
            value = generator.uniform(-bound, bound, parameter.shape)
        elif name == "cls_token":
            value = generator.normal(0, 1e-6, parameter.shape)
        elif name == "pos_embed" or (name.endswith(".weight") and len(parameter.shape) == 2):
            value = generator.normal(0, 0.02, parameter.shape)
        else:
            value = np.full(parameter.shape, 1.0 if name.endswith("weight") else 0.0)
        parameter.set_data(Tensor(value.astype(np.float32)))


def create_model(name, num_classes=1000, skip=None, *, dtype=mstype.float32, seed=0, **overrides):
    """Build a model by name.

    Args:
        name: ``vit_{tiny,small,base}_patch16_224`` or ``skipvit_{tiny,small,base}_patch16_224``.
        num_classes: C.
        skip: a mapping or SkipConfig, or a list of them; None: a ``skipvit_*`` name takes the recipe's span, a
            ``vit_*`` name none.
        dtype: of the matrix products, float32 or float16.
        seed: of the initial weights.
        **overrides: any key of the section ``model``, such as ``image_size=32, patch_size=4, depth=6``.

    Returns:
        A `VisionTransformer`, a MindSpore Cell.

    Raises:
        UserError: an unknown name or key, or values that contradict each other.

    Example:
        >>> net = create_model("skipvit_small_patch16_224", skip={"start": 3, "end": 11, "keep_ratio": 0.45})
    """
    config = model_config(name, num_classes=num_classes, **overrides)
    spans = default_skip(config) if skip is None else skip_spans(skip)
    return VisionTransformer(config, spans, dtype, seed)


def _register(name):
    """Make ``mindcv.create_model(name)`` give our model."""

    def build(pretrained=False, num_classes=1000, in_channels=3, **keywords):
        if pretrained:
            raise UserError(f"{name}: there are no pretrained weights to fetch; leave pretrained out")
        if in_channels != 3:
            raise UserError(f"{name}: in_channels={in_channels} is not supported; the model takes RGB images, 3")
        return create_model(name, num_classes, **keywords)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"``create_model({name!r}, ...)`` for mindcv's registry."
    register_model(build)


for _name in MODEL_NAMES:
    _register(_name)
