"""The reader of COCO's annotations, against pycocotools and what was written."""

import hashlib
import json
import math
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from mae_core.errors import UserError
from tests.fixtures import SHARED
from tests.fixtures.coco import FIRST_ID, NAMES, change, crowd, rectangle, runs, write_coco, write_split
from tests.fixtures.image import encoded
from transfer.data import coco, json_elements
from transfer.data.coco import annotation_file, inspect_coco, read_split, training_examples
from transfer.data.coco_json import Content, decompressed

FIRST = FIRST_ID["train"]
TOO_LONG = mask_util.encode(np.asfortranarray(np.eye(96, 64, dtype=np.uint8)))  # for an image of 48 x 64


@pytest.fixture
def root(tmp_path) -> Path:
    return write_coco(tmp_path)


def train_of(root: Path, annotations: list[dict], sizes=((64, 48),), **content) -> coco.Split:
    write_split(root, "train", sizes, annotations, **content)
    return read_split(root, "train")


def problem_of(root: Path) -> str:
    """Why the tree cannot be used."""
    found = inspect_coco(root)
    assert found.status == "incomplete"
    return found.detail


# The categories


def test_the_categories_are_torchvisions():
    assert coco.CATEGORIES == NAMES


def test_labels_are_0_to_79_for_ids_with_ten_gaps():
    assert len(coco.CATEGORIES) == 80
    assert set(range(1, 91)) - set(coco.CATEGORIES) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert [coco.LABELS[i] for i in (1, 11, 13, 90)] == [0, 10, 11, 79]
    assert sorted(coco.LABELS.values()) == list(range(80))
    assert all(coco.IDS[label] == category for category, label in coco.LABELS.items())
    assert (coco.CATEGORIES[1], coco.CATEGORIES[18], coco.CATEGORIES[90]) == ("person", "dog", "toothbrush")


def test_labels_do_not_depend_on_what_a_file_lists(tmp_path):
    listed = [{"id": i, "name": NAMES[i]} for i in (90, 13)]
    split = train_of(tmp_path, [rectangle(FIRST, i, 2, 2, 9, 9) for i in (90, 13)], categories=listed)
    assert split.examples[0].labels.tolist() == [79, 11]


# Looking at a tree


def test_a_whole_tree_is_found_counted_and_labelled(root, monkeypatch):
    found = inspect_coco(root)
    assert (found.status, found.counts, found.label) == ("found", {"train": 8, "val": 3}, "subset")
    assert found.detail == "8 train, 3 val images"
    assert coco.COUNTS == {"train": 118287, "val": 5000}
    monkeypatch.setattr(coco, "COUNTS", {"train": 8, "val": 3})
    assert inspect_coco(root).label == "official"
    (root / "coco" / "miniature.json").write_text("{}")
    assert inspect_coco(root).label == "miniature"


def test_what_is_not_as_in_the_official_files_is_a_finding(root, monkeypatch):
    counts, *others = inspect_coco(root).findings
    assert counts.startswith("coco: 8 train images, 118279 fewer than the official 118287; 3 val images, 4997 fewer")
    assert not others
    monkeypatch.setattr(coco, "COUNTS", {"train": 8, "val": 3})
    assert inspect_coco(root).findings == ()
    shutil.copy(next((root / "coco" / "val2017").iterdir()), root / "coco" / "val2017" / "more.jpg")
    change(annotation_file(root, "val"))  # the file is read again once it is another
    path = annotation_file(root, "train")
    change(path, categories=[c for c in json.loads(path.read_text())["categories"] if c["id"] != 90])
    assert inspect_coco(root).findings == (
        "coco: instances_train2017.json lacks 1 of the 80 categories: toothbrush",
        "coco: val2017 has 1 images that instances_val2017.json does not list: more.jpg",
    )


def test_the_fingerprint_is_that_of_both_annotation_files(root):
    seen = {inspect_coco(root).fingerprint, inspect_coco(root).fingerprint}
    for number, split in enumerate(("train", "val"), 2):
        time.sleep(0.01)
        change(annotation_file(root, split), info={"year": 2017})
        seen.add(inspect_coco(root).fingerprint)
        assert len(seen) == number


