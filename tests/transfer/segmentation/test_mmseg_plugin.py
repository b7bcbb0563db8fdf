"""What mmsegmentation gets from this project, and the stand-in for mmcv's operators."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from mae_core import workers
from mae_core.errors import UserError
from mae_core.machine import Machine
from tests.fixtures.segmentation import make_config, make_job
from tests.fixtures.transfer import finished
from transfer.data.ade20k import FOLDER
from transfer.segmentation import mmseg_config, mmseg_plugin


def test_layer_decay_takes_effect_on_every_block(start):
    """depth + 2 distinct scales."""
    model, optimizer = start
    groups = optimizer.param_groups
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    parameters = dict(model.named_parameters())
    assert scale.keys() == parameters.keys()
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    assert all(p is parameters[n] for g in groups for p, n in zip(g["params"], g["names"]))
    assert len(set(scale.values())) == 6 + 2
    for name, value in scale.items():
        part = name.split(".")
        if part[0] != "backbone" or part[1] in ("upsample_4x", "upsample_2x"):
            assert value == 1
        elif part[1] == "blocks":
            assert value == 0.5 ** (6 - int(part[2]))
        else:
            assert part[1] in ("patch_embed", "pos_embed", "cls_token")
            assert value == 0.5**7


def test_rates_and_weight_decay_are_those_of_mmseg_s_own_constructor(start, mmseg):
    """Whose name test misses positions and class token, and the bias tables: it decays them."""
    from mmseg.engine.optimizers import LearningRateDecayOptimizerConstructor

    model, optimizer = start
    ours = {n: (g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups for n in g["names"]}

    def named_parameters():
        for name, parameter in model.named_parameters():
            name = re.sub(r"blocks\.(\d+)\.bias", r"layers.\1.attn.relative_position_bias_table", name)
            yield name.replace("backbone.blocks", "backbone.layers"), parameter

    named = SimpleNamespace(backbone=type("MAE", (), {})(), named_parameters=named_parameters)
    wrapper = {"optimizer": {"type": "AdamW", "lr": 1.0, "weight_decay": 0.07}}
    constructor = LearningRateDecayOptimizerConstructor(wrapper, {"num_layers": 6, "decay_rate": 0.5})
    groups = []
    constructor.add_params(groups, named)
    theirs = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(theirs) == len(ours)
    for name, parameter in model.named_parameters():
        assert ours[name] == pytest.approx(theirs[id(parameter)]), name
    decayed = {name for name, (_, decay) in ours.items() if decay}
    assert {"backbone.pos_embed", "backbone.cls_token", "backbone.blocks.0.bias"} < decayed
    assert "backbone.blocks.0.ls1.gamma" not in decayed


def test_the_heads_losses_are_mmseg_s_own_without_the_accuracy(start):
    torch.manual_seed(0)
    labels = torch.randint(0, 150, (2, 1, 48, 48)).masked_fill(torch.rand(2, 1, 48, 48) < 0.2, 255)
    samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=label)) for label in labels]
    for head in (start[0].decode_head, start[0].auxiliary_head):
        logits, own = torch.randn(2, 150, 12, 12, requires_grad=True), super(type(head), head)
        theirs, ours = own.loss_by_feat(logits, samples), head.loss_by_feat(logits, samples)
        assert theirs.keys() - ours.keys() == {"acc_seg"}
        gradients = [torch.autograd.grad(found["loss_ce"], logits)[0] for found in (theirs, ours)]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(ours["loss_ce"], theirs["loss_ce"], rtol=1e-6, atol=0)


def test_a_wrong_label_is_also_found_when_its_turn_comes(root, tmp_path, mmseg):
    """Only some pairs are opened before the training."""
    step = mmseg_plugin.CheckPair()
    image = next((root / FOLDER / "images/training").iterdir())
    label = tmp_path / "label.png"
    Image.new("L", Image.open(image).size, 200).save(label)
    with pytest.raises(UserError, match="has the label 200"):
        step({"img_path": str(image), "seg_map_path": str(label)})
    recipe = make_job(root, tmp_path).recipe
    pipelines = (mmseg_config.train_pipeline(recipe), mmseg_config.test_pipeline(recipe))
    assert [pipeline[0]["type"] for pipeline in pipelines] == ["CheckPair", "CheckPair"]


@pytest.mark.slow
def test_nothing_leaks_into_a_process_that_does_not_segment():
    program = (
        "import sys, transfer.segmentation, benchmarks.suite; "
        "print([m for m in sys.modules if m.split('.')[0] in ('mmcv', 'mmseg', 'mmengine')])"
    )
    assert finished(["-c", program]).strip() == "[]"


def test_the_stand_in_has_what_mmseg_imports_and_says_what_is_missing(mmseg):
    import mmcv.ops

    if not getattr(mmcv.ops, "stand_in", False):
        pytest.skip("full mmcv is installed")
    imported = set()
    for path in Path(mmseg.__file__).parent.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip().startswith("from mmcv.ops import"):
                imported |= {name.split(" as ")[0].strip() for name in line.split("import")[1].split(",")}
    assert imported == set(mmseg_plugin.FUNCTIONS) | set(mmseg_plugin.CLASSES)
    for name in imported:
        with pytest.raises(NotImplementedError, match=rf"mmcv\.ops\.{name} is a compiled operator: install full mmcv"):
            getattr(mmcv.ops, name)(1)
    assert not isinstance(nn.Conv2d(1, 1, 1), mmcv.ops.DeformConv2d)


def test_full_mmcv_is_left_alone(mmseg, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "mmcv._ext" else find(name))
    real = object()
    monkeypatch.setitem(sys.modules, "mmcv.ops", real)
    assert mmseg_plugin.provide_operators() is False
    assert sys.modules["mmcv.ops"] is real


def test_the_test_has_as_many_workers_as_there_is_shared_memory_for(root, tmp_path, mmseg, monkeypatch, capsys):
    """The largest image, shrunk to a short side of 56 px, and its label of 8 bytes a pixel: two of them wait for the
    test, which has one."""
    from mmengine.registry import init_default_scope
    from mmengine.runner import Runner

    init_default_scope("mmseg")
    config = make_config(make_job(root, tmp_path, Machine(workers=16)))["test_dataloader"]
    sizes = [Image.open(path).size for path in (root / FOLDER / "images/validation").iterdir()]
    assert max(max(size) / min(size) for size in sizes) < 4  # the long side's limit
    largest = max(8 * w * h + 3 * 56 * round(56 * max(w, h) / min(w, h)) for w, h in sizes)
    free = SimpleNamespace(f_bavail=(2 * 1 + 1) * largest / 0.9 + 9, f_frsize=1)
    monkeypatch.setattr(workers.os, "statvfs", lambda path: free)
    fitting = mmseg_plugin.with_workers_that_fit(config, mmseg.registry.DATASETS)
    assert "starting 1 of them" in capsys.readouterr().out
    loader = Runner.build_dataloader(fitting)
    assert (loader.num_workers, fitting | {"num_workers": 16}) == (1, fitting | config | {"num_workers": 16})
    assert [min(batch["inputs"][0].shape[1:]) for batch in loader] == [56] * 5
    assert loader.worker_init_fn.func is workers.begin_worker
