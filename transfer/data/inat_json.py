"""The annotation files of iNaturalist: which image is where, and of which class."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from mae_core import files
from mae_core.files import leaving
from transfer.data.findings import preview
from transfer.data.parsed import LARGE, code_of, keep, recall

CODE = code_of(sys.modules[__name__], files)


def annotation_file(name: str, year: int) -> str:
    return f"{name}{year}.json" if year < 2021 else f"{name}.json"


def read_annotations(path: Path) -> tuple[list[str], list[int], list[str]]:
    """The images of a file by name, relative to its folder; their labels; and what is wrong with it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], [], [f"{path} is missing: unpack the archive that holds it"]
    digest = hashlib.sha256(content).hexdigest()
    if len(content) >= LARGE and (kept := recall(digest, CODE)):
        files, labels = json.loads(kept["lists"].tobytes())
        return files, labels, []
    try:
        files, labels, problems = parsed(path, content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        return [], [], [f"{path} is no annotation file of iNaturalist ({type(e).__name__}: {e}): unpack it again"]
    if len(content) >= LARGE and not problems:
        keep(digest, CODE, {"lists": np.frombuffer(json.dumps([files, labels]).encode(), np.uint8)})
    return files, labels, problems


def parsed(path: Path, content: bytes) -> tuple[list[str], list[int], list[str]]:
    values, problems = of_json(content), []
    names = {image["id"]: image["file_name"] for image in values["images"]}
    label = {a["image_id"]: a["category_id"] for a in values["annotations"]}
    if odd := [c for c in label.values() if type(c) is not int]:
        raise ValueError(f"category_id is {str(odd[0])[:40]!r}, not a whole number")
    if outside := leaving([*names.values()]):
        raise ValueError(f"{outside[0]!r} leaves its folder")
    if len(label) < len(values["annotations"]):
        problems.append(f"{path} labels {len(values['annotations']) - len(label)} images twice")
    if strangers := sorted(str(i) for i in label if i not in names):
        problems.append(f"{path} labels images that it does not list: {preview(strangers)}")
    if bare := sorted(name for i, name in names.items() if i not in label):
        problems.append(f"{path} lists {len(bare)} images without a label: {preview(bare)}")
    both = sorted((i for i in names if i in label), key=names.__getitem__)
    return [names[i] for i in both], [label[i] for i in both], problems


def of_json(content: bytes) -> Any:
    """By orjson, which is several times as fast; by Python what orjson refuses. ValueError for what is no JSON."""
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError:
        return json.loads(content)
