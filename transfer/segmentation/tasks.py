"""ADE20K: UperNet on the ViT's pyramid, fine-tuned end to end through mmsegmentation.

python -m transfer.segmentation --task ade20k --ckpt FILE --data DIR --out DIR
"""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mae_core import distributed
from mae_core.checkpoint.weights_file import save_weights, sha256_of
from mae_core.data import Sample, Targets, seed_all
from mae_core.errors import UserError
from mae_core.loop import check_batch, fit, micro_batch_for
from mae_core.progress import Progress
from mae_core.training import State, Training
from transfer.data import ade20k
from transfer.miniature import dense as miniature_dense
from transfer.pyramid import load_pyramid
from transfer.segmentation.evaluate import bootstrap, class_scores, metrics_of
from transfer.segmentation.mmseg_config import config_of, multi_scale_pipeline, norm_of, test_loader, weights_of
from transfer.segmentation.mmseg_plugin import register
from transfer.segmentation.recipe import recipe, sources
from transfer.task import Job, Result, Task

SEGMENTER_FILE = "segmenter.safetensors"
PICTURE_FILE = "predictions.png"
PICTURES = 8  # validation images in the picture


@dataclass(frozen=True)
class IterationTraining(Training):
    """A training whose length is counted in iterations."""

    iterations: int = 0

    @property
    def steps(self) -> int:
        return self.iterations


class Crops:
    """Training images of an mmseg dataset as `fit` wants them: Sample -> (crop [3, S, S], normalised, padded with 0;
    {"label": classes [S, S], 255 where there is none}; ""), augmented with the seed of the position in the stream."""

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


def segment(job: Job) -> Result:
    """Train by the recipe, test on the validation images at their own size, leave the weights and a picture."""
    try:
        return run(job)
    except UserError as e:
        # From a process that decodes it comes with its traceback; the sentence is the last line.
        raise UserError(str(e).strip().splitlines()[-1].removeprefix("mae_core.errors.UserError: ")) from None


def run(job: Job) -> Result:
    r, machine = job.recipe, job.machine
    folder = Path(job.data.root) / ade20k.FOLDER
    check_batch(job.data.counts["train"], r.batch, f"the training split of {folder}")
    if machine.device == "cpu" and torch.cuda.is_available():
        raise UserError(
            "--device cpu: mmengine takes the GPU wherever it sees one; hide it with CUDA_VISIBLE_DEVICES=-1"
        )
    validation = [image for image, _ in ade20k.pairs(folder, "val")]
    shown = [validation[i] for i in np.unique(np.linspace(0, len(validation) - 1, PICTURES).round().astype(int))]
    config = config_of(job.checkpoint, r, folder, job.work, machine, [image.name for image in shown])
    runner, state = train(job, config)
    model = runner.model
    distributed.broadcast_buffers(model)
    started = time.monotonic()
    metric = test(runner)
    test_seconds = time.monotonic() - started
    metrics, stderr = scored(metric.areas)
    if r.multi_scale:
        several = scored(test_at_several_scales(job, config, model).areas)
        for single, many in zip((metrics, stderr), several):
            single |= {f"{name}_ms": value for name, value in many.items()}
    about = runner.test_loop.dataloader.dataset.metainfo
    artifacts = {}
    if distributed.is_main():
        rows = [(image, metric.kept[image.name]) for image in shown]
        ade20k.draw_predictions(rows, folder, about["palette"], job.work / PICTURE_FILE)
        artifacts = leave(job, model.state_dict())
    return Result(
        metrics,
        stderr,
        n_eval=len(validation),
        images_seen=state.step * r.batch,
        seconds=state.seconds,
        tables={"per_class": by_class(metric.areas.sum(axis=0), about["classes"])},
        resolved={
            "norm": norm_of(machine),
            "batchnorm_batch": batchnorm_batch(job, state),
            "seconds_per_iteration": round(state.seconds / max(state.step, 1), 4),
            "test_images_per_second": round(len(validation) / test_seconds, 2),
        },
        artifacts=artifacts,
        notes=state.notes + deviations(job, state),
    )


def batchnorm_batch(job: Job, state: State) -> int:
    return state.micro_batch * (job.machine.processes if norm_of(job.machine) == "SyncBN" else 1)


def deviations(job: Job, state: State) -> tuple[str, ...]:
    seen = batchnorm_batch(job, state)
    return () if seen == job.recipe.batch else (f"BatchNorm saw batches of {seen}, not of {job.recipe.batch}",)


