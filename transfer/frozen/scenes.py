"""Images with a class for each pixel, for what is trained on the patches of a frozen encoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_core.data import MEAN, Sample, seed_all
from mae_core.decode import UNREADABLE, opened, read_image
from mae_core.errors import UserError
from transfer.data import ade20k, voc
from transfer.task import Job

VOID = 255  # pixels that are neither trained on nor scored
TRIES = 10  # crops that are drawn until one class does not fill it
Pair = tuple[Path, Path]


@dataclass(frozen=True)
class SceneSet:
    """A set's reader, the folder below the data root, the number of its classes, and the first id that is one."""

    folder: str
    pairs: Callable[[Path, str], list[Pair]]
    classes: int
    first: int

    def of(self, job: Job, split: str) -> list[Pair]:
        return self.pairs(Path(job.data.root) / self.folder, split)[: job.data.limit or None]

    def label(self, file: Path) -> np.ndarray:
        """The classes [H, W], uint8 from 0, and VOID."""
        with opened(file) as picture:
            return np.asarray(picture, np.uint8) - np.uint8(self.first)  # ADE20K's 0 becomes 255


ADE20K = SceneSet(ade20k.FOLDER, ade20k.pairs, ade20k.CLASSES, 1)
VOC = SceneSet(voc.FOLDER, voc.pairs, voc.CLASSES, 0)


class Views:
    """Sample -> (uint8 [3, S, S], {"label": [S, S]}, unreadable file name or ""): the training views of DINOv3's linear
    segmentation. The short side is scaled to image_size times min_scale to max_scale; a crop is drawn in which no class
    has more than max_class_share of the labelled pixels, if ten draws find one; flip; photometric distortion; what the
    image does not fill has the mean colour and no class. All of it depends on seed and position alone."""

    def __init__(self, pairs: Sequence[Pair], scenes: SceneSet, recipe: Any, seed: int) -> None:
        self.pairs, self.scenes, self.recipe, self.seed = pairs, scenes, recipe, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor], str]:
        from torchvision.transforms import v2
        from torchvision.transforms.v2.functional import hflip, pad, pil_to_tensor, resize

        seed_all(self.seed, sample.position)
        (image_file, label_file), r = self.pairs[sample.index], self.recipe
        try:
            image = pil_to_tensor(read_image(image_file))
            label = torch.from_numpy(self.scenes.label(label_file))[None]
        except UNREADABLE:
            side = r.image_size
            black, void = torch.zeros(3, side, side, dtype=torch.uint8), torch.full((side, side), VOID)
            return black, {"label": void}, str(image_file)
        scale = r.min_scale + (r.max_scale - r.min_scale) * torch.rand(()).item()
        size = scaled((image.shape[1], image.shape[2]), int(r.image_size * scale))
        image = resize(image, size, v2.InterpolationMode.BILINEAR, antialias=True)
        label = resize(label, size, v2.InterpolationMode.NEAREST)
        image, label = crop(image, label, r.image_size, r.max_class_share)
        if torch.rand(()).item() < r.flip:
            image, label = hflip(image), hflip(label)
        image = distorted(image) if r.photometric else image
        right, below = r.image_size - image.shape[2], r.image_size - image.shape[1]
        image = pad(image, [0, 0, right, below], fill=[round(255 * mean) for mean in MEAN])
        return image, {"label": pad(label, [0, 0, right, below], fill=VOID)[0].long()}, ""


def scaled(size: tuple[int, int], short: int) -> list[int]:
    """The height and width of an image whose short side becomes `short`."""
    return [max(1, round(side * short / min(size))) for side in size]


def crop(image: Tensor, label: Tensor, side: int, share: float) -> tuple[Tensor, Tensor]:
    """A crop of at most side x side px of both, drawn as `Views` says."""
    height, width = label.shape[1:]
    for _ in range(TRIES):
        top, left = (int(torch.randint(0, max(0, length - side) + 1, ())) for length in (height, width))
        part = label[:, top : top + side, left : left + side]
        counts = torch.bincount(part[part != VOID].long())
        if counts.numel() and counts.max() < share * counts.sum() and (counts > 0).sum() > 1:
            break
    return image[:, top : top + side, left : left + side], part


def distorted(image: Tensor) -> Tensor:
    """An image uint8 [3, H, W] in other colours, as DINOv3's PhotoMetricDistortion makes them
    (dinov3/eval/segmentation/transforms.py): up to 32 brighter or darker, contrast about 0 and saturation times 0.5 to
    1.5, the hue turned by up to half its circle. Each happens in half the cases, in that order, but in half of them
    contrast comes last. Every step ends in whole numbers from 0 to 255, rounded down."""
    from torchvision.transforms.functional import adjust_hue, adjust_saturation

    def drawn(low: float, high: float) -> float:
        return low + (high - low) * torch.rand(()).item()

    def whole(values: Tensor) -> Tensor:
        return values.clamp(0, 255).to(torch.uint8)

    steps: list[Callable[[Tensor], Tensor]] = [
        lambda x: whole(x + drawn(-32, 32)),
        lambda x: adjust_saturation(x, drawn(0.5, 1.5)),
        lambda x: adjust_hue(x, drawn(-0.5, 0.5)),
    ]
    steps.insert(1 if drawn(0, 1) < 0.5 else 3, lambda x: whole(x * drawn(0.5, 1.5)))
    for step in steps:
        if drawn(0, 1) < 0.5:
            image = step(image)
    return image


def whole_image(file: Path, short: int) -> Tensor:
    """An image for the test: uint8 [3, H, W], its short side scaled, by Pillow (bilinear)."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    image = readable(file, read_image)
    height, width = scaled((image.height, image.width), short)
    return pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))


def readable(file: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of a test file; UserError if it cannot: no number is given over part of the data."""
    try:
        return read(file)
    except UNREADABLE as e:
        raise UserError(f"{file} cannot be read as an image ({e}): replace it") from None


def areas_of(predicted: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """[3, classes]: pixels in the intersection of prediction and label, in their union, and in the label. A predicted
    class of VOID is none."""
    scored = label != VOID
    predicted, label = predicted[scored], label[scored]
    counts = [
        np.bincount(part[part != VOID], minlength=classes) for part in (label[label == predicted], predicted, label)
    ]
    return np.stack([counts[0], counts[1] + counts[2] - counts[0], counts[2]])