def test_no_data_says_where_it_must_lie(tmp_path):
    found = inspect_coco(tmp_path)
    assert found.status == "missing"
    assert "coco/annotations/instances_{train,val}2017.json" in found.detail


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_annotation_file_is_named(root, split):
    path = annotation_file(root, split)
    path.unlink()
    assert f"{path} missing" in problem_of(root)


@pytest.mark.parametrize("content", [
    b"not json", b"\xff\xfe\x00", b"[]", b'{"images": [], "annotations": []}',
    b'{"images": 3, "annotations": [], "categories": []}', b'{"images": [1], "annotations": [], "categories": []}',
])  # fmt: skip
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_that_is_not_coco_json_is_named(root, split, content):
    path = annotation_file(root, split)
    path.write_bytes(content)
    assert f"{path} is no file of COCO instances" in problem_of(root)


def test_captions_are_not_instances(root):
    path = annotation_file(root, "val")
    change(path, annotations=[{"id": 1, "image_id": FIRST_ID["val"], "caption": "a dog"}])
    assert f"{path} is no file of COCO instances" in problem_of(root)


@pytest.mark.parametrize(
    ("part", "broken"),
    [
        *(("annotations", key) for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation")),
        *(("annotations", {"bbox": box}) for box in (None, [1, 2, 3], [1, 2, 3, 4, 5], "wide")),
        ("annotations", {"area": None}),
        *(("images", key) for key in ("id", "file_name", "height", "width")),
        *(("images", wrong) for wrong in ({"height": None}, {"width": "64"}, {"width": 64.0})),
        *(("categories", key) for key in ("id", "name")),
        *(("images", {"id": wrong}) for wrong in ("0b5e-uuid", [1], 1.0)),
        *(("images", wrong) for wrong in ({"file_name": ["a.jpg"]}, {"height": 0}, {"height": 10**6, "width": 10**6})),
        *(("annotations", {key: wrong}) for key in ("id", "image_id", "category_id") for wrong in ("7", [7], 7.0)),
        *(("annotations", wrong) for wrong in ({"bbox": [1, 2, 3, "4"]}, {"area": "9"}, {"area": [9]})),
        *(("annotations", {"iscrowd": wrong}) for wrong in ("0", 0.0)),
        ("annotations", {"id": 10**30}),
        ("categories", {"id": [1]}),
        *(("images", {"file_name": name}) for name in ("../../elsewhere.jpg", "/elsewhere.jpg")),
    ],
    ids=str,
)
def test_what_pycocotools_or_the_training_would_stumble_over_is_reported_first(root, part, broken):
    """A key that is missing, or a value that it cannot have: after a week of training would be too late."""
    path = annotation_file(root, "val")
    entries = json.loads(path.read_text())[part]
    if isinstance(broken, dict):
        entries[-1] |= broken
    else:
        del entries[-1][broken]
    change(path, **{part: entries})
    assert f"{path} is no file of COCO instances" in problem_of(root)


# Images


def test_images_missing_on_disk_are_counted_and_the_first_named(root):
    for i in (0, 2, 3, 5):
        (root / "coco" / "train2017" / f"{FIRST + i:012d}.jpg").unlink()
    shutil.rmtree(root / "coco" / "val2017")
    detail = problem_of(root)
    assert "4 of the 8 images of instances_train2017.json are not in" in detail
    assert f"{FIRST:012d}.jpg, {FIRST + 2:012d}.jpg, {FIRST + 3:012d}.jpg and 1 more" in detail
    assert "3 of the 3 images of instances_val2017.json are not in" in detail


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (encoded(Image.new("RGB", (48, 64)), "JPEG"), "is 48x64 px, instances_val2017.json says 64x48"),
        (b"no image", "cannot be read as an image"),
    ],
)
def test_an_image_that_is_broken_or_of_another_size_than_the_json_says_is_named(root, content, said):
    path = root / "coco" / "val2017" / f"{FIRST_ID['val']:012d}.jpg"
    path.write_bytes(content)
    assert f"{path} {said}" in problem_of(root)


def test_no_images_and_repeated_ids(root):
    path = annotation_file(root, "train")
    images = json.loads(path.read_text())["images"]
    change(path, images=[*images[:-1], images[0]])
    assert f"{path} uses 1 image ids twice" in problem_of(root)
    time.sleep(0.01)
    change(path, images=[])
    assert f"{path} lists no images" in problem_of(root)


