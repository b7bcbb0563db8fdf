"""COCO 2017 on disk: its 80 categories, the reader of its annotations, and the checks of what lies there."""

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mae_core.decode import UNREADABLE, opened
from mae_core.errors import UserError
from mae_core.files import is_image, open_regular
from transfer.data.coco_json import NOTHING, PARTS, RUNS, Content, Example, are_runs, content_of, valid_outline
from transfer.data.findings import Data, found, incomplete, missing, preview

COUNTS = {"train": 118287, "val": 5000}  # images of COCO 2017
# Official id -> name; ten ids of 1..90 are unused. A category's label is its rank among all 80, 0..79, even if a file
# lists only some of them.
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign",
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella",
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard",
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange",
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv",
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase",
    "scissors, teddy bear, hair drier, toothbrush",
)
CATEGORIES = dict(zip((i for i in range(1, 91) if i not in UNUSED), ", ".join(NAMES).split(", "), strict=True))
IDS = tuple(CATEGORIES)
LABELS = {category: label for label, category in enumerate(IDS)}
SIZES_CHECKED = 100  # images whose header is compared with the json: all would take minutes on a slow disk


class Examples(Sequence[Example]):
    """The images of a file, in its order, made one by one as they are asked for. All is kept in arrays and, once `hold`
    was called, in the file's bytes, which forked workers share; Python objects would be copied page by page as they are
    touched."""

    def __init__(self, content: Content, folder: Path, kept: np.ndarray, image_of: np.ndarray) -> None:
        """kept: the annotations that count; image_of: the image of each annotation."""
        ids, names, heights, widths = zip(*content.images)
        self.ids, self.heights, self.widths = (np.array(values) for values in (ids, heights, widths))
        self.names, self.folder, self.content = np.array([os.fsencode(name) for name in names]), folder, content
        objects = np.flatnonzero(kept)
        self.objects = objects[np.argsort(image_of[objects], kind="stable")]  # image by image
        self.first = np.searchsorted(image_of[self.objects], np.arange(len(ids) + 1))
        self.rows = np.arange(len(ids))  # of the images that are shown
        self.boxes = inside_image(content, image_of)[1][self.objects].astype(np.float32)
        self.labels = np.array([LABELS.get(c, -1) for c in content.category_ids], np.int64)[self.objects]

    def with_objects(self) -> "Examples":
        """Only the images that have an object."""
        some = copy.copy(self)
        some.rows = np.flatnonzero(np.diff(self.first))
        return some

    def few(self, limit: int) -> "Examples":
        """Only the first `limit` images; all for 0."""
        some = copy.copy(self)
        some.rows = self.rows[: limit or None]
        return some

    @property
    def files(self) -> list[str]:
        return [str(self.folder / os.fsdecode(self.names[image])) for image in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]  # no slices
        image = self.rows[range(len(self))[index]]
        height, width = int(self.heights[image]), int(self.widths[image])
        objects = slice(self.first[image], self.first[image + 1])
        outlines = map(self.content.segmentation, self.objects[objects])
        return Example(
            str(self.folder / os.fsdecode(self.names[image])),
            int(self.ids[image]),
            height,
            width,
            self.boxes[objects],
            self.labels[objects],
            tuple(valid_outline(segmentation, height, width) for segmentation in outlines),
        )


@dataclass(frozen=True)
class Split:
    """One annotation file. examples: its images, in its order. clipped: number of boxes cut to their image. dropped:
    ids of the objects without area or valid outline. parts: ids of those of whose outlines a part is no polygon.
    problems: why the file cannot be used. findings: differences to the official file."""

    examples: "Examples | tuple[()]"
    objects: int
    clipped: int
    dropped: tuple[int, ...]
    parts: tuple[int, ...]
    problems: tuple[str, ...]
    sha256: str
    findings: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        dropped, parts = (f"(ids {preview(ids)})" for ids in (self.dropped, self.parts))
        changes = [
            f"{self.clipped} boxes cut to their image" * bool(self.clipped),
            f"{len(self.dropped)} objects of no area or without a valid outline left out {dropped}"
            * bool(self.dropped),
            f"parts of {len(self.parts)} outlines left out that are no polygons {parts}" * bool(self.parts),
        ]
        changed = " and ".join(change for change in changes if change)
        return (f"of {self.objects} training objects {changed}",) if changed else ()


