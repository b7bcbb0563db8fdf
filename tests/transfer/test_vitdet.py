"""ViTDet's pyramid and recipe: its attention by hand, its maps as detectron2's own, and a detector that trains."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from mae_core.checkpoint import read_checkpoint
from mae_core.errors import UserError
from mae_core.vit import PLAIN, get_arch
from tests.fixtures.coco import write_coco
from tests.fixtures.detection import TASK, TINY
from tests.fixtures.transfer import ARCH, make_job
from transfer.detection.engine_torchvision import MaskRCNN, train_and_predict
from transfer.detection.recipe import ViTDetRecipe, recipe, sources
from transfer.detection.shared import groups_of, new_pyramid, schedule
from transfer.pyramid import ViTDetPyramid, load_pyramid
from transfer.pyramid.vitdet import attend, decomposed


def filled(pyramid: ViTDetPyramid) -> ViTDetPyramid:
    """With tables that are not zero."""
    torch.manual_seed(1)
    for name, parameter in pyramid.named_parameters():
        if "rel_pos" in name:
            nn.init.normal_(parameter, std=0.5)
    return pyramid.eval()


def test_the_bias_is_that_of_every_pair_by_hand():
    torch.manual_seed(0)
    height, width, channels = 2, 3, 4
    q = torch.randn(2, 1, height * width, channels)
    rows, columns = torch.randn(2 * height - 1, channels), torch.randn(2 * width - 1, channels)
    found = decomposed(q, rows, columns, (height, width))
    for i in range(height * width):
        for j in range(height * width):
            (y, x), (v, u) = divmod(i, width), divmod(j, width)
            wanted = q[:, 0, i] @ (rows[y - v + height - 1] + columns[x - u + width - 1])
            torch.testing.assert_close(found[:, 0, i, j], wanted)


def test_without_tables_it_is_timms_own_attention():
    pyramid = ViTDetPyramid(ARCH, 64, window=3).eval()
    block, y = pyramid.blocks[0], torch.randn(2, 9, get_arch(ARCH).dim)
    torch.testing.assert_close(attend(block, y, (3, 3)), block.attn(y))


def own_names(theirs: nn.Module, prefix: str = "") -> dict[str, str]:
    """Names in detectron2's simple feature pyramid -> ours."""
    stages = [name for name, _ in theirs.named_children() if name.startswith("simfp")]
    found = {}
    for name in theirs.state_dict():
        own = name.removeprefix("net.").replace("attn.rel_pos", "rel_pos")
        if name.startswith("simfp"):
            stage, rest = name.split(".", 1)
            number = stages.index(stage)
            first = (4, 1, 0, 1)[number]  # the layers before its two convolutions
            index, tail = rest.split(".", 1)
            if int(index) >= first:  # a convolution that holds its norm
                place = first + 2 * (int(index) - first) + tail.startswith("norm.")
                rest = f"{place}.{tail.removeprefix('norm.')}"
            own = f"stages.{number}.{rest}"
        found[name] = prefix + own
    return found


