"""The scores of a classifier: which images it gets right, with one way to count."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mae_core import distributed
from mae_core.data import Images, Normalization
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.outputs import outputs_of
from transfer.data.predictions import names_of
from transfer.data.split import Split


@dataclass(frozen=True)
class Scores:
    """Per image, in the order of the split: its name, its label [n], the cross-entropy [n], the classes of the five
    highest logits [n, 5], highest first (of fewer classes: of all), and their log-probabilities [n, 5]. accepted: all
    classes that are right, of a set that has several."""

    images: Sequence[str]
    label: np.ndarray
    loss: np.ndarray
    classes: np.ndarray
    log_probs: np.ndarray
    accepted: Sequence[Collection[int]] | None = None

    @property
    def right(self) -> np.ndarray:
        """Which of the five are right [n, 5]."""
        if self.accepted is None:
            right: np.ndarray = self.classes == self.label[:, None]
            return right
        return np.array([[c in each for c in five] for five, each in zip(self.classes.tolist(), self.accepted)])

    @property
    def top1(self) -> np.ndarray:
        """Correct at 1 [n]."""
        return self.right[:, 0]

    @property
    def top5(self) -> np.ndarray:
        """Correct at 5 [n]."""
        return np.logical_or.reduce(self.right, axis=1)

    def part(self, start: int, end: int, images: Sequence[str]) -> "Scores":
        """Those of the images from start to end, under other names."""
        label, loss, classes, log_probs = (v[start:end] for v in (self.label, self.loss, self.classes, self.log_probs))
        return Scores(images, label, loss, classes, log_probs, self.accepted and self.accepted[start:end])

    def columns(self) -> dict[str, Sequence | np.ndarray]:
        """What is kept of it: image, label, loss, top1 to top5 (the classes), log_prob1 to log_prob5; `labels`, all
        that are right, with spaces between, if there may be several."""
        own: dict[str, Sequence | np.ndarray] = {"image": self.images, "label": self.label, "loss": self.loss}
        if self.accepted is not None:
            own["labels"] = [" ".join(map(str, sorted(right))) for right in self.accepted]
        own |= {f"top{rank}": classes for rank, classes in enumerate(self.classes.T, 1)}
        return own | {f"log_prob{rank}": values for rank, values in enumerate(self.log_probs.T, 1)}

    def metrics(self) -> tuple[dict[str, float], dict[str, float]]:
        """top1, top5 (percent), loss (the negative log-likelihood; none where several classes may be right) and ece
        (percent); the standard errors over the images, of which ece has none."""
        n, accuracies = len(self.loss), {"top1": self.top1.mean(), "top5": self.top5.mean()}
        loss = self.loss.astype(np.float64)  # or its sum would be rounded to float32
        metrics = {name: 100 * p for name, p in accuracies.items()} | {"loss": loss.mean()}
        stderr = {name: 100 * np.sqrt(p * (1 - p) / n) for name, p in accuracies.items()}
        stderr["loss"] = loss.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
        if self.accepted is not None:
            del metrics["loss"], stderr["loss"]
        metrics["ece"] = calibration_error(np.exp(self.log_probs[:, 0]), self.top1)
        return {k: float(v) for k, v in metrics.items()}, {k: float(v) for k, v in stderr.items()}


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error in percent (Guo et al. 2017, arXiv 1706.04599): the mean over the images of how far
    the accuracy in an image's bin of confidence is from the mean confidence there.

    confidence: of the first class, float32 in 0..1 [n]. right: bool [n]. Bins are of equal width and hold their lower
    edge, a confidence of 1 has one of its own, as in torchmetrics.
    """
    edges = np.linspace(0, 1, bins + 1, dtype=np.float32)
    place = np.searchsorted(edges, confidence, side="right") - 1
    excess = np.bincount(place, weights=right.astype(np.float64) - confidence, minlength=bins + 1)
    return 100 * float(np.abs(excess).sum() / len(confidence))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    transform: nn.Module,
    normalization: Normalization,
    machine: Machine,
    label: str,
    kept: Sequence[int] | None = None,
    accepted: Sequence[Collection[int]] | None = None,
) -> Scores:
    """Score every image of a split exactly once, whatever the number of processes.

    transform: from `eval_transform`. normalization: the one the classifier was trained with.
    kept: only these logits compete (the 200 classes of ImageNet-A or -R); loss and ranks are over them.
    accepted: all classes that are right, for each image.
    """
    labels: Sequence[int] = split.labels
    if kept is not None:
        column = {label: i for i, label in enumerate(kept)}
        labels = [column[label] for label in split.labels]
    dataset = Images(split.files, transform, labels, pillow=True)
    rows = [
        score(logits if kept is None else logits[:, list(kept)], targets.to(logits.device))
        for logits, targets in outputs_of(model, dataset, normalization, machine, f"evaluate {label}")
    ]
    return collected(np.concatenate(distributed.gather_in_turn(rows)), split, label, kept, accepted)


def collected(
    found: np.ndarray,
    split: Split,
    label: str,
    kept: Sequence[int] | None = None,
    accepted: Sequence[Collection[int]] | None = None,
) -> Scores:
    """The rows of `score`, in the order of the split, as Scores; UserError if one is not finite. kept, accepted: as for
    `evaluate`."""
    loss, (classes, log_probs) = found[:, 0], np.hsplit(found[:, 1:], 2)
    if not np.isfinite(loss).all():
        raise UserError(f"{label}: the logits of {split.files[int(np.argmin(np.isfinite(loss)))]} are not finite")
    classes = classes.astype(np.int32)
    classes = classes if kept is None else np.array(kept, np.int32)[classes]
    truth = np.array(split.labels, np.int32)
    loss, log_probs = loss.astype(np.float32), log_probs.astype(np.float32)
    return Scores(names_of(split.files), truth, loss, classes, log_probs, accepted)


def score(logits: Tensor, targets: Tensor) -> np.ndarray:
    """[n, 1 + 2k]: cross-entropy, the classes of the k highest logits, their log-probabilities. k is 5; with fewer
    classes, their number."""
    loss = nn.functional.cross_entropy(logits, targets, reduction="none")
    values, classes = logits.topk(min(5, logits.shape[1]), dim=1)
    log_probs = values - logits.logsumexp(dim=1, keepdim=True)
    return torch.cat([loss[:, None].double(), classes.double(), log_probs.double()], dim=1).cpu().numpy()
