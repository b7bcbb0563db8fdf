"""What is known of a classifier's job before it starts: the objections to it, and the space its files need."""

from collections.abc import Iterator

from mae_core.loop import batch_objections, batchnorm_objections
from mae_core.settings import as_typed
from mae_core.space import Space, training_space
from mae_core.timm_encoder import PREFIX, is_timm
from mae_core.vit import get_arch
from transfer.classification.recipes import linprobe_recipe
from transfer.data.inputs import detail, input_objections, of_all, training_images
from transfer.data.vtab import TEST, VAL200
from transfer.jobs import encoder_numbers
from transfer.task import Job, Objection

MOMENTS = {"adamw": 2, "lars": 1}


def refuses_timms(arch: str) -> str:
    """`Task.refuses` of the tasks that build and take apart the ViT themselves."""
    model = arch.removeprefix(PREFIX)
    return f"takes ViTs, BEiT, DINOv2 and DeiT, not timm's {model}: see docs/checkpoints.md" if is_timm(arch) else ""


def vtab_detail(job: Job) -> str:
    return detail(job) if job.recipe.scored_on == TEST else f"{VAL200}, to choose by, and the 800 images for it"


def training_objections(job: Job) -> Iterator[Objection]:
    r, machine = job.recipe, job.machine
    yield from input_objections(job)
    if job.data.status == "found":
        yield from batch_objections(training_images(job), r.batch, machine.processes, of_all(job))
    if r.batch % machine.processes:
        return
    local_batch = r.batch // machine.processes
    if (r.mixup or r.cutmix) and local_batch % 2:
        flag = "--gpus" if machine.processes > 1 else "batch"
        yield flag, f"mixup pairs images, but each process gets {local_batch} of batch={r.batch}: make that even"
    if r.optimizer == "lars":  # the linear probe has a BatchNorm
        yield from batchnorm_objections(local_batch, machine)


def partial_objections(job: Job) -> Iterator[Objection]:
    """Those of any training, and those of linear probing, the curve's first point, which has its own recipe."""
    arch, blocks, images = job.checkpoint.arch, job.recipe.blocks, training_images(job)
    depth = get_arch(arch).depth
    if blocks[-1] > depth:
        yield "blocks", f"blocks={as_typed(blocks)}, but {arch} has {depth} blocks: set numbers up to {depth}"
    batch = linprobe_recipe(arch, job.recipe_name).batch
    if 0 in blocks and job.data.status == "found" and not job.data.limit and images < batch:
        why = f"0 blocks means linear probing by its own recipe, whose batch={batch} is larger than the {images}"
        yield "blocks", f"{why} training images: leave 0 out of blocks"
    yield from training_objections(job)


def classifier_space(job: Job, classes: int = 1000) -> Space:
    """The space for training the encoder and a linear layer on it, or only that layer (LARS)."""
    r, encoder = job.recipe, encoder_numbers(job.checkpoint)
    head = classes * (get_arch(job.checkpoint.arch).dim + 1)
    model, trained = encoder + head, head if r.optimizer == "lars" else encoder + head
    return training_space(job.work, model, trained, MOMENTS[r.optimizer], averaged=model if r.ema else 0)
