"""ImageNet-1k: its classes by WNID, the reader of its folders, and the check that it is complete and official."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mae_core.files import images_among, is_image, passed_over
from transfer.data.findings import Data, found, incomplete, missing, preview, unusable
from transfer.data.split import Files, Split, fingerprint, folders_of

VAL_NAME = "ILSVRC2012_val_"  # prefix of the official validation images' names
# ILSVRC 2012: classes, training and validation images (the counts that make data "official").
IMAGENET_COUNTS = {"classes": 1000, "train": 1281167, "val": 50000}
TRAIN_NAME = re.compile(r"(n\d{8})_\d+\.")  # the official training images' names


@cache
def wnids(which: str = "imagenet") -> tuple[str, ...]:
    """The WordNet ids of "imagenet" (1000, in label order), "imagenet_a" or "imagenet_r" (200 each), from a file of
    timm's, which need not be imported for it."""
    timm = find_spec("timm")
    assert timm is not None
    assert timm.origin is not None
    return tuple((Path(timm.origin).parent / "data" / "_info" / f"{which}_synsets.txt").read_text().split())


@cache
def columns(which: str) -> tuple[int, ...]:
    """Which of the 1000 logits the 200 classes of "imagenet_a" or "imagenet_r" are, in WNID order."""
    label = {wnid: i for i, wnid in enumerate(wnids())}
    return tuple(label[wnid] for wnid in sorted(wnids(which)))


BY_WNID = (
    "rename each to the WNID of its class (n01440764 is the tench; LOC_synset_mapping.txt of the Kaggle release lists "
    "all), or move it away"
)


