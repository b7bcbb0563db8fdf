"""Fine-tuning, the linear probe, training from scratch and the evaluation of a released file, as whole jobs."""

import hashlib
import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mae_core.checkpoint import read_checkpoint, save_weights
from mae_core.data import PILLOW_PIXELS, normalize
from mae_core.machine import Machine
from mae_core.training import CHECKPOINT_FILE
from mae_core.vit import build_vit
from tests.fixtures.classification import tampering
from tests.fixtures.transfer import ARCH, CLASSES, make_job, raising, small_checkpoint, write_imagenet, write_split
from transfer import run
from transfer.classification import job as classifier_job
from transfer.classification import robustness
from transfer.classification.evaluate import trained_classifier
from transfer.classification.robustness import EVAL
from transfer.classification.tasks import FINETUNE, LINPROBE, SCRATCH, TASKS
from transfer.cli import main
from transfer.data.imagenet import read_split, wnids
from transfer.data.transforms import eval_transform
from transfer.run import run_job
from transfer.task import CLASSIFIER_FILE


@pytest.fixture(scope="module")
def finetuned(root, tmp_path_factory):
    """A fine-tuning that has run, and its record."""
    job = make_job(FINETUNE, root, tmp_path_factory.mktemp("finetuned"), epochs=4, base_lr=0.01)
    record = run_job(job)
    assert record.status == "ok", record.reason
    return job, record


@pytest.mark.parametrize(("task", "std"), [(FINETUNE, 2e-5), (LINPROBE, 0.01)], ids=["finetune", "probe"])
def test_the_head_starts_small_over_a_strictly_loaded_encoder(root, tmp_path, task, std):
    job = make_job(task, root, tmp_path)
    model = classifier_job.start_model(job)
    assert model.head.weight.shape == (1000, 128)  # a thousand classes, though the folder has four
    assert model.head.weight.std().item() == pytest.approx(std, rel=0.02)
    assert abs(model.head.weight.mean().item()) < 5 * std / math.sqrt(128000)
    assert not model.head.bias.any()
    state = model.state_dict()
    for name, tensor in job.checkpoint.encoder.items():
        if name in state:
            assert torch.equal(state[name], tensor), name
    assert sum(name in state for name in job.checkpoint.encoder) >= len(job.checkpoint.encoder) - 2  # norm -> fc_norm


