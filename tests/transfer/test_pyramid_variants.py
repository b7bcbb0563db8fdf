"""The pyramid of encoders that are no plain ViT: its maps against the forward pass of timm's own model with the same
random weights, at the size of their pre-training and at two others."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.interpolate import RectBivariateSpline
from timm.models.beit import Beit
from torch.nn import functional as F

from mae_core import vit
from mae_core.checkpoint import Checkpoint, load_encoder, model_of, read_checkpoint
from mae_core.vit import PLAIN, Arch, Variant, build_vit
from transfer.pyramid import ViTPyramid, facts, layer_of, load_pyramid, resize_geometrically

ARCH, TAPS = "vit_mini_patch8", (0, 2, 3, 5)
VARIANTS = {
    "DINOv2": Variant(layer_scale=True),
    "DINOv2 with registers": Variant(registers=4, positions=0, layer_scale=True),
    "DINOv2 giant": Variant(layer_scale=True, swiglu=512),
    "DeiT III": Variant(positions=0, layer_scale=True),
    "distilled DeiT": Variant(registers=1, positions=2),
    "BEiT": Variant(beit=True),
}
EVERY = pytest.mark.parametrize("name", VARIANTS)
SIZES = pytest.mark.parametrize("size", [(48, 48), (64, 64), (48, 80)], ids=str)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(vit.ARCHS, "p14", Arch("p14", 64, 4, 2, 14, 56))


def checkpoint(variant: Variant, arch: str = ARCH) -> Checkpoint:
    """Random weights that a training would have moved."""
    torch.manual_seed(0)
    model = build_vit(arch, variant=variant)
    state = {name: t + 0.1 * torch.randn(t.shape) for name, t in model.state_dict().items()}
    size = vit.get_arch(arch).image_size
    source = read_checkpoint(f"random:{ARCH}")
    return replace(source, arch=arch, encoder=state, variant=variant, meta={"image_size": size})


def pyramid_of(source: Checkpoint, size, **options) -> ViTPyramid:
    pyramid = ViTPyramid(source.arch, size, variant=source.variant, **options)
    load_pyramid(pyramid, source)
    return pyramid.eval()


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))


def tables_by_scipy(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """BEiT's table [distances + 3, heads] for another grid as microsoft/unilm resizes it, with the spline that scipy's
    removed interp2d fitted."""
    have = int((len(table) - 3) ** 0.5)

    def places(want: int) -> np.ndarray:
        low, high = 1.01, 1.5
        while high - low > 1e-6:
            q = (low + high) / 2
            low, high = (low, q) if sum(q**i for i in range(have // 2)) > want // 2 else (q, high)
        far = [sum(q**i for i in range(n + 1)) for n in range(have // 2)]
        return np.array([-d for d in reversed(far)] + [0] + far)

    sides, found = [2 * side - 1 for side in grid], []
    for head in table[:-3].T.unflatten(1, (have, have)).numpy():
        spline = RectBivariateSpline(*map(places, sides), head, s=0)
        found.append(spline(*(np.arange(-(side // 2), side // 2 + 1) for side in sides)).ravel())
    return torch.cat([torch.tensor(np.array(found), dtype=torch.float32).T, table[-3:]])


def by_timm(source: Checkpoint, x: torch.Tensor) -> list[torch.Tensor]:
    """What the encoder's own model has after the tapped blocks, [B, D, H, W] each."""
    size = (x.shape[2], x.shape[3])
    model = model_of(source, size).eval()
    if isinstance(model, Beit):
        grid = model.patch_embed.grid_size
        tables = {n: t for n, t in source.encoder.items() if n.endswith("table") and grid != (6, 6)}
        source = replace(source, encoder=source.encoder | {n: tables_by_scipy(t, grid) for n, t in tables.items()})
        model.load_state_dict(source.encoder)
    else:
        load_encoder(model, source)
    with torch.no_grad():
        return model.forward_intermediates(x, indices=list(TAPS), norm=False, intermediates_only=True)