# Annotations that make a file unusable


STRANGERS = [rectangle(FIRST, 1, 5, 5, 9, 9), rectangle(4711, 1, 5, 5, 9, 9)]


@pytest.mark.parametrize(("split", "objects", "said"), [
    *((split, [], " has no annotations at all") for split in FIRST_ID),
    *((split, [crowd(i, 1, np.ones((48, 64)))], " has only crowds, no object") for split, i in FIRST_ID.items()),
    ("train", [rectangle(FIRST, 1, 5, 5, 0, 10)], " has no object to learn"),
    *(("train", [rectangle(FIRST, i, 5, 5, 9, 9)], f" has categories that are not among COCO's 80: {i}")
      for i in (12, 91, 0)),
    ("train", STRANGERS, " has 1 annotations of images that it does not list: 4711"),
    # pycocotools takes id 0 for "not found", and keeps the last of two with one id.
    *(("val", [rectangle(FIRST_ID["val"], 1, 5 * i, 5, 4, 9, id=i) for i in ids],
       ": its annotation ids are not distinct numbers from 1 on") for ids in ((0, 1), (7, 7))),
])  # fmt: skip
def test_objects_that_make_a_file_unusable(root, split, objects, said):
    path = write_split(root, split, [(64, 48)], objects)
    assert f"{path}{said}" in problem_of(root)


