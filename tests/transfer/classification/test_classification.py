import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mae_core.checkpoint import read_checkpoint, save_weights
from mae_core.data import IMAGENET_NORMALIZATION, PILLOW_PIXELS, normalize
from mae_core.optim import half_cosine, layer_decay_groups, learning_rate
from mae_core.training import CHECKPOINT_FILE
from mae_core.vit import build_vit
from tests.fixtures.transfer import ARCH, CLASSES, make_job, small_checkpoint, write_imagenet, write_split
from transfer import run
from transfer.classification import job as classifier_job
from transfer.classification import recipes
from transfer.classification import tasks as classification
from transfer.classification.evaluate import evaluate, trained_classifier
from transfer.classification.transforms import eval_transform
from transfer.cli import main
from transfer.data.imagenet import read_split, wnids
from transfer.run import run_job
from transfer.task import CLASSIFIER_FILE

FINETUNE, LINPROBE, EVAL, KNN = classification.TASKS[:4]
B, L, H = "vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp("data"), train=8, val=3)


@pytest.fixture(scope="module")
def finetuned(root, tmp_path_factory):
    """A fine-tuning that has run, and its record."""
    job = make_job(FINETUNE, root, tmp_path_factory.mktemp("finetuned"), epochs=4, base_lr=0.01)
    record = run_job(job)
    assert record.status == "ok", record.reason
    return job, record


# The published recipes


@pytest.mark.parametrize(
    ("arch", "lr", "layer_decay", "drop_path", "epochs"),
    [(B, 2e-3, 0.65, 0.1, 100), (L, 4e-3, 0.75, 0.2, 50), (H, 4e-3, 0.75, 0.3, 50)],
)
def test_fine_tuning_is_the_official_repositorys(arch, lr, layer_decay, drop_path, epochs):
    """facebookresearch/mae FINETUNE.md; the absolute rate is base_lr * 1024 / 256."""
    r = recipes.finetune_recipe(arch, "paper")
    assert learning_rate(r.base_lr, r.batch) == pytest.approx(lr)
    assert (r.layer_decay, r.drop_path, r.epochs) == (layer_decay, drop_path, epochs)
    assert (r.image_size, r.batch, r.warmup_epochs, r.min_lr) == (224, 1024, 5, 1e-6)
    assert (r.optimizer, r.betas, r.weight_decay) == ("adamw", (0.9, 0.999), 0.05)
    assert (r.mixup, r.cutmix, r.label_smoothing, r.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (r.rand_augment, r.pool, r.head_std, r.ema) == ("rand-m9-mstd0.5-inc1", "avg", 2e-5, 0.0)


@pytest.mark.parametrize("arch", [B, L, H])
def test_linear_probing_is_the_papers(arch):
    """Table 10: LARS, base rate 0.1 at batch 16384, so 6.4; 90 epochs; nothing but crop and flip."""
    r = recipes.linprobe_recipe(arch, "paper")
    assert learning_rate(r.base_lr, r.batch) == pytest.approx(6.4)
    assert (r.batch, r.epochs, r.warmup_epochs, r.min_lr) == (16384, 90, 10, 0.0)
    assert (r.optimizer, r.momentum, r.trust_coefficient, r.weight_decay) == ("lars", 0.9, 0.001, 0.0)
    assert (r.image_size, r.pool, r.head_std) == (224, "token", 0.01)
    assert r.mixup == r.cutmix == r.label_smoothing == r.drop_path == r.random_erasing == 0.0
    assert r.rand_augment == ""


def test_the_rate_of_vit_b_over_its_hundred_epochs():
    """Per iteration, 1281167 // 1024 = 1251 of them an epoch: 0 -> 2e-3 over 5 epochs, then half a cosine to 1e-6."""
    r = recipes.finetune_recipe(B, "paper")
    lr = learning_rate(r.base_lr, r.batch)
    at = [half_cosine(step, 1251, lr, r.epochs, r.warmup_epochs, r.min_lr) for step in range(125100)]
    assert at[0] == 0.0
    assert at[1251] == pytest.approx(4e-4)
    assert max(at) == at[5 * 1251] == pytest.approx(2e-3)
    # Half way through the 95 epochs of cosine: the mean of both ends.
    assert at[int(52.5 * 1251)] == pytest.approx((2e-3 + 1e-6) / 2, rel=1e-4)
    assert at[-1] == pytest.approx(1e-6, abs=1e-9)


@pytest.mark.parametrize(("arch", "depth"), [(B, 12), (L, 24), (H, 32)])
def test_layer_decay_and_drop_path_of_the_real_sizes(arch, depth):
    """depth + 2 distinct scales, decay ** (depth + 1 - layer); drop path linear from 0 at the first block."""
    r = recipes.finetune_recipe(arch, "paper")
    with torch.device("meta"):
        model = build_vit(arch, r.image_size, 1000, r.pool, r.drop_path)
    scales = {}
    for group in layer_decay_groups(model, r.weight_decay, r.layer_decay):
        for p in group["params"]:
            scales[id(p)] = group["lr_scale"]
    named = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert len(set(named.values())) == depth + 2
    for name, layer in (("patch_embed.proj.weight", 0), ("pos_embed", 0), ("cls_token", 0), ("blocks.0.norm1.bias", 1)):
        assert named[name] == pytest.approx(r.layer_decay ** (depth + 1 - layer))
    for name in (f"blocks.{depth - 1}.mlp.fc2.weight", "fc_norm.weight", "head.weight"):
        assert named[name] == pytest.approx(r.layer_decay if "blocks" in name else 1.0)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, r.drop_path, depth), atol=1e-9)


