"""Is the difference between two numbers more than chance? Paired tests on the same images.

One run on each side: McNemar's exact test for accuracies, the paired t-test for other means over the images (mCE), and
for what is no mean over the images (mIoU, AP) the paired jackknife, which is the t-test where it is one (Tukey 1958;
delete-a-group where there are many images, Shao and Tu 1995). The bootstrap would call too many equal encoders
different: a class of few images is missing from many of its draws, for A and B alike. Several seeds: a t-test whose
variance counts the training seeds and the test images, as in the analysis of several readers of the same cases
(Dorfman, Berbaum and Metz 1992): the images are shared by all runs, the seeds are each side's own. Holm's correction
over tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import stats

from mae_core.errors import UserError

LEVEL = 0.05
GROUPS = 2000  # of images, at most, that the jackknife leaves out in turn


class Sample(Protocol):
    """What one run's number is made of. images: how many; values: the metric [R] of each of R selections of them; draws
    [R, images] says how often each image is in it."""

    @property
    def images(self) -> int: ...

    def values(self, draws: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Mean:
    """A mean over the images [n] of a score each, in the metric's unit; an accuracy: of 0 and 100."""

    scores: np.ndarray

    @property
    def images(self) -> int:
        return len(self.scores)

    def values(self, draws: np.ndarray) -> np.ndarray:
        return draws @ self.scores / draws.sum(axis=1)


@dataclass(frozen=True)
class Difference:
    """A - B in the metric's unit, its 95 % interval, and the probability of one as large if there were none."""

    a: float
    b: float
    low: float
    high: float
    p: float
    test: str

    @property
    def value(self) -> float:
        return self.a - self.b


def mcnemar(a: np.ndarray, b: np.ndarray) -> Difference:
    """Two classifiers on the same images; a, b: whether each image is right. The exact test, and the interval of
    Agresti and Min (2005) for a paired difference, which adds half an image to each cell of the table. In percent."""
    n, only_a, only_b = len(a), int(np.sum(a & ~b)), int(np.sum(~a & b))
    p = stats.binomtest(min(only_a, only_b), only_a + only_b).pvalue if only_a + only_b else 1.0
    mine, theirs, m = only_a + 0.5, only_b + 0.5, n + 2
    middle = (mine - theirs) / m
    half = normal_quantile() * math.sqrt(mine + theirs - (mine - theirs) ** 2 / m) / m
    low, high = 100 * max(middle - half, -1.0), 100 * min(middle + half, 1.0)
    return Difference(100 * float(a.mean()), 100 * float(b.mean()), low, high, float(p), "McNemar")


def normal_quantile() -> float:
    return float(stats.norm.ppf(1 - LEVEL / 2))


def compare(a: Sequence[Sample], b: Sequence[Sample], binary: bool, groups: int = GROUPS) -> Difference:
    """The runs of A and those of B, one for each seed, all on the same images in the same order. binary: the scores are
    0 and 100. groups: into how many the images are divided for the jackknife; each by itself if they are fewer."""
    if binary and len(a) == len(b) == 1:
        return mcnemar(*(run.scores > 0 for run in (*a, *b) if isinstance(run, Mean)))
    return across_seeds(a, b, groups)


def across_seeds(a: Sequence[Sample], b: Sequence[Sample], groups: int = GROUPS) -> Difference:
    """The difference between the means over the seeds, by a t-test.

    Its variance: of the seeds' values on either side (Welch), plus that over the images of the means' difference; less
    what both count, the seeds' disagreement about single images. Degrees of freedom as Welch and Satterthwaite. A side
    with one seed is given the other's variance; with one on both, training's is not counted.
    """
    n = a[0].images
    if n < 2:
        raise UserError(f"{n} image says nothing about chance: a comparison takes two or more")
    values_a, values_b = (np.array([float(run.values(np.ones((1, n)))[0]) for run in side]) for side in (a, b))
    rows_a, rows_b, scale = over_images(a, b, groups)
    images = scale * float(np.nanvar(rows_a.mean(axis=0) - rows_b.mean(axis=0), ddof=1))
    seeds = seed_variances(values_a, values_b)
    parts = [(images, rows_a.shape[1] - 1), *seeds]
    twice = scale * sum(counted_twice(rows) for rows in (rows_a, rows_b)) if seeds else 0.0
    variance = max(sum(v for v, _ in parts) - twice, *(v for v, _ in parts))
    if seeds:
        test = "seeds and images"
    else:
        test = "paired t" if scale < 1 else f"paired jackknife, {rows_a.shape[1]} groups"
    return from_t(float(values_a.mean()), float(values_b.mean()), variance, parts, test)