def test_a_category_under_another_name(root):
    path = annotation_file(root, "val")
    change(path, categories=[{"id": 18, "name": "cat"}, {"id": 1, "name": "person"}])
    assert f"{path} has categories that are not among COCO's 80: 18 'cat'" in problem_of(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_categories_twice_or_none_and_crowds_of_another_number(root, split):
    path = annotation_file(root, split)
    values = json.loads(path.read_text())
    for content, said in (
        ({"categories": []}, "lists no categories"),
        ({"categories": [*values["categories"], {"id": 18, "name": "dog"}]}, "lists categories twice: 18 'dog'"),
        ({"annotations": [{**values["annotations"][0], "iscrowd": 2}]}, "has 2 as iscrowd, which must be 0 or 1"),
    ):
        time.sleep(0.01)
        path.write_text(json.dumps({**values, **content}))
        assert f"{path} {said}" in problem_of(root)


def test_a_file_nested_without_end_is_named(root):
    path = annotation_file(root, "val")
    path.write_text('{"info": ' + "[" * 100_000)
    assert f"{path} is no file of COCO instances" in problem_of(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_images_that_are_no_regular_files_are_named(root, split):
    """To open a pipe would last for ever."""
    names = [f"{FIRST_ID[split] + i:012d}.jpg" for i in (1, 2)]
    for name in names:
        (root / "coco" / f"{split}2017" / name).unlink()
    os.mkfifo(root / "coco" / f"{split}2017" / names[0])
    (root / "coco" / f"{split}2017" / names[1]).symlink_to("gone.jpg")
    assert f"has 2 broken links or no regular files: {', '.join(names)}" in problem_of(root)


INFINITE, FAR = float("inf"), 1e9


@pytest.mark.parametrize(("bad", "said"), [
    *(({"bbox": [5, 5, 9, n]}, "a box that is negative or not finite")
      for n in (-9, math.nan, INFINITE)),
    *(({"area": area}, "an area that is negative or not finite") for area in (-1, math.nan, INFINITE)),
    *(({"segmentation": [polygon]}, "no valid outline") for polygon in (
        [1, 1, 5, 5], [1, 1, 5, 5, 9, 9, 3], [1, 1, 5, 5, INFINITE, 9], [1, 1, math.nan, 5, 9, 9], [1, 1, 5, 5, FAR, 9],
        [1, 1, 5, 5, 9, "9"])),
    *(({"segmentation": {"size": [64, 48], "counts": counts}}, "no valid outline") for counts in (
        [64 * 48 - 1], [64 * 48 + 1], [-5, 64 * 48 + 5], [64.0 * 48], ["3072"], "", "junk", "\u00e9", [[3072]])),
    ({"segmentation": {"size": [48, 64], "counts": [3072]}}, "no valid outline"),
    ({"segmentation": [[1, 1, 9, 1, 9, 9], [1, 1, 5, 5]]}, "no valid outline"),
], ids=str)  # fmt: skip
def test_what_would_change_the_score_is_refused_in_validation(tmp_path, bad, said):
    image = FIRST_ID["val"]
    write_split(tmp_path, "train", [(48, 64)], [rectangle(FIRST, 1, 5, 5, 9, 9)])
    path = write_split(tmp_path, "val", [(48, 64)], [rectangle(image, 1, 5, 5, 9, 9), rectangle(image, 1, 5, 5, 9, 9)])
    values = json.loads(path.read_text())
    assert inspect_coco(tmp_path).status == "found"
    values["annotations"][1] |= bad
    time.sleep(0.01)
    path.write_text(json.dumps(values))
    assert f"1 of the 2 objects of {path} have {said} (ids 2)" in problem_of(tmp_path)


def test_objects_of_a_category_that_validation_does_not_list_are_refused(root):
    """pycocotools scores only the listed ones."""
    path = annotation_file(root, "val")
    listed = json.loads(path.read_text())["categories"]
    change(path, categories=[category for category in listed if category["id"] != 18])
    assert "have a category that its list of categories lacks" in problem_of(root)


# Objects


def test_boxes_are_cut_to_their_image_and_counted(tmp_path):
    objects = [
        rectangle(FIRST, 1, 5, 6, 20, 10),
        rectangle(FIRST, 1, -4, 40, 20, 30),
        rectangle(FIRST, 1, 50, 5, 14.03, 9),  # a rounding: cut and not counted
        rectangle(FIRST, 1, 60, -2, 9, 9),
    ]
    split = train_of(tmp_path, objects)
    expected = [[5, 6, 25, 16], [0, 40, 16, 48], [50, 5, 64, 14], [60, 0, 64, 7]]
    np.testing.assert_allclose(split.examples[0].boxes, expected, atol=1e-5)
    assert split.examples[0].boxes.dtype == np.float32
    assert (split.objects, split.clipped, split.dropped) == (4, 2, ())
    assert split.notes == ("of 4 training objects 2 boxes cut to their image",)


BOXES = ([5, 5, 0, 9], [5, 5, 9, 0], [30, 5, -9, 9], [64, 5, 9, 9], [5, 48, 9, 9], [math.nan, 5, 9, 9])
OUTLINES = (None, [], [[1, 1, 5, 5]], {"size": [48, 64]}, [[1, 1, 5, 5, math.inf, 9]], [[1, 1, 5, 5, 1e9, 9]], "text")
COUNTS = ([10, 20], [10, 4000], [-1, 3073], TOO_LONG["counts"].decode(), "", "junk")


@pytest.mark.parametrize(
    "bad",
    [
        *({"bbox": box} for box in BOXES),
        *({"segmentation": outline} for outline in (*OUTLINES, [[1, 1, 5, 5, 9, 9, 3]])),
        *({"segmentation": {"counts": counts, "size": [48, 64]}} for counts in COUNTS),
        {"segmentation": {"counts": [3072], "size": [64, 48]}},
    ],
    ids=str,
)
def test_objects_without_area_or_outline_are_dropped_and_counted(tmp_path, bad):
    good = rectangle(FIRST, 18, 5, 6, 20, 10)
    split = train_of(tmp_path, [rectangle(FIRST, 1, 5, 5, 9, 9) | bad, good])
    (example,) = split.examples
    assert (example.labels.tolist(), len(example.boxes), len(example.outlines)) == ([coco.LABELS[18]], 1, 1)
    assert (split.objects, split.clipped, split.dropped, split.problems) == (2, 0, (1,), ())
    assert split.notes == ("of 2 training objects 1 objects of no area or without a valid outline left out (ids 1)",)


@pytest.mark.parametrize("outline", OUTLINES, ids=str)
def test_an_outline_that_pycocotools_cannot_read_is_refused_where_it_would_be_scored(tmp_path, outline):
    path = annotation_file(write_coco(tmp_path), "val")
    values = json.loads(path.read_text())
    assert inspect_coco(tmp_path).status == "found"
    values["annotations"][0]["segmentation"] = outline
    path.write_text(json.dumps(values))
    data = inspect_coco(tmp_path)
    which = f"1 of the {len(values['annotations'])} objects of {path} have no valid outline"
    assert (data.status, which in data.detail) == ("incomplete", True)


def test_a_part_of_an_outline_that_is_no_polygon_is_left_out_and_named(tmp_path):
    """As detectron2 does, without a word."""
    whole = [[2, 2, 20, 2, 20, 20, 2, 20]]
    objects = [rectangle(FIRST, 1, 2, 2, 18, 18, segmentation=s) for s in ([*whole, [1, 1, 5, 5]], whole)]
    split = train_of(tmp_path, objects)
    masks = split.examples[0].masks()
    assert np.array_equal(masks[0], masks[1])
    assert split.notes == ("of 2 training objects parts of 1 outlines left out that are no polygons (ids 1)",)


def test_compressed_runs_are_understood_as_by_pycocotools():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 300), (480, 640)):
        for share in (0.0, 0.01, 0.5, 1.0):
            mask = (rng.random((height, width)) < share).astype(np.uint8)
            written = mask_util.encode(np.asfortranarray(mask))["counts"].decode()
            assert decompressed(written) == runs(mask)["counts"]


