"""What the twin of Mask R-CNN compares: two trainings, and two evaluations of the same detections."""

import contextlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.originals import Difference
from transfer.data.coco import Example, annotation_file, read_split
from transfer.detection import shared
from transfer.detection.evaluate import SUMMARY, evaluate

SAME = 1e-5  # of a quantity that both compute by the same operations


@dataclass
class Run:
    """What one training did: the losses by name and the rate of each step, the weights before and after, and its
    detections: per image of val [n, 5], score and box, best first."""

    losses: list[dict[str, float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    detections: dict[int, np.ndarray] = field(default_factory=dict)

    def note(self, losses: dict[str, Tensor], rate: float) -> None:
        self.losses.append({name: loss.item() for name, loss in losses.items()})
        self.rates.append(rate)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def best_first(rows: np.ndarray) -> np.ndarray:
    return rows[np.argsort(-rows[:, 0], kind="stable")]


def compare(ours: Run, theirs: Run) -> list[Difference]:
    """Losses: relative. Rates: of the highest. Weights: the distance between both, of the way from the start."""
    found, last = [], len(ours.losses)
    for name in ours.losses[0]:
        pairs = [(a[name], b[name]) for a, b in zip(ours.losses, theirs.losses, strict=True)]
        gaps = [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]
        worst = int(np.argmax(gaps))
        found.append(Difference(f"{name} of step 1, relative", *pairs[0], gaps[0], SAME))
        where = f"step {worst + 1} of {last}"
        found.append(Difference(f"{name}, largest gap ({where}), relative", *pairs[worst], gaps[worst], SAME))
    rates = list(zip(ours.rates, theirs.rates, strict=True))
    a, b = max(rates, key=lambda pair: abs(pair[0] - pair[1]))
    found.append(Difference("rate, largest gap, of the highest", a, b, abs(a - b) / max(ours.rates), 1e-9))
    way, other = distance(ours.end, ours.start), distance(theirs.end, ours.start)
    gap = distance(ours.end, theirs.end) / way
    found.append(Difference("weights: their way from the start, and the gap as a part of it", way, other, gap, SAME))
    return [*found, *compare_detections(ours.detections, theirs.detections)]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Of the weights and BatchNorm's statistics, without its counters."""
    real = [name for name, tensor in a.items() if tensor.is_floating_point()]
    return sum(float((a[name].double() - b[name].double()).square().sum()) for name in real) ** 0.5


def compare_detections(ours: dict[int, np.ndarray], theirs: dict[int, np.ndarray]) -> list[Difference]:
    """Their number, and the largest gaps of scores and boxes (px; ours are rounded to 0.001), best first."""
    count, other = (sum(map(len, by_image.values())) for by_image in (ours, theirs))
    found = [Difference("detections on the validation images", count, other, abs(count - other), 0)]
    if count != other or not count:
        return found
    a, b = (np.concatenate([rows[image] for image in sorted(rows)]).astype(float) for rows in (ours, theirs))
    for name, columns, allowed in (("score", slice(0, 1), SAME), ("box, px", slice(1, 5), 2e-3)):
        gaps = np.abs(a[:, columns] - b[:, columns])
        place = np.unravel_index(gaps.argmax(), gaps.shape)
        values = float(a[:, columns][place]), float(b[:, columns][place])
        found.append(Difference(f"detections, largest gap of a {name}", *values, float(gaps.max()), allowed))
    return found


def precision(root: Path, name: str, work: Path) -> list[Difference]:
    """AP (%) of the same made-up detections by our evaluation and by detectron2's COCOEvaluator."""
    from detectron2.evaluation import COCOEvaluator
    from detectron2.structures import Boxes, Instances

    entries, results = [], work / "results.json"
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOEvaluator(name, tasks=("bbox", "segm"), distributed=False)
        evaluator.reset()
        for example in read_split(root, "val").examples:
            boxes, scores, labels, masks = made_up(example)
            entries += shared.to_results(example, boxes, scores, labels, masks)
            found = Instances((example.height, example.width), pred_boxes=Boxes(torch.from_numpy(boxes)))
            found.scores, found.pred_classes = torch.from_numpy(scores), torch.from_numpy(labels)
            found.pred_masks = torch.from_numpy(masks).bool()
            evaluator.process([{"image_id": example.id}], [{"instances": found}])
        theirs = evaluator.evaluate()
    results.write_text(json.dumps(entries), encoding="utf-8")
    ours, found = evaluate(annotation_file(root, "val"), results).metrics, []
    for kind, task in (("box", "bbox"), ("mask", "segm")):
        for metric, key in zip(SUMMARY, ("AP", "AP50", "AP75", "APs", "APm", "APl")):
            a, b = ours.get(f"{kind}_{metric}", float("nan")), theirs[task][key]
            gap = 0.0 if np.isnan(a) and np.isnan(b) else abs(a - b)
            found.append(Difference(f"{kind} {key}, %", a, b, gap, 1e-9))
    return found


def made_up(example: Example) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The objects, each found twice with shifts of a few px; a fifth have the wrong class. Boxes have 3 decimals."""
    rng = np.random.default_rng(example.id)
    count = 2 * len(example.labels)
    shifts, spread = rng.normal(size=(count, 2)), np.repeat([1.0, 6.0], count // 2)[:, None]
    shifts = (shifts * spread).round()
    boxes = np.tile(example.boxes, (2, 1)) + np.tile(shifts, (1, 2))
    masks = [np.roll(mask, (int(y), int(x)), (0, 1)) for mask, (x, y) in zip([*example.masks()] * 2, shifts)]
    wrong = rng.random(count) < 0.2
    labels = (np.tile(example.labels, 2) + wrong) % 80
    return boxes.round(3).astype(np.float32), rng.random(count), labels, np.stack(masks)