def test_the_head_depends_on_the_seed(root, tmp_path):
    heads = [classifier_job.start_model(make_job(FINETUNE, root, tmp_path, seed=s)).head.weight for s in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_fine_tuning_learns_and_reports_what_it_counted(finetuned):
    _, record = finetuned
    assert record.metrics["top1"] > 60  # four colours; chance is 25
    assert record.n_eval == 12
    assert record.images_seen == 4 * 32
    p = record.metrics["top1"] / 100
    assert record.stderr["top1"] == pytest.approx(100 * math.sqrt(p * (1 - p) / 12))
    assert {"top1", "top5", "loss"} <= record.metrics.keys()


def test_everything_is_fine_tuned(finetuned):
    job, _ = finetuned
    start, end = classifier_job.start_model(job).state_dict(), load_file(job.work / CLASSIFIER_FILE)
    assert start.keys() == end.keys()
    assert [name for name in start if torch.equal(start[name], end[name])] == []


def test_the_classifier_is_left_and_reads_as_a_fine_tuned_checkpoint(finetuned):
    job, record = finetuned
    path = job.work / CLASSIFIER_FILE
    assert record.artifacts == {CLASSIFIER_FILE: hashlib.sha256(path.read_bytes()).hexdigest()}
    left = read_checkpoint(path)
    assert (left.kind, left.arch, left.format) == ("classifier", ARCH, "ours")
    assert left.classifier["head.weight"].shape == (1000, 128)
    assert left.meta["encoder_sha256"] == job.checkpoint.sha256
    with safe_open(path, "pt") as file:
        assert (file.metadata()["recipe"], file.metadata()["seed"]) == ("mini", "0")


def test_the_optimizer_state_is_gone_after_success(finetuned):
    job, _ = finetuned
    left = {".claim.0", CLASSIFIER_FILE, "job.json", "log.jsonl", "predictions.parquet", "record.json", "tensorboard"}
    assert {p.name for p in job.work.iterdir()} == left


def test_a_kill_just_before_the_record_costs_no_training(root, tmp_path, monkeypatch):
    job = make_job(LINPROBE, root, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_record", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
    assert (tmp_path / CHECKPOINT_FILE).exists()
    steps = []
    with register_optimizer_step_pre_hook(lambda *_: steps.append(1)):
        record = run_job(job)
    assert (record.status, record.images_seen, steps) == ("ok", 64, [])
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_the_left_classifier_evaluates_to_the_recorded_numbers(finetuned, root, tmp_path):
    job, record = finetuned
    again = run_job(replace(make_job(EVAL, root, tmp_path), checkpoint=read_checkpoint(job.work / CLASSIFIER_FILE)))
    assert again.status == "ok", again.reason
    assert (again.metrics, again.stderr) == (record.metrics, record.stderr)
    assert again.resolved == {"image_size": 48, "val_pixels": PILLOW_PIXELS}


def test_nothing_of_the_evaluation_is_rounded_to_tf32(root, tmp_path, monkeypatch):
    seen, before = [], torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(robustness, "scores_of", lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(robustness, "evaluated", lambda *_: None)
    robustness.run_released(make_job(EVAL, root, tmp_path))
    assert (seen, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled) == ([False], before, True)


def test_a_class_token_classifier_comes_back_too(root, tmp_path):
    record = run_job(make_job(FINETUNE, root, tmp_path / "a", pool="token", epochs=1))
    left = read_checkpoint(tmp_path / "a" / CLASSIFIER_FILE)
    assert left.kind == "classifier"
    assert run_job(replace(make_job(EVAL, root, tmp_path / "b"), checkpoint=left)).metrics == record.metrics


def test_a_larger_input_resizes_the_positions_and_the_crop(root, tmp_path, monkeypatch):
    job = make_job(FINETUNE, root, tmp_path, image_size=96, epochs=1)
    start = classifier_job.start_model(job)
    old = job.checkpoint.encoder["pos_embed"]
    grid = old[:, 1:].reshape(1, 6, 6, 128).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (12, 12), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, 144, 128)
    torch.testing.assert_close(start.pos_embed.detach(), torch.cat([old[:, :1], grid], dim=1))

    sides = []
    start.register_forward_pre_hook(lambda module, arguments: sides.append(tuple(arguments[0].shape[-2:])))
    monkeypatch.setattr(classifier_job, "start_model", lambda *_: start)
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert set(sides) == {(96, 96)}
    left = read_checkpoint(job.work / CLASSIFIER_FILE)
    assert left.encoder["pos_embed"].shape == (1, 145, 128)
    assert trained_classifier(left, 0, "cpu")[1] == 96
    assert trained_classifier(left, 48, "cpu")[0].pos_embed.shape == (1, 37, 128)


def test_data_smaller_than_a_batch_is_refused_in_numbers(root, tmp_path):
    record = run_job(make_job(FINETUNE, root, tmp_path, batch=64))
    assert record.status == "failed"
    assert "has 32 images, less than one batch of 64" in record.reason
    assert "--set batch=N" in record.reason


def test_unreadable_training_images_are_named_in_the_record_and_the_weights(tmp_path):
    root = write_imagenet(tmp_path / "data")
    broken = sorted((root / "imagenet" / "train").rglob("*.JPEG"))[5]
    broken.write_bytes(b"broken")
    record = run_job(make_job(FINETUNE, root, tmp_path / "work"))
    assert record.notes == (f"1 training images could not be read and were replaced by black: {broken}",)
    with safe_open(tmp_path / "work" / CLASSIFIER_FILE, "pt") as file:
        assert json.loads(file.metadata()["unreadable"]) == [str(broken)]


def test_an_unreadable_validation_image_costs_the_number(tmp_path):
    root = write_imagenet(tmp_path / "data", train=2, val=1)
    broken = root / "imagenet" / "val" / wnids()[CLASSES[2]] / "broken.JPEG"
    broken.write_bytes(b"\xff\xd8 cut short")
    record = run_job(make_job(LINPROBE, root, tmp_path / "work", epochs=1))
    assert record.status == "failed"
    assert str(broken) in record.reason
    assert record.metrics == {}


def test_two_checkpoints_of_one_size_share_one_run_from_scratch(root, tmp_path, capsys):
    """Only the size of a checkpoint counts: nothing of its weights is in what is trained."""
    save_weights(tmp_path / "other.safetensors", build_vit(ARCH).state_dict(), {"format": "mae-transfer"})
    common = ["--task", "imagenet_scratch", "--recipe", "mini", "--data", str(root), "--out", str(tmp_path / "out")]
    common += ["--device", "cpu", "--set", "epochs=1", "batch=8", "warmup_epochs=0", "ema=0.5"]
    for checkpoint in (str(tmp_path / "other.safetensors"), f"random:{ARCH}"):
        assert main(TASKS, ["--ckpt", checkpoint, *common]) == 0
    (path,) = (tmp_path / "out").rglob("record.json")
    record = run.read_record(path)
    assert capsys.readouterr().out.count("imagenet_scratch: top1 ") == 2
    assert record.checkpoint["name"] == f"scratch:{ARCH}"
    assert record.checkpoint["sha256"] == hashlib.sha256(f"scratch:{ARCH}".encode()).hexdigest()
    assert {"top1", "top1_without_ema"} <= record.metrics.keys() & record.stderr.keys()
    assert "timm 0.3.2" in record.resolved["load"]
    start = classifier_job.start_model(make_job(SCRATCH, root, tmp_path)).state_dict()  # of the same seed
    left = load_file(path.parent / CLASSIFIER_FILE)
    # Four steps at a small rate: near where it started, and not there.
    for name in start:
        assert torch.allclose(left[name], start[name], atol=0.02), name
        assert not torch.equal(left[name], start[name]), name


def test_from_scratch_the_weights_are_those_that_timm_draws(root, tmp_path):
    """As timm's own model, but for the class token, which was drawn like the positions in timm 0.3.2. Not MAE's."""
    start = classifier_job.start_model(make_job(SCRATCH, root, tmp_path)).state_dict()
    timms = VisionTransformer(
        48, 8, embed_dim=128, depth=6, num_heads=4, num_classes=1000, global_pool="avg"
    ).state_dict()
    assert start.keys() == timms.keys()
    for name, tensor in start.items():
        std = 0.02 if name == "cls_token" else timms[name].std().item()
        assert tensor.std().item() == pytest.approx(std, rel=0.25 if tensor.numel() < 1000 else 0.03), name
        assert abs(tensor.mean() - (timms[name].mean() if std == 0 else 0)) <= 5 * std / tensor.numel() ** 0.5, name
    # Of normal values 0.27 % are beyond three deviations, of uniform ones none.
    weight = start["blocks.3.mlp.fc1.weight"]
    assert (weight.abs() > 0.06).float().mean().item() == pytest.approx(0.0027, rel=0.2)


def test_the_probe_moves_only_its_layer(root, tmp_path, monkeypatch):
    job = make_job(LINPROBE, root, tmp_path)
    model = classifier_job.start_model(job)
    monkeypatch.setattr(classifier_job, "start_model", lambda *_: model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = []

    def before_step(*_):
        gradients.append({name for name, p in model.named_parameters() if p.grad is not None})

    with register_optimizer_step_pre_hook(before_step):
        record = run_job(job)
    assert record.status == "ok", record.reason
    assert len(gradients) == 8
    assert all(names == {"head.1.weight", "head.1.bias"} for names in gradients)
    after = dict(model.named_parameters())
    assert [name for name in before if name in after and not torch.equal(before[name], after[name])] == []
    assert not torch.equal(before["head.weight"], after["head.1.weight"])
    assert not torch.equal(before["head.bias"], after["head.1.bias"])


def test_the_probe_is_batchnorm_without_affine_over_the_class_token(root, tmp_path):
    """Its features are those of a plain encoder; its logits follow by hand from what it left. The large head makes the
    loss depend on every detail."""
    job = make_job(LINPROBE, root, tmp_path, head_std=1.0)
    record = run_job(job)
    left = load_file(tmp_path / "probe.safetensors")
    expected = {"0.running_mean", "0.running_var", "0.num_batches_tracked", "1.weight", "1.bias"}
    assert left.keys() == {f"head.{name}" for name in expected}
    encoder = build_vit(ARCH)
    encoder.load_state_dict(small_checkpoint().encoder)
    val, _ = read_split(root / "imagenet" / "val")
    images = normalize(torch.stack([eval_transform(48)(Image.open(f)) for f in val.files]))
    with torch.inference_mode():
        tokens = encoder.eval().forward_features(images)[:, 0]
    normal = (tokens - left["head.0.running_mean"]) / (left["head.0.running_var"] + 1e-6).sqrt()
    logits = normal @ left["head.1.weight"].T + left["head.1.bias"]
    labels = torch.tensor(val.labels)
    assert record.metrics["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert record.metrics["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


@pytest.mark.parametrize("part", ["blocks.3.mlp.fc1.weight", "pos_embed", "norm.bias"])
def test_an_encoder_that_moves_under_its_probe_is_a_failure(root, tmp_path, monkeypatch, part):
    monkeypatch.setattr(classifier_job, "train_classifier", tampering(part))
    record = run_job(make_job(LINPROBE, root, tmp_path, epochs=1))
    assert record.status == "failed"
    assert "frozen encoder changed" in record.reason
    assert record.metrics == {}
    assert not (tmp_path / "probe.safetensors").exists()


def test_the_probe_records_the_encoder_it_was_trained_on(root, tmp_path):
    first = run_job(make_job(LINPROBE, root, tmp_path / "a", epochs=1)).resolved["backbone_sha256"]
    same = run_job(make_job(LINPROBE, root, tmp_path / "b", epochs=1, base_lr=0.3)).resolved["backbone_sha256"]
    job = make_job(LINPROBE, root, tmp_path / "c", epochs=1)
    other = run_job(replace(job, checkpoint=small_checkpoint(5))).resolved["backbone_sha256"]
    assert first == same != other


def test_a_classifier_of_other_classes_is_refused(root, tmp_path):
    save_weights(tmp_path / "c.safetensors", build_vit(ARCH, num_classes=10, pool="avg").state_dict(), {})
    job = replace(make_job(EVAL, root, tmp_path / "work"), checkpoint=read_checkpoint(tmp_path / "c.safetensors"))
    record = run_job(job)
    assert record.status == "failed"
    assert "10 classes" in record.reason


def test_training_images_are_not_evaluated(root, tmp_path):
    """The number comes only from val: other training images leave an evaluation as it is."""
    job = make_job(EVAL, root, tmp_path / "a")
    write_split(tmp_path / "data" / "imagenet" / "train", 1, CLASSES[:2], seed=9)
    (tmp_path / "data" / "imagenet" / "val").symlink_to(root / "imagenet" / "val")
    model = build_vit(ARCH, num_classes=1000, pool="avg")
    save_weights(tmp_path / "c.safetensors", model.state_dict(), {})
    checkpoint = read_checkpoint(tmp_path / "c.safetensors")
    first = EVAL.run(replace(job, checkpoint=checkpoint))
    second = EVAL.run(replace(job, checkpoint=checkpoint, data=replace(job.data, root=str(tmp_path / "data"))))
    assert first == second


def test_a_probe_says_when_its_batchnorm_saw_another_batch(root, tmp_path):
    whole = run_job(make_job(LINPROBE, root, tmp_path / "whole"))
    assert whole.resolved["batchnorm_batch"] == 8
    assert not whole.notes
    split = run_job(make_job(LINPROBE, root, tmp_path / "split", Machine(micro_batch=4)))
    assert split.resolved["batchnorm_batch"] == 4
    assert any("BatchNorm" in note and "4" in note and "8" in note for note in split.notes)


@pytest.mark.slow
def test_both_accuracies_are_kept_with_a_moving_average(root, tmp_path):
    """The average of nearly 1 stays where it started, so that the two differ."""
    job = make_job(FINETUNE, root, tmp_path, ema=0.999999, epochs=8, base_lr=0.03)
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert record.metrics["top1_without_ema"] > record.metrics["top1"] + 20
    name = "blocks.0.attn.qkv.weight"
    left, start = (
        read_checkpoint(job.work / CLASSIFIER_FILE).encoder[name],
        classifier_job.start_model(job).state_dict(),
    )
    torch.testing.assert_close(left, start[name], atol=1e-4, rtol=0)
