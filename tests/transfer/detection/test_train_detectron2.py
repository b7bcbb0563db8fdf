"""The detectron2 engine's images and masks against those of detectron2's own loader."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fixtures.coco import FIRST_ID, rectangle, runs, write_split
from tests.fixtures.transfer import ARCH

pytest.importorskip("detectron2", reason="detectron2 is not installed")

import detectron2.data.transforms as T
from detectron2.data import DatasetMapper
from detectron2.data.datasets import load_coco_json
from detectron2.structures import PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from detectron2.utils.events import EventStorage

from mae_core.data import Sample, seed_all
from transfer.data.coco import LABELS, annotation_file, training_examples
from transfer.detection import engine_detectron2
from transfer.detection.recipe import recipe
from transfer.detection.shared import RoIBatchNorm
from transfer.detection.train_detectron2 import MappedExamples
from transfer.pyramid import ViTPyramid

pytestmark = [pytest.mark.detectron2, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def r():
    return replace(recipe(ARCH, "mini"), image_size=64, roi_batch=16, proposals=32)


ELL = [4.0, 4.5, 30.2, 4.5, 30.2, 20.1, 15.7, 20.1, 15.7, 44.3, 4.0, 44.3]
PARTS = [[33.3, 5.1, 60.9, 8.2, 40.4, 22.6], [36.0, 28.4, 58.8, 30.3, 50.1, 45.7]]


def write_outlines(root: Path) -> Path:
    """Four images: polygons of one and two parts; in the last, one of the objects as run lengths."""
    objects = []
    for i in range(4):
        ell = (
            {"segmentation": runs(polygons_to_bitmask([np.array(ELL)], 48, 64))} if i == 3 else {"segmentation": [ELL]}
        )
        objects.append(rectangle(FIRST_ID["train"] + i, 1, 4, 4.5, 26.2, 39.8, **ell))
        objects.append(rectangle(FIRST_ID["train"] + i, 18, 33.3, 5.1, 27.6, 40.6, segmentation=PARTS))
    write_split(root, "train", [(64, 48)] * 4, objects)
    return root


def test_mask_targets_are_those_of_detectron2_s_own_loader(tmp_path, r):
    """Of its reader of the json and its mapper with ViTDet's augmentations: the same image, classes, boxes, and masks
    inside any box."""
    root, r = write_outlines(tmp_path), replace(r, min_scale=0.3, max_scale=2.5)
    dicts = load_coco_json(str(annotation_file(root, "train")), str(root / "coco" / "train2017"))
    jitter = T.ResizeScale(r.min_scale, r.max_scale, target_height=64, target_width=64)
    mapper = DatasetMapper(
        True,
        augmentations=[T.RandomFlip(horizontal=True), jitter, T.FixedSizeCrop((64, 64), pad=False)],
        image_format="RGB",
        use_instance_mask=True,
        recompute_boxes=True,
    )
    mapped, cut = MappedExamples(training_examples(root), r, seed=0), 0
    for position in range(12):
        ours = mapped[Sample(position % 3, position)]
        seed_all(0, position)
        theirs = mapper(dicts[position % 3])
        assert torch.equal(ours["image"], theirs["image"])
        ours, theirs = ours["instances"], theirs["instances"]
        assert isinstance(ours.gt_masks, PolygonMasks)
        assert ours.gt_classes.tolist() == [LABELS[category] for category in theirs.gt_classes.tolist()]
        assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
        boxes = ours.gt_boxes.tensor + torch.tensor([-1.3, 0.7, 2.1, -0.2])
        targets = [instances.gt_masks.crop_and_resize(boxes, 28) for instances in (ours, theirs)]
        assert torch.equal(*targets)
        cut += len(ours) < 2
    assert 0 < cut < 8


def test_an_image_with_run_lengths_gets_bitmaps_of_both_forms(tmp_path, r):
    """Tight boxes around what is left of the masks, which are where the polygons are; it trains beside the others."""
    root = write_outlines(tmp_path)
    mapped = MappedExamples(training_examples(root), replace(r, min_scale=1.0, max_scale=1.0), seed=0)
    batch = [mapped[Sample(i, i)] for i in range(2, 4)]
    instances = batch[1]["instances"]
    assert instances.gt_classes.tolist() == [0, 16]
    expected = [polygons_to_bitmask([np.array(p) for p in polygons], 48, 64) for polygons in ([ELL], PARTS)]
    flipped = torch.from_numpy(np.stack(expected)[:, :, ::-1].copy())
    masks = instances.gt_masks.tensor
    assert masks.shape == (2, 48, 64)
    near = [(masks ^ truth).sum() for truth in (torch.from_numpy(np.stack(expected)), flipped)]
    assert min(near) <= 0.03 * masks.sum() < max(near)
    for box, mask in zip(instances.gt_boxes.tensor, masks):
        rows, columns = np.nonzero(mask.numpy())
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    with EventStorage():
        losses = engine_detectron2.build_model(ViTPyramid(ARCH, 64, window=6), r, RoIBatchNorm).train()(batch)
    assert losses["loss_mask"] > 0


def test_a_sample_is_a_function_of_its_position(tmp_path, r):
    examples = training_examples(write_outlines(tmp_path))
    mapped = MappedExamples(examples, r, seed=0)
    first, again, other = mapped[Sample(3, 7)], mapped[Sample(3, 7)], mapped[Sample(3, 8)]
    assert torch.equal(first["image"], again["image"])
    assert first["image"].shape != other["image"].shape or not torch.equal(first["image"], other["image"])
    assert max(first["image"].shape[1:]) <= r.image_size
    assert set(first["instances"].gt_classes.tolist()) <= set(examples[3].labels.tolist())
