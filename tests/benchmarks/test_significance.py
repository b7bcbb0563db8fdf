"""Tests of differences against statsmodels and scipy, and against pairs that have none."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests

from benchmarks.samples import AveragePrecision, Miou
from benchmarks.significance import LEVEL, Difference, Mean, across_seeds, compare, holm, mcnemar, word
from mae_core.errors import UserError
from transfer.detection.evaluate import Matches


def accuracies(rng: np.random.Generator, images: int, right: float = 0.7) -> np.ndarray:
    return rng.random(images) < right


class Ratio:
    """A metric that is no mean over the images: 100 * sum(hits) / sum(sizes), as an IoU is."""

    def __init__(self, hits: np.ndarray, sizes: np.ndarray) -> None:
        self.hits, self.sizes, self.images = hits, sizes, len(hits)

    def values(self, draws: np.ndarray) -> np.ndarray:
        return 100 * (draws @ self.hits) / (draws @ self.sizes)


@pytest.mark.parametrize(("images", "right"), [(40, 0.7), (500, 0.7), (5000, 0.75)])
def test_mcnemar_is_that_of_statsmodels(images, right):
    rng = np.random.default_rng(images)
    a, b = accuracies(rng, images), accuracies(rng, images, right)
    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    found = mcnemar(a, b)
    assert found.p == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue, abs=1e-10)
    assert found.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert found.low < found.value < found.high


def test_the_interval_of_a_paired_accuracy_is_as_by_hand():
    """100 images, 20 right for A alone, 10 for B alone. Agresti and Min: cells + 1/2, n + 2; d = 10 / 102, variance
    (31 - 100 / 102) / 102**2."""
    a, b = np.zeros(100, bool), np.zeros(100, bool)
    a[:20], b[20:30] = True, True
    found, half = mcnemar(a, b), 1.959963984540054 * (31 - 100 / 102) ** 0.5 / 102
    assert (found.low, found.high) == pytest.approx((100 * (10 / 102 - half), 100 * (10 / 102 + half)))


def test_a_mean_of_one_run_each_is_scipys_paired_t_test():
    rng = np.random.default_rng(0)
    a, b = rng.normal(50, 10, 200), rng.normal(51, 10, 200)
    found, truth = compare([Mean(a)], [Mean(b)], binary=False), stats.ttest_rel(a, b)
    interval = truth.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((truth.pvalue, *interval), abs=1e-10)


def test_seeds_on_images_that_all_count_alike_are_scipys_welch_test():
    """Each run's score is the same on every image, so only the seeds vary."""
    a, b = (70.0, 71.0, 70.4), (69.0, 69.2, 70.1, 69.9)
    runs = [[Mean(np.full(50, value)) for value in side] for side in (a, b)]
    found, truth = across_seeds(*runs), stats.ttest_ind(a, b, equal_var=False)
    interval = truth.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((truth.pvalue, *interval), abs=1e-10)


def test_the_jackknife_of_a_mean_is_scipys_paired_t_test():
    """A ratio to sizes that are all one is a mean."""
    rng = np.random.default_rng(4)
    a, b = rng.random(80), rng.random(80)
    found, truth = compare([Ratio(a, np.ones(80))], [Ratio(b, np.ones(80))], binary=False), stats.ttest_rel(a, b)
    low, high = truth.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((truth.pvalue, 100 * low, 100 * high), abs=1e-10)


@pytest.mark.parametrize("groups", [300, 100])
def test_the_jackknife_agrees_with_scipys_bootstrap_on_a_metric_that_is_no_mean(groups):
    rng = np.random.default_rng(1)
    sizes, hits_a, hits_b = rng.integers(10, 100, 300), rng.random(300), rng.random(300)
    a, b = Ratio(hits_a * sizes, sizes), Ratio(0.9 * hits_b * sizes, sizes)
    found = compare([a], [b], binary=False, groups=groups)

    def difference(x, y, size, axis):
        return 100 * (x.sum(axis) - y.sum(axis)) / size.sum(axis)

    drawn = stats.bootstrap((a.hits, b.hits, sizes), difference, paired=True, vectorized=True, n_resamples=20000, rng=0)
    error = (found.high - found.low) / 2 / stats.t.ppf(0.975, groups - 1)
    assert error == pytest.approx(drawn.standard_error, rel=0.02 if groups == 300 else 0.2)
    assert found.test == f"paired jackknife, {groups} groups"


def test_one_image_is_not_compared():
    with pytest.raises(UserError, match="1 image says nothing"):
        compare([Ratio(np.ones(1), np.ones(1))], [Ratio(np.zeros(1), np.ones(1))], binary=False)


def simulated(rng: np.random.Generator, seeds: int, images: int, hard: np.ndarray, level: float) -> list[Mean]:
    """Runs of one method: the images' difficulty is shared, the seed moves all of them, and each image by itself."""
    moved = rng.normal(0, 0.15, seeds)
    return [Mean(100.0 * (rng.random(images) < 1 / (1 + np.exp(-level - hard - seed)))) for seed in moved]


@pytest.mark.parametrize("seeds", [(1, 1), (3, 3), (3, 1), (2, 1)])
def test_of_1000_pairs_without_a_difference_at_most_6_percent_are_called_different(seeds):
    """The methods differ by nothing but the seeds. With one seed each, only the images' chance can be known: there is
    no training. A side with one takes the other's spread."""
    rng, images, called = np.random.default_rng(seeds[0]), 300, 0
    for _ in range(1000):
        hard = rng.normal(0, 2, images)
        if seeds == (1, 1):
            chance = 1 / (1 + np.exp(-0.5 - hard))
            a, b = ([Mean(100.0 * (rng.random(images) < chance))] for _ in "ab")
        else:
            a, b = (simulated(rng, count, images, hard, 0.5) for count in seeds)
        called += compare(a, b, binary=True).p < LEVEL
    assert 0.01 < called / 1000 <= 0.06