def train(job: Job, config: dict[str, Any]) -> tuple[Any, State]:
    """mmengine's Runner with the trained model, and where the training stands; resumes what lies in job.work."""
    register()
    from mmseg.registry import MODELS

    r, machine = job.recipe, job.machine
    states: list[State] = []

    def loop(runner: Any, dataset: Any) -> None:
        local_batch = r.batch // machine.processes
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
            lr_at=r.lr_at,
            prepare=lambda images, targets, step, first: (images, targets),
            loss_of=loss_of,
            iterations=r.iterations,
        )
        states.append(fit(runner.model, runner.optim_wrapper.optimizer, training))

    config = with_progress(config, job)
    config["train_cfg"] = {**config["train_cfg"], "run": loop}
    runner = make_runner(config, job)
    runner.model.to(machine.device)
    load_pyramid(runner.model.backbone, job.checkpoint)
    runner.train()
    return runner, states[0]


def make_runner(config: dict[str, Any], job: Job) -> Any:
    from mmengine.config import ConfigDict
    from mmengine.runner import Runner

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mmseg says of its own defaults
        return Runner(**ConfigDict(config), randomness={"seed": job.seed})


def with_progress(config: dict[str, Any], job: Job) -> dict[str, Any]:
    """The configuration with a test that reports how far it is."""
    images, world = job.data.counts["val"], distributed.world_size()
    progress: list[Progress] = []  # begun with the first image: a test comes long after the configuration

    def each(done: int) -> None:
        if not progress:
            progress.append(Progress(f"evaluate {job.task.name}", images, enabled=distributed.is_main()))
        progress[0].update(min(images, done * world), world)

    return {**config, "test_cfg": {**config["test_cfg"], "each": each}}


def loss_of(model: nn.Module, images: Tensor, targets: Targets) -> Tensor:
    """Cross-entropy of the head plus that of the auxiliary head, weighted, over a micro-batch."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    if len(images) == 1 and any(type(m) is nn.BatchNorm2d for m in model.modules()):
        raise UserError("BatchNorm cannot learn from one image at a time: give --micro-batch 2 or more")
    samples = [SegDataSample(gt_sem_seg=PixelData(data=target["label"][None])) for target in targets]
    losses = model(images, samples, mode="loss")
    return sum(value for name, value in losses.items() if "loss" in name)


def test(runner: Any) -> Any:
    """Run the configured test; the metric with its counts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that mmseg's multi-scale test converts
        runner.test()
    return runner.test_loop.evaluator.metrics[0]


def test_at_several_scales(job: Job, config: dict[str, Any], model: nn.Module) -> Any:
    """As `test`, over twelve views of each image."""
    loader = test_loader(Path(job.data.root) / ade20k.FOLDER, multi_scale_pipeline(job.recipe), job.machine)
    config = config | {"model": {"type": "SegTTAModel", "module": model}, "test_dataloader": loader}
    for_training = ("train_dataloader", "train_cfg", "optim_wrapper")
    return test(make_runner(with_progress({k: v for k, v in config.items() if k not in for_training}, job), job))


def scored(areas: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and their standard errors from counts per image [N, 3, C]."""
    return {name: float(value) for name, value in metrics_of(areas.sum(axis=0)).items()}, bootstrap(areas)


def by_class(areas: np.ndarray, names: tuple[str, ...]) -> dict[str, dict[str, float | int | None]]:
    """IoU and accuracy (percent, None without pixels) and labelled pixels of each class, from counts [3, C]."""
    iou, accuracy = (np.round(values, 2).astype(object) for values in class_scores(areas))
    return {
        name: {
            "iou": None if np.isnan(iou[i]) else iou[i],
            "acc": None if np.isnan(accuracy[i]) else accuracy[i],
            "pixels": int(areas[2, i]),
        }
        for i, name in enumerate(names)
    }


def leave(job: Job, state: dict[str, Tensor]) -> dict[str, str]:
    """Write the trained weights into the work folder; {file name: SHA-256} of what is left there."""
    metadata = {
        "arch": job.checkpoint.arch,
        "image_size": str(job.recipe.image_size),
        "task": job.task.name,
        "encoder_sha256": job.checkpoint.sha256,
        "recipe": job.recipe_name,
        "seed": str(job.seed),
    }
    save_weights(job.work / SEGMENTER_FILE, state, metadata)
    return {name: sha256_of(job.work / name) for name in (SEGMENTER_FILE, PICTURE_FILE)}


TASKS = (
    Task(
        name="ade20k",
        title="ADE20K, semantic segmentation",
        module="transfer.segmentation",
        metric="miou",
        higher_is_better=True,
        version=1,
        needs="encoder",
        cost=50,
        recipe=recipe,
        sources=sources,
        look=ade20k.look,
        run=segment,
        miniature=miniature_dense.ade20k,
        engines={"mmsegmentation": "mmseg"},
        install="`make install` sets it up",
        packages=("mmsegmentation", "mmengine"),
        plain_vit=True,
        weights=weights_of,
    ),
)
