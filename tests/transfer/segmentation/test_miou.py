"""Scores against a confusion matrix by hand and mmsegmentation's metric; the bootstrap against a closed form."""

import numpy as np
import pytest
import torch

from transfer.data.miou import bootstrap, class_scores, metrics_of

# Two images of 2 x 3 pixels and their classes 0..3; 255 is unlabelled. Class 3 occurs nowhere.
TRUTH = [[[0, 0, 1], [1, 255, 2]], [[0, 2, 2], [2, 2, 255]]]
PREDICTED = [[[0, 1, 1], [1, 3, 0]], [[0, 2, 2], [1, 2, 2]]]
# Confusion over both (rows: truth): 0: two right, one taken for 1; 1: two right; 2: three right, one as 0, one as 1.
IOU = [100 * 2 / 4, 100 * 2 / 4, 100 * 3 / 5]
ACCURACY = [100 * 2 / 3, 100 * 2 / 2, 100 * 3 / 5]


def counted(mmseg) -> tuple[np.ndarray, dict]:
    """Our counts per image through mmseg's own metric, and the numbers that mmseg itself computes from them."""
    from mmseg.registry import METRICS

    metric = METRICS.build({"type": "ImageAreas", "kept": ["b.jpg"]})
    metric.dataset_meta = {"classes": ("a", "b", "c", "d")}
    for name, truth, predicted in zip(("a.jpg", "b.jpg"), TRUTH, PREDICTED):
        sample = {
            "img_path": f"/somewhere/{name}",
            "pred_sem_seg": {"data": torch.tensor(predicted)[None]},
            "gt_sem_seg": {"data": torch.tensor(truth)[None]},
        }
        metric.process({}, [sample])
    theirs = metric.compute_metrics(list(metric.results))
    metric.evaluate(2)
    assert metric.kept["b.jpg"].tolist() == PREDICTED[1]
    return metric.areas, theirs


def test_scores_are_those_of_a_confusion_matrix_by_hand(mmseg):
    areas, theirs = counted(mmseg)
    assert areas.shape == (2, 3, 4)
    iou, accuracy = class_scores(areas.sum(axis=0))
    assert iou[:3].tolist() == pytest.approx(IOU)
    assert accuracy[:3].tolist() == pytest.approx(ACCURACY)
    # Predicted only on an unlabelled pixel: the class has no pixels and does not count in the mean.
    assert np.isnan(iou[3])
    ours = {name: float(value) for name, value in metrics_of(areas.sum(axis=0)).items()}
    assert ours == pytest.approx({"miou": np.mean(IOU), "macc": np.mean(ACCURACY), "aacc": 100 * 7 / 10})
    assert (theirs["mIoU"], theirs["mAcc"], theirs["aAcc"]) == pytest.approx(
        (ours["miou"], ours["macc"], ours["aacc"]), abs=0.0051
    )


def test_a_class_that_is_predicted_but_never_labelled_counts_with_nothing():
    areas = np.zeros((3, 3))  # intersection, union, label of three classes
    areas[:, 0] = 8, 10, 9
    areas[1, 1] = 1  # predicted once, labelled never
    assert float(metrics_of(areas)["miou"]) == pytest.approx((80 + 0) / 2)
    assert float(metrics_of(areas)["macc"]) == pytest.approx(100 * 8 / 9)


def test_bootstrap_is_the_sampling_error_of_the_images():
    """Of equal images: none. Of the pixel accuracy of images of one size: the standard error of their mean."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 101, 400)
    areas = np.zeros((400, 3, 2))
    areas[:, 0, 0], areas[:, 1, 0], areas[:, 2, 0] = right, 100, 100
    found = bootstrap(areas)
    assert found["aacc"] == pytest.approx(right.std(ddof=1) / np.sqrt(400), rel=0.15)
    assert found == bootstrap(areas)
    assert bootstrap(np.repeat(areas[:1], 50, axis=0))["aacc"] == pytest.approx(0, abs=1e-9)
