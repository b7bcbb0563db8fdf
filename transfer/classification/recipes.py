"""The numbers of the classification tasks, each with its source."""

from dataclasses import replace
from typing import Any

from mae_core.settings import choose
from mae_core.vit import get_arch, nearest, stand_in
from transfer.classification.evaluate import EvalRecipe
from transfer.classification.partial import FIGURE_9, PartialRecipe
from transfer.classification.train import MIXED, ClassifierRecipe, RepeatedRecipe, WholeImageRecipe
from transfer.miniature.imagenet import miniature_size

PAPER_9 = "MAE paper, Table 9"
OFFICIAL = "facebookresearch/mae FINETUNE.md and main_finetune.py"
PAPER_10 = "MAE paper, Table 10"
PROBE = "facebookresearch/mae main_linprobe.py"
PAPER_11 = "MAE paper, Table 11"
DRAWS = f"; one draw for each {MIXED} images, a GPU's batch in FINETUNE.md, where ViT-H has 16"
FROM_SCRATCH = "facebookresearch/mae main_finetune.py without --finetune, which issue 28 says to use"

# Fine-tuning values that depend on the size: epochs, base_lr, layer_decay, drop_path. From FINETUNE.md. Sizes that MAE
# never fine-tuned take those of the nearest (`nearest`).
BY_SIZE = {
    "vit_base_patch16": (100, 5e-4, 0.65, 0.1),
    "vit_large_patch16": (50, 1e-3, 0.75, 0.2),
    "vit_huge_patch14": (50, 1e-3, 0.75, 0.3),
}
# What the paper's Table 9 has instead; its epochs are the same. Tables 1 and 2 and Figures 5, 7 and 9 follow it: their
# encoders reconstructed pixels that were not normalised.
TABLE_9 = "table-9"
DROP_PATH_9 = {"vit_base_patch16": 0.1, "vit_large_patch16": 0.1, "vit_huge_patch14": 0.2}


def sized(arch: str, source: str) -> str:
    """The source of a value that depends on the size; source: that of MAE's own sizes."""
    return source if arch in BY_SIZE else f"{stand_in(arch, BY_SIZE)}, MAE has no such size"


def finetune_recipe(arch: str, name: str) -> ClassifierRecipe:
    """End-to-end fine-tuning. "paper": the official repository's values, with which the released classifiers were
    trained. "table-9": the paper's own. "mini": "paper" with MINI_FINETUNE, for the generated 48 px images."""
    epochs, base_lr, layer_decay, drop_path = BY_SIZE[nearest(arch, BY_SIZE)]
    paper = ClassifierRecipe(
        image_size=get_arch(arch).image_size,
        epochs=epochs,
        warmup_epochs=5,
        batch=1024,
        base_lr=base_lr,
        min_lr=1e-6,
        optimizer="adamw",
        betas=(0.9, 0.999),
        weight_decay=0.05,
        layer_decay=layer_decay,
        drop_path=drop_path,
        pool="avg",
        head_std=2e-5,
        min_scale=0.08,
        rand_augment="rand-m9-mstd0.5-inc1",
        random_erasing=0.25,
        mixup=0.8,
        cutmix=1.0,
        label_smoothing=0.1,
    )
    table_9 = replace(
        paper,
        base_lr=1e-3,
        layer_decay=0.75,
        drop_path=DROP_PATH_9[nearest(arch, DROP_PATH_9)],
        pool="token",
        random_erasing=0.0,
    )
    mini = replace(paper, **MINI_FINETUNE, **miniature_size(arch))
    return choose("recipe", name, {"paper": paper, TABLE_9: table_9, "mini": mini})


def finetune_sources(arch: str, name: str = "paper") -> dict[str, str]:
    """Where each value of the paper recipe, or of "table-9", comes from."""
    both = f"{PAPER_9}; {OFFICIAL}"
    sources = dict.fromkeys(ClassifierRecipe.__dataclass_fields__, both)
    sources |= dict.fromkeys(("base_lr", "layer_decay", "drop_path", "epochs"), sized(arch, OFFICIAL))
    sources |= dict.fromkeys(("pool", "random_erasing", "min_lr", "head_std", "min_scale"), OFFICIAL)
    sources["mixup"] = sources["cutmix"] = f"{both}{DRAWS}"
    if name == TABLE_9:
        sources |= dict.fromkeys(("base_lr", "layer_decay", "drop_path", "epochs"), sized(arch, PAPER_9))
        sources |= {"pool": "MAE paper, A.1", "random_erasing": f"{PAPER_9} names none"}
    return sources | dict.fromkeys(("momentum", "trust_coefficient", "ema"), "not used")


