"""Recipes and overrides: what is read, what is refused, and in which words."""

import contextlib
import dataclasses
import re
import time
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvit import config as module
from skipvit.config import (
    FREE_ON_RESUME,
    SECTIONS,
    Config,
    PhaseConfig,
    SkipConfig,
    TrainConfig,
    UserError,
    block_lengths,
    describe_keys,
    flatten,
    from_dict,
    load,
    span_shapes,
)

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
KEYS = [f"{section}.{item.name}" for section, cls in SECTIONS.items() for item in dataclasses.fields(cls)]


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe's text to a file; its path."""

    def write(text=""):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(function, *arguments):
    """What the UserError says: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    return text


# ---------------------------------------------------------------------------------------------------- recipes


def test_there_are_recipes():
    assert {path.relative_to(ROOT / "configs").as_posix() for path in RECIPES} >= {
        "clutter/skipvit.yaml",
        "cifar10/vit.yaml",
        "cifar10/skipvit.yaml",
        "imagenet/vit_small.yaml",
        "imagenet/skipvit_small.yaml",
        "imagenet/vit_small_90ep.yaml",
        "imagenet/skipvit_small_90ep.yaml",
        "imagenet/skipvit_small_paper.yaml",
        "imagenet/skipvit_small_growing.yaml",
        "imagenet/skipvit_small_finetune.yaml",
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT / "configs").as_posix())
def test_recipe_parses_and_says_how_it_is_run(path):
    config = load(path)
    assert from_dict(config.to_dict()) == config
    assert bool(config.skip) == config.model.name.startswith("skipvit_")
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(path.relative_to(ROOT).as_posix() in line for line in header), "the header gives the command"


@pytest.mark.parametrize("suffix", ["", "_90ep"])
def test_imagenet_pair_differs_in_the_skip_path_alone(suffix):
    dense, skip = (load(ROOT / f"configs/imagenet/{name}_small{suffix}.yaml") for name in ("vit", "skipvit"))
    differing = {
        key
        for key in {**flatten(dense.to_dict()), **flatten(skip.to_dict())}
        if flatten(dense.to_dict()).get(key) != flatten(skip.to_dict()).get(key)
    }
    assert {key for key in differing if not key.startswith("skip")} == {"model.name", "train.output"}


def test_imagenet_recipe_is_that_of_deit():
    config = load(ROOT / "configs/imagenet/skipvit_small.yaml")
    assert config.data.batch_size * 8 == config.optim.reference_batch_size == 1024
    assert (config.optim.learning_rate, config.optim.weight_decay, config.train.epochs) == (1e-3, 0.05, 300)
    assert (config.augment.mixup, config.augment.cutmix, config.augment.repeats) == (0.8, 1.0, 3)
    (span,) = config.skip
    assert (1 + span.kept_count(196)) % 16 == 0
    growing = load(ROOT / "configs/imagenet/skipvit_small_growing.yaml")
    for phase in range(3):
        model, (span,) = growing.of_phase(phase).model, growing.of_phase(phase).skip
        assert (1 + span.kept_count(model.num_patches)) % 16 == 0
    (span,) = load(ROOT / "configs/imagenet/skipvit_small_paper.yaml").skip
    assert 1 - span.kept_count(196) / 196 == pytest.approx(0.55, abs=0.002)


# --------------------------------------------------------------------------------------------------- reading


def test_an_empty_recipe_is_the_defaults(recipe):
    assert load(recipe()) == Config()


def test_round_trip_through_plain_data_and_yaml(recipe):
    config = load(
        recipe("model: {name: skipvit_tiny_patch16_224}\nskip: [{start: 2, end: 4}, {start: 6, end: 12, align: 16}]"),
        ["data.mean=[0.1, 0.2, 0.3]", "optim.clip_norm=1", "train.output=no"],
    )
    assert from_dict(config.to_dict()) == config
    assert load(recipe(config.to_yaml())) == config
    assert type(config.optim.clip_norm) is float
    plain = config.to_dict()
    assert yaml.safe_load(config.to_yaml()) == plain
    assert list(plain) == [item.name for item in dataclasses.fields(Config)]


def test_sizes_follow_from_the_name_unless_given(recipe):
    model = load(recipe("model: {name: vit_tiny_patch16_224, depth: 4}")).model
    assert (model.embed_dim, model.depth, model.num_heads) == (192, 4, 3)


def test_skip_is_null_a_span_or_a_list(recipe):
    assert load(recipe("skip: null")).skip == ()
    assert load(recipe("skip: []")).skip == ()
    assert load(recipe("skip: {start: 2}")).skip == (SkipConfig(start=2),)
    two = load(recipe("skip: [{start: 2, end: 4}, {start: 6, end: 9}]"), ["skip.1.end=8", "skip.0.keep_ratio=0.5"])
    assert two.skip == (SkipConfig(start=2, end=4, keep_ratio=0.5), SkipConfig(start=6, end=8))


def test_spans_may_touch_where_no_block_on_all_tokens_must_score(recipe):
    """After a drop the span's own last block has seen every token there is; random scores need no block."""
    for text in (
        "skip: [{start: 2, end: 4, skipped: drop, keep_ratio: 0.7}, {start: 4, end: 6, skipped: fuse}]",
        "skip: [{start: 2, end: 4}, {start: 4, end: 6, score: random}]",
        "skip: {start: 0, end: 6, score: random}",
        "skip: {start: 0, end: 6, score: mask}",
    ):
        assert load(recipe(text)).skip[-1].end == 6


