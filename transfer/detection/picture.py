"""A picture of detections: a grid of validation images with boxes, masks, classes and scores."""

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from pycocotools import mask as mask_util
from torch import Tensor
from torch.nn import functional as F

from mae_core.decode import read_image
from mae_core.writing import replacing
from transfer.data.coco import CATEGORIES, LABELS, Example

PICTURE_FILE = "predictions.png"
IMAGES, SIDE, SHOWN_SCORE, SHOWN = 16, 320, 0.3, 12
# One colour per class; steps of the golden angle keep neighbouring labels apart.
COLOURS = tuple(f"hsl({int(label * 137.508) % 360}, 90%, 45%)" for label in range(len(CATEGORIES)))


@cache
def font() -> str:
    """The file of the one that matplotlib brings along."""
    import matplotlib  # late, as everywhere

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


def draw_predictions(examples: Sequence[Example], results: Path, picture: Path) -> None:
    """Write a PNG of the first images, each with its detections of at least SHOWN_SCORE (at most SHOWN, best first)."""
    from torchvision.utils import make_grid, save_image

    found = defaultdict(list)
    for entry in json.loads(results.read_text(encoding="utf-8")):
        if entry["score"] >= SHOWN_SCORE:
            found[entry["image_id"]].append(entry)
    tiles = [draw(examples[i], found[examples[i].id]) for i in range(min(IMAGES, len(examples)))]
    with replacing(picture) as temporary:
        save_image(make_grid(tiles, nrow=4, padding=6, pad_value=1.0), temporary, format="png")


def draw(example: Example, entries: list[dict]) -> Tensor:
    """float [3, SIDE, SIDE] in 0..1: the image fitted into the square, on white."""
    from torchvision.transforms import v2
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    image = read_image(example.file)
    ratio = SIDE / max(image.size)
    width, height = (max(1, round(side * ratio)) for side in image.size)
    tile = v2.functional.pil_to_tensor(image.resize((width, height), Image.Resampling.BICUBIC))
    entries = sorted(entries, key=lambda entry: -entry["score"])[:SHOWN]
    if entries:
        labels = [LABELS[entry["category_id"]] for entry in entries]
        colours = [ImageColor.getrgb(COLOURS[label]) for label in labels]
        masks = torch.from_numpy(mask_util.decode([entry["segmentation"] for entry in entries])).permute(2, 0, 1)
        masks = v2.functional.resize(masks, [height, width], v2.InterpolationMode.NEAREST).bool()
        boxes = torch.tensor([entry["bbox"] for entry in entries]) * ratio
        boxes[:, 2:] += boxes[:, :2]
        texts = [f"{CATEGORIES[entry['category_id']]} {entry['score']:.2f}" for entry in entries]
        for mask, colour in zip(masks, colours):  # one by one: drawn together, torchvision skips their overlaps
            tile = draw_segmentation_masks(tile, mask[None], alpha=0.45, colors=[colour])
        tile = draw_bounding_boxes(
            tile,
            boxes,
            texts,
            colors=colours,
            width=2,
            font=font(),
            font_size=11,
            label_colors="white",
            fill_labels=True,
        )
    square = F.pad(tile, (0, SIDE - width, 0, SIDE - height), value=255)
    if not entries:  # else the picture would look as if drawing had failed
        image = v2.functional.to_pil_image(square)
        text = f"no detection of {SHOWN_SCORE} or more"
        ImageDraw.Draw(image).text(
            (4, SIDE - 16), text, "black", ImageFont.truetype(font(), 11), stroke_width=2, stroke_fill="white"
        )
        square = v2.functional.pil_to_tensor(image)
    return square / 255