def ratios(rng: np.random.Generator) -> list[Ratio]:
    sizes = rng.integers(10, 100, 60)
    return [Ratio(rng.random(60) * sizes, sizes) for _ in "ab"]


def segmentations(rng: np.random.Generator, images: int = 100, classes: int = 12) -> list[Miou]:
    """Two equally good ones of the same images, in which the last class is rare and some are hard."""
    there = rng.random((images, classes)) < np.linspace(0.6, 0.05, classes)
    label, hard = there * rng.lognormal(5, 1, there.shape), rng.normal(0, 0.7, there.shape)
    found = []
    for _ in "ab":
        right = label / (1 + np.exp(-0.5 - hard - rng.normal(size=there.shape)))
        elsewhere = (rng.random(there.shape) < 0.05) * rng.lognormal(4, 1, there.shape)
        found.append(Miou(np.stack([right, label + elsewhere, label], axis=1)))
    return found


def detections(rng: np.random.Generator, images: int = 30, categories: int = 2) -> list[AveragePrecision]:
    """Two equally good detectors of the same objects, judged at two IoUs; some objects are hard, some boxes false."""
    objects = rng.poisson(np.linspace(1.5, 0.2, categories), (images, categories))
    objects[0] = 1
    hard = [rng.normal(0, 0.12, count) for count in objects.sum(axis=0)]
    found = []
    for _ in "ab":
        matches = object.__new__(Matches)
        matches.recalls, matches.images, matches.categories = np.linspace(0, 1, 101), images, []
        for count, harder in zip(objects.T, hard):
            iou = 0.75 - harder + rng.normal(0, 0.12, len(harder))
            false = rng.integers(images, size=images // 2)
            score = np.concatenate([iou + rng.normal(0, 0.15, len(iou)), rng.normal(0.45, 0.2, len(false))])
            right = np.concatenate([iou, np.zeros(len(false))]) >= np.array([[0.5], [0.75]])
            order = np.argsort(-score)
            owner = np.concatenate([np.repeat(np.arange(images), count), false])[order]
            matches.categories.append((right[:, order], ~right[:, order], owner, count))
        each = object.__new__(AveragePrecision)
        each.matches, each.images = matches, images
        found.append(each)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pair", [ratios, segmentations, detections])
def test_the_jackknife_calls_few_pairs_without_a_difference_different(pair):
    rng = np.random.default_rng(0)
    called = [compare([a], [b], binary=False).p < LEVEL for a, b in (pair(rng) for _ in range(1000))]
    assert 0.01 < np.mean(called) <= 0.06


def test_a_difference_that_is_there_is_found():
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 2, 2000)
    a, b = simulated(rng, 3, 2000, hard, 1.5), simulated(rng, 3, 2000, hard, 0.0)
    assert compare(a, b, binary=True).p < 0.01


def test_ignoring_the_seeds_would_call_too_many_different():
    """What the seeds' variance is counted for: by the images alone, single runs of one method often differ."""
    rng, called = np.random.default_rng(5), 0
    for _ in range(300):
        hard = rng.normal(0, 2, 3000)
        (a,), (b,) = (simulated(rng, 1, 3000, hard, 0.5) for _ in "ab")
        called += compare([a], [b], binary=True).p < LEVEL
    assert called / 300 > 0.1


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_against_a_is_nothing(seeds):
    rng = np.random.default_rng(2)
    runs = [Mean(100.0 * accuracies(rng, 100)) for _ in range(seeds)]
    found = compare(runs, runs, binary=True)
    assert (found.value, found.p) == (0, 1)
    assert word(found, holm([found.p])[0], True) == "tied"
    ratio = [Ratio(rng.random(20), np.ones(20)) for _ in range(seeds)]
    assert (compare(ratio, ratio, binary=False).value, compare(ratio, ratio, binary=False).p) == (0, 1)


def test_one_seed_beside_several_takes_their_variance():
    """As if both had it: a side with one run is not taken for one without chance. One estimate, from three values."""
    runs = [[Mean(np.full(50, v)) for v in side] for side in ((70.0, 71.0, 70.4), (69.0,))]
    found, variance = across_seeds(*runs), np.var([70.0, 71.0, 70.4], ddof=1)
    half = stats.t.ppf(0.975, 2) * (variance / 3 + variance) ** 0.5
    assert found.high - found.value == pytest.approx(half)


def test_holm_is_that_of_statsmodels():
    for p in ([0.01, 0.04, 0.03, 0.2], [0.5], [0.01, 0.01, 0.9], np.random.default_rng(0).random(12).tolist()):
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=1e-10)


@pytest.mark.parametrize(
    ("a", "b", "corrected", "higher", "expected"),
    [
        (2, 1, 0.04, True, "better"),
        (2, 1, 0.04, False, "worse"),
        (1, 2, 0.01, True, "worse"),
        (2, 1, 0.06, True, "tied"),
    ],
)
def test_the_word_is_of_a_and_in_the_metrics_direction(a, b, corrected, higher, expected):
    assert word(Difference(a, b, 0, 0, 0.001, ""), corrected, higher) == expected
