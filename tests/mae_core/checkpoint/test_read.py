import hashlib

import pytest
import torch

from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import CheckpointError, read_checkpoint, save_weights
from tests.fixtures.checkpoint import ARGS, DECODER, ENCODER, FC_NORM, HEAD, PROBE, RUN, TRUNK, equal


@pytest.mark.parametrize(
    ("content", "name", "format", "kind", "decoder", "classifier"),
    [
        ({"model": ENCODER}, "mae_pretrain.pth", "mae-pretrain", "encoder", {}, {}),
        ({"model": {**ENCODER, **DECODER}}, "visualize.pth", "mae-full", "encoder", DECODER, {}),
        ({"model": {**ENCODER, **DECODER}, "args": ARGS, **RUN}, "ck.pth", "mae-training", "encoder", DECODER, {}),
        ({"model": {**TRUNK, **FC_NORM, **HEAD}}, "ft.pth", "mae-finetuned", "classifier", {}, {**FC_NORM, **HEAD}),
        ({"model": {**ENCODER, **HEAD}, "args": ARGS, **RUN}, "cls.pth", "mae-finetuned", "classifier", {}, HEAD),
        ({"model": {**ENCODER, **PROBE}}, "probe.pth", "mae-linprobe", "linear-probe", {}, PROBE),
        (ENCODER, "model.safetensors", "timm", "encoder", {}, {}),
        (ENCODER, "pytorch_model.bin", "timm", "encoder", {}, {}),
        ({**ENCODER, **HEAD}, "augreg.safetensors", "timm", "encoder", {}, HEAD),
        ({**TRUNK, **FC_NORM, **HEAD}, "avg.safetensors", "timm", "classifier", {}, {**FC_NORM, **HEAD}),
        ({"state_dict": {f"module.{k}": v for k, v in ENCODER.items()}}, "ddp.pth.tar", "timm", "encoder", {}, {}),
        ({f"_orig_mod.module.{k}": v for k, v in ENCODER.items()}, "compiled.pth", "timm", "encoder", {}, {}),
    ],
)
def test_every_format_is_recognised_and_read_bit_by_bit(put, content, name, format, kind, decoder, classifier):
    path = put(content, name)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.format, checkpoint.kind, checkpoint.arch) == (format, kind, "vit_mini_patch8")
    assert equal(checkpoint.encoder, TRUNK if "fc_norm.weight" in classifier else ENCODER)
    assert equal(checkpoint.decoder, decoder)
    assert equal(checkpoint.classifier, classifier)
    assert checkpoint.dropped == ()
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert checkpoint.path == str(path)
    assert checkpoint.name == name.partition(".")[0]
    assert checkpoint.meta["image_size"] == 48


def test_a_training_checkpoint_says_how_long_and_on_which_target_it_trained(put):
    content = {"model": {**ENCODER, **DECODER}, "args": ARGS, **RUN}
    expected = {"image_size": 48, "epochs": 800, "norm_pix": True, "epochs_done": 400}
    assert read_checkpoint(put(content)).meta == expected
    # The arguments of a fine-tuning say nothing about the pre-training.
    assert read_checkpoint(put({"model": {**ENCODER, **HEAD}, "args": ARGS, **RUN})).meta == {"image_size": 48}


def test_our_own_files_are_read(tmp_path, put):
    model = MaskedAutoencoder("vit_mini_patch8", decoder_dim=32, decoder_depth=1, decoder_heads=2)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    path = tmp_path / "mae.safetensors"
    save_weights(path, state, {"epochs": "100", "norm_pix": "false"})
    training = {
        "format": "mae-transfer training",
        "model": state,
        "optimizer": {},
        "state": {"step": 7},
        "fixed": {"arch": "vit_mini_patch8", "recipe": {"epochs": 100, "norm_pix": False, "betas": [0.9, 0.95]}},
    }
    for file, meta in (
        (path, {"epochs": 100, "norm_pix": False, "image_size": 48}),
        (put(training), {"epochs_planned": 100, "steps_done": 7, "norm_pix": False, "image_size": 48}),
    ):
        checkpoint = read_checkpoint(file)
        assert (checkpoint.format, checkpoint.kind, checkpoint.meta) == ("ours", "encoder", meta)
        assert equal({**checkpoint.encoder, **checkpoint.decoder}, state)


def test_random_weights_change_with_the_seed_and_keep_their_identity():
    state = torch.get_rng_state()
    first, again, other = (read_checkpoint("random:vit_mini_patch8", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(first.encoder, again.encoder)
    assert not torch.equal(first.encoder["cls_token"], other.encoder["cls_token"])
    assert first.sha256 == other.sha256 == hashlib.sha256(b"random:vit_mini_patch8").hexdigest()
    assert (first.name, first.format, first.kind) == ("random:vit_mini_patch8", "random", "encoder")
    with pytest.raises(CheckpointError, match="did you mean vit_base_patch16"):
        read_checkpoint("random:vit_base_patch61")


def test_what_belongs_to_no_part_is_listed_as_dropped(put):
    state = {**ENCODER, "mask_token": torch.zeros(1, 128), "ibot_head.weight": torch.zeros(3), "epoch": 3}
    checkpoint = read_checkpoint(put(state))
    assert sorted(checkpoint.dropped) == ["epoch", "ibot_head.weight", "mask_token"]
    assert checkpoint.decoder == {}
