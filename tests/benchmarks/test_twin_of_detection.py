"""The twin of Mask R-CNN: what it takes of the data, and what it calls different."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import twins
from benchmarks.originals import Call, detections, vitdet
from benchmarks.originals.detections import Run, compare, compare_detections, made_up
from mae_core.errors import UserError
from tests.fixtures.coco import FIRST_ID, change, write_coco
from transfer.data.coco import annotation_file, inspect_coco, read_split

LITTLE = {"train": 4, "val": 2}


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(vitdet, "IMAGES", LITTLE)


def test_it_takes_the_first_images_with_an_object(tmp_path):
    data = write_coco(tmp_path / "data")
    path = annotation_file(data, "train")
    content = json.loads(path.read_text())
    first = FIRST_ID["train"]
    change(path, annotations=[a for a in content["annotations"] if a["image_id"] != first + 1])
    root = vitdet.some_of_coco(data, tmp_path / "some")
    assert inspect_coco(root).counts == LITTLE
    ids = [first, first + 2, first + 3, first + 4]
    assert [example.id for example in read_split(root, "train").examples] == ids
    some = json.loads(annotation_file(root, "train").read_text())
    assert {a["image_id"] for a in some["annotations"]} == set(ids)
    assert any(a["iscrowd"] for a in some["annotations"])
    assert all((root / "coco" / "train2017" / image["file_name"]).is_file() for image in some["images"])


def test_data_that_it_cannot_take_are_refused(tmp_path, monkeypatch):
    data = write_coco(tmp_path / "data")
    with pytest.raises(UserError, match="COCO must lie at"):
        vitdet.some_of_coco(tmp_path, tmp_path / "a")
    monkeypatch.setattr(vitdet, "IMAGES", {"train": 9, "val": 2})
    with pytest.raises(UserError, match="train2017 has 8 images with objects; this twin takes 9"):
        vitdet.some_of_coco(data, tmp_path / "b")
    categories = json.loads(annotation_file(data, "train").read_text())["categories"]
    monkeypatch.setattr(vitdet, "IMAGES", LITTLE)
    change(annotation_file(data, "train"), categories=[c for c in categories if c["id"] != 90])
    objects = json.loads(annotation_file(data, "train").read_text())["annotations"]
    change(annotation_file(data, "train"), annotations=[a for a in objects if a["category_id"] != 90])
    with pytest.raises(UserError, match="lacks some of COCO's 80 categories"):
        vitdet.some_of_coco(data, tmp_path / "c")


def test_without_detectron2_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(vitdet.importlib.util, "find_spec", lambda name: None)
    flags = ["--reference", str(tmp_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert twins.main(["detection", *flags]) == 2
    assert "detectron2 is not installed; docs/coco.md says how" in capsys.readouterr().err


def run(**changes) -> Run:
    losses = [{"loss_cls": 2.0, "loss_mask": 0.5}, {"loss_cls": 1.0, "loss_mask": 0.4}]
    start, end = {"w": torch.zeros(4), "n": torch.tensor(1)}, {"w": torch.ones(4), "n": torch.tensor(7)}
    boxes = {3: np.array([[0.9, 1, 2, 3, 4], [0.2, 5, 6, 7, 8]]), 5: np.array([[0.8, 1, 1, 9, 9]])}
    return replace(Run(losses, [0.1, 0.2], start, end, boxes), **changes)


def failed(ours: Run, theirs: Run) -> list[str]:
    return [difference.quantity for difference in compare(ours, theirs) if not difference.held]


def test_equal_runs_are_equal_and_every_difference_is_seen():
    assert failed(run(), run()) == []
    other = [{"loss_cls": 2.0, "loss_mask": 0.5}, {"loss_cls": 1.0, "loss_mask": 0.41}]
    assert failed(run(), run(losses=other)) == ["loss_mask, largest gap (step 2 of 2), relative"]
    assert failed(run(), run(rates=[0.1, 0.2 + 1e-8])) == ["rate, largest gap, of the highest"]
    (weights,) = failed(run(), run(end={"w": torch.ones(4) * 1.001, "n": torch.tensor(7)}))
    assert weights.startswith("weights")
    assert failed(run(), run(losses=[{"loss_cls": float("nan"), "loss_mask": 0.5}, other[0]])) != []


def test_detections_are_compared_one_by_one():
    ours = run().detections
    theirs = {image: rows.copy() for image, rows in ours.items()}
    theirs[3][1, 4] += 0.01
    assert [d.held for d in compare_detections(ours, theirs)] == [True, True, False]
    assert compare_detections(ours, theirs)[2].difference == pytest.approx(0.01)
    (count,) = compare_detections(ours, {3: theirs[3]})
    assert (count.ours, count.theirs, count.held) == (3, 2, False)


def test_made_up_detections_are_partly_right(tmp_path):
    """Each object twice; the first shifted by about a px, the mask with its box."""
    for example in read_split(write_coco(tmp_path), "train").examples:
        boxes, scores, labels, masks = made_up(example)
        count = len(example.labels)
        assert (len(boxes), len(scores), len(labels), len(masks)) == (2 * count,) * 4
        assert np.abs(boxes[:count] - example.boxes).max() <= 5
        for box, mask in zip(boxes[:count], masks):
            rows, columns = np.nonzero(mask)
            assert np.abs(box - [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).max() <= 1


PROJECT = """
import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

model = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
train = model_zoo.get_config("common/train.py").train
optimizer = model_zoo.get_config("common/optim.py").AdamW
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.augmentations = [
    L(T.RandomFlip)(horizontal=True),
    L(T.ResizeScale)(min_scale=0.1, max_scale=2.0, target_height=1024, target_width=1024),
    L(T.FixedSizeCrop)(crop_size=(1024, 1024), pad=False),
]
dataloader.train.mapper.image_format, dataloader.train.mapper.recompute_boxes = "RGB", True
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=1024, max_size=1024)]
"""


@pytest.mark.slow
@pytest.mark.detectron2
@pytest.mark.filterwarnings("ignore")
def test_both_train_and_evaluate_alike(tmp_path, monkeypatch):
    """With a config in place of the project's, and with one of ours changed."""
    pytest.importorskip("detectron2", reason="detectron2 is not installed")
    config = tmp_path / "checkout" / vitdet.CONFIG
    config.parent.mkdir(parents=True)
    config.write_text(PROJECT)
    little = replace(vitdet.RECIPE, image_size=64, epochs=2, batch=2, min_scale=0.8, max_scale=1.25, proposals=20)
    monkeypatch.setattr(vitdet, "RECIPE", little)
    data = write_coco(tmp_path / "data")
    for split in ("train", "val"):  # polygons of whole numbers only would be cut to whole numbers by detectron2
        path = annotation_file(data, split)
        objects = json.loads(path.read_text())["annotations"]
        for a in objects:
            a["segmentation"] = a["segmentation"] if a["iscrowd"] else [[v + 0.25 for v in a["segmentation"][0]]]
        change(path, annotations=objects)

    def quantities(work: str) -> dict[str, bool]:
        (tmp_path / work).mkdir()
        return {d.quantity: d.held for d in vitdet.detection(Call(data, tmp_path / "checkout", tmp_path / work))}

    held = quantities("same")
    assert all(held.values()), held
    assert {"box AP, %", "mask AP, %"} <= held.keys()
    monkeypatch.setattr(detections.shared, "ANCHOR_STRIDES", 9)
    assert not quantities("other")["loss_rpn_loc of step 1, relative"]
