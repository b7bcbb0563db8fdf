"""The torchvision engine: its augmentation, its model, its training step and what it writes of its detections."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_util
from safetensors.torch import load_file
from torch import nn

from mae_core.data import MEAN, STD, Sample, collate
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.training import LOG_FILE
from tests.fixtures.coco import COLOURS, FIRST_ID, rectangle, write_coco, write_split
from tests.fixtures.detection import TASK, job_of
from tests.fixtures.transfer import assert_same_weights
from transfer.data.coco import IDS, read_split, training_examples
from transfer.detection import engine_torchvision
from transfer.detection.engine_torchvision import Jittered, MaskRCNN, head_norm, predict
from transfer.detection.shared import DETECTOR_FILE, RoIBatchNorm, build_pyramid, parameter_groups
from transfer.pyramid import ViTPyramid


def model_of(job, normalization=(MEAN, STD)) -> MaskRCNN:
    return MaskRCNN(build_pyramid(job)[0], job.recipe, RoIBatchNorm, normalization)


def batch_of(job, count: int = 4):
    dataset = Jittered(training_examples(Path(job.data.root)), job.recipe, job.seed)
    return collate([dataset[Sample(i, i)] for i in range(count)])[:2]


# The training images


def test_a_sample_is_a_function_of_seed_and_position(root):
    r, examples = TASK.recipe("vit_mini_patch8", "mini"), training_examples(root)
    dataset = Jittered(examples, replace(r, image_size=64), 0)
    image, target, bad = dataset[Sample(3, 17)]
    dataset[Sample(1, 4)]
    again, same, _ = dataset[Sample(3, 17)]
    assert torch.equal(image, again)
    assert target.keys() == same.keys() == {"boxes", "labels", "masks", "size"}
    assert target.pop("size") == same.pop("size")
    assert all(torch.equal(target[key], same[key]) for key in target)
    assert not torch.equal(image, dataset[Sample(3, 18)][0])
    assert not torch.equal(image, Jittered(examples, replace(r, image_size=64), 1)[Sample(3, 17)][0])
    assert (image.shape, image.dtype, bad, len(dataset)) == ((3, 64, 64), torch.uint8, "", 8)


def test_boxes_are_made_anew_and_objects_that_are_cut_away_are_gone(root):
    r = replace(TASK.recipe("vit_mini_patch8", "mini"), image_size=64, min_scale=1.0, max_scale=3.0)
    examples = training_examples(root)
    dataset, counts = Jittered(examples, r, 0), set()
    for position in range(100):
        image, target, _ = dataset[Sample(3, position)]
        masks = target["masks"].numpy()
        height, width = target["size"]
        assert masks.shape == (len(target["labels"]), 64, 64)
        assert target["boxes"].shape == (len(masks), 4)
        assert masks.any(axis=(1, 2)).all()
        for padded in (masks, image):
            assert not padded[:, height:].any()
            assert not padded[:, :, width:].any()
        for mask, box, label in zip(masks, target["boxes"].tolist(), target["labels"].tolist()):
            rows, columns = np.nonzero(mask)
            assert box == pytest.approx([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], abs=1)
            # The pixels below the mask are of the colour of the class: labels stay with their masks.
            colour = np.median(image.numpy()[:, mask.astype(bool)], axis=1)
            assert min(COLOURS, key=lambda category: np.abs(colour - COLOURS[category]).sum()) == IDS[label - 1]
        counts.add(len(masks))
    assert counts == {0, 1, 2}
    assert target["boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64


def test_a_damaged_or_exchanged_image_ends_the_training_with_its_name(tmp_path):
    write_coco(tmp_path)
    examples = training_examples(tmp_path)
    dataset = Jittered(examples, TASK.recipe("vit_mini_patch8", "mini"), 0)
    Image.new("RGB", (5, 7)).save(examples[2].file)
    with pytest.raises(UserError, match=r"000102\.jpg is 5x7 px, its annotations are for 56x56"):
        dataset[Sample(2, 0)]
    Path(examples[2].file).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"000102\.jpg cannot be read as an image"):
        dataset[Sample(2, 0)]


# The model


def test_padding_is_zero_after_normalisation_and_the_rest_is_the_checkpoint_s(root, tmp_path):
    job = job_of(root, tmp_path)
    for mean, std in ((MEAN, STD), ((0.5, 0.4, 0.3), (0.2, 0.5, 0.25))):
        model, seen = model_of(job, (mean, std)).eval(), []
        model.body.register_forward_pre_hook(lambda module, arguments, s=seen: s.append(arguments[0]))
        images = torch.randint(1, 256, (2, 3, 64, 64), dtype=torch.uint8)
        with torch.no_grad():
            model.features(images, [torch.tensor([40, 64]), torch.tensor([64, 23])])
        (normalised,) = seen
        expected = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(normalised[0, :, :40], expected[0, :, :40])
        torch.testing.assert_close(normalised[1, :, :, :23], expected[1, :, :, :23])
        assert not normalised[0, :, 40:].any()
        assert not normalised[1, :, :, 23:].any()


def test_training_in_bf16_is_tested_in_float32(root, tmp_path):
    job = job_of(root, tmp_path, Machine(precision="bf16"))
    model, seen = model_of(job), []
    model.body.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    predict(model, job)
    assert seen
    assert not any(seen)


def test_a_job_normalises_as_its_checkpoint_says(root, tmp_path, monkeypatch):
    job = job_of(root, tmp_path, epochs=1)
    job = replace(job, checkpoint=replace(job.checkpoint, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)))
    model = captured(job, monkeypatch)[0]
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([127.5, 102.0, 76.5]))
    torch.testing.assert_close(model.std.flatten(), torch.tensor([25.5, 51.0, 76.5]))


def captured(job, monkeypatch):
    """The model, optimizer and Training that the engine hands to the loop."""

    given = []
    monkeypatch.setattr(engine_torchvision, "fit", lambda *arguments: given.extend(arguments) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine_torchvision.train_and_predict(job)
    return given


def test_the_detector_sees_the_pyramids_own_maps(root, tmp_path):
    job = job_of(root, tmp_path)
    model, seen = model_of(job).eval(), []
    model.fpn.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    alone = ViTPyramid(job.checkpoint.arch, 64, window=3).eval()
    alone.load_state_dict(model.body.state_dict())
    pixels = torch.from_numpy(np.array(Image.open(training_examples(root)[0].file))).permute(2, 0, 1)
    assert pixels.shape == (3, 48, 64)
    square, normalised = torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(1, 3, 64, 64)
    square[0, :, :48] = pixels
    normalised[0, :, :48] = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        model.features(square, [torch.tensor([48, 64])])
        expected = alone(normalised)
    assert [tuple(m.shape) for m in seen[0].values()] == [(1, 128, side, side) for side in (32, 16, 8, 4)]
    torch.testing.assert_close(list(seen[0].values()), expected, rtol=1e-4, atol=1e-4)


def test_the_parts_are_those_of_the_recipe(root, tmp_path):
    """Anchors of 8 strides a side, three shapes; RPN of two hidden convolutions without norm; heads of four with
    BatchNorm; one fully connected layer; BatchNorm in the FPN."""
    job = job_of(root, tmp_path, fpn_dim=24, head_dim=20, fc_dim=40, rpn_convs=2, proposals=30)
    model = model_of(job)
    anchors = model.rpn.anchor_generator
    assert anchors.sizes == ((16,), (32,), (64,), (128,), (256,))  # for strides 2 to 32; 32 to 512 for 4 to 64
    assert anchors.aspect_ratios == ((0.5, 1.0, 2.0),) * 5

    def layers(module, kind):
        return [tuple(m.weight.shape) for m in module.modules() if isinstance(m, kind)]

    assert layers(model.rpn.head, nn.Conv2d) == [(24, 24, 3, 3)] * 2 + [(3, 24, 1, 1), (12, 24, 1, 1)]
    assert layers(model.rpn, nn.BatchNorm2d) == []
    box, mask = model.roi_heads.box_head, model.roi_heads.mask_head
    for head in (box, mask):
        assert layers(head, nn.Conv2d) == [(20, 24, 3, 3)] + [(20, 20, 3, 3)] * 3
        assert layers(head, RoIBatchNorm) == [(20,)] * 4
    assert layers(box, nn.Linear) == [(40, 20 * 7 * 7)]
    assert layers(model.roi_heads.mask_predictor, nn.Conv2d) == [(81, 20, 1, 1)]
    assert layers(model.roi_heads.box_predictor, nn.Linear) == [(81, 40), (81 * 4, 40)]
    assert layers(model.fpn, nn.Conv2d) == [(24, 128, 1, 1)] * 4 + [(24, 24, 3, 3)] * 4
    assert layers(model.fpn, RoIBatchNorm) == [(24,)] * 8
    features = model.features(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [torch.tensor([64, 64])])
    assert [m.shape[-1] for m in features.values()] == [32, 16, 8, 4, 2]
    assert model.roi_heads.score_thresh == 0.05
    assert model.roi_heads.nms_thresh == 0.5
    assert model.roi_heads.detections_per_img == 100


def test_boxes_keep_their_place_in_bf16(root, tmp_path):
    """The objects' own boxes are among the sampled ones, to the last bit; anchors and scores are float32 too."""
    model, seen = model_of(job_of(root, tmp_path, roi_batch=64)), []
    model.roi_heads.box_roi_pool.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    model.rpn.anchor_generator.register_forward_hook(lambda module, arguments, anchors: seen.append(anchors))
    target = {
        "boxes": torch.tensor([[33.3, 40.7, 63.1, 62.9], [3.3, 5.7, 17.1, 11.9]]),  # bf16 has quarters from 32 on
        "labels": torch.tensor([1, 2]),
        "masks": torch.ones(2, 64, 64, dtype=torch.uint8),
        "size": (64, 64),
    }
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [target])
        model.eval()
        (found,) = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [target])
    anchors, (sampled,) = seen[:2]
    assert anchors[0].dtype == sampled.dtype == torch.float32
    for box in target["boxes"]:
        assert (sampled == box).all(dim=1).any()
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert {found[key].dtype for key in ("boxes", "scores", "masks")} == {torch.float32}


