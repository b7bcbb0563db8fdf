"""Twin of Mask R-CNN: our detectron2 engine beside detectron2's own trainer, loader and evaluator, by the config of its
ViTDet project with our backbone in it.

That config is changed into the experiment of Li et al. 2021 with a layer decay: our backbone in place of its ViT,
BatchNorm in place of LayerNorm, and half a cosine with their warm-up in place of two steps. The layer decay is our
recipe's, and bias tables have no weight decay. Images are not grouped by their aspect ratio, all is float32, and the
detector has sizes that a core trains in a minute.
"""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch.utils.data import Sampler

from benchmarks.originals import Call, Difference, check_checkout
from benchmarks.originals.detections import Run, best_first, compare, copied, precision
from mae_core.checkpoint import read_checkpoint
from mae_core.data import TrainingStream, seed_all
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.optim import set_learning_rate
from mae_core.vit import get_arch
from transfer.data.coco import CATEGORIES, annotation_file, inspect_coco, read_split, training_examples
from transfer.data.shipped import shipped
from transfer.detection import shared
from transfer.detection.recipe import recipe
from transfer.detection.tasks import TASKS
from transfer.task import Job

CONFIG = "projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py"
CHECKPOINT, ARCH = "miniature/mae_mini.safetensors", "vit_mini_patch8"
IMAGES = {"train": 24, "val": 12}
# Stochastic depth and the jitter as in the paper's recipe, the rest small: 18 steps.
RECIPE = replace(
    recipe(ARCH, "mini"), image_size=128, epochs=3, warmup_epochs=1, batch=4, drop_path=0.1, min_scale=0.1,
    max_scale=2.0,
)  # fmt: skip


def detection(call: Call) -> list[Difference]:
    """Every loss and the rate of each step, the trained weights, the detections of both, and AP of the same ones."""
    if importlib.util.find_spec("detectron2") is None:
        raise UserError("detectron2 is not installed; docs/coco.md says how")
    check_checkout(call.checkout, [CONFIG], "facebookresearch/detectron2")
    root = some_of_coco(call.data, call.work / "data")
    checkpoint = read_checkpoint(str(shipped(CHECKPOINT)))
    work = call.work / "ours"
    work.mkdir()
    machine = Machine(threads=torch.get_num_threads())
    job = Job(TASKS[0], checkpoint, RECIPE, "mini", {}, inspect_coco(root), work, 0, "detectron2", machine)
    with patch.object(shared, "SCORE_THRESHOLD", 0.0):  # so little trained, all scores are low
        ours = our_run(job)
    with registered(root) as names:
        theirs = their_run(call.checkout, job, ours, names)
        return [*compare(ours, theirs), *precision(root, names["val"], call.work)]


def some_of_coco(data: Path, root: Path) -> Path:
    """root/coco/: the first images of either split that have an object, as links, and their annotations."""
    found = inspect_coco(data)
    if found.status != "found":
        raise UserError(found.detail)
    for split, count in IMAGES.items():
        chosen = [e for e in read_split(data, split).examples if len(e.labels)][:count]
        if len(chosen) < count:
            raise UserError(f"{data}: {split}2017 has {len(chosen)} images with objects; this twin takes {count}")
        content, ids = json.loads(annotation_file(data, split).read_text("utf-8")), {e.id for e in chosen}
        if len(content["categories"]) < len(CATEGORIES):  # detectron2 would number the others anew
            raise UserError(f"{annotation_file(data, split)} lacks some of COCO's {len(CATEGORIES)} categories")
        content["images"] = [image for image in content["images"] if image["id"] in ids]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        path = annotation_file(root, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
        folder = root / "coco" / f"{split}2017"
        folder.mkdir()
        for example in chosen:
            (folder / Path(example.file).name).symlink_to(Path(example.file).resolve())
    return root


@contextmanager
def registered(root: Path) -> Iterator[dict[str, str]]:
    """Split -> its name in detectron2's catalog."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    names = {split: f"twin_{split}" for split in IMAGES}
    for split, name in names.items():
        register_coco_instances(name, {}, str(annotation_file(root, split)), str(root / "coco" / f"{split}2017"))
    try:
        yield names
    finally:
        for name in names.values():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def our_run(job: Job) -> Run:
    """A job of ours as it always runs, watched."""
    from transfer.detection.engine_detectron2 import train, train_and_predict

    run = Run()
    rates: list[float] = []

    def watching(model: nn.Module, *more: Any) -> tuple[int, float]:
        run.start = copied(model)
        hook = model.register_forward_hook(lambda module, inputs, losses: run.note(losses, rates[-1]))
        done = train(model, *more)
        hook.remove()
        run.end = copied(model)
        return done

    def setting(optimizer: torch.optim.Optimizer, rate: float) -> None:
        set_learning_rate(optimizer, rate)
        rates.append(rate)

    with (
        patch("transfer.detection.engine_detectron2.train", watching),
        patch("transfer.detection.train_detectron2.set_learning_rate", setting),
    ):
        predictions = train_and_predict(job)
    rows: dict[int, list] = {}
    for entry in json.loads(predictions.results.read_text("utf-8")):
        x, y, w, h = entry["bbox"]
        rows.setdefault(entry["image_id"], []).append([entry["score"], x, y, x + w, y + h])
    run.detections = {image: best_first(np.array(values)) for image, values in rows.items()}
    return run


def their_run(checkout: Path, job: Job, ours: Run, names: dict[str, str]) -> Run:
    """detectron2's trainer, set up as by its tools/lazyconfig_train_net.py, from our start."""
    from detectron2.config import instantiate
    from detectron2.engine import SimpleTrainer, hooks

    run, cfg = Run(), config(checkout, job, names)
    model = instantiate(cfg.model).train()
    model.load_state_dict(ours.start, strict=True)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = SimpleTrainer(model, loader(cfg.dataloader.train, job), optimizer)
    trainer.register_hooks([hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))])
    watches = (
        # Our draws in the heads and of stochastic depth are seeded by the iteration.
        model.register_forward_pre_hook(lambda module, inputs: seed_all(job.seed, trainer.iter, 0, 0, device="cpu")),
        model.register_forward_hook(lambda module, inputs, losses: run.note(losses, top_rate(optimizer))),
    )
    trainer.train(0, cfg.train.max_iter)
    for watch in watches:
        watch.remove()
    run.end = copied(model)
    model.eval()
    with torch.no_grad():
        for inputs in instantiate(cfg.dataloader.test):
            for one, output in zip(inputs, model(inputs)):
                found = output["instances"]
                rows = torch.cat([found.scores[:, None], found.pred_boxes.tensor], dim=1).numpy()
                run.detections[one["image_id"]] = best_first(rows)
    return run


