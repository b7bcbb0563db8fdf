"""A classifier that is ready: how its images are prepared, and its ViT."""

from dataclasses import dataclass

from mae_core.checkpoint import Checkpoint, classifier_of
from mae_core.errors import UserError
from mae_core.vit import ViT
from transfer.data.transforms import sides_of


@dataclass(frozen=True)
class EvalRecipe:
    """How images are prepared for a trained classifier. image_size 0: the size it was trained at.

    transform: "resize_crop", "center_crop" or "resize" (`sides_of`, which refuses any other).
    """

    image_size: int = 0
    transform: str = "resize_crop"

    def __post_init__(self) -> None:
        sides_of(self.image_size or 224, self.transform)


def trained_classifier(checkpoint: Checkpoint, image_size: int, device: str) -> tuple[ViT, int]:
    """The ViT of a checkpoint that has a head, and its input size. image_size 0: the size it was trained at."""
    if "head.weight" not in checkpoint.classifier:
        raise UserError(f"{checkpoint.name} is not a classifier: it has no head")
    vit = classifier_of(checkpoint, image_size)
    return vit.to(device), image_size or checkpoint.meta["image_size"]
