"""The recipes of Mask R-CNN with a ViT on COCO: every number and its source.

Li et al. 2021, "Benchmarking Detection Transfer Learning with Vision Transformers" (arXiv 2111.11429), which the MAE
paper's Table 4 follows; and ViTDet (Li et al. 2022, arXiv 2203.16527), another experiment.
"""

from dataclasses import dataclass, fields, replace

from mae_core.errors import UserError
from mae_core.settings import as_typed, bounded, check_ranges, choose
from mae_core.vit import nearest, stand_in
from transfer.pyramid import pretraining_grid


@dataclass(frozen=True)
class DetectionRecipe:
    """Every number of one detector's training.

    image_size: side in px of the square that images are padded to. lr: for that batch, not scaled with it. layer_decay:
    of the rate, by layer; 1 for none. min_scale, max_scale: range of the large-scale jitter. window: side in patches, 0
    for global attention everywhere. rpn_batch, roi_batch: anchors and proposals per image that enter the losses.
    proposals: what the RPN keeps per image.
    """

    image_size: int = bounded(1, default=1024)
    epochs: int = bounded(1, default=100)
    warmup_epochs: float = bounded(0, default=0.25)
    batch: int = bounded(1, default=64)
    lr: float = bounded(0, default=8e-5)
    betas: tuple[float, float] = bounded(0, 1, below=True, default=(0.9, 0.999))
    weight_decay: float = bounded(0, default=0.1)
    layer_decay: float = bounded(0, 1, default=1.0)
    drop_path: float = bounded(0, 1, below=True, default=0.1)
    window: int = bounded(0, default=14)
    min_scale: float = bounded(0, 1, default=0.1)
    max_scale: float = 2.0
    fpn_dim: int = bounded(1, default=256)
    head_dim: int = bounded(1, default=256)
    fc_dim: int = bounded(1, default=1024)
    rpn_convs: int = bounded(1, default=2)
    rpn_batch: int = bounded(1, default=256)
    roi_batch: int = bounded(1, default=512)
    proposals: int = bounded(1, default=1000)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_scale < self.min_scale:
            raise UserError(f"max_scale={self.max_scale} is below min_scale={self.min_scale}")


@dataclass(frozen=True)
class ViTDetRecipe(DetectionRecipe):
    """ViTDet: its pyramid (transfer/pyramid/vitdet.py) in place of the FPN, layer norms in place of batch norms.

    lr_steps: the shares of the training after which the rate is a tenth. decay_all: weight decay on the blocks'
    norm layers and positions too, as its config of ViT-H has it; those of pyramid and heads have it in all sizes.
    """

    lr_steps: tuple[float, ...] = (8 / 9, 26 / 27)
    decay_all: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.lr_steps) != sorted(set(self.lr_steps)) or not all(0 < share < 1 for share in self.lr_steps):
            raise UserError(f"lr_steps={as_typed(self.lr_steps)}: give shares between 0 and 1, rising")


# Other sizes take that of the nearest (`nearest`).
DROP_PATH = {"vit_base_patch16": 0.1, "vit_large_patch16": 0.3}
PUBLISHED = tuple(DROP_PATH)
# Li et al.'s shorter schedules, for who has one card: epochs. Everything else is as in the paper's 100.
SCHEDULES = {"25-epochs": 25, "50-epochs": 50}


# ViTDet's configs: epochs, layer decay, drop path.
VITDET = {
    "vit_base_patch16": (100, 0.7, 0.1),
    "vit_large_patch16": (100, 0.8, 0.4),
    "vit_huge_patch14": (75, 0.9, 0.5),
}
VITDET_NAMES = {"vit_base_patch16": "b_100ep", "vit_large_patch16": "l_100ep", "vit_huge_patch14": "h_75ep"}


def vitdet(arch: str) -> ViTDetRecipe:
    """Warm-up over as much of the training as in its configs: 250 of 184,375 iterations."""
    known = nearest(arch, VITDET)
    epochs, layer_decay, drop_path = VITDET[known]
    return ViTDetRecipe(
        epochs=epochs,
        warmup_epochs=epochs * 250 / 184_375,
        lr=1e-4,
        layer_decay=layer_decay,
        drop_path=drop_path,
        decay_all=known == "vit_huge_patch14",
    )


def recipe(arch: str, name: str) -> DetectionRecipe:
    """The recipe of that name; UserError for an unknown one."""
    paper = DetectionRecipe(drop_path=DROP_PATH[nearest(arch, DROP_PATH)], window=pretraining_grid(arch))
    # Images of 64 px that hold objects of 24 to 42 px, and heads that a core trains in a minute at a high rate: a
    # layer decay keeps what the encoder knows.
    mini = replace(
        paper, image_size=64, epochs=4, warmup_epochs=0.5, batch=4, lr=1.5e-3, layer_decay=0.3, drop_path=0.0,
        min_scale=0.8, max_scale=1.25, fpn_dim=32, head_dim=32, fc_dim=128, rpn_batch=64, roi_batch=16, proposals=50,
    )  # fmt: skip
    shorter = {further: replace(paper, epochs=epochs) for further, epochs in SCHEDULES.items()}
    return choose("recipe", name, {"paper": paper, "mini": mini, "vitdet": vitdet(arch), **shorter})


def sources(arch: str, name: str = "paper") -> dict[str, str]:
    """Where each number of the paper recipe comes from, or of one of the shorter schedules."""
    if name == "vitdet":
        return vitdet_sources(arch)
    li, d2 = "Li et al. 2021 (arXiv 2111.11429)", "detectron2's defaults"
    found = {f.name: li for f in fields(DetectionRecipe)}
    found |= dict.fromkeys(("rpn_batch", "roi_batch", "proposals"), d2)
    found["epochs"] += ", facebookresearch/mae issue 43 (50.3 box AP of ViT-B after 100); counted over the images with "
    found["epochs"] += "objects, 183,200 iterations of 64 where the published 184,375 count 118,000 images"
    if name in SCHEDULES:
        found["epochs"] = f"{li}, who trained for 25, 50 or 100; facebookresearch/mae issue 43 has its numbers of ViT-B"
    found["weight_decay"] += "; none on norm layers, positions and bias tables: hustvl/MIMDet"
    found["layer_decay"] += ", who name none"
    found["window"] += ": the pre-training grid; hustvl/MIMDet has 16"
    found["drop_path"] = li if arch in PUBLISHED else f"{stand_in(arch, PUBLISHED)}, nobody published it"
    if name in SCHEDULES:
        found["drop_path"] += "; that of 100 epochs, nobody says what the shorter ones had"
    if arch not in PUBLISHED:
        return {knob: f"derived from ViT-B and ViT-L: {text}" for knob, text in found.items()}
    return found


def vitdet_sources(arch: str) -> dict[str, str]:
    """Where each number of the vitdet recipe comes from."""
    config = f"detectron2 projects/ViTDet mask_rcnn_vitdet_{VITDET_NAMES[nearest(arch, VITDET)]}.py"
    found = {f.name: config for f in fields(ViTDetRecipe)}
    found |= dict.fromkeys(("rpn_batch", "roi_batch", "proposals"), "detectron2's defaults")
    found["epochs"] += "; counted over the images with objects, where its iterations count 118,000 images"
    found["weight_decay"] += "; none on the blocks' norm layers and positions, but for ViT-H (decay_all)"
    for knob in ("epochs", "layer_decay", "drop_path", "decay_all"):
        found[knob] += "" if arch in VITDET else f"; {stand_in(arch, VITDET)}"
    return found
