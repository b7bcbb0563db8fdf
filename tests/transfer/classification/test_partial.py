"""Partial fine-tuning: which tensors move, what is kept of the frozen part, the ends, resuming, the picture."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mae_core.checkpoint import read_checkpoint
from mae_core.claim import claimed
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.settings import override
from mae_core.training import CHECKPOINT_FILE
from mae_core.vit import Variant, build_vit
from tests.fixtures import ROOT
from tests.fixtures.classification import Command, tampering
from tests.fixtures.transfer import ARCH, small_checkpoint, write_imagenet
from transfer.classification import partial
from transfer.classification.picture import PICTURE_FILE, draw_curve, published_curves
from transfer.classification.tasks import LINPROBE, PARTIAL
from transfer.data.predictions import PREDICTIONS_FILE, read_predictions
from transfer.jobs import make_job
from transfer.run import read_record, run_job, with_work_folder

SMALL = {"epochs": 2, "batch": 8, "warmup_epochs": 1}
LAST = {"norm.weight", "norm.bias", "head.weight", "head.bias"}
MLP_HALF = ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
ATTENTION_HALF = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias")
ATTENTION_HALF += ("attn.proj.weight", "attn.proj.bias")
BLOCK = (*ATTENTION_HALF, *MLP_HALF)
# Of the six blocks, by number of blocks tuned.
TUNED = {0.5: {f"blocks.5.{name}" for name in MLP_HALF} | LAST}
TUNED |= {float(k): {f"blocks.{i}.{name}" for i in range(6 - k, 6) for name in BLOCK} | LAST for k in (1, 2, 4)}


def small(task):
    """The task with a mini recipe that a few images are enough for."""
    return replace(task, recipe=lambda arch, name: replace(task.recipe(arch, name), **SMALL))


def job_of(root, out, machine=None, **knobs):
    settings = [f"{knob}={value}" for knob, value in knobs.items()]
    machine, data = machine or Machine(), PARTIAL.inspect(root)
    return make_job(small(PARTIAL), small_checkpoint(), "mini", settings, data, out, 0, machine)


def tune(job, k):
    return partial.tune(partial.part_of(job, k), k, partial.images_of(job))


def moved(model, start) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}


@pytest.fixture
def models(monkeypatch):
    """Every model that is made, with the weights it started from."""
    made, start = [], partial.start_model

    def keep(*arguments):
        model = start(*arguments)
        made.append((model, {name: tensor.clone() for name, tensor in model.state_dict().items()}))
        return model

    monkeypatch.setattr(partial, "start_model", keep)
    return made


@pytest.mark.parametrize("k", [0.5, 1.0, 4.0])
def test_only_the_last_blocks_move_and_have_gradients_and_states(root, tmp_path, models, k):
    gradients, states = [], []

    def before_step(*_):
        gradients.append({name for name, p in models[0][0].named_parameters() if p.grad is not None})

    def after_step(optimizer, *_):
        states.append({id(p) for p in optimizer.state})

    with register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step):
        result = tune(job_of(root, tmp_path), k)
    model, start = models[0]
    assert len(gradients) == 8
    assert all(names == TUNED[k] for names in gradients)
    own = {id(p) for name, p in model.named_parameters() if name in TUNED[k]}
    assert states[-1] == own
    assert moved(model, start) == TUNED[k]
    assert result.resolved["trained_parameters"] == sum(start[name].numel() for name in TUNED[k])
    assert len(result.resolved["frozen_sha256"]) == 64


def test_one_run_at_a_time_tunes_in_a_folder(root, tmp_path):
    job = job_of(root, tmp_path)
    with claimed(partial.part_of(job, 1).work), pytest.raises(UserError, match="is in use by another run"):
        tune(job, 1)


def test_averaged_patch_tokens_keep_their_norm_among_the_tuned():
    tuned = partial.freeze_all_but(build_vit(ARCH, num_classes=10, pool="avg"), 0.5)
    head = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert tuned == {f"blocks.5.{name}" for name in MLP_HALF} | head


def test_all_blocks_are_fine_tuning_of_every_tensor(root, tmp_path, models):
    result = tune(job_of(root, tmp_path), 6.0)
    model, start = models[0]
    assert moved(model, start) == set(start)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} < set(start)
    assert result.resolved["trained_parameters"] == sum(tensor.numel() for tensor in start.values())
    assert "frozen_sha256" not in result.resolved


def test_half_a_block_takes_its_own_layer_scale():
    scaled = partial.freeze_all_but(build_vit(ARCH, num_classes=10, variant=Variant(layer_scale=True)), 0.5)
    assert {name for name in scaled if "ls" in name} == {"blocks.5.ls2.gamma"}
    beit = build_vit(ARCH, num_classes=10, pool="avg", variant=Variant(beit=True))
    assert {name for name in partial.freeze_all_but(beit, 0.5) if "gamma" in name} == {"blocks.5.gamma_2"}


def kept_bytes(k):
    """Bytes that autograd keeps of one forward pass for its backward pass, without the parameters themselves."""
    model = build_vit(ARCH, num_classes=10, pool="avg").train()
    partial.freeze_all_but(model, k)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(torch.randn(2, 3, 48, 48)).sum()
    loss.backward()
    return sum(kept.values()), [output.grad_fn is None for output in outputs]


def test_the_frozen_blocks_are_not_in_the_graph_and_take_no_memory_for_it():
    found = {k: kept_bytes(k) for k in (0.5, 1, 2, 3, 6)}
    for k, (_, outside) in found.items():
        tuned = math.ceil(k)  # of half a block, the second half
        assert outside == [i < 6 - tuned for i in range(6)], k
    size = {k: kept for k, (kept, _) in found.items()}
    a_block = size[2] - size[1]
    assert size[3] - size[2] == a_block
    assert size[6] >= size[3] + 3 * a_block  # and what the embedding keeps
    assert size[1] < 1.5 * a_block
    assert 0 < size[0.5] < size[1]


def test_activation_checkpointing_and_bf16_tune_the_same_tensors(root, tmp_path, models):
    machines = {"fp32": Machine(), "bf16": Machine(precision="bf16")}
    machines |= {"recomputed": Machine(activation_checkpointing=True)}
    results = {name: tune(job_of(root, tmp_path / name, machine), 2.0) for name, machine in machines.items()}
    for model, start in models:
        assert moved(model, start) == TUNED[2.0]
    assert results["recomputed"].metrics == results["fp32"].metrics
    assert len({result.resolved["frozen_sha256"] for result in results.values()}) == 1


@pytest.mark.parametrize("part", ["blocks.4.mlp.fc1.weight", "pos_embed", "blocks.5.norm1.bias"])
def test_a_frozen_tensor_that_moves_is_a_failure(root, tmp_path, monkeypatch, part):
    monkeypatch.setattr(partial, "train_classifier", tampering(part))
    with pytest.raises(RuntimeError, match="frozen part changed"):
        tune(job_of(root, tmp_path, epochs=1, warmup_epochs=0), 0.5)
    assert not list(tmp_path.rglob(partial.RESULT_FILE))


def test_the_checksum_is_of_the_checkpoints_own_tensors(root, tmp_path):
    mini = read_checkpoint(ROOT / "results" / "miniature" / "mae_mini.safetensors")
    job = replace(job_of(root, tmp_path, epochs=1, warmup_epochs=0), checkpoint=mini)
    result = tune(with_work_folder(job), 1.0)
    frozen = {n: t for n, t in mini.encoder.items() if not n.startswith(("norm.", "blocks.5."))}
    order = [n for n in build_vit(ARCH, num_classes=1000).state_dict() if n in frozen]
    assert result.resolved["frozen_sha256"] == partial.parameters_sha256((n, frozen[n]) for n in order)


# The curve


@pytest.fixture(scope="module")
def curve(root, tmp_path_factory):
    """0, 1 and 6 blocks of six, the probe done before; the job, its record and the probe's."""
    out = tmp_path_factory.mktemp("curve")
    job = job_of(root, out, blocks="0,1,6")
    probe = small(LINPROBE)
    data = probe.inspect(root)
    before = run_job(make_job(probe, job.checkpoint, "mini", [], data, out, 0, job.machine))
    task = replace(job.task, run=lambda job: partial.partial_finetune(job, probe))
    record = run_job(replace(job, task=task))
    assert record.status == "ok", record.reason
    return replace(job, task=task), record, before


