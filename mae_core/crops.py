"""A random crop that is drawn from an image's size alone, so that only it need be decoded."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import v2


class Crop(v2.Compose):
    """uint8 [3, H, W] -> `crop`, a flip of half the images, then `rest`: all on tensors, as v2.Compose does it.

    range: lowest and highest share of the area and logarithms of the lowest and highest ratio, float32 [4], where the
    crop is torchvision's own and nothing follows that draws; None otherwise.
    """

    def __init__(self, crop: v2.RandomResizedCrop, *rest: Callable[[Tensor], Tensor]) -> None:
        super().__init__([crop, v2.RandomHorizontalFlip(), *rest])
        self.rest, (self.side, _) = rest, crop.size
        plain = not rest and type(crop) is v2.RandomResizedCrop
        self.range = torch.tensor([*crop.scale, *torch.tensor(crop.ratio).log().tolist()]) if plain else None

    def draw(self, width: int, height: int) -> tuple[int, int, int, int, int]:
        """Left, top, width, height and whether to flip, from torch's generator: what calling it would draw."""
        box = self.transforms[0].make_params([torch.empty(3, height, width, device="meta")])
        flip = bool(torch.rand(1) < self.transforms[1].p)
        return box["left"], box["top"], box["width"], box["height"], flip