def test_a_file_is_read_whatever_its_spaces_order_and_length(tmp_path, monkeypatch):
    """In windows of a few bytes; with names outside of ASCII; and as the json module reads it."""
    path = write_split(
        tmp_path, "train", [(64, 48)] * 2, [rectangle(FIRST, 1, 5, 5, 9, 9), rectangle(FIRST, 1, 2, 2, 9, 9)]
    )
    values = json.loads(path.read_text())
    values["images"][1]["file_name"] = "caf\u00e9 \u20ac.jpg"
    values = {"info": {"deep": [[1, {}], "]}"]}, "year": 2017, **dict(reversed(values.items())), "licenses": []}

    def content(text: str) -> Content:
        path.write_text(text, encoding="utf-8")
        found = Content(path.open("rb")).parse()
        found.hold(hashlib.sha256(text.encode()).hexdigest())
        return found

    plain = content(json.dumps(values))
    assert [image[1] for image in plain.images] == [image["file_name"] for image in values["images"]]
    assert [plain.segmentation(i) for i in (0, 1)] == [a["segmentation"] for a in values["annotations"]]
    monkeypatch.setattr(json_elements, "WINDOW", 64)
    monkeypatch.setattr(json_elements, "MARGIN", 16)
    for options in ({"indent": 3}, {"separators": (",", ":")}, {"ensure_ascii": False}):
        for mark in ("", "\ufeff"):
            found = content(mark + json.dumps(values, **options) + "\n ")
            assert (found.images, found.categories, found.boxes) == (plain.images, plain.categories, plain.boxes)
            assert [found.segmentation(i) for i in (0, 1)] == [a["segmentation"] for a in values["annotations"]]
    whole = json.dumps(values)
    for broken in (whole[:-1], whole + "x", whole.replace("[{", "[,{", 1), whole.replace("}, {", "} {", 1), "", "[]"):
        with pytest.raises(ValueError, match="at byte"):
            content(broken)


def test_both_repairs_are_one_note(tmp_path):
    split = train_of(tmp_path, [rectangle(FIRST, 1, -5, 5, 9, 9), rectangle(FIRST, 1, 5, 5, 0, 9)])
    cut, left_out = "1 boxes cut to their image", "1 objects of no area or without a valid outline left out (ids 2)"
    assert split.notes == (f"of 2 training objects {cut} and {left_out}",)
    assert train_of(tmp_path / "b", [rectangle(FIRST, 1, 5, 5, 9, 9)]).notes == ()


def test_crowds_are_left_out_of_training(root):
    example = read_split(root, "train").examples[0]
    assert len(example.labels) == 1
    assert example.masks()[:, 36:44, 40:60].sum() == 0