def records_of(out, task):
    return [read_record(path) for path in out.glob(f"runs/*/{task}/*/record.json")]


def test_no_block_is_the_probe_and_all_blocks_are_trained_here(curve):
    job, record, probe = curve
    (found,) = records_of(job.out, "imagenet_linprobe")
    assert found == probe  # taken as it was: run again it would have another time
    assert (record.metrics["top1@0"], record.stderr["top1@0"]) == (probe.metrics["top1"], probe.stderr["top1"])
    kept = {k: rows["label"] == rows["top1"] for k, rows in read_predictions(job.work / PREDICTIONS_FILE).items()}
    assert {f"top1@{k}": 100 * right.mean() for k, right in kept.items()} == pytest.approx(record.metrics)
    assert not records_of(job.out, "imagenet_finetune")  # another recipe
    (path,) = job.work.parent.glob(f"6/*/{partial.RESULT_FILE}")
    assert json.loads(path.read_text())["metrics"]["top1"] == record.metrics["top1@6"]


def test_the_record_has_a_metric_for_every_number_of_blocks(curve):
    job, record, _ = curve
    assert record.metrics.keys() == record.stderr.keys() == {"top1@0", "top1@1", "top1@6"}
    assert (record.metric, record.n_eval, record.images_seen) == ("top1@1", 12, 2 * 64)
    (path,) = job.work.parent.glob(f"1/*/{partial.RESULT_FILE}")
    assert json.loads(path.read_text())["metrics"]["top1"] == record.metrics["top1@1"]
    about = record.tables["by_blocks"]
    assert about["0"]["task"] == "imagenet_linprobe"
    assert about["1"]["trained_parameters"] == 12 * 128**2 + 13 * 128 + 2 * 128 + 1000 * 129  # block, norm, head
    assert record.recipe["blocks"] == [0, 1, 6]
    assert not list(job.work.parent.rglob(CHECKPOINT_FILE))


