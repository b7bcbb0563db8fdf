"""A COCO tree of a few small images whose every object is known, for the tests of the reader, the metrics and the
detectors."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

# Official id -> name, with the gaps of 1..90.
NAMES = {
    i: name
    for i, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
    if i and name != "N/A"
}  # fmt: skip
COLOURS = {1: (230, 30, 30), 18: (30, 210, 60), 44: (40, 60, 230), 90: (230, 220, 40)}  # of what is painted
FIRST_ID = {"train": 100, "val": 900}
SIZES = ((64, 48), (48, 64), (56, 56), (64, 64))  # (width, height), in turn


def rectangle(image: int, category: int, x: float, y: float, w: float, h: float, **changes: Any) -> dict[str, Any]:
    """One object: a box of w x h px at (x, y), as a polygon, on the image of that id."""
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, w, h],
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
        **changes,
    }


def runs(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths of a mask [H, W], counted pixel by pixel."""
    counts, last = [0], 0
    for pixel in mask.T.ravel().tolist():
        if pixel != last:
            counts.append(0)
            last = pixel
        counts[-1] += 1
    return {"counts": counts, "size": list(mask.shape)}


def crowd(image: int, category: int, mask: np.ndarray, **changes: Any) -> dict[str, Any]:
    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()]
    found = rectangle(image, category, *map(float, box))
    return {**found, "area": float(mask.sum()), "iscrowd": 1, "segmentation": runs(mask), **changes}


def write_split(
    root: Path, split: str, sizes: Sequence[tuple[int, int]], annotations: Sequence[dict], **content: Any
) -> Path:
    """Noise images of those (width, height) with ids from FIRST_ID on, objects of COLOURS painted on them, and their
    json, whose path comes back. content: what the json has in place of the usual."""
    folder, path = root / "coco" / f"{split}2017", root / "coco" / "annotations" / f"instances_{split}2017.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    images = []
    for i, (width, height) in enumerate(sizes):
        image_id = FIRST_ID[split] + i
        pixels = np.random.default_rng(image_id).normal(128, 12, (height, width, 3))
        for a in annotations:
            if a.get("image_id") == image_id and a.get("category_id") in COLOURS and np.isfinite(a["bbox"]).all():
                x, y, w, h = (int(v) for v in a["bbox"])
                pixels[max(y, 0) : y + h, max(x, 0) : x + w] = COLOURS[a["category_id"]]
        name = f"{image_id:012d}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name, quality=95)
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
    content = {
        "images": images,
        "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
        "categories": [{"id": i, "name": name, "supercategory": "thing"} for i, name in NAMES.items()],
        **content,
    }
    path.write_text(json.dumps(content))
    return path


def write_coco(root: Path, train: int = 8, val: int = 3) -> Path:
    """root/coco with one to two painted objects an image, one crowd in the first of either split; returns root."""
    for split, count in (("train", train), ("val", val)):
        sizes, annotations = [SIZES[i % len(SIZES)] for i in range(count)], []
        for i in range(count):
            image = FIRST_ID[split] + i
            annotations.append(rectangle(image, list(COLOURS)[i % 4], 4 + i % 3, 6, 20, 24))
            if i % 2:
                annotations.append(rectangle(image, list(COLOURS)[(i + 1) % 4], 28, 20, 16, 16 + i % 3))
        mask = np.zeros(sizes[0][::-1], np.uint8)
        mask[36:44, 40:60] = 1
        write_split(root, split, sizes, [*annotations, crowd(FIRST_ID[split], 1, mask)])
    return root


def change(path: Path, **content: Any) -> None:
    """Rewrite the json with that content in place of its own."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