def test_batchnorm_is_synchronised_only_on_gpus():
    for machine in (Machine(), Machine(device="cuda"), Machine(processes=2)):
        assert head_norm(machine) is RoIBatchNorm
    assert head_norm(Machine(device="cuda:1", processes=2)) is nn.SyncBatchNorm


@pytest.mark.parametrize("empty", [1, 4], ids=["one image", "all images"])
def test_images_without_an_object_train(root, tmp_path, empty):
    job = job_of(root, tmp_path)
    model = model_of(job).train()
    images, targets = batch_of(job)
    for target in targets[:empty]:
        target |= {key: target[key][:0] for key in ("boxes", "labels", "masks")}
    losses = model(images, targets)
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    assert total > 0
    assert (losses["loss_mask"] == 0) == (empty == 4)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_an_image_without_proposals_is_evaluated(root, tmp_path):
    """The RPN finds nothing."""
    job = job_of(root, tmp_path)
    model = model_of(job).eval()
    model.rpn.score_thresh = 2.0  # no probability reaches it
    with torch.no_grad():
        (found,) = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [{"size": (64, 64)}])
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape[0] == 0


# Training


def trained(job) -> dict[str, torch.Tensor]:
    engine_torchvision.train_and_predict(job)
    return load_file(job.work / DETECTOR_FILE)


