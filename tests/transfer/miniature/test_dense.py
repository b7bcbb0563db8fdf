"""The miniature of COCO and ADE20K: pycocotools reads it, masks agree with boxes, polygons and label images."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage

from tests.fixtures.miniature import digests, write_few
from transfer.miniature import dense
from transfer.miniature.dense import ADE_IDS, SIZES
from transfer.miniature.scenes import CLUTTER


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Both datasets, with fewer images."""
    folder = write_few(dense.coco, tmp_path_factory.mktemp("dense"), train=40, val=16)
    return write_few(dense.ade20k, folder, train=40, val=16)


@pytest.fixture(scope="module")
def train(root) -> COCO:
    return COCO(root / "coco/annotations/instances_train2017.json")


@pytest.fixture(scope="module")
def contents(root) -> dict[str, dict]:
    """What the two annotation files hold."""
    folder = root / "coco/annotations"
    return {split: json.loads((folder / f"instances_{split}2017.json").read_text()) for split in ("train", "val")}


def test_coco_has_the_official_layout_and_its_80_categories(root, contents):
    for split, content in contents.items():
        assert set(content) == {"info", "licenses", "images", "annotations", "categories"}
        assert {p.name for p in (root / f"coco/{split}2017").iterdir()} == {i["file_name"] for i in content["images"]}
        assert len(content["images"]) == {"train": 40, "val": 16}[split]
        for image in content["images"]:
            assert image["file_name"] == f"{image['id']:012d}.jpg"
            with Image.open(root / f"coco/{split}2017" / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
                assert (picture.format, picture.mode) == ("JPEG", "RGB")
        categories = {c["id"]: (c["name"], c["supercategory"]) for c in content["categories"]}
        assert len(categories) == 80
        # The official ids run to 90 and leave out ten.
        assert set(range(1, 91)) - set(categories) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
        assert (categories[1], categories[90]) == (("person", "person"), ("toothbrush", "indoor"))
        assert (categories[18], categories[62]) == (("dog", "animal"), ("chair", "furniture"))


def test_image_ids_of_the_splits_and_annotation_ids_are_unique(contents):
    ids = []
    for content in contents.values():
        ids += [image["id"] for image in content["images"]]
        own = [a["id"] for a in content["annotations"]]
        assert len(own) == len(set(own))
        assert 0 not in own  # which COCOeval takes for "no match"
    assert len(ids) == len(set(ids))


def test_annotated_categories_are_six_around_a_gap(train):
    assert set(Counter(a["category_id"] for a in train.anns.values())) == {9, 10, 11, 13, 14, 15}


def test_boxes_areas_and_polygons_agree_with_the_masks(train):
    """pycocotools draws polygon and run lengths. Its polygons round their border pixels its own way."""
    for annotation in train.anns.values():
        mask = train.annToMask(annotation).astype(bool)
        x, y, width, height = annotation["bbox"]
        box = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))))
        if annotation["iscrowd"]:
            assert mask.sum() == annotation["area"]
            assert box.tolist() == annotation["bbox"]
        else:
            assert mask.sum() == pytest.approx(annotation["area"], rel=0.05, abs=4)
            assert np.abs(box - annotation["bbox"]).max() <= 1
            for polygon in annotation["segmentation"]:
                xs, ys = np.array(polygon).reshape(-1, 2).T
                assert len(xs) >= 3
                assert x <= xs.min() <= xs.max() <= x + width
                assert y <= ys.min() <= ys.max() <= y + height


def test_annotations_of_an_image_do_not_overlap(train):
    """Painting order is respected: a covered object's mask ends where the covering one begins."""
    for image_id in train.imgs:
        masks = [train.annToMask(a) for a in train.imgToAnns[image_id]]
        shared = np.sum(masks, axis=0) > 1
        assert shared.sum() <= 0.02 * shared.size  # the borders' rounding


