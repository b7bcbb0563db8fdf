"""ADE20K's recipe against the papers' numbers."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from mae_core.errors import UserError
from mae_core.settings import override
from mae_core.vit import ARCHS as ALL_ARCHS
from tests.fixtures.transfer import ARCH
from transfer.segmentation.recipe import recipe, sources

ARCHS = ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14", "vit_small_patch16", ARCH)


@pytest.mark.parametrize(
    ("arch", "values"),
    [
        ("vit_base_patch16", (1e-4, 0.65, 0.1, (3, 5, 7, 11), 768)),
        ("vit_large_patch16", (9e-5, 0.75, 0.2, (7, 11, 15, 23), 1024)),
        ("vit_huge_patch14", (9e-5, 0.75, 0.3, (9, 15, 20, 31), 1280)),
    ],
)
def test_paper_recipe(arch, values):
    paper = asdict(recipe(arch, "paper"))
    values = dict(zip(("lr", "layer_decay", "drop_path", "taps", "head_channels"), values))
    common = {
        "image_size": 512, "iterations": 160000, "warmup_iterations": 1500, "batch": 16, "weight_decay": 0.05,
        "power": 1.0, "pool_scales": (1, 2, 3, 6), "head_dropout": 0.1, "auxiliary_channels": 256,
        "auxiliary_weight": 0.4, "min_scale": 0.5, "max_scale": 2.0, "max_class_share": 0.75,
        "test_short_side": 512, "test_long_side": 2048, "stride": 341, "multi_scale": False,
    }  # fmt: skip
    assert paper == paper | common | values


@pytest.mark.parametrize("arch", ARCHS)
def test_every_value_has_a_source_and_stand_ins_are_called_so(arch):
    found = sources(arch)
    assert found.keys() == asdict(recipe(arch, "paper")).keys()
    for name in ("lr", "layer_decay", "drop_path"):
        assert found[name].startswith("stand-in") == (arch != "vit_base_patch16")
    assert "derived" in sources("vit_huge_patch14")["lr"]


def test_other_sizes_take_the_values_of_the_one_nearest_to_them():
    expected = dict.fromkeys(ALL_ARCHS, (1e-4, 0.65, 0.1))
    expected |= dict.fromkeys(("vit_large_patch14", "vit_large_patch16"), (9e-5, 0.75, 0.2))
    expected |= dict.fromkeys(("vit_huge_patch14", "vit_giant_patch14"), (9e-5, 0.75, 0.3))
    papers = {arch: recipe(arch, "paper") for arch in ALL_ARCHS}
    assert {arch: (r.lr, r.layer_decay, r.drop_path) for arch, r in papers.items()} == expected
    for arch, size in (("vit_small_patch16", "B"), ("vit_large_patch14", "L"), ("vit_giant_patch14", "H")):
        assert sources(arch)["layer_decay"].startswith(f"stand-in: ViT-{size}'s value")


@pytest.mark.parametrize("arch", ARCHS)
def test_mini_changes_sizes_lengths_rates_decay_widths_and_augmentation_only(arch):
    paper, mini = asdict(recipe(arch, "paper")), asdict(recipe(arch, "mini"))
    assert {name for name in paper if paper[name] != mini[name]} <= {
        "image_size", "iterations", "warmup_iterations", "batch", "lr", "layer_decay", "drop_path", "head_channels",
        "auxiliary_channels", "min_scale", "max_scale", "photometric", "test_short_side", "test_long_side", "stride",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("iterations=1000", "warmup_iterations=1500 must be below iterations=1000"),
        ("stride=600", "stride=600 must not be above image_size=512"),
        ("layer_decay=1.5", "layer_decay=1.5: it must be from"),
        ("min_scale=3", "min_scale=3.0 must not be above max_scale=2.0"),
        ("taps=3,3,7,11", "four numbers of blocks"),
        ("lrr=1", "did you mean lr"),
    ],
)
def test_a_knob_that_no_training_can_have_is_refused(setting, says):
    with pytest.raises(UserError, match=says):
        override(recipe("vit_base_patch16", "paper"), [setting])


def test_learning_rate_is_that_of_mmengines_schedulers(mmseg):
    """LinearLR and PolyLR as mmsegmentation's configs chain them, stepped beside ours."""
    from mmengine.optim import LinearLR, PolyLR

    r = replace(recipe("vit_base_patch16", "paper"), iterations=60, warmup_iterations=12)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=r.lr)
    schedulers = [
        LinearLR(optimizer, start_factor=1e-6, by_epoch=False, begin=0, end=12),
        PolyLR(optimizer, power=1.0, eta_min=0.0, by_epoch=False, begin=12, end=60),
    ]
    for step in range(60):
        assert r.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
