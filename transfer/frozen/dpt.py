"""DPT (Ranftl et al. 2021, arXiv 2103.13413) on the tokens of a frozen encoder: depth by a head of convolutions that
sees four blocks, in the form of DINOv2's depthers (facebookresearch/dinov2, dinov2/hub/depthers.py)."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.settings import bounded
from mae_core.space import Space
from mae_core.vit import ViT, get_arch
from transfer.frozen import depth
from transfer.frozen.depth import MIN_DEPTH, DepthRecipe
from transfer.frozen.encoder import Tokens, in_float32
from transfer.pyramid import quarters
from transfer.task import Job, Part, Result

HUB = "facebookresearch/dinov2 dinov2/hub/depthers.py"
TOOLBOX = "zhyever/Monocular-Depth-Estimation-Toolbox configs/dpt/dpt_vit-b16_nyu.py"
START = 2.0  # metres that the untrained head says


@dataclass(frozen=True, kw_only=True)
class DPTRecipe(DepthRecipe):
    """channels: of the maps that are joined."""

    channels: int = bounded(2, default=256)


def recipe(arch: str, name: str) -> DPTRecipe:
    """The linear head's, at another rate."""
    linear = depth.recipe(arch, name)
    shared = {field.name: getattr(linear, field.name) for field in fields(DepthRecipe)}
    own: dict[str, Any] = {"lr": 5e-4, "channels": 64} if name == "mini" else {"lr": 1e-4}
    return DPTRecipe(**shared | own)


def sources(arch: str, name: str = "paper") -> dict[str, str]:
    linear = "stand-in, DINOv2's configuration of DPT could not be read: that of its linear head"
    found = {key: f"{linear}; {source}" for key, source in depth.sources(arch, name).items() if key != "bins"}
    toolbox = dict.fromkeys(("lr", "weight_decay", "betas", "lowest_beta1", "max_norm"), TOOLBOX)
    return found | toolbox | {"channels": f"{HUB}; {TOOLBOX}"}


class DPT(nn.Module):
    """`Tokens` [B, 4, 1 + N, D] of four blocks, N = h * w patches -> metres [B, 1, H, W]; H and W are 16 times h and w
    where these are even, else 16 more.

    Each block's patches are joined with its first token, become a map of 4, 2, 1 or 1/2 times their number along each
    side, and the maps are added from the coarsest to the finest.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        widths = [dim // 8, dim // 4, dim // 2, dim]
        self.readouts = nn.ModuleList(nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU()) for _ in widths)
        self.projections = nn.ModuleList(convolution(dim, width, 1) for width in widths)
        self.scalings = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], kernel_size=4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], kernel_size=2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], kernel_size=3, stride=2, padding=1),
            ]
        )
        self.entries = nn.ModuleList(convolution(width, channels, 3, bias=False) for width in widths)
        self.fusions = nn.ModuleList(Fusion(channels, joins=number < 3) for number in range(4))
        self.joined = nn.Sequential(convolution(channels, channels, 3), nn.ReLU())
        self.narrow = nn.Conv2d(channels, channels // 2, kernel_size=3, padding=1)
        last = nn.Conv2d(32, 1, kernel_size=1)
        # DINOv2's starts anywhere, also where the last ReLU gives 0 for all, from where nothing is learnt.
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.get_parameter("bias"), START)
        self.metres = nn.Sequential(nn.Conv2d(channels // 2, 32, kernel_size=3, padding=1), nn.ReLU(), last)

    def maps(self, tokens: Tensor) -> Tensor:
        """The joined map [B, channels, H / 2, W / 2]."""
        side = math.isqrt(tokens.shape[2] - 1)
        maps: list[Tensor] = []
        for number, layers in enumerate(zip(self.readouts, self.projections, self.scalings, self.entries)):
            readout, projection, scaling, entry = layers
            patches, first = tokens[:, number, 1:], tokens[:, number, :1]
            read = readout(torch.cat([patches, first.expand_as(patches)], dim=2))
            maps.append(entry(scaling(projection(read.mT.unflatten(2, (side, side))))))
        found = self.fusions[3](maps[3])
        for number in (2, 1, 0):
            found = self.fusions[number](found, maps[number])
        return self.joined(found)

    @in_float32
    def forward(self, tokens: Tensor) -> Tensor:
        return self.metres(doubled(self.narrow(self.maps(tokens)))).relu() + MIN_DEPTH


class Fusion(nn.Module):
    """A map, and the next finer one added to it -> a map of twice the size. joins: whether there is one to add."""

    def __init__(self, channels: int, joins: bool) -> None:
        super().__init__()
        self.before = residual(channels) if joins else None
        self.after, self.project = residual(channels), convolution(channels, channels, 1)

    def forward(self, coarse: Tensor, finer: Tensor | None = None) -> Tensor:
        if self.before is not None and finer is not None:
            # An odd number of patches makes the coarse one larger by a cell.
            fitted = F.interpolate(finer, coarse.shape[2:], mode="bilinear") if finer.shape != coarse.shape else finer
            coarse = coarse + fitted + self.before(fitted)
        return self.project(doubled(coarse + self.after(coarse)))


def residual(channels: int) -> nn.Sequential:
    """What is added to a map."""
    first, second = (convolution(channels, channels, 3, bias=False) for _ in range(2))
    return nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)


def convolution(width: int, channels: int, kernel: int, bias: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(width, channels, kernel, padding=kernel // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def doubled(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="bilinear", align_corners=True)


def tokens_of(encoder: ViT) -> Tokens:
    """Of the blocks that end each quarter, as in DINOv2 (whose ViT-L has block 4, counted from 0, for 5), through the
    final norm, which DINOv2 leaves out here: the tokens of other encoders have scales at which the head does not
    learn."""
    blocks: Any = encoder.blocks
    return Tokens(encoder, list(quarters(len(blocks))), norm=True)


def head_of(job: Job) -> DPT:
    return DPT(get_arch(job.checkpoint.arch).dim, job.recipe.channels)


def dpt(job: Job) -> Result:
    numbers = ", ".join(str(block + 1) for block in quarters(get_arch(job.checkpoint.arch).depth))
    return depth.depth(job, tokens_of, head_of, f"tokens after blocks {numbers}, each through the final norm")


def space(job: Job) -> Space:
    return depth.space(job, head_of)


def parts(job: Job) -> tuple[Part, ...]:
    return depth.parts(job, head_of, 4, f"DPT of {job.recipe.channels} channels")
