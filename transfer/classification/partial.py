"""Partial fine-tuning: how accuracy grows with the number of blocks that are tuned (MAE paper, Figure 9).

For k blocks, the last k are tuned, with the final norm and the head; 0.5 is the second half of the last block: its norm
and MLP; with all blocks the embeddings are tuned too. k = 0 is linear probing, a task of its own: its record is read,
or made in its usual folder. Each other k is a training below this task's folder, with its own result file.
"""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mae_core import distributed
from mae_core.checkpoint import parameters_sha256
from mae_core.errors import UserError
from mae_core.settings import as_typed
from mae_core.training import CHECKPOINT_FILE
from mae_core.vit import ViT, get_arch
from mae_core.writing import read_object, write_json
from transfer.classification.job import images_of, start_model, trained_result, validate
from transfer.classification.picture import PICTURE_FILE, draw_curve
from transfer.classification.train import ClassifierRecipe, train_classifier
from transfer.data.labelled import Reading
from transfer.data.predictions import MAIN, read_predictions, write_predictions
from transfer.data.transforms import train_transform
from transfer.jobs import make_job
from transfer.run import finished, mark, run_job, tidy, with_work_folder
from transfer.task import Job, Record, Result, Task

FIGURE_9 = (0.0, 0.5, 1.0, 2.0, 4.0, 6.0, 12.0, 18.0, 24.0)  # blocks tuned
HEADLINE = 1.0
RESULT_FILE = "result.json"
# The knobs that linear probing, one end of the curve, takes from this recipe.
SHARED = ("image_size", "train_fraction")


@dataclass(frozen=True, kw_only=True)
class PartialRecipe(ClassifierRecipe):
    """The numbers of the training at every k but 0. blocks: the values of k in rising order, each 0, 0.5 or a whole
    number; 1 must be among them. UserError for others."""

    blocks: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        given = f"blocks={as_typed(self.blocks)}"
        if list(self.blocks) != sorted(set(self.blocks)) or any(k < 0 or (k % 1 and k != 0.5) for k in self.blocks):
            raise UserError(f"{given}: give 0, 0.5 or whole numbers of blocks, each once, rising")
        if HEADLINE not in self.blocks:
            raise UserError(f"{given}: {HEADLINE:g} must be among them, its accuracy is the headline of this task")
        if self.optimizer != "adamw":
            raise UserError(f"optimizer={self.optimizer} trains only the head: partial fine-tuning needs adamw")


def partial_finetune(job: Job, probe: Task) -> Result:
    """Run every k of the recipe, in rising order, and draw the curve as partial.png in the work folder."""
    r, depth = job.recipe, get_arch(job.checkpoint.arch).depth
    if r.blocks[-1] > depth:
        raise UserError(f"blocks: {r.blocks[-1]:g} blocks cannot be tuned, {job.checkpoint.arch} has {depth}")
    curve: dict[float, Record | Result] = {}
    folders = {k: part_of(job, k).work for k in r.blocks}
    if 0 in r.blocks:
        curve[0.0], folders[0.0] = probed(job, probe)
    images = images_of(job)
    tuned = {k: tune(part_of(job, k), k, images) for k in r.blocks if k}
    curve |= tuned
    notes = [f"{k:g} blocks: {note}" for k, outcome in curve.items() for note in outcome.notes]
    if job.recipe_name == "paper":
        notes.append(
            f"{r.epochs} epochs for every number of blocks; the paper took the best of 50, 100 and 200 for each and "
            "does not say which"
        )
    if distributed.is_main():
        c = job.checkpoint
        about = f"ours: {c.name} ({c.arch}), {job.recipe_label} recipe, {job.data.label} data, seed {job.seed}"
        points = {k: (outcome.metrics["top1"], outcome.stderr["top1"]) for k, outcome in curve.items()}
        draw_curve(job.work / PICTURE_FILE, points, about)
    return Result(
        metrics={f"top1@{k:g}": outcome.metrics["top1"] for k, outcome in curve.items()},
        stderr={f"top1@{k:g}": outcome.stderr["top1"] for k, outcome in curve.items()},
        n_eval=len(images.val.files),
        images_seen=sum(result.images_seen for result in tuned.values()),
        seconds=sum(result.seconds or 0.0 for result in tuned.values()),
        tables={"by_blocks": {f"{k:g}": described(outcome) for k, outcome in curve.items()}},
        predictions=joined(
            {k: folders[k] / outcome.predictions["file"] for k, outcome in curve.items() if outcome.predictions},
            job.work,
        ),
        notes=tuple(notes),
    )