def test_shapes_of_spans_follow_from_the_configuration():
    """By hand, for 64 patches and 12 blocks."""
    rejoin = SkipConfig(3, 11, 0.45)
    assert span_shapes((rejoin,), 64) == ((rejoin, 1, 64, 29),)
    assert block_lengths((rejoin,), 12, 64) == [65] * 3 + [30] * 8 + [65]
    # EViT's: each chooses among what the one before left, fused tokens stay.
    spans = tuple(
        SkipConfig(start, end, keep, skipped="fuse")
        for start, end, keep in ((4, 7, 0.7), (7, 10, 0.49), (10, 12, 0.343))
    )
    assert [shape[1:] for shape in span_shapes(spans, 64)] == [(1, 64, 45), (2, 45, 31), (3, 31, 22)]
    assert block_lengths(spans, 12, 64) == [65] * 4 + [47] * 3 + [34] * 3 + [26] * 2
    # A drop lasts to the end; what keeps no fewer than there are does nothing.
    spans = (SkipConfig(2, 4, 0.5, skipped="drop"), SkipConfig(6, 8, 0.75), SkipConfig(9, 10, 0.25))
    assert [shape[1:] for shape in span_shapes(spans, 64)] == [(1, 64, 32), (1, 32, 16)]
    assert block_lengths(spans, 12, 64) == [65] * 2 + [33] * 7 + [17] + [33] * 2


@pytest.mark.parametrize(
    ("skipped", "keep_ratio", "length"),
    [
        ("rejoin", 0.45, 32),  # 1 + 29, rounded up
        ("fuse", 0.45, 32),  # 1 + 29 + 1
        ("fuse", 0.48, 48),  # 1 + 31 + 1 is one too many
        ("rejoin", 0.48, 32),
        ("rejoin", 0.99, 64),
        ("fuse", 0.99, 65),  # 80, but no more than there are
        ("fuse", 1.0, 65),  # nothing to fuse
    ],
)
def test_align_counts_all_that_goes_on(skipped, keep_ratio, length):
    spans = (SkipConfig(3, 11, keep_ratio, align=16, skipped=skipped),)
    assert block_lengths(spans, 12, 64)[5] == length


PHASES = "{phases: [{share: 0.25, keep_ratio: 1}, {share: 0.5, image_size: 112}, {share: 0.25}], train: {epochs: 10}}"


def test_phases_part_the_epochs_and_say_what_is_other(recipe):
    config = load(recipe(PHASES), ["phases.1.keep_ratio=0.3"])
    assert config.phase_ends() == [3, 8, 10]  # 2.5 and 7.5 rounded, halves up
    assert [config.of_phase(index).model.image_size for index in range(3)] == [224, 112, 224]
    assert [config.of_phase(index).skip[0].keep_ratio for index in range(3)] == [1.0, 0.3, 0.45]
    assert config.of_phase(-1) == config.replace(phases=())
    assert load(recipe()).phase_ends() == [300]
    assert load(recipe()).of_phase(0) == load(recipe())


