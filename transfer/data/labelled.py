"""Labelled image sets other than ImageNet: iNaturalist, Places205 and Places365, your own folder.

Each is read as its official archives unpack. Labels are the official ones, however many classes are present.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from mae_core.files import is_image, leaving, passed_over, walk
from transfer.data.findings import Data, found, incomplete, missing, preview, unusable
from transfer.data.inat_json import annotation_file, read_annotations
from transfer.data.split import Files, Split, fingerprint, folders_of

NO_SPACE = bytes(set(range(256)) - set(b" \t\n\r\v\f\x1c\x1d\x1e\x1f"))  # of ASCII, as str.split takes it


@dataclass(frozen=True)
class Reading:
    """What was read of a set. classes: how many the classifier has, the official number if the set has one. problems:
    why it cannot be used. names: of the classes, where they are the user's."""

    train: Split
    val: Split
    classes: int
    problems: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledSet:
    """One set. counts: the official ones (classes, train and val images). folder: where it lies below the data root, if
    that is not its name."""

    name: str
    title: str
    counts: tuple[int, int, int]
    layout: str
    read: Callable[[Path], Reading]
    folder: str = ""

    def below(self, root: Path) -> Path:
        return root / (self.folder or self.name)


def inspect_set(known: LabelledSet, root: Path) -> Data:
    """The set below root."""
    folder = known.below(root)
    if not folder.is_dir():
        return missing(root, f"{known.title} must lie at {folder}/{known.layout}")
    reading = known.read(folder)
    if reading.problems:
        return incomplete(root, *reading.problems)
    train, val = reading.train, reading.val
    learnt = train.classes
    counts = {"classes": len(learnt), "train": len(train.files), "val": len(val.files)}
    # The user's own folder has no official counts.
    official = dict(zip(("classes", "train", "val"), known.counts)) if any(known.counts) else {}
    absent = [str(c) for c in range(reading.classes) if c not in learnt]
    untested = sorted(learnt - val.classes)
    lacks = f"{known.name}: validation lacks {len(untested)} classes of training: {preview(untested)}"
    detail = f"{counts['classes']} of {reading.classes} classes, {counts['train']} train, {counts['val']} val"
    listing, chance = fingerprint(root, train, val), 100 / len(val.classes)
    return found(root, folder, detail, listing, counts, official, absent, chance, [lacks] if untested else ())


def checked(folder: Path, train: Split, val: Split, classes: int, problems: Iterable[str]) -> Reading:
    """The reading, with the problems that any set may have: no images, missing files, labels out of range, images in
    both splits or twice in one, classes without training images."""
    all_problems = list(problems)
    for name, split, absent in zip(("training", "validation"), (train, val), missing_files(train, val)):
        if not split.files and not all_problems:
            all_problems.append(f"{folder} has no {name} images: unpack them there")
        if absent:
            of_all = f"{len(absent)} of the {len(split.files)} {name} images"
            all_problems.append(f"{of_all} are not there: {preview(absent)}; unpack their archive as it is")
        else:
            all_problems += unusable(split.files, f"{name} images")
        if strange := sorted(label for label in split.classes if not 0 <= label < classes):
            all_problems.append(f"{folder}: {name} labels outside 0..{classes - 1}: {preview(strange)}")
    once = {name: twice_in(split.files) for name, split in (("training", train), ("validation", val))}
    for name, (_, twice) in once.items():
        if twice:
            all_problems.append(f"{len(twice)} {name} images are listed twice: {preview(twice)}; keep one line of each")
    trained, tested = (listed for listed, _ in once.values())
    if both := sorted(f"{at}/{name}" for at in trained.keys() & tested.keys() for name in trained[at] & tested[at]):
        all_problems.append(f"{len(both)} images are in both splits of {folder}: {preview(both)}; keep each in one")
    if (unlearnt := sorted(val.classes - train.classes)) and not all_problems:
        all_problems.append(f"{folder}: validation has classes that training lacks: {preview(unlearnt)}")
    return Reading(train, val, classes, tuple(all_problems))


def listed_in(folder: Path, names: Sequence[str]) -> Files:
    """The files of these relative names, which are tidied up where they need it: to make Paths of millions takes a
    minute."""
    folders = Files.of(names).folders
    if any(inner != str(PurePosixPath(inner)) or "" in each or "." in each for inner, each in folders):
        folders = Files.of(str(PurePosixPath(name)) for name in names).folders
    return Files((f"{folder}/{inner}" if inner != "." else str(folder), each) for inner, each in folders)


