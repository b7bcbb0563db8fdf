"""The pyramid against timm's blocks, and against attention written out window by window."""

import re
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from mae_core import vit
from mae_core.checkpoint import Checkpoint, CheckpointError, load_encoder, read_checkpoint
from mae_core.errors import UserError
from mae_core.vit import Arch, build_vit, get_arch
from transfer.pyramid import (
    ViTPyramid,
    layer_of,
    load_pyramid,
    patch_side,
    pretraining_grid,
    quarters,
    relative_position_bias,
    run_block,
)

ARCH = "vit_mini_patch8"  # 128 wide, 6 blocks, 4 heads, patches of 8 px, 6 x 6 of them


def checkpoint(arch: str = ARCH, **changes) -> Checkpoint:
    """Random weights that a training would have moved: no zero bias, no unit norm."""
    source = read_checkpoint(f"random:{arch}")
    noise = torch.Generator().manual_seed(1)
    encoder = {name: t + 0.1 * torch.randn(t.shape, generator=noise) for name, t in source.encoder.items()}
    return replace(source, encoder=encoder, **changes)


def pyramid_of(image_size=48, source: Checkpoint | None = None, biased: bool = False, **options) -> ViTPyramid:
    """A loaded pyramid in evaluation mode. biased: with tables that are not zero."""
    torch.manual_seed(0)
    source = source or checkpoint()
    pyramid = ViTPyramid(source.arch, image_size, **options)
    load_pyramid(pyramid, source)
    if biased:
        with torch.no_grad():
            for table in tables(pyramid).values():
                table.normal_()
    return pyramid.eval()


def tables(pyramid: ViTPyramid) -> dict[str, torch.Tensor]:
    name_of = re.compile(r"bias_(windowed|global)|blocks\.\d+\.bias(_class)?")
    return {name: p for name, p in pyramid.named_parameters() if name_of.fullmatch(name)}


def images(height: int = 48, width: int = 48, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(2))


def timm_taps(source: Checkpoint, taps: tuple[int, ...], x: torch.Tensor, eps: float = 1e-6) -> list[torch.Tensor]:
    """What timm's own ViT without a class token has after those blocks, [B, D, H, W] each."""
    a = get_arch(source.arch)
    reference = VisionTransformer(
        img_size=x.shape[-1], patch_size=a.patch, embed_dim=a.dim, depth=a.depth, num_heads=a.heads, num_classes=0,
        class_token=False, global_pool="", norm_layer=partial(nn.LayerNorm, eps=eps),
    ).eval()  # fmt: skip
    state = {**source.encoder, "pos_embed": source.encoder["pos_embed"][:, 1:]}
    reference.load_state_dict({name: state[name] for name in reference.state_dict()})
    return reference.forward_intermediates(x, indices=list(taps), norm=False, intermediates_only=True)


