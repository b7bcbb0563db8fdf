"""Every format gives what its own implementation computes. Names: facebookresearch/{mae,moco-v3,dino,dinov2,deit},
microsoft/unilm (beit), open-mmlab/mmpretrain, huggingface/transformers, timm, google-research/vision_transformer."""

import argparse
import pickle

import pytest
import torch

from mae_core.checkpoint import CheckpointError, classifier_of, load_encoder, read_checkpoint
from mae_core.checkpoint.convert import OURS, PREFIXED
from mae_core.checkpoint.export import save_canonical
from mae_core.checkpoint.formats import FORMATS
from mae_core.data import MEAN
from mae_core.vit import PLAIN, Variant, build_vit
from tests.fixtures import checkpoint as small
from tests.fixtures.checkpoint import HF_DINOV2, PLAIN_VIT, beit, distilled, equal, hf, mm, prefixed, renamed, vit

HALF = (0.5, 0.5, 0.5)
SCALE = {"init_values": 1e-5}
RUN = {"optimizer": {}, "epoch": 3}
PROJECTOR = {"head.0.weight": torch.zeros(4, 128), "head.1.running_mean": torch.zeros(4)}
MIM = {"mask_token": torch.zeros(1, 1, 128), "lm_head.weight": torch.zeros(8, 128)}


def moco(state):
    whole = {**prefixed(state, "base_encoder."), **prefixed(PROJECTOR, "base_encoder.")}
    whole |= {**prefixed(state, "momentum_encoder."), "predictor.0.weight": torch.zeros(4, 4)}
    return {"epoch": 300, "arch": "vit_base", "state_dict": prefixed(whole, "module."), "optimizer": {}}


def shared(state):
    return {"model": {**state, **MIM, "rel_pos_bias.relative_position_index": torch.zeros(37, 37, dtype=torch.long)}}


def beit_v2(state):
    return {"module": {**state, **MIM, "cls_pt_layers.0.norm1.weight": torch.zeros(128)}}


def deit3(state):
    return {"model": renamed(state, (r"ls([12])\.gamma", r"gamma_\1"))}


def dino(state):
    teacher = {**prefixed(state, "backbone."), "head.mlp.0.weight": torch.zeros(4, 4)}
    return {"teacher": teacher, "student": prefixed(teacher, "module."), "args": argparse.Namespace(), **RUN}