def partial_recipe(arch: str, name: str) -> PartialRecipe:
    """Partial fine-tuning: Table 9, at each number of blocks in Figure 9 that is below the depth, and at the depth."""
    depth = float(get_arch(arch).depth)
    blocks = (*(k for k in FIGURE_9 if k < depth), depth)
    paper = PartialRecipe(**vars(finetune_recipe(arch, TABLE_9)), blocks=blocks)
    mini = replace(paper, **MINI_FINETUNE, **miniature_size(arch))
    return choose("recipe", name, {"paper": paper, "mini": mini})


def partial_sources(arch: str) -> dict[str, str]:
    sources = finetune_sources(arch, TABLE_9) | {"blocks": "MAE paper, Figure 9; no block is linear probing"}
    unsaid = "fine-tuning's; of partial fine-tuning the paper says only that it is the best of 50, 100 and 200"
    return sources | {"epochs": f"{unsaid} ({sources['epochs']})"}


# From scratch: epochs, drop_path.
SCRATCH_BY_SIZE = {"vit_base_patch16": (300, 0.1), "vit_large_patch16": (200, 0.2), "vit_huge_patch14": (200, 0.2)}


def scratch_recipe(arch: str, name: str) -> ClassifierRecipe:
    """Supervised training from random weights, with a moving average of the weights: the paper's baseline."""
    epochs, drop_path = SCRATCH_BY_SIZE[nearest(arch, SCRATCH_BY_SIZE)]
    paper = replace(
        finetune_recipe(arch, "paper"),
        epochs=epochs,
        warmup_epochs=20,
        batch=4096,
        base_lr=1e-4,
        betas=(0.9, 0.95),
        weight_decay=0.3,
        layer_decay=1.0,
        drop_path=drop_path,
        head_std=0.02,
        random_erasing=0.0,
        ema=0.9999,
    )
    mini = replace(paper, **MINI_SCRATCH, **miniature_size(arch))
    return choose("recipe", name, {"paper": paper, "mini": mini})


def scratch_sources(arch: str) -> dict[str, str]:
    sources = dict.fromkeys(ClassifierRecipe.__dataclass_fields__, PAPER_11)
    sources |= dict.fromkeys(("epochs", "drop_path"), sized(arch, PAPER_11))
    sources |= dict.fromkeys(("pool", "min_lr", "head_std", "min_scale"), FROM_SCRATCH)
    sources |= dict.fromkeys(("layer_decay", "random_erasing"), f"{PAPER_11} names none")
    sources |= dict.fromkeys(("mixup", "cutmix"), f"{PAPER_11}{DRAWS}")
    return sources | dict.fromkeys(("momentum", "trust_coefficient"), "not used")


# Longer recipes for iNaturalist, by name: what an author of two other projects said he fine-tuned a ViT-B with. What he
# left unsaid is taken from DeiT's code.
UNSAID = {"min_lr": 1e-5, "layer_decay": 1.0, "pool": "token", "head_std": 0.02, "repeated_augmentation": 3}
# Both rates are before scaling: 2.5e-5 * 768 / 256 = 7.5e-5.
DEIT = UNSAID | {"epochs": 360, "batch": 768, "base_lr": 2.5e-5, "drop_path": 0.1, "random_erasing": 0.1}
DINO = DEIT | {"epochs": 300, "batch": 1024, "random_erasing": 0.25}  # his 5e-5 before scaling is for 512 images
DEIT_SAID = "facebookresearch/deit issues 105 and 141, an author, for ViT-B on iNaturalist"
DINO_SAID = "facebookresearch/dino issue 171, an author, for ViT-B on iNaturalist"
DEIT_CODE = "facebookresearch/deit main.py, models.py and samplers.py"
STAND_INS = {"deit-360": (DEIT, DEIT_SAID), "dino-300": (DINO, DINO_SAID)}


def stand_in_recipe(arch: str, name: str) -> ClassifierRecipe:
    """For iNaturalist, Places and folders: the ImageNet recipe, or a longer one by name."""
    known = {base: finetune_recipe(arch, base) for base in ("paper", "mini")}
    known |= {longer: RepeatedRecipe(**vars(known["paper"]) | values) for longer, (values, _) in STAND_INS.items()}
    return choose("recipe", name, known)


def stand_in_sources(arch: str, name: str = "paper") -> dict[str, str]:
    """The paper adjusted its ImageNet recipe to each set and did not publish the values."""
    if name in STAND_INS:
        _, said = STAND_INS[name]
        sources = dict.fromkeys(RepeatedRecipe.__dataclass_fields__, f"stand-in: {said}")
        sources |= dict.fromkeys((*UNSAID, "image_size", "betas", "min_scale"), f"stand-in: {DEIT_CODE}")
        sources["warmup_epochs"] += "; from 0 and per iteration, theirs from 1e-6 and per epoch"
        sources |= dict.fromkeys(("mixup", "cutmix"), f"stand-in: {said}{DRAWS}")
        if name == "dino-300":
            sources["batch"] += ", says 128 for each GPU; 8 are assumed"
        return sources | dict.fromkeys(("momentum", "trust_coefficient", "ema"), "not used")
    return {
        knob: f"stand-in, as for ImageNet: {source}; the paper adjusted rate and epochs, without saying how"
        for knob, source in finetune_sources(arch).items()
    }


