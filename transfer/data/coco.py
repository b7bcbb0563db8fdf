"""COCO 2017 on disk: its 80 categories, the reader of its annotations, and the checks of what lies there."""

import hashlib
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as mask_util
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from mae_core.decode import UNREADABLE
from mae_core.errors import UserError
from transfer.data.findings import Data, found, incomplete, missing, preview

COUNTS = {"train": 118287, "val": 5000}  # images of COCO 2017
# Official id -> name; ten ids of 1..90 are unused. A category's label is its rank among all 80, 0..79, even if a file
# lists only some of them.
CATEGORIES = {
    i: name for i, name in enumerate(MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]) if i and name != "N/A"
}
IDS = tuple(CATEGORIES)
LABELS = {category: label for label, category in enumerate(IDS)}
SIZES_CHECKED = 100  # images whose header is compared with the json: all would take minutes on a slow disk


@dataclass(frozen=True)
class Example:
    """One image and its objects without crowds: boxes [n, 4] as x0, y0, x1, y1 in px, labels [n] 0..79, and one outline
    per object: a list of polygons, float64 x0, y0, x1, y1, ... in px, or a run-length encoding (pycocotools)."""

    file: str
    id: int
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    outlines: tuple[list[np.ndarray] | dict, ...]

    def masks(self) -> np.ndarray:
        """uint8 [n, height, width]."""
        if not self.outlines:
            return np.zeros((0, self.height, self.width), np.uint8)
        rles = [runs(outline, self.height, self.width) for outline in self.outlines]
        return np.ascontiguousarray(mask_util.decode(rles).transpose(2, 0, 1))


