"""The pre-trained ViT as a feature pyramid, under the heads of object detection and semantic segmentation.

Following Li et al. 2021 (arXiv 2111.11429), as the MAE paper's Table 4 does: the blocks form four equal subsets, and
the map after each is brought to stride 4, 8, 16 or 32. All blocks but the last of each subset have windowed attention;
a relative position bias starts at zero; absolute positions are kept; the class token is not. UperNet (Table 5) has
BEiT's blocks instead, as in its public configs: global attention with the class token among the patches, and in each
block a bias table of its own and layer scales.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timm.layers import LayerScale, PatchEmbed, resample_patch_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mae_core.checkpoint import Checkpoint, LoadReport, load_encoder
from mae_core.errors import UserError
from mae_core.vit import build_vit, get_arch

group_norm = partial(nn.GroupNorm, 32)


def quarters(depth: int) -> tuple[int, int, int, int]:
    """The last block of each of four equal subsets, from 0: 2, 5, 8, 11 of 12 blocks. Six blocks: 0, 2, 3, 5."""
    return depth // 4 - 1, depth // 2 - 1, 3 * depth // 4 - 1, depth - 1


def patch_side(arch: str) -> int:
    """The side of the pyramid's patches (px). The strides are a quarter, a half, one and two of it, so the 14 px of
    ViT-H become 16, as in ViTDet."""
    patch = get_arch(arch).patch
    return patch if patch % 4 == 0 else -(-patch // 8) * 8


def size_objections(arch: str, image_size: int, task: str) -> Iterator[tuple[str, str]]:
    """(knob, why) where the pyramid's patches do not divide the input."""
    if image_size % (patch := patch_side(arch)):
        why = f"image_size={image_size}: {arch} has patches of {patch} px in {task}: set a multiple of {patch}"
        yield "image_size", why


def pretraining_grid(arch: str) -> int:
    """Patches along one side in pre-training: Li et al.'s window."""
    return get_arch(arch).image_size // get_arch(arch).patch