def twice_in(files: Sequence[Path]) -> tuple[dict[str, set[str]], list[str]]:
    """The names by their folders, and the files that are listed more than once."""
    listed: dict[str, set[str]] = {}
    twice: dict[str, None] = {}  # in their order
    for folder, names in folders_of(files):
        known, fresh = listed.setdefault(folder, set()), set(names)
        if len(fresh) < len(names) or not known.isdisjoint(fresh):
            counted = Counter((*known.intersection(fresh), *names))
            twice |= {f"{folder}/{name}": None for name, count in counted.items() if count > 1}
        known |= fresh
    return listed, list(twice)


def missing_files(*splits: Split) -> list[list[str]]:
    """The files of each split that are not on disk. Each folder is listed once, though splits may share it: to ask for
    millions of files takes minutes."""
    wanted: dict[str, list[tuple[int, Sequence[str]]]] = {}
    for number, split in enumerate(splits):
        for folder, names in folders_of(split.files):
            wanted.setdefault(folder, []).append((number, names))
    absent: list[list[str]] = [[] for _ in splits]
    for folder, parts in wanted.items():
        there = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        for number, names in parts:
            if not there.issuperset(names):
                absent[number] += [f"{folder}/{name}" for name in names if name not in there]
    return absent


def read_inaturalist(folder: Path, year: int, classes: int) -> Reading:
    """FOLDER/{train,val}YEAR.json (2021: {train,val}.json), and the images at the `file_name`s given there. Until 2019
    both splits share one tree of folders, so only the json says which split an image is in; its label is the
    category_id of its annotation."""
    splits, problems = [], []
    for name in ("train", "val"):
        files, labels, wrong = read_annotations(folder / annotation_file(name, year))
        problems += wrong
        splits.append(Split(listed_in(folder, files), tuple(labels)))
    train, val = splits
    return checked(folder, train, val, classes, problems)


def read_list(path: Path, images: Path, problems: list[str]) -> Split:
    """A list of lines `relative/path label`; the path may begin with a slash, and the folders may be nested."""
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        problems.append(f"{path} is missing: unpack the archive that holds it")
        return Split()
    except UnicodeDecodeError:
        problems.append(f"{path} is no text: unpack the list from its archive")
        return Split()
    words = text.split()
    names, labels = words[::2], words[1::2]
    lines = [] if two_words_a_line(content, len(words)) else text.splitlines()
    if lines:
        parted = [line.rpartition(" ") for line in lines]
        names, labels = [file.strip() for file, _, _ in parted], [label for _, _, label in parted]
    if text.startswith("/") or "\n/" in text or lines:
        names = [name.lstrip("/") for name in names]
    distinct = set(labels)
    odd = {label for label in distinct if not label.isdecimal() or len(label) > 9}
    if odd or not all(names):
        number = next(i for i, (name, label) in enumerate(zip(names, labels)) if not name or label in odd)
        line = text.splitlines()[number]
        problems.append(f"{path}, line {number + 1}, is not `path label`: {line[:60]!r}")
        return Split()
    if ".." in text and (outside := leaving(names)):
        number = names.index(outside[0])
        line = text.splitlines()[number]
        problems.append(f"{path}, line {number + 1}, leaves the folder of the images: {line[:60]!r}")
        return Split()
    numbers = {label: int(label) for label in distinct}
    return Split(listed_in(images, names), tuple(map(numbers.__getitem__, labels)))


def two_words_a_line(content: bytes, words: int) -> bool:
    """Whether each line of a text of so many words is two words with one space between them."""
    if not content.isascii():  # it may have other spaces
        return False
    between = content.translate(None, NO_SPACE)
    whole = len(between) + len(between) % 2 == words and between == (b" \n" * words)[: len(between)]
    return whole and not content.startswith(b" ") and b"\n " not in content and b" \n" not in content


def first_of(folder: Path, names: tuple[str, ...]) -> Path:
    """The first that exists, else the first name, for the message that it is missing."""
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def read_places365(folder: Path) -> Reading:
    """Places365-Standard; the 256 px images if both sizes are present."""
    problems: list[str] = []
    lists = ("", "filelist_places365-standard/")
    train_list = first_of(folder, tuple(f"{d}places365_train_standard.txt" for d in lists))
    val_list = first_of(folder, tuple(f"{d}places365_val.txt" for d in lists))
    train = read_list(train_list, first_of(folder, ("data_256_standard", "data_large_standard")), problems)
    # Validation images lie flat in one folder: their list gives only names.
    val = read_list(val_list, first_of(folder, ("val_256", "val_large")), problems)
    return checked(folder, train, val, 365, problems)


def read_places205(folder: Path) -> Reading:
    """Places205; both lists are relative to one folder of images."""
    problems: list[str] = []
    images = first_of(folder, ("data/vision/torralba/deeplearning/images256", "images256"))
    lists = first_of(folder, ("trainvalsplit_places205", "."))
    train, val = (read_list(lists / f"{name}_places205.csv", images, problems) for name in ("train", "val"))
    return checked(folder, train, val, 205, problems)


