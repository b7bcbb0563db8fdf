"""The detectron2 engine against our own pyramid, against torchvision's, and against being killed."""

import json
import os
import signal
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.fixtures.curves import curves
from tests.fixtures.miniature import write_few
from tests.fixtures.timm import register_timm, timm_checkpoint
from tests.fixtures.transfer import TORCHRUN, assert_same_weights, finished, kill_at, record_samples

pytest.importorskip("detectron2", reason="detectron2 is not installed")

from detectron2.config import LazyCall, get_cfg, instantiate
from detectron2.modeling import build_backbone as build_from_cfg
from detectron2.solver.build import get_default_optimizer_params
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from mae_core import workers
from mae_core.checkpoint import read_checkpoint
from mae_core.data import MEAN, STD
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.training import CHECKPOINT_FILE
from transfer.data.coco import training_examples
from transfer.detection import engine_detectron2, engine_torchvision, train_detectron2
from transfer.detection.recipe import recipe
from transfer.detection.shared import DETECTOR_FILE, RoIBatchNorm, parameter_groups
from transfer.detection.tasks import TASKS
from transfer.miniature import dense
from transfer.pyramid import ViTPyramid, load_pyramid
from transfer.run import run_job
from transfer.task import Job

pytestmark = [pytest.mark.detectron2, pytest.mark.filterwarnings("ignore")]
ARCH, COCO = "vit_mini_patch8", TASKS[0]
LITTLE = {"image_size": 64, "epochs": 1, "warmup_epochs": 0.5, "batch": 4, "roi_batch": 16, "proposals": 32}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_few(dense.coco, tmp_path_factory.mktemp("data"), train=24, val=4)


@pytest.fixture
def r():
    return replace(recipe(ARCH, "mini"), **LITTLE)


@pytest.fixture
def pyramid(r):
    """With weights that a training would have moved: no bias table is zero."""
    torch.manual_seed(0)
    pyramid = ViTPyramid(ARCH, r.image_size, window=r.window)
    load_pyramid(pyramid, read_checkpoint(f"random:{ARCH}"))
    with torch.no_grad():
        for parameter in pyramid.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return pyramid.eval()


def make_job(root, work, machine=None, **changes) -> Job:
    r = replace(recipe(ARCH, "mini"), **{**LITTLE, **changes})
    checkpoint = read_checkpoint(f"random:{ARCH}")
    return Job(COCO, checkpoint, r, "mini", {}, COCO.inspect(root), work, 0, "detectron2", machine or Machine())


def test_both_engines_see_the_pyramids_own_features(pyramid, r):
    """Pixels of an image that fills 40 x 64 of the square."""
    image = torch.randint(0, 256, (3, 40, 64), generator=torch.Generator().manual_seed(0)).float()
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    square = torch.zeros(1, 3, 64, 64)
    square[0, :, :40] = (image - mean) / std
    alone = pyramid(square)

    ours = engine_detectron2.build_model(pyramid, r, RoIBatchNorm).eval()
    theirs = ours.backbone.bottom_up(ours.preprocess_image([{"image": image}]).tensor)
    assert list(theirs) == ["s2", "s4", "s8", "s16"]
    torch.testing.assert_close(list(theirs.values()), alone, rtol=0, atol=1e-5)

    seen = []
    tv = engine_torchvision.MaskRCNN(pyramid, r, RoIBatchNorm).eval()
    tv.body.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    padded = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    padded[0, :, :40] = image
    tv(padded, [{"size": (40, 64)}])
    torch.testing.assert_close(seen, alone, rtol=0, atol=1e-5)


