"""PASCAL VOC 2012's segmentation set on disk: what is there, and whether it is complete."""

import hashlib
from pathlib import Path

import numpy as np

from mae_core.decode import UNREADABLE, opened
from mae_core.errors import UserError
from transfer.data.findings import Data, found, incomplete, missing, preview, spread

FOLDER = "VOCdevkit/VOC2012"
CLASSES = 21  # the background is one
VOID = 255  # along the outlines, and objects that are too hard to tell: not scored
OFFICIAL_COUNTS = {"train": 1464, "val": 1449}


def pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, label file) of every image of "train" or "val", in the order of its official list."""
    names = (folder / "ImageSets/Segmentation" / f"{split}.txt").read_text(encoding="utf-8").split()
    return [(folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationClass" / f"{name}.png") for name in names]


def check_pair(image: Path, label: Path) -> None:
    """UserError unless both can be decoded, have one size, and the label file has one channel of ids 0..20 and 255."""
    try:
        with opened(image) as picture:
            picture.load()
            size = picture.size
        with opened(label) as picture:
            mode, ids = picture.mode, np.asarray(picture)
    except UNREADABLE as e:
        raise UserError(f"{image} or its label {label} cannot be read as an image ({e}): replace it") from None
    if mode not in ("L", "P"):
        raise UserError(f"{label} is of mode {mode}, not one channel of ids: take SegmentationClass as it is released")
    if ids.shape != size[::-1]:
        raise UserError(f"{label} is {ids.shape[1]}x{ids.shape[0]} px, its image {size[0]}x{size[1]}: replace one")
    if (wrong := ids[(ids >= CLASSES) & (ids != VOID)]).size:
        raise UserError(f"{label} has the label {wrong.max()}: they are 0 to {CLASSES - 1}, or {VOID}; replace it")


def inspect_voc(root: Path) -> Data:
    """VOC 2012 below root: VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}."""
    folder = root / FOLDER
    where = f"{folder}/{{JPEGImages,SegmentationClass}}/, and ImageSets/Segmentation/{{train,val}}.txt"
    if not folder.is_dir():
        return missing(root, f"VOC 2012 must lie at {where}")
    needed = ("JPEGImages", "SegmentationClass", *(f"ImageSets/Segmentation/{split}.txt" for split in OFFICIAL_COUNTS))
    if absent := [name for name in needed if not (folder / name).exists()]:
        return incomplete(root, f"{folder} lacks {' and '.join(absent)}: VOC 2012 must lie at {where}")
    try:
        listed = {split: pairs(folder, split) for split in OFFICIAL_COUNTS}
    except UnicodeDecodeError:
        return incomplete(root, f"a list in {folder}/ImageSets/Segmentation is no text: unpack it again")
    digest, problems = hashlib.sha256(), []
    for split, files in listed.items():
        absent = [path.name for pair in files for path in pair if not path.is_file()]
        if absent or not files:
            what = f"{len(absent)} files that are not there: {preview(absent)}" if absent else "no image"
            problems.append(f"{folder}/ImageSets/Segmentation/{split}.txt lists {what}; unpack VOC 2012 again")
            continue
        for number in spread(len(files)):
            try:
                check_pair(*files[number])
            except UserError as e:
                problems.append(str(e))
        for file in (file for pair in files for file in pair):
            digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode(errors="surrogateescape"))
    if problems:
        return incomplete(root, *problems)
    counts = {split: len(files) for split, files in listed.items()}
    detail = f"{counts['train']} train, {counts['val']} val"
    return found(root, folder, detail, digest.hexdigest(), counts, OFFICIAL_COUNTS)
