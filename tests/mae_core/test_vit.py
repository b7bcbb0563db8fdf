import math

import pytest
import torch
from torch import nn

from mae_core.errors import UserError
from mae_core.vit import ARCHS, build_vit, get_arch, nearest, sincos_position_embedding, stand_in

# Width, blocks, heads, patch, input side. B, L, H: MAE (Table 8's models) and ViT (arXiv 2010.11929, Table 1); Ti, S:
# DeiT (arXiv 2012.12877, Table 1). Patches of 8: facebookresearch/dino hubconf.py; of 14: facebookresearch/dinov2
# vision_transformer.py and timm; of 32: timm; 12 heads: facebookresearch/moco-v3 vits.py. Mini: the miniature's own.
PUBLISHED = {
    "vit_mini_patch8": (128, 6, 4, 8, 48),
    "vit_tiny_patch16": (192, 12, 3, 16, 224),
    "vit_small_patch8": (384, 12, 6, 8, 224),
    "vit_small_patch14": (384, 12, 6, 14, 224),
    "vit_small_patch16": (384, 12, 6, 16, 224),
    "vit_small_patch16_heads12": (384, 12, 12, 16, 224),
    "vit_small_patch32": (384, 12, 6, 32, 224),
    "vit_base_patch8": (768, 12, 12, 8, 224),
    "vit_base_patch14": (768, 12, 12, 14, 224),
    "vit_base_patch16": (768, 12, 12, 16, 224),
    "vit_base_patch32": (768, 12, 12, 32, 224),
    "vit_large_patch14": (1024, 24, 16, 14, 224),
    "vit_large_patch16": (1024, 24, 16, 16, 224),
    "vit_huge_patch14": (1280, 32, 16, 14, 224),
    "vit_giant_patch14": (1536, 40, 24, 14, 224),
}


B, L, H = "vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"
# Whose recipe each size takes, of the three that MAE was fine-tuned at.
STANDS_IN = dict.fromkeys(PUBLISHED, B) | {"vit_large_patch14": L, L: L, H: H, "vit_giant_patch14": H}


def on_meta(*args, **options):
    with torch.device("meta"):
        return build_vit(*args, **options)


def parameters_by_hand(dim, depth, patch, side):
    block = 2 * 2 * dim + (3 * dim * dim + 3 * dim) + (dim * dim + dim) + (8 * dim * dim + 5 * dim)
    tokens = 1 + (side // patch) ** 2
    return dim + tokens * dim + (3 * patch * patch * dim + dim) + depth * block + 2 * dim


def test_archs_are_the_published_ones():
    assert list(ARCHS) == list(PUBLISHED)
    assert parameters_by_hand(*(PUBLISHED["vit_base_patch16"][i] for i in (0, 1, 3, 4))) == 85_798_656


@pytest.mark.parametrize("name", PUBLISHED)
def test_build_vit_has_the_published_size(name):
    dim, depth, heads, patch, side = PUBLISHED[name]
    vit = on_meta(name)
    assert sum(p.numel() for p in vit.parameters()) == parameters_by_hand(dim, depth, patch, side)
    assert len(vit.blocks) == depth
    assert {block.attn.num_heads for block in vit.blocks} == {heads}
    assert vit.pos_embed.shape == (1, 1 + (side // patch) ** 2, dim)
    assert vit.patch_embed.proj.weight.shape == (dim, 3, patch, patch)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 5.7), ("small", 22.1), ("base", 86.6), ("large", 304.3)])
def test_parameter_counts_with_a_1000_class_head_are_those_of_the_papers(size, millions):
    # DeiT, Table 1 (Ti 5M, S 22M, B 86M) and timm's model cards (5.7, 22.1, 86.6, 304.3).
    vit = on_meta(f"vit_{size}_patch16", num_classes=1000)
    assert round(sum(p.numel() for p in vit.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_layer_norm_has_eps_1e_6(name):
    norms = [m for m in on_meta(name, num_classes=7, pool="avg").modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 2 * PUBLISHED[name][1] + 1
    assert {norm.eps for norm in norms} == {1e-6}


def test_heads_of_both_poolings():
    token, average = build_vit("vit_mini_patch8", num_classes=5), build_vit("vit_mini_patch8", None, 5, "avg")
    names = {"norm.weight", "fc_norm.weight", "head.weight"}
    assert names & token.state_dict().keys() == names - {"fc_norm.weight"}
    assert names & average.state_dict().keys() == names - {"norm.weight"}
    images = torch.randn(2, 3, 48, 48)
    tokens = token.forward_features(images)
    assert torch.equal(token(images), token.head(tokens[:, 0]))
    tokens = average.forward_features(images)
    torch.testing.assert_close(average(images), average.head(average.fc_norm(tokens[:, 1:].mean(dim=1))))


@pytest.mark.parametrize(("size", "grid"), [((32, 64), (4, 8)), ((64, 40), (8, 5)), (96, (12, 12))])
def test_other_input_sizes_and_rectangles(size, grid):
    vit = build_vit("vit_mini_patch8", size)
    assert vit.patch_embed.grid_size == grid
    height, width = (8 * g for g in grid)
    assert vit.forward_features(torch.randn(2, 3, height, width)).shape == (2, 1 + grid[0] * grid[1], 128)
    torch.testing.assert_close(vit.pos_embed[0], naive_positions(128, *grid), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [47, (48, 44), 4, 0])
def test_sizes_that_the_patches_do_not_fit_are_refused(size):
    with pytest.raises(UserError, match="vit_mini_patch8 cuts images into patches of 8 px"):
        build_vit("vit_mini_patch8", size)


def test_unknown_arch_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"unknown arch 'vit_base_16'; did you mean vit_base_patch16\?"):
        get_arch("vit_base_16")
    with pytest.raises(UserError, match=r"known: vit_mini_patch8, .*vit_huge_patch14"):
        get_arch("q")


def test_drop_path_rises_linearly_from_zero_at_the_first_block():
    vit = build_vit("vit_mini_patch8", drop_path=0.2)
    for path in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, path), "drop_prob", 0.0) for block in vit.blocks]
        assert rates == pytest.approx([0.0, 0.04, 0.08, 0.12, 0.16, 0.2])
    assert all(isinstance(block.drop_path1, nn.Identity) for block in build_vit("vit_mini_patch8").blocks)


