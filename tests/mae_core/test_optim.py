import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from mae_core import optim
from mae_core.vit import Variant, build_vit


def test_learning_rate_is_scaled_linearly_with_the_batch():
    # MAE's absolute rates: fine-tuning B and L (FINETUNE.md, Table 9), pre-training (Table 8), linear probe (Table 10).
    assert optim.learning_rate(5e-4, 1024) == pytest.approx(2e-3)
    assert optim.learning_rate(1e-3, 1024) == pytest.approx(4e-3)
    assert optim.learning_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)
    assert optim.learning_rate(0.1, 16384) == pytest.approx(6.4)


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (0, 0.0),
        (0.1, 0.08e-3),  # one iteration of ten
        (2.5, 2e-3),
        (4.9, 3.92e-3),
        (5, 4e-3),  # the end of warm-up is the peak
        (5 + 95 / 4, 1e-6 + 3.999e-3 * 0.8535533905932737),  # (1 + cos 45°) / 2
        (5 + 95 / 2, 1e-6 + 3.999e-3 * 0.5),
        (5 + 95 * 2 / 3, 1e-6 + 3.999e-3 * 0.25),  # (1 + cos 120°) / 2
        (100, 1e-6),
    ],
)
def test_half_cosine_by_hand(epoch, rate):
    assert optim.half_cosine(epoch * 1000, 1000, 4e-3, 100, 5, 1e-6) == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_half_cosine_changes_at_every_iteration_and_needs_no_warm_up():
    rates = [optim.half_cosine(step, 7, 1.0, 10, 0, 0.0) for step in range(71)]
    assert rates[0] == 1.0
    assert rates[70] == pytest.approx(0, abs=1e-12)
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert optim.half_cosine(14, 7, 1.0, 2, 2, 0.0) == 1.0  # nothing but warm-up