@given(st.integers(1, 300), st.lists(st.integers(1, 9), min_size=1, max_size=9))
@settings(max_examples=100)
def test_phases_end_with_the_epochs(epochs, parts):
    """However the shares are rounded in binary."""
    phases = tuple(PhaseConfig(part / sum(parts)) for part in parts)
    with contextlib.suppress(UserError):  # a share too small for a whole epoch
        ends = Config(phases=phases, train=TrainConfig(epochs=epochs)).phase_ends()
        assert ends[-1] == epochs
        assert ends == sorted(set(ends))


def test_skip_left_out_follows_from_the_name(recipe):
    assert load(recipe("model: {name: skipvit_base_patch16_224}")).skip == (SkipConfig(),)
    assert load(recipe("model: {name: vit_base_patch16_224}")).skip == ()
    assert load(recipe("model: {name: skipvit_base_patch16_224}"), ["skip=null"]).skip == ()
    assert "skip.end" in message(load, recipe("model: {name: skipvit_tiny_patch16_224, depth: 6}"))


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=7", "train.epochs", 7),
        ("train.epochs=7.0", "train.epochs", 7),
        ("optim.learning_rate=1e-3", "optim.learning_rate", 1e-3),  # a string to YAML 1.1
        ("optim.clip_norm=null", "optim.clip_norm", None),
        ("data.worker_processes=true", "data.worker_processes", True),
        ("data.std=[0.5, 0.25, 1]", "data.std", [0.5, 0.25, 1.0]),
        ("train.resume=no", "train.resume", "no"),  # false to YAML 1.1
        ("train.output=runs/a=b", "train.output", "runs/a=b"),
        ("train.output=runs/1.10", "train.output", "runs/1.10"),
        ("train.output=1.10", "train.output", "1.10"),
        ("train.output=2026-01-31", "train.output", "2026-01-31"),
        ("train.output=a: b #2", "train.output", "a: b #2"),
        ("train.output='quoted'", "train.output", "'quoted'"),
        ("data.val=null", "data.val", None),
        ("data.val=", "data.val", None),
    ],
)
def test_override_values(recipe, override, key, value):
    got = flatten(load(recipe("train: {resume: auto}"), [override]).to_dict())[key]
    assert got == value
    assert type(got) is type(value)


def test_overrides_apply_in_order_and_over_the_recipe(recipe):
    config = load(recipe("train: {epochs: 3, seed: 4}"), ["train.epochs=5", "train.epochs=6"])
    assert (config.train.epochs, config.train.seed) == (6, 4)


def test_yaml_words_of_version_1_1_stay_words(recipe):
    config = load(recipe("train: {resume: no, output: on}\ndata: {train: 2026-01-31}"))
    assert (config.train.resume, config.train.output, config.data.train) == ("no", "on", "2026-01-31")


def test_kept_count_is_that_of_the_design():
    assert SkipConfig(keep_ratio=0.45).kept_count(196) == 88
    assert SkipConfig(keep_ratio=0.45, align=16).kept_count(196) == 95
    assert SkipConfig(keep_ratio=1.0, align=16).kept_count(196) == 196  # never above N + 1
    assert SkipConfig(keep_ratio=1e-9).kept_count(196) == 1
    assert SkipConfig(keep_ratio=0.5).kept_count(7) == 4  # halves are rounded up


# ---------------------------------------------------------------------------------------------------- resume


def test_keys_free_on_resume_all_exist():
    assert set(KEYS) >= FREE_ON_RESUME


def test_every_key_is_either_identity_or_free():
    identity = Config(phases=(PhaseConfig(1.0),)).identity()
    for key in KEYS:
        in_identity = key.replace("skip.", "skip.0.").replace("phases.", "phases.0.") in identity
        assert in_identity != (key in FREE_ON_RESUME), key


def test_identity_ignores_what_is_free(recipe):
    one = load(recipe(), ["train.epochs=3"])
    assert load(recipe(), ["train.epochs=3", "train.output=x", "data.num_workers=9"]).identity() == one.identity()
    assert load(recipe(), ["train.epochs=4"]).identity() != one.identity()
    assert load(recipe(), ["train.epochs=3", "skip.align=16"]).identity() != one.identity()


# --------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("train.epoch=3", "train.epochs"),
        ("epochs=3", "train.epochs"),
        ("optim.epochs=3", "train.epochs"),
        ("data.batchsize=8", "data.batch_size"),
        ("skip.keep_ration=0.5", "skip.keep_ratio"),
        ("skip.0.strat=2", "skip.start"),
        ("augment.mix_up=0.8", "augment.mixup"),
        ("model.embed_dims=64", "model.embed_dim"),
    ],
)
def test_unknown_key_names_the_nearest(recipe, override, nearest):
    text = recipe("skip: [{start: 2, end: 4}]") if "skip.0" in override else recipe()
    key = override.partition("=")[0]
    assert message(load, text, [override]) == f"{key}: unknown key; the nearest known one is {nearest}"


