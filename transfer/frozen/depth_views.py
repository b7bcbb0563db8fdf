"""Images with a depth for each pixel, as a head is trained on them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mae_core.data import Sample, seed_all
from mae_core.decode import UNREADABLE, read_image
from transfer.data import nyu
from transfer.frozen.scenes import Pair, scaled

KINECT = (480, 640)  # px, of NYU's images
TRAINED = (slice(45, 472), slice(43, 608))  # what of those is trained on, rows and columns: BTS's crop


class DepthViews:
    """Sample -> (uint8 [3, S, S], {"label": metres [S, S], 0 where unknown}, unreadable file name or ""): BTS's views
    for NYU: without the white border, turned a little, cropped, flipped, with other colours. All of it depends on seed
    and position alone. An image with a side below image_size is scaled up to it."""

    def __init__(self, pairs: Sequence[Pair], recipe: Any, seed: int) -> None:
        self.pairs, self.recipe, self.seed = pairs, recipe, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor], str]:
        from torchvision.transforms import v2
        from torchvision.transforms.v2.functional import hflip, pil_to_tensor, rotate

        seed_all(self.seed, sample.position)
        (image_file, depth_file), r = self.pairs[sample.index], self.recipe
        try:
            image = pil_to_tensor(read_image(image_file))
            depth = torch.from_numpy(nyu.read_depth(depth_file))[None]
        except UNREADABLE:
            shape = r.image_size, r.image_size
            return torch.zeros(3, *shape, dtype=torch.uint8), {"label": torch.zeros(shape)}, str(image_file)
        if tuple(depth.shape[1:]) == KINECT:
            image, depth = image[:, *TRAINED], depth[:, *TRAINED]
        image, depth = at_least(image, depth, r.image_size)
        if r.rotate and torch.rand(()).item() < 0.5:
            degrees = r.rotate * (2 * torch.rand(()).item() - 1)
            image, depth = rotate(image, degrees, v2.InterpolationMode.BILINEAR), rotate(depth, degrees)
        top, left = (int(torch.randint(0, length - r.image_size + 1, ())) for length in depth.shape[1:])
        place = slice(top, top + r.image_size), slice(left, left + r.image_size)
        image, depth = image[:, *place], depth[:, *place]
        if torch.rand(()).item() < r.flip:
            image, depth = hflip(image), hflip(depth)
        return recoloured(image) if r.colour else image, {"label": depth[0]}, ""


def at_least(image: Tensor, depth: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Both scaled up where the short side is below `side`; depths are those of the nearest pixel."""
    from torchvision.transforms import v2
    from torchvision.transforms.v2.functional import resize

    height, width = depth.shape[1:]
    if min(height, width) >= side:
        return image, depth
    size = scaled((height, width), side)
    return resize(image, size, v2.InterpolationMode.BILINEAR), resize(depth, size, v2.InterpolationMode.NEAREST)


def recoloured(image: Tensor) -> Tensor:
    """In half the cases: a gamma of 0.9 to 1.1, brightness times 0.75 to 1.25, each channel times 0.9 to 1.1."""
    if torch.rand(()).item() < 0.5:
        return image
    gamma, brightness = 0.9 + 0.2 * torch.rand(()), 0.75 + 0.5 * torch.rand(())
    channels = 0.9 + 0.2 * torch.rand(3, 1, 1)
    return (255 * ((image / 255) ** gamma * brightness * channels).clamp(0, 1)).round().to(torch.uint8)