def read_folder(folder: Path) -> Reading:
    """FOLDER/{train,val}/CLASS, images at any depth, as torchvision's ImageFolder takes them: the label is the rank of
    the class's name among those of train. Or the lists FOLDER/{train,val}.txt."""
    if (folder / "train.txt").is_file() and not (folder / "train").is_dir():
        return read_lists(folder)
    problems, splits = [], []
    labels: dict[str, int] = {}
    seen: dict[Path, Path] = {}  # the real folder of a class of train -> the class
    for part in (folder / "train", folder / "val"):
        if not part.is_dir():
            problems.append(f"{part} is missing: images must lie at {folder}/{{train,val}}/CLASS/*.jpg")
            splits.append(Split())
            continue
        names = sorted(name for name in os.listdir(part) if not passed_over(name))
        if loose := [name for name in names if is_image(name)]:
            problems.append(f"{len(loose)} images lie in {part} itself, not in folders of classes: {preview(loose)}")
        if broken := [name for name in names if (part / name).is_symlink() and not (part / name).exists()]:
            problems.append(f"{part} has broken links: {preview(broken)}; mend or remove them")
        found = {
            name: sorted(f for f in walk(part / name) if is_image(f.name)) for name in names if (part / name).is_dir()
        }
        if empty := [name for name, files in found.items() if not files]:
            problems.append(f"{part} has folders without an image: {preview(empty)}; fill or remove them")
        if part.name == "train":
            labels = {name: label for label, name in enumerate(found)}
            seen = {(part / name).resolve(): part / name for name in found}
        elif same := [name for name in found if (part / name).resolve() in seen]:
            where = seen[(part / same[0]).resolve()]
            problems.append(f"{part / same[0]} is the same folder as {where}: keep images of their own for validation")
        if foreign := [name for name in found if name not in labels]:
            problems.append(f"{part} has classes that train lacks: {preview(foreign)}; add them there or remove them")
        pairs = [(file, labels[name]) for name, files in found.items() if name in labels for file in files]
        splits.append(Split(tuple(file for file, _ in pairs), tuple(label for _, label in pairs)))
    if len(labels) == 1:
        problems.append(f"{folder} has the one class {next(iter(labels))}: every guess would be right")
    train, val = splits
    return replace(checked(folder, train, val, len(labels), problems), names=tuple(labels))


def read_lists(folder: Path) -> Reading:
    """FOLDER/train.txt and FOLDER/val.txt with lines `path label`, the path relative to FOLDER, labels from 0."""
    problems: list[str] = []
    train, val = (read_list(folder / f"{name}.txt", folder, problems) for name in ("train", "val"))
    classes = max(train.classes, default=-1) + 1
    if gaps := sorted(set(range(classes)) - train.classes):
        problems.append(f"{folder}/train.txt has no image of the labels {preview(gaps)}: number the classes from 0 on")
    if classes == 1:
        problems.append(f"{folder}/train.txt has one label only: every guess would be right")
    return checked(folder, train, val, classes, problems)


def inaturalist(year: int, classes: int, train: int, val: int) -> LabelledSet:
    images = "train_val_images/SUPERCATEGORY/CATEGORY" if year == 2017 else f"train_val{year}/SUPERCATEGORY/ID"
    images = images if year < 2021 else "{train,val}/SPECIES"
    layout = f"{{{annotation_file('train', year)}, {annotation_file('val', year)}, {images}/*.jpg}}"
    read = partial(read_inaturalist, year=year, classes=classes)
    return LabelledSet(f"inat{year}", f"iNaturalist {year}", (classes, train, val), layout, read)


PLACES205_LAYOUT = "{trainvalsplit_places205/{train,val}_places205.csv, data/vision/torralba/deeplearning/images256/*}"
PLACES365_LAYOUT = "{places365_train_standard.txt, places365_val.txt, data_256_standard/*, val_256/*}"
# Counts: visipedia/inat_comp; the Places365 devkit; for Places205, two sources that agree.
SETS = (
    inaturalist(2017, 5089, 579184, 95986),
    inaturalist(2018, 8142, 437513, 24426),
    inaturalist(2019, 1010, 265213, 3030),
    LabelledSet("places205", "Places205", (205, 2448873, 20500), PLACES205_LAYOUT, read_places205),
    LabelledSet("places365", "Places365-Standard", (365, 1803460, 36500), PLACES365_LAYOUT, read_places365),
)
INAT2021 = inaturalist(2021, 10000, 2686843, 100000)  # visipedia/inat_comp 2021