def dinov2_training(state):
    chunked = renamed(state, (r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 3}.{m[1]}."))
    return {"teacher": {**prefixed(small.dinov2(chunked), "backbone."), "dino_head.mlp.0.weight": torch.zeros(4, 4)}}


def numpy_pickle(state):
    return pickle.dumps({"model": {f"backbone.net.{n}": t.numpy() for n, t in state.items()}, "__author__": "MAE"})


IMAGENET = (MEAN, 1e-6, "token")
GOOGLE = (HALF, 1e-6, "token")
HUGGING_FACE = (HALF, 1e-12, "token")
AVERAGE = (HALF, 1e-6, "avg")
SCALED, REGISTERS = Variant(layer_scale=True), Variant(4, 0, layer_scale=True)
GIANT, BEIT = Variant(layer_scale=True, swiglu=682), Variant(beit=True)


def hf_model():
    return vit(1e-12)


def scaled():
    return vit(**SCALE)


def registers():
    return vit(**SCALE, reg_tokens=4, no_embed_class=True)


def classifier():
    return vit(num_classes=10)


def model(state):
    return {"model": state}


def hf_registers(state):
    names = (r"^(register_tokens|mask_token)$", r"embeddings.\1")
    return prefixed(renamed(hf(small.dinov2(state), HF_DINOV2), names), "dinov2.")


def hf_mae(state):
    return hf(state, prefix="vit.") | {"decoder.decoder_embed.weight": torch.zeros(32, 128)}


def lightly(state):
    return {"state_dict": prefixed(state, "backbone.vit.") | {"decoder.decoder_blocks.0.norm1.weight": torch.zeros(2)}}


def solo(state):
    return {"state_dict": prefixed(state, "backbone.") | {"projector.0.weight": torch.zeros(2, 2)}, "callbacks": {}}


def case(make, write, name="f.pth", variant=PLAIN, conventions=IMAGENET):
    """Reference model, its file, the file's name, variant, (mean, eps, pool)."""
    return make, write, name, variant, conventions


# By format.
CASES = {
    "mae-pretrain": case(vit, model),
    "timm": case(vit, lambda s: s, "f.safetensors"),
    "timm training": case(vit, lambda s: {"state_dict": prefixed(s, "module._orig_mod."), **RUN}, "f.tar"),
    "hf-vit": case(hf_model, lambda s: hf(s, prefix="vit."), "f.safetensors", PLAIN, HUGGING_FACE),
    "hf-vit bare": case(hf_model, hf, "pytorch_model.bin", PLAIN, HUGGING_FACE),
    "hf-vit new names": case(hf_model, lambda s: hf(s, small.HF_NEW), "f.bin", PLAIN, HUGGING_FACE),
    "hf-vit-mae": case(hf_model, hf_mae, "f.safetensors", PLAIN, (MEAN, 1e-12, "token")),
    "hf-deit": case(
        lambda: distilled(1e-12), lambda s: hf(s, prefix="deit."), "f.bin", Variant(1, 2), (MEAN, 1e-12, "token")
    ),
    "hf-beit": case(lambda: beit(1e-12), small.hf_beit, "f.bin", BEIT, (HALF, 1e-12, "avg")),
    "hf-dinov2": case(scaled, lambda s: hf(s, HF_DINOV2), "f.safetensors", SCALED),
    "hf-dinov2 giant": case(small.swiglu, lambda s: hf(s, small.HF_GIANT), "f.safetensors", GIANT),
    "hf-dinov2-registers": case(registers, hf_registers, "f.safetensors", REGISTERS),
    "mm": case(vit, lambda s: {"meta": {}, "state_dict": mm(s)}),
    "mm older": case(vit, lambda s: {"state_dict": mm(s, (*small.MM, (r"\bln([12])\.", r"norm\1.")))}),
    "moco-v3": case(vit, moco, "f.pth.tar"),
    "beit": case(beit, model, "f.pth", BEIT, AVERAGE),
    "beit shared table": case(
        lambda: beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True), shared, "f.pth", BEIT, AVERAGE
    ),
    "beit-v2": case(beit, beit_v2, "f.pth", BEIT, (MEAN, 1e-6, "avg")),
    "dino": case(vit, dino),
    "dinov2": case(scaled, small.dinov2, variant=SCALED),
    "dinov2 training": case(scaled, dinov2_training, variant=SCALED),
    "dinov2 giant": case(
        small.swiglu, lambda s: renamed(s, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3")), variant=GIANT
    ),
    "dinov2-registers": case(registers, small.dinov2, variant=REGISTERS),
    "dinov2 timm's registers": case(registers, lambda s: s, "f.safetensors", REGISTERS),
    "deit": case(classifier, model),
    "deit-distilled": case(distilled, model, variant=Variant(1, 2)),
    "deit3": case(
        lambda: vit(**SCALE, no_embed_class=True, num_classes=10), deit3, "f.pth", Variant(0, 0, layer_scale=True)
    ),
    "npz": case(classifier, small.flax, "f.npz", PLAIN, GOOGLE),
    "npz optimizer": case(classifier, lambda s: small.flax(s, "opt/target/"), "f.npz", PLAIN, GOOGLE),
    "detectron2": case(vit, lambda s: {"model": prefixed(s, "backbone.net.")}),
    "detectron2 pickle": case(vit, numpy_pickle, "f.pkl"),
    "prefixed": case(vit, solo, "solo.ckpt"),
    "prefixed lightly": case(vit, lightly, "lightly.ckpt"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_of_each_format_computes_what_its_own_model_computes(put, tmp_path, case):
    make, write, name, variant, (mean, eps, pool) = CASES[case]
    reference = make()
    checkpoint = read_checkpoint(put(write(reference.state_dict()), name))
    assert checkpoint.format == case.partition(" ")[0]
    assert (checkpoint.arch, checkpoint.kind, checkpoint.variant) == ("vit_mini_patch8", "encoder", variant)
    assert (checkpoint.mean, checkpoint.std == HALF, checkpoint.eps) == (mean, mean == HALF, eps)
    assert checkpoint.pool == ("token" if checkpoint.classifier else pool)
    assert checkpoint.meta["image_size"] == 48
    model, report = small.loaded(checkpoint)
    assert report.coverage == 100
    small.assert_same_output(model.forward_features, reference.forward_features)
    # And the canonical form gives all of it back, bit for bit.
    save_canonical(checkpoint, tmp_path / "canonical.safetensors")
    again = read_checkpoint(tmp_path / "canonical.safetensors")
    for part in ("encoder", "decoder", "classifier"):
        assert equal(getattr(again, part), getattr(checkpoint, part))
    for value in ("arch", "kind", "variant", "mean", "std", "eps", "pool"):
        assert getattr(again, value) == getattr(checkpoint, value), value


def test_every_format_of_the_table_has_a_case():
    """mae-*: test_read.py."""
    names = {f.name for f in (*FORMATS, PREFIXED) if not f.name.startswith("mae-")} - {OURS.name}
    tested = {case.partition(" ")[0] for case in CASES}
    assert names - tested == {"mm-linprobe", "moco-v3-linprobe"}  # below


CLASSIFIERS = {
    "deit": (classifier, model, "f.pth"),
    "deit-distilled": (distilled, model, "f.pth"),
    "mae-finetuned": (lambda: vit(num_classes=10, global_pool="avg"), model, "f.pth"),
    "beit": (lambda: beit(num_classes=10, global_pool="avg"), model, "f.pth"),
    "npz": (classifier, small.flax, "f.npz"),
    "hf-vit": (
        lambda: vit(1e-12, num_classes=10),
        lambda s: renamed(hf(s, prefix="vit."), (r"^vit\.head\.", "classifier.")),
        "f.safetensors",
    ),
    "mm": (
        lambda: vit(num_classes=10, global_pool="avg"),
        lambda s: {"state_dict": renamed(mm(s), (r"^backbone\.head\.", "head.layers.head."))},
        "f.pth",
    ),
    "moco-v3-linprobe": (
        classifier,
        lambda s: {"state_dict": prefixed(s, "module."), "arch": "vit_base", "best_acc1": 76.7},
        "f.pth.tar",
    ),
}


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_head_computes_the_logits_of_its_own_model(put, case):
    make, write, name = CLASSIFIERS[case]
    reference = make()
    checkpoint = read_checkpoint(put(write(reference.state_dict()), name))
    assert checkpoint.format == case
    small.assert_same_output(classifier_of(checkpoint), reference)


def test_mmpretrains_probe_keeps_its_batchnorm_apart(put):
    probe = small.tensors({"head.0.running_mean": [128], "head.1.weight": [10, 128], "head.1.bias": [10]})
    named = renamed(probe, (r"^head\.0\.", "neck.bn."), (r"^head\.1\.", "head.fc."))
    checkpoint = read_checkpoint(put({"state_dict": {**mm(PLAIN_VIT), **named}}))
    assert (checkpoint.format, checkpoint.kind) == ("mm-linprobe", "linear-probe")
    assert equal(checkpoint.classifier, probe)


def test_a_head_over_more_than_one_token_is_dropped(put):
    """DINOv2's classifies class token and average together."""
    state = {**hf(vit(**SCALE).state_dict(), HF_DINOV2), "classifier.weight": torch.zeros(10, 256)}
    checkpoint = read_checkpoint(put(state, "f.safetensors"))
    assert (checkpoint.classifier, checkpoint.dropped) == ({}, ("classifier.weight",))


def test_the_position_of_dinov2s_class_token_is_not_lost(put):
    reference = registers()
    state = small.dinov2(reference.state_dict())
    state["pos_embed"] = torch.cat([torch.full((1, 1, 128), 0.3), state["pos_embed"][:, 1:]], dim=1)
    model, report = small.loaded(read_checkpoint(put(state)))
    with torch.no_grad():
        reference.cls_token += 0.3
    small.assert_same_output(model.forward_features, reference.forward_features)
    assert set(report.converted) == {"cls_token", "pos_embed", "reg_token"}


# What travels with the weights


def test_the_number_of_heads_comes_from_the_format_or_the_config(put, tmp_path):
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_vit("vit_small_patch16").state_dict().items()}
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}  # the same for 6 and 12 heads
    assert read_checkpoint(put({"model": state})).arch == "vit_small_patch16"
    mocos = put(moco(state), "moco.pth.tar")
    assert read_checkpoint(mocos).arch == "vit_small_patch16_heads12"
    assert read_checkpoint(mocos, key="momentum_encoder").arch == "vit_small_patch16_heads12"
    config = {"num_attention_heads": 12}
    assert read_checkpoint(small.folder(tmp_path / "h", hf(state), config)).arch == "vit_small_patch16_heads12"
    with pytest.raises(CheckpointError, match=r"8 attention heads, where .* has: vit_small_patch16 6, .*heads12 12"):
        read_checkpoint(small.folder(tmp_path / "h", hf(state), {"num_attention_heads": 8}))
    # The canonical form remembers it, and a model of the other number is refused.
    checkpoint = read_checkpoint(mocos)
    save_canonical(checkpoint, tmp_path / "c.safetensors")
    assert read_checkpoint(tmp_path / "c.safetensors").arch == "vit_small_patch16_heads12"
    with torch.device("meta"), pytest.raises(CheckpointError, match="12 attention heads, the model 6"):
        load_encoder(build_vit("vit_small_patch16"), checkpoint)


def test_googles_imagenet_21k_head_tells_the_normalization(put):
    state = {**PLAIN_VIT, "head.weight": torch.zeros(21843, 128), "head.bias": torch.zeros(21843)}
    assert read_checkpoint(put(state, "f.safetensors")).normalization == (HALF, HALF)


# Several models in one file


def test_several_models_are_refused_without_a_key(put):
    other = vit(reg_tokens=1).state_dict()
    for content, named in (
        ({"model": PLAIN_VIT, "model_ema": PLAIN_VIT}, "model and model_ema"),
        ({"state_dict": PLAIN_VIT, "state_dict_ema": PLAIN_VIT}, "state_dict and state_dict_ema"),
        ({"state_dict": {**prefixed(PLAIN_VIT, "backbone."), **prefixed(other, "momentum_backbone.")}}, "backbone and"),
    ):
        with pytest.raises(CheckpointError, match=f"holds 2 models, {named}.*--key NAME --convert"):
            read_checkpoint(put(content))


def test_a_key_chooses_a_model(put):
    shifted = {name: tensor + 1 for name, tensor in PLAIN_VIT.items()}
    content = {"model": PLAIN_VIT, "model_ema": prefixed(shifted, "module.")}
    assert equal(read_checkpoint(put(content), key="model").encoder, PLAIN_VIT)
    chosen = read_checkpoint(put(content), key="model_ema")
    assert equal(chosen.encoder, shifted)
    assert chosen.dropped == ("model.*",)
    two = {"state_dict": {**prefixed(PLAIN_VIT, "online.vit."), **prefixed(shifted, "target.vit.")}}
    assert equal(read_checkpoint(put(two), key="target.vit").encoder, shifted)
    assert equal(read_checkpoint(put(dino(PLAIN_VIT)), key="student").encoder, PLAIN_VIT)
    assert equal(read_checkpoint(put(two), key="target").encoder, shifted)
    teacher, student = prefixed(dino(PLAIN_VIT)["teacher"], "teacher."), prefixed(shifted, "student.module.")
    wrapped = {"state_dict": {**teacher, **student}}
    assert equal(read_checkpoint(put(wrapped), key="teacher").encoder, PLAIN_VIT)
    assert equal(read_checkpoint(put(wrapped), key="student").encoder, shifted)
    with pytest.raises(CheckpointError, match="no model under 'onlin'; did you mean online"):
        read_checkpoint(put(two), key="onlin")
    with pytest.raises(CheckpointError, match="'optimizer' is no model; the models are model"):
        read_checkpoint(put({"model": PLAIN_VIT, "optimizer": {}}), key="optimizer")


# Refusals


def test_an_incomplete_or_turned_file_of_another_format_is_refused(put):
    complete, layers = hf(PLAIN_VIT, prefix="vit."), "vit.encoder.layer."
    query, fc1 = f"{layers}2.attention.attention.query.weight", f"{layers}0.intermediate.dense.weight"
    projection = "vit.embeddings.patch_embeddings.projection.weight"
    for state, message in (
        (small.without(complete, f"{layers}3."), "no blocks.3.norm1.weight"),
        (small.without(complete, query), "no blocks.2.attn.qkv.weight"),
        ({**complete, fc1: torch.zeros(128, 512)}, r"blocks.0.mlp.fc1.weight is \[128, 512\]"),
        ({**complete, query: torch.zeros(128, 64)}, "no blocks.2.attn.qkv.weight"),
        ({**complete, projection: torch.zeros(128, 3, 12, 12)}, "unknown size, width/depth/patch 128/6/12"),
        ({**complete, f"{layers}0.attention.q_norm.weight": torch.zeros(32)}, "which vit_mini_patch8 does not have"),
        ({**complete, "layernorm.weight": torch.zeros(128)}, "both layernorm.weight and vit.layernorm.weight"),
    ):
        with pytest.raises(CheckpointError, match=message) as error:
            read_checkpoint(put(state, "f.safetensors"))
        assert "\n" not in str(error.value)


def test_half_a_table_of_relative_positions_is_refused(put):
    state = beit().state_dict()
    table = "blocks.3.attn.relative_position_bias_table"
    with pytest.raises(CheckpointError, match=f"no {table}"):
        read_checkpoint(put({"model": small.without(state, table)}))
    with pytest.raises(CheckpointError, match=rf"{table} is \[120, 4\] where vit_mini_patch8 has \[124, 4\]"):
        read_checkpoint(put({"model": {**state, table: state[table][:120]}}))


def test_a_trained_detector_is_named(put):
    state = {**PLAIN_VIT, "blocks.0.attn.rel_pos_h": torch.zeros(27, 32)}
    with pytest.raises(CheckpointError, match="trained ViTDet detector"):
        read_checkpoint(put({"model": prefixed(state, "backbone.net.")}))


def test_a_convolutional_stem_is_named(put):
    state = small.without(PLAIN_VIT, "patch_embed")
    state["patch_embed.proj.0.weight"] = torch.zeros(16, 3, 3, 3)
    with pytest.raises(CheckpointError, match=r"no patch_embed\.proj\.weight"):
        read_checkpoint(put(moco(state), "f.tar"))