def test_unknown_section_names_the_nearest(recipe):
    says = "optimizer: unknown key; the nearest known one is optim"
    assert message(load, recipe(), ["optimizer.weight_decay=0.1"]) == says
    assert message(load, recipe("trian: {output: x}")) == "trian: unknown key; the nearest known one is train"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "model.name=vit_huge",
            "model.name: 'vit_huge' is unknown; the nearest is vit_tiny_patch16_224; known are vit_",
        ),
        ("model.gelu=relu", "model.gelu: 'relu' is unknown; the nearest is"),
        ("model.image_size=225", "model.image_size: 225 is not a multiple of model.patch_size 16; 224 would be"),
        ("model.image_size=8", "model.image_size: 8 is not a multiple of model.patch_size 16; 16 would be"),
        ("model.num_heads=5", "model.num_heads: 5 heads do not divide model.embed_dim 384; 4 would"),
        ("model.depth=0", "model.depth: 0 is below 1; give 1 or more"),
        ("model.num_classes=0", "model.num_classes: 0 is below 1"),
        ("model.dropout=1", "model.dropout: 1.0 is outside [0, 1)"),
        ("model.drop_path=-0.1", "model.drop_path: -0.1 is outside [0, 1)"),
        ("model.mlp_ratio=0", "model.mlp_ratio: 0.0 gives the MLP no width"),
        ("model.mlp_ratio=1e308", "model.mlp_ratio: 1e+308 gives the MLP no width"),
        ("skip.start=11", "skip.start: 11 is not below skip.end 11"),
        ("skip.start=0", "skip.start: 0 is below 1; block start-1 scores the tokens by cls_attention, so"),
        ("skip.end=13", "skip.end: 13 is beyond the model's 12 blocks; at most 12"),
        ("skip.keep_ratio=0", "skip.keep_ratio: 0.0 is outside (0, 1]"),
        ("skip.keep_ratio=1.01", "skip.keep_ratio: 1.01 is outside (0, 1]"),
        ("skip.align=0", "skip.align: 0 is below 1"),
        ("skip.score=luck", "skip.score: 'luck' is unknown; the nearest is"),
        ("skip.skipped=lost", "skip.skipped: 'lost' is unknown; the nearest is"),
        ("skip=5", "skip: 5 is neither null nor a span"),
        ("data.batch_size=0", "data.batch_size: 0 is below 1"),
        ("data.global_batch_size=0", "data.global_batch_size: 0 is below 1"),
        ("data.num_workers=0", "data.num_workers: 0 is below 1"),
        ("data.mean=[0.5]", "data.mean: give three numbers, one for each of red, green, blue"),
        ("data.mean=0.5", "data.mean: 0.5 is not a list of numbers"),
        ("data.std=[0, 1, 1]", "data.std: [0.0, 1.0, 1.0] has a value outside [0.001, 1000]"),
        ("data.val_crop_ratio=0", "data.val_crop_ratio: 0.0 is outside [0.1, 1]"),
        ("data.mean=[0, 124, 0]", "data.mean: [0.0, 124.0, 0.0] has a value outside [0, 1]; divide by 255"),
        ("data.batch_size=1000000000", "data.batch_size: 1000000000 is above 1000000; give 1000000 or less"),
        ("augment.crop_scale=[1e-9, 1]", "augment.crop_scale: [1e-09, 1.0] with crop_ratio"),
        ("data.interpolation=cubic", "data.interpolation: 'cubic' is unknown; the nearest is bicubic"),
        ("data.max_unreadable_share=2", "data.max_unreadable_share: 2.0 is outside [0, 1]"),
        ("data.worker_processes=2", "data.worker_processes: 2 is not true or false"),
        ("augment.crop=centre", "augment.crop: 'centre' is unknown; the nearest is"),
        ("augment.crop_scale=[0.5, 0.1]", "augment.crop_scale: [0.5, 0.1] is not [low, high] with 0 < low <= high"),
        ("augment.crop_scale=[0.5, 1.5]", "augment.crop_scale: [0.5, 1.5] is more than the whole image, 1.0"),
        ("augment.crop_ratio=[0, 1]", "augment.crop_ratio: [0.0, 1.0] is not [low, high]"),
        ("augment.shift_pixels=-1", "augment.shift_pixels: -1 is below 0"),
        ("augment.horizontal_flip=1.5", "augment.horizontal_flip: 1.5 is outside [0, 1]"),
        ("augment.erase=-1", "augment.erase: -1.0 is outside [0, 1]"),
        ("augment.mix_probability=2", "augment.mix_probability: 2.0 is outside [0, 1]"),
        ("augment.rand_augment_magnitude=11", "augment.rand_augment_magnitude: 11.0 is outside [0, 10]"),
        ("augment.rand_augment_layers=0", "augment.rand_augment_layers: 0 is below 1"),
        ("augment.label_smoothing=1", "augment.label_smoothing: 1.0 is outside [0, 1)"),
        ("augment.mixup=-0.1", "augment.mixup: -0.1 is below 0"),
        ("augment.repeats=0", "augment.repeats: 0 is below 1"),
        ("optim.learning_rate=-1", "optim.learning_rate: -1.0 is below 0"),
        ("optim.learning_rate=nan", "optim.learning_rate: 'nan' is not a number"),
        ("optim.learning_rate=.inf", "optim.learning_rate: inf is not a number"),
        ("optim.learning_rate=fast", "optim.learning_rate: 'fast' is not a number"),
        ("optim.beta2=1", "optim.beta2: 1.0 is outside [0, 1)"),
        ("optim.ema_decay=1", "optim.ema_decay: 1.0 is outside [0, 1)"),
        ("optim.epsilon=0", "optim.epsilon: 0.0 is not above 0"),
        ("optim.clip_norm=0", "optim.clip_norm: 0.0 is not above 0"),
        ("optim.accumulate_steps=0", "optim.accumulate_steps: 0 is below 1"),
        ("optim.reference_batch_size=0", "optim.reference_batch_size: 0 is below 1"),
        ("train.epochs=0", "train.epochs: 0 is below 1"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints: 0 is below 1"),
        ("train.stall_seconds=-1", "train.stall_seconds: -1.0 is below 0"),
        ("train.epochs=1.5", "train.epochs: 1.5 is not a whole number"),
        ("train.epochs=true", "train.epochs: True is not a whole number"),
        ("train.epochs=99999999999", "train.epochs: 99999999999 is not a whole number up to 2147483647"),
        ("train.epochs=", "train.epochs: None is not a whole number"),
        ("train.epochs.a=1", "train.epochs: {'a': 1} is not a whole number"),
        ("train.max_steps=0", "train.max_steps: 0 is below 1"),
        (
            "train.stop_after_epochs=soon",
            "train.stop_after_epochs: 'soon' is not a whole number up to 2147483647 or null",
        ),
        ("train.sink_steps=0", "train.sink_steps: 0 is below 1"),
        ("train.seed=-1", "train.seed: -1 is outside [0, 2147483647]"),
        ("train.precision=fp61", "train.precision: 'fp61' is unknown; the nearest is fp16"),
        ("train.resume=yes", "train.resume: 'yes' is unknown; the nearest is"),
        ("train.jit_level=O3", "train.jit_level: 'O3' is unknown; the nearest is"),
        ("train.profile=5", "train.profile: '5' is not FIRST-LAST, steps such as 11-20"),
        ("train.profile=5-2", "train.profile: '5-2' is not FIRST-LAST"),
        ("train.profile=0-2", "train.profile: '0-2' is not FIRST-LAST"),
        ("train.tensorboard=yes", "train.tensorboard: 'yes' is not true or false"),
        ("train.output=", "train.output: None is not text"),
        ("train.output=a\0b", "train.output: 'a\\x00b' is not text"),
        ("train.epochs", "train.epochs: not of the form key=value, such as train.epochs=10"),
        ("=3", "=3: not of the form key=value"),
        ("train=3", "train: 3 is no section; give keys such as train.epochs"),
        ("model.name.size=tiny", "model.name: {'size': 'tiny'} is unknown"),
    ],
)
def test_bad_value_says_which_where_and_what_would_be_right(recipe, override, says):
    assert message(load, recipe(), [override]).startswith(says)


