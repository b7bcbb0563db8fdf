"""A picture of predictions: image, prediction and ground truth of some validation images side by side."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from mae_core.writing import replacing
from transfer.data.ade20k import SPLITS

PICTURE_FILE = "predictions.png"
IMAGES, HEIGHT, TITLE = 8, 200, 18  # rows of the picture; height in px of a panel and of the title above it


def draw_predictions(
    rows: Sequence[tuple[Path, np.ndarray]], folder: Path, palette: Sequence[Sequence[int]], picture: Path
) -> None:
    """Write a PNG with one row per image: image | prediction | ground truth, classes in the palette's colours.

    rows: image file and predicted classes 0..149 [H, W]. Unlabelled pixels are black in the ground truth.
    """
    from torchvision.utils import make_grid, save_image

    colours = np.vstack([np.zeros((1, 3)), np.asarray(palette)]).astype(np.uint8)
    panels = []
    for image, prediction in rows:
        label = np.asarray(Image.open(folder / "annotations" / SPLITS["val"] / f"{image.stem}.png"))
        drawn = Image.fromarray(colours[prediction.astype(int) + 1]), Image.fromarray(colours[label])
        for panel in (Image.open(image).convert("RGB"), *drawn):
            width = round(panel.width * HEIGHT / panel.height)
            panels.append(panel.resize((width, HEIGHT), Image.Resampling.NEAREST))
    widest = max(panel.width for panel in panels)
    titles = cycle(("image", "prediction", "ground truth"))
    tiles = [titled(panel, title, widest) for panel, title in zip(panels, titles)]
    with replacing(picture) as temporary:
        save_image(make_grid(tiles, nrow=3, padding=6, pad_value=1.0), temporary, format="png")


def titled(panel: Image.Image, title: str, width: int) -> Tensor:
    """float [3, TITLE + HEIGHT, width] in 0..1: the panel below its title, on white."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    tile = Image.new("RGB", (width, TITLE + HEIGHT), "white")
    ImageDraw.Draw(tile).text((2, 3), title, fill="black")
    tile.paste(panel, (0, TITLE))
    return pil_to_tensor(tile) / 255