def assert_maps_are(pyramid: ViTPyramid, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """The maps that the owner's give when they are brought to the four strides."""
    with torch.no_grad():
        alike = [pyramid.upsample_4x(expected[0]), pyramid.upsample_2x(expected[1]), expected[2]]
    for ours, theirs in zip(found, [*alike, F.max_pool2d(expected[3], 2)]):
        assert theirs.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@EVERY
@SIZES
def test_maps_are_those_of_the_owner_s_forward_pass(name, size):
    """UperNet's blocks, at whose start the new tables are zero and the new layer scales one."""
    source = checkpoint(VARIANTS[name])
    pyramid = pyramid_of(source, size, upernet=True)
    with torch.no_grad():
        assert_maps_are(pyramid, pyramid(images(*size)), by_timm(source, images(*size)))


@EVERY
@pytest.mark.parametrize("size", [(64, 64), (48, 80)], ids=str)
def test_other_sizes_of_one_pyramid_are_the_owner_s_too(name, size):
    """Positions and tables are interpolated as they are used, not only as they are loaded."""
    source = checkpoint(VARIANTS[name])
    pyramid = pyramid_of(source, 48, upernet=True)
    with torch.no_grad():
        assert_maps_are(pyramid, pyramid(images(*size)), by_timm(source, images(*size)))


def test_beit_without_its_class_token_keeps_its_tables_in_windows_and_globally():
    """Against attention written out for one window: a window as large as the map is global attention."""
    source = checkpoint(VARIANTS["BEiT"])
    with torch.no_grad():
        whole, one_window = (pyramid_of(source, 48, window=window)(images(48, 48)) for window in (0, 6))
        padded = pyramid_of(source, 48, window=4)(images(48, 48))
    for a, b, c in zip(whole[2:], one_window[2:], padded[2:]):  # the first two pass through random layers
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert (a - c).abs().max() > 0.1
    pyramid = pyramid_of(source, (48, 64), window=3)
    shapes = [tuple(block.bias.shape) for block in pyramid.blocks]
    assert shapes == [(4, 5, 5) if i in (1, 4) else (4, 11, 15) for i in range(6)]
    table = source.encoder["blocks.1.attn.relative_position_bias_table"]
    expected = tables_by_scipy(table, (3, 3))[:-3].T.unflatten(1, (5, 5))
    torch.testing.assert_close(pyramid.blocks[1].bias.detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("have", "want"), [(27, 63), (27, 79), (27, 27), (27, 13), (11, 15)])
def test_tables_are_resized_as_by_the_spline_of_beit_s_own_code(have, want):
    torch.manual_seed(0)
    table = torch.randn(have**2 + 3, 3)
    grid = ((want + 1) // 2, (have + 1) // 2)
    found = resize_geometrically(table[:-3].T.unflatten(1, (have, have))[None], (want, have))[0]
    if want == have:
        assert torch.equal(found.flatten(1).T, table[:-3])
    else:
        expected = tables_by_scipy(table, grid)[:-3].T.unflatten(1, (want, have))
        # The columns keep their number, so BEiT's code leaves a table alone only if both do.
        rows = resize_geometrically(table[:-3].T.unflatten(1, (have, have))[None], (want, want))[0]
        square = tables_by_scipy(table, (grid[0], grid[0]))[:-3].T.unflatten(1, (want, want))
        torch.testing.assert_close(rows, square, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@EVERY
@pytest.mark.parametrize("options", [{"window": 3}, {"upernet": True}], ids=str)
def test_every_tensor_is_loaded_or_named_and_a_gradient_reaches_it(name, options):
    source = checkpoint(VARIANTS[name])
    pyramid = ViTPyramid(ARCH, 48, variant=source.variant, **options)
    report = load_pyramid(pyramid, source)
    state = pyramid.state_dict()
    assert set(report.loaded) | set(report.missing) == set(state)
    prefix = {"cls_token", "reg_token"} & source.encoder.keys() if "window" in options else set()
    assert {n for n in report.dropped if "relative_position" not in n} == {"norm.weight", "norm.bias"} | prefix
    for own in set(report.loaded) & source.encoder.keys() - {"pos_embed"}:
        assert torch.equal(state[own], source.encoder[own]), own
    sum((m * torch.randn_like(m)).sum() for m in pyramid.train()(images(48, 48))).backward()
    still = [n for n, p in pyramid.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still
    assert {layer_of(n, 6) for n, _ in pyramid.named_parameters()} == set(range(8))


def test_patches_of_14_px_stay_and_their_maps_are_resampled_to_cells_of_16():
    """The map at a cell's centre is linear between the tokens around that point, which timm's model gives for the image
    with zeros up to a multiple of 14 px."""
    source, x = checkpoint(Variant(layer_scale=True), "p14"), images(64, 64)
    pyramid = pyramid_of(source, 64, upernet=True, taps=(0, 1, 2, 3))
    model = model_of(source, 70).eval()
    load_encoder(model, source)
    with torch.no_grad():
        found = pyramid(x)[2]
        own = model.forward_intermediates(F.pad(x, (0, 6, 0, 6)), indices=[2], norm=False, intermediates_only=True)[0]
    assert (own.shape[-1], found.shape[-1]) == (5, 4)
    for row, column in product(range(4), repeat=2):
        y, left = (max((cell + 0.5) * 16 / 14 - 0.5, 0.0) for cell in (row, column))
        down, across = (torch.tensor([1 - at % 1, at % 1]) for at in (y, left))
        corners = own[..., int(y) : int(y) + 2, int(left) : int(left) + 2]
        expected = (corners * down[: corners.shape[-2], None] * across[: corners.shape[-1]]).sum((-1, -2))
        torch.testing.assert_close(found[..., row, column], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (224, 224), (1, 1)], ids=str)
def test_maps_of_patches_of_14_px_have_strides_4_to_32(size):
    with torch.no_grad():
        maps = pyramid_of(checkpoint(Variant(layer_scale=True), "p14"), 64)(images(*size))
    assert [tuple(m.shape[-2:]) for m in maps] == [tuple(-(-side // at) for side in size) for at in (4, 8, 16, 32)]


def test_what_a_record_says_of_the_encoder():
    assert facts("vit_huge_patch14", PLAIN) == facts(ARCH, PLAIN) == {}
    assert facts("p14", Variant(registers=4, positions=0, layer_scale=True)) == {
        "encoder": "4 further tokens beside the class token, layer scale",
        "maps": "patches of 14 px, each map resampled bilinearly to cells of 16 px",
    }


def test_a_pyramid_for_another_kind_of_encoder_is_refused():
    with pytest.raises(ValueError, match="another kind"):
        load_pyramid(ViTPyramid(ARCH, 48), checkpoint(VARIANTS["DINOv2"]))
