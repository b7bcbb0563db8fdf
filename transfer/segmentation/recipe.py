"""The recipe of UperNet on ADE20K: every number and its source.

The MAE paper gives UperNet, 100 epochs and a batch of 16 (appendix A.4) and says that rates were searched for, but not
which were found. The rest is from two public reproductions of ViT-B (48.15 and 48.13 mIoU) on mmsegmentation's base
files.
"""

from dataclasses import dataclass, fields, replace

from mae_core.errors import UserError
from mae_core.settings import as_typed, bounded, check_ranges, choose
from mae_core.vit import get_arch, nearest, stand_in

PAPER = "MAE paper, appendix A.4"
CONFIGS = "MAE-B configs of implus/mae_segmentation and mmsegmentation 0.x and 1.2.2"
MMSEG = "mmsegmentation's base files for UperNet and ADE20K"
COMMUNITY = "stand-in: a community config for MAE-L of unknown result; none is published"
DERIVED = "stand-in: derived from the values for L; MAE has no H on ADE20K"
SOURCES = {"vit_base_patch16": CONFIGS, "vit_large_patch16": COMMUNITY, "vit_huge_patch14": DERIVED}

# lr, layer_decay and drop_path; other sizes take those of the nearest (`nearest`).
BY_SIZE = {
    "vit_base_patch16": (1e-4, 0.65, 0.1),
    "vit_large_patch16": (9e-5, 0.75, 0.2),
    "vit_huge_patch14": (9e-5, 0.75, 0.3),
}


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe:
    """Every number of one training and of its test. UserError for an impossible one.

    image_size: side of the crop in training and of the sliding window in the test (px); stride: of that window.
    lr: of a batch of `batch`, not rescaled. taps: blocks (from 0) whose output becomes one of the four maps.
    min_scale, max_scale: the image's resizing before the crop, times the fit into test_long_side x test_short_side.
    max_class_share: a crop that one class fills beyond this share is drawn again, up to ten times.
    multi_scale: also test at 0.5 to 1.75 of the size, but with no short side below image_size, flipped and not, and
    average: miou_ms beside miou.
    """

    image_size: int = bounded(1, default=512)
    iterations: int = bounded(1, default=160_000)  # 126.7 epochs of 20,210 images
    warmup_iterations: int = bounded(0, default=1500)
    batch: int = bounded(1, default=16)
    lr: float = bounded(0)
    power: float = bounded(0, default=1.0)
    betas: tuple[float, float] = bounded(0, 0.999999, default=(0.9, 0.999))
    weight_decay: float = bounded(0, default=0.05)
    layer_decay: float = bounded(1e-6, 1)
    drop_path: float = bounded(0, 0.99)
    taps: tuple[int, int, int, int]
    pool_scales: tuple[int, int, int, int] = bounded(1, default=(1, 2, 3, 6))
    head_channels: int = bounded(1)
    head_dropout: float = bounded(0, 0.99, default=0.1)
    auxiliary_channels: int = bounded(1, default=256)
    auxiliary_weight: float = bounded(0, default=0.4)
    min_scale: float = bounded(0.01, default=0.5)
    max_scale: float = bounded(0.01, default=2.0)
    max_class_share: float = bounded(0.01, 1, default=0.75)
    flip: float = bounded(0, 1, default=0.5)
    photometric: bool = True
    test_short_side: int = bounded(1, default=512)
    test_long_side: int = bounded(1, default=2048)
    stride: int = bounded(1, default=341)
    multi_scale: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        for low, high in (("min_scale", "max_scale"), ("test_short_side", "test_long_side"), ("stride", "image_size")):
            if getattr(self, low) > getattr(self, high):
                raise UserError(f"{low}={getattr(self, low)} must not be above {high}={getattr(self, high)}")
        if self.warmup_iterations >= self.iterations:
            raise UserError(
                f"warmup_iterations={self.warmup_iterations} must be below iterations={self.iterations}: set both"
            )
        if list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 0:
            raise UserError(f"taps={as_typed(self.taps)}: give four numbers of blocks, from 0, in order")
        smallest = self.test_short_side * min(self.min_scale, 1)
        if smallest < 16:
            raise UserError(
                f"test_short_side={self.test_short_side} and min_scale={self.min_scale} shrink images to a side of "
                f"{smallest:g} px: leave them 16 or more"
            )

    def lr_at(self, step: int) -> float:
        """The learning rate of one iteration by mmengine's LinearLR (over the warm-up, from 1e-6 of lr) and PolyLR.
        Both end one iteration early, so the last iteration has rate 0."""
        if step < self.warmup_iterations:
            return self.lr * (1e-6 + (1 - 1e-6) * step / max(self.warmup_iterations - 1, 1))
        length = max(self.iterations - self.warmup_iterations - 1, 1)
        return self.lr * (1 - min((step - self.warmup_iterations) / length, 1.0)) ** self.power


def thirds(depth: int) -> tuple[int, int, int, int]:
    """Blocks after a third, a half, two thirds and all of the depth: 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24."""
    return depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1


def recipe(arch: str, name: str) -> SegmentationRecipe:
    """The recipe of that name: "paper", Table 5's, or "mini", for the miniature. UserError for an unknown one."""
    a = get_arch(arch)
    lr, layer_decay, drop_path = BY_SIZE[nearest(arch, BY_SIZE)]
    paper = SegmentationRecipe(
        lr=lr, layer_decay=layer_decay, drop_path=drop_path, taps=thirds(a.depth), head_channels=a.dim
    )
    # For images of 42 to 64 px, a minute on a core. The heads start from nothing and take a high rate for so short a
    # training; the strong layer decay keeps what the encoder knows. The scales are narrower: at half size objects are
    # hardly larger than a patch.
    mini = replace(
        paper, image_size=48, iterations=200, warmup_iterations=20, batch=8, lr=1e-2, layer_decay=0.1, drop_path=0.0,
        head_channels=32, auxiliary_channels=32, min_scale=0.8, max_scale=1.25, photometric=False, test_short_side=48,
        test_long_side=192, stride=32,
    )  # fmt: skip
    return choose("recipe", name, {"paper": paper, "mini": mini})


def sources(arch: str) -> dict[str, str]:
    """Where each value of the paper recipe comes from."""
    other = f"{stand_in(arch, SOURCES)}; MAE has no such size on ADE20K"
    found = dict.fromkeys((field.name for field in fields(SegmentationRecipe)), MMSEG)
    found |= dict.fromkeys(("iterations", "warmup_iterations", "power", "betas", "weight_decay", "image_size"), CONFIGS)
    found |= dict.fromkeys(("lr", "layer_decay", "drop_path"), SOURCES.get(arch, other))
    found["taps"] = SOURCES.get(arch, f"derived: the same shares of the depth as in {CONFIGS}")
    found["batch"] = f"{PAPER}; {CONFIGS}"
    found["iterations"] = f"{CONFIGS}; the paper's 100 epochs are 126,312"
    found["head_channels"] = f"the embedding width, as in {CONFIGS}"
    found["weight_decay"] = f"{CONFIGS}; as in their optimizers, positions, class token and bias tables have it too"
    found["stride"] = f"{CONFIGS}; mmsegmentation's main branch has had 256 since"
    found["multi_scale"] = "not in the paper; ratios of the public configs, shortest side of mmsegmentation 0.x"
    return found