# The start


@pytest.mark.parametrize(("which", "std"), [(FINETUNE, 2e-5), (LINPROBE, 0.01)], ids=["finetune", "probe"])
def test_the_head_starts_small_over_a_strictly_loaded_encoder(root, tmp_path, which, std):
    job = make_job(which, root, tmp_path)
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


# Fine-tuning


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
    assert sorted(p.name for p in job.work.iterdir()) == [CLASSIFIER_FILE, "job.json", "log.jsonl", "record.json"]


def test_a_kill_just_before_the_record_costs_no_training(root, tmp_path, monkeypatch):
    job = make_job(LINPROBE, root, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_record", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_job(job)
    assert (tmp_path / CHECKPOINT_FILE).exists()
    steps = []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    try:
        record = run_job(job)
    finally:
        hook.remove()
    assert (record.status, record.images_seen, steps) == ("ok", 64, [])
    assert not (tmp_path / CHECKPOINT_FILE).exists()


def test_the_left_classifier_evaluates_to_the_recorded_numbers(finetuned, root, tmp_path):
    job, record = finetuned
    other = replace(make_job(EVAL, root, tmp_path), checkpoint=read_checkpoint(job.work / CLASSIFIER_FILE))
    again = run_job(other)
    assert again.status == "ok", again.reason
    assert again.metrics == record.metrics
    assert again.stderr == record.stderr
    assert again.resolved == {"image_size": 48, "val_pixels": PILLOW_PIXELS}


def test_a_class_token_classifier_comes_back_too(root, tmp_path):
    job = make_job(FINETUNE, root, tmp_path / "a", pool="token", epochs=1)
    record = run_job(job)
    left = read_checkpoint(job.work / CLASSIFIER_FILE)
    assert left.kind == "classifier"
    again = run_job(replace(make_job(EVAL, root, tmp_path / "b"), checkpoint=left))
    assert again.metrics == record.metrics


def test_a_larger_input_resizes_the_positions_and_the_crop(root, tmp_path, monkeypatch):
    job = make_job(FINETUNE, root, tmp_path, image_size=96, epochs=1)
    start = classifier_job.start_model(job)
    old = job.checkpoint.encoder["pos_embed"]
    grid = old[:, 1:].reshape(1, 6, 6, 128).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (12, 12), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).reshape(1, 144, 128)
    torch.testing.assert_close(start.pos_embed.detach(), torch.cat([old[:, :1], grid], dim=1))

    sides = []
    monkeypatch.setattr(
        classifier_job, "start_model", lambda *_: (start.register_forward_pre_hook(look(sides)), start)[1]
    )
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert set(sides) == {(96, 96)}
    left = read_checkpoint(job.work / CLASSIFIER_FILE)
    assert left.encoder["pos_embed"].shape == (1, 145, 128)
    assert trained_classifier(left, 0, "cpu")[1] == 96
    assert trained_classifier(left, 48, "cpu")[0].pos_embed.shape == (1, 37, 128)


def look(sides: list):
    return lambda module, arguments: sides.append(tuple(arguments[0].shape[-2:]))


def test_a_part_of_imagenet_is_scored_among_all_thousand_classes(root, tmp_path):
    """A model that always answers a class outside the folder is never right."""
    model = build_vit(ARCH, num_classes=1000)
    torch.nn.init.zeros_(model.head.weight)
    val, _ = read_split(root / "imagenet" / "val")
    for answer, right in ((999, 0.0), (CLASSES[0], 0.25)):
        torch.nn.init.zeros_(model.head.bias)
        model.head.bias.data[answer] = 1.0
        job = make_job(FINETUNE, root, tmp_path)
        assert evaluate(model, val, eval_transform(48), IMAGENET_NORMALIZATION, job.machine, "x").top1.mean() == right


def test_data_smaller_than_a_batch_is_refused_in_numbers(root, tmp_path):
    record = run_job(make_job(FINETUNE, root, tmp_path, batch=64))
    assert record.status == "failed"
    assert "has 32 images, less than one batch of 64" in record.reason
    assert "--set batch=N" in record.reason


