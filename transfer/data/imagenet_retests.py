"""ImageNet's classes tested again: ImageNet-V2, new images, and ReaL, new labels of the validation images."""

import hashlib
import json
from functools import cache
from importlib import resources
from pathlib import Path

from transfer.data.findings import MINIATURE_MARKER, Data, found, incomplete, missing, preview, unusable
from transfer.data.imagenet import VAL_NAME, read_split, without, wnids
from transfer.data.split import Split, fingerprint

V2_FOLDERS = ("imagenetv2-matched-frequency-format-val", "imagenetv2/imagenetv2-matched-frequency-format-val")
V2_COUNTS = {"classes": 1000, "images": 10000}
# Of the 50,000 validation images, those that have a label (Beyer et al. 2020, arXiv 2006.07159).
REAL_COUNTS = {"classes": 1000, "images": 46837}
REAL_FILE = "imagenet-real/real.json"

Labels = tuple[tuple[int, ...], ...]  # of validation image 1, 2, ...: its classes, none or several


def v2_folder(root: Path) -> Path | None:
    return next((root / name for name in V2_FOLDERS if (root / name).is_dir()), None)


def read_v2(folder: Path) -> tuple[Split, list[str]]:
    """FOLDER/0 to FOLDER/999: the names are the classes' numbers."""
    return read_split(folder, {str(i): i for i in range(len(wnids()))}, remedy="its folders are 0 to 999; move it away")


def inspect_v2(root: Path) -> Data:
    """ImageNet-V2, matched frequency, below root."""
    folder = v2_folder(root)
    if folder is None:
        return missing(root, f"ImageNet-V2 must lie at {root / V2_FOLDERS[0]}/0..999/*, as its archive unpacks")
    split, problems = read_v2(folder)
    problems += unusable(split.files)
    if problems:
        return incomplete(root, *problems)
    counts = {"classes": len(split.classes), "images": len(split.files)}
    detail, chance = f"{counts['classes']} classes, {counts['images']} images", 100 / counts["classes"]
    absent = without(split.classes)
    return found(root, folder, detail, fingerprint(root, split), counts, V2_COUNTS, absent, chance)


def real_labels(root: Path) -> Labels:
    """Those of root/imagenet-real/real.json, the file of google-research/reassessed-imagenet, or timm's copy of it.
    ValueError if the file holds something else."""
    path = root / REAL_FILE
    if not path.exists():
        return shipped_labels()
    values = json.loads(path.read_bytes())
    if not isinstance(values, list) or not all(isinstance(classes, list) for classes in values):
        raise ValueError("not a list of lists")
    if strange := [c for classes in values for c in classes if type(c) is not int or not 0 <= c < len(wnids())]:
        raise ValueError(f"{str(strange[0])[:40]!r} is no class")
    return tuple(map(tuple, values))


@cache
def shipped_labels() -> Labels:
    values = json.loads((resources.files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    return tuple(map(tuple, values))


def number_of(file: Path) -> int:
    """ILSVRC2012_val_00000001.JPEG -> 1, or 0 for another name."""
    digits = file.stem.removeprefix(VAL_NAME)
    return int(digits) if file.name.startswith(VAL_NAME) and digits.isdecimal() else 0


def real_split(root: Path) -> tuple[Split, Labels]:
    """The validation images that have a label, and the classes of each: an image without any is not scored."""
    labels, (whole, _) = real_labels(root), read_split(root / "imagenet" / "val")
    pairs = [(f, c) for f, c in zip(whole.files, whole.labels) if labels[number_of(f) - 1]]
    split = Split(tuple(f for f, _ in pairs), tuple(c for _, c in pairs))
    return split, accepted_by(labels, split)


def accepted_by(labels: Labels, split: Split) -> Labels:
    return tuple(labels[number_of(file) - 1] for file in split.files)


def inspect_real(root: Path) -> Data:
    """ImageNet's validation images, by the names of which ReaL's labels go."""
    folder, file = root / "imagenet" / "val", root / REAL_FILE
    if not folder.is_dir():
        return missing(root, f"ImageNet's validation images must lie at {folder}/WNID/*.JPEG")
    if not file.exists() and (root / "imagenet" / MINIATURE_MARKER).exists():
        return missing(root, f"ReaL's labels are not the miniature's, which must lie at {file}")
    whole, problems = read_split(folder)
    problems += unusable(whole.files, "validation images")
    try:
        labels = real_labels(root)
    except (OSError, ValueError, RecursionError) as e:
        return incomplete(root, *problems, f"{file} is not reassessed-imagenet's real.json ({e}): get it again")
    if unnamed := [f.name for f in whole.files if not 0 < number_of(f) <= len(labels)]:
        problems.append(
            f"{folder} has {len(unnamed)} images that are not named {VAL_NAME}00000001.JPEG to "
            f"{VAL_NAME}{len(labels):08d}.JPEG, by which ReaL knows them: {preview(unnamed)}; name them so, or move "
            "them away"
        )
    if problems:
        return incomplete(root, *problems)
    split, accepted = real_split(root)
    if not split.files:
        return incomplete(root, f"{folder} has none of the images that have a label")
    counts = {"classes": len(split.classes), "images": len(split.files)}
    several = sum(len(classes) > 1 for classes in accepted)
    detail = f"{len(split.files)} of {len(whole.files)} images have a label, {several} several"
    listing = hashlib.sha256(f"{fingerprint(root, split)} {accepted}".encode()).hexdigest()
    chance = 100 * sum(map(len, accepted)) / len(accepted) / len(split.classes)
    return found(
        root, root / "imagenet", detail, listing, counts, REAL_COUNTS, without(split.classes), min(chance, 100.0)
    )
