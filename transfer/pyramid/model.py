"""The pre-trained ViT as a feature pyramid, under the heads of object detection and semantic segmentation.

Following Li et al. 2021 (arXiv 2111.11429), as the MAE paper's Table 4 does: the blocks form four equal subsets, and
the map after each is brought to stride 4, 8, 16 or 32. All blocks but the last of each subset have windowed attention;
a relative position bias starts at zero; absolute positions are kept; the class token is not. UperNet (Table 5) has
BEiT's blocks instead, as in its public configs: global attention with the class token among the patches, and in each
block a bias table of its own and layer scales.

Other encoders (`Variant`) keep what they have: layer scales, SwiGLU, registers (where the class token is kept), and
BEiT its own tables of relative positions in place of absolute ones. Those that timm builds: timm_pyramid.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mae_core.errors import UserError
from mae_core.timm_encoder import PREFIX, TimmEncoder, is_timm
from mae_core.vit import PLAIN, Variant, build_vit, get_arch, variant_in_words
from transfer.pyramid.bias import relative_position_bias, resize, resize_geometrically, with_prefix

if TYPE_CHECKING:
    from timm.models.vision_transformer import Block

group_norm = partial(nn.GroupNorm, 32)


def quarters(depth: int) -> tuple[int, int, int, int]:
    """The last block of each of four equal subsets, from 0: 2, 5, 8, 11 of 12 blocks. Six blocks: 0, 2, 3, 5."""
    return depth // 4 - 1, depth // 2 - 1, 3 * depth // 4 - 1, depth - 1


def patch_side(arch: str) -> int:
    """The side of what a cell of the third map covers (px): the patch's, but 14 px become 16, as for ViTDet. The
    strides are a quarter, a half, one and two of it."""
    patch = get_arch(arch).patch
    return patch if patch % 4 == 0 else -(-patch // 8) * 8


def token_side(arch: str, variant: Variant) -> int:
    """The side of what a token covers (px). The patch projection of MAE's own ViT-H is resampled from 14 to 16 px, as
    for ViTDet. Other encoders keep their patches, and their maps are resampled."""
    return patch_side(arch) if variant == PLAIN and not is_timm(arch) else get_arch(arch).patch


def facts(arch: str, variant: Variant) -> dict[str, str]:
    """What a record says of an encoder that is no plain ViT."""
    if variant == PLAIN and not is_timm(arch):
        return {}
    said = {"encoder": f"timm's {arch.removeprefix(PREFIX)}" if is_timm(arch) else variant_in_words(variant)}
    if (token := token_side(arch, variant)) != patch_side(arch):
        said["maps"] = f"patches of {token} px, each map resampled bilinearly to cells of {patch_side(arch)} px"
    return said


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
    upsample_2x.* and the bias tables bias_windowed and bias_global. With upernet, cls_token, reg_token and their
    positions in pos_embed [1, P + N, D] are kept, and new are blocks.i.bias, blocks.i.bias_class and, where the encoder
    has none, blocks.i.ls1.gamma and ls2.gamma (ones). BEiT has no pos_embed, and blocks.i.bias with either.

    image_size: side or (height, width) in px for which positions (`stored`) and global bias tables are stored; both are
    interpolated for other sizes. variant: what the encoder has beyond a plain ViT. taps: the blocks whose output
    becomes a map. window: side in patches of the windows in all other blocks, 0 for global attention everywhere.
    upernet: UperNet's blocks, all global. norm: makes the stride-4 branch's normalisation layer for a number of
    channels.
    """

    def __init__(
        self,
        arch: str,
        image_size: int | tuple[int, int],
        *,
        variant: Variant = PLAIN,
        taps: tuple[int, int, int, int] | None = None,
        window: int = 0,
        upernet: bool = False,
        norm: Callable[[int], nn.Module] = group_norm,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if upernet and window:
            raise ValueError("UperNet's blocks have global attention: no window")
        a, patch = get_arch(arch), patch_side(arch)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch or width % patch:
            raise UserError(f"the pyramid of {arch} has patches of {patch} px: {height}x{width} is not divisible by it")
        self.arch, self.variant, self.side = arch, variant, token_side(arch, variant)
        self.grid = (-(-height // self.side), -(-width // self.side))
        self.channels, self.strides = a.dim, (patch // 4, patch // 2, patch, 2 * patch)
        self.taps, self.window = taps or quarters(a.depth), window
        self.activation_checkpointing = activation_checkpointing

        self.upernet = upernet
        self.add_encoder(drop_path)
        self.add_tables()
        self.add_neck(norm)

    def add_encoder(self, drop_path: float) -> None:
        from timm.layers import PatchEmbed

        # timm gets its own patch size: only the projection depends on it, and that is replaced below. BEiT's blocks are
        # a plain ViT's with layer scales, once their tables are handed to them.
        a, variant, upernet = get_arch(self.arch), self.variant, self.upernet
        alike = replace(variant, beit=False, layer_scale=variant.layer_scale or variant.beit)
        size = (self.stored[0] * a.patch, self.stored[1] * a.patch)
        vit = build_vit(self.arch, size, drop_path=drop_path, variant=alike)
        assert not isinstance(vit, TimmEncoder)  # it has a pyramid of its own: `pyramid_class`
        self.patch_embed = PatchEmbed(None, self.side, 3, a.dim, flatten=False, strict_img_size=False)
        self.pos_embed: nn.Parameter | None = None
        if not variant.beit:
            assert vit.pos_embed is not None
            # Contiguous, or DistributedDataParallel would warn of gradients with other strides.
            positions = vit.pos_embed.detach()[:, 0 if upernet else variant.positions :]
            self.pos_embed = nn.Parameter(positions.clone(memory_format=torch.contiguous_format))
        self.cls_token = vit.cls_token if upernet else None
        self.reg_token = vit.reg_token if upernet else None
        self.blocks: Any = vit.blocks

    def add_tables(self) -> None:
        """Those of the relative positions."""
        a, window = get_arch(self.arch), self.window

        def table(side: tuple[int, int]) -> nn.Parameter:
            return nn.Parameter(torch.zeros(a.heads, 2 * side[0] - 1, 2 * side[1] - 1))

        for number, block in enumerate(self.blocks):
            if self.upernet or self.variant.beit:
                block.bias = table((window, window) if self.windowed(number) else self.grid)
            if self.upernet:
                if self.prefix:
                    block.bias_class = nn.Parameter(torch.zeros(a.heads, 3))
                add_layer_scales(block, a.dim)
        if not self.upernet and not self.variant.beit:
            self.bias_global = table(self.grid)
            if window:
                self.bias_windowed = table((window, window))

    def add_neck(self, norm: Callable[[int], nn.Module]) -> None:
        dim = self.channels
        self.upsample_4x = nn.Sequential(deconvolution(dim), norm(dim), nn.GELU(), deconvolution(dim))
        self.upsample_2x = deconvolution(dim)
        self.downsample = nn.MaxPool2d(2)

    @property
    def stored(self) -> tuple[int, int]:
        """The grid of the positions that are stored."""
        return self.grid

    @property
    def prefix(self) -> int:
        """How many tokens come before those of the patches."""
        return 1 + self.variant.registers if self.upernet else 0

    def windowed(self, block: int) -> bool:
        return self.window > 0 and block not in self.taps

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        # Zeros up to a multiple of the coarsest stride, so that the four maps cover the same area.
        images = F.pad(images, (0, -width % self.strides[3], 0, -height % self.strides[3]))
        maps = self.maps_of(F.pad(images, (0, -images.shape[3] % self.side, 0, -images.shape[2] % self.side)))
        if self.side != self.strides[2]:
            cells = (images.shape[2] // self.strides[2], images.shape[3] // self.strides[2])
            maps = [resample(m, self.side / self.strides[2])[..., : cells[0], : cells[1]] for m in maps]
        maps = self.at_strides(maps)
        return [m[..., : -(-height // stride), : -(-width // stride)] for m, stride in zip(maps, self.strides)]

    def maps_of(self, images: Tensor) -> list[Tensor]:
        """Images that the patches divide -> the tokens after each tapped block, [B, D, H, W]."""
        x = self.patch_embed(images)
        return self.maps_with_prefix(x) if self.prefix else self.maps_of_patches(x)

    def at_strides(self, maps: list[Tensor]) -> list[Tensor]:
        """The maps of the tapped blocks at a stride each."""
        operations = (self.upsample_4x, self.upsample_2x, nn.Identity(), self.downsample)
        return [operation(m.contiguous()) for operation, m in zip(operations, maps)]

    def maps_of_patches(self, x: Tensor) -> list[Tensor]:
        """[B, D, H, W] -> the same after each tapped block."""
        grid = (x.shape[2], x.shape[3])
        x = self.at_positions(x).permute(0, 2, 3, 1)
        sides = self.sides(grid)
        shared = {} if self.variant.beit else self.shared_biases(grid, x.device)
        maps: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            window = self.window if self.windowed(number) else 0
            bias = shared[window] if shared else self.attention_bias(block.bias, sides[window], x.device)
            x = self.through(run_block, block, x, window, bias)
            maps += [x.permute(0, 3, 1, 2)] * self.taps.count(number)
        return maps

    def sides(self, grid: tuple[int, int]) -> dict[int, tuple[int, int]]:
        """The window, 0 for none, of each kind of block -> the patches that attend to each other."""
        return {0: grid, self.window: (self.window, self.window)} if self.window else {0: grid}

    def shared_biases(self, grid: tuple[int, int], device: torch.device) -> dict[int, Tensor]:
        """The bias of each kind of block: large tensors, each made once per pass for all blocks of its kind."""
        tables = {self.window: getattr(self, "bias_windowed", None), 0: self.bias_global}
        return {window: self.attention_bias(tables[window], side, device) for window, side in self.sides(grid).items()}

    def maps_with_prefix(self, x: Tensor) -> list[Tensor]:
        """As `maps_of_patches`, with the class token and registers first of the tokens [B, P + H*W, D] that timm's
        blocks get."""
        grid = (x.shape[2], x.shape[3])
        first = torch.cat([token for token in (self.cls_token, self.reg_token) if isinstance(token, Tensor)], dim=1)
        if self.pos_embed is not None and self.variant.positions:
            first = first + self.pos_embed[:, : self.variant.positions]
        prefix = first.shape[1]
        x = torch.cat([first.expand(len(x), -1, -1), self.at_positions(x).flatten(2).transpose(1, 2)], dim=1)
        maps: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            bias = self.attention_bias(block.bias, grid, x.device, block.bias_class, prefix)
            x = self.through(block, x, bias)
            maps += [x[:, prefix:].transpose(1, 2).unflatten(2, grid)] * self.taps.count(number)
        return maps

    def through(self, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        if self.activation_checkpointing and self.training:
            return checkpoint(run, *inputs, use_reentrant=False)
        return run(*inputs)

    def at_positions(self, x: Tensor) -> Tensor:
        """The patches [B, D, H, W] with their positions added, interpolated to that grid."""
        if self.pos_embed is None:
            return x
        height, width = self.stored
        patches = self.pos_embed[:, -height * width :]
        return x + resize(patches.transpose(1, 2).unflatten(2, self.stored), (x.shape[2], x.shape[3]))

    def attention_bias(
        self,
        table: Any,
        side: tuple[int, int],
        device: torch.device,
        of_class: Any = None,
        prefix: int = 1,
    ) -> Tensor:
        """[heads, N, N] for the N patches of a window or of the grid, in the precision of the attention; with of_class
        [heads, P + N, P + N] with the P prefix tokens."""
        resized = resize_geometrically if self.variant.beit else resize
        bias = relative_position_bias(resized(table[None], (2 * side[0] - 1, 2 * side[1] - 1))[0], side)
        bias = bias if of_class is None else with_prefix(bias, of_class, prefix)
        if device.type == "meta" or not torch.is_autocast_enabled(device.type):  # meta: only FLOPs are counted
            return bias
        return bias.to(torch.get_autocast_dtype(device.type))


def resample(maps: Tensor, scale: float) -> Tensor:
    """[B, C, H, W] -> [B, C, floor(H * scale), floor(W * scale)], bilinear, the upper left corners in one place."""
    return F.interpolate(maps.float(), scale_factor=scale, mode="bilinear", recompute_scale_factor=False)


def add_layer_scales(block: Any, dim: int) -> None:
    """Ones, where a block of timm's has a place for layer scales and none."""
    from timm.layers import LayerScale

    for number in (1, 2):
        if isinstance(getattr(block, f"ls{number}", None), nn.Identity):
            setattr(block, f"ls{number}", LayerScale(dim, 1.0))
        elif getattr(block, f"gamma_{number}", 0) is None:  # EVA's
            setattr(block, f"gamma_{number}", nn.Parameter(torch.ones(dim)))


def deconvolution(dim: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)


def run_block(block: "Block", x: Tensor, window: int, bias: Tensor) -> Tensor:
    """One of timm's blocks on a map [B, H, W, D], with attention within windows of that side (0: over the whole map)
    and what is added to its logits."""
    return in_windows(block, x, window, lambda y, side: block.attn(y, attn_mask=bias))


def in_windows(block: "Block", x: Tensor, window: int, attend: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
    """The block with `attend` in place of its attention (`attended`)."""
    x = x + block.drop_path1(block.ls1(attended(block.norm1(x), window, attend)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def attended(y: Tensor, window: int, attend: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
    """`attend` on the tokens [B, N, D] of each window of a map [B, H, W, D], or of the map, and the sides of those.

    Windows are padded with zeros, after the norm, and attend to the padding, as in ViTDet.
    """
    batch, height, width, dim = y.shape
    if not window:
        return attend(y.reshape(batch, height * width, dim), (height, width)).view(batch, height, width, dim)
    y = F.pad(y, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = y.shape[1] // window, y.shape[2] // window
    y = y.view(batch, rows, window, columns, window, dim).transpose(2, 3).reshape(-1, window * window, dim)
    y = attend(y, (window, window))
    y = y.view(batch, rows, columns, window, window, dim).transpose(2, 3)
    return y.reshape(batch, rows * window, columns * window, dim)[:, :height, :width]
