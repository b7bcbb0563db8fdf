"""ADE20K's training and test: mmengine's Runner builds the model, `fit` trains it, mmengine's loop tests it.

mmengine's own training loops resume by decoding all earlier images, and lose their checkpoint if killed while saving.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mae_core import distributed
from mae_core.data import Sample, Targets, seed_all
from mae_core.errors import UserError
from mae_core.loop import fit, micro_batch_for
from mae_core.progress import Progress
from mae_core.training import State, Training
from mae_core.vit import get_arch
from mae_core.workers import lost_batches_explained
from transfer.data import ade20k
from transfer.pyramid import load_pyramid
from transfer.segmentation.mmseg_config import (
    dataset_of,
    multi_scale_pipeline,
    norm_of,
    test_loader,
    train_pipeline,
)
from transfer.segmentation.mmseg_plugin import layer_groups, register
from transfer.task import Job


@dataclass(frozen=True)
class IterationTraining(Training):
    """A training whose length is counted in iterations."""

    iterations: int = 0

    @property
    def steps(self) -> int:
        return self.iterations


class Crops:
    """Training images of an mmseg dataset for `fit`: Sample -> (crop [3, S, S], normalised, padded with 0; {"label":
    classes [S, S], 255 where unlabelled}; ""). The augmentation is seeded by the position in the stream."""

    def __init__(self, dataset: Any, preprocessor: nn.Module, seed: int) -> None:
        self.dataset, self.preprocessor, self.seed = dataset, preprocessor, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, dict[str, Tensor], str]:
        seed_all(self.seed, sample.position)
        packed = self.dataset[sample.index]
        batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
        ready = self.preprocessor(batch, training=True)
        return ready["inputs"][0], {"label": ready["data_samples"][0].gt_sem_seg.data[0]}, ""


def train(job: Job, config: dict[str, Any]) -> tuple[Any, State]:
    """mmengine's Runner with the trained model, and the training's final state. Resumes from job.work."""
    register()
    from mmseg.registry import DATASETS, MODELS

    r, machine, local_batch = job.recipe, job.machine, job.recipe.batch // job.machine.processes
    runner = make_runner(config, job)
    model = runner.model.to(machine.device)
    load_pyramid(model.backbone, job.checkpoint)
    model.init_weights()  # of the heads: the pyramid has no such method
    groups = layer_groups(model, get_arch(job.checkpoint.arch).depth, r.layer_decay, r.weight_decay)
    folder = Path(job.data.root) / ade20k.FOLDER
    dataset = DATASETS.build(dataset_of(folder, "train", train_pipeline(r), job.data.limit))
    training = IterationTraining(
        label=f"{job.task.name} {job.checkpoint.name}",
        work=job.work,
        dataset=Crops(dataset, MODELS.build(config["model"]["data_preprocessor"]), job.seed),
        epochs=-(-r.iterations // max(len(dataset) // r.batch, 1)),
        batch=r.batch,
        micro_batch=micro_batch_for(local_batch, machine.micro_batch or local_batch),
        seed=job.seed,
        machine=machine,
        fixed=job.identity(),
        tracker=job.tracker,
        lr_at=r.lr_at,
        prepare=lambda images, targets, step, first: (images, targets),
        loss_of=loss_of,
        iterations=r.iterations,
        synchronised=norm_of(machine) == "SyncBN",
    )
    return runner, fit(model, torch.optim.AdamW(groups, lr=r.lr, betas=r.betas), training)


def make_runner(config: dict[str, Any], job: Job) -> Any:
    """mmengine's Runner, whose test reports its progress, with the norm of `norm_of` in its model."""
    from mmengine.config import ConfigDict
    from mmengine.runner import Runner

    images, world = job.data.counts["val"], distributed.world_size()
    progress: list[Progress] = []  # made at the first image: the test starts long after this call

    def each(done: int) -> None:
        if not progress:
            progress.append(Progress(f"evaluate {job.task.name}", images, enabled=distributed.is_main()))
        progress[0].update(min(images, done * world), world)

    config = {**config, "test_cfg": {**config["test_cfg"], "each": each}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about mmseg's own defaults
        runner = Runner(**ConfigDict(config), randomness={"seed": job.seed})
    if norm_of(job.machine) == "SyncBN":
        # Only here: mmengine turns every SyncBatchNorm back, because none of its own launchers started this process.
        runner.model = nn.SyncBatchNorm.convert_sync_batchnorm(runner.model)
    return runner


def loss_of(model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
    """Cross-entropy of the head plus the weighted one of the auxiliary head, over a micro-batch."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    if len(images) == 1 and any(type(m) is nn.BatchNorm2d for m in model.modules()):
        raise UserError("BatchNorm cannot learn from one image at a time: give --micro-batch 2 or more")
    samples = [SegDataSample(gt_sem_seg=PixelData(data=target["label"][None])) for target in targets]
    losses = model(images, samples, mode="loss")
    return sum(value for name, value in losses.items() if "loss" in name)


def run_test(runner: Any) -> Any:
    """Run the configured test and return its metric, which holds the counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about shapes that mmseg's multi-scale test converts
        with lost_batches_explained():
            runner.test()
    return runner.test_loop.evaluator.metrics[0]


def run_multi_scale_test(job: Job, config: dict[str, Any], model: nn.Module) -> Any:
    """As `run_test`, over twelve views of each image."""
    folder = Path(job.data.root) / ade20k.FOLDER
    loader = test_loader(folder, multi_scale_pipeline(job.recipe), job.machine, job.data.limit)
    config = config | {"model": {"type": "SegTTAModel", "module": model}, "test_dataloader": loader}
    return run_test(make_runner(config, job))