def annotation_file(root: Path, split: str) -> Path:
    return root / "coco" / "annotations" / f"instances_{split}2017.json"


def read_split(root: Path, split: str) -> Split:
    """The "train" or "val" images below root/coco. Nothing is raised for bad data: `problems` lists what is wrong."""
    path = annotation_file(root, split)
    return read_once(path, root / "coco" / f"{split}2017", path.stat().st_mtime_ns)


@cache
def read_once(path: Path, folder: Path, changed: int) -> Split:
    file = open_regular(path)
    split = split_of(path, folder, file)
    if not split.examples:  # whose outlines are read from it later
        file.close()
    return split


def split_of(path: Path, folder: Path, file: BinaryIO) -> Split:
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
    try:
        content = content_of(file, digest)
    except (ValueError, KeyError, RecursionError) as e:
        what = f"{type(e).__name__}: {e}" if isinstance(e, KeyError) else e
        problem = f"{path} is no file of COCO instances ({what}): unpack annotations_trainval2017.zip"
        return Split((), 0, 0, (), (), (problem,), digest)
    objects = len(content.ids)
    ids, image_ids, crowds = (np.array(column) for column in (content.ids, content.image_ids, content.crowds))
    problems = wrong_categories(path, content) + wrong_images(path, folder, content.images)
    if not objects:
        problems.append(f"{path} has no annotations at all: test sets have none, take instances_{{train,val}}2017.json")
    elif strange := preview(sorted(set(content.crowds) - {0, 1})):
        problems.append(f"{path} has {strange} as iscrowd, which must be 0 or 1")
    elif crowds.all():
        problems.append(f"{path} has only crowds, no object")
    if not np.diff(np.sort(ids)).all() or 0 in ids:  # pycocotools takes 0 for "not found"
        problems.append(f"{path}: its annotation ids are not distinct numbers from 1 on")
    image_of, known = places_in([image[0] for image in content.images], image_ids)
    if strangers := image_ids[~known].tolist():
        which = f"{path} has {len(strangers)} annotations of images that it does not list"
        problems.append(f"{which}: {preview(strangers)}")
    if problems:
        return Split((), objects, 0, (), (), tuple(problems), digest)
    valid, partial = outlines_of(content, image_of)
    if folder.name.startswith("val") and (problems := unscorable(path, content, valid & ~partial)):
        return Split((), objects, 0, (), (), tuple(problems), digest)
    boxes, inside = inside_image(content, image_of)
    with np.errstate(invalid="ignore"):
        there = np.isfinite(boxes).all(1) & (inside[:, 2:] - inside[:, :2] > 0).all(1)
        # Published boxes are rounded to 0.01 px and may reach out of the image by that.
        cut = np.abs(inside - boxes).max(1) > 0.05
    kept = (crowds == 0) & valid & there
    dropped, parts = ids[(crowds == 0) & ~kept], ids[kept & partial]
    findings = unlike_official(path, folder, content)
    examples, clipped = Examples(content, folder, kept, image_of), int((kept & cut).sum())
    return Split(examples, objects, clipped, tuple(dropped.tolist()), tuple(parts.tolist()), (), digest, findings)


