from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import Block

from benchmarks.flops import build_autoencoder, random_inputs, saved_bytes, training_flops, training_memory
from mae_core.flops import count_flops
from mae_core.recipe import recipe


def block_products(tokens, dim, hidden=None, distinct=None):
    """Multiply-adds of one block's matrix products: qkv, both of attention, projection, MLP of four times the width.
    hidden: tokens whose output is wanted. distinct: tokens an image has for itself, with its share of the others."""
    rest = tokens if hidden is None else hidden
    qkv = tokens if distinct is None else distinct
    return qkv * 3 * dim**2 + 2 * rest * tokens * dim + rest * dim**2 + rest * 8 * dim**2


@pytest.mark.parametrize("batch", [1, 64])
def test_the_flops_of_vit_l_agree_with_a_count_by_hand(batch):
    encoder = 24 * block_products(50, 1024) + 49 * 768 * 1024
    # Into the decoder come 50 tokens of each image, and 196 mask tokens of the whole batch, one for each position.
    decoder = block_products(197, 512, distinct=50 + 196 / batch) + 6 * block_products(197, 512)
    decoder += block_products(197, 512, 147) + 50 * 1024 * 512 + 147 * 512 * 768
    # Two FLOPs a multiply-add; the backward pass costs two forward ones, but for the images, which need no gradient.
    by_hand = 6 * (encoder + decoder) - 2 * 49 * 768 * 1024
    counted = training_flops("vit_large_patch16", recipe("vit_large_patch16", "paper"), batch)
    assert counted == pytest.approx(by_hand, rel=0.0002)


# Table 1c: 3.3 times the FLOPs. Table 2, ViT-H: 119.6 and 34.5 hours, 3.5 times.
@pytest.mark.parametrize(
    ("arch", "ratio"), [("vit_large_patch16", 3.3), pytest.param("vit_huge_patch14", 3.5, marks=pytest.mark.slow)]
)
def test_mask_tokens_in_the_encoder_cost_what_the_paper_says(arch, ratio):
    r = recipe(arch, "paper")
    with_tokens = training_flops(arch, replace(r, encoder_mask_tokens=True))
    assert with_tokens / training_flops(arch, r) == pytest.approx(ratio, abs=0.15)


def test_a_recipe_s_knobs_change_the_count():
    r = recipe("vit_mini_patch8", "mini")
    before = training_flops("vit_mini_patch8", r)
    more = {"mask_ratio": 0.5, "loss_on": "all", "decoder_depth": 3, "decoder_dim": 128}
    for knobs in (*({knob: value} for knob, value in more.items()), {"target": "tokens", "vocabulary": 1000}):
        assert training_flops("vit_mini_patch8", replace(r, **knobs)) > before, knobs
    assert training_flops("vit_mini_patch8", replace(r, target="pca")) < before


def test_saved_bytes_are_those_of_a_block_counted_by_hand():
    block, x = Block(64, 2, qkv_bias=True), torch.randn(2, 10, 64, requires_grad=True)
    # Of 20 tokens, in values: two norms' inputs and outputs 4 x 64, statistics 4, qkv 192, attention's output 64 and
    # its sums 2, MLP before and after GELU 2 x 256. The input itself is the first of the norms'.
    values = 20 * (4 * 64 + 4 + 192 + 64 + 2 + 2 * 256)
    assert saved_bytes(lambda: block(x), block) == pytest.approx(4 * values, rel=0.02)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    r = replace(recipe("vit_base_patch16", "paper"), decoder_depth=2)
    plain, checkpointed, twice = (
        training_memory("vit_base_patch16", r, images, switch, bf16=False)
        for images, switch in ((8, False), (8, True), (16, True))
    )
    assert plain.parameters == sum(p.numel() for p in build_autoencoder("vit_base_patch16", r, "meta").parameters())
    assert plain.weights == pytest.approx(20 * plain.parameters / 2**30)
    assert checkpointed.activations < plain.activations / 4
    assert twice.activations == pytest.approx(2 * checkpointed.activations, rel=0.05)
    # 12 inputs of 50 tokens and 2 of 197, float32; besides one decoder block, and what lies outside of blocks.
    inputs = 8 * 4 * (12 * 50 * 768 + 2 * 197 * 512) / 2**30
    assert checkpointed.activations > inputs


@pytest.mark.slow
def test_vit_h_trains_on_80_gb():
    r = recipe("vit_huge_patch14", "paper")
    memory = training_memory("vit_huge_patch14", r, 128, checkpointing=True)
    assert memory.parameters == pytest.approx(657e6, rel=0.01)  # 632 million and the decoder
    assert memory.total < 0.5 * 80e9 / 2**30


def test_counting_computes_nothing_and_inputs_are_seeded():
    r = recipe("vit_mini_patch8", "mini")
    assert all(p.is_meta for p in build_autoencoder("vit_mini_patch8", r, "meta").parameters())
    (images, noise), (again, _) = (random_inputs("vit_mini_patch8", r, 3, "cpu") for _ in range(2))
    assert torch.equal(images, again)
    assert (images.shape, noise.shape) == ((3, 3, 48, 48), (3, 36))
    layer = torch.nn.Linear(5, 7, device="meta")
    assert count_flops(lambda: layer(torch.empty(3, 5, device="meta")), layer) == 2 * 3 * 5 * 7
