"""The recipe of a pre-training: every number and every choice of it, as data."""

from dataclasses import dataclass, fields, replace

from mae_core.autoencoder import LOSS_ON
from mae_core.data import AUGMENTATIONS
from mae_core.errors import UserError
from mae_core.masking import GRID_RATIO, MASKINGS
from mae_core.settings import bounded, check_ranges, choose, unknown
from mae_core.targets import TARGETS
from mae_core.vit import get_arch

TOKENIZERS = ("k-means", "dall-e")


@dataclass(frozen=True)
class PretrainRecipe:
    """Every number of one pre-training. Defaults: MAE paper, Table 8, section 3 and A.1; where the paper is silent the
    official code (min_scale, betas' use, zero decay on 1-D parameters, decoder heads). masking.py, targets.py,
    autoencoder.py and data.py say what masking, target, loss_on and augmentation may be.

    UserError for an unknown word, and for a knob that would have no effect.
    """

    image_size: int = bounded(1, default=224)
    mask_ratio: float = bounded(0, 1, below=True, default=0.75)
    norm_pix: bool = True  # the released encoders; section 4's baseline reconstructs plain pixels
    decoder_dim: int = bounded(4, default=512)
    decoder_depth: int = bounded(1, default=8)
    decoder_heads: int = bounded(1, default=16)
    epochs: int = bounded(1, default=1600)  # Table 3 and all transfer results; the ablations take 800
    warmup_epochs: int = bounded(0, default=40)
    batch: int = bounded(1, default=4096)
    base_lr: float = bounded(0, default=1.5e-4)
    min_lr: float = bounded(0, default=0.0)
    weight_decay: float = bounded(0, default=0.05)
    betas: tuple[float, float] = bounded(0, 1, below=True, default=(0.9, 0.95))
    min_scale: float = bounded(0, 1, default=0.2)  # random-size crop, smallest share of the area
    masking: str = "random"
    encoder_mask_tokens: bool = False
    loss_on: str = "masked"
    target: str = "pixels"
    pca_components: int = bounded(1, default=96)
    tokenizer: str = "k-means"
    vocabulary: int = bounded(2, default=8192)  # tokens of k-means; DALL-E's encoder has as many
    fit_images: int = bounded(1, default=10000)  # sample that PCA and k-means are fitted on; the paper names none
    augmentation: str = "crop, random size"
    repeated_augmentation: int = bounded(1, default=1)  # crops of each decoded image in a batch

    def __post_init__(self) -> None:
        check_ranges(self)
        for knob, known in WORDS.items():
            if getattr(self, knob) not in known:
                raise unknown(knob, getattr(self, knob), known)
        for knob, value, because in self.unused():
            if getattr(self, knob) != value:
                raise UserError(f"{knob} does nothing with {because}: leave it at {value}")
        if self.masking == "grid" and self.mask_ratio != GRID_RATIO:
            raise UserError(f"mask_ratio={self.mask_ratio}: grid-wise masking hides {GRID_RATIO} of the patches")
        if self.batch % self.repeated_augmentation:
            raise UserError(
                f"repeated_augmentation={self.repeated_augmentation}: a batch of {self.batch} is no multiple of it"
            )

    def unused(self) -> list[tuple[str, object, str]]:
        """(knob, the value it must keep, the reason) for every knob that has no effect in this recipe."""
        target, fits_tokens = self.target, self.target == "tokens" and self.tokenizer == "k-means"
        unused = {
            "norm_pix": (target != "pixels", f"target={target}"),
            "pca_components": (target != "pca", f"target={target}"),
            "tokenizer": (target != "tokens", f"target={target}"),
            "vocabulary": (not fits_tokens, "a target that is no k-means token"),
            "fit_images": (not fits_tokens and target != "pca", "a target that is not fitted"),
            "min_scale": (self.augmentation in ("none", "crop, fixed size"), f"augmentation={self.augmentation}"),
        }
        default = {field.name: field.default for field in fields(self)} | {"norm_pix": False}
        return [(knob, default[knob], because) for knob, (without_effect, because) in unused.items() if without_effect]


WORDS = {
    "masking": MASKINGS,
    "loss_on": LOSS_ON,
    "target": TARGETS,
    "tokenizer": TOKENIZERS,
    "augmentation": AUGMENTATIONS,
}
MINI_FIELDS = (
    *("image_size", "norm_pix", "decoder_dim", "decoder_depth", "decoder_heads"),
    *("epochs", "warmup_epochs", "batch", "base_lr"),
)


def recipe(arch: str, name: str) -> PretrainRecipe:
    """The recipe of that name: "paper", or "mini" for the generated 48 px images and vit_mini_patch8."""
    a = get_arch(arch)
    paper = PretrainRecipe(image_size=a.image_size)
    mini = replace(
        paper,
        image_size=48 - 48 % a.patch,
        norm_pix=False,
        decoder_dim=96,
        decoder_depth=2,
        decoder_heads=4,
        epochs=40,
        warmup_epochs=2,
        batch=256,
        base_lr=1.5e-3,
    )
    return choose("recipe", name, {"paper": paper, "mini": mini})
