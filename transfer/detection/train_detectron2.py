"""Training on detectron2's trainer, hooks, loader and checkpointer, resumable at the exact iteration."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.structures import BoxMode
from detectron2.utils.events import JSONWriter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset, Sampler

from mae_core import distributed
from mae_core.checkpoint import CheckpointError, read_state, save_pickle
from mae_core.data import Sample, TrainingStream, seed_all
from mae_core.errors import UserError
from mae_core.machine import lack_of_memory_named
from mae_core.optim import adamw, set_learning_rate
from mae_core.progress import Progress
from mae_core.stopping import stop_requested
from mae_core.tracker import Curves, Run
from mae_core.training import CHECKPOINT_FILE, UNLOADABLE, check_agreement, restart, unloadable
from mae_core.workers import begin_worker, dead_workers_explained, fitting_workers, lost_batches_explained
from transfer.data.coco import Example
from transfer.detection.recipe import DetectionRecipe
from transfer.detection.shared import groups_of, open_image, schedule
from transfer.task import Job

DIVERGED = "the last checkpoint stands; a lower lr, a longer warm-up or --precision fp32 may help"
TRAINER_LOG = "detectron2.engine.train_loop"  # prints the traceback of every error, also of one that a sentence answers
METRICS_EVERY = 20  # iterations between two lines of metrics.json


class MappedExamples(Dataset):
    """Sample -> the example through detectron2's DatasetMapper: large-scale jitter as in its ViTDet configs, its random
    draws seeded by the position in the stream. Masks stay polygons through the crop, as in those configs. An image with
    a run-length encoding, which they refuse and no object of COCO has, gets bitmaps.

    The mapper applies an image's EXIF orientation, which our other readers ignore; if the size then differs from the
    annotations', it refuses the image by name."""

    def __init__(self, examples: Sequence[Example], r: DetectionRecipe, seed: int) -> None:
        size = r.image_size
        self.examples, self.seed = examples, seed
        mapper = partial(
            DatasetMapper,
            is_train=True,
            augmentations=[
                T.RandomFlip(horizontal=True),
                T.ResizeScale(r.min_scale, r.max_scale, target_height=size, target_width=size),
                T.FixedSizeCrop((size, size), pad=False),  # the backbone pads, after normalisation
            ],
            image_format="RGB",
            use_instance_mask=True,
            recompute_boxes=True,
        )
        self.polygons, self.bitmaps = (mapper(instance_mask_format=form) for form in ("polygon", "bitmask"))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        example = self.examples[sample.index]
        open_image(example).close()  # raises a clear UserError for a bad file
        seed_all(self.seed, sample.position)
        encoded = any(isinstance(outline, dict) for outline in example.outlines)
        return (self.bitmaps if encoded else self.polygons)(as_dict(example))


def as_dict(example: Example) -> dict[str, Any]:
    """The example in detectron2's standard format."""
    objects = zip(example.boxes.tolist(), example.labels.tolist(), example.outlines)
    return {
        "file_name": example.file,
        "image_id": example.id,
        "height": example.height,
        "width": example.width,
        "annotations": [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "segmentation": outline, "iscrowd": 0}
            for box, label, outline in objects
        ],
    }