def test_another_choice_of_blocks_takes_what_is_there(curve, monkeypatch):
    job, record, _ = curve
    trained = []
    fit = partial.train_classifier

    def count(job, *rest):
        trained.append(job.task.name)
        return fit(job, *rest)

    monkeypatch.setattr(partial, "train_classifier", count)
    recipe, overrides = override(job.recipe, ["blocks=0.5,1"])
    other = with_work_folder(replace(job, recipe=recipe, overrides=overrides))
    again = run_job(other)
    assert trained == ["imagenet_partial@0.5"]
    assert again.metrics["top1@1"] == record.metrics["top1@1"]
    assert again.recipe_label == "mini with blocks=0.5,1"


def test_a_probe_that_fails_fails_the_curve_by_name(root, tmp_path):
    job = job_of(root, tmp_path, blocks="0,1")
    probe = replace(LINPROBE, recipe=lambda arch, name: replace(LINPROBE.recipe(arch, name), batch=64))
    with pytest.raises(UserError, match=r"imagenet_linprobe, the curve's first point, .* less than one batch of 64"):
        partial.partial_finetune(job, probe)


def test_the_input_size_and_the_share_of_the_images_hold_for_the_probe_too(root, tmp_path):
    record, _ = partial.probed(job_of(root, tmp_path, image_size=32, train_fraction=0.5, epochs=1), small(LINPROBE))
    assert record.recipe_label == "mini with image_size=32, train_fraction=0.5"
    assert (record.recipe["epochs"], record.images_seen, record.resolved["train_images"]) == (2, 32, 16)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["blocks=0,2"], "1 must be among them"),
        (["blocks=1,0.3"], "give 0, 0.5 or whole numbers"),
        (["blocks=0,0.3,1"], "give 0, 0.5 or whole numbers"),
        (["blocks=0,1,1"], "each once, rising"),
        (["blocks=2,1"], "rising"),
        (["blocks=-1,1"], "give 0, 0.5 or whole numbers"),
        (["blocks=1,two"], "takes numbers, as in blocks=0,0.5,1"),
        (["optimizer=lars", "betas=0,0", "layer_decay=1", "rand_augment=", "random_erasing=0"], "needs adamw"),
    ],
)
def test_blocks_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        override(PARTIAL.recipe(ARCH, "mini"), settings)


