"""PASCAL VOC 2012's segmentation set on disk: what is there, and whether it is complete."""

from pathlib import Path

import numpy as np

from mae_core.decode import UNREADABLE, opened
from mae_core.errors import UserError
from mae_core.files import leaves
from transfer.data.findings import Data, found, incomplete, listed_pairs, missing

FOLDER = "VOCdevkit/VOC2012"
CLASSES = 21  # the background is one
VOID = 255  # along the outlines, and objects that are too hard to tell: not scored
OFFICIAL_COUNTS = {"train": 1464, "val": 1449}


def pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, label file) of every image of "train" or "val", in the order of its official list. UserError for a name
    that leaves the folder."""
    file = folder / "ImageSets/Segmentation" / f"{split}.txt"
    names = file.read_text(encoding="utf-8").split()
    if outside := [name for name in names if leaves(name)]:
        raise UserError(f"{file} lists {outside[0][:60]!r}, which leaves its folder: unpack VOC 2012 again")
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
    except UserError as e:
        return incomplete(root, str(e))
    lists = {split: folder / f"ImageSets/Segmentation/{split}.txt" for split in listed}
    digest, problems = listed_pairs(root, folder, lists, listed, check_pair, "unpack VOC 2012 again")
    if problems:
        return incomplete(root, *problems)
    counts = {split: len(files) for split, files in listed.items()}
    detail = f"{counts['train']} train, {counts['val']} val"
    return found(root, folder, detail, digest, counts, OFFICIAL_COUNTS)