VPT = "stand-in: KMnP/vpt configs/base-finetune.yaml and tune_vtab.py"
FIXED = "stand-in: a value within the range that KMnP/vpt tune_vtab.py chooses from on val200, for each set"
NO_AUGMENTATION = "stand-in: KMnP/vpt, which only resizes the images"


def vtab_recipe(arch: str, name: str) -> WholeImageRecipe:
    """VTAB-1k: fine-tuning as for ImageNet, as long as in VPT, without augmentation. MAE did not run it."""
    values = vars(finetune_recipe(arch, "paper")) | {
        "epochs": 100,
        "batch": 64,
        "base_lr": 1e-3,
        "weight_decay": 1e-4,
        **dict.fromkeys(("drop_path", "random_erasing", "mixup", "cutmix", "label_smoothing"), 0.0),
        "min_scale": 1.0,
        "rand_augment": "",
    }
    paper = WholeImageRecipe(**values)
    small = {knob: value for knob, value in MINI_FINETUNE.items() if knob not in ("min_scale", "rand_augment")}
    mini = replace(paper, **small, **miniature_size(arch))
    return choose("recipe", name, {"paper": paper, "mini": mini})


def vtab_sources(arch: str) -> dict[str, str]:
    sources = {knob: f"stand-in, as for ImageNet: {source}" for knob, source in finetune_sources(arch).items()}
    sources |= dict.fromkeys(("epochs", "warmup_epochs", "optimizer"), VPT)
    sources |= dict.fromkeys(("base_lr", "weight_decay"), FIXED) | {"batch": "stand-in: ours; KMnP/vpt does not fix it"}
    no = ("drop_path", "random_erasing", "mixup", "cutmix", "label_smoothing", "min_scale", "rand_augment")
    sources |= dict.fromkeys(no, NO_AUGMENTATION)
    return sources | {"scored_on": "VTAB, arXiv 1910.04867"}


def linprobe_recipe(arch: str, name: str) -> ClassifierRecipe:
    """Linear probing of the frozen encoder: class token, BatchNorm without affine parameters, linear layer. It uses no
    decay and no augmentation but crop and flip: ClassifierRecipe's defaults."""
    paper = ClassifierRecipe(
        image_size=get_arch(arch).image_size,
        epochs=90,
        warmup_epochs=10,
        batch=16384,
        base_lr=0.1,
        min_lr=0.0,
        optimizer="lars",
        momentum=0.9,
        trust_coefficient=0.001,
        pool="token",
        head_std=0.01,
        min_scale=0.08,
    )
    mini = replace(paper, **MINI_LINPROBE, **miniature_size(arch))
    return choose("recipe", name, {"paper": paper, "mini": mini})


def linprobe_sources(arch: str) -> dict[str, str]:
    sources = dict.fromkeys(ClassifierRecipe.__dataclass_fields__, f"{PAPER_10}; {PROBE}")
    sources |= dict.fromkeys(("trust_coefficient", "pool", "head_std", "min_scale"), PROBE)
    return sources | dict.fromkeys(("betas", "layer_decay", "ema"), "not used")


# Everything that "mini" changes. Sizes, lengths and rates: 800 images of 48 px, a minute on two cores. Augmentation:
# one shape fills a miniature's image, and RandAugment, erasing and crops of 8 % would leave too little of it. Smoothing
# would give a tenth to a thousand classes, of which there are 16.
MINI_FINETUNE: dict[str, Any] = {
    "epochs": 12,
    "warmup_epochs": 1,
    "batch": 32,
    "base_lr": 1.2e-2,
    "mixup": 0.0,
    "cutmix": 0.0,
    "drop_path": 0.0,
    "min_scale": 0.7,
    "rand_augment": "",
    "random_erasing": 0.0,
    "label_smoothing": 0.0,
}
# 300 steps: 1 / (1 - 0.97) is about the same share of them as 1 / (1 - 0.9999) is of ViT-B's 93,600.
MINI_SCRATCH = MINI_FINETUNE | {"ema": 0.97}
# base_lr: the paper's absolute rate.
MINI_LINPROBE: dict[str, Any] = {"epochs": 40, "warmup_epochs": 4, "batch": 256, "base_lr": 6.4}


def eval_recipe(arch: str, name: str) -> EvalRecipe:
    """The official evaluation at the classifier's own size: one view, resized and cropped (main_finetune.py --eval)."""
    return choose("recipe", name, dict.fromkeys(("paper", "mini"), EvalRecipe()))


def eval_sources(arch: str) -> dict[str, str]:
    return {"image_size": "the checkpoint's own", "transform": "facebookresearch/mae util/datasets.py"}