@pytest.mark.detectron2
@pytest.mark.parametrize("side", [64, 96])
def test_the_maps_are_those_of_detectron2s_own(side):
    """Its ViT and simple feature pyramid with the same weights, at the size of the tables and at another, neither of
    them that of the positions; and so are the gradients, also of positions and tables."""
    vit = pytest.importorskip("detectron2.modeling.backbone.vit")
    a, ours = get_arch(ARCH), filled(ViTDetPyramid(ARCH, 64, window=3, dim=16))
    load_pyramid(ours, read_checkpoint(f"random:{ARCH}"))
    windowed = [number for number in range(a.depth) if ours.windowed(number)]
    net = vit.ViT(
        img_size=64,
        patch_size=a.patch,
        embed_dim=a.dim,
        depth=a.depth,
        num_heads=a.heads,
        norm_layer=lambda dim: nn.LayerNorm(dim, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        window_block_indexes=windowed,
        pretrain_img_size=a.image_size,
        pretrain_use_cls_token=False,
        out_feature="last",
    )
    theirs = vit.SimpleFeaturePyramid(net, "last", 16, (4.0, 2.0, 1.0, 0.5), None, "LN")
    state, names = ours.state_dict(), own_names(theirs)
    theirs.load_state_dict({name: state[own] for name, own in names.items()}, strict=True)
    images = torch.randn(2, 3, side, side)
    expected, found = theirs.eval()(images), ours(images)
    for mine, other in zip(found, expected.values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    weights = [torch.randn_like(m) for m in found]  # each map ends with a norm: the sum of its squares has no gradient
    for maps in (found, expected.values()):
        sum((m * weight).mean() for m, weight in zip(maps, weights, strict=True)).backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[names[name]].grad, parameter.grad, rtol=1e-3, atol=1e-6)
    assert gradients["pos_embed"].grad.abs().max() > 1e-4


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("vit_base_patch16", (100, 0.7, 0.1)),
        ("vit_large_patch16", (100, 0.8, 0.4)),
        ("vit_huge_patch14", (75, 0.9, 0.5)),
    ],
)
def test_the_recipe_is_that_of_the_published_configs(arch, expected):
    r = recipe(arch, "vitdet")
    assert (r.epochs, r.layer_decay, r.drop_path) == expected
    assert (r.lr, r.weight_decay, r.batch, r.window, r.image_size) == (1e-4, 0.1, 64, 14, 1024)
    assert sources(arch, "vitdet").keys() == vars(r).keys()
    # Of 184,375 iterations (here 1,843 an epoch): warm-up of 250, a tenth from 163,889 and a hundredth from 177,546 on;
    # ViT-H has three quarters of each.
    total, rate = schedule(replace(r, batch=64), 1843 * 64 + 48)
    assert total == 1843 * r.epochs
    assert rate(round(125 / 184_375 * total)) == pytest.approx(0.5e-4, rel=0.01)
    assert rate(round(248 / 184_375 * total)) < 1e-4
    assert rate(round(252 / 184_375 * total)) == pytest.approx(1e-4)
    assert rate(round(163_800 / 184_375 * total)) == pytest.approx(1e-4)
    assert rate(round(163_960 / 184_375 * total)) == pytest.approx(1e-5)
    assert rate(round(177_620 / 184_375 * total)) == pytest.approx(1e-6)
    with pytest.raises(UserError, match="lr_steps"):
        replace(r, lr_steps=(0.9, 0.8))


def small() -> ViTDetRecipe:
    return ViTDetRecipe(**{**TINY, "layer_decay": 0.5, "drop_path": 0.0})


def test_each_layer_has_its_share_of_the_rate():
    r = small()
    model = MaskRCNN(new_pyramid(ARCH, read_checkpoint(f"random:{ARCH}").variant, r), r, LayerNorm2d)
    groups = groups_of(model, r)
    scale = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    depth, body = get_arch(ARCH).depth, model.body
    assert scale[id(body.pos_embed)] == (0.5 ** (depth + 1), 0.0)
    assert scale[id(body.blocks[0].rel_pos_h)] == (0.5**depth, r.weight_decay)
    assert scale[id(body.blocks[-1].mlp.fc1.weight)] == (0.5, r.weight_decay)
    assert scale[id(body.stages[2][0].weight)] == (1.0, r.weight_decay)
    assert scale[id(model.roi_heads.box_predictor.cls_score.weight)] == (1.0, r.weight_decay)
    assert scale[id(body.blocks[0].norm1.weight)] == (0.5**depth, 0.0)
    assert (
        scale[id(body.stages[2][1].weight)] == scale[id(model.roi_heads.box_head[0][1].weight)] == (1.0, r.weight_decay)
    )
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    everything = groups_of(model, replace(r, decay_all=True))
    assert {group["weight_decay"] for group in everything} == {r.weight_decay}
    assert sorted((g["lr_scale"], len(g["params"])) for g in everything) == sorted(
        (g["lr_scale"], len(g["params"])) for g in groups
    )


