"""Images as sequences of patches, and back."""

from torch import Tensor


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images [B, 3, H, W] -> patches [B, N, patch*patch*3], row by row, each as (row, column, channel)."""
    b, c, h, w = images.shape
    grid = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of patchify: [B, N, patch*patch*3] -> [B, 3, H, W] for a grid of (rows, columns)."""
    b, (rows, columns) = patches.shape[0], grid
    pixels = patches.reshape(b, rows, columns, patch, patch, 3)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, rows * patch, columns * patch)


def normalise_patches(patches: Tensor) -> Tensor:
    """Each patch minus its mean, divided by its standard deviation (unbiased variance, eps 1e-6)."""
    mean = patches.mean(dim=-1, keepdim=True)
    return (patches - mean) / (patches.var(dim=-1, keepdim=True) + 1e-6).sqrt()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens [B, N, D] at the positions index [B, M] -> [B, M, D]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[-1]))
