"""What a record's headline is made of, image by image, for tests of differences."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.significance import Mean, Sample
from benchmarks.verify import right_classes, tested_examples
from mae_core.errors import UserError
from transfer.classification.robustness import ALEXNET_ERROR
from transfer.data.coco import annotation_file
from transfer.data.miou import metrics_of
from transfer.data.predictions import MAIN, read_predictions
from transfer.detection.evaluate import matches_of
from transfer.task import Record


@dataclass(frozen=True)
class Miou:
    """Pixel counts [images, 3, classes]: intersection, union, label."""

    areas: np.ndarray

    @property
    def images(self) -> int:
        return len(self.areas)

    def values(self, draws: np.ndarray) -> np.ndarray:
        flat = draws.astype(np.float64) @ self.areas.reshape(self.images, -1)
        return metrics_of(flat.reshape(len(draws), *self.areas.shape[1:]))["miou"]


class AveragePrecision:
    """COCO's matches of one results file. kind: "box" or "mask". only: the ids of the images that count."""

    def __init__(self, annotations: Path, results: Path, kind: str, only: list[int]) -> None:
        self.matches = matches_of(annotations, results, kind, only)
        self.images = self.matches.images

    def values(self, draws: np.ndarray) -> np.ndarray:
        return np.array([100 * self.matches.ap(draw.astype(np.int64)) for draw in draws])


def sample_of(record: Record, folder: Path, root: Path) -> tuple[Sample, bool]:
    """What the headline of the record in that folder is made of, and whether each image is simply right or wrong.

    root: where COCO's annotations lie. UserError if it cannot be read.
    """
    file = folder / Path(record.predictions["file"]).name
    if file.suffix == ".json":
        annotations = annotation_file(root, "val")
        if not annotations.exists():
            raise UserError(f"{annotations} is not there, without which AP cannot be computed: give --data")
        examples = tested_examples(record, root)
        kind = record.metric.split("_")[0]
        return AveragePrecision(annotations, file, kind, examples.ids[examples.rows].tolist()), False
    sets = read_predictions(file)
    if record.task == "imagenet_c":
        return Mean(corruption_errors(sets)), False
    rows = sets.get(MAIN) or sets[record.metric.partition("@")[2]]
    if "intersection" in rows:
        return Miou(areas_of(rows)), False
    if "within" in rows:
        return Mean(100.0 * rows["within"] / rows["pixels"]), False
    return Mean(100.0 * right_classes(rows, rows["top1"])), True


def corruption_errors(sets: dict[str, dict[str, np.ndarray]]) -> np.ndarray:
    """Each image's error over its 75 versions, relative to AlexNet's, in percent [images]; mCE is its mean."""
    wrong = {name: rows["top1"] != rows["label"] for name, rows in sets.items()}
    relative = [each / ALEXNET_ERROR[name.split("/")[0]] for name, each in wrong.items()]
    return 100 * np.mean(relative, axis=0)


def areas_of(rows: dict[str, np.ndarray]) -> np.ndarray:
    """[images, 3, classes] from a row for each image and class that is there."""
    names, owner = np.unique(rows["image"], return_inverse=True)
    areas = np.zeros((len(names), 3, int(rows["class"].max()) + 1))
    for place, name in enumerate(("intersection", "union", "label_pixels")):
        areas[owner, place, rows["class"]] = rows[name]
    return areas
