"""ImageNet-1k: fine-tuning whole and in part, linear probing, k-NN, training from scratch, and the evaluation of a
released classifier; fine-tuning on other labelled sets.

python -m transfer.classification --task imagenet_finetune --ckpt FILE --data DIR --out DIR
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from mae_core.data import PILLOW_PIXELS
from mae_core.errors import UserError
from transfer.classification import robustness
from transfer.classification.evaluate import evaluate, trained_classifier
from transfer.classification.job import images_of, leave, start_model, trained_result, validate
from transfer.classification.knn import knn, knn_recipe, knn_sources
from transfer.classification.partial import partial_finetune
from transfer.classification.recipes import (
    eval_recipe,
    eval_sources,
    finetune_recipe,
    finetune_sources,
    linprobe_recipe,
    linprobe_sources,
    partial_recipe,
    partial_sources,
    scratch_recipe,
    scratch_sources,
    stand_in_recipe,
    stand_in_sources,
)
from transfer.classification.train import backbone_tensors, parameters_sha256, train_classifier
from transfer.classification.transforms import eval_transform, probe_transform, train_transform
from transfer.data.findings import Data
from transfer.data.imagenet import look_imagenet, look_imagenet_val, read_split, wnids
from transfer.data.labelled import SETS, LabelledSet, look, read_folder
from transfer.miniature import imagenet as miniature
from transfer.miniature import labelled as miniature_sets
from transfer.space import classifier_weights
from transfer.task import CLASSIFIER_FILE, Job, Result, Task


def finetune(job: Job) -> Result:
    """Train everything; leave the classifier as classifier.safetensors in the work folder."""
    r, images = job.recipe, images_of(job)
    model = start_model(job, images.classes).to(job.machine.device)
    transform = train_transform(r.image_size, r.min_scale, r.rand_augment, job.checkpoint.normalization)
    state, trained = train_classifier(job, model, images.train, transform)
    metrics, stderr = validate(job, trained, images.val)
    if r.ema:
        for values, without in zip((metrics, stderr), validate(job, model, images.val)):
            values["top1_without_ema"] = without["top1"]
    artifacts = leave(job, CLASSIFIER_FILE, trained.state_dict(), r.image_size)
    return trained_result(job, state, images, (metrics, stderr), artifacts)


def linprobe(job: Job) -> Result:
    """Train a linear layer on the frozen encoder; prove by checksum that the encoder did not move."""
    r, images = job.recipe, images_of(job)
    model = start_model(job, images.classes)
    model.head = nn.Sequential(nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6), model.head)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head."))
    model = model.to(job.machine.device)
    before = parameters_sha256(backbone_tensors(model))
    transform = probe_transform(r.image_size, r.min_scale)
    state, trained = train_classifier(job, model, images.train, transform)
    if parameters_sha256(backbone_tensors(model)) != before:
        raise RuntimeError("the frozen encoder changed while its probe was trained")
    scores = validate(job, trained, images.val)
    head = {name: tensor for name, tensor in trained.state_dict().items() if name.startswith("head.")}
    artifacts = leave(job, "probe.safetensors", head, r.image_size)
    result = trained_result(job, state, images, scores, artifacts)
    resolved = result.resolved | {"batchnorm_batch": state.micro_batch, "backbone_sha256": before}
    official = min(512, r.batch)  # one GPU's share of the official probe's batch
    notes = result.notes
    if state.micro_batch != official:
        notes += (f"BatchNorm saw batches of {state.micro_batch}, not of {official}",)
    return replace(result, notes=notes, resolved=resolved)


def evaluate_released(job: Job) -> Result:
    """A fine-tuned classifier given as the checkpoint, evaluated on the validation images without training."""
    model, size = trained_classifier(job.checkpoint, job.recipe.image_size, job.machine.device)
    if model.num_classes != len(wnids()):
        raise UserError(f"{job.checkpoint.name} has {model.num_classes} classes, ImageNet-1k has {len(wnids())}")
    val, _ = read_split(Path(job.data.root) / "imagenet" / "val")
    transform, normalization = eval_transform(size, job.recipe.transform), job.checkpoint.normalization
    metrics, stderr = evaluate(model, val, transform, normalization, job.machine, job.task.name).metrics()
    resolved = {"image_size": size, "val_pixels": PILLOW_PIXELS}
    return Result(metrics, stderr, len(val.files), len(val.files), resolved=resolved)


def task_of(known: LabelledSet, generate: Callable[[Path], Path]) -> Task:
    """Fine-tuning on a labelled set beside ImageNet."""
    return Task(
        name=known.name,
        title=f"{known.title}, fine-tuning",
        module="transfer.classification",
        metric="top1",
        higher_is_better=True,
        version=TRAINED["version"],
        needs="encoder",
        cost=25,
        recipe=stand_in_recipe,
        sources=stand_in_sources,
        look=partial(look, known),
        run=finetune,
        miniature=generate,
        weights=lambda job: classifier_weights(job, known.counts[0] or job.data.counts["classes"]),
    )


def folder_task(path: str) -> Task:
    """Fine-tuning on a folder of the user's: "folder:" and its last name, in tables."""
    folder = Path(path).expanduser().resolve()
    known = LabelledSet(folder.name, f"Folder {folder.name}", (0, 0, 0), "{train,val}/CLASS/*.jpg", read_folder)

    def look_here(root: Path) -> Data:
        data = look(known, folder.parent)
        return replace(data, root=str(folder), label="own" if data.label == "subset" else data.label)

    task = task_of(known, lambda root: root)
    return replace(task, name=f"folder:{folder.name}", path=str(folder), look=look_here)