def over_images(a: Sequence[Sample], b: Sequence[Sample], groups: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Rows of A's runs and of B's, and what to multiply the variance along a row by for that of a number over the
    images. A mean's rows are its scores. Of others, they are the values without each group of the images, the same
    groups for every run: for a mean that would come to the same."""
    n = a[0].images
    means = [[run.scores for run in side if isinstance(run, Mean)] for side in (a, b)]
    if len(means[0]) == len(a) and len(means[1]) == len(b):
        return np.stack(means[0]), np.stack(means[1]), 1 / n
    groups = min(groups, n)
    draws = np.ones((groups, n))
    for row, group in zip(draws, np.array_split(np.random.default_rng(0).permutation(n), groups)):
        row[group] = 0
    without_a, without_b = (np.stack([run.values(draws) for run in side]) for side in (a, b))
    return without_a, without_b, (groups - 1) ** 2 / groups


def seed_variances(a: np.ndarray, b: np.ndarray) -> list[tuple[float, int]]:
    """(variance of the difference that comes of the seeds, degrees of freedom) of each independent estimate of it: one
    for each side, or one in all where a side has one seed and is given the other's; [] if no side has two."""
    own = [float(values.var(ddof=1)) if len(values) > 1 else None for values in (a, b)]
    known = [variance for variance in own if variance is not None]
    if not known:
        return []
    if len(known) == 1:  # one estimate for both sides: its degrees of freedom count once
        return [(known[0] * (1 / len(a) + 1 / len(b)), max(len(a), len(b)) - 1)]
    return [(variance / len(values), len(values) - 1) for variance, values in zip(known, (a, b))]


def counted_twice(rows: np.ndarray) -> float:
    """The part of a side's variance that its seeds' and its images' both hold: how its runs differ on single images.
    The variance along one run's row is that part times the number of runs above that of their mean."""
    runs = len(rows)
    if runs < 2:
        return 0.0
    single, mean = float(np.nanvar(rows, axis=1, ddof=1).mean()), float(np.nanvar(rows.mean(axis=0), ddof=1))
    return max(single - mean, 0.0) / (runs - 1)


def from_t(a: float, b: float, variance: float, parts: Sequence[tuple[float, int]], test: str) -> Difference:
    """parts: (variance, degrees of freedom) of each independent component."""
    if variance <= 0:
        return Difference(a, b, a - b, a - b, 1.0 if a == b else 0.0, test)
    freedom = sum(v for v, _ in parts) ** 2 / sum(v**2 / df for v, df in parts)
    error = math.sqrt(variance)
    half = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    return Difference(a, b, a - b - half, a - b + half, float(2 * stats.t.sf(abs(a - b) / error, freedom)), test)


def holm(p: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979): below the level only if the family's error stays below."""
    order = np.argsort(p, kind="stable")
    scaled = [p[i] * (len(p) - rank) for rank, i in enumerate(order)]
    corrected = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(corrected[rank]) for rank in np.argsort(order, kind="stable")]


def word(difference: Difference, corrected: float, higher_is_better: bool) -> str:
    """What A is beside B: "better", "worse" or "tied", at 5 % after correction."""
    if corrected >= LEVEL or difference.value == 0:
        return "tied"
    return "better" if (difference.value > 0) == higher_is_better else "worse"
