"""Relative position biases of the attention, from tables of one entry for each distance, and how tables are resized."""

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


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


def with_prefix(bias: Tensor, of_class: Tensor, prefix: int = 1) -> Tensor:
    """[heads, N, N] -> [heads, P + N, P + N], with P tokens before the patches. of_class [heads, 3]: what is added to
    the logits that they have of patches, that patches have of them, and that they have of each other, as in BEiT's code
    for its class token."""
    heads, patches, _ = bias.shape
    asks, is_asked, itself = of_class[:, :, None, None].unbind(1)
    row = torch.cat([itself.expand(heads, prefix, prefix), asks.expand(heads, prefix, patches)], dim=2)
    return torch.cat([row, torch.cat([is_asked.expand(heads, patches, prefix), bias], dim=2)], dim=1)


def resize_geometrically(tables: Tensor, size: tuple[int, int]) -> Tensor:
    """[1, heads, 2H-1, 2W-1] resized as BEiT's own code resizes its tables (microsoft/unilm,
    beit/semantic_segmentation/mmcv_custom/checkpoint.py): the entries are taken to lie at distances that grow
    geometrically, so that near ones stay where they are, and a cubic spline goes through them. Returned as it is at its
    own size."""
    if tuple(tables.shape[-2:]) == tuple(size):
        return tables
    rows, columns = (
        torch.from_numpy(geometric_weights(have, want)).to(tables) for have, want in zip(tables.shape[-2:], size)
    )
    return rows @ tables.float() @ columns.T


@cache
def geometric_weights(have: int, want: int) -> np.ndarray:
    """[want, have]: the weight of each of `have` entries in each of `want` (both odd) along one axis: a spline is
    linear in what it goes through."""
    from scipy.interpolate import make_interp_spline  # late: the import takes half a second, and only BEiT needs it

    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (have // 2)) / (1 - ratio) > want // 2:
            high = ratio
        else:
            low = ratio
    far = np.cumsum(ratio ** np.arange(have // 2))
    places = np.concatenate([-far[::-1], [0.0], far])
    wanted = np.clip(np.arange(-(want // 2), want // 2 + 1.0), places[0], places[-1])
    return make_interp_spline(places, np.eye(have), k=min(3, have - 1))(wanted).astype(np.float32)
