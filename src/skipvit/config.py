"""The configuration: frozen dataclasses, read from YAML and ``key=value`` overrides, checked before anything runs.

A recipe under ``configs/`` gives the sections ``model``, ``skip``, ``phases``, ``data``, ``augment``, ``optim`` and
``train``; what it leaves out has the default written here. Each field is read where it is used, by its own name.
Nothing here imports MindSpore, so that a mistake is told before the slow part starts.
"""

import contextlib
import copy
import dataclasses
import difflib
import inspect
import json
import math
import re
import reprlib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import yaml

SCORES = ("cls_attention", "cls_attention_value", "key_norm", "mean_attention", "random", "mask")
GIVEN_SCORES = ("random", "mask")  # come with the batch; block start-1 gives the others
SKIPPED = ("rejoin", "drop", "fuse")
GELUS = ("exact", "tanh", "sigmoid")
PRECISIONS = ("auto", "fp32", "fp16")
CROPS = ("random_resized", "shift", "none")

# Width, depth, heads of each model size (DeiT, table 1; timm's vit_{tiny,small,base}_patch16_224).
SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
MODEL_NAMES = tuple(f"{kind}_{size}_patch16_224" for kind in ("vit", "skipvit") for size in SIZES)

# Part of no run's identity: a resume may give these another value, because the weights do not depend on them.
# (The training images are compared by what their folder holds, the rank's batch size by the global batch, in train.py;
# other validation images begin the search for the best checkpoint anew.)
FREE_ON_RESUME = frozenset(
    {
        "data.train",
        "data.val",
        "data.masks",
        "data.train_masks",
        "data.batch_size",
        "data.global_batch_size",
        "data.num_workers",
        "data.worker_processes",
        "data.max_unreadable_share",
        "train.stop_after_epochs",
        "train.max_steps",
        "train.resume",
        "train.output",
        "train.sink_steps",
        "train.validate_every_epochs",
        "train.log_every_steps",
        "train.jit_level",
        "train.keep_checkpoints",
        "train.stall_seconds",
        "train.tensorboard",
        "train.profile",
    }
)
MAX_FILE_BYTES = 1 << 16
MAX_DEPTH = 20  # of lists and sections within each other
MAX_INT = 2**31 - 1
# Beyond these lies no model or machine: what follows is a slip or an attack, and would take all memory or time.
LARGEST = {
    "model.image_size": 16_384,
    "model.embed_dim": 65_536,
    "model.depth": 1_000,
    "model.num_classes": 1_000_000,
    "phases.image_size": 16_384,
    "data.batch_size": 1_000_000,
    "data.num_workers": 1_000,
    "augment.shift_pixels": 16_384,
    "augment.rand_augment_layers": 100,
    "augment.mixup": 1_000.0,
    "augment.cutmix": 1_000.0,
}


