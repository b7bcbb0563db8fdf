"""The pre-trained ViT as a feature pyramid, under the heads of object detection and semantic segmentation.

Following Li et al. 2021 (arXiv 2111.11429), as the MAE paper's Table 4 does: the blocks form four equal subsets, and
the map after each is brought to stride 4, 8, 16 or 32. All blocks but the last of each subset have windowed attention;
a relative position bias starts at zero; absolute positions are kept. UperNet (Table 5) has global attention everywhere
and one bias table per block instead.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from timm.layers import PatchEmbed, resample_patch_embed
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

    Parameters keep timm's names (patch_embed.proj.*, pos_embed [1, N, D] without a class token, blocks.i.*); new are
    upsample_4x.*, upsample_2x.* and the bias tables: bias_windowed and bias_global, or blocks.i.bias.

    image_size: side or (height, width) in px for which positions and global bias tables are stored; both are
    interpolated for other sizes. taps: the blocks whose output becomes a map. window: side in patches of the windows in
    all other blocks, 0 for global attention everywhere. bias: "shared", one table for the windowed blocks and one for
    the global ones, or "per_block". norm: makes the stride-4 branch's normalisation layer for a number of channels.
    """

    def __init__(
        self,
        arch: str,
        image_size: int | tuple[int, int],
        *,
        taps: tuple[int, int, int, int] | None = None,
        window: int = 0,
        bias: str = "shared",
        norm: Callable[[int], nn.Module] = group_norm,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if bias not in ("shared", "per_block"):
            raise ValueError(f"bias '{bias}' is neither 'shared' nor 'per_block'")
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
        positions = vit.pos_embed.detach()[:, 1:].clone(memory_format=torch.contiguous_format)
        self.pos_embed = nn.Parameter(positions)
        self.blocks = vit.blocks

        def table(side: tuple[int, int]) -> nn.Parameter:
            return nn.Parameter(torch.zeros(a.heads, 2 * side[0] - 1, 2 * side[1] - 1))

        if bias == "per_block":
            for number, block in enumerate(self.blocks):
                block.bias = table((window, window) if self.windowed(number) else self.grid)
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
        x = self.patch_embed(images).permute(0, 2, 3, 1)  # [B, H, W, D]
        grid = (x.shape[1], x.shape[2])
        positions = self.pos_embed.reshape(1, *self.grid, -1)
        x = x + resize(positions.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
        maps: list[Tensor] = []
        shared: dict[int, Tensor] = {}
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            window = self.window if self.windowed(number) else 0
            if (own := getattr(block, "bias", None)) is not None:
                bias = self.attention_bias(own, window, grid, x.device)
            else:
                if window not in shared:  # a large tensor, made once per pass for all blocks of its kind
                    table = self.bias_windowed if window else self.bias_global
                    shared[window] = self.attention_bias(table, window, grid, x.device)
                bias = shared[window]
            if self.activation_checkpointing and self.training:
                x = checkpoint(run_block, block, x, window, bias, use_reentrant=False)
            else:
                x = run_block(block, x, window, bias)
            maps += [x.permute(0, 3, 1, 2)] * self.taps.count(number)
        operations = (self.upsample_4x, self.upsample_2x, nn.Identity(), self.downsample)
        maps = [operation(m.contiguous()) for operation, m in zip(operations, maps)]
        return [m[..., : -(-height // stride), : -(-width // stride)] for m, stride in zip(maps, self.strides)]

    def attention_bias(self, table: Tensor, window: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """[heads, N, N] for the N patches of a window or of the grid, in the precision of the attention."""
        side = (window, window) if window else grid
        bias = relative_position_bias(resize(table[None], (2 * side[0] - 1, 2 * side[1] - 1))[0], side)
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


NEW = re.compile(r"upsample_|bias_(windowed|global)$|blocks\.\d+\.bias$")


def load_pyramid(pyramid: ViTPyramid, source: Checkpoint) -> LoadReport:
    """Load a checkpoint's encoder: all its tensors but the class token and the last norm, which no map passes through.
    Positions are resized to the pyramid's grid, ViT-H's patch projection to 16 px (by pseudo-inverse, as in FlexiViT).
    The LayerNorms get the checkpoint's eps. CheckpointError if a tensor is missing or has another shape."""
    patch = get_arch(pyramid.arch).patch
    vit = build_vit(pyramid.arch, (pyramid.grid[0] * patch, pyramid.grid[1] * patch))
    report = load_encoder(vit, source)
    state = vit.state_dict()
    state["pos_embed"] = state["pos_embed"][:, 1:]
    side, resized = pyramid.patch_embed.proj.weight.shape[-2:], list(report.resized)
    if state["patch_embed.proj.weight"].shape[-2:] != side:
        state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], list(side))
        resized.append("patch_embed.proj.weight")
    unused = tuple(name for name in report.loaded if name == "cls_token" or name.startswith("norm."))
    own = pyramid.state_dict()
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
    block i and its bias table, depth + 1 for new parameters."""
    if name.startswith(("patch_embed.", "pos_embed")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter: not to vectors, positions and bias tables (MIMDet, BEiT)."""
    return parameter.ndim > 1 and not re.search(r"pos_embed$|bias_(windowed|global)$|blocks\.\d+\.bias$", name)
