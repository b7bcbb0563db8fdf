"""ImageNet-1k on disk: whether it is there, whole and the official one."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transfer.data.findings import Data, against_official, label_of, some, unusable
from transfer.data.split import VAL_NAME, Split, fingerprint, read_split, wnids

# ILSVRC 2012: classes, training and validation images (the counts that make data "official").
IMAGENET_COUNTS = {"classes": 1000, "train": 1281167, "val": 50000}
TRAIN_NAME = re.compile(r"(n\d{8})_\d+\.")  # of the official training images


def look_imagenet(root: Path) -> Data:
    """ImageNet-1k below root: imagenet/{train,val}/WNID/*."""
    folder = root / "imagenet"
    where = f"{folder}/train/WNID/*.JPEG and {folder}/val/WNID/*.JPEG"
    if not folder.is_dir():
        return Data(str(root), "missing", f"no data: ImageNet must lie at {where}")
    absent = [name for name in ("train", "val") if not (folder / name).is_dir()]
    if absent:
        lacks = f"{folder} lacks {' and '.join(absent)}: ImageNet must lie at {where}"
        kaggle = folder / "ILSVRC" / "Data" / "CLS-LOC"
        lacks += f"; move or link the folders from {kaggle}, where Kaggle's archive has them" * kaggle.is_dir()
        return Data(str(root), "incomplete", lacks)
    (train, train_problems), (val, val_problems) = read_split(folder / "train"), read_split(folder / "val")
    problems = train_problems + val_problems
    if not problems and all(f.name.startswith(VAL_NAME) for f in train.files):
        problems.append(f"{folder}/train holds validation images alone ({VAL_NAME}*): are train and val swapped?")
    unlearnt = sorted(wnids()[i] for i in val.classes - train.classes)
    if unlearnt and not problems:
        problems.append(
            f"{folder}/val has classes that train lacks: {some(unlearnt)}; add them there or take them out of val"
        )
    problems += unusable(train.files, "training images") + unusable(val.files, "validation images")
    if problems:
        return Data(str(root), "incomplete", "; ".join(problems))
    counts = {"classes": len(train.classes), "train": len(train.files), "val": len(val.files)}
    label, findings = label_of(folder, counts, IMAGENET_COUNTS), ()
    if label != "miniature":
        findings = against_official("imagenet", counts, IMAGENET_COUNTS, without(train.classes))
        if untested := sorted(wnids()[i] for i in train.classes - val.classes):
            findings += (f"imagenet/val lacks {len(untested)} classes of train: {some(untested)}",)
        findings += named_otherwise(train, val)
    return Data(
        str(root),
        "found",
        f"{counts['classes']} classes, {counts['train']} train, {counts['val']} val",
        label,
        fingerprint(root, train, val),
        counts,
        100 / len(val.classes),
        findings,
    )


def look_imagenet_val(root: Path) -> Data:
    """The validation images of ImageNet-1k alone: imagenet/val/WNID/*."""
    folder = root / "imagenet" / "val"
    if not folder.is_dir():
        return Data(str(root), "missing", f"no data: ImageNet's validation images must lie at {folder}/WNID/*.JPEG")
    val, problems = read_split(folder)
    problems += unusable(val.files, "validation images")
    if problems:
        return Data(str(root), "incomplete", "; ".join(problems))
    counts = {"classes": len(val.classes), "val": len(val.files)}
    official = {name: IMAGENET_COUNTS[name] for name in counts}
    detail = f"{counts['classes']} classes, {counts['val']} val"
    label, findings = label_of(root / "imagenet", counts, official), ()
    if label != "miniature":
        findings = against_official("imagenet/val", counts, official, without(val.classes))
        findings += named_otherwise(Split((), ()), val)
    return Data(str(root), "found", detail, label, fingerprint(root, val), counts, 100 / counts["classes"], findings)


def without(classes: frozenset[int], of: Iterable[int] = range(1000)) -> list[str]:
    """The WNIDs of the classes that are not there."""
    return [wnids()[i] for i in of if i not in classes]


def named_otherwise(train: Split, val: Split) -> tuple[str, ...]:
    """Findings from the official file names, which tell each image's split, and the class of a training image."""
    found, seen = [], Counter()
    for split, name, foreign in ((train, "train", "validation"), (val, "val", "training")):
        names, other, wrong = [file.name for file in split.files], [], []
        for file, label in zip(names, split.labels):
            of_class = TRAIN_NAME.match(file)
            if of_class if name == "val" else file.startswith(VAL_NAME):
                other.append(file)
            if of_class and of_class[1] != wnids()[label]:
                wrong.append(f"{wnids()[label]}/{file}")
            if of_class or file.startswith(VAL_NAME):
                seen[file] += 1
        if other:
            found.append(
                f"imagenet/{name}: {len(other)} images have names of ImageNet's {foreign} images: {some(other)}"
            )
        if wrong:
            found.append(f"imagenet/{name}: {len(wrong)} images are named for another class: {some(wrong)}")
    if twice := sorted(file for file, times in seen.items() if times > 1):
        found.append(f"imagenet: {len(twice)} images are there twice, by their names: {some(twice)}")
    return tuple(found)