def test_some_annotations_are_crowds_of_several_parts(train):
    crowds = [a for a in train.anns.values() if a["iscrowd"]]
    assert 1 <= len(crowds) <= len(train.imgs) // 3
    for crowd in crowds:
        assert set(crowd["segmentation"]) == {"counts", "size"}
        image = train.imgs[crowd["image_id"]]
        assert crowd["segmentation"]["size"] == [image["height"], image["width"]]
        assert sum(crowd["segmentation"]["counts"]) == image["height"] * image["width"]
    assert max(ndimage.label(train.annToMask(crowd))[1] for crowd in crowds) >= 4


def test_images_have_several_sizes_and_objects_are_large_enough(train):
    sizes = Counter((i["width"], i["height"]) for i in train.imgs.values())
    assert set(sizes) == set(SIZES)
    sides = [max(a["bbox"][2:]) for a in train.anns.values() if not a["iscrowd"]]
    assert min(sides) >= 8
    assert 20 < np.median(sides) < 40


def test_ade20k_has_the_official_layout(root):
    folder = root / "ADEChallengeData2016"
    for split, name, count in (("training", "train", 40), ("validation", "val", 16)):
        stems = [f"ADE_{name}_{number:08d}" for number in range(1, count + 1)]
        assert sorted(p.name for p in (folder / "images" / split).iterdir()) == [f"{s}.jpg" for s in stems]
        assert sorted(p.name for p in (folder / "annotations" / split).iterdir()) == [f"{s}.png" for s in stems]
        for stem in stems:
            image = Image.open(folder / "images" / split / f"{stem}.jpg")
            label = Image.open(folder / "annotations" / split / f"{stem}.png")
            assert image.size == label.size
            assert (label.format, label.mode) == ("PNG", "L")


def test_ade20k_ids_are_spread_and_some_pixels_are_unlabelled(root):
    counts = Counter()
    for path in (root / "ADEChallengeData2016/annotations").rglob("*.png"):
        ids, pixels = np.unique(np.asarray(Image.open(path)), return_counts=True)
        counts.update(dict(zip(ids.tolist(), pixels.tolist())))
    assert set(counts) == {0, *ADE_IDS.values()}
    assert len(counts) == 1 + 3 + 6
    assert (min(set(counts) - {0}), max(counts)) == (1, 150)
    assert 0 < counts[0] < 0.05 * sum(counts.values())


def test_both_datasets_show_the_same_images_and_objects(root, train):
    """Pixel for pixel: what COCO annotates carries one label per annotation in ADE20K, and what it does not, none."""
    folder = root / "ADEChallengeData2016"
    for number, image_id in enumerate(sorted(train.imgs), start=1):
        name = train.imgs[image_id]["file_name"]
        stem = f"training/ADE_train_{number:08d}"
        assert (root / "coco/train2017" / name).read_bytes() == (folder / f"images/{stem}.jpg").read_bytes()
        label = np.asarray(Image.open(folder / f"annotations/{stem}.png"))
        for annotation in train.imgToAnns[image_id]:
            inside = label[train.annToMask(annotation) > 0]
            kind = dense.KINDS[list(dense.COCO_IDS.values()).index(annotation["category_id"])]
            assert (inside == ADE_IDS[kind]).mean() > 0.85


def test_unlabelled_pixels_are_the_clutter():
    drawn = next(p for p in (dense.picture(0, "train", i) for i in range(50)) if p.scene.objects[-1].kind in CLUTTER)
    first = len(drawn.scene.regions)
    clutter = [first + i for i, thing in enumerate(drawn.scene.objects) if thing.kind in CLUTTER]
    assert ((dense.label_image(drawn) == 0) == np.isin(drawn.owner, clutter)).all()


def test_the_same_seed_gives_the_same_bytes_and_another_none(root, tmp_path, monkeypatch):
    monkeypatch.setattr(dense, "TRAIN", 3)
    monkeypatch.setattr(dense, "VAL", 2)
    for make, images in ((dense.coco, "*/*.jpg"), (dense.ade20k, "images/*/*.jpg")):
        first, again, other = (make(tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1)))
        assert digests(first) == digests(again)
        assert len(list(first.glob(images))) == 5
        assert not {p.read_bytes() for p in first.glob(images)} & {p.read_bytes() for p in other.glob(images)}
