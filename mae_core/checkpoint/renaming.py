"""Other projects' tensor names and layouts -> timm's: rules for names and, where renaming is not enough, functions that
change tensors and sources in place."""

import re

from torch import Tensor

Rules = tuple[tuple[str, str], ...]  # (pattern, replacement), all applied to every name in this order
Sources = dict[str, tuple[str, ...]]  # name -> the names in the file that it was made of
SHARED = "rel_pos_bias.relative_position_bias_table"

# Hugging Face transformers, both generations of names: files have the older (encoder.layer.0.attention.attention.
# query), modules since version 5 the newer (layers.0.attention.q_proj).
HF: Rules = (
    (r"^(vit|deit|beit|dinov2|dinov2_with_registers)\.", ""),
    (r"^decoder\.mask_token$", "mask_token"),
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.(\d+)\.", r"decoder_blocks.\2."),
    (r"^decoder\.decoder_", "decoder_"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"(blocks\.\d+\.)attention\.(attention\.)?(query|q_proj)\.", r"\1attn.q."),
    (r"(blocks\.\d+\.)attention\.(attention\.)?(key|k_proj)\.", r"\1attn.k."),
    (r"(blocks\.\d+\.)attention\.(attention\.)?(value|v_proj)\.", r"\1attn.v."),
    (r"(blocks\.\d+\.)attention\.(output\.dense|o_proj)\.", r"\1attn.proj."),
    (r"(blocks\.\d+\.)(attention\.attention\.)?relative_position_bias\.", r"\1attn."),
    (r"(blocks\.\d+\.)layernorm_before\.", r"\1norm1."),
    (r"(blocks\.\d+\.)layernorm_after\.", r"\1norm2."),
    (r"(blocks\.\d+\.)(intermediate\.dense|mlp\.weights_in)\.", r"\1mlp.fc1."),
    (r"(blocks\.\d+\.)(output\.dense|mlp\.weights_out)\.", r"\1mlp.fc2."),
    (r"(blocks\.\d+\.)lambda_([12])$", r"\1gamma_\2"),
    (r"(blocks\.\d+\.)layer_scale([12])\.lambda1$", r"\1ls\2.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)

# mmpretrain and mmselfsup: the final norm is ln1 (norm1 in older files), that of average pooling ln2.
MM: Rules = (
    (r"^neck\.(ln|norm)1\.", "decoder_norm."),
    (r"^(backbone|neck)\.", ""),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^layers\.(\d+)\.", r"blocks.\1."),
    (r"(blocks\.\d+\.)(ln|norm)([12])\.", r"\1norm\3."),
    (r"(blocks\.\d+\.)ffn\.layers\.0\.0\.", r"\1mlp.fc1."),
    (r"(blocks\.\d+\.)ffn\.layers\.1\.", r"\1mlp.fc2."),
    (r"^(ln|norm)1\.", "norm."),
    (r"^(ln|norm)2\.", "fc_norm."),
    (r"^head\.(layers\.head|fc)\.", "head."),
)

DINOV2: Rules = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks of FSDP training keep the block's own number
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)

# Flax: kernels are transposed by `from_flax`.
FLAX: Rules = (
    (r"^(opt/target/|params/(img/)?)", ""),
    (r"^cls$", "cls_token"),
    (r"^embedding/", "patch_embed/proj/"),
    (r"^Transformer/posembed_input/pos_embedding$", "pos_embed"),
    (r"^Transformer/encoder_norm/", "norm/"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks/\1/"),
    (r"MultiHeadDotProductAttention_\d+/(q|k|v)\w+/", r"attn/\1/"),
    (r"MultiHeadDotProductAttention_\d+/out/", "attn/proj/"),
    (r"LayerNorm_0/", "norm1/"),
    (r"LayerNorm_2/", "norm2/"),
    (r"MlpBlock_\d+/Dense_0/", "mlp/fc1/"),
    (r"MlpBlock_\d+/Dense_1/", "mlp/fc2/"),
    (r"/(kernel|scale)$", "/weight"),
    (r"/", "."),
)


def from_flax(tensors: dict[str, Tensor], sources: Sources) -> None:
    """Flax's layouts -> torch's: convolutions HWIO -> OIHW, dense [in, out] -> [out, in], heads flattened."""
    for name, tensor in list(tensors.items()):
        if name == "patch_embed.proj.weight":
            tensor = tensor.permute(3, 2, 0, 1)
        elif re.search(r"attn\.[qkv]\.weight$", name):
            tensor = tensor.flatten(1).t()  # [D, heads, D / heads]
        elif name.endswith("attn.proj.weight"):
            tensor = tensor.flatten(0, 1).t()  # [heads, D / heads, D]
        elif re.search(r"attn\.[qkv]\.bias$", name):
            tensor = tensor.flatten()
        elif name.endswith(".weight") and tensor.ndim == 2:
            tensor = tensor.t()
        tensors[name] = tensor


def fold_class_position(tensors: dict[str, Tensor], sources: Sources) -> None:
    """DINOv2 adds the class token's position before it inserts the registers, which have none. As in timm's files, the
    class token becomes the sum."""
    tensors["reg_token"], sources["reg_token"] = tensors.pop("register_tokens"), sources.pop("register_tokens")
    positions = tensors["pos_embed"]
    if tensors["cls_token"].shape != positions[:, :1].shape:  # they would be broadcast
        raise ValueError("cls_token")
    tensors["cls_token"], tensors["pos_embed"] = tensors["cls_token"] + positions[:, :1], positions[:, 1:]
    sources["cls_token"] += (f"{sources['pos_embed'][0]}[:, 0]",)
    sources["pos_embed"] = (f"{sources['pos_embed'][0]}[:, 1:]",)


def spread_shared_table(tensors: dict[str, Tensor], sources: Sources) -> None:
    """BEiT pre-trains with one table of relative positions for all blocks; each block gets a copy, as in BEiT's own
    fine-tuning."""
    if SHARED not in tensors:
        return
    table, of = tensors.pop(SHARED), sources.pop(SHARED)
    for block in sorted({match[0] for name in tensors if (match := re.match(r"blocks\.\d+\.", name))}):
        tensors[f"{block}attn.relative_position_bias_table"] = table
        sources[f"{block}attn.relative_position_bias_table"] = of
