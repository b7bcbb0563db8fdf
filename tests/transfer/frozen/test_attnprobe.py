"""The attentive probe's training: what it sees, what it leaves alone, and what its number is."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.verify import verify
from mae_core.checkpoint import load_encoder, model_of, parameters_sha256
from mae_core.data import normalize
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.optim import learning_rate
from mae_core.settings import override
from tests.fixtures.transfer import (
    ARCH,
    OTHERS,
    TORCHRUN,
    assert_objection_is_right,
    assert_same_weights,
    assert_space_is_right,
    finished,
    make_job,
    other_checkpoint,
    small_checkpoint,
)
from transfer.data.imagenet import read_split
from transfer.data.transforms import eval_transform
from transfer.frozen import encoder as frozen
from transfer.frozen.attnprobe import PROBE_FILE, AttnProbeRecipe
from transfer.frozen.encoder import Tokens
from transfer.frozen.heads import AttentiveProbe
from transfer.frozen.tasks import ATTNPROBE, TASKS
from transfer.run import read_record, run_job
from transfer.task import RECORD_FILE

SIZES = {"image_size", "epochs", "warmup_epochs", "batch", "base_lr"}
OWN = {  # what the miniature changes in other recipes
    "imagenet_probes": {"rates", "attentive_rates", "held_out"},
    "ade20k_linear": {"iterations", "warmup_iterations", "lr", "min_scale", "max_scale", "photometric", "stride"},
}
OWN["voc_linear"] = OWN["ade20k_linear"]
OWN["nyu_linear"] = {"iterations", "warmup_iterations", "lr", "rotate", "colour", "stride"}
OWN["nyu_dpt"] = OWN["nyu_linear"] | {"channels"}


def test_the_recipe_is_the_sources():
    """As its commands and logs say: effective batch 4096, base rate 0.1, 90 epochs of LARS, 32 queries."""
    r = ATTNPROBE.recipe("vit_base_patch16", "paper")
    assert learning_rate(r.base_lr, r.batch) == pytest.approx(1.6)
    assert (r.head, r.queries, r.norm) == ("ep", 32, False)
    assert (r.image_size, r.epochs, r.warmup_epochs, r.batch) == (224, 90, 10, 4096)
    assert (r.min_lr, r.momentum, r.trust_coefficient, r.min_scale) == (0.0, 0.9, 0.001, 0.08)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("arch", ["vit_base_patch16", "vit_huge_patch14", ARCH])
def test_recipes_of_frozen_tasks_say_what_they_change_and_where_they_are_from(task, arch):
    paper, mini = asdict(task.recipe(arch, "paper")), asdict(task.recipe(arch, "mini"))
    assert {name for name in paper if paper[name] != mini[name]} <= SIZES | OWN.get(task.name, set())
    assert task.sources(arch).keys() == paper.keys()
    assert all(len(text) > 5 for text in task.sources(arch).values())
    with pytest.raises(UserError, match="unknown recipe 'papr'; did you mean paper"):
        task.recipe(arch, "papr")
    with pytest.raises(UserError, match=r"did you mean image_size\?"):
        override(task.recipe(arch, "paper"), ["imagesize=224"])


def test_an_unknown_head_is_answered_with_the_right_name():
    with pytest.raises(UserError, match="unknown head 'vjeap'; did you mean vjepa"):
        replace(ATTNPROBE.recipe(ARCH, "mini"), head="vjeap")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("checkpoint", ["MAE", *OTHERS])
def test_tokens_are_the_encoders_own(checkpoint, norm):
    """After the final norm: what the model's own forward_features returns, without registers. Before it: what the norm
    turns into that."""
    source = small_checkpoint() if checkpoint == "MAE" else other_checkpoint(OTHERS[checkpoint])
    model = model_of(source).eval()
    load_encoder(model, source)
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, found = model.forward_features(images), Tokens(model, 2, norm)(images)
    expected = torch.cat([whole[:, :1], whole[:, model.num_prefix_tokens :]], dim=1)
    assert found.shape == (2, 2, 37, 128)
    last = found[:, -1] if norm else model.norm(found[:, -1])
    torch.testing.assert_close(last, expected)
    assert not torch.allclose(found[:, 0], found[:, 1])


def test_the_number_is_that_of_the_saved_probe_on_the_untouched_encoder(root, tmp_path):
    job = make_job(ATTNPROBE, root, tmp_path / "work")
    record = run_job(job)
    assert record.status == "ok", record.reason
    model = model_of(job.checkpoint, 48).eval()
    load_encoder(model, job.checkpoint)
    assert record.resolved["backbone_sha256"] == parameters_sha256(
        (f"encoder.{name}", tensor) for name, tensor in model.state_dict().items()
    )
    probe = AttentiveProbe("ep", 128, 1000, 32).eval()
    probe.load_state_dict(load_file(job.work / PROBE_FILE))
    split, _ = read_split(root / "imagenet" / "val")
    images = [eval_transform(48)(Image.open(file).convert("RGB")) for file in split.files]
    with torch.inference_mode():
        logits = probe(Tokens(model)(normalize(torch.stack(images), job.checkpoint.normalization)))
    right = (logits.argmax(dim=1).numpy() == np.array(split.labels)).mean()
    assert record.metrics["top1"] == pytest.approx(100 * right)
    assert record.metrics["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, torch.tensor(split.labels)).item(), rel=1e-4
    )
    assert verify(job.work / RECORD_FILE)["top1"] == pytest.approx(100 * right)
    assert (record.n_eval, record.images_seen) == (12, 64)


def test_a_batchnorm_sees_as_many_images_as_on_a_gpu_of_the_sources_logs(root, tmp_path, monkeypatch):
    """Those of MAE's ViT-S, ViT-B and ViT-L: "Batch size per GPU: 256", "Effective batch size: 4096"."""
    found = []

    def stopped(heads, optimizer, training):
        found.append(training)
        raise KeyboardInterrupt

    monkeypatch.setattr(frozen, "check_batch", lambda *_: None)
    monkeypatch.setattr(frozen, "fit", stopped)
    monkeypatch.setattr("transfer.frozen.attnprobe.epoch_rate", lambda *_: lambda step: 0.1)
    with pytest.raises(KeyboardInterrupt):
        run_job(make_job(ATTNPROBE, root, tmp_path / "work", batch=4096))
    assert (found[0].batch, found[0].micro_batch) == (4096, 256)