def test_every_bounded_key_has_a_bad_value_above():
    """A key added without a test of its bounds shows up here: text and unbounded numbers apart."""
    (parametrize,) = test_bad_value_says_which_where_and_what_would_be_right.pytestmark
    tested = {override.partition("=")[0] for override, _ in parametrize.args[1]}
    free = {
        "data.train",
        "data.val",
        "data.masks",
        "data.train_masks",
        "optim.warmup_epochs",
        "optim.warmup_learning_rate",
    }
    free |= {
        "optim.min_learning_rate",
        "optim.weight_decay",
        "optim.beta1",
        "augment.cutmix",
        "augment.rand_augment_std",
    }
    free |= {"train.init_from", "model.last_block_cls_only"}
    free |= {"model.patch_size", "model.embed_dim", "train.log_every_steps", "train.validate_every_epochs"}
    free |= {key for key in KEYS if key.startswith("phases.")}  # in a list, see below
    assert set(KEYS) - tested - free == set()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("skip: [{start: 2, end: 4}, {start: 4, end: 6}]", "skip.1.start: 4 does not lie beyond the span before"),
        ("skip: [{start: 6, end: 8}, {start: 2, end: 4}]", "skip.1.start: 2 does not lie beyond the span before"),
        ("skip: [{start: 2, end: 4, skipped: drop}, {start: 3, end: 8}]", "skip.1.start: 3 does not lie beyond the"),
        ("skip: [{start: 2, end: 4}, {start: 3, end: 8, score: random}]", "skip.1.start: 3 does not lie beyond the"),
        ("skip: {start: -1, score: random}", "skip.start: -1 is below 0"),
        ("skip: {start: 0, score: key_norm}", "skip.start: 0 is below 1; block start-1 scores the tokens by key_norm"),
        ("phases: 3", "phases: 3 is no list of phases"),
        ("phases: []", "phases: [] is no list of phases"),
        ("phases: {share: 1}", "phases: {'share': 1} is no list of phases"),
        ("phases: [3]", "phases.0: 3 is no section with keys"),
        ("phases: [{keep_ratio: 0.5}]", "phases.0.share: not given"),
        (
            "phases: [{share: 1, keep_ration: 0.5}]",
            "phases.0.keep_ration: unknown key; the nearest known one is phases.",
        ),
        ("phases: [{share: 0.5}, {share: 0.4}]", "phases: the shares 0.5 + 0.4 add up to 0.9; they must make 1"),
        ("phases: [{share: 0.5}, {share: 0.6}]", "phases: the shares 0.5 + 0.6 add up to 1.1; they must make 1"),
        ("phases: [{share: 0}, {share: 1}]", "phases.0.share: 0.0 is outside (0, 1]"),
        ("phases: [{share: 0.5}, {share: 0.500004}]", "phases: the shares 0.5 + 0.500004 add up to 1.000004; they"),
        ("phases: [{share: 1, keep_ratio: 0}]", "phases.0.keep_ratio: 0.0 is outside (0, 1]"),
        ("phases: [{share: 1, keep_ratio: 1.5}]", "phases.0.keep_ratio: 1.5 is outside (0, 1]"),
        (
            "{skip: null, phases: [{share: 0.5, keep_ratio: 1}, {share: 0.5, keep_ratio: 0.5}]}",
            "phases.1.keep_ratio: 0.5 where skip is null, so that no token skips; leave it out",
        ),
        ("phases: [{share: 0.5, image_size: 100}, {share: 0.5}]", "phases.0.image_size: 100 is not a multiple of"),
        ("phases: [{share: 1, image_size: 0}]", "phases.0.image_size: 0 is below 1"),
        (
            "{phases: [{share: 0.1}, {share: 0.9}], train: {epochs: 4}}",
            "phases.0.share: 0.1 of train.epochs 4 is no whole epoch",
        ),
        ("skip: [3]", "skip.0: 3 is no section with keys"),
        ("skip: [{start: 2, end: 4}, {start: 8, end: 6}]", "skip.1.start: 8 is not below skip.1.end 6"),
        ("skip: [{start: 2, end: 4}, {start: 6, end: 8, score: cls}]", "skip.1.score: 'cls' is unknown"),
        ("skip: [{start: 2, end: 4}, {start: 6, end: 8, keep_ratio: 0}]", "skip.1.keep_ratio: 0.0 is outside"),
        (
            "skip: [{start: 2, end: 4, keep_ratio: 0.5, skipped: drop}, {start: 4, end: 6, keep_ratio: 0.5}]",
            "skip.1.keep_ratio: 0.5 is a share of all 196 patches, of which those before leave 98, so that nothing is "
            "left to choose; give less than 0.5",
        ),
        (
            "skip: [{start: 2, end: 4, skipped: fuse}, {start: 4, end: 6, keep_ratio: 0.3}, "
            "{start: 7, end: 8, keep_ratio: 0.9}]",
            "skip.2.keep_ratio: 0.9 is a share of all 196 patches, of which those before leave 88",
        ),
        ("skip: [{start: 2, end: 40}, {start: 41, end: 42}]", "skip.0.end: 40 is beyond the model's 12 blocks"),
        ("data: 3", "data: 3 is no section; give keys such as data.train"),
        ("data: {1: 2}", "data.1: unknown key; the nearest known one is"),
        ("1: {}", "1: unknown key; the nearest known one is"),
        ("train: {output: ''}", "train.output: '' is not text"),
    ],
)
def test_bad_recipe(recipe, text, says):
    assert message(load, recipe(text)).startswith(says)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("skip.start=3", "skip.start=3: skip is a list of 2 spans; say which, as in skip.0.start="),
        ("skip.2.start=3", "skip.2.start=3: skip has no item 2; there are 2"),
        ("skip.x.start=3", "skip.x.start=3: skip has no item x; there are 2"),
        ("skip.0=3", "skip.0: 3 is no section with keys"),
        ("skip.2=3", "skip.2=3: skip is no section"),
        ("phases.share=3", "phases.share=3: phases is a list of 2 phases; say which, as in phases.0.share="),
    ],
)
def test_bad_override_of_a_list_of_spans(recipe, override, says):
    text = recipe("{skip: [{start: 2, end: 4}, {start: 6, end: 8}], phases: [{share: 0.5}, {share: 0.5}]}")
    assert message(load, text, [override]) == says


