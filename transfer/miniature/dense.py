"""The miniature of COCO, ADE20K and VOC 2012: one set of generated crowded scenes in the official layouts.

    DIR/coco/{train2017,val2017}/%012d.jpg       DIR/coco/annotations/instances_{train,val}2017.json
    DIR/VOCdevkit/VOC2012/{JPEGImages,SegmentationClass}/2012_{train,val}%06d.{jpg,png}, ImageSets/Segmentation/
    DIR/ADEChallengeData2016/{images,annotations}/{training,validation}/ADE_{train,val}_%08d.{jpg,png}

Images have several sizes and shapes. Objects are six classes of scenes.py under the real datasets' ids; an id's real
meaning plays no part.
"""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from contourpy import contour_generator
from PIL import Image

from transfer.data.coco import CATEGORIES
from transfer.miniature.crowded_scenes import KINDS, SIZES, STUFF, CrowdedScene, crowded_scene, paint
from transfer.miniature.scenes import with_noise
from transfer.miniature.writer import Files, jpeg, rng_of, write_set

TRAIN, VAL = 300, 200
# COCO's ids around one of its gaps, 12.
COCO_IDS = dict(zip(KINDS, (9, 10, 11, 13, 14, 15)))
# ADE20K's ids of the regions' namesakes, and ids spread over 1..150 for the objects. What has no entry, the pebbles, is
# 0: unlabelled.
ADE_IDS = {"wall": 1, "sky": 3, "ground": 14} | {name: 15 + 27 * i for i, name in enumerate(KINDS)}

# First id and name of each of COCO's supercategories, which have consecutive ids.
SUPERCATEGORIES = {
    1: "person", 2: "vehicle", 10: "outdoor", 16: "animal", 27: "accessory", 34: "sports", 44: "kitchen", 52: "food",
    62: "furniture", 72: "electronic", 78: "appliance", 84: "indoor",
}  # fmt: skip


class Picture(NamedTuple):
    """A scene, its noisy image uint8 [H, W, 3], and what each pixel shows (`crowded_scenes.paint`), uint8 [H, W]."""

    scene: CrowdedScene
    image: np.ndarray
    owner: np.ndarray


@cache  # COCO and ADE20K show the same
def picture(seed: int, split: str, index: int) -> Picture:
    """Image `index` (from 0) of split "train" or "val", the same for both datasets."""
    rng = rng_of(seed, f"crowded/{split}", 0, index)
    scene = crowded_scene(*SIZES[index % len(SIZES)], rng)
    clean, owner = paint(scene)
    return Picture(scene, with_noise(clean, rng), owner)


def coco_categories() -> list[dict[str, Any]]:
    """All 80 categories as the official files list them."""
    return [
        {"supercategory": SUPERCATEGORIES[max(first for first in SUPERCATEGORIES if first <= id)], "id": id, "name": n}
        for id, n in CATEGORIES.items()
    ]


def polygons_of(mask: np.ndarray) -> list[list[float]]:
    """The outlines [x0, y0, x1, y1, ...] in px of a mask [H, W] without holes, one per connected part."""
    # The level between outside (0) and inside (1) runs along the pixels' borders; a frame of 0 closes every outline.
    outlines = contour_generator(z=np.pad(mask, 1).astype(float)).lines(0.5)
    return [np.round(np.asarray(line)[:-1] - 0.5, 2).ravel().tolist() for line in outlines]