def test_an_encoder_that_changes_is_no_probe(root, tmp_path, monkeypatch):
    def tampered(*arguments):
        state = fit(*arguments)
        arguments[1].zero_grad()
        changed[0].encoder.blocks[0].mlp.fc1.bias.data[0] += 1e-6
        return state

    fit, changed = frozen.fit, []
    init = Tokens.__init__
    monkeypatch.setattr(Tokens, "__init__", lambda self, *a, **o: (init(self, *a, **o), changed.append(self))[0])
    monkeypatch.setattr(frozen, "fit", tampered)
    record = run_job(make_job(ATTNPROBE, root, tmp_path / "work"))
    assert record.status == "failed"
    assert "the frozen encoder changed" in record.reason


def test_a_killed_training_goes_on_to_the_same_weights(root, tmp_path, monkeypatch):
    """Its checkpoint holds the probe alone."""
    whole, killed = (make_job(ATTNPROBE, root, tmp_path / name, Machine(save_minutes=0)) for name in ("a", "b"))
    assert run_job(whole).status == "ok"
    forward, calls = frozen.forward, []

    def fails(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(frozen, "forward", fails)
        with pytest.raises(KeyboardInterrupt):
            run_job(killed)
    state = torch.load(killed.work / "checkpoint.pth", weights_only=True)
    assert state["state"]["step"] == 5
    assert all(name.startswith(("pooling.", "norm.", "linear.")) for name in state["model"])
    assert run_job(killed).status == "ok"
    assert_same_weights(whole.work / PROBE_FILE, killed.work / PROBE_FILE)


KNOBS = {
    "image_size": 40, "head": "vjepa", "queries": 16, "norm": True, "epochs": 3, "warmup_epochs": 0, "batch": 16,
    "base_lr": 0.8, "min_lr": 0.5, "momentum": 0.5, "trust_coefficient": 0.01, "min_scale": 0.5, "train_fraction": 0.5,
}  # fmt: skip


@pytest.mark.slow
def test_every_knob_moves_the_probe(root, tmp_path):
    assert KNOBS.keys() == {field.name for field in fields(AttnProbeRecipe)}

    def weights(name: str, seed: int = 0, **knobs) -> str:
        job = make_job(ATTNPROBE, root, tmp_path / name, seed=seed, **knobs)
        record = run_job(replace(job, checkpoint=small_checkpoint()))
        assert record.status == "ok", record.reason
        return parameters_sha256(sorted(load_file(job.work / PROBE_FILE).items()))

    first = weights("first")
    assert weights("again") == first
    moved = {knob: weights(knob, **{knob: value}) for knob, value in KNOBS.items()}
    assert first not in {*moved.values(), weights("seed", seed=1), weights("abmilp", head="abmilp")}
    assert len(set(moved.values())) == len(moved)


@pytest.mark.parametrize(
    ("knobs", "machine", "knob", "said"),
    [
        ({"queries": 24}, Machine(), "queries", "queries=24 share the 128 channels of vit_mini_patch8: set a divisor"),
        ({"queries": 24, "head": "abmilp"}, Machine(), None, ""),
        ({"batch": 34}, Machine(), "batch", "32 training images are less than one batch=34"),
        ({"image_size": 50}, Machine(), "image_size", "50x50 is not divisible"),
        ({}, Machine(micro_batch=1), "--micro-batch", "BatchNorm cannot learn from one image at a time"),
        ({"train_fraction": 0.25}, Machine(), None, ""),
    ],
)
def test_a_job_that_is_objected_to_would_fail_and_any_other_runs(root, tmp_path, knobs, machine, knob, said):
    assert_objection_is_right(make_job(ATTNPROBE, root, tmp_path, machine, **{"epochs": 1} | knobs), knob, said)


def test_the_space_is_what_a_training_takes(root, tmp_path):
    assert_space_is_right(make_job(ATTNPROBE, root, tmp_path / "work"), PROBE_FILE)


@pytest.mark.slow
def test_two_processes_share_the_batch(root, tmp_path):
    what = ["--task", "imagenet_attnprobe", "--ckpt", f"random:{ARCH}", "--recipe", "mini", "--device", "cpu"]
    what += ["--data", str(root), "--set", "epochs=1", "warmup_epochs=0", "batch=8", "--out", str(tmp_path)]
    finished([*TORCHRUN, "-m", "transfer.frozen", *what])
    (path,) = Path(tmp_path).rglob(RECORD_FILE)
    record = read_record(path)
    assert (record.status, record.machine["processes"], record.n_eval) == ("ok", 2, 12)
    assert record.resolved["batchnorm_batch"] == 4