COMMON = {
    "module": "transfer.classification",
    "metric": "top1",
    "higher_is_better": True,
    "version": 1,
    "look": look_imagenet,
    "miniature": miniature.imagenet,
}
TRAINED = COMMON | {"version": 2}
FINETUNE = Task(
    name="imagenet_finetune",
    title="ImageNet-1k, fine-tuning",
    needs="encoder",
    cost=30,
    recipe=finetune_recipe,
    sources=finetune_sources,
    run=finetune,
    **TRAINED,
)
LINPROBE = Task(
    name="imagenet_linprobe",
    title="ImageNet-1k, linear probing",
    needs="encoder",
    cost=20,
    recipe=linprobe_recipe,
    sources=linprobe_sources,
    run=linprobe,
    **TRAINED,
)
TASKS = (
    FINETUNE,
    LINPROBE,
    Task(
        name="imagenet_eval",
        title="ImageNet-1k, evaluation of a fine-tuned checkpoint",
        needs="fine-tuned file",
        cost=10,
        recipe=eval_recipe,
        sources=eval_sources,
        run=evaluate_released,
        **(COMMON | {"look": look_imagenet_val}),
    ),
    Task(
        name="imagenet_knn",
        title="ImageNet-1k, k nearest neighbours",
        needs="encoder",
        cost=5,
        recipe=knn_recipe,
        sources=knn_sources,
        run=knn,
        **COMMON,
    ),
    Task(
        name="imagenet_partial",
        title="ImageNet-1k, fine-tuning the last blocks",
        needs="encoder",
        cost=35,
        recipe=partial_recipe,
        sources=partial_sources,
        run=partial(partial_finetune, probe=LINPROBE, finetune=FINETUNE),
        opt_in=True,
        **(TRAINED | {"metric": "top1@1"}),
    ),
    Task(
        name="imagenet_scratch",
        title="ImageNet-1k, from scratch",
        needs="encoder",
        cost=36,
        recipe=scratch_recipe,
        sources=scratch_sources,
        run=finetune,
        opt_in=True,
        from_scratch=True,
        **TRAINED,
    ),
    *(task_of(known, miniature_sets.MAKERS[known.name]) for known in SETS),
    replace(
        folder_task("folder"),
        name="folder",
        title="folder:/path/to/images, {train,val}/CLASS/*.jpg, fine-tuning",
        path="",
        opt_in=True,
        of=folder_task,
    ),
    *robustness.TASKS,
)