def joined(files: dict[float, Path], work: Path) -> dict[str, str]:
    """Write the predictions of each k to one file in the work folder, as a set named after it. A point of the curve
    that an earlier version made has none."""
    if not files or not distributed.is_main():
        return {}
    return write_predictions(work, {f"{k:g}": read_predictions(file)[MAIN] for k, file in files.items()})


def described(outcome: Record | Result) -> dict:
    """What the record says of one k: which task trained it if not this one, its metrics, and what the run resolved."""
    values: dict[str, Any] = {"task": outcome.task} if isinstance(outcome, Record) else {}
    values |= {"metrics": outcome.metrics, "seconds": outcome.seconds, "images_seen": outcome.images_seen}
    return values | {name: value for name, value in outcome.resolved.items() if name != "load"}


def probed(job: Job, task: Task) -> tuple[Record, Path]:
    """The record of linear probing by its own recipe of the same name, and its folder; run now if there is none."""
    unchanged = job.task.recipe(job.checkpoint.arch, job.recipe_name)
    changed = [knob for knob in SHARED if getattr(job.recipe, knob) != getattr(unchanged, knob)]
    settings = [f"{knob}={as_typed(getattr(job.recipe, knob))}" for knob in changed]
    probe = make_job(task, job.checkpoint, job.recipe_name, settings, job.data, job.out, job.seed, job.machine)
    record = finished(probe) or run_job(replace(probe, tracker=job.tracker), wait=True)
    if record.status != "ok":
        raise UserError(f"{task.name}, the curve's first point, has no number: {record.reason}")
    return record, probe.work


def part_of(job: Job, k: float) -> Job:
    """The job of tuning the last k blocks. Its folder does not depend on which other k were asked for."""
    recipe = ClassifierRecipe(**{f.name: getattr(job.recipe, f.name) for f in dataclasses.fields(ClassifierRecipe)})
    overrides = {knob: value for knob, value in job.overrides.items() if knob != "blocks"}
    task = replace(job.task, name=f"{job.task.name}@{k:g}")
    part = replace(job, task=task, recipe=recipe, overrides=overrides)
    return replace(part, work=job.work.parent / f"{k:g}" / with_work_folder(part).work.name)


def tune(job: Job, k: float, images: Reading) -> Result:
    """Tune the last k blocks and save the result in the work folder, or read it there if that was done before. A
    checksum proves that the frozen part did not change."""
    with distributed.alone_in(job.work):
        return tune_claimed(job, k, images)


def tune_claimed(job: Job, k: float, images: Reading) -> Result:
    mark(job)
    path = job.work / RESULT_FILE
    if path.exists():
        tidy(job)
        try:
            values = read_object(path)
            return Result(**values | {"notes": tuple(values["notes"])})
        except (OSError, ValueError, TypeError, KeyError) as e:
            raise UserError(f"{path} is damaged ({e}): delete it to train this point of the curve again") from None
    r = job.recipe
    model = start_model(job, images.classes)
    tuned = freeze_all_but(model, k)
    model = model.to(job.machine.device)
    before = checksum_of_others(model, tuned)
    transform = train_transform(r.image_size, r.min_scale, r.rand_augment, job.checkpoint.normalization)
    state, trained = train_classifier(job, model, images.train, transform)
    if checksum_of_others(trained, tuned) != before:
        raise RuntimeError(f"the frozen part changed while {k:g} blocks were tuned")
    result = trained_result(job, state, images, {MAIN: validate(job, trained, images.val)}, {})
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    resolved = result.resolved | {"trained_parameters": parameters}
    resolved |= {"frozen_sha256": before} if k < len(model.blocks) else {}
    result = replace(result, resolved=resolved)
    if distributed.is_main():
        write_json(path, dataclasses.asdict(result))
        (job.work / CHECKPOINT_FILE).unlink(missing_ok=True)
    return result


def freeze_all_but(model: ViT, k: float) -> frozenset[str]:
    """Freeze all but the last k blocks, the final norm and the head; with all blocks, nothing. Returns the names of the
    parameters still trained.

    The frozen part comes first, so no gradient passes through it: autograd stores nothing for it, without
    torch.no_grad. Drop path acts in it too: the recipe is that of fine-tuning.
    """
    depth = len(model.blocks)
    parts = [f"blocks.{i}." for i in range(depth - int(k), depth)]
    if k == 0.5:
        parts = [f"blocks.{depth - 1}.{part}" for part in ("norm2.", "mlp.", "ls2.", "gamma_2")]
    last = (*parts, "norm.", "fc_norm.", "head.") if k < depth else ("",)
    tuned = frozenset(name for name, _ in model.named_parameters() if name.startswith(last))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in tuned)
    return tuned


def checksum_of_others(model: nn.Module, tuned: frozenset[str]) -> str:
    return parameters_sha256((name, tensor) for name, tensor in model.state_dict().items() if name not in tuned)