class UserError(Exception):
    """A mistake the user can mend: one line saying what is wrong, where, and what would be right (exit 2)."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which, as in its version 1.2, only true and false are booleans, and a date is text.

    Version 1.1, PyYAML's, takes the `no` of ``train.resume=no`` for false. A key may be given once, where PyYAML takes
    the last silently, and `<<` merges nothing: merges of merges grow without bound.
    """

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {line}: a list or section cannot be a key")
            if key.value in seen:
                raise ValueError(f"line {line}: {_short(key.value)} is given twice in one section")
            seen.add(key.value)

    def compose_node(self, parent: Optional[yaml.Node], index: Any) -> Optional[yaml.Node]:
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:  # the scanner's time grows with the square of it
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":timestamp", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def parse_yaml(text: Union[str, bytes]) -> Any:
    """Plain data from YAML, no object ever made of it.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # a value that its tag does not fit (`!!bool x`) raises nearly any kind
        raise ValueError(" ".join(str(error).split())[:300]) from None


@dataclass(frozen=True)
class ModelConfig:
    """The Vision Transformer. Sizes left out follow from ``name``."""

    name: str = "skipvit_small_patch16_224"  # vit_* or skipvit_*, of tiny, small, base
    num_classes: Optional[int] = None  # None: as many as the training folder has
    image_size: int = 224  # pixels a side
    patch_size: int = 16  # pixels a side
    embed_dim: int = 384  # width of a token; tiny has 192, base 768
    depth: int = 12  # blocks
    num_heads: int = 6  # of each attention; tiny has 3, base 12
    mlp_ratio: float = 4.0  # the MLP's hidden width over embed_dim
    dropout: float = 0.0  # share of token values zeroed after the embedding, each projection and each MLP layer
    drop_path: float = 0.0  # share of samples whose residual branch is left out in the last block; linear from 0
    gelu: str = "exact"  # exact (erf, as timm), or the cheaper tanh and sigmoid forms
    last_block_cls_only: bool = True  # the last block computes the CLS token alone, all the head reads: same logits

    def __post_init__(self) -> None:
        _one_of("model.name", self.name, MODEL_NAMES)
        _one_of("model.gelu", self.gelu, GELUS)
        for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads"):
            _at_least(f"model.{name}", getattr(self, name), 1)
        if self.num_classes is not None:
            _at_least("model.num_classes", self.num_classes, 1)
        for name in ("dropout", "drop_path"):
            _within(f"model.{name}", getattr(self, name), 0.0, 1.0, "[0, 1)")
        if not 1 <= self.mlp_ratio * self.embed_dim <= MAX_INT:
            raise UserError(f"model.mlp_ratio: {self.mlp_ratio} gives the MLP no width to compute with; 4.0 is usual")
        if self.image_size % self.patch_size:
            raise UserError(
                f"model.image_size: {self.image_size} is not a multiple of model.patch_size {self.patch_size}; "
                f"{self.image_size // self.patch_size * self.patch_size or self.patch_size} would be"
            )
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"model.num_heads: {self.num_heads} heads do not divide model.embed_dim {self.embed_dim}; "
                f"{_nearest_divisor(self.embed_dim, self.num_heads)} would"
            )

    @property
    def num_patches(self) -> int:
        """Patch tokens an image, N."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def mlp_dim(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.embed_dim * self.mlp_ratio)


@dataclass(frozen=True)
class SkipConfig:
    """One span of blocks that only the kept tokens pass: ``start .. end-1`` (SkipViT, section 3)."""

    start: int = 3  # first block of the span; block start-1 scores
    end: int = 11  # first block after the span; equal to the depth: rejoin before the final norm
    keep_ratio: float = 0.45  # share of all patch tokens that is kept
    align: int = 1  # the kept length is rounded up to a multiple of this (16 on Ascend's cube unit)
    score: str = "cls_attention"  # what makes a patch worth keeping; README names them, tokens.py has their sources
    skipped: str = "rejoin"  # rejoin before block `end`, drop for good, or fuse: one token, their weighted sum, for all

    def __post_init__(self) -> None:
        _one_of("skip.score", self.score, SCORES)
        _one_of("skip.skipped", self.skipped, SKIPPED)
        _at_least("skip.align", self.align, 1)
        if self.score in GIVEN_SCORES:
            _at_least("skip.start", self.start, 0)
        else:
            _at_least(
                "skip.start",
                self.start,
                1,
                f"block start-1 scores the tokens by {self.score}, so a block must come before the span; "
                f"{' and '.join(GIVEN_SCORES)} need none",
            )
        if not 0 < self.keep_ratio <= 1:
            raise UserError(f"skip.keep_ratio: {self.keep_ratio} is outside (0, 1]; the paper keeps 0.45")
        if self.start >= self.end:
            raise UserError(
                f"skip.start: {self.start} is not below skip.end {self.end}; the span start .. end-1 holds no block"
            )

    def kept_count(self, num_patches: int, lead: int = 1) -> int:
        """K, the patch tokens kept of ``num_patches``: from the configuration alone, hence static.

        ``lead`` tokens besides patches are in the sequence already: CLS, and those that earlier spans fused.
        """
        count = max(1, math.floor(self.keep_ratio * num_patches + 0.5))
        if self.align > 1 and count < num_patches:
            others = lead + (self.skipped == "fuse")
            length = -(-(others + count) // self.align) * self.align
            count = max(1, min(length, num_patches + 1) - others)
        return count


class SpanShape(NamedTuple):
    """What a span makes of the sequence."""

    span: SkipConfig
    lead: int  # tokens before the patches, which always go on: CLS, and one for each `fuse` before
    live: int  # patch tokens there are to choose from
    kept: int  # of these, K


def span_shapes(spans: Sequence[SkipConfig], num_patches: int) -> tuple[SpanShape, ...]:
    """Those of the spans, in order, that keep fewer patches than there are; the others do nothing."""
    return tuple(shape for shape in _all_shapes(spans, num_patches) if shape.kept < shape.live)


def _all_shapes(spans: Sequence[SkipConfig], num_patches: int) -> list[SpanShape]:
    shapes = []
    lead, live = 1, num_patches
    for span in spans:
        kept = span.kept_count(num_patches, lead)
        shapes.append(SpanShape(span, lead, live, kept))
        if kept < live:
            if span.skipped != "rejoin":
                live = kept
            lead += span.skipped == "fuse"
    return shapes


def given_spans(config: "Config") -> tuple[SkipConfig, ...]:
    """The spans whose scores come with the batch, G of them."""
    shapes = span_shapes(config.skip, config.model.num_patches)
    return tuple(shape.span for shape in shapes if shape.span.score in GIVEN_SCORES)


def block_lengths(spans: Sequence[SkipConfig], depth: int, num_patches: int) -> list[int]:
    """Tokens that each of the ``depth`` blocks works on, CLS included."""
    lengths = [1 + num_patches] * depth
    for span, lead, _, kept in span_shapes(spans, num_patches):
        length = lead + kept + (span.skipped == "fuse")
        end = span.end if span.skipped == "rejoin" else depth
        lengths[span.start : end] = [length] * (end - span.start)
    return lengths


@dataclass(frozen=True)
class PhaseConfig:
    """A part of the training with a static graph of its own: what it leaves out is as ``skip`` and ``model`` say.

    The last phase says what the finished model is, which is validated and served.
    """

    share: float  # of train.epochs
    keep_ratio: Optional[float] = None  # of every span; 1: no token skips
    image_size: Optional[int] = None  # pixels a side; the position embedding is resampled where it changes

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"phases.share: {self.share} is outside (0, 1]; the shares of all phases add up to 1")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise UserError(f"phases.keep_ratio: {self.keep_ratio} is outside (0, 1]; 1 keeps every token")