class Examples(Sequence[Example]):
    """Examples in one block of bytes, which forked workers share; Python objects would be copied page by page as they
    are touched."""

    def __init__(self, examples: Sequence[Example]) -> None:
        parts = [pickle.dumps(example, protocol=-1) for example in examples]
        self.ends = np.cumsum([len(part) for part in parts])
        self.block = np.frombuffer(b"".join(parts), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        start = self.ends[index - 1] if index else 0
        return pickle.loads(self.block[start : self.ends[index]].data)


@dataclass(frozen=True)
class Split:
    """One annotation file. examples: its images, in its order. clipped, dropped: numbers of boxes cut to their image,
    and of objects without area or valid outline. problems: why the file cannot be used. findings: differences to the
    official file."""

    examples: Examples
    objects: int
    clipped: int
    dropped: int
    problems: tuple[str, ...]
    sha256: str
    findings: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        changed = f"{self.clipped} boxes cut to their image" if self.clipped else ""
        changed += " and " * bool(self.clipped and self.dropped)
        changed += f"{self.dropped} objects of no area or without a valid outline left out" if self.dropped else ""
        return (f"of {self.objects} training objects {changed}",) if changed else ()


def annotation_file(root: Path, split: str) -> Path:
    return root / "coco" / "annotations" / f"instances_{split}2017.json"


def read_split(root: Path, split: str) -> Split:
    """The "train" or "val" images below root/coco. Nothing is raised for bad data: `problems` lists what is wrong."""
    path = annotation_file(root, split)
    return read_once(path, root / "coco" / f"{split}2017", path.stat().st_mtime_ns)


@cache
def read_once(path: Path, folder: Path, changed: int) -> Split:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    try:
        values = json.loads(content)
        images, annotations, categories = (list(values[k]) for k in ("images", "annotations", "categories"))
        # Everything that the readers access; pycocotools would do so only after the training.
        for image in images:
            image["id"], image["file_name"], range(image["height"]), range(image["width"])
        for category in categories:
            category["id"], category["name"]
        for entry in annotations:
            entry["id"], entry["image_id"], entry["category_id"], entry["iscrowd"], entry["segmentation"]
            float(entry["area"]), np.array(entry["bbox"], float).reshape(4)
    except (ValueError, KeyError, TypeError, IndexError) as e:
        problem = f"{path} is no file of COCO instances ({type(e).__name__}: {e}): unpack annotations_trainval2017.zip"
        return Split(Examples(()), 0, 0, 0, (problem,), digest)
    problems = wrong_categories(path, annotations, categories) + wrong_images(path, folder, images)
    if not annotations:
        problems.append(f"{path} has no annotations at all: test sets have none, take instances_{{train,val}}2017.json")
    elif all(a["iscrowd"] for a in annotations):
        problems.append(f"{path} has only crowds, no object")
    ids = {a["id"] for a in annotations}
    if len(ids) < len(annotations) or 0 in ids:  # pycocotools takes 0 for "not found"
        problems.append(f"{path}: its annotation ids are not distinct numbers from 1 on")
    known = {image["id"] for image in images}
    if strangers := [str(a["image_id"]) for a in annotations if a["image_id"] not in known]:
        problems.append(
            f"{path} has {len(strangers)} annotations of images that it does not list: {preview(strangers)}"
        )
    if not problems and folder.name.startswith("val"):
        problems += unscorable(path, annotations, {i["id"]: (i["height"], i["width"]) for i in images})
    if problems:
        return Split(Examples(()), len(annotations), 0, 0, tuple(problems), digest)
    by_image: dict[int, list[dict]] = {}
    for annotation in annotations:
        if not annotation["iscrowd"]:
            by_image.setdefault(annotation["image_id"], []).append(annotation)
    counts = {"clipped": 0, "dropped": 0}
    examples = [read_example(image, folder, by_image.get(image["id"], []), counts) for image in images]
    findings = unlike_official(path, folder, images, categories)
    return Split(Examples(examples), len(annotations), counts["clipped"], counts["dropped"], (), digest, findings)


def unscorable(path: Path, annotations: list[dict], sizes: dict[int, tuple[int, int]]) -> list[str]:
    """A sentence if pycocotools cannot read some outlines: its evaluation would fail after the training."""
    bad = []
    for annotation in annotations:
        outline, size = annotation["segmentation"], sizes[annotation["image_id"]]
        try:
            compressed = isinstance(outline, dict) and not isinstance(outline["counts"], list)
            mask_util.area(outline if compressed else mask_util.frPyObjects(outline, *size))
        except Exception:  # of any type
            bad.append(annotation["id"])
    if not bad:
        return []
    which = f"{len(bad)} of the {len(annotations)} objects of {path} have no valid outline"
    return [f"{which} (ids {preview(bad)}): nothing can be scored against them; unpack the file again or remove them"]


def wrong_categories(path: Path, annotations: list[dict], categories: list[dict]) -> list[str]:
    foreign = [f"{c['id']} '{c['name']}'" for c in categories if CATEGORIES.get(c["id"]) != c["name"]]
    foreign += [str(i) for i in sorted({str(a["category_id"]) for a in annotations if a["category_id"] not in LABELS})]
    return [f"{path} has categories that are not among COCO's 80: {preview(foreign)}"] if foreign else []


def unlike_official(path: Path, folder: Path, images: list[dict], categories: list[dict]) -> tuple[str, ...]:
    """Sentences on categories that the file lacks and images on disk that it does not list."""
    findings = []
    if absent := [CATEGORIES[i] for i in IDS if i not in {c["id"] for c in categories}]:
        findings.append(f"coco: {path.name} lacks {len(absent)} of the {len(IDS)} categories: {preview(absent)}")
    listed = {image["file_name"] for image in images}
    if extra := sorted(n for n in os.listdir(folder) if n.lower().endswith((".jpg", ".jpeg")) and n not in listed):
        findings.append(f"coco: {folder.name} has {len(extra)} images that {path.name} does not list: {preview(extra)}")
    return tuple(findings)


def wrong_images(path: Path, folder: Path, images: list[dict]) -> list[str]:
    if not images:
        return [f"{path} lists no images"]
    there = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [str(i["file_name"]) for i in images if i["file_name"] not in there]
    if missing:
        which = f"{len(missing)} of the {len(images)} images of {path.name}"
        return [f"{which} are not in {folder}: {preview(missing)}; unpack {folder.name}.zip there"]
    if repeated := len(images) - len({i["id"] for i in images}):
        return [f"{path} uses {repeated} image ids twice: give every image an id of its own"]
    problems = []
    for image in images[:: -(-len(images) // SIZES_CHECKED)]:
        try:
            with Image.open(folder / image["file_name"]) as opened:
                size = opened.size
        except UNREADABLE:
            problems.append(f"{folder / image['file_name']} cannot be read as an image: replace it")
            continue
        if size != (image["width"], image["height"]):
            said = f"{image['width']}x{image['height']}: take the images that it describes"
            problems.append(f"{folder / image['file_name']} is {size[0]}x{size[1]} px, {path.name} says {said}")
    return problems[:3]


def read_example(image: dict, folder: Path, annotations: list[dict], counts: dict[str, int]) -> Example:
    """Boxes are cut to the image, and objects without area or outline are dropped, as in detectron2; `counts` counts
    both."""
    height, width = image["height"], image["width"]
    boxes, labels, outlines = [], [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        box = np.array([x, y, x + w, y + h], np.float64)
        inside = box.clip(0, [width, height, width, height])
        outline = valid_outline(annotation["segmentation"], height, width)
        if outline is None or not np.isfinite(box).all() or (inside[2:] - inside[:2]).min() <= 0:
            counts["dropped"] += 1
            continue
        # Published boxes are rounded to 0.01 px and may reach out of the image by that.
        counts["clipped"] += bool(np.abs(inside - box).max() > 0.05)
        boxes.append(inside)
        labels.append(LABELS[annotation["category_id"]])
        outlines.append(outline)
    return Example(
        str(folder / image["file_name"]),
        image["id"],
        height,
        width,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(labels, np.int64),
        tuple(outlines),
    )


def valid_outline(segmentation: Any, height: int, width: int) -> list[np.ndarray] | dict | None:
    """Polygons without those that are none, or a compressed run-length encoding; None if the outline is invalid."""
    try:
        if isinstance(segmentation, dict):
            counts = segmentation["counts"]
            if list(segmentation["size"]) != [height, width] or not counts:
                return None
            if isinstance(counts, list):
                # Beyond the runs, pycocotools would leave memory uninitialised.
                return mask_util.frPyObjects(segmentation, height, width) if sum(counts) == height * width else None
            mask_util.decode(segmentation)  # ValueError if the runs are too long
            return segmentation
        polygons = [np.array(p, np.float64) for p in segmentation if len(p) % 2 == 0 and len(p) >= 6]
        return polygons if polygons and runs(polygons, height, width) else None
    except (TypeError, ValueError, KeyError):
        return None


def runs(outline: list[np.ndarray] | dict, height: int, width: int) -> dict:
    """The outline as one run-length encoding."""
    return outline if isinstance(outline, dict) else mask_util.merge(mask_util.frPyObjects(outline, height, width))


def inspect_coco(root: Path) -> Data:
    """COCO below root: coco/{train,val}2017/*.jpg and coco/annotations/instances_{train,val}2017.json."""
    base = root / "coco"
    where = f"{base}/{{train,val}}2017/*.jpg and {base}/annotations/instances_{{train,val}}2017.json"
    if not base.is_dir():
        return missing(root, f"COCO must lie at {where}")
    absent = [str(p) for split in ("train", "val") if not (p := annotation_file(root, split)).is_file()]
    if absent:
        return incomplete(root, f"{' and '.join(absent)} missing: COCO must lie at {where}")
    train, val = read_split(root, "train"), read_split(root, "val")
    problems = train.problems + val.problems
    if not problems and not training_examples(root):
        problems = (f"{annotation_file(root, 'train')} has no object to learn",)
    if problems:
        return incomplete(root, *problems)
    counts = {"train": len(train.examples), "val": len(val.examples)}
    detail = f"{counts['train']} train, {counts['val']} val images"
    digest = hashlib.sha256(f"{train.sha256} {val.sha256}".encode()).hexdigest()
    return found(root, base, detail, digest, counts, COUNTS, further=(*train.findings, *val.findings))


@cache
def training_examples(root: Path) -> Examples:
    """The training images that have at least one object; UserError if they cannot be read."""
    split = read_split(root, "train")
    if split.problems:
        raise UserError("; ".join(split.problems))
    return Examples([example for example in split.examples if len(example.labels)])
