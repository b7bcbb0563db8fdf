"""The pyramid of encoders that timm builds: its maps against timm's own forward pass, at the size of the pre-training
and at others; attention in windows by a loop with angles of each token's own place; loading; rates; refusals."""

import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from mae_core.checkpoint import CheckpointError, read_checkpoint
from mae_core.errors import UserError
from mae_core.vit import get_arch
from tests.fixtures.timm import TIMM, register_timm, timm_checkpoint, timm_folder
from transfer.detection.shared import parameter_groups
from transfer.pyramid import TimmPyramid, facts, layer_of, load_pyramid, pyramid_class, refusal
from transfer.segmentation.mmseg_plugin import layer_groups

TAPS = (0, 2, 3, 5)  # the blocks 1 and 4 are windowed
ROTARY = ("little_eva02", "little_dinov3", "little_mixed")
EVERY = pytest.mark.parametrize("name", TIMM)


@pytest.fixture(autouse=True)
def little(monkeypatch):
    register_timm(monkeypatch)


def pyramid_of(source, size, **options) -> TimmPyramid:
    pyramid = pyramid_class(source.arch)(source.arch, size, **options)
    load_pyramid(pyramid, source)
    return pyramid.eval()


def image(pyramid: TimmPyramid, *grid: int) -> torch.Tensor:
    """For that many patches, by default the pyramid's own."""
    rows, columns = grid or pyramid.grid
    return torch.randn(2, 3, rows * pyramid.side, columns * pyramid.side, generator=torch.Generator().manual_seed(2))


def timms(name: str, folder, grid, **options):
    """timm's own model with the folder's weights, read and resized by timm."""
    patch = get_arch(f"timm/{name}").patch
    return timm.create_model(
        name,
        img_size=(grid[0] * patch, grid[1] * patch),
        pretrained=True,
        pretrained_cfg_overlay={"file": folder / "model.safetensors"},
        num_classes=0,
        **options,
    ).eval()


def maps_by_timm(model, x: torch.Tensor) -> list[torch.Tensor]:
    return model.forward_intermediates(x, indices=list(TAPS), norm=False, intermediates_only=True)


def assert_alike(found, expected) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


# Global attention


@EVERY
@pytest.mark.parametrize("size", [None, 96, (64, 112)], ids=str)
def test_the_maps_are_those_of_timms_forward_pass(tmp_path, name, size):
    """UperNet's blocks, at whose start the new tables are zero and the new layer scales one."""
    source = read_checkpoint(timm_folder(tmp_path / "timm", name))
    pyramid = pyramid_of(source, size or source.meta["image_size"], upernet=True)
    with torch.no_grad():
        model = timms(name, tmp_path / "timm", pyramid.grid)
        assert_alike(pyramid.maps_of(image(pyramid)), maps_by_timm(model, image(pyramid)))


@EVERY
@pytest.mark.parametrize("grid", [(4, 4), (3, 7)], ids=str)
def test_other_sizes_of_one_pyramid_are_timms_dynamic_ones(tmp_path, name, grid):
    source = read_checkpoint(timm_folder(tmp_path / "timm", name))
    pyramid = pyramid_of(source, 96, upernet=True)
    with torch.no_grad():
        model = timms(name, tmp_path / "timm", pyramid.grid, dynamic_img_size=True)
        assert_alike(pyramid.maps_of(image(pyramid, *grid)), maps_by_timm(model, image(pyramid, *grid)))


@pytest.mark.parametrize("name", ["little_eva02", "little_dinov3", "little_clip", "little_siglip"])
@pytest.mark.parametrize("size", [96, (64, 112)], ids=str)
def test_without_tokens_before_the_patches_it_is_timms_model_without_them(name, size):
    """For detection: timm's architecture, built by timm without class token and registers."""
    source = timm_checkpoint(name)
    pyramid = pyramid_of(source, size)
    height, width = (side * pyramid.side for side in pyramid.grid)
    options = {"class_token": False, "global_pool": "avg", "no_embed_class": True}
    options |= {} if "clip" in name or "siglip" in name else {"num_reg_tokens": 0}
    model = timm.create_model(name, img_size=(height, width), num_classes=0, **options).eval()
    own = {key.removeprefix("net."): tensor for key, tensor in pyramid.state_dict().items() if key.startswith("net.")}
    norms = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(("norm.", "fc_norm."))}
    model.load_state_dict(own | norms, strict=True)
    with torch.no_grad():
        assert_alike(pyramid.maps_of(image(pyramid)), maps_by_timm(model, image(pyramid)))