@dataclass(frozen=True)
class DataConfig:
    """Image folders (``<class>/<image>``) and how they are read."""

    train: str = "clutter"  # a folder, or `clutter`: the embedded data set, generated on first use
    val: Optional[str] = None  # None with `clutter`: its own
    masks: Optional[str] = None  # folder parallel to val with a mask of each image's object; `clutter` has its own
    train_masks: Optional[str] = None  # the same for train; needed by `score: mask` alone
    batch_size: int = 64  # images a rank and step
    global_batch_size: Optional[int] = None  # images a step over all ranks; given instead of batch_size
    num_workers: int = 2  # threads or processes that prepare images, a rank
    worker_processes: bool = False  # workers as processes instead of threads
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, images in 0..1 (ImageNet's)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)  # the same of the deviation
    val_crop_ratio: float = 0.875  # share of the resized image's side that the central crop takes
    interpolation: str = "bicubic"  # or bilinear
    max_unreadable_share: float = 0.01  # training stops when more of the images than this cannot be read

    def __post_init__(self) -> None:
        _at_least("data.batch_size", self.batch_size, 1)
        _at_least("data.num_workers", self.num_workers, 1)
        _one_of("data.interpolation", self.interpolation, ("bilinear", "bicubic"))
        _within("data.max_unreadable_share", self.max_unreadable_share, 0.0, 1.0, "[0, 1]")
        if self.global_batch_size is not None:
            _at_least("data.global_batch_size", self.global_batch_size, 1)
        if not 0.1 <= self.val_crop_ratio <= 1:
            raise UserError(f"data.val_crop_ratio: {self.val_crop_ratio} is outside [0.1, 1]; 0.875 is usual")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise UserError(f"data.{name}: give three numbers, one for each of red, green, blue")
        if not all(0 <= value <= 1 for value in self.mean):
            raise UserError(f"data.mean: {list(self.mean)} has a value outside [0, 1]; divide by 255")
        if not all(1e-3 <= value <= 1e3 for value in self.std):
            raise UserError(f"data.std: {list(self.std)} has a value outside [0.001, 1000]; pixels are in 0..1")


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to training images. Off by default; the recipes switch it on."""

    crop: str = "random_resized"  # random_resized (ImageNet), shift (pad and crop, CIFAR), none (resize)
    crop_scale: tuple[float, ...] = (0.08, 1.0)  # share of the image's area that a random crop takes
    crop_ratio: tuple[float, ...] = (0.75, 4.0 / 3.0)  # its width over its height
    shift_pixels: int = 4  # how far `shift` moves the image at most
    horizontal_flip: float = 0.5  # probability
    rand_augment_magnitude: float = 0.0  # 0 to 10; 0: off (DeiT: 9)
    rand_augment_std: float = 0.5  # of the magnitude
    rand_augment_layers: int = 2  # operations an image
    erase: float = 0.0  # probability of random erasing
    mixup: float = 0.0  # alpha of mixup's beta distribution; 0: off
    cutmix: float = 0.0  # alpha of cutmix's; 0: off
    mix_probability: float = 1.0  # that a batch is mixed at all, where mixup or cutmix is on
    label_smoothing: float = 0.0  # share of a target that is spread over all classes
    repeats: int = 1  # repeated augmentation: an image's appearances in a batch sequence (DeiT: 3); 1: off

    def __post_init__(self) -> None:
        _one_of("augment.crop", self.crop, CROPS)
        _at_least("augment.repeats", self.repeats, 1)
        _at_least("augment.shift_pixels", self.shift_pixels, 0)
        _at_least("augment.rand_augment_layers", self.rand_augment_layers, 1)
        _within("augment.rand_augment_magnitude", self.rand_augment_magnitude, 0.0, 10.0, "[0, 10]")
        for name in ("horizontal_flip", "erase", "mix_probability"):
            _within(f"augment.{name}", getattr(self, name), 0.0, 1.0, "[0, 1]")
        _within("augment.label_smoothing", self.label_smoothing, 0.0, 1.0, "[0, 1)")
        for name in ("mixup", "cutmix", "rand_augment_std"):
            _at_least(f"augment.{name}", getattr(self, name), 0.0)
        for name in ("crop_scale", "crop_ratio"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1]:
                raise UserError(f"augment.{name}: {list(low_high)} is not [low, high] with 0 < low <= high")
        if self.crop_scale[0] < 1e-6 or not 1e-3 <= self.crop_ratio[0] <= self.crop_ratio[1] <= 1e3:
            raise UserError(
                f"augment.crop_scale: {list(self.crop_scale)} with crop_ratio {list(self.crop_ratio)} leaves no box; "
                "[0.08, 1.0] and [0.75, 1.333] are usual"
            )
        if self.crop_scale[1] > 1:
            raise UserError(f"augment.crop_scale: {list(self.crop_scale)} is more than the whole image, 1.0")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule, clipping, accumulation and the moving average of the weights."""

    learning_rate: float = 1e-3  # at the peak
    reference_batch_size: Optional[int] = None  # given: the rate is scaled by (images an update) / this
    warmup_epochs: float = 5.0  # of linear growth
    warmup_learning_rate: float = 1e-6  # at step 0
    min_learning_rate: float = 1e-5  # at the end of the cosine
    weight_decay: float = 0.05  # not on norms, biases, CLS token and position embedding
    beta1: float = 0.9  # AdamW's, of the gradient's moving average
    beta2: float = 0.999  # of its square's
    epsilon: float = 1e-8  # added to the square's root
    clip_norm: Optional[float] = None  # largest global norm of the gradient; None: no clipping
    accumulate_steps: int = 1  # steps whose gradients one update averages
    ema_decay: float = 0.0  # of the moving average of the weights; 0: none is kept

    def __post_init__(self) -> None:
        for name in (
            "learning_rate",
            "warmup_learning_rate",
            "min_learning_rate",
            "weight_decay",
            "warmup_epochs",
        ):
            _at_least(f"optim.{name}", getattr(self, name), 0.0)
        for name in ("beta1", "beta2", "ema_decay"):
            _within(f"optim.{name}", getattr(self, name), 0.0, 1.0, "[0, 1)")
        _at_least("optim.accumulate_steps", self.accumulate_steps, 1)
        if self.epsilon <= 0:
            raise UserError(f"optim.epsilon: {self.epsilon} is not above 0; 1e-8 is usual")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(f"optim.clip_norm: {self.clip_norm} is not above 0; leave it out to switch clipping off")
        if self.reference_batch_size is not None:
            _at_least("optim.reference_batch_size", self.reference_batch_size, 1)


@dataclass(frozen=True)
class TrainConfig:
    """The run: how long, from what seed, in what precision, into which folder."""

    epochs: int = 300  # the schedule spans them
    stop_after_epochs: Optional[int] = None  # stop earlier, schedule unchanged
    max_steps: Optional[int] = None  # the same in steps
    seed: int = 0  # of the weights, the order and the augmentation
    precision: str = "auto"  # fp32, fp16 with dynamic loss scaling; auto: fp16 on Ascend, fp32 on CPU
    output: str = "runs/default"  # the run's folder
    resume: str = "no"  # auto: go on from `last` where there is one; no: refuse a folder that has one
    init_from: Optional[str] = None  # a checkpoint to take the initial weights from, converted ones too: fine-tuning
    keep_checkpoints: int = 2  # the newest so many: last, previous, previous_2 ...; best is kept beside them
    validate_every_epochs: int = 1  # and always at the end
    log_every_steps: int = 50  # a line without a terminal's bar
    sink_steps: Optional[int] = None  # steps between two looks at the device; None: 100 on Ascend, 1 on CPU
    stall_seconds: float = 600.0  # without a step until all threads' stacks are written to the log; 0: never
    jit_level: Optional[str] = None  # O0, O1, O2; None: the release's own choice
    tensorboard: bool = False  # also write event files for TensorBoard; needs tensorboardX
    profile: Optional[str] = None  # FIRST-LAST: MindSpore's trace of these steps, counted from 1 as the log does

    def __post_init__(self) -> None:
        for name in ("epochs", "validate_every_epochs", "log_every_steps", "keep_checkpoints"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        _at_least("train.stall_seconds", self.stall_seconds, 0.0)
        for name in ("stop_after_epochs", "max_steps", "sink_steps"):
            if getattr(self, name) is not None:
                _at_least(f"train.{name}", getattr(self, name), 1)
        if self.profile is not None:
            first, _, last = self.profile.partition("-")
            if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
                raise UserError(f"train.profile: {_short(self.profile)} is not FIRST-LAST, steps such as 11-20")
        _within("train.seed", self.seed, 0, 2**31 - 1, "[0, 2147483647]")
        _one_of("train.precision", self.precision, PRECISIONS)
        _one_of("train.resume", self.resume, ("no", "auto"))
        if self.jit_level is not None:
            _one_of("train.jit_level", self.jit_level, ("O0", "O1", "O2"))


SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "skip": SkipConfig,
    "phases": PhaseConfig,
    "data": DataConfig,
    "augment": AugmentConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}


@dataclass(frozen=True)
class Config:
    """A whole recipe. ``skip`` holds the spans in order, none is the plain ViT; ``phases`` parts the epochs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    skip: tuple[SkipConfig, ...] = field(default_factory=lambda: (SkipConfig(),))
    phases: tuple[PhaseConfig, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        check_spans(self.skip, self.model.depth)
        total = sum(phase.share for phase in self.phases)
        if self.phases and abs(total - 1) > 1e-6:
            shares = " + ".join(f"{phase.share:g}" for phase in self.phases)
            raise UserError(f"phases: the shares {shares} add up to {total:.9g}; they must make 1")
        for index, phase in enumerate(self.phases):
            if phase.keep_ratio is not None and phase.keep_ratio < 1 and not self.skip:
                raise UserError(
                    f"phases.{index}.keep_ratio: {phase.keep_ratio} where skip is null, so that no token skips; "
                    "leave it out"
                )
        ends = self.phase_ends()
        for index, (start, end) in enumerate(zip([0, *ends], ends)):
            if start == end:
                raise UserError(
                    f"phases.{index}.share: {self.phases[index].share:g} of train.epochs {self.train.epochs} "
                    "is no whole epoch; give a larger share or more epochs"
                )
            try:
                self.of_phase(index)
            except UserError as error:
                raise UserError(str(error).replace("model.image_size", f"phases.{index}.image_size", 1)) from None

    def phase_ends(self) -> list[int]:
        """The epoch after the last of each phase: the shares so far, rounded to whole epochs (halves up)."""
        ends, total = [], 0.0
        for phase in self.phases:
            total += phase.share
            ends.append(math.floor(total * self.train.epochs + 0.5 + 1e-6))
        return ends or [self.train.epochs]

    def of_phase(self, index: int) -> "Config":
        """The recipe as one phase trains by it: ``model`` and ``skip`` are that phase's, and ``phases`` is empty."""
        if not self.phases:
            return self
        phase, model, skip = self.phases[index], self.model, self.skip
        if phase.image_size is not None:
            model = dataclasses.replace(model, image_size=phase.image_size)
        if phase.keep_ratio is not None:
            skip = keeping(skip, phase.keep_ratio)
        return self.replace(model=model, skip=skip, phases=())

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, from which `from_dict` makes an equal Config."""
        plain: dict[str, Any] = {
            name: _plain(getattr(self, name)) for name in ("model", "data", "augment", "optim", "train")
        }
        plain["skip"] = [_plain(span) for span in self.skip] or None
        plain["phases"] = [_plain(phase) for phase in self.phases] or None
        return {section: plain[section] for section in SECTIONS}

    def to_yaml(self) -> str:
        """The resolved recipe as a run's folder keeps it."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def identity(self) -> dict[str, Any]:
        """``key -> value`` of what a resumed run must share with the one it goes on from."""
        return {key: value for key, value in flatten(self.to_dict()).items() if key not in FREE_ON_RESUME}

    def replace(self, **sections: Any) -> "Config":
        """A copy with whole sections replaced."""
        return dataclasses.replace(self, **sections)


def load(path: Union[str, Path], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML recipe and apply ``key=value`` overrides.

    Raises:
        UserError: the file cannot be read or is no mapping, a key is unknown, or a value is out of bounds.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; give a recipe such as configs/cifar10/skipvit.yaml")
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a recipe from configs/") from None
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{path}: larger than {MAX_FILE_BYTES} bytes, which no recipe is")
    try:
        raw = parse_yaml(content)
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds no sections; a recipe begins with lines such as `model:`")
    return from_dict(raw, overrides)


def from_dict(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Build a Config from plain data. A ``skip`` left out takes the recipe's of a ``skipvit_*`` name."""
    raw = {**copy.deepcopy(raw)}
    for override in overrides:
        _apply_override(raw, override)
    sections = [item.name for item in dataclasses.fields(Config)]
    for key in raw:
        if key not in sections:
            raise UserError(_unknown(_key_text(key), sections + _all_keys()))
    model = model_config(**_section(raw, "model"))
    config = Config(
        model=model,
        skip=skip_spans(raw["skip"]) if "skip" in raw else default_skip(model),
        phases=_phases(raw.get("phases")),
        data=_build(DataConfig, _section(raw, "data"), "data"),
        augment=_build(AugmentConfig, _section(raw, "augment"), "augment"),
        optim=_build(OptimConfig, _section(raw, "optim"), "optim"),
        train=_build(TrainConfig, _section(raw, "train"), "train"),
    )
    check_choices(config.skip, model.num_patches)
    return config


def model_config(name: str = ModelConfig.name, **overrides: Any) -> ModelConfig:
    """The configuration of a named model, sizes not overridden following from the name.

    Raises:
        UserError: an unknown name or key, or sizes that contradict each other.
    """
    _one_of("model.name", name, MODEL_NAMES)
    embed_dim, depth, num_heads = SIZES[name.split("_")[1]]
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return _build(ModelConfig, {"name": name, **sizes, **overrides}, "model")


def default_skip(model: ModelConfig) -> tuple[SkipConfig, ...]:
    """The recipe's span for a ``skipvit_*`` name at its usual depth; none for ``vit_*``."""
    if not model.name.startswith("skipvit_"):
        return ()
    default = SkipConfig()
    if default.end > model.depth:
        raise UserError(f"skip: the default ends at block {default.end}, the model has {model.depth}; give skip.end")
    return (default,)


def skip_spans(skip: Any) -> tuple[SkipConfig, ...]:
    """Spans from None (no skipping), one mapping or SkipConfig, or a list of them."""
    if skip is None:
        return ()
    if isinstance(skip, SkipConfig):
        return (skip,)
    if isinstance(skip, Mapping):
        return (_build(SkipConfig, skip, "skip"),)
    if isinstance(skip, (list, tuple)):
        return tuple(
            item if isinstance(item, SkipConfig) else _build(SkipConfig, item, f"skip.{index}")
            for index, item in enumerate(skip)
        )
    raise UserError(f"skip: {_short(skip)} is neither null nor a span; give start, end and keep_ratio")


def keeping(spans: Sequence[SkipConfig], keep_ratio: float) -> tuple[SkipConfig, ...]:
    """The spans with another share of the patches kept."""
    return tuple(dataclasses.replace(span, keep_ratio=keep_ratio) for span in spans)


def check_spans(spans: Sequence[SkipConfig], depth: int) -> None:
    """Refuse spans beyond the model, out of order, overlapping, or touching where a block on all tokens must score."""
    for index, span in enumerate(spans):
        where = "skip" if len(spans) == 1 else f"skip.{index}"
        if span.end > depth:
            raise UserError(f"{where}.end: {span.end} is beyond the model's {depth} blocks; at most {depth}")
        if index:
            before = spans[index - 1]
            scores = before.skipped == "rejoin" and span.score not in GIVEN_SCORES
            if span.start < before.end + scores:
                why = ", so that a block on all tokens scores" if scores else ""
                raise UserError(
                    f"{where}.start: {span.start} does not lie beyond the span before, which ends at {before.end}; "
                    f"at least {before.end + scores}{why}"
                )


def check_choices(spans: Sequence[SkipConfig], num_patches: int) -> None:
    """Refuse spans that find no more patches than they would keep, since those before have dropped the others."""
    for index, (span, _, live, kept) in enumerate(_all_shapes(spans, num_patches)):
        if span.keep_ratio < 1 and live <= kept and live < num_patches:
            raise UserError(
                f"skip.{index}.keep_ratio: {span.keep_ratio} is a share of all {num_patches} patches, of which those "
                f"before leave {live}, so that nothing is left to choose; give less than {live / num_patches:.3g}"
            )


def _phases(raw: Any) -> tuple[PhaseConfig, ...]:
    if raw is None:
        return ()
    if not isinstance(raw, (list, tuple)) or not raw:
        raise UserError(f"phases: {_short(raw)} is no list of phases; each has a share, and keep_ratio or image_size")
    for index, phase in enumerate(raw):
        if isinstance(phase, Mapping) and "share" not in phase:
            raise UserError(f"phases.{index}.share: not given; the shares of all phases add up to 1")
    return tuple(_build(PhaseConfig, phase, f"phases.{index}") for index, phase in enumerate(raw))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists of mappings by their index."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            flat.update(flatten({str(index): item for index, item in enumerate(value)}, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def describe_keys() -> str:
    """Each key with its default and what it is, as the dataclasses above say it: for ``--help``."""
    lines = []
    for section, cls in SECTIONS.items():
        meanings = dict(re.findall(r"^    (\w+): .*  # (.+)$", inspect.getsource(cls), flags=re.MULTILINE))
        for item in dataclasses.fields(cls):
            default = "required" if item.default is dataclasses.MISSING else json.dumps(item.default).strip('"')
            lines.append(f"  {section}.{item.name:{31 - len(section)}} {default:21} {meanings.get(item.name, '')}")
    return "\n".join(line.rstrip() for line in lines)


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    override = override if len(override) < 100 else override[:100] + "…"
    if not equals or not key:
        raise UserError(f"{override}: not of the form key=value, such as train.epochs=10")
    value: Any = text or None
    if _is_text(key):
        # Meant as written: a folder may be called `1.10` or `a: b #2`.
        value = None if text in ("", "null") else text
    elif text:
        with contextlib.suppress(ValueError):  # what is no YAML is refused as what it is, where it is used
            value = parse_yaml(text)
    *parents, last = key.split(".")
    node: Any = raw
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            if not _is_index(part) or int(part) >= len(node):
                raise UserError(f"{override}: {'.'.join(parents[:depth])} has no item {part}; there are {len(node)}")
            node = node[int(part)]
            continue
        if not isinstance(node, dict):
            raise UserError(f"{override}: {'.'.join(parents[:depth])} is no section")
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
    if isinstance(node, list) and parents in (["skip"], ["phases"]) and not _is_index(last):
        what = "spans" if parents == ["skip"] else "phases"
        raise UserError(
            f"{override}: {parents[0]} is a list of {len(node)} {what}; say which, as in {parents[0]}.0.{last}="
        )
    if isinstance(node, list) and _is_index(last) and int(last) < len(node):
        node[int(last)] = value
        return
    if not isinstance(node, dict):
        raise UserError(f"{override}: {'.'.join(parents)} is no section")
    node[last] = value


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 4


def _is_text(key: str) -> bool:
    """Whether the key's field holds text, which is then not read as YAML."""
    section, _, rest = key.partition(".")
    if section not in SECTIONS:
        return False
    return typing.get_type_hints(SECTIONS[section]).get(rest.split(".")[-1]) in (str, Optional[str])


def _section(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name)
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise UserError(f"{name}: {_short(section)} is no section; give keys such as {_keys_of(name)[0]}")
    return {_key_text(key): value for key, value in section.items()}


def _build(cls: Any, mapping: Any, where: str) -> Any:
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: {_short(mapping)} is no section with keys")
    hints = typing.get_type_hints(cls)
    for key in mapping:
        if key not in hints:
            raise UserError(_unknown(f"{where}.{_key_text(key)}", _all_keys()))
    values = {key: _convert(value, hints[key], f"{where}.{key}") for key, value in mapping.items()}
    for key, value in values.items():
        largest = LARGEST.get(f"{where.split('.')[0]}.{key}")
        if largest is not None and value is not None and value > largest:
            raise UserError(f"{where}.{key}: {value} is above {largest}; give {largest} or less")
    try:
        return cls(**values)
    except UserError as error:  # which calls an item of a list as it would the only one
        section = where.split(".")[0]
        raise UserError(str(error).replace(f"{section}.", f"{where}.")) from None


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value as the field's type; numbers are accepted as YAML 1.1 mis-reads them (`1e-3` is a string there)."""
    optional = typing.get_origin(hint) is Union
    if optional:
        if value is None:
            return None
        hint = next(item for item in typing.get_args(hint) if item is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}: {_short(value)} is not a list of numbers")
        return tuple(_convert(item, float, where) for item in value)
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) <= MAX_INT:
            return value
        if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_INT:
            return int(value)
    if hint is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_INT:
        return str(value)
    if hint is str and isinstance(value, str) and value and "\0" not in value:
        return value
    expected = {int: f"a whole number up to {MAX_INT}", float: "a number", bool: "true or false", str: "text"}[hint]
    raise UserError(f"{where}: {_short(value)} is not {expected}{' or null' if optional else ''}")


def _plain(section: Any) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(section).items()
    }


def _keys_of(section: str) -> list[str]:
    return [f"{section}.{item.name}" for item in dataclasses.fields(SECTIONS[section])]


def _all_keys() -> list[str]:
    return [key for item in dataclasses.fields(Config) for key in _keys_of(item.name)]


def _unknown(key: str, known: Sequence[str]) -> str:
    key = key[:100]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    last = difflib.get_close_matches(key.split(".")[-1], [item.split(".")[-1] for item in known], n=1, cutoff=0.8)
    same_last = [item for item in known if last and item.split(".")[-1] == last[0]]
    same_last.sort(key=lambda item: item.split(".")[0] != key.split(".")[0])  # its own section's first
    return f"{key}: unknown key; the nearest known one is {(same_last or near)[0]}"


def _one_of(where: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        near = difflib.get_close_matches(str(value)[:100], choices, n=1, cutoff=0.0)
        hint = f"the nearest is {near[0]}; " if near else ""
        raise UserError(f"{where}: {_short(value)} is unknown; {hint}known are {', '.join(choices)}")


def _at_least(where: str, value: float, least: float, why: str = "") -> None:
    if value < least:
        raise UserError(f"{where}: {value} is below {least}" + (f"; {why}" if why else f"; give {least} or more"))


def _within(where: str, value: float, low: float, high: float, bounds: str) -> None:
    if not (low <= value < high or (value == high and bounds.endswith("]"))):
        raise UserError(f"{where}: {value} is outside {bounds}")


def _nearest_divisor(number: int, wanted: int) -> int:
    small = [item for item in range(1, math.isqrt(number) + 1) if number % item == 0]
    return min(small + [number // item for item in small], key=lambda item: abs(item - wanted))


def _key_text(key: Any) -> str:
    return key if isinstance(key, str) else _short(key)


def _short(value: Any) -> str:
    """The value for a message: however long or nested it is, the message stays one line."""
    if isinstance(value, str) and len(value) < 100:
        return repr(value)
    shortened = reprlib.Repr()
    shortened.maxlevel, shortened.maxlist, shortened.maxdict = 2, 3, 3
    try:
        return shortened.repr(value)
    except ValueError:  # a number of more digits than Python prints
        return type(value).__name__