def naive_positions(dim, rows, columns):
    """The formula of Attention Is All You Need for each axis, half the channels for the column, half for the row; in
    each half first all sines, then all cosines (facebookresearch/mae, util/pos_embed.py)."""

    def axis(position):
        angles = [position / 10000 ** (4 * k / dim) for k in range(dim // 4)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    tokens = [axis(column) + axis(row) for row in range(rows) for column in range(columns)]
    return torch.tensor([[0.0] * dim, *tokens])


@pytest.mark.parametrize(("dim", "grid"), [(768, (14, 14)), (1280, (16, 16)), (512, (14, 14)), (16, (2, 5))])
def test_sincos_positions_equal_the_formula(dim, grid):
    positions = sincos_position_embedding(dim, grid)
    assert positions.dtype == torch.float32
    torch.testing.assert_close(positions[0], naive_positions(dim, *grid), atol=1e-6, rtol=0)


def test_sincos_positions_by_hand():
    # Width 8: per axis the frequencies 1 and 1/10000 ** (1/2) = 0.01. Second row, third column of a 2x3 grid.
    token = sincos_position_embedding(8, (2, 3))[0, 1 + 1 * 3 + 2]
    hand = [0.909297, 0.019999, -0.416147, 0.999800, 0.841471, 0.0099998, 0.540302, 0.99995]
    assert token.tolist() == pytest.approx(hand, abs=1e-6)


def test_sincos_positions_need_a_width_divisible_by_4():
    with pytest.raises(ValueError, match="divisible by 4, not 30"):
        sincos_position_embedding(30, (2, 2))


def test_initialisation_has_the_paper_s_ranges():
    torch.manual_seed(0)
    vit = build_vit("vit_base_patch16", num_classes=10)
    # Xavier-uniform: variance 2 / (fan_in + fan_out); a uniform variable never leaves sqrt(3) deviations.
    for name, (fan_in, fan_out) in {
        "blocks.3.attn.qkv.weight": (768, 3 * 768),
        "blocks.3.mlp.fc1.weight": (768, 3072),
        "blocks.3.mlp.fc2.weight": (3072, 768),
        "patch_embed.proj.weight": (3 * 16 * 16, 768),
    }.items():
        weight, deviation = vit.get_parameter(name), (2 / (fan_in + fan_out)) ** 0.5
        assert weight.std().item() == pytest.approx(deviation, rel=0.01)
        assert weight.abs().max().item() == pytest.approx(3**0.5 * deviation, rel=0.001)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    for name, parameter in vit.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias") and not name.startswith("patch_embed"):
            assert (parameter == 0).all()
    assert 0 < vit.patch_embed.proj.bias.abs().max() <= 768**-0.5


def test_the_recipe_of_the_nearest_depth_and_width_stands_in():
    assert {arch: nearest(arch, (B, L, H)) for arch in ARCHS} == STANDS_IN
    assert {nearest(arch, (H, L, B)) for arch in (B, L, H)} == {B, L, H}  # whatever the order
    assert (nearest(H, (B, L)), nearest("vit_small_patch16", (L, H))) == (L, L)
    # Of one depth the nearest in width, also if its patches differ.
    assert nearest("vit_small_patch8", (B, "vit_tiny_patch16", "vit_small_patch16")) == "vit_small_patch16"
    said = {arch: stand_in(arch, (B, L, H)) for arch in ("vit_tiny_patch16", "vit_large_patch14", "vit_giant_patch14")}
    assert list(said.values()) == [f"stand-in: ViT-{size}'s value" for size in "BLH"]
