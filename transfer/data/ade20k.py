"""ADE20K (SceneParse150) on disk: what is there, and whether it is complete."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mae_core.decode import UNREADABLE, opened
from mae_core.errors import UserError
from mae_core.files import is_image, passed_over, walk
from transfer.data.findings import Data, found, incomplete, missing, preview, spread

FOLDER = "ADEChallengeData2016"
CLASSES = 150
OFFICIAL_COUNTS = {"train": 20210, "val": 2000}
SPLITS = {"train": "training", "val": "validation"}


def pairs(folder: Path, split: str) -> list[tuple[Path, Path]]:
    """(image, label file) of every image of a split, sorted by name; the label file need not exist."""
    images, labels = folder / "images" / SPLITS[split], folder / "annotations" / SPLITS[split]
    # Not glob, which would also find macOS's ._1.jpg.
    names = sorted(name for name in os.listdir(images) if name.endswith(".jpg") and not passed_over(name))
    return [(images / name, labels / f"{name.removesuffix('.jpg')}.png") for name in names]


def check_pair(image: Path, label: Path) -> bool:
    """Whether any pixel is labelled. UserError unless the whole image can be decoded and the label file has one channel
    of ids 0..150 and the image's size."""
    try:
        with opened(image) as picture:
            picture.load()  # OpenCV, mmsegmentation's reader, silently fills up a truncated file
            size = picture.size
    except UNREADABLE:
        raise UserError(f"{image} cannot be read as an image: replace it") from None
    try:
        with opened(label) as picture:
            mode, ids = picture.mode, np.asarray(picture)
    except UNREADABLE:
        raise UserError(f"{label} cannot be read as an image: replace it") from None
    if mode not in ("L", "P"):
        raise UserError(
            f"{label} is of mode {mode}, not one channel of 8 bits: labels are ids 0..{CLASSES}, as in the release "
            f"{FOLDER}, not colours; replace it"
        )
    if ids.shape != size[::-1]:
        raise UserError(
            f"{label} is {ids.shape[1]}x{ids.shape[0]} px, its image {image.name} {size[0]}x{size[1]}: replace one"
        )
    if ids.max() > CLASSES:
        raise UserError(f"{label} has the label {ids.max()}: labels must be 0 (none) to {CLASSES}; replace it")
    return bool(ids.any())


def inspect_ade20k(root: Path) -> Data:
    """ADE20K below root: ADEChallengeData2016/{images,annotations}/{training,validation}/*.{jpg,png}."""
    folder = root / FOLDER
    where = f"{folder}/{{images,annotations}}/{{training,validation}}/*.{{jpg,png}}"
    if not folder.is_dir():
        return missing(root, f"ADE20K must lie at {where}")
    folders = [f"{kind}/{name}" for kind in ("images", "annotations") for name in SPLITS.values()]
    absent = [name for name in folders if not (folder / name).is_dir()]
    if absent:
        return incomplete(root, f"{folder} lacks {' and '.join(absent)}: ADE20K must lie at {where}")
    listed = {split: pairs(folder, split) for split in SPLITS}
    problems = [problem for split, files in listed.items() for problem in problems_of(folder, split, files)]
    if problems:
        return incomplete(root, *problems)
    counts = {split: len(files) for split, files in listed.items()}
    digest = hashlib.sha256()
    above = os.path.join(root, "")
    for file in (str(file) for files in listed.values() for pair in files for file in pair):
        digest.update(f"{file.removeprefix(above)} {os.stat(file).st_size}\n".encode(errors="surrogateescape"))
    detail = f"{counts['train']} train, {counts['val']} val"
    return found(root, folder, detail, digest.hexdigest(), counts, OFFICIAL_COUNTS)


def problems_of(folder: Path, split: str, listed: Sequence[tuple[Path, Path]]) -> list[str]:
    """What is wrong with a split: no images, images of another kind or in folders, links to nothing, images without a
    label, or wrong labels in some pairs spread over it; the other pairs are checked as they are read."""
    images, labels = folder / "images" / SPLITS[split], folder / "annotations" / SPLITS[split]
    strange, folders, pipes, names = [], [], [], set()
    for kind in (images, labels):
        with os.scandir(kind) as entries:
            for entry in (entry for entry in entries if not passed_over(entry.name)):
                if entry.is_dir():
                    folders += [entry.path] if any(is_image(path.name) for path in walk(Path(entry.path))) else []
                elif not entry.is_file():
                    pipes.append(entry.path)
                elif kind == labels:
                    names.add(entry.name)
                elif is_image(entry.name) and not entry.name.endswith(".jpg"):
                    strange.append(entry.name)
    if strange:
        return [f"{images} has images that do not end in .jpg: {preview(sorted(strange))}"]
    if folders:
        return [f"{preview(sorted(folders))}: ADE20K's files lie flat; move the images of these folders out of them"]
    if pipes:
        return [f"{preview(sorted(pipes))}: broken links or no regular files; mend or delete them"]
    if not listed:
        return [f"{images} has no image *.jpg"]
    where = f"annotations/{SPLITS[split]}"
    if bare := [image.name for image, label in listed if label.name not in names]:
        return [f"{images} has {len(bare)} images without a label file in {where}: {preview(bare)}; unpack both again"]
    if lone := sorted(names - {label.name for _, label in listed}):
        where = f"{where} of {folder}"
        return [f"{where} has {len(lone)} labels without an image: {preview(lone)}; unpack both again"]
    looked, labelled, wrong = spread(len(listed)), False, []
    for number in looked:
        try:
            labelled |= check_pair(*listed[number])
        except UserError as e:
            wrong.append(str(e))
    if wrong:
        return [f"{len(wrong)} of {len(looked)} pairs looked at (of {len(listed)}) cannot be used: {preview(wrong, 2)}"]
    return [] if labelled else [f"{images}: no pixel of the label files has a label above 0; are they SceneParse150's?"]