def by_hand(pyramid: ViTPyramid, x: torch.Tensor, windowed: set[int]) -> list[torch.Tensor]:
    """The outputs [B, H, W, D] of all blocks, every window cut out, padded and attended to in a loop."""
    a = get_arch(pyramid.arch)
    x = F.conv2d(x, pyramid.patch_embed.proj.weight, pyramid.patch_embed.proj.bias, stride=patch_side(pyramid.arch))
    positions = pyramid.pos_embed.reshape(1, *pyramid.grid, a.dim).permute(0, 3, 1, 2)
    if positions.shape[-2:] != x.shape[-2:]:
        positions = F.interpolate(positions, x.shape[-2:], mode="bicubic")
    x = (x + positions).permute(0, 2, 3, 1)
    found = []
    for number, block in enumerate(pyramid.blocks):
        table = pyramid.bias_windowed if number in windowed else pyramid.bias_global
        height, width = x.shape[1:3]
        side = (pyramid.window, pyramid.window) if number in windowed else (height, width)
        if tuple(table.shape[1:]) != (2 * side[0] - 1, 2 * side[1] - 1):
            table = F.interpolate(table[None], (2 * side[0] - 1, 2 * side[1] - 1), mode="bicubic")[0]
        rows, columns = (t.flatten() for t in torch.meshgrid(*map(torch.arange, side), indexing="ij"))
        bias = table[:, rows[:, None] - rows + side[0] - 1, columns[:, None] - columns + side[1] - 1]
        normed, attended = block.norm1(x), torch.zeros_like(x)
        for image, top, left in product(range(len(x)), range(0, height, side[0]), range(0, width, side[1])):
            place = image, slice(top, top + side[0]), slice(left, left + side[1])
            h, w = normed[place].shape[:2]
            window = torch.zeros(*side, a.dim)
            window[:h, :w] = normed[place]
            qkv = (t.chunk(a.heads, dim=-1) for t in block.attn.qkv(window.flatten(0, 1)).chunk(3, dim=-1))
            heads = [
                (q @ k.T / (a.dim // a.heads) ** 0.5 + bias[head]).softmax(dim=-1) @ v
                for head, (q, k, v) in enumerate(zip(*qkv))
            ]
            attended[place] = block.attn.proj(torch.cat(heads, dim=-1)).view(*side, a.dim)[:h, :w]
        x = x + attended
        x = x + block.mlp(block.norm2(x))
        found.append(x)
    return found


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# The blocks


@pytest.mark.parametrize("window", [0, 6], ids=["global", "one window"])
@pytest.mark.parametrize(("depth", "taps"), [(6, None), (6, (1, 2, 4, 5)), (4, None), (8, None)])
def test_equals_timm_s_blocks_on_the_patch_tokens(monkeypatch, window, depth, taps):
    """With one window over the map and zero bias."""
    monkeypatch.setitem(vit.ARCHS, "deep", Arch("deep", 128, depth, 4, 8, 48))
    source, x = checkpoint("deep"), images()
    pyramid = pyramid_of(source=source, window=window, taps=taps)
    expected_taps = taps or {4: (0, 1, 2, 3), 6: (0, 2, 3, 5), 8: (1, 3, 5, 7)}[depth]
    first, second, third, last = timm_taps(source, expected_taps, x)
    with torch.no_grad():
        maps = pyramid(x)
        up = [pyramid.upsample_4x[0], pyramid.upsample_4x[1], pyramid.upsample_4x[3], pyramid.upsample_2x]
        assert [tuple(layer.kernel_size + layer.stride) for layer in (up[0], up[2], up[3])] == [(2, 2, 2, 2)] * 3
        four = F.conv_transpose2d(first, up[0].weight, up[0].bias, stride=2)
        four = F.gelu(F.group_norm(four, 32, up[1].weight, up[1].bias))
        assert_close(maps[0], F.conv_transpose2d(four, up[2].weight, up[2].bias, stride=2))
        assert_close(maps[1], F.conv_transpose2d(second, up[3].weight, up[3].bias, stride=2))
    assert_close(maps[2], third)
    assert_close(maps[3], F.max_pool2d(last, 2))
    assert (maps[2] - last).abs().max() > 0.1


@pytest.mark.parametrize(
    ("size", "options", "windowed", "shown"),
    [
        ((48, 48), {"window": 3}, {1, 4}, None),
        ((48, 48), {"window": 4}, {1, 4}, None),  # 6 patches are padded to 8
        ((48, 48), {"window": 8}, {1, 4}, None),  # more than there are
        ((48, 80), {"window": 4}, {1, 4}, None),
        ((48, 80), {}, set(), None),
        ((48, 48), {"window": 2, "taps": (2, 3, 4, 5)}, {0, 1}, None),
        # Positions and tables are interpolated.
        ((48, 48), {"window": 4}, {1, 4}, (64, 96)),
    ],
    ids=str,
)
def test_equals_attention_in_a_loop_over_padded_windows(size, options, windowed, shown):
    """With biases: which blocks are windowed, which table each takes, what is padded and when. shown: another input
    size than that of the pyramid."""
    pyramid, x = pyramid_of(size, biased=True, **options), images(*(shown or size))
    with torch.no_grad():
        expected = by_hand(pyramid, x, windowed)
        maps = pyramid(x)
    assert {i for i in range(6) if pyramid.windowed(i)} == windowed
    taps = options.get("taps", (0, 2, 3, 5))
    assert_close(maps[2], expected[taps[2]].permute(0, 3, 1, 2))
    assert_close(maps[3], F.max_pool2d(expected[taps[3]].permute(0, 3, 1, 2), 2))


def test_taps_are_the_last_blocks_of_four_equal_subsets():
    expected = {6: (0, 2, 3, 5), 12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 32: (7, 15, 23, 31)}
    assert {depth: quarters(depth) for depth in expected} == expected


# Bias tables


def test_the_bias_is_the_textbook_s_on_a_grid_that_is_not_square():
    height, width = 3, 4
    table = torch.randn(2, 5, 7)
    bias = relative_position_bias(table, (height, width))
    assert bias.shape == (2, 12, 12)
    for head, y, x, y2, x2 in product(range(2), *[range(height), range(width)] * 2):
        entry = table[head, y - y2 + height - 1, x - x2 + width - 1]
        assert bias[head, y * width + x, y2 * width + x2] == entry


def test_tables_are_shared_or_per_block_and_zero_at_the_start():
    def shapes(**options):
        found = tables(ViTPyramid(ARCH, (48, 64), **options))
        assert not any(table.any() for table in found.values())
        return {name: tuple(table.shape) for name, table in found.items()}

    whole = (4, 2 * 6 - 1, 2 * 8 - 1)
    assert shapes(window=3) == {"bias_global": whole, "bias_windowed": (4, 5, 5)}
    assert shapes() == {"bias_global": whole}
    own = {f"blocks.{i}.bias": whole for i in range(6)} | {f"blocks.{i}.bias_class": (4, 3) for i in range(6)}
    assert shapes(upernet=True) == own
    with pytest.raises(ValueError, match="no window"):
        ViTPyramid(ARCH, 48, upernet=True, window=3)


@pytest.mark.parametrize("options", [{"window": 4}, {"upernet": True}])
def test_a_gradient_reaches_every_parameter(options):
    pyramid = pyramid_of(**options).train()
    sum((m * torch.randn_like(m)).sum() for m in pyramid(images())).backward()
    still = [name for name, p in pyramid.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still


# Sizes


@pytest.mark.parametrize("size", [(48, 48), (1, 1), (50, 33), (40, 97)], ids=str)
@pytest.mark.parametrize("options", [{"window": 3}, {"upernet": True}], ids=str)
def test_maps_cover_any_input_by_strides_of_2_to_16(size, options):
    """And hold what the image padded with zeros gives."""
    pyramid = pyramid_of(**options)
    x = images(*size, count=1)
    with torch.no_grad():
        maps = pyramid(x)
        padded = torch.zeros(1, 3, -(-size[0] // 16) * 16, -(-size[1] // 16) * 16)
        padded[..., : size[0], : size[1]] = x
        whole = pyramid(padded)
    for found, full, stride in zip(maps, whole, (2, 4, 8, 16)):
        height, width = (-(-side // stride) for side in size)
        assert found.shape == (1, 128, height, width)
        assert torch.equal(found, full[..., :height, :width])
        assert full.shape[-2:] == tuple(side // stride for side in padded.shape[-2:])


def test_strides_follow_the_patch_and_14_px_become_16(monkeypatch):
    archs = (ARCH, "vit_base_patch16", "vit_huge_patch14")
    assert [patch_side(arch) for arch in archs] == [8, 16, 16]
    assert [pretraining_grid(arch) for arch in archs] == [6, 14, 16]
    with torch.device("meta"):
        monkeypatch.setitem(vit.ARCHS, "h", Arch("h", 64, 4, 2, 14, 56))
        monkeypatch.setitem(vit.ARCHS, "b", Arch("b", 64, 4, 2, 16, 64))
        assert ViTPyramid("h", 64).strides == ViTPyramid("b", 64).strides == (4, 8, 16, 32)
        assert ViTPyramid("h", 64).grid == (4, 4)
        assert ViTPyramid(ARCH, 48).strides == (2, 4, 8, 16)


@pytest.mark.parametrize("size", [50, (48, 44)])
def test_a_size_that_the_patches_do_not_divide_is_refused(size):
    with pytest.raises(UserError, match=r"8 px.*(50x50|48x44)"):
        ViTPyramid(ARCH, size)


# Loading


def test_loading_takes_all_but_the_class_token_and_the_last_norm():
    source = checkpoint()
    pyramid = ViTPyramid(ARCH, 48, window=3)
    report = load_pyramid(pyramid, source)
    state = pyramid.state_dict()
    assert set(report.dropped) == {"cls_token", "norm.weight", "norm.bias"}
    assert set(report.loaded) == set(source.encoder) - set(report.dropped)
    assert set(report.loaded) | set(report.missing) == set(state)
    assert {"bias_global", "bias_windowed", "upsample_2x.weight", "upsample_4x.1.bias"} <= set(report.missing)
    assert report.resized == ()
    for name in set(report.loaded) - {"pos_embed"}:
        assert torch.equal(state[name], source.encoder[name]), name
    assert torch.equal(state["pos_embed"], source.encoder["pos_embed"][:, 1:])


def test_loading_keeps_the_class_token_for_beit_s_blocks():
    """With its position; new are only the tables, zeros, and the layer scales, ones."""
    source = checkpoint()
    pyramid = ViTPyramid(ARCH, 48, upernet=True)
    report = load_pyramid(pyramid, source)
    state = pyramid.state_dict()
    assert set(report.dropped) == {"norm.weight", "norm.bias"}
    assert set(report.loaded) == set(source.encoder) - set(report.dropped)
    assert set(report.loaded) | set(report.missing) == set(state)
    for name in report.loaded:
        assert torch.equal(state[name], source.encoder[name]), name
    for i in range(6):
        assert not state[f"blocks.{i}.bias"].any()
        assert not state[f"blocks.{i}.bias_class"].any()
        assert (state[f"blocks.{i}.ls1.gamma"] == 1).all()
        assert (state[f"blocks.{i}.ls2.gamma"] == 1).all()


@pytest.mark.parametrize("upernet", [False, True])
def test_positions_are_resized_as_load_encoder_does(upernet):
    source, size = checkpoint(), (64, 96)
    pyramid = ViTPyramid(ARCH, size, upernet=upernet)
    assert load_pyramid(pyramid, source).resized == ("pos_embed",)
    reference = build_vit(ARCH, size)
    load_encoder(reference, source)
    assert torch.equal(pyramid.pos_embed, reference.pos_embed if upernet else reference.pos_embed[:, 1:])
    pyramid = ViTPyramid(ARCH, size)
    load_pyramid(pyramid, source)
    square = source.encoder["pos_embed"][:, 1:].reshape(1, 6, 6, 128).permute(0, 3, 1, 2)
    by_torch = F.interpolate(square, (8, 12), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(pyramid.pos_embed.detach(), by_torch)


def test_the_eps_is_the_checkpoint_s():
    """A large one: the same weights then give other maps, those of the encoder it was."""
    source, x = checkpoint(eps=0.5), images()
    with torch.no_grad():
        found, expected = pyramid_of(source=source)(x)[2], timm_taps(source, (3,), x, eps=0.5)
    assert_close(found, expected[0])


@pytest.mark.parametrize("name", ["blocks.3.attn.proj.bias", "pos_embed", "patch_embed.proj.weight", "norm.weight"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(name):
    source = checkpoint()
    for broken in (
        {k: v for k, v in source.encoder.items() if k != name},
        source.encoder | {name: source.encoder[name][..., :-1].contiguous()},
    ):
        pyramid = ViTPyramid(ARCH, 48)
        before = {k: v.clone() for k, v in pyramid.state_dict().items()}
        with pytest.raises(CheckpointError, match=name):
            load_pyramid(pyramid, replace(source, encoder=broken))
        assert all(torch.equal(before[k], v) for k, v in pyramid.state_dict().items())


def test_patches_of_14_px_are_resampled_so_that_resized_patches_answer_as_before(monkeypatch):
    """FlexiViT's property (arXiv 2212.08013): the new kernel on a patch resized to 16 px is the old kernel on it."""
    monkeypatch.setitem(vit.ARCHS, "h", Arch("h", 64, 4, 2, 14, 56))
    source = checkpoint("h")
    pyramid = pyramid_of(64, source)
    report = load_pyramid(pyramid, source)
    assert report.resized == ("patch_embed.proj.weight",)
    patches = torch.randn(5, 3, 14, 14)
    resized = F.interpolate(patches, (16, 16), mode="bicubic", antialias=True)
    old = F.conv2d(patches, source.encoder["patch_embed.proj.weight"], source.encoder["patch_embed.proj.bias"])
    with torch.no_grad():
        torch.testing.assert_close(pyramid.patch_embed(resized), old, rtol=1e-3, atol=1e-3)
        assert [tuple(m.shape[-2:]) for m in pyramid(images(60, 90, count=1))] == [(15, 23), (8, 12), (4, 6), (2, 3)]


# Training


def test_drop_path_rises_linearly_from_none():
    pyramid = ViTPyramid(ARCH, 48, drop_path=0.4)
    for part in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, part), "drop_prob", 0.0) for block in pyramid.blocks]
        np.testing.assert_allclose(rates, np.linspace(0, 0.4, 6), rtol=1e-6)
    pyramid = pyramid_of(drop_path=0.4)
    x = images(count=8)
    with torch.no_grad():
        assert torch.equal(pyramid(x)[2], pyramid(x)[2])
        pyramid.train()
        assert not torch.equal(pyramid(x)[2], pyramid(x)[2])


def test_drop_path_drops_the_attention_and_the_mlp():
    """With probability 1 nothing of either branch is left."""
    block, x = pyramid_of(drop_path=0.4).blocks[5].train(), torch.randn(2, 6, 6, 128)
    bias = torch.zeros(4, 36, 36)
    block.drop_path1.drop_prob, block.drop_path2.drop_prob = 1.0, 0.0
    torch.testing.assert_close(run_block(block, x, 0, bias), x + block.mlp(block.norm2(x)))
    block.drop_path2.drop_prob = 1.0
    assert torch.equal(run_block(block, x, 0, bias), x)


@pytest.mark.parametrize("options", [{"window": 4}, {"upernet": True}], ids=str)
def test_activation_checkpointing_changes_neither_maps_nor_gradients(options):
    found = []
    for checkpointing in (False, True):
        pyramid = pyramid_of(**options, biased=True, drop_path=0.3, activation_checkpointing=checkpointing)
        saved = []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            maps = pyramid.train()(images())
        sum(m.square().sum() for m in maps).backward()
        found.append((maps, {name: p.grad for name, p in pyramid.named_parameters()}, sum(saved)))
    (maps, gradients, memory), (same, again, less) = found
    assert less < memory / 2
    assert all(torch.equal(a, b) for a, b in zip(maps, same))
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, msg=name)


@pytest.mark.parametrize("options", [{"window": 4}, {"upernet": True}], ids=str)
def test_bf16_only_rounds_the_maps(options):
    pyramid, x = pyramid_of(**options, biased=True), images()
    with torch.no_grad():
        expected = pyramid(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = pyramid(x)
    for a, b in zip(found, expected):
        assert ((a.float() - b).norm() / b.norm()) < 0.05
    assert not torch.equal(found[2].float(), expected[2])


def test_layers_for_layer_wise_decay():
    names = {
        "patch_embed.proj.weight": 0, "pos_embed": 0, "cls_token": 0, "blocks.0.norm1.weight": 1, "blocks.0.bias": 1,
        "blocks.0.bias_class": 1, "blocks.1.ls1.gamma": 2, "blocks.5.mlp.fc2.bias": 6, "upsample_4x.0.weight": 7,
        "upsample_2x.bias": 7, "bias_global": 7, "blocks.11.attn.qkv.weight": 12,
    }  # fmt: skip
    assert {name: layer_of(name, 6) for name in names} == names
    for options in ({"window": 3}, {"upernet": True}):
        found = {layer_of(name, 6) for name, _ in ViTPyramid(ARCH, 48, **options).named_parameters()}
        assert found == set(range(8))
