"""Transforms of a classifier's images: augmentation in training, one view in evaluation."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from mae_core.data import IMAGENET_NORMALIZATION, Normalization
from mae_core.settings import choose

if TYPE_CHECKING:
    from torchvision.transforms import v2


def posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep that many bits of each channel; 0 gives black.

    RandAugment asks for 0 bits when its random magnitude reaches 10. Pillow made that black when MAE was fine-tuned,
    and has refused it since version 13.
    """
    return ImageOps.posterize(image, bits) if bits >= 1 else Image.new(image.mode, image.size)


def train_transform(
    image_size: int, min_scale: float, rand_augment: str, normalization: Normalization = IMAGENET_NORMALIZATION
) -> "v2.Compose":
    """Fine-tuning's augmentation of uint8 tensors: random resized crop (bicubic), flip, and timm's RandAugment, whose
    operations are Pillow's, on the crop. Random erasing follows normalisation, in train.py. rand_augment: timm's
    string, or "" for none. normalization: its mean fills the borders that RandAugment's shifts open."""
    from timm.data import create_transform
    from torchvision.transforms import InterpolationMode, v2

    from mae_core.crops import Crop

    crop = v2.RandomResizedCrop(image_size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    rest: list[Callable] = []
    if rand_augment:
        _, augment, _ = create_transform(
            image_size,
            is_training=True,
            color_jitter=None,  # type: ignore[arg-type]  # timm's default, missing from its annotation
            auto_augment=rand_augment,
            interpolation="bicubic",
            mean=normalization[0],
            separate=True,
        )
        for operation in getattr(augment.transforms[0], "ops", ()):  # AutoAugment has no `ops`, nor this operation
            if operation.name == "PosterizeIncreasing":
                operation.aug_fn = posterize
        rest = [v2.ToPILImage(), augment, v2.PILToTensor()]
    return Crop(crop, *rest)


def probe_transform(image_size: int, min_scale: float) -> "v2.Compose":
    """The linear probe's augmentation of uint8 tensors: loop-free random resized crop (bicubic) and flip."""
    from torchvision.transforms import InterpolationMode

    from mae_core.crops import Crop
    from transfer.data.loop_free_crop import LoopFreeCrop

    crop = LoopFreeCrop(image_size, scale=(min_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    return Crop(crop)


def whole_transform(image_size: int) -> "v2.Resize":
    """A uint8 tensor stretched to [3, image_size, image_size], bicubic."""
    from torchvision.transforms import InterpolationMode, v2

    return v2.Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC)


def eval_transform(image_size: int, how: str = "resize_crop", border: int = 0) -> "v2.Compose":
    """One view of an image for evaluation: a PIL image -> uint8 [3, image_size, image_size]. Pillow resizes, as for the
    published numbers: torchvision's resize of tensors would change up to 0.4 % of the pixels, by 1 or 2.

    "resize_crop": short side to 256/224 of the size (to the size itself above 224 px), bicubic, then centre crop, as
    the official evaluation does. "center_crop": only the centre crop. "resize": short side to the size, bicubic, then
    centre crop; an image of that size stays as it is. "stretch": both sides to the size, bicubic. UserError for another
    name. border: px that are cut off each side first.
    """
    from torchvision.transforms import InterpolationMode, v2

    sides = sides_of(image_size, how)
    steps: list = [v2.CenterCrop(image_size), v2.PILToTensor()]
    if sides is not None:
        steps.insert(0, v2.Resize(sides, interpolation=InterpolationMode.BICUBIC))
    if border:
        steps.insert(0, v2.Lambda(partial(ImageOps.crop, border=border)))
    return v2.Compose(steps)


def sides_of(image_size: int, how: str) -> int | tuple[int, int] | None:
    """The short side, or both, to which `eval_transform` resizes; None if it does not. UserError for another name."""
    # int, not round: the official evaluation truncates (48 px: 54.86 -> 54).
    resized: dict[str, int | tuple[int, int] | None] = {
        "resize_crop": int(image_size * 256 / 224) if image_size <= 224 else image_size,
        "center_crop": None,
        "resize": image_size,
        "stretch": (image_size, image_size),
    }
    return choose("transform", how, resized)
