"""A file of COCO instances, read piece by piece: as a whole, its outlines would be 45 million Python numbers."""

import hashlib
import json
import math
import os
import sys
from array import array
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from pycocotools import mask as mask_util

from mae_core import files
from mae_core.files import leaves
from transfer.data import json_elements
from transfer.data.json_elements import Elements, without_collecting
from transfer.data.parsed import LARGE, code_of, keep, recall

FAR = 100_000  # px: a corner farther off makes pycocotools take memory in proportion to its distance
MAX_AREA = 1 << 28  # px of an image; Pillow refuses larger ones
# What an outline may be: polygons, all of them valid; polygons, some valid; nothing valid; runs, which are to be
# compared with the image's size.
POLYGONS, PARTS, NOTHING, RUNS = range(4)
WHOLE = ("ids", "image_ids", "category_ids", "crowds", "starts", "ends")
CODE = code_of(sys.modules[__name__], json_elements, files)
COLUMNS = dict.fromkeys(WHOLE, "q") | {"areas": "d", "boxes": "d", "outlines": "b"}  # of annotations, as array.array


class Content:
    """The three lists of a file. images: (id, file name, height, width); categories: (id, name); of the annotations, in
    the file's order, one column for each value, four numbers a box, the outline's kind, and where in the file the
    annotation stands. `parse` raises ValueError or KeyError, with the place, unless all is there and of its type.

    The file stays open, since `segmentation` reads it, until `hold` has read it as a whole."""

    ids: array
    image_ids: array
    category_ids: array
    crowds: array
    areas: array
    boxes: array
    outlines: array
    starts: array
    ends: array

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.held = file, b""
        self.images: list[tuple[int, str, int, int]] = []
        self.categories: list[tuple[int, str]] = []
        self.clear_annotations()

    def parse(self) -> "Content":
        lists = {"images": self.add_image, "categories": self.add_category, "annotations": self.add_annotation}
        seen = set()
        for key, number, entry, start, end in Elements(self.read, os.fstat(self.file.fileno()).st_size, lists):
            if number < 0:  # the list begins; one that comes twice counts once, as for every reader of JSON
                seen.add(key)
                self.clear_annotations() if key == "annotations" else getattr(self, key).clear()
                continue
            try:
                lists[key](entry, start, end)
            except (TypeError, ValueError, KeyError, OverflowError) as e:
                raise ValueError(f"{key}[{number}]: {wrong_value(entry) or f'{type(e).__name__}: {e}'}") from None
        if absent := [key for key in lists if key not in seen]:
            raise KeyError(absent[0])
        return self

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the file. Processes that share it do not move each other's place in it."""
        return self.held[start : start + length] if self.held else os.pread(self.file.fileno(), length, start)

    def hold(self, sha256: str) -> None:
        """Keep the file's bytes in memory; ValueError if it no longer is the one of that hash."""
        if self.held:
            return
        self.file.seek(0)
        whole = self.file.read()
        if hashlib.sha256(whole).hexdigest() != sha256:
            raise ValueError("was changed since it was checked")
        self.held = whole
        self.file.close()

    def __getstate__(self) -> dict[str, Any]:
        """With the file's bytes in its place."""
        return {**vars(self), "file": None, "held": self.held or self.read(0, os.fstat(self.file.fileno()).st_size)}

    def segmentation(self, number: int) -> Any:
        start = self.starts[number]
        return json.loads(self.read(start, self.ends[number] - start))["segmentation"]

    def clear_annotations(self) -> None:
        for name, kind in COLUMNS.items():
            setattr(self, name, array(kind))

    def add_image(self, entry: dict, start: int, end: int) -> None:
        values = entry["id"], entry["file_name"], entry["height"], entry["width"]
        array("q", (values[0], *values[2:]))  # refuses what is no whole number
        if not isinstance(values[1], str) or min(values[2:]) < 1 or values[2] * values[3] > MAX_AREA:
            raise ValueError("its name or its size cannot be")
        if leaves(values[1]):
            raise ValueError(f"{values[1]!r} leaves the folder of the images")
        self.images.append(values)

    def add_category(self, entry: dict, start: int, end: int) -> None:
        array("q", (entry["id"],))
        if not isinstance(entry["name"], str):
            raise ValueError("its name is no text")
        self.categories.append((entry["id"], entry["name"]))

    def add_annotation(self, entry: dict, start: int, end: int) -> None:
        x, y, w, h = entry["bbox"]
        self.boxes.extend((x, y, w, h))  # an array refuses what is no number
        self.areas.append(entry["area"])
        self.ids.append(entry["id"])
        self.image_ids.append(entry["image_id"])
        self.category_ids.append(entry["category_id"])
        self.crowds.append(entry["iscrowd"])
        self.outlines.append(kind_of(entry["segmentation"]))
        self.starts.append(start)
        self.ends.append(end)