KNOBS = {
    "image_size": 48, "epochs": 3, "warmup_epochs": 1.0, "batch": 2, "lr": 2e-4, "betas": (0.5, 0.999),
    "weight_decay": 0.3, "layer_decay": 0.5, "drop_path": 0.5, "window": 4, "min_scale": 0.5, "max_scale": 2.0,
    "fpn_dim": 32, "head_dim": 24, "fc_dim": 40, "rpn_convs": 1, "rpn_batch": 64, "roi_batch": 8, "proposals": 10,
}  # fmt: skip


@pytest.mark.slow
def test_every_knob_of_the_recipe_changes_what_is_trained(root, tmp_path):
    """And nothing else does: the same recipe gives the same weights."""
    base = trained(job_of(root, tmp_path / "base"))
    trained(job_of(root, tmp_path / "again"))
    assert_same_weights(tmp_path / "again" / DETECTOR_FILE, tmp_path / "base" / DETECTOR_FILE)
    assert set(KNOBS) == set(vars(job_of(root, tmp_path).recipe))
    for knob, value in KNOBS.items():
        found = trained(job_of(root, tmp_path / knob, **{knob: value}))
        same = found.keys() == base.keys() and all(
            found[name].shape == value.shape and torch.equal(found[name], value) for name, value in base.items()
        )
        assert not same, knob


