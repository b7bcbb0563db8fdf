"""mIoU, mean and overall accuracy from per-image pixel counts, with standard errors over the images."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 200


def class_scores(areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU and accuracy of each class in percent, NaN for a class without pixels.

    areas [..., 3, C]: pixels in the intersection of prediction and label, in their union, and in the label.
    """
    intersection, union, label = np.moveaxis(np.asarray(areas, np.float64), -2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * intersection / union, 100 * intersection / label


def metrics_of(areas: np.ndarray) -> dict[str, np.ndarray]:
    """miou and macc (means over the classes that have pixels) and aacc (over all labelled pixels), in percent.

    areas [..., 3, C], summed over the images, as in mmsegmentation's IoUMetric. A class that is predicted but occurs in
    no label counts with an IoU of 0.
    """
    iou, accuracy = class_scores(areas)
    return {
        "miou": np.nanmean(iou, axis=-1),
        "macc": np.nanmean(accuracy, axis=-1),
        "aacc": 100 * areas[..., 0, :].sum(axis=-1) / areas[..., 2, :].sum(axis=-1),
    }


def bootstrap(areas: np.ndarray, seed: int = 0) -> dict[str, float]:
    """The standard deviation of each metric over RESAMPLES draws of N images with replacement.

    areas [N, 3, C], one entry per image.
    """
    n = len(areas)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    resampled = (drawn @ areas.reshape(n, -1).astype(np.float64)).reshape(RESAMPLES, *areas.shape[1:])
    return {name: float(values.std(ddof=1)) for name, values in metrics_of(resampled).items()}


def scores(areas: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and their standard errors from counts per image [N, 3, C]."""
    return {name: float(value) for name, value in metrics_of(areas.sum(axis=0)).items()}, bootstrap(areas)


def by_class(areas: np.ndarray, names: tuple[str, ...]) -> dict[str, dict[str, float | int | None]]:
    """IoU and accuracy (percent, None without pixels) and labelled pixels of each class, from counts [3, C]."""
    iou, accuracy = (np.round(values, 2).astype(object) for values in class_scores(areas))
    return {
        name: {
            "iou": None if np.isnan(iou[i]) else iou[i],
            "acc": None if np.isnan(accuracy[i]) else accuracy[i],
            "pixels": int(areas[2, i]),
        }
        for i, name in enumerate(names)
    }


def columns_of(images: Sequence[str], areas: np.ndarray) -> dict[str, Sequence | np.ndarray]:
    """A row for each image and class that the image's label or prediction has, from counts [N, 3, C]: intersection,
    union and label in pixels. An image without any has one row, of class 0 and no pixels."""
    present = areas[:, 1] > 0
    present[:, 0] |= ~present.any(axis=1)
    owner, classes = np.nonzero(present)
    pixels = dict(zip(("intersection", "union", "label_pixels"), np.moveaxis(areas, 1, 0)))
    rows = {name: counts[owner, classes] for name, counts in pixels.items()}
    return {"image": [images[int(i)] for i in owner], "class": classes.astype(np.int32), **rows}