@pytest.mark.parametrize(("name", "side"), [("little_dinov3", 16), ("little_eva02", 14)])
def test_the_four_maps_have_strides_4_to_32(name, side):
    """Patches of 14 px are resampled to cells of 16 px, and the image gets zeros up to a whole number of them."""
    pyramid = pyramid_of(timm_checkpoint(name), 64, window=3)
    x = torch.randn(1, 3, 90, 100)
    whole = F.pad(x, (0, 128 - 100, 0, 96 - 90))
    whole = F.pad(whole, (0, -128 % side, 0, -96 % side))
    with torch.no_grad():
        found, tokens = pyramid(x), pyramid.maps_of(whole)
        if side == 14:
            tokens = [F.interpolate(m, scale_factor=14 / 16, mode="bilinear")[..., :6, :8] for m in tokens]
        expected = [
            pyramid.upsample_4x(tokens[0]),
            pyramid.upsample_2x(tokens[1]),
            tokens[2],
            F.max_pool2d(tokens[3], 2),
        ]
    for ours, theirs, stride in zip(found, expected, (4, 8, 16, 32)):
        assert ours.shape[-2:] == (-(-90 // stride), -(-100 // stride))
        torch.testing.assert_close(ours, theirs[..., : ours.shape[2], : ours.shape[3]])


# Windows


def angles_by_hand(pyramid: TimmPyramid, grid, rows: torch.Tensor, columns: torch.Tensor, block: int) -> torch.Tensor:
    """[n, n, C] or [heads, n, n, C]: sines and cosines of the tokens at these rows and columns of a map of that grid,
    which they may lie beyond; by the formulas of the papers."""
    rope, channels = pyramid.net.rope, 32  # of a head
    steps, y, x = torch.arange(channels // 4), rows.double(), columns.double()
    if pyramid.arch.endswith("eva02"):  # a pre-training grid of 16 patches stretched over the map
        y, x, bands = y * 16 / grid[0], x * 16 / grid[1], 10000.0 ** (-steps / (channels // 4))
    elif pyramid.arch.endswith("dinov3"):  # the map reaches from -1 to 1
        y, x, bands = (2 * (y + 0.5) / grid[0] - 1), (2 * (x + 0.5) / grid[1] - 1), 100.0 ** (-steps / (channels // 4))
        bands = 2 * math.pi * bands
    else:
        of_x, of_y = rope.freqs.detach().double()[:, block, :, None, None, :]
        angles = x[None, None, :, None] * of_x + y[None, :, None, None] * of_y
    if not pyramid.arch.endswith("mixed"):
        shape = (len(rows), len(columns), len(bands))
        angles = torch.cat([(y[:, None, None] * bands).expand(shape), (x[None, :, None] * bands).expand(shape)], dim=-1)
    twice = torch.cat([angles, angles], dim=-1) if rope.__dict__.get("rotate_half") else angles.repeat_interleave(2, -1)
    return torch.cat([twice.sin(), twice.cos()], dim=-1).float()


def attention_by_hand(pyramid: TimmPyramid, number: int, y: torch.Tensor, window: int) -> torch.Tensor:
    """Of a map [B, H, W, D]: window by window, padded with zeros, each token with the angles of its own place."""
    height, width = y.shape[1:3]
    found = torch.zeros_like(y)
    for top in range(0, height, window):
        for left in range(0, width, window):
            part = y[:, top : top + window, left : left + window]
            rows, columns = part.shape[1:3]
            part = F.pad(part, (0, 0, 0, window - columns, 0, window - rows)).flatten(1, 2)
            places = [start + torch.arange(window) for start in (top, left)]
            angles = angles_by_hand(pyramid, (height, width), *places, number).flatten(-3, -2)
            part = pyramid.blocks[number].attn(part, rope=angles).unflatten(1, (window, window))
            found[:, top : top + window, left : left + window] = part[:, :rows, :columns]
    return found


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize(("grid", "window"), [((6, 6), 3), ((6, 6), 4), ((5, 7), 3)], ids=str)
def test_in_windows_every_token_has_the_angles_of_its_own_place(name, grid, window):
    """Which equal those of its place in the window, since attention sees differences only."""
    pyramid = pyramid_of(timm_checkpoint(name), 96, window=window)
    net = pyramid.net
    with torch.no_grad():
        x, angles = net._pos_embed(net.patch_embed(image(pyramid, *grid)))
        every = torch.arange(grid[0]), torch.arange(grid[1])
        by_hand = angles_by_hand(pyramid, grid, *every, 1).flatten(-3, -2)
        torch.testing.assert_close(angles[1] if net.rope_mixed else angles, by_hand, rtol=0, atol=1e-5)
        x, expected = net.norm_pre(x), []
        for number, block in enumerate(net.blocks):
            if number in (1, 4):
                y = attention_by_hand(pyramid, number, block.norm1(x).unflatten(1, grid), window).flatten(1, 2)
                x = x + (y if block.gamma_1 is None else block.gamma_1 * y)
                y = block.mlp(block.norm2(x))
                x = x + (y if block.gamma_2 is None else block.gamma_2 * y)
            else:
                x = block(x, rope=angles[number] if net.rope_mixed else angles)
            if number in TAPS:
                expected.append(x.transpose(1, 2).unflatten(2, grid))
        assert_alike(pyramid.maps_of(image(pyramid, *grid)), expected)


@EVERY
def test_one_window_over_the_map_is_global_attention(name):
    """With norms before or after, layer scales or none, rotary positions or none."""
    source = timm_checkpoint(name)
    whole, one = (pyramid_of(source, 96, window=window) for window in (0, pyramid_of(source, 96).grid[0]))
    other = pyramid_of(source, 96, window=2)
    with torch.no_grad():
        x = image(whole)
        assert_alike(one.maps_of(x), expected := whole.maps_of(x))
        assert (other.maps_of(x)[2] - expected[2]).abs().max() > 1e-3 * expected[2].abs().max()


@pytest.mark.parametrize("options", [{"window": 3}, {"upernet": True}], ids=str)
def test_the_bias_is_added_to_the_logits(options):
    """With a table that forbids all but a distance of 0, tokens no longer know of each other."""
    pyramid = pyramid_of(timm_checkpoint("little_dinov3"), 64, **options)
    x = image(pyramid)
    changed = x.clone()
    changed[..., -16:, -16:] += 1.0
    with torch.no_grad():
        before, after = (pyramid.maps_of(images)[3][..., 0, 0] for images in (x, changed))
        assert (before - after).abs().max() > 1e-4
        for key, parameter in pyramid.named_parameters():
            if key.endswith(("bias_global", "bias_windowed", ".bias")) and parameter.ndim == 3:
                centre = [side // 2 for side in parameter.shape[1:]]
                parameter.fill_(-1e4)
                parameter[:, centre[0], centre[1]] = 0.0
            elif key.endswith("bias_class"):
                parameter.fill_(-1e4)
        before, after = (pyramid.maps_of(images)[3][..., 0, 0] for images in (x, changed))
    torch.testing.assert_close(before, after)


# Loading


@pytest.mark.parametrize(("upernet", "kept"), [(True, True), (False, False)])
def test_loading_takes_all_but_the_last_norm_and_what_comes_before_the_patches(tmp_path, upernet, kept):
    source = read_checkpoint(timm_folder(tmp_path / "timm", "little_eva02"))
    pyramid = pyramid_class(source.arch)(source.arch, 96, upernet=upernet)
    report = load_pyramid(pyramid, source)
    state = pyramid.state_dict()
    assert set(report.dropped) == {"net.fc_norm.weight", "net.fc_norm.bias"} | set(() if kept else ("net.cls_token",))
    assert set(report.loaded) == set(source.encoder) - set(report.dropped)
    assert set(report.loaded) | set(report.missing) == set(state)
    assert not set(report.loaded) & set(report.missing)
    assert report.resized == ("net.pos_embed",)
    for key in set(report.loaded) - {"net.pos_embed"}:
        assert torch.equal(state[key], source.encoder[key]), key
    new = {key.rsplit(".", 1)[-1] for key in report.missing if "blocks." in key}
    assert new == ({"bias", "bias_class", "gamma_1", "gamma_2"} if upernet else set())
    assert all((state[key] == 1).all() for key in report.missing if "gamma" in key)


def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(tmp_path):
    name, key = "little_dinov3", "blocks.3.gamma_1"
    with pytest.raises(CheckpointError, match=r"net\.blocks\.3\.gamma_1"):
        read_checkpoint(timm_folder(tmp_path / "timm", name, without=key))
    source = timm_checkpoint(name)
    for encoder in (
        {n: t for n, t in source.encoder.items() if n != f"net.{key}"},
        source.encoder | {f"net.{key}": torch.ones(63)},
    ):
        pyramid = pyramid_class(source.arch)(source.arch, 64, upernet=True)
        before = {n: t.clone() for n, t in pyramid.state_dict().items()}
        with pytest.raises(CheckpointError, match=r"net\.blocks\.3\.gamma_1"):
            load_pyramid(pyramid, replace(source, encoder=encoder))
        assert all(torch.equal(before[n], t) for n, t in pyramid.state_dict().items())


# Training


@EVERY
@pytest.mark.parametrize("options", [{"window": 3}, {"upernet": True}], ids=str)
def test_a_gradient_reaches_every_parameter(name, options):
    """Or DistributedDataParallel would stop."""
    pyramid = pyramid_of(timm_checkpoint(name), 96, **options).train()
    sum((m * torch.randn_like(m)).sum() for m in pyramid(torch.randn(2, 3, 96, 96))).backward()
    assert not [key for key, p in pyramid.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@pytest.mark.parametrize("options", [{"window": 3}, {"upernet": True}], ids=str)
def test_activation_checkpointing_and_bf16_change_the_memory_and_the_rounding(options):
    source, found = timm_checkpoint("little_mixed"), []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        pyramid = pyramid_of(source, 64, drop_path=0.3, activation_checkpointing=checkpointing, **options)
        torch.manual_seed(3)
        maps = pyramid.train()(image(pyramid))
        sum(m.square().sum() for m in maps).backward()
        found.append((maps, {key: p.grad for key, p in pyramid.named_parameters()}))
    (maps, gradients), (same, again) = found
    assert all(torch.equal(a, b) for a, b in zip(maps, same))
    for key, gradient in gradients.items():
        torch.testing.assert_close(again[key], gradient, msg=key)
    pyramid.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rounded = pyramid(image(pyramid))
    with torch.no_grad():
        exact = pyramid(image(pyramid))
    assert not torch.equal(rounded[2].float(), exact[2])
    assert all(((a.float() - b).norm() / b.norm()) < 0.05 for a, b in zip(rounded, exact))


def test_rates_and_weight_decay_know_timms_names():
    layers = {
        "net.patch_embed.proj.weight": 0, "net.pos_embed": 0, "net.cls_token": 0, "net.norm_pre.weight": 0,
        "net.rope.freqs": 0, "net.blocks.0.norm1.weight": 1, "net.blocks.5.bias": 6, "bias_global": 7,
        "upsample_2x.weight": 7,
    }  # fmt: skip
    assert {key: layer_of(key, 6) for key in layers} == layers
    source = timm_checkpoint("little_mixed")
    pyramid = pyramid_of(source, 64, window=3)
    names = {id(p): key for key, p in pyramid.named_parameters()}
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in parameter_groups(pyramid, 0.1))
    assert {"net.pos_embed", "net.rope.freqs", "net.blocks.0.norm1.weight", "bias_windowed"} <= spared
    assert {"net.blocks.0.attn.qkv.weight", "net.patch_embed.proj.weight"} <= decayed
    for other, key in (("little_dinov3", "net.blocks.0.gamma_1"), ("little_aimv2", "net.blocks.0.norm1.weight")):
        others = pyramid_of(timm_checkpoint(other), 64)
        spared = {id(p) for p in parameter_groups(others, 0.1)[1]["params"]}
        assert id(others.get_parameter(key)) in spared
    model = nn.ModuleDict({"backbone": pyramid_of(source, 64, upernet=True), "head": nn.Linear(2, 2)})
    groups = {key: group for group in layer_groups(model, 6, 0.5, 0.1) for key in group["names"]}
    assert len(groups) == len(list(model.parameters()))
    said = {key: (group["lr_scale"], group["weight_decay"]) for key, group in groups.items()}
    assert said["backbone.net.rope.freqs"] == (0.5**7, 0.0)
    assert said["backbone.net.blocks.5.mlp.fc1.weight"] == (0.5, 0.1)
    assert said["head.weight"] == (1.0, 0.1)


# What is said and what is refused


def test_the_record_names_the_encoder_and_its_patches():
    assert facts("timm/little_dinov3", timm_checkpoint("little_dinov3").variant) == {"encoder": "timm's little_dinov3"}
    said = facts("timm/little_eva02", timm_checkpoint("little_eva02").variant)
    assert said["maps"].startswith("patches of 14 px")


@pytest.mark.parametrize(
    "name", ["hiera_tiny_224", "cait_xxs24_224", "samvit_base_patch16", "vit_dwee_patch16_reg1_gap_256"]
)
def test_other_shapes_are_refused_with_a_sentence(name):
    assert f"timm's {name}" in refusal(f"timm/{name}")
    with pytest.raises(UserError, match=f"one grid of tokens.*{name}"):
        pyramid_class(f"timm/{name}")(f"timm/{name}", 64)
    assert refusal("vit_mini_patch8") == refusal("timm/little_eva02") == ""
