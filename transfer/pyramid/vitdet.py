"""ViTDet's pyramid (Li et al. 2022, arXiv 2203.16527): all four maps from the last block's, and relative positions that
depend on the query."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core.vit import PLAIN, Variant, get_arch
from transfer.pyramid.model import ViTPyramid, in_windows, pretraining_grid

if TYPE_CHECKING:
    from timm.models.vision_transformer import Block


class ViTDetPyramid(ViTPyramid):
    """Images -> four maps [B, dim, H / stride, W / stride], to which no FPN is added.

    New parameters are blocks.i.rel_pos_h and rel_pos_w [2 * side - 1, channels of a head], zeros at first, and
    stages.{0,1,2,3}, of strides 4 to 32. The blocks that end each quarter attend globally, the others in windows.
    Positions are stored, and trained, for the grid of pre-training and interpolated in each forward pass, as in
    ViTDet's code. That keeps them few and smooth: stored for the image, every patch would learn its own.

    pretraining_size: side in px of the images of pre-training; 0: the architecture's.
    """

    def __init__(
        self,
        arch: str,
        image_size: int | tuple[int, int],
        *,
        variant: Variant = PLAIN,
        window: int = 14,
        dim: int = 256,
        drop_path: float = 0.0,
        activation_checkpointing: bool = False,
        pretraining_size: int = 0,
    ) -> None:
        if variant.beit:
            raise ValueError("BEiT has relative positions of its own")
        self.pretraining_size = pretraining_size
        super().__init__(
            arch,
            image_size,
            variant=variant,
            window=window,
            drop_path=drop_path,
            activation_checkpointing=activation_checkpointing,
        )
        widths = (self.channels // 4, self.channels // 2, self.channels, self.channels)
        self.stages = nn.ModuleList(
            nn.Sequential(*scaling, *outputs(width, dim)) for scaling, width in zip(scalings(self.channels), widths)
        )
        self.channels = dim

    @property
    def stored(self) -> tuple[int, int]:
        return (self.pretraining_size // get_arch(self.arch).patch or pretraining_grid(self.arch),) * 2

    def add_tables(self) -> None:
        a = get_arch(self.arch)
        for number, block in enumerate(self.blocks):
            side = (self.window, self.window) if self.windowed(number) else self.grid
            for name, length in zip(("rel_pos_h", "rel_pos_w"), side):
                setattr(block, name, nn.Parameter(torch.zeros(2 * length - 1, a.dim // a.heads)))

    def add_neck(self, norm: Any) -> None:
        """Made in __init__, which knows the maps' channels."""

    def maps_of_patches(self, x: Tensor) -> list[Tensor]:
        """[B, D, H, W] -> the map after the last block."""
        x = self.at_positions(x).permute(0, 2, 3, 1)
        for number, block in enumerate(self.blocks):
            x = self.through(run_vitdet_block, block, x, self.window if self.windowed(number) else 0)
        return [x.permute(0, 3, 1, 2)]

    def at_strides(self, maps: list[Tensor]) -> list[Tensor]:
        (last,) = maps
        return [stage(last.contiguous()) for stage in self.stages]


def scalings(dim: int) -> tuple[list[nn.Module], ...]:
    """From the map of the patches, [B, dim, H, W], to four, two, one and half times its sides."""

    def doubled(width: int) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)

    four = [doubled(dim), map_norm(dim // 2), nn.GELU(), doubled(dim // 2)]
    return four, [doubled(dim)], [], [nn.MaxPool2d(2)]


def outputs(width: int, dim: int) -> list[nn.Module]:
    return [
        nn.Conv2d(width, dim, 1, bias=False),
        map_norm(dim),
        nn.Conv2d(dim, dim, 3, padding=1, bias=False),
        map_norm(dim),
    ]


def map_norm(dim: int) -> nn.Module:
    """A layer norm over the channels of [B, dim, H, W]."""
    from timm.layers import LayerNorm2d

    norm = LayerNorm2d(dim)
    norm.register_forward_hook(channels_first)
    return norm


def channels_first(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """The same numbers, on a CPU in the usual layout. timm's norm leaves the channels last in memory, where the
    gradients of the convolutions on large maps, here and in the RPN, take longer (docs/speed.md)."""
    return output if output.is_cuda else output.contiguous()


def run_vitdet_block(block: "Block", x: Tensor, window: int) -> Tensor:
    """One of timm's blocks on a map [B, H, W, D], with attention within windows of that side (0: over the whole map)
    by its own decomposed relative positions."""
    return in_windows(block, x, window, lambda y, side: attend(block, y, side))


def attend(block: Any, y: Tensor, side: tuple[int, int]) -> Tensor:
    """Attention over the tokens [B, H * W, D] of a map or window of that side."""
    attention = block.attn
    batch, tokens, dim = y.shape
    q, k, v = attention.qkv(y).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    bias = decomposed(q, block.rel_pos_h, block.rel_pos_w, side)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
    return attention.proj(y.transpose(1, 2).reshape(batch, tokens, dim))


def decomposed(q: Tensor, table_h: Tensor, table_w: Tensor, side: tuple[int, int]) -> Tensor:
    """What is added to the logits [B, heads, N, N]: of query (y, x) and key (y', x') the products of the query
    [B, heads, N, C], unscaled, with the rows y - y' + H - 1 of one table and x - x' + W - 1 of the other (MViTv2, arXiv
    2112.01526). Tables of another length are interpolated linearly."""
    q = q.unflatten(2, side)
    rows, columns = (distances(table, length) for table, length in zip((table_h, table_w), side))
    of_rows = torch.einsum("bnhwc,hkc->bnhwk", q, rows.to(q.dtype))
    of_columns = torch.einsum("bnhwc,wkc->bnhwk", q, columns.to(q.dtype))
    return (of_rows[..., :, None] + of_columns[..., None, :]).flatten(4, 5).flatten(2, 3)


def distances(table: Tensor, length: int) -> Tensor:
    """[2L - 1, C] -> [length, length, C]: entry [i, j] is the table's for the distance i - j."""
    if len(table) != 2 * length - 1:
        table = F.interpolate(table.T[None].float(), size=2 * length - 1, mode="linear")[0].T
    places = torch.arange(length, device=table.device)
    return table[places[:, None] - places + length - 1]
