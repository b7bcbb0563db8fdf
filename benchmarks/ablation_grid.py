"""The pre-training ablations as data: a cell states only what differs from the default pre-training.

To add one: an entry in TABLES and, if numbers are published for it, rows of results/published/ablations.csv with the
table's title as `table` and the cell's label as `method`.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One pre-training: its label in the table, and the knobs that differ from the default."""

    label: str
    knobs: dict[str, Any] = field(default_factory=dict)
    x: float | None = None  # position on the plot's axis; None: in order, evenly spaced
    arch: str = ""  # "": the default's


@dataclass(frozen=True)
class Ablation:
    """One table or figure of the paper. cells: by recipe."""

    title: str
    about: str
    axis: str
    cells: dict[str, tuple[Cell, ...]]


@dataclass(frozen=True)
class Default:
    """What the cells of a recipe differ from. transfer: the knobs of the tasks that evaluate it, by task; "recipe": one
    of the task's further recipes."""

    arch: str
    knobs: dict[str, Any]
    transfer: dict[str, dict[str, Any]]


DEFAULTS = {
    # MAE paper, section 4: ViT-L, 800 epochs, pixels without normalisation, fine-tuned by the paper's own Table 9.
    "paper": Default(
        "vit_large_patch16", {"epochs": 800, "norm_pix": False}, {"imagenet_finetune": {"recipe": "table-9"}}
    ),
    # Minutes instead of days: 8 epochs of 2000 images of 48 px, shorter tasks. It shows that everything runs, and at
    # what cost; how cells rank at this size says nothing about the paper's results. Fine-tuning is the usual mini
    # recipe: averaged patch tokens, layer decay 0.65, its own rate and augmentation.
    "mini": Default(
        "vit_mini_patch8",
        {"epochs": 8, "warmup_epochs": 1, "batch": 128},
        {
            "imagenet_finetune": {"epochs": 8, "warmup_epochs": 1},
            "imagenet_linprobe": {"epochs": 12, "warmup_epochs": 1},
        },
    ),
}
MINI_IMAGES = 2000


def sweep(knob: str, values: tuple, label: str) -> tuple[Cell, ...]:
    """One cell per value of a knob. label: formatted with the value and its percentage."""
    return tuple(Cell(label.format(value, 100 * value), {knob: value}, x=value) for value in values)


RATIOS = sweep("mask_ratio", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9), "{1:.0f} %")
DEPTHS = tuple(Cell(f"{n} block{'s' * (n > 1)}", {"decoder_depth": n}, x=n) for n in (1, 2, 4, 8, 12))
AUGMENTATIONS = (
    Cell("none (centre crop, no flip)", {"augmentation": "none"}),
    Cell("crop, fixed size", {"augmentation": "crop, fixed size"}),
    Cell("crop, random size"),
    Cell("crop + colour jitter", {"augmentation": "crop + colour jitter"}),
)
MASK_TOKENS = (
    Cell("encoder with mask tokens", {"encoder_mask_tokens": True}),
    Cell("encoder without mask tokens"),
)
MASKINGS = (
    Cell("random 75 %"),
    Cell("block 50 %", {"masking": "block", "mask_ratio": 0.5}),
    Cell("block 75 %", {"masking": "block"}),
    Cell("grid 75 %", {"masking": "grid"}),
)


def target_cells(tokens: Cell) -> tuple[Cell, ...]:
    return (
        Cell("pixel, no per-patch norm"),
        Cell("pixel, per-patch norm", {"norm_pix": True}),
        Cell("PCA (96 coefficients)", {"target": "pca"}),
        tokens,
    )


def wall_clock_cells(arch: str, depths: tuple[int, ...], label: str = "") -> tuple[Cell, ...]:
    first = Cell(
        f"{label}encoder with mask tokens, decoder depth {depths[0]}",
        {"encoder_mask_tokens": True, "decoder_depth": depths[0]},
        arch=arch,
    )
    rest = (
        Cell(f"{label}encoder without mask tokens, decoder depth {n}", {"decoder_depth": n}, arch=arch) for n in depths
    )
    return first, *rest


TABLES = {
    "1a": Ablation("Table 1a", "decoder depth", "decoder blocks", {"paper": DEPTHS, "mini": DEPTHS}),
    "1b": Ablation(
        "Table 1b",
        "decoder width",
        "decoder width",
        {
            "paper": sweep("decoder_dim", (128, 256, 512, 768, 1024), "width {0}"),
            # The same fractions of the encoder's width, 1/8 to 1.
            "mini": sweep("decoder_dim", (16, 32, 64, 96, 128), "width {0}"),
        },
    ),
    "1c": Ablation("Table 1c", "mask tokens in the encoder", "", {"paper": MASK_TOKENS, "mini": MASK_TOKENS}),
    "1d": Ablation(
        "Table 1d",
        "reconstruction target",
        "",
        {
            "paper": target_cells(Cell("k-means token", {"target": "tokens"})),
            "mini": target_cells(Cell("k-means token", {"target": "tokens", "vocabulary": 256})),
        },
    ),
    "1e": Ablation("Table 1e", "data augmentation", "", {"paper": AUGMENTATIONS, "mini": AUGMENTATIONS}),
    "1f": Ablation("Table 1f", "mask sampling", "", {"paper": MASKINGS, "mini": MASKINGS}),
    "fig5": Ablation("Figure 5", "masking ratio", "masked (share)", {"paper": RATIOS, "mini": RATIOS}),
    "fig7": Ablation(
        "Figure 7",
        "length of pre-training",
        "epochs",
        {
            "paper": sweep("epochs", (100, 200, 400, 800, 1600), "{0} epochs"),
            "mini": sweep("epochs", (1, 2, 4, 8, 16), "{0} epochs"),
        },
    ),
    "2": Ablation(
        "Table 2",
        "wall-clock time",
        "",
        {
            "paper": wall_clock_cells("vit_large_patch16", (8, 1), "ViT-L, ")
            + wall_clock_cells("vit_huge_patch14", (8, 1), "ViT-H, "),
            "mini": wall_clock_cells("vit_mini_patch8", (2, 1)),
        },
    ),
}
# One more cell of Table 1d, if DALL-E's encoder is given.
DVAE = Cell("dVAE token", {"target": "tokens", "tokenizer": "dall-e"})
