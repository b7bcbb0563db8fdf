"""ADE20K end to end on a few generated images: what a run leaves, exact resume, several processes."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mae_core.checkpoint import read_checkpoint
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.training import CHECKPOINT_FILE
from mae_core.vit import variant_in_words
from tests.fixtures import SHARED
from tests.fixtures.curves import curves
from tests.fixtures.segmentation import LITTLE, TASK, make_config, make_job, write_ade20k
from tests.fixtures.timm import register_timm, timm_checkpoint
from tests.fixtures.transfer import (
    ARCH,
    OTHERS,
    TORCHRUN,
    assert_same_weights,
    finished,
    kill_at,
    other_checkpoint,
    raising,
    record_samples,
)
from transfer import jobs
from transfer.data import ade20k
from transfer.data.ade20k import FOLDER
from transfer.data.miou import metrics_of
from transfer.pyramid import load_pyramid
from transfer.run import run_job
from transfer.segmentation import tasks, train
from transfer.segmentation.mmseg_plugin import register
from transfer.segmentation.picture import PICTURE_FILE
from transfer.segmentation.tasks import SEGMENTER_FILE


def test_a_mistake_found_while_decoding_is_reported_without_its_traceback(root, tmp_path, monkeypatch):
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\n"
    text += "mae_core.errors.UserError: label.png has the label 200: replace it\n"
    monkeypatch.setattr(tasks, "run", raising(UserError(text)))
    with pytest.raises(UserError, match=r"^label.png has the label 200: replace it$"):
        tasks.segment(make_job(root, tmp_path))


def test_the_plan_says_what_to_install(root, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "installed", lambda module: module != "mmseg")
    said = f"mmsegmentation is not installed here; {TASK.install}"
    assert jobs.obstacle(make_job(root, tmp_path)) == ("skipped", said)
    assert "make install" in said


@pytest.mark.slow
def test_a_run_leaves_a_record_the_weights_and_a_picture(root, tmp_path):
    job = make_job(root, tmp_path, multi_scale=True)
    record = run_job(job)
    assert record.status == "ok", record.reason
    names = {"miou", "macc", "aacc", "miou_ms", "macc_ms", "aacc_ms"}
    assert record.metrics.keys() == record.stderr.keys() == names
    assert all(0 <= value <= 100 for value in record.metrics.values())
    assert record.metrics["miou"] != record.metrics["miou_ms"]
    assert (record.n_eval, record.images_seen, record.engine) == (5, 16, "mmsegmentation")
    assert min(record.resolved["seconds_per_iteration"], record.images_per_second, record.peak_memory_gib) > 0
    assert (record.resolved["norm"], record.resolved["batchnorm_batch"], record.notes) == ("BN", 4, ())
    classes = record.tables["per_class"]
    assert len(classes) == 150
    scored = [c["iou"] for c in classes.values() if c["iou"] is not None]
    assert np.mean(scored) == pytest.approx(record.metrics["miou"], abs=0.01)
    labels = [np.asarray(Image.open(p)) for p in (root / FOLDER / "annotations/validation").iterdir()]
    assert sum(c["pixels"] for c in classes.values()) == sum((label > 0).sum() for label in labels)
    assert set(record.artifacts) == {SEGMENTER_FILE, PICTURE_FILE}
    assert Image.open(tmp_path / PICTURE_FILE).height > 5 * 200
    assert not (tmp_path / CHECKPOINT_FILE).exists()
    assert [step for step, _ in curves(tmp_path)["train/loss"]][-1] == job.recipe.iterations - 1
    json.loads((tmp_path / "record.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in the record"))


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_is_on_in_training_and_the_test_is_in_float32(root, tmp_path, monkeypatch, precision, dtype):
    seen = {"train": set(), "test": set()}
    job = make_job(root, tmp_path, Machine(precision=precision), iterations=2)
    build = train.make_runner

    def watched(config, job):
        runner = build(config, job)
        for part in (runner.model.backbone.blocks[0].mlp.fc1, runner.model.decode_head.fpn_bottleneck.conv):
            part.register_forward_hook(lambda m, _, out: seen["train" if m.training else "test"].add(out.dtype))
        return runner

    monkeypatch.setattr(train, "make_runner", watched)
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert seen == {"train": {dtype}, "test": {torch.float32}}
    assert all(tensor.dtype != torch.bfloat16 for tensor in load_file(tmp_path / SEGMENTER_FILE).values())


@pytest.mark.slow
def test_smaller_micro_batches_are_noted_for_batch_norm(root, tmp_path):
    record = run_job(make_job(root, tmp_path, Machine(micro_batch=2)))
    assert record.notes == ("BatchNorm saw batches of 2, not of 4",)
    assert record.resolved["batchnorm_batch"] == 2
    alone = run_job(make_job(root, tmp_path / "alone", Machine(micro_batch=1)))
    assert alone.status == "failed"
    assert alone.reason == "BatchNorm cannot learn from one image at a time: give --micro-batch 2 or more"


@pytest.mark.slow
def test_a_stopped_run_goes_on_at_its_iteration_without_the_earlier_images(root, tmp_path, monkeypatch):
    """SIGTERM in the third of six iterations; the weights end bit for bit as those of an undisturbed run."""
    taken = record_samples(train.Crops, monkeypatch)
    undisturbed = run_job(make_job(root, tmp_path / "a", iterations=6))
    assert [sample.position for sample in taken] == list(range(24))

    job, loss = make_job(root, tmp_path / "b", iterations=6), train.loss_of

    def stops(model, images, targets):
        if len(taken) == 24 + 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(model, images, targets)

    monkeypatch.setattr(train, "loss_of", stops)
    with pytest.raises(KeyboardInterrupt):
        run_job(job)
    monkeypatch.setattr(train, "loss_of", loss)
    assert [sample.position for sample in taken[24:]] == list(range(12))
    assert not (tmp_path / "b" / "record.json").exists()
    resumed = run_job(job)
    assert [sample.position for sample in taken[36:]] == list(range(12, 24))
    assert_same_weights(*(tmp_path / name / SEGMENTER_FILE for name in "ab"))
    assert resumed.metrics == undisturbed.metrics


def test_a_wrong_validation_file_is_found_before_the_training(tmp_path, monkeypatch):
    """Also beyond the pairs that the plan looks at."""
    monkeypatch.setattr(ade20k, "spread", lambda count: [0, count - 1])
    monkeypatch.setattr(tasks, "train", raising(AssertionError("the training started")))
    image = write_ade20k(tmp_path) / FOLDER / "images/validation/ADE_val_00000003.jpg"
    image.write_bytes(image.read_bytes()[:200])
    record = run_job(make_job(tmp_path, tmp_path / "work"))
    assert record.reason == f"{image} cannot be read as an image: replace it"


def command(root: Path, out: Path, *more: str) -> list[str]:
    knobs = [f"{name}={value}" for name, value in (LITTLE | {"iterations": 8}).items()]
    own = ["--task", "ade20k", "--ckpt", f"random:{ARCH}", "--data", str(root), "--out", str(out), "--recipe", "mini"]
    return ["-m", "transfer.segmentation", *own, "--set", *knobs, "--device", "cpu", *more]


@pytest.mark.slow
def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(root, tmp_path):
    finished(command(root, tmp_path / "a"))
    often = command(root, tmp_path / "b", "--save-minutes", "0")
    kill_at(f"*/{CHECKPOINT_FILE}", 3, often)
    assert not list((tmp_path / "b").rglob("record.json"))
    assert "resuming ade20k" in finished(often)
    (one,), (other,) = ((tmp_path / name).rglob(SEGMENTER_FILE) for name in "ab")
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_two_processes_share_training_and_test(root, tmp_path):
    """The five validation images do not divide by two, yet each counts once: as one process counts them with the same
    weights."""
    finished([*TORCHRUN, *command(root, tmp_path)])
    (work,) = (p.parent for p in tmp_path.rglob("record.json"))
    record = json.loads((work / "record.json").read_text())
    assert (record["machine"]["processes"], record["n_eval"], record["images_seen"]) == (2, 5, 32)
    assert record["notes"] == ["BatchNorm saw batches of 2, not of 4"]
    job = make_job(root, tmp_path / "alone")
    register()
    runner = train.make_runner(make_config(job), job)
    runner.model.load_state_dict(load_file(work / SEGMENTER_FILE), strict=True)
    alone = metrics_of(train.run_test(runner).areas.sum(axis=0))
    assert {name: float(value) for name, value in alone.items()} == pytest.approx(record["metrics"])


@pytest.mark.slow
def test_a_training_split_smaller_than_a_batch_is_refused(root, tmp_path):
    record = run_job(make_job(root, tmp_path, batch=16))
    assert record.status == "failed"
    assert "has 12 images, less than one batch of 16" in record.reason


@pytest.mark.slow
def test_a_wrong_label_beyond_the_checked_ones_stops_the_training(tmp_path, monkeypatch):
    """With a process that decodes, too."""
    monkeypatch.setattr(ade20k, "spread", lambda count: [0, count - 1])
    label = write_ade20k(tmp_path) / FOLDER / "annotations/training/ADE_train_00000005.png"
    Image.new("L", Image.open(label).size, 151).save(label)
    record = run_job(make_job(tmp_path, tmp_path / "work", Machine(workers=1)))
    assert record.status == "failed"
    assert record.reason == f"{label} has the label 151: labels must be 0 (none) to 150; replace it"


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / FOLDER).is_dir(), reason="the real images are not here")
def test_real_images_of_odd_sizes_are_scored_at_their_own_size(tmp_path):
    job = make_job(SHARED, tmp_path, batch=2, iterations=2, test_short_side=64, test_long_side=256)
    record = run_job(job)
    assert record.status == "ok", record.reason
    labels = [np.asarray(Image.open(p)) for p in sorted((SHARED / FOLDER / "annotations/validation").iterdir())]
    assert len({label.shape for label in labels}) > 1
    pixels = sum(c["pixels"] for c in record.tables["per_class"].values())
    assert pixels == sum((label > 0).sum() for label in labels)
    assert (record.n_eval, record.data["label"]) == (5, "subset")


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_an_encoder_that_is_no_plain_vit_is_trained_and_named(root, tmp_path, name):
    job = replace(make_job(root, tmp_path, layer_decay=0.5), checkpoint=other_checkpoint(OTHERS[name]))
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert record.resolved["encoder"] == variant_in_words(OTHERS[name])
    weights = load_file(job.work / SEGMENTER_FILE)
    assert weights["backbone.blocks.0.bias"].any()
    assert ("backbone.pos_embed" in weights) == (name != "BEiT")
    assert ("backbone.reg_token" in weights) == (name != "BEiT")


@pytest.mark.parametrize("name", ["little_dinov3", pytest.param("little_siglip", marks=pytest.mark.slow)])
def test_an_encoder_that_timm_builds_is_trained_and_named(root, tmp_path, monkeypatch, name):
    register_timm(monkeypatch)
    job = replace(make_job(root, tmp_path, layer_decay=0.5), checkpoint=timm_checkpoint(name))
    assert jobs.obstacle(job) == ("", "")
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert record.resolved["encoder"] == f"timm's {name}"
    weights, key = load_file(job.work / SEGMENTER_FILE), "net.blocks.5.mlp.fc1.weight"
    assert not torch.equal(weights[f"backbone.{key}"], job.checkpoint.encoder[key])
    assert weights["backbone.net.blocks.0.bias"].any()
    assert ("backbone.net.cls_token" in weights) == (name == "little_dinov3")
    numbers = tasks.weights_of(job.checkpoint.arch, job.checkpoint.variant, job.recipe)
    assert sum(t.numel() for t in weights.values()) == numbers
    assert tasks.crop_flops(job.checkpoint.arch, job.checkpoint.variant, job.recipe) > 0


@pytest.mark.slow
def test_a_random_encoder_of_every_size_fits(root, tmp_path):
    """The 14 px patches of ViT-H too."""
    register()
    for arch in ("vit_small_patch16", ARCH):
        checkpoint = read_checkpoint(f"random:{arch}")
        job = replace(make_job(root, tmp_path), checkpoint=checkpoint, recipe=TASK.recipe(arch, "mini"))
        runner = train.make_runner(make_config(job), job)
        report = load_pyramid(runner.model.backbone, checkpoint)
        assert {"norm.weight", "norm.bias"} >= set(report.dropped)
    with pytest.raises(UserError, match="less than one batch"):
        tasks.run(replace(job, recipe=replace(job.recipe, batch=99)))