@pytest.mark.detectron2
@pytest.mark.parametrize("everything", [False, True])
def test_rates_and_decay_are_those_of_detectron2s_own(everything):
    """Its rule and the arguments of its configs (`everything`: of ViT-H's), on its own model, parameter by
    parameter."""
    backbone = pytest.importorskip("detectron2.modeling.backbone")
    from detectron2.solver.build import get_default_optimizer_params

    from benchmarks.speed_dense import vitdet
    from transfer.detection.engine_detectron2 import build_model

    arch, depth = "vit_tiny_patch16", 12
    r = replace(ViTDetRecipe(), image_size=256, layer_decay=0.7, drop_path=0.0, decay_all=everything)
    model, theirs = build_model(new_pyramid(arch, PLAIN, r), r, LayerNorm2d), vitdet(arch, r)
    groups = get_default_optimizer_params(
        theirs,
        base_lr=1.0,
        weight_decay=r.weight_decay,
        weight_decay_norm=None if everything else 0.0,
        lr_factor_func=partial(backbone.vit.get_vit_lr_decay_rate, num_layers=depth, lr_decay_rate=0.7),
        overrides={} if everything else {"pos_embed": {"weight_decay": 0.0}},
    )
    wanted = {id(p): (pytest.approx(g["lr"]), g["weight_decay"]) for g in groups for p in g["params"]}
    ours = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups_of(model, r) for p in g["params"]}
    names = {f"backbone.{name}": own for name, own in own_names(theirs.backbone, "backbone.pyramid.").items()}
    mine = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert ours[id(mine[names.get(name, name)])] == wanted[id(parameter)], name
    assert len(mine) == len(wanted) == len(ours)


def test_on_a_cpu_the_maps_have_channels_first_in_memory():
    """With channels last, as timm's norm leaves them, gradients take longer (docs/speed.md)."""
    with torch.no_grad():
        maps = ViTDetPyramid(ARCH, 64, window=3)(torch.randn(2, 3, 64, 64))
    assert all(m.is_contiguous() for m in maps)


def test_positions_are_those_of_pretraining_and_follow_the_image():
    """At the size of pre-training they are added as they are, at twice of it as interpolated."""
    a = get_arch(ARCH)
    pyramid = ViTDetPyramid(ARCH, 2 * a.image_size, window=3)
    side = a.image_size // a.patch
    assert pyramid.pos_embed.shape == (1, side**2, a.dim)
    nothing, own = torch.zeros(1, a.dim, side, side), pyramid.pos_embed.transpose(1, 2).unflatten(2, (side, side))
    assert torch.equal(pyramid.at_positions(nothing), own)
    assert ViTDetPyramid(ARCH, 96, window=3, pretraining_size=96).pos_embed.shape == (1, (96 // a.patch) ** 2, a.dim)
    larger = torch.nn.functional.interpolate(own, scale_factor=2, mode="bicubic", align_corners=False)
    torch.testing.assert_close(pyramid.at_positions(torch.zeros(1, a.dim, 2 * side, 2 * side)), larger)


def test_only_the_config_of_vit_h_decays_norms_and_positions():
    """Its `weight_decay_norm` is None and it has no overrides; the others have 0."""
    archs = ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14")
    assert [TASK.recipe(arch, "vitdet").decay_all for arch in archs] == [False, False, True]


@pytest.mark.parametrize("engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)])
def test_a_detector_trains_and_detects(tmp_path, engine):
    root = write_coco(tmp_path / "data", train=4, val=2)
    job = replace(make_job(TASK, root, tmp_path / "work", None, **TINY), engine=engine, recipe=small())
    job.work.mkdir(parents=True, exist_ok=True)
    run = train_and_predict
    if engine == "detectron2":
        run = pytest.importorskip("transfer.detection.engine_detectron2").train_and_predict
    found = run(job)
    assert found.iterations == 2
    assert "batchnorm" not in found.resolved
    assert not any("BatchNorm" in note for note in found.notes)
    assert "rel_pos_h" in found.resolved["loaded"]
