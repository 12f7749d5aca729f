"""The arithmetic counted by hand, and what follows from it."""

import dataclasses

import numpy as np
import pytest

from skipvit import cost, model
from skipvit.config import ModelConfig, SkipConfig

SMALL = ModelConfig(num_classes=1000)
ALL_TOKENS = dataclasses.replace(SMALL, last_block_cls_only=False)
# 4 patches of 2 x 2 pixels, width 6, 2 heads of 3, hidden width 12, 3 blocks, 5 classes.
TINY = ModelConfig(
    num_classes=5,
    image_size=4,
    patch_size=2,
    embed_dim=6,
    depth=3,
    num_heads=2,
    mlp_ratio=2.0,
    last_block_cls_only=False,
)


def test_vit_small_has_the_published_size():
    assert cost.parameter_count(SMALL) == 22_050_664
    assert round(cost.forward_macs(ALL_TOKENS) / 1e9, 2) == 4.60


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, num_classes=7, mlp_ratio=3.0)])
def test_parameters_are_those_of_the_model(config):
    net = model.VisionTransformer(config)
    assert cost.parameter_count(config) == sum(int(np.prod(item.shape)) for item in net.get_parameters())


def test_a_count_by_hand():
    # patches: 4 rows x 12 x 6. A block on 5 tokens: qkv 5 x 6 x 18, scores and mixing 2 heads x 2 x 5 x 5 x 3,
    # projection 5 x 6 x 6, MLP 2 x 5 x 6 x 12. Head: 6 x 5.
    block = 540 + 300 + 180 + 720
    assert cost.forward_macs(TINY) == 288 + 3 * block + 30
    # Twice for multiply and add; backward twice the forward, but the image needs no gradient.
    flops = cost.training_flops(TINY)
    assert flops == {
        "patches": 4 * 288,
        "linear": 6 * 3 * 1440,
        "attention": 6 * 3 * 300,
        "head": 6 * 30,
        "total": 4 * 288 + 6 * 3 * block + 6 * 30,
    }


def test_a_count_by_hand_with_a_fused_token_and_with_scores_that_are_given():
    # 2 of 4 patches kept from block 1 on, and one for the other 2: 4 tokens; it is a product of 2 weights by 2 x 6.
    flops = cost.training_flops(TINY, [SkipConfig(start=1, end=2, keep_ratio=0.5, skipped="fuse")])
    full, short = 540 + 300 + 180 + 720, 432 + 192 + 144 + 576
    assert flops["fuse"] == 4 * 2 * 6
    assert flops["total"] == 4 * 288 + 6 * (full + 2 * short) + 2 * 30 + 4 * 12 + 6 * 30
    flops = cost.training_flops(TINY, [SkipConfig(start=0, end=3, keep_ratio=0.5, score="random")])
    assert flops["total"] == 4 * 288 + 6 * 3 * (324 + 108 + 108 + 432) + 6 * 30


def test_a_count_by_hand_with_skipping():
    # 2 of 4 patches kept in block 1: 3 tokens. Scoring: the CLS query on 5 keys, 2 heads of 3, no gradient.
    flops = cost.training_flops(TINY, [SkipConfig(start=1, end=2, keep_ratio=0.5)])
    full, short = 540 + 300 + 180 + 720, 324 + 108 + 108 + 432
    assert flops["scores"] == 2 * 30
    assert flops["total"] == 4 * 288 + 6 * (2 * full + short) + 2 * 30 + 6 * 30


def test_the_last_block_of_the_cls_token_alone():
    config = dataclasses.replace(TINY, last_block_cls_only=True)
    full = 540 + 300 + 180 + 720
    # Query, projection and MLP of 1 token; key and value of 5.
    last = 36 + 5 * 72 + 2 * 2 * 5 * 3 + 36 + 2 * 72
    assert cost.forward_macs(config) == 288 + 2 * full + last + 30


def test_dropped_tokens_do_not_come_back():
    spans = [SkipConfig(start=1, end=2, keep_ratio=0.5, skipped="drop")]
    assert [stage.tokens for stage in cost.stages(TINY, spans)] == [5, 3, 3]
    assert [stage.tokens for stage in cost.stages(TINY, [dataclasses.replace(spans[0], skipped="rejoin")])] == [5, 3, 5]


def test_bound():
    span = SkipConfig(start=3, end=11, keep_ratio=0.45)
    assert cost.speed_up_bound(SMALL, []) == 1
    assert cost.speed_up_bound(SMALL, [dataclasses.replace(span, keep_ratio=1.0)]) == 1
    # On the block stack alone 1.61 (a middle block costs 0.432 of a full one).
    blocks = 12 / (4 + 8 * 0.432)
    assert 0.98 * blocks < cost.speed_up_bound(ALL_TOKENS, [span]) < blocks
    shorter = [cost.speed_up_bound(SMALL, [dataclasses.replace(span, keep_ratio=keep)]) for keep in (0.65, 0.45, 0.25)]
    assert shorter == sorted(shorter)


def test_prediction_pads_the_products_of_attention_and_not_those_of_a_whole_batch():
    def cube_flops(kept, group):
        span = SkipConfig(start=3, end=11, keep_ratio=kept / 196)
        assert span.kept_count(196) == kept
        found = [item for item in cost.products(ALL_TOKENS, [span]) if item.group == group]
        return sum(cost.padded_flops(item, 128) for item in found)

    # With CLS 89 and 96 tokens: to 96 both; but 128 images' 89 tokens are 11,392 rows, a multiple of 16 already.
    assert cube_flops(88, "attention") == cube_flops(95, "attention")
    assert cube_flops(88, "linear") == cube_flops(95, "linear") * (4 * 197 + 8 * 89) / (4 * 197 + 8 * 96)


def test_prediction_is_of_the_right_size():
    """By hand for a batch of 128: 27.2 GFLOP an image at 256 TFLOPS and the assumed share of it."""
    prediction = cost.predict_910a(ALL_TOKENS, [], 128)
    least = 1e3 * 128 * cost.training_flops(ALL_TOKENS)["total"] / (cost.CUBE_FLOPS * cost.CUBE_EFFICIENCY)
    assert least < prediction.cube_ms < 1.5 * least
    assert prediction.memory_ms > 0
    seconds = 1e-3 * (prediction.cube_ms + prediction.memory_ms)
    assert prediction.images_per_second == pytest.approx(128 / seconds)
    span = SkipConfig(start=3, end=11, keep_ratio=0.45)
    assert cost.predict_910a(ALL_TOKENS, [span], 128).images_per_second > 1.4 * prediction.images_per_second