def content_of(file: BinaryIO, digest: str) -> Content:
    """The content of a file whose SHA-256 is `digest`, parsed or, of a large one, as it was parsed before. Raises as
    `Content.parse` does."""
    large, content = os.fstat(file.fileno()).st_size >= LARGE, Content(file)
    if large and (kept := recall(digest, CODE)):
        content.images, content.categories = (
            list(map(tuple, entries)) for entries in json.loads(kept["lists"].tobytes())
        )
        for name, kind in COLUMNS.items():
            setattr(content, name, array(kind, kept[name].tobytes()))
        return content
    with without_collecting():
        content.parse()
    file.seek(0)
    if large and hashlib.file_digest(file, "sha256").hexdigest() == digest:  # type: ignore[arg-type]  # nobody wrote to it
        lists = json.dumps([content.images, content.categories]).encode()
        columns = {name: np.asarray(getattr(content, name)) for name in COLUMNS}
        keep(digest, CODE, {"lists": np.frombuffer(lists, np.uint8), **columns})
    return content


def wrong_value(entry: Any) -> str:
    """Which value of an entry is of the wrong type; "" if it is another thing."""
    if not isinstance(entry, dict):
        return f"{str(entry)[:40]!r} is no object of JSON"
    for name in ("id", "image_id", "category_id", "iscrowd", "height", "width"):
        if name in entry and not isinstance(entry[name], int):
            return f"{name} is {str(entry[name])[:40]!r}, not a whole number"
    if "area" in entry and not isinstance(entry["area"], int | float):
        return f"area is {str(entry['area'])[:40]!r}, not a number"
    if "bbox" in entry:
        return f"bbox is {str(entry['bbox'])[:40]!r}, not four numbers"
    return ""


def kind_of(segmentation: Any) -> int:
    if isinstance(segmentation, dict):
        return RUNS
    if not isinstance(segmentation, list):
        return NOTHING
    valid = sum(map(is_polygon, segmentation))
    return NOTHING if not valid else POLYGONS if valid == len(segmentation) else PARTS


def is_polygon(corners: Any) -> bool:
    """Whether this is a list x0, y0, x1, ... of at least three corners, none of them too far away."""
    try:
        return (
            len(corners) % 2 == 0
            and len(corners) >= 6
            and -FAR <= min(corners) <= max(corners) <= FAR
            and (
                math.isfinite(sum(corners))  # a NaN can hide from min and max
            )
        )
    except TypeError:
        return False


def are_runs(segmentation: dict, height: int, width: int) -> bool:
    """Whether this is a run-length encoding, of either form, of just this size. pycocotools does not look: it would
    leave memory uninitialised, or compare with nothing."""
    counts, size = segmentation.get("counts"), segmentation.get("size")
    if isinstance(counts, str):
        counts = decompressed(counts)
    if not isinstance(counts, list) or not counts or not all(type(n) is int and n >= 0 for n in counts):
        return False
    return size == [height, width] and sum(counts) == height * width


def decompressed(counts: str) -> list[int]:
    """The runs in COCO's compressed form (`rleFrString` of its maskApi.c); [] if it is none.

    A character holds five bits of a number, lowest first, a sixth that says that more follow, and the highest of the
    last is the sign; from the fourth number on, what is written is the difference to the last but one.
    """
    runs: list[int] = []
    number = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 60:
            return []
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            number -= (code >> 4 & 1) << shift
            runs.append(number + runs[-2] if len(runs) > 2 else number)
            number = shift = 0
    return [] if shift else runs


def valid_outline(segmentation: Any, height: int, width: int) -> list[np.ndarray] | dict:
    """A segmentation of which at least a part is valid, as polygons without those that are none or as a compressed
    run-length encoding."""
    if not isinstance(segmentation, dict):
        return [np.array(corners, np.float64) for corners in segmentation if is_polygon(corners)]
    compressed = isinstance(segmentation["counts"], str)
    return segmentation if compressed else mask_util.frPyObjects(segmentation, height, width)


def runs(outline: list[np.ndarray] | dict, height: int, width: int) -> dict:
    """The outline as one run-length encoding."""
    return outline if isinstance(outline, dict) else mask_util.merge(mask_util.frPyObjects(outline, height, width))


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
