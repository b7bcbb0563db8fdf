"""Which patches stay visible: random, block-wise or grid-wise (MAE paper, Figure 6 and Table 1f).

Each gives noise [B, N] of which the model keeps the smallest: seeded, different for every sample, and the same whatever
the number of processes.
"""

import torch
from torch import Tensor

from mae_core.errors import UserError

MASKINGS = ("random", "block", "grid")
GRID_RATIO = 0.75
# BEiT's numbers (arXiv 2106.08254, Algorithm 1; microsoft/unilm, beit/masking_generator.py): blocks of at least 16 of
# 196 patches, with a ratio of height to width from 0.3 to 1 / 0.3.
SMALLEST_BLOCK = 16 / 196
NARROWEST = 0.3


def kept_patches(patches: int, mask_ratio: float) -> int:
    """How many of the patches stay visible: int(N * (1 - mask_ratio)). UserError if none or all would."""
    kept = int(patches * (1 - mask_ratio))
    if not 0 < kept < patches:
        raise UserError(f"a mask ratio of {mask_ratio} leaves {kept} of {patches} patches visible")
    return kept


def mask_noise(
    masking: str, batch: int, grid: tuple[int, int], mask_ratio: float, generator: torch.Generator
) -> Tensor:
    """Noise [batch, rows * columns]: the kept_patches() smallest of each sample are those that stay visible.

    "random": uniform. "block": large random blocks are hidden. "grid": of every 2 x 2 patches one stays, the same one
    throughout a sample. UserError for a grid that 2 x 2 patches do not fill.
    """
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator)
    if masking == "random":
        return noise
    if masking == "grid":
        hidden = grid_mask(batch, grid, generator)
    else:
        count = grid[0] * grid[1] - kept_patches(grid[0] * grid[1], mask_ratio)
        hidden = block_mask(batch, grid, count, generator)
    return noise + hidden.flatten(1)


def grid_mask(batch: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """True where hidden [batch, rows, columns]."""
    if grid[0] % 2 or grid[1] % 2:
        raise UserError(f"grid-wise masking needs even numbers of patches a side, not {grid[0]}x{grid[1]}")
    corner = torch.randint(4, (batch, 1, 1), generator=generator)
    rows, columns = torch.arange(grid[0])[:, None], torch.arange(grid[1])
    return (rows % 2 != corner // 2) | (columns % 2 != corner % 2)


def block_mask(batch: int, grid: tuple[int, int], count: int, generator: torch.Generator) -> Tensor:
    """True where hidden [batch, rows, columns], exactly `count` in each sample: blocks are laid until that many are
    covered; of the last block only the first missing patches are taken, row by row from the top."""
    rows, columns = grid
    hidden = torch.zeros(batch, rows, columns, dtype=torch.bool)
    row, column = torch.arange(rows), torch.arange(columns)
    smallest = max(1.0, SMALLEST_BLOCK * rows * columns)
    left = torch.arange(batch)  # samples that still have too few hidden patches
    while len(left):
        draw = torch.rand(4, len(left), 1, generator=generator)
        missing = count - hidden[left].sum(dim=(1, 2))[:, None]
        area = smallest + draw[0] * (missing - smallest).clamp(min=0)
        aspect = NARROWEST ** (1 - 2 * draw[1])
        height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        top, start = (draw[2] * (rows - height + 1)).floor(), (draw[3] * (columns - width + 1)).floor()
        block = ((row >= top) & (row < top + height))[:, :, None] & ((column >= start) & (column < start + width))[
            :, None
        ]
        fits = (height < rows) & (width < columns)  # BEiT draws again where it does not
        new = block & ~hidden[left] & fits[:, :, None]
        new &= new.flatten(1).cumsum(dim=1).view_as(new) <= missing[:, :, None]
        hidden[left] |= new
        left = left[hidden[left].sum(dim=(1, 2)) < count]
    return hidden
