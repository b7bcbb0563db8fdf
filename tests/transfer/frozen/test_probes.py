"""Many heads in one pass: each as if alone, at little more cost than one, and an honest choice among them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.optim import Lars
from torch import nn

from benchmarks.verify import probe_metrics, verify
from mae_core.errors import UserError
from mae_core.flops import count_flops
from mae_core.optim import lars
from mae_core.training import CHECKPOINT_FILE
from mae_core.vit import build_vit, get_arch
from tests.fixtures.transfer import (
    ARCH,
    assert_objection_is_right,
    assert_space_is_right,
    finished,
    kill_at,
    make_job,
)
from transfer.data.predictions import read_predictions
from transfer.data.split import Split
from transfer.frozen.encoder import Tokens
from transfer.frozen.probes import HELD_OUT, PROBES_FILE, Probes, chosen, loss, without_held_out
from transfer.frozen.tasks import PROBES
from transfer.run import read_record, run_job
from transfer.task import RECORD_FILE

FEW = {"rates": (0.01, 1.0), "last_blocks": (1.0, 2.0), "attentive_rates": (1.0,), "held_out": 0.25}


def few_heads(**changes):
    return replace(PROBES.recipe(ARCH, "mini"), **FEW | changes)


def test_the_heads_are_dinov2s_and_four_attentive_ones():
    """linear.py: 13 rates, the last block or four, without and with the mean of the patches; 10 epochs, batch 1024."""
    r = PROBES.recipe("vit_base_patch16", "paper")
    assert (r.epochs, r.batch, r.warmup_epochs, r.momentum, len(r.rates)) == (10, 1024, 0, 0.9, 13)
    with torch.device("meta"):
        probes = Probes(r, 768, 1000)
    assert len(probes.names) == len(set(probes.names)) == 56
    widths = [head.linear.in_features for head in probes.heads]
    assert widths == [768] * 13 + [2 * 768] * 13 + [4 * 768] * 13 + [5 * 768] * 13 + [768] * 4


def test_every_head_moves_as_by_an_optimizer_of_its_own():
    """torch's SGD for the linear ones, `lars` for the attentive one, over three steps."""
    torch.manual_seed(0)
    r = few_heads(queries=4)
    probes = Probes(r, 32, 5)
    together = Lars(probes.groups, lr=0.0, momentum=0.9, trust_coeff=0.001)
    others = []
    for head, rate in zip(probes.heads, [0.01, 1.0] * 4):
        alone = type(head)(32, 5, head.blocks, head.mean)
        alone.load_state_dict(head.state_dict())
        others.append((alone, torch.optim.SGD(alone.parameters(), lr=0.5 * rate, momentum=0.9)))
    attentive = type(probes.heads[-1])("ep", 32, 5, 4)
    attentive.load_state_dict(probes.heads[-1].state_dict())
    by_lars = lars(attentive, 0.9, 0.001, 0.0)
    for group in by_lars.param_groups:
        group["lr"] = 0.5
    others.append((attentive, by_lars))
    for group in together.param_groups:
        group["lr"] = 0.5 * group["lr_scale"]
    for step in range(3):
        tokens = torch.randn(8, 2, 10, 32, generator=torch.Generator().manual_seed(step))
        labels = torch.arange(8) % 5
        together.zero_grad()
        loss(probes, tokens, labels).backward()
        together.step()
        for head, optimizer in others:
            optimizer.zero_grad()
            inputs = (tokens,) if head is attentive else (tokens, tokens[:, -1, 1:].mean(dim=1))
            nn.functional.cross_entropy(head(*inputs), labels).backward()
            optimizer.step()
    for head, (alone, _) in zip(probes.heads, others, strict=True):
        for name, tensor in head.state_dict().items():
            torch.testing.assert_close(tensor, alone.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_all_heads_cost_at_most_a_third_more_than_one():
    """FLOPs of a training step on ViT-B's tokens, with the encoder's forward pass, which is done once."""
    r, dim, spent = PROBES.recipe("vit_base_patch16", "paper"), 768, []
    with torch.device("meta"):
        encoder = Tokens(build_vit("vit_base_patch16", 224), 4, norm=True)
        images, tokens, labels = torch.empty(2, 3, 224, 224), torch.empty(2, 4, 197, dim), torch.zeros(2, dtype=int)
        for recipe in (replace(r, rates=(0.1,), last_blocks=(1.0,), attentive_rates=()), r):
            probes = Probes(recipe, dim, 1000)
            heads = count_flops(lambda probes=probes: loss(probes, tokens, labels).backward(), probes)
            spent.append(count_flops(lambda: encoder(images), encoder) + heads)
    assert get_arch("vit_base_patch16").depth == 12
    assert spent[0] < spent[1] < 1.3 * spent[0]


def test_the_head_is_chosen_on_the_held_out_images():
    names = ["linear, a", "linear, b", "attentive, c"]
    held = np.array([[1, 1, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]], bool)  # 50, 75 and 50 %
    test = np.array([[1, 1, 1], [1, 0, 1], [1, 0, 1], [0, 0, 1]], bool)  # 75, 25 and 100 %
    metrics, of = chosen(names, held, test)
    assert of == {"top1": 1, "top1_linear": 1, "top1_attentive": 2}
    assert metrics == {
        "top1": 25.0, "top1_linear": 25.0, "top1_attentive": 100.0, "top1_best_on_test": 75.0, "optimism": 50.0,
    }  # fmt: skip
    # An attentive head that is chosen leaves the optimism what it is: that of the linear ones.
    metrics, of = chosen(names, held[:, [0, 0, 1]], test)
    assert of == {"top1": 2, "top1_linear": 0, "top1_attentive": 2}
    assert (metrics["top1"], metrics["top1_best_on_test"], metrics["optimism"]) == (100.0, 75.0, 0.0)
    assert chosen(names[:2], held[:, [0, 0]], test[:, [0, 1]])[1] == {"top1": 0, "top1_linear": 0}


def test_noise_gives_optimism_to_the_best_on_test_alone():
    """56 heads that guess among 10 classes: the chosen one is right as often as chance, over 400 draws."""
    rng = np.random.default_rng(0)
    names = [f"linear, {i}" for i in range(52)] + [f"attentive, {i}" for i in range(4)]
    found = [chosen(names, rng.random((200, 56)) < 0.1, rng.random((500, 56)) < 0.1)[0] for _ in range(400)]
    mean = {name: np.mean([one[name] for one in found]) for name in found[0]}
    error = 100 * (0.1 * 0.9 / 500 / 400) ** 0.5
    for name in ("top1", "top1_linear", "top1_attentive"):
        assert abs(mean[name] - 10) < 3 * error
    assert mean["top1_best_on_test"] > 10 + 40 * error
    assert mean["optimism"] == pytest.approx(mean["top1_best_on_test"] - mean["top1_linear"])


def test_held_out_images_are_not_trained_on():
    whole = Split(tuple(f"{i}.jpg" for i in range(40)), tuple(i % 4 for i in range(40)))
    kept, held = without_held_out(whole, 0.1, seed=0)
    assert (len(kept.files), len(held.files)) == (36, 4)
    assert sorted((*kept.files, *held.files)) == sorted(whole.files)
    assert {f: c for part in (kept, held) for f, c in zip(part.files, part.labels)} == dict(zip(*vars(whole).values()))
    assert without_held_out(whole, 0.1, seed=1)[1] != held
    assert len(without_held_out(whole, 0.001, seed=0)[1].files) == 1


def test_a_run_keeps_what_its_numbers_are_made_of(root, tmp_path):
    job = make_job(PROBES, root, tmp_path / "work", **FEW)
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert (record.n_eval, record.resolved["held_out_images"], record.resolved["train_images"]) == (12, 8, 24)
    assert record.images_seen == 2 * 24
    rows = read_predictions(job.work / "predictions.parquet")
    assert rows[""]["heads"].shape == (12, 9)
    assert rows[HELD_OUT]["heads"].shape == (8, 9)
    heads = record.tables["heads"]
    by_held = max(record.resolved["heads"], key=lambda name: heads[name]["held_out"])  # the first of equals
    assert record.resolved["chosen"]["top1"] == by_held
    assert record.metrics["top1"] == pytest.approx(heads[by_held]["top1"], abs=1e-3)
    best = max(head["top1"] for name, head in heads.items() if name.startswith("linear"))
    assert record.metrics["top1_best_on_test"] == pytest.approx(best, abs=1e-3)
    assert record.metrics["optimism"] == pytest.approx(best - record.metrics["top1_linear"], abs=1e-3)
    again = verify(job.work / RECORD_FILE)
    assert again == pytest.approx(record.metrics)
    kept = read_record(job.work / RECORD_FILE)  # whose tables are in the order of the alphabet
    right = (rows[""]["heads"] == rows[""]["label"][:, None]).mean(axis=0)
    assert [kept.tables["heads"][name]["top1"] for name in kept.resolved["heads"]] == pytest.approx(
        100 * right, abs=1e-3
    )
    # Of what each head says, made different: a number that is not the chosen head's is found.
    shown = {"label": np.arange(4), "top1": np.array([0, 1, 9, 9]), "heads": np.array([[9, 0], [9, 1], [9, 9], [3, 9]])}
    made = probe_metrics(shown, shown, ["linear, z", "attentive, a"], linear_alone=True)
    assert (made["top1_linear"], made["top1_best_on_test"], made["optimism"]) == (25.0, 25.0, 0.0)
    of_version_1 = probe_metrics(shown, shown, ["linear, z", "attentive, a"], linear_alone=False)  # the best of all
    assert (of_version_1["top1_best_on_test"], of_version_1["optimism"]) == (50.0, 0.0)
    with pytest.raises(UserError, match="not those of the head that was chosen"):
        probe_metrics(shown | {"top1": np.arange(4)}, shown, ["linear, z", "attentive, a"], linear_alone=True)
    assert len(load_file(job.work / PROBES_FILE)) == 8 * 2 + 7  # BatchNorm has three buffers


@pytest.mark.slow
def test_a_killed_run_ends_with_the_heads_of_an_undisturbed_one(root, tmp_path):
    knobs = ["batch=4", "epochs=4", "rates=0.01,1", "last_blocks=1,2", "attentive_rates=1", "held_out=0.25"]
    own = ["--task", "imagenet_probes", "--ckpt", f"random:{ARCH}", "--data", str(root), "--recipe", "mini"]
    line = ["-m", "transfer.frozen", *own, "--set", *knobs, "--device", "cpu", "--workers", "0"]
    finished([*line, "--out", str(tmp_path / "a")])
    often = [*line, "--out", str(tmp_path / "b"), "--save-minutes", "0"]
    kill_at(f"*/{CHECKPOINT_FILE}", 3, often)
    assert not list((tmp_path / "b").rglob(RECORD_FILE))
    assert "resuming imagenet_probes" in finished(often)
    (one,), (other,) = ((tmp_path / name).rglob(PROBES_FILE) for name in "ab")
    assert one.read_bytes() == other.read_bytes()
    one, other = (read_record(next((tmp_path / name).rglob(RECORD_FILE))) for name in "ab")
    assert one.metrics == other.metrics
    assert one.tables == other.tables


@pytest.mark.parametrize(
    ("knobs", "knob", "said"),
    [
        ({"last_blocks": (1.0, 7.0)}, "last_blocks", "last_blocks=1,7: vit_mini_patch8 has 6"),
        ({"queries": 24}, "queries", "queries=24 share the 128 channels"),
        ({"batch": 25}, "batch", "24 training images without the held-out ones are less than one batch=25"),
        ({"batch": 24}, None, ""),
    ],
)
def test_a_job_that_is_objected_to_would_fail_and_any_other_runs(root, tmp_path, knobs, knob, said):
    assert_objection_is_right(make_job(PROBES, root, tmp_path, **FEW | {"epochs": 1} | knobs), knob, said)


def test_no_attentive_head_need_be_there(root, tmp_path):
    with pytest.raises(UserError, match="held_out=0"):
        few_heads(held_out=0.6)
    with pytest.raises(UserError, match="give whole numbers"):
        few_heads(last_blocks=(1.5,))
    record = run_job(make_job(PROBES, root, tmp_path / "work", **FEW | {"attentive_rates": ()}))
    assert record.metrics.keys() == {"top1", "top1_linear", "top1_best_on_test", "optimism"}


def test_the_space_is_what_a_training_takes(root, tmp_path):
    assert_space_is_right(make_job(PROBES, root, tmp_path / "work", **FEW), PROBES_FILE)