class ViTPyramid(nn.Module):
    """Images [B, 3, H, W], normalised, of any size -> four maps [B, channels, ceil(H / stride), ceil(W / stride)].

    Parameters keep timm's names (patch_embed.proj.*, pos_embed [1, N, D], blocks.i.*); new are upsample_4x.*,
    upsample_2x.* and the bias tables bias_windowed and bias_global. With beit, cls_token and its position in pos_embed
    [1, 1 + N, D] are kept, and new are blocks.i.bias, blocks.i.bias_class and blocks.i.ls1.gamma and ls2.gamma (ones).

    image_size: side or (height, width) in px for which positions and global bias tables are stored; both are
    interpolated for other sizes. taps: the blocks whose output becomes a map. window: side in patches of the windows in
    all other blocks, 0 for global attention everywhere. beit: UperNet's blocks, all global. norm: makes the stride-4
    branch's normalisation layer for a number of channels.
    """

    def __init__(
        self,
        arch: str,
        image_size: int | tuple[int, int],
        *,
        taps: tuple[int, int, int, int] | None = None,
        window: int = 0,
        beit: bool = False,
        norm: Callable[[int], nn.Module] = group_norm,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if beit and window:
            raise ValueError("BEiT's blocks have global attention: no window")
        a, patch = get_arch(arch), patch_side(arch)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch or width % patch:
            raise UserError(f"the pyramid of {arch} has patches of {patch} px: {height}x{width} is not divisible by it")
        self.arch, self.grid = arch, (height // patch, width // patch)
        self.channels, self.strides = a.dim, (patch // 4, patch // 2, patch, 2 * patch)
        self.taps, self.window = taps or quarters(a.depth), window
        self.activation_checkpointing = activation_checkpointing

        # timm gets its own patch size: only the projection depends on it, and that is replaced below.
        vit = build_vit(arch, (self.grid[0] * a.patch, self.grid[1] * a.patch), drop_path=drop_path)
        assert vit.pos_embed is not None  # only BEiT has none
        self.patch_embed = PatchEmbed(None, patch, 3, a.dim, flatten=False, strict_img_size=False)
        # Contiguous, or DistributedDataParallel would warn of gradients with other strides.
        positions = vit.pos_embed.detach()[:, 0 if beit else 1 :].clone(memory_format=torch.contiguous_format)
        self.pos_embed = nn.Parameter(positions)
        self.cls_token = vit.cls_token if beit else None
        self.blocks = vit.blocks

        def table(side: tuple[int, int]) -> nn.Parameter:
            return nn.Parameter(torch.zeros(a.heads, 2 * side[0] - 1, 2 * side[1] - 1))

        if beit:
            for block in self.blocks:
                block.bias, block.bias_class = table(self.grid), nn.Parameter(torch.zeros(a.heads, 3))
                block.ls1, block.ls2 = LayerScale(a.dim, 1.0), LayerScale(a.dim, 1.0)
        else:
            self.bias_global = table(self.grid)
            if window:
                self.bias_windowed = table((window, window))
        self.upsample_4x = nn.Sequential(deconvolution(a.dim), norm(a.dim), nn.GELU(), deconvolution(a.dim))
        self.upsample_2x = deconvolution(a.dim)
        self.downsample = nn.MaxPool2d(2)

    def windowed(self, block: int) -> bool:
        return self.window > 0 and block not in self.taps

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        # Zeros up to a multiple of the coarsest stride, so that the four maps cover the same area.
        images = F.pad(images, (0, -width % self.strides[3], 0, -height % self.strides[3]))
        x = self.patch_embed(images)  # [B, D, H, W]
        maps = self.maps_with_class(x) if self.cls_token is not None else self.maps_of_patches(x)
        operations = (self.upsample_4x, self.upsample_2x, nn.Identity(), self.downsample)
        maps = [operation(m.contiguous()) for operation, m in zip(operations, maps)]
        return [m[..., : -(-height // stride), : -(-width // stride)] for m, stride in zip(maps, self.strides)]

    def maps_of_patches(self, x: Tensor) -> list[Tensor]:
        """[B, D, H, W] -> the same after each tapped block."""
        grid = (x.shape[2], x.shape[3])
        x = (x + self.positions(grid)).permute(0, 2, 3, 1)
        # Large tensors, each made once per pass for all blocks of its kind.
        biases = {0: self.attention_bias(self.bias_global, grid, x.device)}
        if self.window:
            biases[self.window] = self.attention_bias(self.bias_windowed, (self.window, self.window), x.device)
        maps: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            window = self.window if self.windowed(number) else 0
            x = self.through(run_block, block, x, window, biases[window])
            maps += [x.permute(0, 3, 1, 2)] * self.taps.count(number)
        return maps

    def maps_with_class(self, x: Tensor) -> list[Tensor]:
        """As `maps_of_patches`, with the class token as first of the tokens [B, 1 + H*W, D] that timm's blocks get."""
        assert self.cls_token is not None
        grid = (x.shape[2], x.shape[3])
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, (x + self.positions(grid)).flatten(2).transpose(1, 2)], dim=1)
        maps: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            table, of_class = block.bias, block.bias_class
            assert isinstance(table, Tensor)
            assert isinstance(of_class, Tensor)
            x = self.through(block, x, self.attention_bias(table, grid, x.device, of_class))
            maps += [x[:, 1:].transpose(1, 2).unflatten(2, grid)] * self.taps.count(number)
        return maps

    def through(self, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(run, *inputs, use_reentrant=False)
        return run(*inputs)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """[1, D, H, W]: the patches' positions on a grid."""
        patches = self.pos_embed[:, -self.grid[0] * self.grid[1] :]
        return resize(patches.transpose(1, 2).unflatten(2, self.grid), grid)

    def attention_bias(
        self, table: Tensor, side: tuple[int, int], device: torch.device, of_class: Tensor | None = None
    ) -> Tensor:
        """[heads, N, N] for the N patches of a window or of the grid, in the precision of the attention; [heads, 1 + N,
        1 + N] with the class token."""
        bias = relative_position_bias(resize(table[None], (2 * side[0] - 1, 2 * side[1] - 1))[0], side)
        bias = bias if of_class is None else with_class(bias, of_class)
        return bias.to(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else bias


def deconvolution(dim: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, C, H, W] resized, bicubic without antialiasing as in the official code; returned as it is at its own size."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps.float(), size=tuple(size), mode="bicubic", align_corners=False)


def relative_position_bias(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """[heads, 2H-1, 2W-1] -> [heads, H*W, H*W]: what query (y, x) adds to its logit of key (y', x') is the entry
    [y - y' + H - 1, x - x' + W - 1]. Built from views of the table, which need no index of N*N entries."""
    height, width = grid
    views = table.unfold(1, height, 1).unfold(2, width, 1)  # [heads, H, W, H, W]: entry [a, b, c, d] is [a + c, b + d]
    return views.flip(3, 4).reshape(len(table), height * width, height * width)


def with_class(bias: Tensor, of_class: Tensor) -> Tensor:
    """[heads, N, N] -> [heads, 1 + N, 1 + N], with the class token before the patches. of_class [heads, 3]: what is
    added to its logits of all patches, to their logits of it, and to its logit of itself, as in BEiT's code."""
    heads, patches, _ = bias.shape
    asks, is_asked, itself = of_class[:, :, None, None].unbind(1)
    row = torch.cat([itself, asks.expand(heads, 1, patches)], dim=2)
    return torch.cat([row, torch.cat([is_asked.expand(heads, patches, 1), bias], dim=2)], dim=1)


def run_block(block: Block, x: Tensor, window: int, bias: Tensor) -> Tensor:
    """One of timm's blocks on a map [B, H, W, D], with attention within windows of that side (0: over the whole map).

    Windows are padded with zeros after the norm and attend to the padding, as in ViTDet.
    """
    batch, height, width, dim = x.shape
    y = block.norm1(x)
    if window:
        y = F.pad(y, (0, 0, 0, -width % window, 0, -height % window))
        rows, columns = y.shape[1] // window, y.shape[2] // window
        y = y.view(batch, rows, window, columns, window, dim).transpose(2, 3).reshape(-1, window * window, dim)
        y = block.attn(y, attn_mask=bias)
        y = y.view(batch, rows, columns, window, window, dim).transpose(2, 3)
        y = y.reshape(batch, rows * window, columns * window, dim)[:, :height, :width]
    else:
        y = block.attn(y.reshape(batch, height * width, dim), attn_mask=bias).view(batch, height, width, dim)
    x = x + block.drop_path1(block.ls1(y))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


NEW = re.compile(r"upsample_|bias_(windowed|global)$|blocks\.\d+\.(bias|bias_class|ls[12]\.gamma)$")


def load_pyramid(pyramid: ViTPyramid, source: Checkpoint) -> LoadReport:
    """Load a checkpoint's encoder: all its tensors but the last norm, which no map passes through, and, where the
    pyramid has none, the class token. Positions are resized to the pyramid's grid, ViT-H's patch projection to 16 px
    (by pseudo-inverse, as in FlexiViT). The LayerNorms get the checkpoint's eps. CheckpointError if a tensor is missing
    or has another shape."""
    patch = get_arch(pyramid.arch).patch
    vit = build_vit(pyramid.arch, (pyramid.grid[0] * patch, pyramid.grid[1] * patch))
    report = load_encoder(vit, source)
    state = vit.state_dict()
    if pyramid.cls_token is None:
        state["pos_embed"] = state["pos_embed"][:, 1:]
    side, resized = pyramid.patch_embed.proj.weight.shape[-2:], list(report.resized)
    if state["patch_embed.proj.weight"].shape[-2:] != side:
        state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], list(side))
        resized.append("patch_embed.proj.weight")
    own = pyramid.state_dict()
    unused = tuple(name for name in report.loaded if name not in own)
    new = tuple(name for name in own if NEW.match(name))
    encoder = {name: state[name] for name in own if name not in new}
    pyramid.load_state_dict(own | encoder, strict=True)
    for module in pyramid.blocks.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = source.eps
    converted = tuple(name for name in report.converted if name in encoder)
    return LoadReport(tuple(encoder), tuple(resized), report.dropped + unused, new, converted)


def layer_of(name: str, depth: int) -> int:
    """The layer that sets a pyramid parameter's learning rate under layer-wise decay: 0 for the embeddings, i + 1 for
    block i and what is new in it, depth + 1 for other new parameters."""
    if name.startswith(("patch_embed.", "pos_embed", "cls_token")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1
