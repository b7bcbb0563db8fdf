"""Small models of every kind by timm, and their weights under each format's names, written out here by hand: names are
facts about files, taken from the projects named in tests/test_formats.py."""

import re
from functools import partial

import numpy as np
import torch
from timm.layers import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn

SIZE = {"img_size": 48, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
RELATIVE = {"init_values": 0.1, "use_abs_pos_emb": False}


def shaken(model):
    """With weights that a training would have moved: no zero bias, no unit norm, so that swapping any two shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def vit(eps=1e-6, **options):
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=eps)
    return shaken(VisionTransformer(**{**SIZE, "num_classes": 0, "norm_layer": norm, **options}))


def distilled(eps=1e-6):
    torch.manual_seed(0)
    return shaken(VisionTransformerDistilled(**SIZE, num_classes=10, norm_layer=partial(nn.LayerNorm, eps=eps)))


def beit(eps=1e-6, **options):
    torch.manual_seed(0)
    norm = partial(nn.LayerNorm, eps=eps)
    options = {"num_classes": 0, "use_rel_pos_bias": True, "global_pool": "token", **options}
    return shaken(Beit(**SIZE, **RELATIVE, norm_layer=norm, **options))


def swiglu():
    return vit(init_values=1e-5, mlp_ratio=2.66667 * 2, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU)


def renamed(state, *rules):
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def split_qkv(state):
    found = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3)):
                found[name.replace("qkv", part)] = piece.clone()
        else:
            found[name] = tensor
    return found


HF_TOP = (
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^dist_token$", "embeddings.distillation_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
    (r"^norm\.", "layernorm."),
)
HF_OLD = (
    (r"^blocks\.", "encoder.layer."),
    (r"attn\.(query|key|value)", r"attention.attention.\1"),
    (r"attn\.proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"(\d)\.norm1", r"\1.layernorm_before"),
    (r"(\d)\.norm2", r"\1.layernorm_after"),
)
HF_NEW = (
    (r"^blocks\.", "layers."),
    (r"attn\.(q|k|v)[a-z]+\.", r"attention.\1_proj."),
    (r"attn\.proj", "attention.o_proj"),
    (r"(\d)\.norm1", r"\1.layernorm_before"),
    (r"(\d)\.norm2", r"\1.layernorm_after"),
)
HF_DINOV2 = (
    (r"^blocks\.", "encoder.layer."),
    (r"attn\.(query|key|value)", r"attention.attention.\1"),
    (r"attn\.proj", "attention.output.dense"),
    (r"ls([12])\.gamma", r"layer_scale\1.lambda1"),
)
HF_SWIGLU = ((r"mlp\.fc1", "mlp.weights_in"), (r"mlp\.fc2", "mlp.weights_out"))


def hf(state, rules=HF_OLD, prefix=""):
    return prefixed(renamed(split_qkv(state), *HF_TOP, *rules), prefix)


def hf_beit(state, prefix="beit."):
    """The keys have no bias; the relative positions belong to the attention."""
    state = dict(state)
    for name in [n for n in state if n.endswith(("q_bias", "v_bias"))]:
        state[name.replace("q_bias", "query.bias").replace("v_bias", "value.bias")] = state.pop(name)
    found = renamed(
        split_qkv(state),
        *HF_TOP,
        (r"attn\.relative_position", "attention.attention.relative_position_bias.relative_position"),
        *HF_OLD,
        (r"gamma_", "lambda_"),
    )
    return prefixed(found, prefix)


MM = (
    (r"^patch_embed\.proj", "patch_embed.projection"),
    (r"^blocks\.", "layers."),
    (r"(\d)\.norm([12])", r"\1.ln\2"),
    (r"mlp\.fc1", "ffn.layers.0.0"),
    (r"mlp\.fc2", "ffn.layers.1"),
    (r"^norm\.", "ln1."),
    (r"^fc_norm\.", "ln2."),
)


def mm(state, rules=MM):
    return prefixed(renamed(state, *rules), "backbone.")


def dinov2(state):
    """With registers the class token's position stands in the file; here it is zero, so that the sum is the token."""
    state = renamed(state, (r"^reg_token$", "register_tokens"))
    if "register_tokens" in state:
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 128), state["pos_embed"]], dim=1)
    return {**state, "mask_token": torch.zeros(1, 128)}


def flax(state, prefix=""):
    """Kernels of Flax: convolutions HWIO, dense [in, out], attention [D, heads, D / heads] and back."""
    s = {name: tensor.numpy() for name, tensor in state.items()}
    found = {
        "cls": s["cls_token"],
        "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": s["pos_embed"],
        "Transformer/encoder_norm/scale": s["norm.weight"],
        "Transformer/encoder_norm/bias": s["norm.bias"],
        "head/kernel": s["head.weight"].T,
        "head/bias": s["head.bias"],
    }
    for i in range(6):
        to, attention = f"Transformer/encoderblock_{i}", "MultiHeadDotProductAttention_1"
        weights, biases = (np.split(s[f"blocks.{i}.attn.qkv.{kind}"], 3) for kind in ("weight", "bias"))
        for part, weight, bias in zip(("query", "key", "value"), weights, biases):
            found[f"{to}/{attention}/{part}/kernel"] = weight.T.reshape(128, 4, 32)
            found[f"{to}/{attention}/{part}/bias"] = bias.reshape(4, 32)
        found[f"{to}/{attention}/out/kernel"] = s[f"blocks.{i}.attn.proj.weight"].T.reshape(4, 32, 128)
        found[f"{to}/{attention}/out/bias"] = s[f"blocks.{i}.attn.proj.bias"]
        for norm, ours in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            found[f"{to}/{norm}/scale"] = s[f"blocks.{i}.{ours}.weight"]
            found[f"{to}/{norm}/bias"] = s[f"blocks.{i}.{ours}.bias"]
        for dense, ours in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            found[f"{to}/MlpBlock_3/{dense}/kernel"] = s[f"blocks.{i}.mlp.{ours}.weight"].T
            found[f"{to}/MlpBlock_3/{dense}/bias"] = s[f"blocks.{i}.mlp.{ours}.bias"]
    return prefixed(found, prefix)