def described(model, groups):
    """Parameter name -> (lr_scale, weight_decay); each parameter exactly once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], (g.get("lr_scale", 1.0), g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found)), "a parameter is in two groups"
    return dict(found)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_layer_decay_groups_of_vit_b_have_the_paper_s_scales(pool):
    # FINETUNE.md's ViT-B: decay 0.65, weight decay 0.05. Layer ids: facebookresearch/mae, util/lr_decay.py.
    with torch.device("meta"):
        model = build_vit("vit_base_patch16", num_classes=1000, pool=pool)
    found = described(model, optim.layer_decay_groups(model, 0.05, 0.65))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.startswith(("cls_token", "pos_embed", "patch_embed")):
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        else:
            assert name.startswith(("norm.", "fc_norm.", "head."))
            layer = 13
        scale, decay = found[name]
        assert scale == pytest.approx(0.65 ** (13 - layer)), name
        assert decay == (0.0 if parameter.ndim == 1 or name in ("cls_token", "pos_embed") else 0.05), name
    scales = {round(scale, 12) for scale, _ in found.values()}
    assert len(scales) == 14
    assert min(scales) == pytest.approx(0.0036972, rel=1e-4)  # 0.65 ** 13
    assert max(scales) == 1.0


def test_layer_decay_leaves_out_what_is_frozen():
    model = build_vit("vit_mini_patch8", num_classes=3)
    model.pos_embed.requires_grad_(False)
    model.norm.requires_grad_(False)
    found = described(model, optim.layer_decay_groups(model, 0.05, 0.65))
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_pretraining_decays_all_but_one_dimensional_parameters(small_mae):
    model = small_mae()
    found = described(model, optim.pretraining_groups(model, 0.05))
    assert found.keys() == {n for n, _ in model.named_parameters()} - {"pos_embed", "decoder_pos_embed"}
    for name, (_, decay) in found.items():
        free = name.endswith(".bias") or "norm" in name
        assert decay == (0.0 if free else 0.05), name
    assert found["cls_token"][1] == found["mask_token"][1] == 0.05


def test_adamw_steps_by_the_scaled_rate():
    # The first step of Adam is the rate times the gradient's sign; weight decay takes rate * decay * weight besides.
    first, second = (nn.Parameter(torch.full((2, 2), 3.0)) for _ in range(2))
    groups = [{"params": [first], "lr_scale": 0.25, "weight_decay": 0.1}, {"params": [second], "weight_decay": 0.0}]
    optimizer = optim.adamw(groups, (0.9, 0.95))
    optim.set_learning_rate(optimizer, 0.01)
    assert [g["lr"] for g in optimizer.param_groups] == [0.0025, 0.01]
    assert [g["betas"] for g in optimizer.param_groups] == [(0.9, 0.95)] * 2
    first.grad, second.grad = torch.full((2, 2), 0.5), torch.full((2, 2), -7.0)
    optimizer.step()
    torch.testing.assert_close(first.detach(), torch.full((2, 2), 3.0 - 0.0025 - 0.0025 * 0.1 * 3.0))
    torch.testing.assert_close(second.detach(), torch.full((2, 2), 3.0 + 0.01))
    optim.set_learning_rate(optimizer, 0.0)
    before = first.detach().clone()
    optimizer.step()
    assert torch.equal(first.detach(), before)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_five_steps_of_lars_by_hand(weight_decay):
    """The matrix: v = 0.9 v + r (g + decay w), r = 0.001 |w| / (|g| + decay |w|) (You et al., arXiv 1708.03888, eq. 6);
    without decay, which is MAE's setting, that is facebookresearch/mae's util/lars.py. The bias: v = 0.9 v + g."""
    rng = np.random.default_rng(0)
    layer = nn.Linear(7, 5, dtype=torch.float64)
    weight, bias = (p.detach().numpy().copy() for p in (layer.weight, layer.bias))
    weight_velocity, bias_velocity = np.zeros((5, 7)), np.zeros(5)
    optimizer = optim.lars(layer, momentum=0.9, trust_coefficient=0.001, weight_decay=weight_decay)
    for step in range(5):
        rate = 6.4 / (step + 1)
        weight_gradient, bias_gradient = rng.normal(size=(5, 7)), rng.normal(size=5)
        norm = math.sqrt((weight**2).sum())
        ratio = 0.001 * norm / (math.sqrt((weight_gradient**2).sum()) + weight_decay * norm)
        weight_velocity = 0.9 * weight_velocity + ratio * (weight_gradient + weight_decay * weight)
        bias_velocity = 0.9 * bias_velocity + bias_gradient
        weight, bias = weight - rate * weight_velocity, bias - rate * bias_velocity

        layer.weight.grad, layer.bias.grad = torch.from_numpy(weight_gradient), torch.from_numpy(bias_gradient)
        optim.set_learning_rate(optimizer, rate)
        optimizer.step()
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-6)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-12)


def test_lars_takes_a_plain_step_where_a_norm_is_zero():
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    optimizer = optim.lars(layer, momentum=0.9, trust_coefficient=0.001, weight_decay=0.0)
    layer.weight.grad, layer.bias.grad = torch.ones(2, 3), torch.zeros(2)
    optim.set_learning_rate(optimizer, 0.5)
    optimizer.step()
    assert torch.equal(layer.weight.detach(), torch.full((2, 3), -0.5))


def test_registers_are_embeddings_and_beit_decays_as_a_plain_vit():
    """DINOv2's registers enter with the class token; BEiT's tables and layer scale belong to their blocks."""
    vit = build_vit("vit_mini_patch8", num_classes=3, variant=Variant(4, 0, layer_scale=True))
    beit = build_vit("vit_mini_patch8", num_classes=3, pool="avg", variant=Variant(beit=True))
    for model, expected in (
        (vit, {"reg_token": 0, "cls_token": 0, "blocks.2.ls1.gamma": 3, "norm.weight": 7}),
        (beit, {"cls_token": 0, "blocks.2.gamma_1": 3, "blocks.2.attn.relative_position_bias_table": 3}),
    ):
        found = described(model, optim.layer_decay_groups(model, 0.05, 0.5))
        assert found.keys() == dict(model.named_parameters()).keys()
        for name, layer in expected.items():
            assert found[name] == (0.5 ** (7 - layer), 0.0), name