def counts_of(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: pixels column by column, runs of 0 and 1 in turn, the first of 0."""
    changes = np.flatnonzero(np.diff(mask.T.ravel(), prepend=False))
    return np.diff(changes, prepend=0, append=mask.size).tolist()


def annotations_of(drawn: Picture, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO's annotations of an image: each object's visible pixels, and a crowd as one annotation of run lengths."""
    scene, first = drawn.scene, len(drawn.scene.regions)
    parts = [(thing.kind, drawn.owner == first + i, 0) for i, thing in enumerate(scene.objects) if i >= scene.crowd]
    if scene.crowd:
        together = (drawn.owner >= first) & (drawn.owner < first + scene.crowd)
        parts.append((scene.objects[0].kind, together, 1))
    found: list[dict[str, Any]] = []
    for kind, mask, crowd in parts:
        if kind not in COCO_IDS or not mask.any():
            continue
        rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
        corner = [int(columns[0]), int(rows[0])]
        found.append(
            {
                "segmentation": {"counts": counts_of(mask), "size": list(mask.shape)} if crowd else polygons_of(mask),
                "area": float(mask.sum()),
                "iscrowd": crowd,
                "image_id": image_id,
                "bbox": [*map(float, corner), float(columns[-1] - corner[0] + 1), float(rows[-1] - corner[1] + 1)],
                "category_id": COCO_IDS[kind],
                "id": first_id + len(found),
            }
        )
    return found


def _coco_files(seed: int) -> Files:
    for split, count, first in (("train", TRAIN, 1), ("val", VAL, TRAIN + 1)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            drawn, image_id = picture(seed, split, index), first + index
            name, (height, width) = f"{image_id:012d}.jpg", drawn.owner.shape
            images.append({"license": 1, "file_name": name, "height": height, "width": width, "id": image_id})
            annotations += annotations_of(drawn, image_id, 1 + len(annotations))
            yield f"{split}2017/{name}", jpeg(drawn.image)
        content = {
            "info": {"description": "generated miniature in COCO's format", "version": "1.0", "year": 2017},
            "licenses": [{"id": 1, "name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
            "images": images,
            "annotations": annotations,
            "categories": coco_categories(),
        }
        yield f"annotations/instances_{split}2017.json", json.dumps(content).encode()


def label_image(drawn: Picture) -> np.ndarray:
    """ADE20K's label image, uint8 [H, W]: 1..150, and 0 where nothing is labelled."""
    scene = drawn.scene
    kinds = [region.kind for region in scene.regions] + [thing.kind for thing in scene.objects]
    return np.array([ADE_IDS.get(kind, 0) for kind in kinds], np.uint8)[drawn.owner]


def _ade20k_files(seed: int) -> Files:
    for split, folder, count in (("train", "training", TRAIN), ("val", "validation", VAL)):
        for index in range(count):
            drawn, name = picture(seed, split, index), f"{folder}/ADE_{split}_{index + 1:08d}"
            label = io.BytesIO()
            Image.fromarray(label_image(drawn)).save(label, "PNG")
            yield f"images/{name}.jpg", jpeg(drawn.image)
            yield f"annotations/{name}.png", label.getvalue()


def voc_label(drawn: Picture) -> np.ndarray:
    """VOC's label image, uint8 [H, W]: objects are 1..6, regions the background 0, and 255 what has no class."""
    scene = drawn.scene
    kinds = [region.kind for region in scene.regions] + [thing.kind for thing in scene.objects]
    ids = dict.fromkeys(STUFF, 0) | {name: i for i, name in enumerate(KINDS, 1)}
    return np.array([ids.get(kind, 255) for kind in kinds], np.uint8)[drawn.owner]


def _voc_files(seed: int) -> Files:
    for split, count in (("train", TRAIN), ("val", VAL)):
        names = [f"2012_{split}{index + 1:06d}" for index in range(count)]
        for index, name in enumerate(names):
            drawn, label = picture(seed, split, index), io.BytesIO()
            image = Image.fromarray(voc_label(drawn))
            image.putpalette([64 * (i >> shift & 3) for i in range(256) for shift in (0, 2, 4)])
            image.save(label, "PNG")
            yield f"JPEGImages/{name}.jpg", jpeg(drawn.image)
            yield f"SegmentationClass/{name}.png", label.getvalue()
        yield f"ImageSets/Segmentation/{split}.txt", "".join(f"{name}\n" for name in names).encode()


def coco(root: Path, seed: int = 0) -> Path:
    """Write root/coco: 300 training and 200 validation images with boxes and masks. Returns that folder; what already
    lies there is treated as by `write_set`."""
    counts = {"train": TRAIN, "val": VAL, "annotation files": 2}
    return write_set(root, "coco", seed, counts, _coco_files(seed))


def ade20k(root: Path, seed: int = 0) -> Path:
    """Write root/ADEChallengeData2016: the same images with label images; otherwise as `coco`."""
    counts = {"train": TRAIN, "val": VAL, "label files": TRAIN + VAL}
    return write_set(root, "ADEChallengeData2016", seed, counts, _ade20k_files(seed))


def voc(root: Path, seed: int = 0) -> Path:
    """Write root/VOCdevkit/VOC2012: the same images with VOC's label images; otherwise as `coco`."""
    counts = {"train": TRAIN, "val": VAL, "label files": TRAIN + VAL, "lists": 2}
    return write_set(root / "VOCdevkit", "VOC2012", seed, counts, _voc_files(seed))
