"""ADE20K: UperNet on the ViT's pyramid, fine-tuned end to end through mmsegmentation.

python -m transfer.segmentation --task ade20k --ckpt FILE --data DIR --out DIR
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mae_core import distributed
from mae_core.checkpoint import sha256_of
from mae_core.errors import UserError
from mae_core.loop import batch_objections, batch_within, batchnorm_objections, check_batch
from mae_core.settings import as_typed
from mae_core.space import Space, training_space
from mae_core.vit import get_arch
from transfer.data import ade20k
from transfer.data.findings import Data, spread
from transfer.data.miou import by_class, columns_of, scores
from transfer.data.predictions import MAIN, names_of, write_predictions
from transfer.miniature import dense
from transfer.pyramid import facts, refusal, size_objections
from transfer.run import origin, save_trained
from transfer.segmentation.mmseg_config import config_of, crop_flops, norm_of, weights_of, windows_of
from transfer.segmentation.picture import IMAGES, PICTURE_FILE, draw_predictions
from transfer.segmentation.recipe import SegmentationRecipe, recipe, sources
from transfer.segmentation.train import run_multi_scale_test, run_test, train
from transfer.task import TRAINED, Job, Objection, Part, Result, Task

MULTI_SCALE = "multi_scale"  # the set of the test over several scales
SEGMENTER_FILE = "segmenter.safetensors"
# What the public configs of 48.1 mIoU do otherwise, beside what the record's sources and notes say.
UNLIKE_PUBLIC = (
    "precision: the public runs trained in fp16 with loss scaling",
    "image files: an orientation in the EXIF is ignored, since labels are stored unturned",
)
TAKES_GPU = "--device cpu: mmengine takes the GPU wherever it sees one; hide it with CUDA_VISIBLE_DEVICES=-1"


def segment(job: Job) -> Result:
    """Train by the recipe, test on the validation images at their own size, save the weights and a picture."""
    try:
        return run(job)
    except UserError as e:
        # From a data-loading process the error arrives with its traceback; the message is the last line.
        raise UserError(str(e).strip().splitlines()[-1].removeprefix("mae_core.errors.UserError: ")) from None


def run(job: Job) -> Result:
    r, machine = job.recipe, job.machine
    folder = Path(job.data.root) / ade20k.FOLDER
    check_batch(job.data.counts["train"], r.batch, f"the training split of {folder}")
    if machine.device == "cpu" and torch.cuda.is_available():
        raise UserError(TAKES_GPU)
    tested = ade20k.pairs(folder, "val")[: job.data.limit or None]
    for pair in tested:
        ade20k.check_pair(*pair)  # half a minute, to find a bad file before the training, not after it
    validation = [image for image, _ in tested]
    shown = [validation[i] for i in spread(len(validation), IMAGES)]
    names = [image.name for image in shown]
    config = config_of(job.checkpoint, r, folder, job.work, machine, names, job.data.limit)
    runner, state = train(job, config)
    model = runner.model
    distributed.broadcast_buffers(model)
    started = time.monotonic()
    metric = run_test(runner)
    test_seconds = time.monotonic() - started
    metrics, stderr = scores(metric.areas)
    kept = {MAIN: columns_of(names_of(validation), metric.areas)}
    if r.multi_scale:
        areas = run_multi_scale_test(job, config, model).areas
        kept[MULTI_SCALE] = columns_of(names_of(validation), areas)
        for single, many in zip((metrics, stderr), scores(areas)):
            single |= {f"{name}_ms": value for name, value in many.items()}
    metainfo = runner.test_loop.dataloader.dataset.metainfo
    artifacts = {}
    if distributed.is_main():
        rows = [(image, metric.kept[image.name]) for image in shown]
        draw_predictions(rows, folder, metainfo["palette"], job.work / PICTURE_FILE)
        metadata = origin(job) | {"image_size": str(r.image_size)}
        artifacts = save_trained(job, SEGMENTER_FILE, model.state_dict(), metadata)
        artifacts[PICTURE_FILE] = sha256_of(job.work / PICTURE_FILE)
    seen = state.micro_batch * (machine.processes if norm_of(machine) == "SyncBN" else 1)
    notes = () if seen == r.batch else (f"BatchNorm saw batches of {seen}, not of {r.batch}",)
    return Result(
        metrics,
        stderr,
        n_eval=len(validation),
        images_seen=state.step * r.batch,
        seconds=state.seconds,
        tables={"per_class": by_class(metric.areas.sum(axis=0), metainfo["classes"])},
        resolved={
            **facts(job.checkpoint.arch, job.checkpoint.variant),
            "norm": norm_of(machine),
            "batchnorm_batch": seen,
            "unlike_public_configs": UNLIKE_PUBLIC,
            "seconds_per_iteration": round(state.seconds / max(state.step, 1), 4),
            "test_images_per_second": round(len(validation) / test_seconds, 2),
        },
        artifacts=artifacts,
        predictions=write_predictions(job.work, kept),
        notes=state.notes + notes,
    )


def objections(job: Job) -> Iterator[Objection]:
    r, machine, depth = job.recipe, job.machine, get_arch(job.checkpoint.arch).depth
    yield from size_objections(job.checkpoint.arch, r.image_size, job.task.name)
    if r.taps[-1] >= depth:
        why = f"taps={as_typed(r.taps)}, but the last block of {job.checkpoint.arch} is {depth - 1}: set lower numbers"
        yield "taps", why
    if job.data.status == "found":
        yield from batch_objections(job.data.counts["train"], r.batch, machine.processes)
    if r.batch % machine.processes == 0 and norm_of(machine) != "SyncBN":
        yield from batchnorm_objections(r.batch // machine.processes, machine)
    if machine.device == "cpu" and torch.cuda.is_available():
        yield "--device", TAKES_GPU


def few(r: SegmentationRecipe, data: Data) -> SegmentationRecipe:
    """The recipe with a batch that so few images fill, for as many epochs as on all."""
    share = data.counts["train"] / data.unlimited["train"]
    iterations = max(2, round(r.iterations * share))
    warmup = min(round(r.warmup_iterations * share), iterations - 1)
    batch = batch_within(r.batch, data.counts["train"])
    return replace(r, batch=batch, iterations=iterations, warmup_iterations=warmup)


def space(job: Job) -> Space:
    numbers = weights_of(job.checkpoint.arch, job.checkpoint.variant, job.recipe)
    return training_space(job.work, numbers, numbers)


def parts(job: Job) -> tuple[Part, ...]:
    """Training, and the windows that slide over the validation images."""
    r = job.recipe
    how = f"{r.image_size} px, {job.recipe_name}"
    windows = windows_of(r) * job.data.counts["val"]
    return Part(f"training, {how}", r.iterations * r.batch, TRAINED), Part(f"windows, {how}", windows)


TASKS = (
    Task(
        name="ade20k",
        refuses=refusal,
        title="ADE20K, semantic segmentation",
        module="transfer.segmentation",
        metric="miou",
        version=5,
        cost=50,
        recipe=recipe,
        sources=sources,
        inspect=ade20k.inspect_ade20k,
        run=segment,
        miniature=dense.ade20k,
        engines={"mmsegmentation": "mmseg"},
        install="`make install` sets it up",
        packages=("mmsegmentation", "mmengine"),
        objections=objections,
        space=space,
        parts=parts,
        few=few,
        flops=lambda job: crop_flops(job.checkpoint.arch, job.checkpoint.variant, job.recipe),
    ),
)