def read_split(
    folder: Path,
    labels_of: Mapping[str, int] | None = None,
    others: Collection[str] = (),
    remedy: str = BY_WNID,
    like: Split | None = None,
) -> tuple[Split, list[str]]:
    """The images of folder/WNID/*, and the problems of the folder. Each folder is listed once.

    The label comes from the folder's name, never from its rank: a set of ten classes still means 1000 logits. All usual
    extensions in any case and names with spaces are found.
    labels_of: the labels of folders that are named otherwise. others: folders of the set that are passed over. remedy:
    what to do about a folder of another name. like: a split that may hold the same images in other folders, as the
    versions of ImageNet-C do; what is the same is shared with it: 75 times 50,000 names would fill half a GiB.
    """
    like = like or Split()
    known = {os.path.basename(path): names for path, names in folders_of(like.files)}
    label = labels_of or {wnid: i for i, wnid in enumerate(wnids())}
    folders: list[tuple[str, list[str]]] = []
    labels: list[int] = []
    strange: list[str] = []
    broken: list[str] = []
    empty: list[str] = []
    loose: list[str] = []
    nested: list[str] = []
    with os.scandir(folder) as listing:
        entries = sorted((e for e in listing if not passed_over(e.name)), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name in others:
            continue
        if not entry.is_dir():  # which asks the disk only for links
            (broken if entry.is_symlink() and entry.name in label else loose).append(entry.name)
        elif entry.name not in label:
            strange.append(entry.name)
        else:
            listed = os.listdir(entry.path)
            listed.sort()
            names = known.get(entry.name, ())
            if names != listed and (found := images_among(listed)) != names:
                names = found
            if len(names) < len(listed):
                rest = (name for name in listed if not is_image(name) and not passed_over(name))
                nested += [f"{entry.name}/{n}" for n in rest if os.path.isdir(f"{entry.path}/{n}")]
            folders.append((entry.path, names))
            labels += [label[entry.name]] * len(names)
            if not names:
                empty.append(entry.name)
    problems = misplaced(folder, loose, " named by WNID" if labels_of is None else "")
    if strange:
        what = "no ImageNet class" if labels_of is None else "none of its classes"
        problems.append(f"{folder} has folders that are {what}: {preview(strange)}; {remedy}")
    if broken:
        problems.append(f"{folder} has broken links for class folders: {preview(broken)}; link them to where they lie")
    if empty:
        problems.append(f"{folder} has class folders without an image: {preview(empty)}; fill or remove them")
    if nested:
        problems.append(
            f"{folder} has folders inside its class folders: {preview(nested)}; move their images out of them"
        )
    if not labels and not problems:
        problems.append(f"{folder} has no class folder with images in it: unpack the archive there")
    images = [names for _, names in folders], tuple(labels)
    same = images == ([names for _, names in folders_of(like.files)], like.labels)
    return Split(Files(folders), like.labels if same else images[1]), problems


def misplaced(folder: Path, names: list[str], named: str) -> list[str]:
    """The problems of files beside the class folders, which the official archives leave when unpacked."""
    images = [name for name in names if is_image(name)]
    archives = [name for name in names if re.fullmatch(r"n\d{8}\.tar", name)]
    problems = []
    if images:
        how = "move each into the folder of its class"
        if images[0].startswith(VAL_NAME):
            how = (
                "the official archive is flat; valprep.sh of soumith/imagenetloader.torch, run in there, moves each "
                "image into its class and holds the mapping; or torchvision.datasets.ImageNet unpacks it again, with "
                "the mapping from ILSVRC2012_devkit_t12.tar.gz"
            )
        problems.append(f"{len(images)} images lie in {folder} itself, not in class folders{named}: {how}")
    if archives:
        how = "for f in n*.tar; do mkdir -p ${f%.tar} && tar -xf $f -C ${f%.tar} && rm $f; done"
        problems.append(f"{folder} has {len(archives)} archives of classes, packed still; in there: {how}")
    return problems


def inspect_imagenet(root: Path) -> Data:
    """ImageNet-1k below root: imagenet/{train,val}/WNID/*."""
    folder = root / "imagenet"
    where = f"{folder}/train/WNID/*.JPEG and {folder}/val/WNID/*.JPEG"
    if not folder.is_dir():
        return missing(root, f"ImageNet must lie at {where}")
    if absent := [name for name in ("train", "val") if not (folder / name).is_dir()]:
        lacks = f"{folder} lacks {' and '.join(absent)}: ImageNet must lie at {where}"
        kaggle = folder / "ILSVRC" / "Data" / "CLS-LOC"
        lacks += f"; move or link the folders from {kaggle}, where Kaggle's archive has them" * kaggle.is_dir()
        return incomplete(root, lacks)
    (train, train_problems), (val, val_problems) = read_split(folder / "train"), read_split(folder / "val")
    problems = train_problems + val_problems
    if not problems and all(name.startswith(VAL_NAME) for name in train.names):
        problems.append(f"{folder}/train holds only validation images ({VAL_NAME}*): are train and val swapped?")
    if (unlearnt := without(train.classes, sorted(val.classes))) and not problems:
        problems.append(
            f"{folder}/val has classes that train lacks: {preview(unlearnt)}; add them there or take them out of val"
        )
    problems += unusable(train.files, "training images") + unusable(val.files, "validation images")
    if problems:
        return incomplete(root, *problems)
    counts = {"classes": len(train.classes), "train": len(train.files), "val": len(val.files)}
    further = named_otherwise(train, val)
    if untested := without(val.classes, sorted(train.classes)):
        further.insert(0, f"imagenet/val lacks {len(untested)} classes of train: {preview(untested)}")
    detail = f"{counts['classes']} classes, {counts['train']} train, {counts['val']} val"
    listing, chance = fingerprint(root, train, val), 100 / len(val.classes)
    return found(root, folder, detail, listing, counts, IMAGENET_COUNTS, without(train.classes), chance, further)


def inspect_imagenet_val(root: Path) -> Data:
    """Only the validation images of ImageNet-1k: imagenet/val/WNID/*."""
    folder = root / "imagenet" / "val"
    if not folder.is_dir():
        return missing(root, f"ImageNet's validation images must lie at {folder}/WNID/*.JPEG")
    val, problems = read_split(folder)
    problems += unusable(val.files, "validation images")
    if problems:
        return incomplete(root, *problems)
    counts = {"classes": len(val.classes), "val": len(val.files)}
    official = {name: IMAGENET_COUNTS[name] for name in counts}
    detail, chance = f"{counts['classes']} classes, {counts['val']} val", 100 / counts["classes"]
    absent, further = without(val.classes), named_otherwise(Split(), val)
    return found(root, folder, detail, fingerprint(root, val), counts, official, absent, chance, further)


def without(classes: frozenset[int], of: Iterable[int] = range(1000)) -> list[str]:
    """The WNIDs of those classes in `of` that are missing from `classes`."""
    return [wnids()[i] for i in of if i not in classes]


def named_otherwise(train: Split, val: Split) -> list[str]:
    """Findings from the official file names, which give an image's split and, for training, its class."""
    strange: list[str] = []
    seen: list[str] = []
    usual: dict[str, list[str]] = {"train": [], "val": []}
    odd: dict[str, list[tuple[str, int]]] = {"train": [], "val": []}
    for split, name, foreign in ((train, "train", "validation"), (val, "val", "training")):
        other, wrong = [], []
        for _, names, labels in split.by_folder():
            # All names of a class at once: one by one, a million take seconds.
            begin = VAL_NAME if name == "val" else rf"{wnids()[labels[0]]}_\d+\."
            if len(set(labels)) == 1 and re.fullmatch(rf"(?:{begin}[^\n]*\n)*", "\n".join([*names, ""])):
                usual[name] += names
            else:
                odd[name] += zip(names, labels)
        for file, label in odd[name]:
            of_class = TRAIN_NAME.match(file)
            if of_class if name == "val" else file.startswith(VAL_NAME):
                other.append(file)
            if of_class and of_class[1] != wnids()[label]:
                wrong.append(f"{wnids()[label]}/{file}")
            if of_class or file.startswith(VAL_NAME):
                seen.append(file)
        if other:
            strange.append(
                f"imagenet/{name}: {len(other)} images have names of ImageNet's {foreign} images: {preview(other)}"
            )
        if wrong:
            strange.append(f"imagenet/{name}: {len(wrong)} images are named for another class: {preview(wrong)}")
    # Usual names of training images begin with their class: two classes have none in common.
    seen += usual["val"] + (usual["train"] if any(odd.values()) else [])
    if len(set(seen)) < len(seen):
        twice = sorted(file for file, times in Counter(seen).items() if times > 1)
        strange.append(f"imagenet: {len(twice)} images are there twice, by their names: {preview(twice)}")
    return strange
