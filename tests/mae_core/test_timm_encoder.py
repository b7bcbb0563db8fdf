"""Encoders that timm builds: their features are timm's own, they load strictly, and tasks run on them."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from mae_core.checkpoint import (
    CheckpointError,
    load_classifier,
    load_encoder,
    metadata_of,
    model_of,
    read_checkpoint,
    save_weights,
)
from mae_core.checkpoint.export import export, save_canonical
from mae_core.errors import UserError
from mae_core.optim import layer_decay_groups
from mae_core.timm_encoder import TimmEncoder
from mae_core.vit import build_vit, get_arch

# Rotary positions with their own norm after pooling; rotary positions and registers; several stages; a norm before the
# blocks; no class token and an attention pooling.
EVA, DINOV3, HIERA = "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "hiera_tiny_224"
CLIP, SIGLIP = "vit_base_patch32_clip_224", "vit_base_patch16_siglip_224"
SMALL = (EVA, DINOV3, HIERA)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> a folder as timm's are on the Hugging Face hub, with random weights."""

    def make(name: str):
        folder = tmp_path_factory.getbasetemp() / "timm" / name
        if not folder.exists():
            folder.mkdir(parents=True)
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=7)
            for parameter in model.parameters():
                if parameter.ndim < 2:  # norms and biases begin alike
                    torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
            config = {"architecture": name, "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
            (folder / "config.json").write_text(json.dumps(config))
            save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
        return folder

    return make


def timms(name: str, folder, side: int):
    """timm's own model with the folder's weights, at another input size resized by timm."""
    model = timm.create_model(
        name,
        img_size=side,
        num_classes=7,
        pretrained=True,
        pretrained_cfg_overlay={"file": folder / "model.safetensors"},
    )
    return model.eval()


@pytest.mark.parametrize("name", [EVA, DINOV3])
@pytest.mark.parametrize("patches", [None, 3])
def test_the_features_are_timms(folders, name, patches):
    """At the size of the pre-training and at another one."""
    checkpoint = read_checkpoint(folders(name))
    side = patches * get_arch(checkpoint.arch).patch if patches else checkpoint.meta["image_size"]
    encoder = model_of(checkpoint, side).eval()
    report = load_encoder(encoder, checkpoint)
    assert (report.coverage, report.missing) == (100, ())
    model, images = timms(name, folders(name), side), torch.randn(1, 3, side, side)
    with torch.no_grad():
        tokens = model.forward_features(images)
        torch.testing.assert_close(encoder.net.forward_features(images), tokens)
        # What timm pools by the mean of the patch tokens, where its norm comes before.
        pooled = encoder.forward_features(images)[:, encoder.num_prefix_tokens :].mean(dim=1)
        if name == DINOV3:
            torch.testing.assert_close(pooled, model.forward_head(tokens, pre_logits=True))
    assert checkpoint.normalization == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_hieras_head_norms_what_it_has_pooled(folders):
    """The mean of normed tokens is not the norm of their mean; the norm itself is timm's."""
    checkpoint = read_checkpoint(folders(HIERA))
    encoder = model_of(checkpoint, 64).eval()
    assert "net.pos_embed" in load_encoder(encoder, checkpoint).resized
    with torch.no_grad():
        tokens = encoder.forward_features(images := torch.randn(1, 3, 64, 64))
        raw = encoder.net.forward_features(images)
        torch.testing.assert_close(tokens[:, 1:], torch.nn.functional.layer_norm(
            raw, raw.shape[-1:], encoder.net.head.norm.weight, encoder.net.head.norm.bias, encoder.net.head.norm.eps
        ))  # fmt: skip
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1:].mean(dim=1))


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_end_with_the_features(name):
    torch.manual_seed(0)
    encoder = build_vit(f"timm/{name}", 2 * get_arch(f"timm/{name}").patch).eval()
    images = torch.randn(1, 3, *[2 * get_arch(f"timm/{name}").patch] * 2)
    with torch.no_grad():
        ((patches, prefix),) = encoder.forward_intermediates(images, norm=True)
        expected = encoder.forward_features(images)
    torch.testing.assert_close(torch.cat([prefix, patches], dim=1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [CLIP, SIGLIP])
def test_norms_before_the_blocks_and_no_class_token(folders, name):
    checkpoint = read_checkpoint(folders(name))
    encoder, model = model_of(checkpoint, 64).eval(), timms(name, folders(name), 64)
    load_encoder(encoder, checkpoint)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens, expected = encoder.forward_features(images), model.forward_features(images)
    torch.testing.assert_close(tokens if name == CLIP else tokens[:, 1:], expected)
    assert checkpoint.pool == ("token" if name == CLIP else "avg")
    assert any(part.startswith("attn_pool") for part in checkpoint.dropped) == (name == SIGLIP)


def test_a_fine_tuned_one_is_read_back(folders, tmp_path):
    checkpoint = read_checkpoint(folders(EVA))
    model = model_of(checkpoint, 28, num_classes=3, pool="avg")
    load_encoder(model, checkpoint)
    state = model.state_dict()
    metadata = {"arch": checkpoint.arch, "kind": "classifier", "image_size": "28"}
    save_weights(tmp_path / "c.safetensors", state, metadata | metadata_of(checkpoint, "avg", state))
    again = read_checkpoint(tmp_path / "c.safetensors")
    assert (again.kind, again.arch, again.pool, again.meta["image_size"]) == ("classifier", checkpoint.arch, "avg", 28)
    assert again.normalization == checkpoint.normalization
    other = model_of(again, 28, 3, "avg")
    load_classifier(other, again)
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_every_parameter_is_in_one_group_and_the_head_has_the_whole_rate():
    model = build_vit(f"timm/{EVA}", 28, num_classes=3)
    groups = layer_decay_groups(model, 0.05, 0.5)
    found = [p for group in groups for p in group["params"]]
    assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))
    scale = {id(p): group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert scale[id(model.head.weight)] == 1
    first, last = (scale[id(model.net.blocks[i].mlp.fc1.weight)] for i in (0, 11))
    assert first == pytest.approx(last * 0.5**11)


def test_what_is_incomplete_or_unknown_is_refused(folders, tmp_path):
    state = dict(read_checkpoint(folders(EVA)).encoder)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": EVA}))
    del state["net.blocks.3.norm1.weight"]
    save_file({n.removeprefix("net."): t for n, t in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no net\.blocks\.3\.norm1\.weight"):
        read_checkpoint(tmp_path)
    for name in ("resnet18", "vit_none"):
        with pytest.raises(UserError, match=f"timm has no encoder '{name}'"):
            get_arch(f"timm/{name}")
    whole = read_checkpoint(folders(EVA))
    with pytest.raises(CheckpointError, match="timm's already"):
        export(whole, "timm", tmp_path / "out.safetensors")


def test_the_canonical_form_gives_it_back(folders, tmp_path):
    checkpoint = read_checkpoint(folders(EVA))
    save_canonical(checkpoint, tmp_path / "eva.safetensors")
    again = read_checkpoint(tmp_path / "eva.safetensors")
    assert (again.arch, again.kind, again.pool) == (checkpoint.arch, "encoder", "token")
    assert again.encoder.keys() == checkpoint.encoder.keys()
    assert all(torch.equal(tensor, checkpoint.encoder[name]) for name, tensor in again.encoder.items())


def test_random_weights_of_an_architecture():
    one, other = (read_checkpoint(f"random:timm/{EVA}", seed) for seed in (0, 1))
    assert one.arch == f"timm/{EVA}"
    assert not torch.equal(one.encoder["net.patch_embed.proj.weight"], other.encoder["net.patch_embed.proj.weight"])
    assert isinstance(model_of(one), TimmEncoder)


def test_blocks_of_several_stages_are_refused():
    encoder = build_vit(f"timm/{HIERA}", 64).eval()
    with pytest.raises(UserError, match="the blocks that this task reads lie in several stages of this encoder"):
        encoder.forward_intermediates(torch.randn(1, 3, 64, 64), 4)