def test_an_item_of_a_list_is_replaced(recipe):
    text = recipe("{skip: [{start: 2, end: 4}, {start: 6, end: 8}], phases: [{share: 0.5}, {share: 0.5}]}")
    changed = load(text, ["skip.1={start: 7, end: 9}", "phases.0={share: 0.5, image_size: 112}"])
    assert [(span.start, span.end) for span in changed.skip] == [(2, 4), (7, 9)]
    assert [phase.image_size for phase in changed.phases] == [112, None]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"model: [", "not valid YAML: "),
        (b"\xff\xfe\x00", "not valid YAML: "),
        (b"train: {seed: !!bool x}", "not valid YAML: "),
        (b"train: !!python/object/apply:os.system [true]", "not valid YAML: could not determine a constructor"),
        (b"[" * 2000, "not valid YAML: "),
        (b"train: {epochs: 3}\ntrain: {seed: 3}", "not valid YAML: line 2: 'train' is given twice in one section"),
        (b"train: {epochs: 3, epochs: 3}", "not valid YAML: line 1: 'epochs' is given twice in one section"),
        (b"? [a]\n: 3", "not valid YAML: line 1: a list or section cannot be a key"),
        (b"? 0x" + b"f" * 6000 + b"\n: 3", "int: unknown key; the nearest known one is"),
        (b"train: &t {epochs: 3}\nmodel: {<<: *t}", "model.<<: unknown key"),
        (b"train: &t {epochs: 3}\nmodel: {!!merge x: *t}", "not valid YAML: could not determine a constructor"),
        (b"- model", "holds no sections; a recipe begins with lines such as `model:`"),
        (b"model", "holds no sections"),
        (b" " * (module.MAX_FILE_BYTES + 1), f"larger than {module.MAX_FILE_BYTES} bytes, which no recipe is"),
    ],
)
def test_file_that_is_no_recipe(tmp_path, content, says):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert message(load, path).removeprefix(f"{path}: ").startswith(says)