def test_an_unreadable_validation_image_costs_the_number(tmp_path):
    root = write_imagenet(tmp_path / "data", train=2, val=1)
    broken = root / "imagenet" / "val" / wnids()[CLASSES[2]] / "broken.JPEG"
    broken.write_bytes(b"\xff\xd8 cut short")
    record = run_job(make_job(LINPROBE, root, tmp_path / "work", epochs=1))
    assert record.status == "failed"
    assert str(broken) in record.reason
    assert record.metrics == {}


# From scratch


def test_from_scratch_two_checkpoints_of_one_size_share_one_run(root, tmp_path, capsys):
    """Of a checkpoint the size alone counts: nothing of its weights is in what is trained."""
    save_weights(tmp_path / "other.safetensors", build_vit(ARCH).state_dict(), {"format": "mae-transfer"})
    common = ["--task", "imagenet_scratch", "--recipe", "mini", "--data", str(root), "--out", str(tmp_path / "out")]
    common += ["--device", "cpu", "--set", "epochs=1", "batch=8", "warmup_epochs=0", "ema=0.5"]
    for checkpoint in (str(tmp_path / "other.safetensors"), f"random:{ARCH}"):
        assert main(classification.TASKS, ["--ckpt", checkpoint, *common]) == 0
    (path,) = (tmp_path / "out").rglob("record.json")
    record = run.read_record(path)
    assert capsys.readouterr().out.count("imagenet_scratch: top1 ") == 2
    assert record.checkpoint["name"] == f"scratch:{ARCH}"
    assert record.checkpoint["sha256"] == hashlib.sha256(f"scratch:{ARCH}".encode()).hexdigest()
    assert {"top1", "top1_without_ema"} <= record.metrics.keys() & record.stderr.keys()
    start = small_checkpoint().encoder  # of the same seed
    left = load_file(path.parent / CLASSIFIER_FILE)
    norms = {name for name in start if name.startswith("norm.")}  # replaced by fc_norm
    # Four steps at a small rate: near where it started, and not there.
    for name in start.keys() - norms:
        assert torch.allclose(left[name], start[name], atol=0.02), name
        assert not torch.equal(left[name], start[name]), name


# The probe


def test_the_probe_moves_its_layer_alone(root, tmp_path, monkeypatch):
    job = make_job(LINPROBE, root, tmp_path)
    model = classifier_job.start_model(job)
    monkeypatch.setattr(classifier_job, "start_model", lambda *_: model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = []

    def before_step(*_):
        gradients.append({name for name, p in model.named_parameters() if p.grad is not None})

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        record = run_job(job)
    finally:
        hook.remove()
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
    fit = classifier_job.train_classifier

    def tampering(job, model, *rest):
        state, trained = fit(job, model, *rest)
        with torch.no_grad():
            model.get_parameter(part).view(-1)[0] += 1e-6
        return state, trained

    monkeypatch.setattr(classifier_job, "train_classifier", tampering)
    record = run_job(make_job(LINPROBE, root, tmp_path, epochs=1))
    assert record.status == "failed"
    assert "frozen encoder changed" in record.reason
    assert record.metrics == {}
    assert not (tmp_path / "probe.safetensors").exists()


def test_the_probe_records_the_encoder_it_was_laid_on(root, tmp_path):
    first = run_job(make_job(LINPROBE, root, tmp_path / "a", epochs=1)).resolved["backbone_sha256"]
    same = run_job(make_job(LINPROBE, root, tmp_path / "b", epochs=1, base_lr=0.3)).resolved["backbone_sha256"]
    job = make_job(LINPROBE, root, tmp_path / "c", epochs=1)
    other = run_job(replace(job, checkpoint=small_checkpoint(5))).resolved["backbone_sha256"]
    assert first == same != other


# Evaluation of a released file


def test_a_classifier_of_other_classes_is_refused(root, tmp_path):
    save_weights(tmp_path / "c.safetensors", build_vit(ARCH, num_classes=10, pool="avg").state_dict(), {})
    job = replace(make_job(EVAL, root, tmp_path / "work"), checkpoint=read_checkpoint(tmp_path / "c.safetensors"))
    record = run_job(job)
    assert record.status == "failed"
    assert "10 classes" in record.reason


def test_training_images_are_not_evaluated(root, tmp_path):
    """The number comes from val alone: other training images leave an evaluation as it is."""
    job = make_job(EVAL, root, tmp_path / "a")
    write_split(tmp_path / "data" / "imagenet" / "train", 1, CLASSES[:2], seed=9)
    (tmp_path / "data" / "imagenet" / "val").symlink_to(root / "imagenet" / "val")
    model = build_vit(ARCH, num_classes=1000, pool="avg")
    save_weights(tmp_path / "c.safetensors", model.state_dict(), {})
    checkpoint = read_checkpoint(tmp_path / "c.safetensors")
    first = EVAL.run(replace(job, checkpoint=checkpoint))
    second = EVAL.run(replace(job, checkpoint=checkpoint, data=replace(job.data, root=str(tmp_path / "data"))))
    assert first == second
