"""The formats that ViT checkpoints come in, as a table.

A format is recognised by its tensors' names, which are then changed to timm's (and FAIR's): ``cls_token``,
``pos_embed``, ``patch_embed.proj.*``, ``blocks.i.*``, ``norm.*``, ``fc_norm.*``, ``head.*``; beyond the plain ViT
``reg_token``, ``dist_token``, ``blocks.i.ls1.gamma``, and BEiT's ``q_bias``, ``gamma_1``,
``relative_position_bias_table``. To add a format: one entry in FORMATS, before any other that fits its names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from mae_core.checkpoint.renaming import (
    DINOV2,
    FLAX,
    HF,
    MM,
    Rules,
    Sources,
    fold_class_position,
    from_flax,
    spread_shared_table,
)
from mae_core.data import IMAGENET_NORMALIZATION, Normalization
from mae_core.vit import EPS

HALF: Normalization = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Format:
    """One format.

    holds: patterns of tensor names that must all occur. under: the key its tensors lie under, None for any. beside:
    keys that must be there besides that one. prefix: of the encoder's names; all others are dropped. rename: (pattern,
    replacement), applied to every name in this order. drop: pattern of canonical names that are no part of an encoder,
    decoder or classifier. normalization, eps, pool: what this format's models are trained with, unless a config beside
    the weights says otherwise. heads: attention heads by width, where they differ from mae_core/vit.py's. convert: what
    renaming cannot do.
    """

    name: str
    what: str  # who writes it, for people
    holds: tuple[str, ...] = ()
    under: str | None = None
    beside: frozenset[str] = frozenset()
    prefix: str = ""
    rename: Rules = ()
    drop: str = ""
    normalization: Normalization = IMAGENET_NORMALIZATION
    eps: float = EPS
    pool: str = "token"
    heads: dict[int, int] = field(default_factory=dict)
    convert: Callable[[dict[str, Tensor], Sources], None] | None = None


HF_PATCHES = r"(\w+\.)?embeddings\.patch_embeddings\.projection\.weight"
HF_BLOCK = r"(\w+\.)?(encoder\.layer|layers)\.0\."
MM_BLOCK = r"(backbone\.)?layers\.0\.ffn\.layers\.0\.0\.weight"
BEIT_DROP = r".*relative_position_index|mask_token|lm_head\..*|cls_pt_layers\..*"
FULL = (r"decoder_embed\.weight",)
BLOCK = r"blocks\.0\.attn\.qkv\.weight"

# The first that fits.
FORMATS = (
    Format(
        "hf-beit",
        "Hugging Face BEiT: model.safetensors with config.json",
        (HF_PATCHES, HF_BLOCK + r"lambda_1"),
        rename=HF,
        drop=BEIT_DROP,
        normalization=HALF,
        eps=1e-12,
        pool="avg",
        convert=spread_shared_table,
    ),
    Format(
        "hf-dinov2-registers",
        "Hugging Face DINOv2 with registers",
        (HF_PATCHES, r"(\w+\.)?embeddings\.register_tokens"),
        rename=HF,
        drop=r"mask_token",
        convert=fold_class_position,
    ),
    Format("hf-dinov2", "Hugging Face DINOv2", (HF_PATCHES, HF_BLOCK + r"layer_scale1\.lambda1"), rename=HF),
    Format(
        "hf-vit-mae",
        "Hugging Face ViT-MAE with its decoder (facebook/vit-mae-*)",
        (HF_PATCHES, r"decoder\.decoder_embed\.weight"),
        rename=HF,
        eps=1e-12,
    ),
    Format(
        "hf-deit",
        "Hugging Face DeiT, distilled",
        (HF_PATCHES, r"(\w+\.)?embeddings\.distillation_token"),
        rename=HF,
        eps=1e-12,
    ),
    Format("hf-vit", "Hugging Face ViT (google/vit-*)", (HF_PATCHES,), rename=HF, normalization=HALF, eps=1e-12),
    Format(
        "mm-linprobe",
        "mmpretrain, mmselfsup: a linear probe",
        (MM_BLOCK, r"neck\.bn\.running_mean"),
        rename=((r"^neck\.bn\.", "head.0."), (r"^head\.(layers\.head|fc)\.", "head.1."), *MM),
    ),
    Format(
        "mm", "mmpretrain, mmselfsup: MAE pre-training (mae_vit-*_in1k_*.pth) and fine-tuning", (MM_BLOCK,), rename=MM
    ),
    Format(
        "moco-v3",
        "MoCo v3 pre-training (vit-s-300ep.pth.tar, vit-b-300ep.pth.tar): the base encoder",
        (r"base_encoder\." + BLOCK,),
        prefix="base_encoder.",
        drop=r"head\..*",
        heads={384: 12},
    ),
    Format(
        "moco-v3-linprobe",
        "MoCo v3 linear probe",
        (BLOCK, r"head\.weight"),
        under="state_dict",
        beside=frozenset({"arch", "best_acc1"}),
        heads={384: 12},
    ),
    Format(
        "beit-v2",
        "BEiT v2 pre-training",
        (r"blocks\.0\.attn\.q_bias", r"cls_pt_layers\..*"),
        drop=BEIT_DROP,
        pool="avg",
        convert=spread_shared_table,
    ),
    Format(
        "beit",
        "BEiT (beit_base_patch16_224_pt22k.pth, fine-tuned files) and timm's: layer scale, relative positions",
        (r"blocks\.0\.attn\.q_bias",),
        drop=BEIT_DROP,
        normalization=HALF,
        pool="avg",
        convert=spread_shared_table,
    ),
    Format(
        "mae-linprobe",
        "FAIR MAE linear probe (main_linprobe.py)",
        (r"head\.0\.running_mean", r"head\.1\.weight"),
        under="model",
    ),
    Format(
        "mae-training",
        "FAIR MAE pre-training checkpoint (main_pretrain.py: checkpoint-799.pth)",
        FULL,
        under="model",
        beside=frozenset({"optimizer"}),
    ),
    Format("mae-full", "FAIR MAE with its decoder (mae_pretrain_vit_*_full.pth, mae_visualize_vit_*.pth)", FULL),
    Format(
        "dinov2-registers",
        "DINOv2 with registers (dinov2_vitb14_reg4_pretrain.pth; training: the teacher's backbone)",
        (r"(backbone\.)?register_tokens",),
        rename=((r"^backbone\.", ""), *DINOV2),
        drop=r"mask_token|(dino|ibot)_head\..*",
        convert=fold_class_position,
    ),
    Format(
        "dinov2",
        "DINOv2 (dinov2_vitb14_pretrain.pth; training: the teacher's backbone) and timm's",
        (r"(backbone\.)?blocks\.0\.(0\.)?ls1\.gamma",),
        rename=((r"^backbone\.", ""), *DINOV2),
        drop=r"mask_token|(dino|ibot)_head\..*",
    ),
    Format(
        "deit3",
        "DeiT III: layer scale, no position for the class token",
        (BLOCK, r"blocks\.0\.gamma_1"),
        rename=((r"\.gamma_([12])$", r".ls\1.gamma"),),
    ),
    Format(
        "deit-distilled", "DeiT distilled (deit_base_distilled_patch16_224-*.pth) and timm's", (r"dist_token", BLOCK)
    ),
    Format(
        "dino",
        "DINO training checkpoint: the teacher's backbone (or --key student)",
        (r"backbone\." + BLOCK, r"head\.mlp\.0\.weight"),
        prefix="backbone.",
    ),
    Format(
        "npz",
        "Google ViT and AugReg (B_16-*.npz)",
        (r"(.*/)?embedding/kernel", r"(.*/)?Transformer/encoderblock_0/LayerNorm_0/scale"),
        rename=FLAX,
        drop=r"pre_logits\..*",
        normalization=HALF,
        convert=from_flax,
    ),
    Format(
        "detectron2",
        "detectron2: a ViTDet backbone as it starts from MAE",
        (r"backbone\.net\." + BLOCK,),
        prefix="backbone.net.",
    ),
    Format(
        "deit", "DeiT training checkpoint", (BLOCK, r"head\.weight"), under="model", beside=frozenset({"lr_scheduler"})
    ),
    Format(
        "mae-finetuned",
        "FAIR MAE fine-tuned classifier (mae_finetuned_vit_*.pth)",
        (r"fc_norm\.weight", r"head\.weight"),
        under="model",
    ),
    Format(
        "mae-finetuned",
        "FAIR MAE fine-tuned with --cls_token",
        (BLOCK, r"head\.weight"),
        under="model",
        beside=frozenset({"optimizer"}),
    ),
    Format("deit", "DeiT (deit_base_patch16_224-*.pth)", (BLOCK, r"head\.weight"), under="model"),
    Format("mae-pretrain", "FAIR MAE encoder (mae_pretrain_vit_*.pth)", (BLOCK,), under="model"),
    Format("timm", "timm, and DINO's released files: the canonical names as they are", ()),
)
