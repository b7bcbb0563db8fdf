import math

import numpy as np
import pytest
import torch

from mae_core.errors import UserError
from mae_core.masking import block_mask, grid_mask, kept_patches, mask_noise


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def hidden_of(masking, samples, grid, ratio, seed=0):
    """True where hidden [samples, rows, columns], as the model reads the noise."""
    noise = mask_noise(masking, samples, grid, ratio, generator(seed))
    kept = kept_patches(grid[0] * grid[1], ratio)
    visible = noise.argsort(dim=1)[:, :kept]
    return torch.ones(noise.shape, dtype=torch.bool).scatter_(1, visible, False).view(samples, *grid)


def test_random_masking_is_plain_uniform_noise():
    assert torch.equal(mask_noise("random", 5, (6, 6), 0.75, generator(3)), torch.rand(5, 36, generator=generator(3)))


@pytest.mark.parametrize("masking", ["random", "block", "grid"])
def test_masks_are_seeded_and_differ_between_samples(masking):
    masks = hidden_of(masking, 64, (14, 14), 0.75)
    assert masks.sum(dim=(1, 2)).tolist() == [147] * 64
    assert torch.equal(masks, hidden_of(masking, 64, (14, 14), 0.75))
    assert not torch.equal(masks, hidden_of(masking, 64, (14, 14), 0.75, seed=1))
    assert len(masks.flatten(1).unique(dim=0)) == (4 if masking == "grid" else 64)


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("grid", [(6, 6), (14, 14), (16, 16), (4, 8)])
def test_block_masks_hide_the_exact_number(grid, ratio):
    n = grid[0] * grid[1]
    hidden = n - int(n * (1 - ratio))
    assert hidden_of("block", 40, grid, ratio).sum(dim=(1, 2)).tolist() == [hidden] * 40


def test_a_block_larger_than_needed_is_cut_from_the_bottom():
    # 10 patches are fewer than the smallest block, 16 of 196: one block, its last row a part of the row above.
    for mask in block_mask(200, (14, 14), 10, generator()).numpy():
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        block = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert block[:-1].all()
        last = block[-1]
        assert last[: last.sum()].all()


def beit_mask(rng, rows, columns, count, smallest=16):
    """BEiT's Algorithm 1, one sample at a time, blocks drawn again that do not fit in, the last one cut."""
    mask = np.zeros((rows, columns), bool)
    while mask.sum() < count:
        area = rng.uniform(smallest, max(smallest, count - mask.sum()))
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h >= rows or w >= columns:
            continue
        top, left = rng.integers(0, rows - h + 1), rng.integers(0, columns - w + 1)
        for row in range(top, top + h):
            for column in range(left, left + w):
                if mask.sum() < count:
                    mask[row, column] = True
    return mask


def statistics_of(masks):
    """Mean number of neighbouring pairs of which one is hidden, and how often each ring around the centre is hidden."""
    edges = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    ring = np.minimum.outer(*[np.minimum(np.arange(14), 13 - np.arange(14))] * 2)
    return edges.mean(), [masks[:, ring == r].mean() for r in range(7)]


@pytest.mark.parametrize("count", [78, 147])
def test_blocks_are_distributed_as_beit_s(count):
    rng = np.random.default_rng(0)
    theirs = np.stack([beit_mask(rng, 14, 14, count) for _ in range(400)])
    ours = block_mask(4000, (14, 14), count, generator()).numpy()
    (edges, rings), (other_edges, other_rings) = statistics_of(ours), statistics_of(theirs)
    assert edges == pytest.approx(other_edges, rel=0.04)
    assert rings == pytest.approx(other_rings, abs=0.04)
    random = hidden_of("random", 400, (14, 14), count / 196).numpy()
    assert edges < 0.6 * statistics_of(random)[0]


def test_grid_masks_keep_the_same_one_of_every_four():
    masks = ~grid_mask(40, (14, 16), generator())
    for mask in masks:
        corners = [mask[row::2, column::2] for row in (0, 1) for column in (0, 1)]
        assert sorted(corner.float().mean().item() for corner in corners) == [0, 0, 0, 1]
    assert len(masks.flatten(1).unique(dim=0)) == 4


def test_grid_masks_need_even_sides():
    with pytest.raises(UserError, match="grid-wise masking needs even numbers of patches a side, not 15x15"):
        grid_mask(1, (15, 15), generator())