def top_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the parameters without layer decay."""
    return max(group["lr"] for group in optimizer.param_groups)


def loader(cfg: Any, job: Job) -> Any:
    """Their loader with their mapper, on our order of the images; each is augmented by the draws that it has in ours,
    which are seeded by its position."""
    from detectron2.config import instantiate

    examples, r = training_examples(Path(job.data.root)), job.recipe
    stream = TrainingStream(len(examples), r.batch, r.batch, job.seed, 0, len(examples) // r.batch * r.epochs)
    samples = [sample for chunk in stream for sample in chunk]
    places = {entry["image_id"]: place for place, entry in enumerate(instantiate(cfg.dataset))}
    mapper, positions = instantiate(cfg.mapper), iter([sample.position for sample in samples])

    def seeded(entry: dict) -> dict:
        seed_all(job.seed, next(positions))
        return mapper(entry)

    cfg.mapper, cfg.sampler = seeded, InOrder([places[examples[sample.index].id] for sample in samples])
    cfg.aspect_ratio_grouping, cfg.num_workers = False, 0
    return instantiate(cfg)


class InOrder(Sampler):
    """These indices, in this order."""

    def __init__(self, indices: list[int]) -> None:
        self.indices = indices

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def config(checkout: Path, job: Job, names: dict[str, str]) -> Any:
    """The project's LazyConfig, with what the module's docstring lists set to our recipe."""
    from detectron2.config import LazyCall as L
    from detectron2.config import LazyConfig, instantiate
    from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
    from detectron2.solver import WarmupParamScheduler
    from fvcore.common.param_scheduler import CosineParamScheduler

    from transfer.detection.engine_detectron2 import build_backbone

    cfg, r = LazyConfig.load(str(checkout / CONFIG)), job.recipe
    vit = {"image_size": r.image_size, "window": r.window, "drop_path": r.drop_path, "fpn_dim": r.fpn_dim}
    cfg.model.backbone = L(build_backbone)(checkpoint=str(shipped(CHECKPOINT)), norm="BN", **vit)
    shapes = instantiate(cfg.model.backbone).output_shape()
    levels, strides = list(shapes), [shape.stride for shape in shapes.values()]
    rpn, heads, data = cfg.model.proposal_generator, cfg.model.roi_heads, cfg.dataloader

    rpn.in_features, rpn.head.in_channels = levels, r.fpn_dim
    rpn.anchor_generator.strides, rpn.anchor_generator.sizes = strides, [[8 * stride] for stride in strides]
    rpn.batch_size_per_image, heads.batch_size_per_image = r.rpn_batch, r.roi_batch
    rpn.pre_nms_topk, rpn.post_nms_topk = (2 * r.proposals, r.proposals), (r.proposals, r.proposals)
    heads.box_in_features = heads.mask_in_features = levels[:4]
    heads.box_pooler.scales = heads.mask_pooler.scales = [1 / stride for stride in strides[:4]]
    for head, layers in ((heads.box_head, 4), (heads.mask_head, 5)):
        head.input_shape.channels, head.conv_dims, head.conv_norm = r.fpn_dim, [r.head_dim] * layers, "BN"
    heads.box_head.fc_dims, heads.box_predictor.input_shape.channels = [r.fc_dim], r.fc_dim
    heads.box_predictor.test_score_thresh = 0.0

    _, scale, crop = data.train.mapper.augmentations
    scale.min_scale, scale.max_scale = r.min_scale, r.max_scale
    scale.target_height = scale.target_width = r.image_size
    crop.crop_size = (r.image_size, r.image_size)
    data.test.mapper.augmentations[0].short_edge_length = data.test.mapper.augmentations[0].max_size = r.image_size
    data.train.dataset.names, data.test.dataset.names = names["train"], names["val"]
    data.train.total_batch_size, data.test.num_workers = r.batch, 0
    data.test.mapper.image_format = data.train.mapper.image_format  # which refers to the training mapper

    cfg.optimizer.lr, cfg.optimizer.betas, cfg.optimizer.weight_decay = r.lr, r.betas, r.weight_decay
    rule = {"lr_decay_rate": r.layer_decay, "num_layers": get_arch(ARCH).depth}
    cfg.optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, **rule)
    tables = ("pos_embed", "bias_global", "bias_windowed")
    cfg.optimizer.params.overrides = {name: {"weight_decay": 0.0} for name in tables}
    cosine = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
    warmup = {"warmup_length": r.warmup_epochs / r.epochs, "warmup_factor": 0.0, "rescale_interval": True}
    cfg.lr_multiplier = L(WarmupParamScheduler)(scheduler=cosine, **warmup)
    cfg.train.max_iter = IMAGES["train"] // r.batch * r.epochs
    return cfg
