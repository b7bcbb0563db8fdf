"""COCO's metrics of one results file: the only place that computes them, whichever engine made the file."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transfer.data.coco import CATEGORIES

KINDS = {"box": "bbox", "mask": "segm"}
# The six averages of COCOeval.stats that are about precision.
SUMMARY = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
RESAMPLES = 200


@dataclass(frozen=True)
class Evaluation:
    """metrics: box_ap, mask_ap and their variants in percent. stderr: of box_ap and mask_ap. per_class: AP by category
    name."""

    metrics: dict[str, float]
    stderr: dict[str, float]
    per_class: dict[str, dict[str, float]]


def evaluate(annotations: Path, results: Path, seed: int = 0, only: Sequence[int] | None = None) -> Evaluation:
    """Box and mask AP (percent) of a COCO-results file. A metric without ground truth (such as large objects in a small
    set) is left out. Standard errors: bootstrap over the images. only: the ids of the images that count."""
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO(str(annotations))
        found = json.loads(results.read_text(encoding="utf-8"))
        metrics: dict[str, float] = {}
        stderr, per_class = {}, {}
        for name, kind in KINDS.items():
            evaluator = COCOeval(truth, load(truth, found, name), kind)
            if only is not None:
                evaluator.params.imgIds = sorted(only)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            values = zip(SUMMARY, evaluator.stats[:6])
            metrics |= {f"{name}_{metric}": 100 * float(value) for metric, value in values if value >= 0}
            stderr[f"{name}_ap"] = bootstrap(evaluator, seed)
            precision = evaluator.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category], all sizes
            per_class[f"{name}_ap"] = {
                CATEGORIES[category]: round(100 * float(precision[:, :, k].mean()), 2)
                for k, category in enumerate(evaluator.params.catIds)
                if (precision[:, :, k] > -1).all()
            }
    return Evaluation(metrics, stderr, per_class)


def matches_of(annotations: Path, results: Path, name: str, only: Sequence[int] | None = None) -> "Matches":
    """The matches of a COCO-results file, of boxes or masks. only: the ids of the images that count, if not all."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        found = json.loads(results.read_text(encoding="utf-8"))
        evaluator = COCOeval(truth, load(truth, found, name), KINDS[name])
        if only is not None:
            evaluator.params.imgIds = sorted(only)
        evaluator.evaluate()
    return Matches(evaluator)


def load(truth: COCO, found: list[dict], name: str) -> COCO:
    """The detections for boxes or for masks. pycocotools takes an object's size from its box if it has one; without
    the boxes, masks are sorted into sizes by their own area."""
    if not found:  # loadRes cannot read an empty list
        nothing = COCO()
        nothing.dataset = {**truth.dataset, "annotations": []}
        nothing.createIndex()
        return nothing
    left_out = "bbox" if name == "mask" else "segmentation"
    return truth.loadRes([{k: v for k, v in one.items() if k != left_out} for one in found])


def bootstrap(evaluator: COCOeval, seed: int) -> float:
    """Standard deviation (percent) of AP over resamples of the images, drawn with replacement. evaluate() has matched
    detections within each image; only the accumulation is repeated."""
    matches, images = Matches(evaluator), len(evaluator.params.imgIds)
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(images, size=images), minlength=images) for _ in range(RESAMPLES))
    values = [100 * matches.ap(counts) for counts in drawn]
    return float(np.nanstd(values, ddof=1)) if np.isfinite(values).sum() > 1 else 0.0


class Matches:
    """evaluate()'s matches (all sizes, most detections) per category, highest score first: AP of any multiset of the
    images follows from them."""

    def __init__(self, evaluator: COCOeval) -> None:
        p = evaluator.params
        self.recalls, self.images = p.recThrs, len(p.imgIds)
        most = p.maxDets[-1]
        self.categories = []
        for k in range(len(p.catIds)):
            first = k * len(p.areaRng) * self.images  # evalImgs: [category, size range, image]; range 0 is all
            scores, hits, ignored, owner = [], [], [], []
            objects = np.zeros(self.images, np.int64)
            for i, entry in enumerate(evaluator.evalImgs[first : first + self.images]):
                if entry is None:
                    continue
                objects[i] = np.count_nonzero(np.asarray(entry["gtIgnore"]) == 0)
                scores.append(np.asarray(entry["dtScores"][:most]))
                hits.append(entry["dtMatches"][:, :most] != 0)
                ignored.append(np.asarray(entry["dtIgnore"][:, :most], bool))
                owner.append(np.full(len(scores[-1]), i))
            if objects.any():
                order = np.argsort(-np.concatenate(scores), kind="mergesort")
                hit, ignore = np.concatenate(hits, axis=1)[:, order], np.concatenate(ignored, axis=1)[:, order]
                self.categories.append((hit & ~ignore, ~hit & ~ignore, np.concatenate(owner)[order], objects))

    def ap(self, counts: np.ndarray) -> float:
        """AP (0..1) over a set that holds image i counts[i] times; NaN if no object is left."""
        values = []
        for true, false, owner, objects in self.categories:
            positives = int(objects @ counts)
            if not positives:
                continue
            # A detection that is there k times counts k at once: recall and envelope are those of k in a row.
            repeats = counts[owner]
            tp = np.cumsum(true * repeats, axis=1, dtype=np.float64)
            fp = np.cumsum(false * repeats, axis=1, dtype=np.float64)
            precision = tp / np.maximum(tp + fp, np.spacing(1))
            envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            for recall, best in zip(tp / positives, envelope):
                place = np.searchsorted(recall, self.recalls, side="left")
                values.append(np.append(best, 0.0)[np.minimum(place, len(best))].mean())
        return float(np.mean(values)) if values else float("nan")
