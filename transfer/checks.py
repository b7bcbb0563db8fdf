"""What a recipe, an encoder, the data and the machine cannot do together, said before anything starts."""

from collections.abc import Iterator

import torch

from mae_core.loop import micro_batch_for
from mae_core.settings import as_typed
from mae_core.vit import get_arch
from transfer.task import Job


def objections(job: Job) -> Iterator[tuple[str, str]]:
    """(knob or flag, sentence) for each reason why the job would fail, by the knobs that its recipe has. Its data must
    have been found."""
    r, arch = job.recipe, job.checkpoint.arch
    images, depth = training_images(job), get_arch(arch).depth
    of_all = f" (train_fraction={r.train_fraction:g})" if getattr(r, "train_fraction", 1.0) < 1 else ""
    if hasattr(r, "k") and images < r.k:
        yield "k", f"k={r.k}, but there are {images} training images{of_all}: set a smaller k"
    if hasattr(r, "taps") and r.taps[-1] >= depth:
        yield "taps", f"taps={as_typed(r.taps)}, but the last block of {arch} is {depth - 1}: set lower ones"
    if hasattr(r, "blocks") and r.blocks[-1] > depth:
        yield "blocks", f"blocks={as_typed(r.blocks)}, but {arch} has {depth}: set lower ones"
    if hasattr(r, "blocks"):
        yield from ends_of_curve(job)
    if hasattr(r, "batch"):
        if images < r.batch:
            yield "batch", f"{images} training images{of_all} are less than one batch={r.batch}: set a smaller batch"
        yield from shares(job)


def ends_of_curve(job: Job) -> Iterator[tuple[str, str]]:
    """Of partial fine-tuning: no block and all blocks are linear probing and fine-tuning by their own recipes."""
    from transfer.classification.recipes import finetune_recipe, linprobe_recipe  # late: they come to here by cli

    arch, images = job.checkpoint.arch, training_images(job)
    for k, recipe in ((0.0, linprobe_recipe), (float(get_arch(arch).depth), finetune_recipe)):
        batch = recipe(arch, job.recipe_name).batch
        if k in job.recipe.blocks and images < batch:
            which = "linear probing" if k == 0 else "fine-tuning"
            why = f"{k:g} blocks are {which} by its own recipe, of which one batch={batch} is more than the {images}"
            yield "blocks", f"{why} training images: leave {k:g} out of blocks"


def training_images(job: Job) -> int:
    """As many as the recipe's share leaves: Split.share."""
    images, fraction = job.data.counts.get("train", 0), getattr(job.recipe, "train_fraction", 1.0)
    return images if fraction == 1 else max(int(images * fraction + 1e-9), job.data.counts.get("classes", 0))


def shares(job: Job) -> Iterator[tuple[str, str]]:
    """What a process's share of the batch forbids."""
    r, machine = job.recipe, job.machine
    if r.batch % machine.processes:
        yield "--gpus", f"batch={r.batch} cannot be shared by {machine.processes} processes: --gpus must divide it"
        return
    share = r.batch // machine.processes
    flag = "--gpus" if machine.processes > 1 else "batch"
    if getattr(r, "mixup", 0) or getattr(r, "cutmix", 0):
        if share % 2:
            yield flag, f"mixup pairs images, but each process gets {share} of batch={r.batch}: make that even"
        elif machine.micro_batch == 1:
            yield "--micro-batch", "mixup pairs images: give --micro-batch 2 or more"
    uper = hasattr(r, "taps")
    if uper or getattr(r, "optimizer", "") == "lars":  # UperNet's heads and the linear probe have BatchNorm
        synchronised = uper and machine.device.startswith("cuda") and machine.processes > 1
        if not synchronised and micro_batch_for(share, machine.micro_batch or share) == 1:
            flag = "--micro-batch" if machine.micro_batch == 1 else flag
            yield flag, "BatchNorm cannot learn from one image at a time: give each process 2 or more"
    if uper and machine.device == "cpu" and torch.cuda.is_available():
        why = "mmengine takes the GPU wherever it sees one; hide it with CUDA_VISIBLE_DEVICES=-1"
        yield "--device", f"--device cpu: {why}"