@pytest.mark.parametrize("content", [b"[" * 60_000, b"- " * 30_000, b"{a: " * 15_000, b"k: 1\n" * 13_000])
def test_hostile_yaml_is_refused_at_once(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    # Machines differ, so the measure is PyYAML's scanner on plain lines of this length.
    started = time.process_time()
    assert sum(1 for _ in yaml.scan("k: 1\n" * 13_000, Loader=yaml.SafeLoader)) > 13_000
    scanned = time.process_time()
    assert len(message(load, path)) < 500
    assert time.process_time() - scanned < 4 * (scanned - started)


def test_recipe_that_cannot_be_read(tmp_path):
    assert "cannot be read (No such file or directory); give a recipe from configs/" in message(load, tmp_path / "none")
    assert "is a folder; give a recipe such as configs/cifar10/skipvit.yaml" in message(load, tmp_path)


def test_messages_stay_short_whatever_the_value(recipe):
    bomb = "&a [1,1,1,1,1,1,1,1,1]"
    for name, below in zip("bcdefghi", "abcdefgh"):
        bomb = f"&{name} [{bomb}{f', *{below}' * 8}]"
    assert len(message(load, recipe(f"model: {bomb}"))) < 300
    assert len(message(load, recipe(f"model: {'x' * 100_000}"))) < 300
    assert len(message(load, recipe(f"{'x' * 1000}: 3"))) < 300
    assert len(message(load, recipe(f"train: {{epochs: 0x{'f' * 5000}}}"))) < 300
    assert len(message(load, recipe("skip: &s [*s]"))) < 300


# ------------------------------------------------------------------------------------------------- properties

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(0, 20),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.dates(),
    st.sampled_from(["no", "clutter", "vit_tiny_patch16_224", "fp16", "drop", "1e-3", "shift"]),
)
names = st.one_of(
    st.sampled_from([*SECTIONS, *KEYS, *(key.split(".")[1] for key in KEYS)]), st.text(max_size=6), st.integers(0, 3)
)
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)