def places_in(known: list[int], wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted id stands among the known ones, and whether it does."""
    ids = np.array(known, np.int64)
    if not len(ids):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(ids, kind="stable")
    places = order[np.searchsorted(ids, wanted, sorter=order).clip(max=len(ids) - 1)]
    return places, ids[places] == wanted


def outlines_of(content: Content, image_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each annotation: whether it has a valid outline, and whether some parts of it are none."""
    kinds = np.array(content.outlines)
    valid = kinds != NOTHING
    for number in np.flatnonzero(kinds == RUNS).tolist():
        valid[number] = are_runs(content.segmentation(number), *content.images[image_of[number]][2:])
    return valid, kinds == PARTS


def inside_image(content: Content, image_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [n, 4] as x0, y0, x1, y1 in px; and cut to their images, as detectron2 does."""
    sizes = np.array([image[2:] for image in content.images], np.float64)[image_of]
    boxes = np.array(content.boxes).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, boxes.clip(0, sizes[:, [1, 0, 1, 0]])


def unscorable(path: Path, content: Content, valid: np.ndarray) -> list[str]:
    """Sentences on what pycocotools would not look at, and fail at or score as something else, after the training."""
    ids, sizes = np.array(content.ids), np.array(content.boxes).reshape(-1, 4)
    areas, listed = np.array(content.areas), [category for category, _ in content.categories]
    wrong = {
        "no valid outline": ~valid,
        "a box that is negative or not finite": ~np.isfinite(sizes).all(1) | (sizes[:, 2:] < 0).any(1),
        "an area that is negative or not finite": ~np.isfinite(areas) | (areas < 0),
        "a category that its list of categories lacks": ~np.isin(np.array(content.category_ids), listed),
    }
    return [
        f"{bad.sum()} of the {len(ids)} objects of {path} have {what} (ids {preview(ids[bad].tolist())}): "
        "nothing can be scored against them; unpack the file again or remove them"
        for what, bad in wrong.items()
        if bad.any()
    ]


def wrong_categories(path: Path, content: Content) -> list[str]:
    if not content.categories:
        return [f"{path} lists no categories: unpack annotations_trainval2017.zip again"]
    foreign = [f"{i} '{name}'" for i, name in content.categories if CATEGORIES.get(i) != name]
    foreign += [str(i) for i in sorted(set(content.category_ids) - set(LABELS))]
    if foreign:
        return [f"{path} has categories that are not among COCO's 80: {preview(foreign)}"]
    twice = [f"{i} '{CATEGORIES[i]}'" for i, count in Counter(i for i, _ in content.categories).items() if count > 1]
    return [f"{path} lists categories twice: {preview(twice)}"] if twice else []


def unlike_official(path: Path, folder: Path, content: Content) -> tuple[str, ...]:
    """Sentences on categories that the file lacks and images on disk that it does not list."""
    findings, there = [], {i for i, _ in content.categories}
    if absent := [CATEGORIES[i] for i in IDS if i not in there]:
        findings.append(f"coco: {path.name} lacks {len(absent)} of the {len(IDS)} categories: {preview(absent)}")
    listed = {image[1] for image in content.images}
    if extra := sorted(n for n in os.listdir(folder) if is_image(n) and n not in listed):
        findings.append(f"coco: {folder.name} has {len(extra)} images that {path.name} does not list: {preview(extra)}")
    return tuple(findings)


def wrong_images(path: Path, folder: Path, images: list[tuple[int, str, int, int]]) -> list[str]:
    if not images:
        return [f"{path} lists no images"]
    there: set[str] = set()
    odd: set[str] = set()
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                (there if entry.is_file() else odd).add(entry.name)
    if missing := [name for _, name, _, _ in images if name not in there and name not in odd]:
        which = f"{len(missing)} of the {len(images)} images of {path.name}"
        return [f"{which} are not in {folder}: {preview(missing)}; unpack {folder.name}.zip there"]
    if pipes := [name for _, name, _, _ in images if name not in there]:
        return [f"{folder} has {len(pipes)} broken links or no regular files: {preview(pipes)}; mend or replace them"]
    if repeated := len(images) - len({image[0] for image in images}):
        return [f"{path} uses {repeated} image ids twice: give every image an id of its own"]
    problems = []
    for _, name, height, width in images[:: -(-len(images) // SIZES_CHECKED)]:
        try:
            with opened(folder / name) as image:
                size = image.size
        except UNREADABLE:
            problems.append(f"{folder / name} cannot be read as an image: replace it")
            continue
        if size != (width, height):
            said = f"{width}x{height}: take the images that it describes"
            problems.append(f"{folder / name} is {size[0]}x{size[1]} px, {path.name} says {said}")
    return problems[:3]


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
    if not problems and isinstance(train.examples, Examples) and not train.examples.with_objects():
        problems = (f"{annotation_file(root, 'train')} has no object to learn",)
    if problems:
        return incomplete(root, *problems)
    counts = {"train": len(train.examples), "val": len(val.examples)}
    detail = f"{counts['train']} train, {counts['val']} val images"
    digest = hashlib.sha256(f"{train.sha256} {val.sha256}".encode()).hexdigest()
    return found(root, base, detail, digest, counts, COUNTS, further=(*train.findings, *val.findings))


@cache
def training_examples(root: Path) -> Examples:
    """The training images that have at least one object, their outlines in memory; UserError if they cannot be read."""
    split = read_split(root, "train")
    if not isinstance(split.examples, Examples):
        raise UserError("; ".join(split.problems))
    try:
        split.examples.content.hold(split.sha256)
    except ValueError as e:
        raise UserError(f"{annotation_file(root, 'train')} {e}: start again") from None
    return split.examples.with_objects()