def test_heads_are_those_of_the_recipe(pyramid):
    model = engine_detectron2.build_model(pyramid, recipe("vit_base_patch16", "paper"), RoIBatchNorm)
    rpn, heads = model.proposal_generator, model.roi_heads

    def count(module, kind):
        return sum(isinstance(m, kind) for m in module.modules())

    assert count(rpn.rpn_head.conv, nn.Conv2d) == 2
    assert count(rpn, RoIBatchNorm) == 0
    box = [m.weight.shape[0] for m in heads.box_head.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert box == [256, 256, 256, 256, 1024]
    assert count(heads.box_head, RoIBatchNorm) == count(heads.mask_head, RoIBatchNorm) == 4
    assert count(heads.mask_head, nn.ConvTranspose2d) == 1
    assert count(model.backbone, RoIBatchNorm) == 8  # after each lateral and output conv
    assert heads.box_predictor.cls_score.out_features == 81
    # Anchors of 8 strides a side: 16 to 256 px at strides 2 to 32.
    cells = list(rpn.anchor_generator.cell_anchors)
    assert [(cell[1, 2:] - cell[1, :2]).tolist() for cell in cells] == [[s, s] for s in (16, 32, 64, 128, 256)]
    assert [len(cell) for cell in cells] == [3] * 5
    assert rpn.anchor_generator.offset == get_cfg().MODEL.ANCHOR_GENERATOR.OFFSET == 0
    assert rpn.pre_nms_topk == {True: 2000, False: 1000}
    assert heads.batch_size_per_image == 512


@pytest.mark.parametrize("norm", [RoIBatchNorm, engine_detectron2.EmptySafeSyncBatchNorm])
def test_weight_decay_is_that_of_detectron2_with_mimdets_exceptions(pyramid, r, norm):
    """hustvl/MIMDet calls this function for its re-implementation of Li et al., with these names' own."""
    model = engine_detectron2.build_model(pyramid, r, norm)
    names = ("pos_embed", "bias_global", "bias_windowed")
    overrides = {name: {"weight_decay": 0.0} for name in names}
    groups = get_default_optimizer_params(model, weight_decay=0.1, weight_decay_norm=0.0, overrides=overrides)
    theirs = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    ours = {id(p): group["weight_decay"] for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert ours == theirs
    assert set(ours) == {id(p) for p in model.parameters()}
    assert set(ours.values()) == {0.0, 0.1}


def test_boxes_keep_their_place_in_bf16(pyramid, r):
    """In training and test, of both poolers: maps and boxes are float32, the objects' own boxes are among the sampled
    ones to the last bit, and those that are pooled for masks are the detections'."""
    for norm in (RoIBatchNorm, engine_detectron2.EmptySafeSyncBatchNorm):
        model, seen = engine_detectron2.build_model(pyramid, replace(r, roi_batch=64), norm), []
        for pooler in (model.roi_heads.box_pooler, model.roi_heads.mask_pooler):
            for align in pooler.level_poolers:
                align.register_forward_pre_hook(lambda module, arguments, s=seen: s.append(arguments))
        own = torch.tensor([[33.3, 40.7, 63.1, 62.9], [3.3, 5.7, 17.1, 11.9]])  # bf16 has quarters from 32 on
        objects = Instances((64, 64), gt_boxes=Boxes(own), gt_classes=torch.tensor([0, 1]))
        objects.gt_masks = BitMasks(torch.ones(2, 64, 64, dtype=torch.bool))
        with torch.autocast("cpu", torch.bfloat16), EventStorage():
            losses = model.train()([{"image": torch.zeros(3, 64, 64), "instances": objects}])
            rois = torch.cat([rois for _, rois in seen[:4]])
            assert all((rois[:, 1:] == box).all(dim=1).any() for box in own)
            model.eval().roi_heads.box_predictor.test_score_thresh = 0.0
            with torch.no_grad():
                (found,) = model.inference([{"image": torch.zeros(3, 64, 64)}], do_postprocess=False)
        assert {value.dtype for pair in seen for value in pair} == {torch.float32}
        assert len(seen) == 16
        pooled = torch.cat([rois for _, rois in seen[12:]])[:, 1:]
        assert len(pooled) == len(found) > 0
        assert torch.equal(pooled.sort(dim=0).values, found.pred_boxes.tensor.sort(dim=0).values)
        assert {found.scores.dtype, found.pred_masks.dtype} == {torch.float32}
        assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_training_in_bf16_is_tested_in_float32(root, tmp_path):
    job = make_job(root, tmp_path, Machine(precision="bf16"))
    model = engine_detectron2.build_model(ViTPyramid(ARCH, 64, window=6), job.recipe, RoIBatchNorm)
    seen = []
    model.backbone.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    engine_detectron2.predict(model, job)
    assert seen
    assert not any(seen)


def test_a_batch_without_objects_trains(pyramid, r):
    model = engine_detectron2.build_model(pyramid, r, RoIBatchNorm).train()
    nothing = Instances((64, 64), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.long))
    nothing.gt_masks = BitMasks(torch.zeros(0, 64, 64, dtype=torch.bool))
    with EventStorage():
        losses = model([{"image": torch.zeros(3, 64, 64), "instances": nothing}] * 2)
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(buffer.isfinite().all() for buffer in model.buffers())


TWO_NORMS = """
import torch, torch.distributed as dist
from transfer.detection.engine_detectron2 import EmptySafeSyncBatchNorm
dist.init_process_group("gloo")
norm = EmptySafeSyncBatchNorm(3, momentum=1.0)
x = torch.arange(24.0).view(2, 3, 2, 2) if dist.get_rank() else torch.zeros(0, 3, 2, 2)
x.requires_grad_()
(norm(x) ** 3).sum().backward()
assert norm.running_mean.tolist() == torch.arange(24.0).view(2, 3, 4).mean(dim=(0, 2)).tolist(), norm.running_mean
assert x.grad.isfinite().all() and norm.weight.grad is not None
norm(torch.zeros(0, 3, 2, 2))  # nobody has anything
assert norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()
dist.barrier()
dist.destroy_process_group()
"""


EXACT = """
import torch, torch.distributed as dist
from torch import nn
from transfer.detection.engine_detectron2 import EmptySafeSyncBatchNorm
dist.init_process_group("gloo")
rank = dist.get_rank()
for ratio in (2, 4, 8, 16):
    torch.manual_seed(ratio)
    everything = (ratio + torch.randn(4, 3, 16, 16)).bfloat16()
    weights = torch.randn(4, 3, 16, 16)
    exact = everything.double().requires_grad_()
    truth = nn.BatchNorm2d(3, momentum=1.0).double()
    expected = truth(exact)
    (expected * weights.double()).sum().backward()
    mine = slice(0, 1) if rank else slice(1, 4)
    norm, x = EmptySafeSyncBatchNorm(3, momentum=1.0), everything[mine].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = norm(x)
        (found * weights[mine]).sum().backward()
        assert found.dtype == norm.eval()(x).dtype == torch.bfloat16  # in test as in training
    torch.testing.assert_close(found.double(), expected[mine], rtol=2**-8, atol=1e-3)
    torch.testing.assert_close(x.grad.double(), exact.grad[mine], rtol=2**-7, atol=5e-3)
    torch.testing.assert_close(norm.running_mean.double(), truth.running_mean, rtol=1e-5, atol=0)
    count = 4 * 16 * 16  # detectron2 keeps the variance of the batch, torch the unbiased one
    torch.testing.assert_close(norm.running_var.double(), truth.running_var * (count - 1) / count, rtol=1e-4, atol=0)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_synchronised_batchnorm_in_bf16_is_torch_s_in_float64(tmp_path):
    """With means of 2 to 16 standard deviations, over two processes of which one has three times as much."""
    program = tmp_path / "exact.py"
    program.write_text(EXACT)
    finished([*TORCHRUN, str(program)])


@pytest.mark.slow
def test_synchronised_batchnorm_beside_a_process_without_a_roi(tmp_path):
    """The mean is that of the process that has some; an iteration in which nobody has any changes nothing."""
    program = tmp_path / "two.py"
    program.write_text(TWO_NORMS)
    finished([*TORCHRUN, str(program)])


def test_configs_build_the_same_backbone(tmp_path):
    """A LazyConfig and a yacs config; weights are those of the checkpoint."""
    spec = f"random:{ARCH}"
    call = LazyCall(engine_detectron2.build_backbone)
    lazy = instantiate(call(checkpoint=spec, image_size=64, fpn_dim=32, norm="BN"))
    cfg = get_cfg()
    engine_detectron2.add_mae_vit_config(cfg)
    cfg.MODEL.MAE_VIT.CHECKPOINT, cfg.MODEL.MAE_VIT.IMAGE_SIZE, cfg.MODEL.MAE_VIT.WINDOW = spec, 64, 6
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM = "build_mae_vit_fpn_backbone", 32, "BN"
    yacs = build_from_cfg(cfg)
    encoder = read_checkpoint(spec).encoder
    for backbone in (lazy, yacs):
        strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
        assert strides == {"p1": 2, "p2": 4, "p3": 8, "p4": 16, "p5": 32}
        weight = backbone.bottom_up.pyramid.blocks[3].mlp.fc1.weight
        assert torch.equal(weight, encoder["blocks.3.mlp.fc1.weight"])
        assert backbone(torch.zeros(1, 3, 64, 64))["p3"].shape == (1, 32, 8, 8)


def test_an_encoder_that_timm_builds_is_trained_and_detects(root, tmp_path, monkeypatch):
    """And gives configs the same backbone."""
    register_timm(monkeypatch)
    source, work = timm_checkpoint("little_eva02"), tmp_path / "work"
    work.mkdir()
    r = replace(recipe(source.arch, "mini"), **LITTLE, window=3)
    job = Job(COCO, source, r, "mini", {}, COCO.inspect(root), work, engine="detectron2", machine=Machine())
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert record.resolved["encoder"] == "timm's little_eva02"
    weights, key = load_file(work / DETECTOR_FILE), "net.blocks.5.mlp.fc2.weight"
    (trained,) = (tensor for name, tensor in weights.items() if name.endswith(key))
    assert not torch.equal(trained, source.encoder[key])
    fpn = engine_detectron2.build_backbone(f"random:{source.arch}", image_size=64, fpn_dim=16, norm="BN")
    assert [m.shape[-1] for m in fpn(torch.randn(1, 3, 64, 64)).values()] == [16, 8, 4, 2, 1]


@pytest.mark.slow
def test_a_job_from_training_to_record(root, tmp_path, monkeypatch):
    monkeypatch.setattr(train_detectron2, "METRICS_EVERY", 2)
    record = run_job(make_job(root, tmp_path))
    assert record.status == "ok", record.reason
    assert {"box_ap", "mask_ap"} <= record.metrics.keys()
    assert "detectron2" in record.versions
    assert (record.engine, record.resolved["iterations"], record.images_seen) == ("detectron2", 6, 24)
    assert record.resolved["seconds_per_iteration"] > 0
    assert (tmp_path / "predictions.png").exists()
    assert not (tmp_path / CHECKPOINT_FILE).exists()
    assert not any(note.startswith("torchvision") for note in record.notes)
    assert "BatchNorm" not in " ".join(record.notes)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 3, 5]
    assert all(line["total_loss"] > 0 for line in lines)
    drawn = curves(tmp_path)
    assert drawn.keys() == {"train/loss", "train/lr", "train/images_per_second"}
    steps, found = zip(*drawn["train/loss"])
    assert steps == (1, 3, 5)
    medians = [statistics.median(found[: i + 1]) for i in range(3)]  # as metrics.json has them
    assert medians == pytest.approx([line["total_loss"] for line in lines], rel=1e-6)


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_micro_batches_take_the_images_of_the_batch(root, tmp_path, monkeypatch, micro_batch):
    """Whatever their size: each of the 24 once an epoch, at positions 0 to 23."""
    taken = record_samples(train_detectron2.MappedExamples, monkeypatch)
    job = make_job(root, tmp_path, Machine(micro_batch=micro_batch), batch=12)
    model = engine_detectron2.build_model(ViTPyramid(ARCH, 64, window=6), job.recipe, RoIBatchNorm)
    iterations, _ = train_detectron2.train(model, training_examples(root), job, micro_batch)
    assert iterations == 2
    assert [sample.position for sample in taken] == list(range(24))
    assert sorted(sample.index for sample in taken) == list(range(24))


def test_a_dead_worker_of_those_that_fit_is_one_sentence(root, tmp_path, monkeypatch, capfd, caplog):
    job, here = make_job(root, tmp_path, Machine(workers=16)), os.getpid()
    # Images, boxes and labels of four: two such batches for one worker and one for the training, but not two more.
    monkeypatch.setattr(workers.resource, "getrlimit", lambda kind: (workers.RESERVE + 3 * 12 + 23,) * 2)
    monkeypatch.setattr(workers.resource, "setrlimit", lambda kind, limits: None)
    item = train_detectron2.MappedExamples.__getitem__

    def dying(mapped, sample):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return item(mapped, sample)

    monkeypatch.setattr(train_detectron2.MappedExamples, "__getitem__", dying)
    model = engine_detectron2.build_model(ViTPyramid(ARCH, 64, window=6), job.recipe, RoIBatchNorm)
    with pytest.raises(UserError, match=r"a process that decodes images died .*: memory or /dev/shm may be"):
        train_detectron2.train(model, training_examples(root), job, 4)
    assert "starting 1 of them" in capfd.readouterr().out
    assert not caplog.records


def test_gradients_of_micro_batches_are_averaged(tmp_path, root):
    """A model whose loss is 3 * w on one image and 5 * w on the other: one step of SGD at rate 1 goes down by 4."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(()))

        def forward(self, data):
            return {"loss": self.w * data[0]}

    model = Linear()
    loader, sgd = [[torch.tensor(3.0)], [torch.tensor(5.0)]], torch.optim.SGD(model.parameters(), 1.0)
    train_detectron2.Trainer(model, loader, sgd, make_job(root, tmp_path), 2).train(0, 1)
    assert model.w.item() == -4.0


def command(root: Path, out: Path, *launcher: str, **changes) -> list[str]:
    own = ["-m", "transfer.detection", "--task", "coco", "--ckpt", f"random:{ARCH}", "--recipe", "mini"]
    own += ["--engine", "detectron2", "--data", str(root), "--out", str(out), "--save-minutes", "0", "--device", "cpu"]
    return [*launcher, *own, "--set", *(f"{k}={v}" for k, v in {**LITTLE, **changes}.items())]


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_weights(root, tmp_path):
    """SIGKILL after a saved iteration of 18; the rest starts there, and no bit differs from a run in one piece."""
    finished(command(root, tmp_path / "whole", epochs=3))
    killed = command(root, tmp_path / "killed", epochs=3)
    kill_at(f"*/{CHECKPOINT_FILE}", 4, killed)
    (saved,) = (tmp_path / "killed").rglob(CHECKPOINT_FILE)
    done = torch.load(saved, weights_only=True)["iteration"]
    assert done == 3
    assert f"at iteration {done}/18" in finished(killed)
    assert_same_weights(*(next((tmp_path / name).rglob(DETECTOR_FILE)) for name in ("whole", "killed")))


@pytest.mark.parametrize("damage", ["cut", "zeros in a weight", "other head", "other groups"])
def test_a_checkpoint_that_does_not_fit_is_refused(root, tmp_path, damage):
    job = make_job(root, tmp_path, layer_decay=1.0)
    model = engine_detectron2.build_model(ViTPyramid(ARCH, 64, window=6), job.recipe, RoIBatchNorm)
    path = tmp_path / CHECKPOINT_FILE
    if damage == "cut":
        path.write_bytes(b"PK\x03\x04 cut short")
    elif damage == "other groups":  # as many, but the first has what belongs to the second
        first, second = parameter_groups(model, 0.1)
        first["params"].append(second["params"].pop())
        optimizer = torch.optim.AdamW([first, second])
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iteration": 2}, path)
    else:
        state = model.state_dict()
        state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(21, job.recipe.fc_dim)
        torch.save({"model": state, "iteration": 2, "seconds": 1.0}, path)
        if damage == "zeros in a weight":  # which only the checksum shows
            content = path.read_bytes()
            at = content.find(next(t for n, t in state.items() if n.endswith("mlp.fc1.weight")).numpy().tobytes())
            path.write_bytes(content[:at] + bytes(512) + content[at + 512 :])
    with pytest.raises(UserError, match={"other head": "cls_score", "other groups": "group"}.get(damage, "damaged")):
        train_detectron2.train(model, training_examples(root), job, 4)


@pytest.mark.slow
def test_two_processes_train_and_predict(root, tmp_path):
    """gloo; BatchNorm is synchronised here on the CPU too. Every validation image is predicted once."""
    finished(command(root, tmp_path, *TORCHRUN))
    record = json.loads(next(tmp_path.rglob("record.json")).read_text())
    assert record["status"] == "ok"
    assert (record["resolved"]["batchnorm"], record["resolved"]["batchnorm_images"]) == ("synchronised", 4)
    assert load_file(next(tmp_path.rglob(DETECTOR_FILE)))
