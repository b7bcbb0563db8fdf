"""What speed.py measures and leaves, and that the official code's place is taken by a folder of the user's."""

import json
import sys
import time

import numpy as np
import pytest
import timm.models.vision_transformer as timm_vit
import torch

from benchmarks import speed
from benchmarks.flops import training_flops
from benchmarks.originals import mae as official
from benchmarks.speed import Result
from benchmarks.speed_workloads import make_workloads
from benchmarks.timing import Timing
from mae_core.machine import Machine
from mae_core.recipe import recipe
from transfer.classification.cost import classifier_flops

QUICK = ["--arch", "vit_mini_patch8", "--batch", "4", "--warmup", "1", "--repeats", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """The device's rate is measured in test_timing.py; here it is twice as high in bf16."""
    found = {"fp32": 1e11, "bf16": 2e11}
    monkeypatch.setattr(speed, "matmul_rate", lambda device, precision, clock: found[precision])


def run(tmp_path, *flags):
    assert speed.main([*flags, *QUICK, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("what", ["pretrain", "finetune", "eval"])
def test_rate_utilisation_and_flops_follow_from_the_step_time(tmp_path, what, capsys):
    found = run(tmp_path, what)
    (arm,) = found["arms"]
    assert len(arm["seconds"]) == 2
    rate = arm["images_per_second"]
    assert rate == pytest.approx(4 / np.median(arm["seconds"]))
    assert found["matmul_flops_per_second"] == 1e11
    assert found["clock"] == "process CPU"
    assert arm["utilisation_percent"] == pytest.approx(100 * rate * arm["flops_per_image"] / 1e11)
    for text in ((tmp_path / f"{what}-vit_mini_patch8-fp32.md").read_text(), capsys.readouterr().out):
        assert f"| ours | {rate:.1f} |" in text


def test_flops_of_the_classifier_agree_with_a_count_by_hand():
    # 37 tokens of 128: twelve of a block's matrix products are 128 x 128, and two 37 x 37 x 128 for attention.
    block = 37 * 12 * 128**2 + 2 * 37**2 * 128
    forward = 36 * 192 * 128 + 6 * block + 128 * 1000
    assert classifier_flops("vit_mini_patch8", 48, train=False) == 2 * forward
    # The images need no gradient: their backward pass is one product, not two.
    assert classifier_flops("vit_mini_patch8", 48, train=True) == 6 * forward - 2 * 36 * 192 * 128


def test_every_timed_step_trains(monkeypatch):
    workloads, flops = make_workloads("pretrain", "vit_mini_patch8", 4, Machine(), None)
    assert list(workloads) == ["ours"]
    assert flops == training_flops("vit_mini_patch8", recipe("vit_mini_patch8", "mini"), 4)
    steps = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(self))
    workloads["ours"]()
    workloads["ours"]()
    assert len(steps) == 2
    assert all(p.grad is not None for group in steps[0].param_groups for p in group["params"])


def test_one_thread_is_timed_by_its_cpu_time_and_others_by_the_clock():
    assert speed.clock_for(Machine(threads=1)) == ("process CPU", time.process_time)
    for machine in (Machine(threads=2), Machine(device="cuda")):
        assert speed.clock_for(machine) == ("wall", time.perf_counter)


def test_the_table_gives_ratios():
    arms = [Result("ours", Timing((0.5,)), 10, 0, 1.0, 0.0), Result("official", Timing((0.6, 0.8)), 10, 0, 1.0, 0.0)]
    lines = speed.table(arms).splitlines()
    assert lines[0] == "| arm | images/s | step (ms) | spread | peak GiB | ours is |"
    assert lines[2] == "| ours | 20.0 | 500.0 |  | 1.00 |  |"
    assert lines[3] == "| official | 14.3 | 700.0 | ± 7.1 % | 1.00 | 1.40x |"
    # One arm, one repeat: nothing to compare, no spread.
    assert speed.table(arms[:1]).splitlines()[0] == "| arm | images/s | step (ms) | peak GiB |"
    assert Result("a", Timing((0.5,)), 10, 10**9, 0.0, 10**11).utilisation == pytest.approx(20)


# A stand-in for the official code, with what today's libraries no longer have: an argument and a name.
MODELS = """
import numpy as np
import torch
from timm.models.vision_transformer import Block


class MaskedAutoencoderViT(torch.nn.Module):
    def __init__(self, img_size, patch_size, embed_dim, depth, norm_pix_loss, norm_layer, **rest):
        super().__init__()
        self.size = np.float(img_size)
        self.embed = torch.nn.Linear(3 * patch_size**2, embed_dim)
        self.block = Block(embed_dim, 4, 4.0, qkv_bias=True, qk_scale=None, norm_layer=norm_layer)

    def forward(self, images, mask_ratio):
        patches = images.flatten(1).unflatten(1, (-1, self.embed.in_features))
        return self.block(self.embed(patches)).square().mean(), None, None
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in official.FILES:
        (tmp_path / "mae" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mae" / name).write_text(MODELS if name == "models_mae.py" else "")
    yield tmp_path / "mae"
    sys.modules.pop("models_mae", None)
    if "float" in vars(np):
        del np.float


def test_the_official_code_is_timed_at_our_precision_and_as_it_ships(folder, tmp_path):
    block = timm_vit.Block
    found = run(tmp_path, "pretrain", "--compare", str(folder), "--precision", "bf16")
    assert [arm["name"] for arm in found["arms"]] == ["ours", "official, same precision", "official, as shipped"]
    for arm, rate in zip(found["arms"], (2e11, 2e11, 1e11)):
        used = 100 * arm["images_per_second"] * arm["flops_per_image"] / rate
        assert arm["utilisation_percent"] == pytest.approx(used)
        assert arm["ours_over_it"] == pytest.approx(found["arms"][0]["images_per_second"] / arm["images_per_second"])
    assert timm_vit.Block is block
    assert str(folder) not in sys.path


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["pretrain", "--compare", "."],
            ".: models_mae.py is not there; give a checkout of facebookresearch/mae",
        ),
        (["loader"], "--data DIR is needed by loader, and by nothing else"),
        (["eval", "--data", "."], "--data DIR is needed by loader, and by nothing else"),
        (["eval", "--arch", "vit_base"], "unknown arch 'vit_base'; did you mean"),
        (["eval", "--repeats", "0"], "--repeats 0: give at least one"),
        (["loader", "--data", ".", "--compare", "."], "beside torchvision and Pillow: no --compare"),
    ],
)
def test_wrong_calls_are_refused_in_one_sentence(tmp_path, capsys, flags, sentence):
    first = ["--out", str(tmp_path), "--device", "cpu", "--batch", "2"]
    arch = [] if "--arch" in flags else ["--arch", "vit_mini_patch8"]
    assert speed.main([*flags, *arch, *first]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