class ResumedSampler(Sampler):
    """This process's Samples one by one, from the stream's first iteration; detectron2's own sampler restarts at 0."""

    def __init__(self, stream: TrainingStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return len(self.stream) * self.stream.micro_batch

    def __iter__(self) -> Iterator[Sample]:
        for chunk in self.stream:
            yield from chunk


class Checkpointer(DetectionCheckpointer):
    """Keeps one file, replaced atomically once the new one is complete; loads it strictly and without running code."""

    def save(self, name: str, **facts: Any) -> None:
        if not self.save_to_disk:
            return
        if not all(tensor.isfinite().all() for tensor in self.model.state_dict().values()):
            raise UserError(f"a weight became infinite or NaN: stopped; {DIVERGED}")
        content = {"model": self.model.state_dict(), **facts}
        content |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        save_pickle(Path(self.save_dir, name), content)

    def has_checkpoint(self) -> bool:
        return os.path.exists(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        return os.path.join(self.save_dir, CHECKPOINT_FILE)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            content = read_state(Path(filename))
        except CheckpointError:
            content = None
        if not isinstance(content, dict):
            raise UserError(f"{filename} is damaged: delete it to start this training again")
        return content

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint.pop("model"), strict=True)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        try:
            return super().load(path, checkpointables)
        except UNLOADABLE as e:  # of the model, or of the optimizer
            raise unloadable(Path(path), e) from None


class Trainer(SimpleTrainer):
    """Accumulates micro-batches to the effective batch, in the job's precision (detectron2's AMPTrainer needs a GPU).
    Random draws in the heads are seeded by the iteration, so that a resumed run repeats them."""

    def __init__(self, model: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, job: Job, chunks: int) -> None:
        super().__init__(model, loader, optimizer, gather_metric_period=METRICS_EVERY)
        self.job, self.chunks = job, chunks

    def run_step(self) -> None:
        machine, waited = self.job.machine, 0.0
        total: dict[str, Tensor] = {}
        self.optimizer.zero_grad(set_to_none=True)
        for chunk in range(self.chunks):
            before = time.perf_counter()
            with lost_batches_explained():
                data = next(self._data_loader_iter)
            waited += time.perf_counter() - before
            seed_all(self.job.seed, self.iter, distributed.rank(), chunk, device=machine.device)
            parallel = isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if parallel and chunk < self.chunks - 1 else contextlib.nullcontext():
                with machine.autocast():
                    losses = self.model(data)
                (sum(losses.values()) / self.chunks).backward()
            for name, loss in losses.items():
                total[name] = total.get(name, 0.0) + loss.detach() / self.chunks
        self.after_backward()
        try:
            self._write_metrics(total, waited)
        except FloatingPointError:
            raise UserError(f"the loss became infinite or NaN at iteration {self.iter}: stopped; {DIVERGED}") from None
        self.optimizer.step()


class LearningRate(HookBase):
    """Sets the learning rate of each iteration by the recipe's schedule."""

    def __init__(self, rate: Callable[[int], float]) -> None:
        self.rate = rate

    def before_step(self) -> None:
        set_learning_rate(self.trainer.optimizer, self.rate(self.trainer.iter))


class Saver(HookBase):
    """Saves every few minutes, at the end and on a request to stop; shows progress, draws the curves and counts the
    seconds."""

    def __init__(
        self,
        checkpointer: Checkpointer,
        job: Job,
        iterations: int,
        first: int,
        seconds: float,
        stop: list[int],
        curves: Curves,
    ) -> None:
        self.checkpointer, self.job, self.iterations = checkpointer, job, iterations
        self.before, self.stop, self.curves = seconds, stop, curves
        self.started = self.saved = time.monotonic()
        label = f"{job.task.name} {job.checkpoint.name}"
        self.progress = Progress(label, iterations, first, enabled=distributed.is_main(), unit="it")

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        latest = self.trainer.storage.latest().get("total_loss")
        self.progress.update(done, self.job.recipe.batch, f"loss {latest[0]:.4f}" if latest else "")
        if latest and latest[1] == self.trainer.iter:  # it is fetched from the device every METRICS_EVERY iterations
            lr = max(group["lr"] for group in self.trainer.optimizer.param_groups)
            self.curves.training(self.trainer.iter, latest[0], lr, self.progress.rate())
        due = distributed.is_main() and time.monotonic() - self.saved >= 60 * self.job.machine.save_minutes
        due, stopping = distributed.any_process(due, bool(self.stop))
        if due or stopping or done == self.iterations:
            self.checkpointer.save(CHECKPOINT_FILE, iteration=done, seconds=self.seconds)
            self.saved = time.monotonic()
        if stopping:
            distributed.barrier()  # torchrun ends the others with the first that leaves: none before it is saved
            raise KeyboardInterrupt


def train(model: nn.Module, examples: Sequence[Example], job: Job, micro_batch: int) -> tuple[int, float]:
    """Train in place, resuming from the work folder's checkpoint if there is one. Returns the iterations, and the
    seconds summed over all resumed parts. Ctrl-C, SIGTERM and SIGHUP save, then raise KeyboardInterrupt."""
    r, machine = job.recipe, job.machine
    optimizer = adamw(groups_of(model, r), r.betas)
    iterations, rate = schedule(r, len(examples))
    checkpointer = Checkpointer(model, str(job.work), optimizer=optimizer)
    saved = checkpointer.resume_or_load("", resume=True)
    first, seconds = saved.get("iteration", 0), saved.get("seconds", 0.0)
    check_agreement(job.work, first, len(examples), job.identity())
    if first >= iterations:
        return iterations, seconds
    if first and distributed.is_main():
        print(f"resuming {job.task.name} {job.checkpoint.name} at iteration {first}/{iterations}", flush=True)
    stream = TrainingStream(len(examples), r.batch, micro_batch, job.seed, first, iterations)
    mapped, workers = MappedExamples(examples, r, job.seed), machine.workers
    if workers:
        workers = fitting_workers(workers, [mapped[sample] for sample in next(iter(stream))], held=1)
    loader = build_detection_train_loader(
        mapped,
        mapper=None,
        sampler=ResumedSampler(stream),
        total_batch_size=micro_batch * machine.processes,
        aspect_ratio_grouping=False,
        num_workers=workers,
    )
    loader.worker_init_fn = begin_worker
    logging.getLogger(TRAINER_LOG).disabled = True
    parallel = DistributedDataParallel(model) if machine.processes > 1 else model
    model.train()
    trainer = Trainer(parallel, loader, optimizer, job, r.batch // machine.processes // micro_batch)
    curves = Curves(Run(job.work, first, f"{job.task.name} {job.checkpoint.name}", job.identity()), job.tracker)
    with curves, dead_workers_explained(), stop_requested() as stop:
        saver = Saver(checkpointer, job, iterations, first, seconds, stop, curves)
        writer = hooks.PeriodicWriter([JSONWriter(str(job.work / "metrics.json"))], period=METRICS_EVERY)
        trainer.register_hooks([LearningRate(rate), saver, writer if distributed.is_main() else None])
        try:
            with lack_of_memory_named():
                trainer.train(first, iterations)
        except torch.OutOfMemoryError:
            raise UserError(
                f"out of GPU memory at iteration {trainer.iter} with a micro-batch of {micro_batch}: start again with "
                f"a smaller --micro-batch or --activation-checkpointing; {restart(job.work)}"
            ) from None
    return iterations, saver.seconds
