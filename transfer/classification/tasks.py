"""ImageNet-1k: fine-tuning whole and in part, linear probing, training from scratch, and the evaluation of a released
classifier; fine-tuning on other labelled sets; and the fine-tuned classifier under shift.

python -m transfer.classification --task imagenet_finetune --ckpt FILE --data DIR --out DIR
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from transfer.classification import checks, cost, lowshot, recipes, retests, robustness
from transfer.classification.job import finetune, linprobe
from transfer.classification.partial import partial_finetune
from transfer.classification.robustness import EVAL
from transfer.data import inputs
from transfer.data.findings import Data
from transfer.data.imagenet import inspect_imagenet
from transfer.data.labelled import INAT2021, SETS, LabelledSet, inspect_set, read_folder
from transfer.data.vtab import VTAB
from transfer.miniature import imagenet as miniature
from transfer.miniature.labelled import MAKERS
from transfer.miniature.vtab import vtab
from transfer.task import Task

FINETUNE = Task(
    name="imagenet_finetune",
    title="ImageNet-1k, fine-tuning",
    module="transfer.classification",
    metric="top1",
    version=3,
    cost=30,
    recipe=recipes.finetune_recipe,
    sources=recipes.finetune_sources,
    inspect=inspect_imagenet,
    run=finetune,
    miniature=miniature.imagenet,
    objections=checks.training_objections,
    space=checks.classifier_space,
    parts=cost.training_parts,
    flops=cost.flops,
    detail=inputs.detail,
    few=inputs.fit_batch,
)
LINPROBE = replace(
    FINETUNE,
    name="imagenet_linprobe",
    title="ImageNet-1k, linear probing",
    version=2,
    cost=20,
    recipe=recipes.linprobe_recipe,
    sources=recipes.linprobe_sources,
    run=linprobe,
)
PARTIAL = replace(
    FINETUNE,
    name="imagenet_partial",
    refuses=checks.refuses_timms,
    title="ImageNet-1k, fine-tuning the last blocks",
    version=FINETUNE.version + LINPROBE.version - 2,  # the curve's first point is a linear probe
    metric="top1@1",
    cost=35,
    recipe=recipes.partial_recipe,
    sources=recipes.partial_sources,
    run=partial(partial_finetune, probe=LINPROBE),
    objections=checks.partial_objections,
    parts=cost.partial_parts,
    opt_in=True,
    after=(LINPROBE.name,),
)
SCRATCH = replace(
    FINETUNE,
    name="imagenet_scratch",
    title="ImageNet-1k, from scratch",
    cost=36,
    recipe=recipes.scratch_recipe,
    sources=recipes.scratch_sources,
    opt_in=True,
    from_scratch=True,
    refuses=checks.refuses_timms,
)


def task_of(known: LabelledSet, generate: Callable[[Path], Path]) -> Task:
    """Fine-tuning on a labelled set other than ImageNet."""
    return replace(
        FINETUNE,
        name=known.name,
        title=f"{known.title}, fine-tuning",
        cost=25,
        recipe=recipes.stand_in_recipe,
        sources=recipes.stand_in_sources,
        inspect=partial(inspect_set, known),
        miniature=generate,
        space=lambda job: checks.classifier_space(job, known.counts[0] or job.data.counts["classes"]),
    )


def vtab_task(known: LabelledSet) -> Task:
    generate = partial(vtab, name=known.name.removeprefix("vtab_"))
    return replace(
        task_of(known, generate),
        cost=22,
        recipe=recipes.vtab_recipe,
        sources=recipes.vtab_sources,
        detail=checks.vtab_detail,
        opt_in=True,
    )


def folder_task(path: str) -> Task:
    """Fine-tuning on the user's own folder, named "folder:" and the folder's last name in tables."""
    folder = Path(path).expanduser().resolve()
    known = LabelledSet(
        folder.name, f"Folder {folder.name}", (0, 0, 0), "{train,val}/CLASS/*.jpg or {train,val}.txt", read_folder
    )

    def inspect_here(root: Path) -> Data:
        data = inspect_set(known, folder.parent)
        return replace(data, root=str(folder), label="own" if data.label == "subset" else data.label)

    task = task_of(known, lambda root: root)
    return replace(task, name=f"folder:{folder.name}", path=str(folder), inspect=inspect_here)


FOLDER = replace(
    folder_task("folder"),
    name="folder",
    title="folder:/path/to/images, {train,val}/CLASS/*.jpg, fine-tuning",
    path="",
    opt_in=True,
    of=folder_task,
)
TASKS = (
    *(FINETUNE, LINPROBE, EVAL, PARTIAL, SCRATCH),
    *lowshot.tasks_of(FINETUNE),
    *(task_of(known, MAKERS[known.name]) for known in SETS),
    replace(task_of(INAT2021, MAKERS[INAT2021.name]), opt_in=True),
    *map(vtab_task, VTAB),
    FOLDER,
    *robustness.TASKS,
    *retests.TASKS,
)
