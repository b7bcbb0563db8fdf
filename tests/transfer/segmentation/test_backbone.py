"""The pyramid with BEiT's blocks against mmsegmentation's own MAE backbone, which is that of the public config."""

import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from benchmarks.originals.upernet import renamed
from mae_core.checkpoint import read_checkpoint
from tests.fixtures.transfer import ARCH
from transfer.pyramid import ViTPyramid, load_pyramid


def moved(arch: str = ARCH):
    """A checkpoint and a pyramid with its weights, none at its initial value, in evaluation mode."""
    source = read_checkpoint(f"random:{arch}")
    noise = torch.Generator().manual_seed(1)
    encoder = {name: t + 0.1 * torch.randn(t.shape, generator=noise) for name, t in source.encoder.items()}
    pyramid = ViTPyramid(arch, 48, taps=(0, 1, 3, 5), upernet=True)
    load_pyramid(pyramid, replace(source, encoder=encoder))
    with torch.no_grad():
        for name, parameter in pyramid.named_parameters():
            if re.search(r"\.bias(_class)?$|gamma$", name):
                parameter.add_(torch.randn(parameter.shape, generator=noise))
    return pyramid.eval()


def their_weights(pyramid: ViTPyramid, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The pyramid's weights by mmsegmentation's names, positions and tables interpolated to that grid."""

    def resized(maps, size):
        return maps if maps.shape[1:] == size else F.interpolate(maps[None], size, mode="bicubic")[0]

    found = {}
    for name, tensor in pyramid.state_dict().items():
        if re.fullmatch(r"blocks\.\d+\.bias", name):
            tensor = resized(tensor, (2 * grid[0] - 1, 2 * grid[1] - 1))
        elif name == "pos_embed":
            patches = resized(tensor[0, 1:].T.unflatten(1, pyramid.grid), grid)
            tensor = torch.cat([tensor[:, :1], patches.flatten(1).T[None]], dim=1)
        found[f"backbone.{name}"] = tensor
    start = "backbone."
    return {name.removeprefix(start): t for name, t in renamed(found).items() if name.startswith(start)}


@pytest.mark.parametrize("size", [(48, 48), (64, 96)], ids=str)
def test_maps_are_those_of_mmsegmentation_s_mae(mmseg, size):
    """At the size of the tables, and at another, to which positions and tables are interpolated."""
    from mmseg.models.backbones import MAE

    pyramid = moved()
    theirs = MAE(
        img_size=size, patch_size=8, embed_dims=128, num_layers=6, num_heads=4, out_indices=[0, 1, 3, 5],
        norm_cfg={"type": "LN", "eps": 1e-6}, init_values=1.0,
    )  # fmt: skip
    theirs.eval()
    weights = their_weights(pyramid, (size[0] // 8, size[1] // 8))
    indices = {name: t for name, t in theirs.state_dict().items() if name.endswith("relative_position_index")}
    theirs.load_state_dict(weights | indices, strict=True)
    pyramid.double()  # so that rounding does not add up over the blocks
    theirs.double()
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        expected, found = theirs(images), pyramid(images)
        alike = [pyramid.upsample_4x(expected[0]), pyramid.upsample_2x(expected[1]), expected[2]]
        alike.append(F.max_pool2d(expected[3], 2))
    for ours, other in zip(found, alike):
        assert other.std() > 0.1
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
