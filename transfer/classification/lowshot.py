"""Fine-tuning on the few training images of a list."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from mae_core.settings import choose
from transfer.classification.checks import training_objections
from transfer.classification.recipes import MINI_FINETUNE, finetune_recipe, finetune_sources
from transfer.classification.train import ClassifierRecipe
from transfer.data.lowshot import FINETUNED, SUBSETS, Subset, inspect_subset, seed_objection
from transfer.miniature.imagenet import imagenet_lists, miniature_size
from transfer.task import Job, Objection, Task

# ml-jku/MIM-Refiner's for MAE: src/yamls/eval/finetune_10p, and extreme_lowshot/run/mae_finetune. MAE has none.
SAME: dict[str, Any] = {"epochs": 50, "layer_decay": 0.75, "pool": "token"}
PERCENT = SAME | {"batch": 256, "base_lr": 5e-4, "drop_path": 0.2}
SHOTS = SAME | {"batch": 128, "base_lr": 1e-4, "rand_augment": ""}
SHOTS |= dict.fromkeys(("drop_path", "random_erasing", "mixup", "cutmix"), 0.0)


def recipe(arch: str, name: str, subset: Subset) -> ClassifierRecipe:
    """ImageNet's, with what MIM-Refiner has instead for so few images."""
    paper = replace(finetune_recipe(arch, "paper"), **(SHOTS if subset.per_class else PERCENT))
    # 16 images are a step an epoch.
    longer = {"epochs": 30, "warmup_epochs": 3, "batch": 16, "base_lr": 8e-3}
    mini = replace(paper, **MINI_FINETUNE | longer, **miniature_size(arch))
    return choose("recipe", name, {"paper": paper, "mini": mini})


def sources(arch: str, subset: Subset) -> dict[str, str]:
    where = "extreme_lowshot/run/mae_finetune" if subset.per_class else "finetune_10p"
    theirs = f"stand-in: ml-jku/MIM-Refiner src/yamls/eval/{where}, for MAE's ViT-2B, of which it freezes a quarter"
    found = {knob: f"stand-in, as for all images: {source}" for knob, source in finetune_sources(arch).items()}
    found |= dict.fromkeys(SHOTS if subset.per_class else PERCENT, theirs)
    return found | ({"batch": f"{theirs}; it has 125"} if subset.per_class else {})


def objections(job: Job, subset: Subset) -> Iterator[Objection]:
    yield from training_objections(job)
    yield from seed_objection(subset, job.seed)


def tasks_of(finetune: Task) -> tuple[Task, ...]:
    return tuple(
        replace(
            finetune,
            name=FINETUNED + subset.name,
            title=f"ImageNet-1k, fine-tuning on {subset.title}",
            version=1,
            cost=21,
            recipe=partial(recipe, subset=subset),
            sources=partial(sources, subset=subset),
            inspect=partial(inspect_subset, subset),
            miniature=imagenet_lists,
            objections=partial(objections, subset=subset),
            opt_in=True,
        )
        for subset in SUBSETS
    )