def test_more_blocks_than_there_are_fail_before_anything_is_trained(root, tmp_path):
    record = run_job(job_of(root, tmp_path, blocks="0,1,7"))
    assert record.status == "failed"
    assert "7 blocks cannot be tuned, vit_mini_patch8 has 6" in record.reason
    assert len(list(tmp_path.glob("runs/*/*"))) == 1


def test_the_paper_recipe_says_what_the_paper_did_not(root, tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "tune", lambda *_: partial.Result({"top1": 1.0}, {"top1": 0.1}, seconds=1.0))
    monkeypatch.setattr(partial, "draw_curve", lambda *_: None)
    job = job_of(root, tmp_path, blocks="0.5,1")
    found = partial.partial_finetune(replace(job, recipe_name="paper"), LINPROBE)
    assert any("best of 50, 100 and 200" in note for note in found.notes)
    assert found.seconds == 2.0


def test_the_published_curves_are_figure_9s():
    mae, moco = published_curves().values()
    assert list(mae) == [0, 0.5, 1, 2, 4, 6, 12, 18, 24]
    assert (mae[0], mae[0.5], mae[1], mae[24]) == (73.5, 79.1, 81.0, 84.9)
    assert (moco[0], moco[4], moco[24]) == (77.6, 81.6, 84.1)
    assert 0.5 not in moco


def test_the_picture_is_drawn_from_the_numbers(curve, tmp_path):
    job, *_ = curve
    drawn = Image.open(job.work / PICTURE_FILE).convert("RGB")
    draw_curve(tmp_path / "other.png", {0.0: (10.0, 1.0), 1.0: (20.0, 1.0), 6.0: (60.0, 1.0)}, "x")
    other = Image.open(tmp_path / "other.png").convert("RGB")
    assert min(drawn.size) > 500
    assert drawn.tobytes() != other.tobytes()
    blue = (np.asarray(drawn) == (31, 119, 180)).all(axis=2)  # tab:blue, only ours
    assert blue.sum() > 500


@pytest.mark.slow
def test_killed_within_one_number_of_blocks_it_goes_on_and_ends_with_the_same_numbers(tmp_path):
    data, whole, killed = write_imagenet(tmp_path, train=32, val=8), tmp_path / "whole", tmp_path / "killed"
    knobs = ["blocks=0.5,1", "batch=16", "epochs=5", "drop_path=0.1", "mixup=0.8", "ema=0.9"]
    command = Command("imagenet_partial", data, knobs)
    command.run(whole)
    command.kill(killed, 5, f"*/imagenet_partial/1/*/{CHECKPOINT_FILE}")
    (first,) = killed.rglob(f"imagenet_partial/0.5/*/{partial.RESULT_FILE}")
    before = first.read_bytes(), first.stat().st_mtime_ns
    printed = command.run(killed, "--save-minutes", "0")
    assert "resuming imagenet_partial@1" in printed
    assert "imagenet_partial@0.5" not in printed
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    results = [sorted(out.rglob(partial.RESULT_FILE)) for out in (whole, killed)]
    assert [path.parts[-3] for path in results[0]] == ["0.5", "1"]
    for one, other in zip(*results, strict=True):
        a, b = (json.loads(path.read_text()) for path in (one, other))
        assert a["metrics"] == b["metrics"]  # the loss to its last digit
        assert (a["resolved"], a["images_seen"]) == (b["resolved"], b["images_seen"])


@pytest.mark.slow
def test_two_processes_tune_the_same_blocks(tmp_path):
    data = write_imagenet(tmp_path, train=16, val=5)
    command = Command("imagenet_partial", data, ["blocks=0.5,1", "batch=16", "epochs=3"])
    found = command.by_one_and_two_processes(tmp_path)
    for k in ("0.5", "1"):
        a, b = (record.tables["by_blocks"][k] for record in found)
        assert b["metrics"]["loss"] == pytest.approx(a["metrics"]["loss"], rel=1e-3)
        assert a["frozen_sha256"] == b["frozen_sha256"]
