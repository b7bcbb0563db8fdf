"""What was parsed of large files: from the user's cache, and parsed anew whenever that could be something else."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from tests.fixtures.coco import FIRST_ID, crowd, rectangle, write_split
from transfer.data import coco_json, inat_json, json_elements, parsed
from transfer.data.coco_json import COLUMNS, content_of
from transfer.data.inat_json import read_annotations
from transfer.data.parsed import code_of, keep, recall

FIRST = FIRST_ID["train"]
CODE = code_of(parsed)
ARRAYS = {"boxes": np.arange(6.0).reshape(2, 3), "text": np.frombuffer(b"caf\xc3\xa9", np.uint8)}


def of_npy(_: bytes) -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of the cache, for files of any size."""
    monkeypatch.setenv("MAE_TRANSFER_CACHE", str(tmp_path / "cache"))
    for module in (coco_json, inat_json):
        monkeypatch.setattr(module, "LARGE", 0)
    return tmp_path / "cache"


@pytest.fixture
def coco(tmp_path, cache) -> Path:
    annotations = [rectangle(FIRST, 1, 5.25, 5, 9, 9), crowd(FIRST + 1, 90, np.ones((48, 64), bool))]
    path = write_split(tmp_path, "train", [(64, 48)] * 2, annotations)
    values = json.loads(path.read_text())
    values["images"][1]["file_name"] = "caf\u00e9 \ud800.jpg"  # JSON can hold half a character
    path.write_text(json.dumps(values))
    return path


def columns(path: Path) -> list:
    """All that is held of a file, and its outlines."""
    content = content_of(path.open("rb"), hashlib.sha256(path.read_bytes()).hexdigest())
    held = [getattr(content, name) for name in COLUMNS]
    return [content.images, content.categories, *held, *map(content.segmentation, range(len(content.ids)))]


def test_what_is_kept_comes_back(cache):
    assert recall("a", CODE) is None
    keep("a", CODE, ARRAYS)
    found = recall("a", CODE)
    assert found is not None
    assert all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in ARRAYS.items()
    )
    assert recall("b", CODE) is None


def test_not_once_other_code_parses(tmp_path, cache, monkeypatch):
    keep("a", CODE, ARRAYS)
    assert recall("a", code_of(parsed, json_elements)) is None
    (tmp_path / "new.py").write_text("more = 1\n" + Path(parsed.__file__).read_text())
    monkeypatch.setattr(parsed, "__file__", str(tmp_path / "new.py"))
    assert recall("a", CODE) is not None  # which was found when this code was imported
    assert recall("a", code_of(parsed)) is None


def changed(content: bytes) -> bytes:
    return content.replace(b"caf", b"cab")


@pytest.mark.parametrize("damage", [lambda content: b"", lambda content: content[: len(content) // 2], changed, of_npy])
def test_not_if_it_is_damaged(cache, damage):
    keep("a", CODE, ARRAYS)
    (file,) = cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert recall("a", CODE) is None


def test_nothing_is_kept_or_said_where_there_is_no_place(tmp_path, monkeypatch, capfd):
    (tmp_path / "file").touch()
    for folder in ("", str(tmp_path / "file" / "cache")):
        monkeypatch.setenv("MAE_TRANSFER_CACHE", folder)
        keep("a", CODE, ARRAYS)
        assert recall("a", CODE) is None
    assert capfd.readouterr() == ("", "")


def test_annotations_of_coco_are_parsed_once(coco, monkeypatch):
    first = columns(coco)
    monkeypatch.setattr(coco_json, "Elements", None)  # nothing can be parsed any more
    assert columns(coco) == first
    assert list(map(type, columns(coco))) == list(map(type, first))
    assert first[0][1][1] == "caf\u00e9 \ud800.jpg"
    assert first[-1]["size"] == [48, 64]


def test_another_file_at_the_same_place_is_parsed(coco):
    before = columns(coco)
    coco.write_text(coco.read_text().replace("5.25", "6.25"))
    changed = [(one, other) for one, other in zip(before, columns(coco), strict=True) if one != other]
    boxes, outline = changed
    assert list(boxes[0]) == [5.25, 5, 9, 9, 0, 0, 64, 48]
    assert list(boxes[1]) == [6.25, 5, 9, 9, 0, 0, 64, 48]
    assert outline[1][0][0] == 6.25


def test_a_file_that_is_written_to_meanwhile_is_not_kept(coco, cache, monkeypatch):
    """Its hash may be that of the content before, what was parsed that of the content after."""
    before, changed = hashlib.sha256(coco.read_bytes()).hexdigest(), coco.read_text().replace("5.25", "6.25")
    with coco.open("rb") as file:
        coco.write_text(changed)
        assert content_of(file, before).boxes[0] == 6.25
    assert not cache.exists()


def test_a_small_file_is_parsed_each_time(coco, cache, monkeypatch):
    monkeypatch.setattr(coco_json, "LARGE", coco.stat().st_size + 1)
    columns(coco)
    assert not cache.exists()


def test_annotations_of_inaturalist_are_parsed_once_and_wrong_ones_each_time(tmp_path, cache, monkeypatch):
    path = tmp_path / "train2019.json"
    images = [{"id": 2, "file_name": "x/b.jpg"}, {"id": 1, "file_name": "x/a.jpg"}]
    labels = [{"image_id": 1, "category_id": 7}, {"image_id": 2, "category_id": 8}]
    path.write_text(json.dumps({"images": images, "annotations": labels[:1]}))
    wrong = read_annotations(path)
    assert wrong == (["x/a.jpg"], [7], [f"{path} lists 1 images without a label: x/b.jpg"])
    assert read_annotations(path) == wrong
    assert not cache.exists()
    path.write_text(json.dumps({"images": images, "annotations": labels}))
    right = read_annotations(path)
    assert right == (["x/a.jpg", "x/b.jpg"], [7, 8], [])
    monkeypatch.setattr(inat_json, "of_json", None)
    assert read_annotations(path) == right