def test_knobs_reach_the_parts_they_name(root, tmp_path, monkeypatch):
    job = job_of(root, tmp_path, rpn_batch=48, roi_batch=24, proposals=30, drop_path=0.4, window=4, seed=3)
    model, optimizer, training = captured(job, monkeypatch)
    rpn, roi = model.rpn, model.roi_heads
    assert rpn.fg_bg_sampler.batch_size_per_image == 48
    assert rpn._pre_nms_top_n == {"training": 60, "testing": 30}
    assert rpn._post_nms_top_n == {"training": 30, "testing": 30}
    assert roi.fg_bg_sampler.batch_size_per_image == 24
    assert (rpn.fg_bg_sampler.positive_fraction, roi.fg_bg_sampler.positive_fraction) == (0.5, 0.25)
    assert model.body.blocks[-1].drop_path1.drop_prob == pytest.approx(0.4)
    assert (model.body.window, model.body.bias_windowed.shape) == (4, (4, 7, 7))
    assert model.body.grid == (8, 8)
    assert (training.batch, training.micro_batch, training.epochs) == (4, 4, 2)
    assert (training.seed, training.dataset.seed, len(training.dataset)) == (3, 3, 8)
    # 2 steps an epoch, half an epoch of warm-up: from 0 over lr at step 1 down by half a cosine.
    rates = [training.lr_at(step) / job.recipe.lr for step in range(4)]
    expected = [0, 1, 0.5 * (1 + np.cos(np.pi / 3)), 0.5 * (1 + np.cos(2 * np.pi / 3))]
    np.testing.assert_allclose(rates, expected, atol=1e-9)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_all_but_norms_positions_and_bias_tables_have_weight_decay(root, tmp_path, monkeypatch):
    model, optimizer, _ = captured(job_of(root, tmp_path, weight_decay=0.25), monkeypatch)
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups: dict[float, set[str]] = {0.25: set(), 0.0: set()}
    for group in optimizer.param_groups:
        groups[group["weight_decay"]] |= {name_of[id(p)] for p in group["params"]}
    assert groups[0.25] | groups[0.0] == set(name_of.values())
    assert {"body.pos_embed", "body.bias_global", "body.bias_windowed", "body.blocks.5.norm2.bias"} <= groups[0.0]
    assert {"body.blocks.0.norm1.weight", "roi_heads.box_head.0.1.weight", "body.upsample_4x.1.bias"} <= groups[0.0]
    decayed = {"body.patch_embed.proj.weight", "body.blocks.5.attn.qkv.weight", "body.upsample_2x.weight"}
    decayed |= {"fpn.inner_blocks.0.0.weight", "roi_heads.box_predictor.cls_score.weight"}
    decayed |= {"rpn.head.conv.0.0.bias", "body.blocks.5.attn.qkv.bias", "body.upsample_2x.bias"}
    assert decayed <= groups[0.25]
    model.body.patch_embed.proj.weight.requires_grad_(False)
    frozen = {id(p) for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert id(model.body.patch_embed.proj.weight) not in frozen


def test_the_loss_is_the_sum_of_the_model_s(root, tmp_path, monkeypatch):
    model, _, training = captured(job_of(root, tmp_path), monkeypatch)
    images, targets = batch_of(job_of(root, tmp_path))
    torch.manual_seed(0)
    expected = sum(model.train()(images, targets).values())
    torch.manual_seed(0)
    assert training.loss_of(model, *training.prepare(images, targets, 0, 0)) == expected


@pytest.mark.slow
def test_the_images_it_trains_on_are_learnt(root, tmp_path):
    job = job_of(root, tmp_path, epochs=24, lr=2e-3, min_scale=1.0, max_scale=1.0, drop_path=0.0)
    engine_torchvision.train_and_predict(job)
    losses = [json.loads(line)["loss"] for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert len(losses) == 24
    assert losses[-1] < 0.6 * losses[0], losses


def test_accumulation_keeps_the_effective_batch(root, tmp_path, monkeypatch):
    _, _, whole = captured(job_of(root, tmp_path), monkeypatch)
    _, _, parts = captured(job_of(root, tmp_path, Machine(micro_batch=3)), monkeypatch)
    assert (whole.micro_batch, parts.micro_batch, parts.batch) == (4, 2, 4)


def test_too_few_images_for_a_batch_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="has 8 images, less than one batch of 9"):
        engine_torchvision.train_and_predict(job_of(root, tmp_path, batch=9))


# Prediction


class Fixed(nn.Module):
    """Detects the same in every image, given in the padded square; keeps what it was given."""

    def __init__(self, boxes, masks) -> None:
        super().__init__()
        self.boxes, self.masks, self.given = torch.tensor(boxes).reshape(-1, 4), masks, []

    def forward(self, images, targets):
        self.given += [(image, target["size"]) for image, target in zip(images, targets)]
        count = len(self.boxes)
        labels, scores = torch.tensor([17, 12, 80][:count]), torch.linspace(0.9, 0.5, count)
        return [{"boxes": self.boxes, "labels": labels, "scores": scores, "masks": self.masks} for _ in images]


def test_detections_are_mapped_back_to_the_original_image(tmp_path):
    """Of 120 x 80 px, shown as 60 x 40 in a square of 60: all is doubled. What lies in the padding is no detection."""
    write_coco(tmp_path)
    sizes = [(120, 80), (80, 120), (90, 90)]
    write_split(tmp_path, "val", sizes, [rectangle(FIRST_ID["val"] + i, 1, 5, 5, 9, 9) for i in range(3)])
    job = job_of(tmp_path, tmp_path / "work", Machine(micro_batch=2), image_size=60)
    boxes = [[10.0, 5, 30, 20], [40, 30, 70, 50], [5, 45, 20, 60]]
    model = Fixed(boxes, torch.ones(3, 1, 28, 28)).train()
    found = predict(model, job)
    assert not model.training
    assert [size for _, size in model.given] == [(40, 60), (60, 40), (60, 60)]
    examples = read_split(tmp_path, "val").examples
    for (image, (height, width)), example in zip(model.given, examples):
        expected = np.asarray(Image.open(example.file).resize((width, height), Image.Resampling.BILINEAR))
        assert np.array_equal(image.permute(1, 2, 0).numpy()[:height, :width], expected)
        assert image.dtype == torch.uint8
        assert not image[:, height:].any()
        assert not image[:, :, width:].any()

    by_image = {i: [entry for entry in found if entry["image_id"] == FIRST_ID["val"] + i] for i in range(3)}
    assert [len(by_image[i]) for i in range(3)] == [2, 2, 3]
    first, second = by_image[0]
    assert (first["category_id"], second["category_id"]) == (18, 13)  # ranks 17 and 12 among the 80
    assert (first["bbox"], second["bbox"]) == ([20, 10, 40, 30], [80, 60, 40, 20])
    assert first["score"] == pytest.approx(0.9)
    # The upright one is 40 px wide: the second box begins where it ends, the third is inside.
    assert [entry["bbox"] for entry in by_image[1]] == [[20, 10, 40, 30], [10, 90, 30, 30]]
    assert [entry["category_id"] for entry in by_image[2]] == [18, 13, 90]
    assert by_image[2][0]["bbox"] == pytest.approx([15, 7.5, 30, 22.5])
    for entry, example in ((first, examples[0]), (second, examples[0]), (by_image[2][2], examples[2])):
        mask = mask_util.decode(entry["segmentation"])
        assert mask.shape == (example.height, example.width)
        x, y, w, h = entry["bbox"]
        assert mask.sum() == pytest.approx(w * h, rel=0.2)
        rows, columns = np.nonzero(mask)
        assert x - 2 <= columns.min() <= columns.max() < x + w + 2
        assert y - 2 <= rows.min() <= rows.max() < y + h + 2


def test_the_lower_half_of_a_mask_stays_the_lower_half(tmp_path):
    write_coco(tmp_path)
    job = job_of(tmp_path, tmp_path / "work", image_size=64)
    masks = torch.zeros(1, 1, 28, 28)
    masks[..., 14:, :] = 0.8
    entry = predict(Fixed([[10.0, 8, 42, 40]], masks), job)[0]
    mask = mask_util.decode(entry["segmentation"])
    assert not mask[:23].any()
    assert mask[25:39, 12:40].all()
    assert entry["bbox"] == [10, 8, 32, 32]


@pytest.mark.parametrize(("over", "least"), [(5, 0.96), (20, 0.97)])
def test_a_mask_whose_box_reaches_into_the_padding_stays_on_its_object(tmp_path, over, least):
    """An ellipse that goes on below the image, as the share of each cell of its whole box that it covers. Pasted into
    what the image leaves of the box, its IoU is 0.93 and 0.85."""
    write_coco(tmp_path)
    write_split(tmp_path, "val", [(120, 80)], [rectangle(FIRST_ID["val"], 1, 5, 5, 9, 9)])
    box = np.array([24.0, 20.0, 90.0, 80.0 + over])

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        centre, radii = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
        return ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 < 1

    steps = (np.arange(280) + 0.5) / 280
    fine = inside(*np.meshgrid(*(box[i] + steps * (box[2 + i] - box[i]) for i in (0, 1))))
    cells = torch.from_numpy(fine.reshape(28, 10, 28, 10).mean(axis=(1, 3))).float()[None, None]
    (entry,) = predict(Fixed([box.tolist()], cells), job_of(tmp_path, tmp_path / "work", image_size=120))
    mask, truth = (
        mask_util.decode(entry["segmentation"]),
        inside(*np.meshgrid(np.arange(120) + 0.5, np.arange(80) + 0.5)),
    )
    assert entry["bbox"] == [24, 20, 66, 60]
    assert (mask & truth).sum() / (mask | truth).sum() > least


def test_nothing_detected_is_an_empty_list(root, tmp_path):
    assert predict(Fixed([], torch.zeros(0, 1, 28, 28)), job_of(root, tmp_path)) == []


def test_lack_of_memory_halves_what_is_tested_at_once(tmp_path):
    """As often as needed, and from there on; the detections are those of a test that had enough."""
    write_coco(tmp_path)
    write_split(tmp_path, "val", [(60, 40)] * 7, [rectangle(FIRST_ID["val"] + i, 1, 5, 5, 9, 9) for i in range(7)])
    job = job_of(tmp_path, tmp_path / "work", Machine(micro_batch=5), image_size=60)
    masks = torch.ones(1, 1, 28, 28)

    class Small(Fixed):
        room, error, sizes = 2, torch.OutOfMemoryError("too many"), ()

        def forward(self, images, targets):
            self.sizes += (len(images),)
            if len(images) > self.room:
                raise self.error
            return super().forward(images, targets)

    expected = predict(Fixed([[10.0, 8, 42, 40]], masks), job)
    assert [entry["image_id"] for entry in expected] == [FIRST_ID["val"] + i for i in range(7)]
    small = Small([[10.0, 8, 42, 40]], masks)
    assert predict(small, job) == expected
    assert small.sizes == (5, 2, 2, 1, 2)
    small.error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    assert predict(small, job) == expected
    small.room = 0
    with pytest.raises(UserError, match="out of GPU memory while one image of 60 px is tested"):
        predict(small, job)
