"""The evaluation of a classifier: one loop, one way to count."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mae_core import distributed
from mae_core.checkpoint import Checkpoint, classifier_of
from mae_core.data import Images, Normalization, loader, normalize
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.progress import Progress
from mae_core.vit import ViT
from transfer.classification.transforms import eval_transform
from transfer.data.split import Split


@dataclass(frozen=True)
class EvalRecipe:
    """How a trained classifier is shown its images. image_size 0: the size it was trained at.

    transform: "resize_crop", "center_crop" or "resize" (transforms.py, eval_transform, which refuses others).
    """

    image_size: int = 0
    transform: str = "resize_crop"

    def __post_init__(self) -> None:
        eval_transform(self.image_size or 224, self.transform)


@dataclass(frozen=True)
class Scores:
    """Per image, in the order of the data: cross-entropy [n], correct at 1 and at 5 [n]."""

    loss: np.ndarray
    top1: np.ndarray
    top5: np.ndarray

    def metrics(self) -> tuple[dict[str, float], dict[str, float]]:
        """top1, top5 (percent) and loss, and the standard error of each over the images."""
        n = len(self.loss)
        metrics = {"top1": 100 * self.top1.mean(), "top5": 100 * self.top5.mean(), "loss": self.loss.mean()}
        stderr = {
            k: 100 * np.sqrt(p * (1 - p) / n) for k, p in (("top1", self.top1.mean()), ("top5", self.top5.mean()))
        }
        stderr["loss"] = self.loss.std(ddof=1) / np.sqrt(n) if n > 1 else 0.0
        return {k: float(v) for k, v in metrics.items()}, {k: float(v) for k, v in stderr.items()}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    transform: nn.Module,
    normalization: Normalization,
    machine: Machine,
    label: str,
    kept: Sequence[int] | None = None,
) -> Scores:
    """Score every image of a split exactly once, whatever the number of processes.

    transform: as eval_transform's. normalization: of the classifier's images.
    kept: only these logits compete (the 200 classes of ImageNet-A or -R); loss and ranks are then over them.
    """
    size = machine.micro_batch or 128
    batches = distributed.local_batches(len(split.files), size)
    progress = Progress(f"evaluate {label}", len(split.files), enabled=distributed.is_main())
    place = {c: i for i, c in enumerate(kept)} if kept is not None else None
    labels = [place[c] for c in split.labels] if place is not None else split.labels
    model.eval()
    rows: list[np.ndarray] = []
    unreadable: list[str] = []
    dataset = Images(split.files, transform, labels, pillow=True)
    for number, (images, targets, bad) in enumerate(loader(dataset, batches, machine.workers, machine.device)):
        if bad:
            unreadable = bad
            break
        logits = forward(model, images, normalization, machine)
        if kept is not None:
            logits = logits[:, list(kept)]
        rows.append(score(logits, targets.to(logits.device)))
        progress.update(min(len(split.files), (number + 1) * size * distributed.world_size()), len(images))
    # Every process hears of a bad file and stops with the others: one that stopped alone would fall out of step.
    if bad := [name for names in distributed.gather_to_all(unreadable) for name in names]:
        raise UserError(f"{bad[0]} cannot be read as an image: replace it; no number is given over part of the data")
    loss, top1, top5 = np.concatenate(distributed.gather_in_turn(rows)).T
    if not np.isfinite(loss).all():
        raise UserError(f"{label}: the logits of {split.files[int(np.argmin(np.isfinite(loss)))]} are not finite")
    return Scores(loss, top1.astype(bool), top5.astype(bool))


def forward(model: nn.Module, images: Tensor, normalization: Normalization, machine: Machine) -> Tensor:
    """Logits in float32 of uint8 images, normalised; out of GPU memory tries again in halves."""
    try:
        images = images.to(machine.device, non_blocking=True)
        with machine.autocast():
            return model(normalize(images, normalization)).float()
    except torch.OutOfMemoryError:
        if len(images) == 1:
            raise
    torch.cuda.empty_cache()
    return torch.cat([forward(model, half, normalization, machine) for half in images.chunk(2)])


def score(logits: Tensor, targets: Tensor) -> np.ndarray:
    """[n, 3]: cross-entropy, right at 1, right at 5 (or at all, with fewer classes)."""
    loss = nn.functional.cross_entropy(logits, targets, reduction="none")
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
    return torch.stack([loss.double(), ranked[:, 0].double(), ranked.any(dim=1).double()], dim=1).cpu().numpy()


def trained_classifier(checkpoint: Checkpoint, image_size: int, device: str) -> tuple[ViT, int]:
    """The ViT of a checkpoint with a head, ready to evaluate, and its input size (0: the one it was trained at)."""
    if "head.weight" not in checkpoint.classifier:
        raise UserError(f"{checkpoint.name} is no classifier: it has no head")
    vit = classifier_of(checkpoint, image_size)
    return vit.to(device), image_size or checkpoint.meta["image_size"]
