"""Lists of few training images of ImageNet: the 1 % and 10 % of SimCLR, and 1, 2 and 5 images a class of MSN.

    DIR/imagenet_subsets/{1percent,10percent}.txt        google-research/simclr imagenet_subsets
    DIR/imagenet_subsets{1,2,3}/{1,2,5}imgs_class.txt    facebookresearch/msn: three splits

A line is a file's name, n01440764_10026.JPEG. Seed 0, 1 or 2 is MSN's first, second or third split.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transfer.data.findings import Data, found, incomplete, missing, preview, unusable
from transfer.data.imagenet import TRAIN_NAME, read_split, without, wnids
from transfer.data.labelled import missing_files
from transfer.data.split import Split, fingerprint
from transfer.task import Task


@dataclass(frozen=True)
class Subset:
    """lists: of each split, where its list may lie below the data root. per_class: how many images a class has, 0 if
    that differs. images: the official number."""

    name: str
    title: str
    lists: tuple[tuple[str, ...], ...]
    images: int
    per_class: int = 0

    def list_of(self, root: Path, seed: int) -> Path:
        """Of the only split, or of split number `seed`."""
        places = [root / name for name in self.lists[seed if len(self.lists) > 1 else 0]]
        return next((path for path in places if path.is_file()), places[0])


def shots(count: int) -> Subset:
    folders = [f"imagenet_subsets{split}" for split in (1, 2, 3)]
    # MSN's third list of five images a class is called 3imgs_class.txt.
    lists = tuple(
        tuple(f"{folder}/{n}imgs_class.txt" for n in ((5, 3) if (count, folder[-1]) == (5, "3") else (count,)))
        for folder in folders
    )
    title = f"{count} image{'s' * (count > 1)} a class"
    return Subset(f"{count}shot", title, lists, count * len(wnids()), count)


SUBSETS = (
    Subset("1pct", "1 % of the images", (("imagenet_subsets/1percent.txt",),), 12811),
    Subset("10pct", "10 % of the images", (("imagenet_subsets/10percent.txt",),), 128116),
    *map(shots, (1, 2, 5)),
)
FINETUNED = "imagenet_finetune_"  # the tasks' names begin so


def subset_of(task: Task) -> Subset | None:
    """The list that a task fine-tunes on, if it is one of them."""
    return next((subset for subset in SUBSETS if task.name == FINETUNED + subset.name), None)


def read_subset(root: Path, subset: Subset, seed: int) -> tuple[Split, list[str]]:
    """The images of a list, in its order, and what is wrong with it."""
    path, label = subset.list_of(root, seed), {wnid: i for i, wnid in enumerate(wnids())}
    try:
        names = path.read_text(encoding="utf-8-sig").split()
    except UnicodeDecodeError:
        return Split(), [f"{path} is no text: get the list again"]
    known = [TRAIN_NAME.match(name) for name in names]
    if wrong := [n for n, match in zip(names, known) if not match or match[1] not in label or Path(n).name != n]:
        return Split(), [f"{path} lists what is no training image of ImageNet: {preview(wrong)}; get the list again"]
    wnid = [match[1] for match in known if match]
    files = tuple(root / "imagenet" / "train" / w / name for w, name in zip(wnid, names))
    problems = []
    if not names:
        problems.append(f"{path} is empty: get the list again")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        problems.append(f"{path} lists {len(twice)} images twice: {preview(twice)}; get the list again")
    odd = {w: n for w, n in Counter(wnid).items() if subset.per_class and n != subset.per_class}
    if odd:
        some = preview([f"{n} of {w}" for w, n in odd.items()])
        problems.append(f"{path} does not list {subset.title}: {some}; get the list again")
    if absent := missing_files(Split(files))[0]:
        what = f"{path} lists {len(absent)} images that are not there: {preview(absent)}"
        problems.append(f"{what}; unpack ImageNet's training images again")
    return Split(files, tuple(label[w] for w in wnid)), problems


def inspect_subset(subset: Subset, root: Path) -> Data:
    """The subset's lists, their images below root/imagenet/train, and the validation images."""
    folder = root / "imagenet"
    if absent := [name for name in ("train", "val") if not (folder / name).is_dir()]:
        return missing(root, f"ImageNet must lie at {folder}/{{train,val}}/WNID/*.JPEG: {' and '.join(absent)} lack")
    places = [subset.list_of(root, seed) for seed in range(len(subset.lists))]
    if lost := [path for path in places if not path.is_file()]:
        return missing(root, f"the list of {subset.title} must lie at {preview(lost)}, as its authors publish it")
    readings = [read_subset(root, subset, seed) for seed in range(len(subset.lists))]
    val, problems = read_split(folder / "val")
    problems = [problem for _, wrong in readings for problem in wrong] + problems
    train = readings[0][0]
    if (unlearnt := without(train.classes, sorted(val.classes))) and not problems:
        problems.append(f"{folder}/val has classes that {places[0]} lacks: {preview(unlearnt)}; take them out of val")
    problems += unusable(train.files, "training images") + unusable(val.files, "validation images")
    if problems:
        return incomplete(root, *problems)
    counts = {"classes": len(train.classes), "train": len(train.files), "val": len(val.files)}
    official = {"classes": len(wnids()), "train": subset.images, "val": 50000}
    detail = f"{counts['train']} listed images of {counts['classes']} classes, {counts['val']} val"
    listing = fingerprint(root, *(split for split, _ in readings), val)
    return found(root, folder, detail, listing, counts, official, without(train.classes), 100 / len(val.classes))


def seed_objection(subset: Subset, seed: int) -> tuple[tuple[str, str], ...]:
    if len(subset.lists) == 1 or seed < len(subset.lists):
        return ()
    return (("--seed", f"seed {seed}, but there are three lists of {subset.title}: give seeds 0, 1 and 2"),)