def test_masks_are_those_of_pycocotools_whatever_their_form(tmp_path):
    blob = np.zeros((48, 64), np.uint8)
    blob[3:20, 10:30] = 1
    blob[8:12, 15:20] = 0
    compressed = mask_util.encode(np.asfortranarray(blob))
    forms = {
        "polygon": [[3.2, 4.7, 30.5, 6.1, 22.9, 40.3]],
        "two": [[5, 5, 6, 6], [1, 1, 9, 1, 9, 9, 1, 9], [20.5, 20.5, 40, 20, 33, 44]],
        "runs": runs(blob),
        "compressed": {"size": compressed["size"], "counts": compressed["counts"].decode()},
    }
    objects = [rectangle(FIRST, 1, 2, 2, 40, 40, segmentation=segmentation) for segmentation in forms.values()]
    (example,) = train_of(tmp_path, objects).examples
    masks = example.masks()
    assert (masks.shape, masks.dtype) == ((4, 48, 64), np.uint8)
    assert np.array_equal(masks[2], blob)
    assert np.array_equal(masks[3], blob)
    objects[1]["segmentation"] = objects[1]["segmentation"][1:]  # pycocotools refuses what is no polygon
    truth = COCO(write_split(tmp_path / "again", "train", [(64, 48)], objects))
    for mask, annotation in zip(masks, truth.anns.values()):
        assert np.array_equal(mask, truth.annToMask(annotation))


def test_an_image_without_an_object_is_read_but_not_trained_on(tmp_path):
    write_coco(tmp_path)
    objects = [rectangle(FIRST + 1, 1, 5, 5, 9, 9), rectangle(FIRST + 2, 1, 5, 5, 0, 9)]
    split = train_of(tmp_path, [*objects, crowd(FIRST + 3, 1, np.ones((48, 64), np.uint8))], [(64, 48)] * 4)
    assert [example.id for example in split.examples] == [FIRST, FIRST + 1, FIRST + 2, FIRST + 3]
    assert [example.id for example in training_examples(tmp_path)] == [FIRST + 1]
    assert [example.id for example in split.examples.few(3)] == [FIRST, FIRST + 1, FIRST + 2]
    assert len(split.examples.few(0)) == len(split.examples.few(9)) == 4
    empty = split.examples[0]
    assert (empty.boxes.shape, empty.labels.shape, empty.masks().shape) == ((0, 4), (0,), (0, 48, 64))
    assert (empty.boxes.dtype, empty.labels.dtype) == (np.float32, np.int64)


def test_a_file_that_changes_between_its_check_and_the_training_is_refused(root):
    """Within one tick of its file system's clock, and at the same length."""
    path = annotation_file(root, "train")
    ticked = path.stat().st_mtime_ns
    assert read_split(root, "train").examples
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    os.utime(path, ns=(ticked, ticked))
    with pytest.raises(UserError, match=f"{path} was changed since it was checked: start again"):
        training_examples(root)


def test_training_examples_of_a_broken_file_are_an_error(tmp_path):
    write_split(tmp_path, "train", [(64, 48)], [])
    with pytest.raises(UserError, match="no annotations at all"):
        training_examples(tmp_path)


def test_examples_are_a_sequence_that_survives_pickling(root):
    examples = read_split(root, "train").examples
    again = pickle.loads(pickle.dumps(examples))
    for found in (list(examples), [again[i] for i in range(8)], [examples[i - 8] for i in range(8)]):
        assert [example.id for example in found] == list(range(FIRST, FIRST + 8))
    last = again[7]
    assert last.file == str(root / "coco" / "train2017" / f"{FIRST + 7:012d}.jpg")
    assert (last.height, last.width) == (64, 64)
    assert np.array_equal(last.masks(), examples[-1].masks())
    assert len(examples) == 8
    for wrong in (8, -9):
        with pytest.raises(IndexError):
            examples[wrong]


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "coco").is_dir(), reason="the real subset is not here")
def test_the_real_subset_is_read_as_pycocotools_reads_it():
    for split in ("train", "val"):
        truth, ours = COCO(annotation_file(SHARED, split)), read_split(SHARED, split)
        assert (ours.problems, ours.objects) == ((), len(truth.anns))
        kept = 0
        for example in ours.examples:
            own = truth.loadAnns(truth.getAnnIds(imgIds=example.id, iscrowd=False))
            kept += len(example.labels)
            assert [coco.IDS[label] for label in example.labels] == [a["category_id"] for a in own]
            for mask, box, annotation in zip(example.masks(), example.boxes, own):
                assert np.array_equal(mask, truth.annToMask(annotation))
                x, y, w, h = annotation["bbox"]
                np.testing.assert_allclose(box, [x, y, x + w, y + h], atol=0.06)
        assert kept + len(ours.dropped) == sum(not a["iscrowd"] for a in truth.anns.values())