def section(cls):
    """Mappings that mostly look like the section, so that values are reached and not only keys."""
    return st.dictionaries(st.sampled_from([item.name for item in dataclasses.fields(cls)]), scalars, max_size=4)


recipes = st.one_of(
    plain,
    st.fixed_dictionaries({}, optional={name: section(cls) for name, cls in SECTIONS.items()}),
    st.dictionaries(names, plain, max_size=3),
)
overrides = st.lists(
    st.one_of(
        st.builds("{}={}".format, st.sampled_from(KEYS), st.one_of(scalars, st.text(max_size=12))),
        st.builds("{}.{}={}".format, names, names, plain),
        st.text(max_size=16),
    ),
    max_size=3,
)


def config_or_user_error(function, *arguments):
    """A Config that holds what it says, or a UserError; any other exception fails the test."""
    try:
        config = function(*arguments)
    except UserError:
        return
    assert from_dict(config.to_dict()) == config
    for name, cls in SECTIONS.items():
        for part in getattr(config, name) if name in ("skip", "phases") else [getattr(config, name)]:
            for item, hint in typing.get_type_hints(cls).items():
                check_type(getattr(part, item), hint)


def check_type(value, hint):
    if typing.get_origin(hint) is typing.Union:
        assert value is None or type(value) is typing.get_args(hint)[0]
    elif typing.get_origin(hint) is tuple:
        assert all(type(item) is float for item in value)
    else:
        assert type(value) is hint


@settings(max_examples=300)
@given(recipes, overrides)
def test_any_yaml_gives_a_config_or_one_line(tmp_path_factory, raw, given_overrides):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(raw, allow_unicode=False), encoding="utf-8")
    config_or_user_error(load, path, given_overrides)


@settings(max_examples=300)
@given(
    st.one_of(st.binary(max_size=60), st.text(alphabet="{}[]:,-!&*#|>'\"\n ab01.~<=?%@", max_size=40).map(str.encode))
)
def test_any_bytes_give_a_config_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    config_or_user_error(load, path)


@settings(max_examples=200)
@given(st.dictionaries(names, plain, max_size=3))
def test_any_plain_data_gives_a_config_or_one_line(raw):
    config_or_user_error(from_dict, raw)


# ---------------------------------------------------------------------------------------------------- help


def test_the_help_tells_each_key_its_default_and_what_it_is():
    lines = describe_keys().splitlines()
    assert [line.split()[0] for line in lines] == KEYS
    by_key = {line.split()[0]: line for line in lines}
    assert re.fullmatch(r"  model.image_size +224 +pixels a side", by_key["model.image_size"])
    assert re.fullmatch(r"  optim.clip_norm +null +largest .*", by_key["optim.clip_norm"])
    assert re.fullmatch(r"  data.worker_processes +false +workers .*", by_key["data.worker_processes"])
    silent = [line for line in lines if len(line) < 59]
    assert not silent, "each has a comment in its own line"
