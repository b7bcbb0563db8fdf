import argparse
import dataclasses
import hashlib
import os
import pickle
import random
import subprocess
import sys
import tarfile
import types
import zipfile
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import (
    CheckpointError,
    load_classifier,
    load_encoder,
    read_checkpoint,
    save_weights,
    weights_file,
)
from mae_core.checkpoint.__main__ import main
from mae_core.checkpoint.identify import resize_position_embedding
from mae_core.vit import build_vit
from tests.fixtures import ROOT
from tests.fixtures.checkpoint import hf


# State dicts as the released files hold them, written out here and not taken from a model: names and shapes are facts
# about files (facebookresearch/mae models_mae.py, models_vit.py).
def shapes(dim=128, depth=6, patch=8, grid=6):
    blocks = {
        "norm1.weight": [dim],
        "norm1.bias": [dim],
        "attn.qkv.weight": [3 * dim, dim],
        "attn.qkv.bias": [3 * dim],
        "attn.proj.weight": [dim, dim],
        "attn.proj.bias": [dim],
        "norm2.weight": [dim],
        "norm2.bias": [dim],
        "mlp.fc1.weight": [4 * dim, dim],
        "mlp.fc1.bias": [4 * dim],
        "mlp.fc2.weight": [dim, 4 * dim],
        "mlp.fc2.bias": [dim],
    }
    return {
        "cls_token": [1, 1, dim],
        "pos_embed": [1, 1 + grid * grid, dim],
        "patch_embed.proj.weight": [dim, 3, patch, patch],
        "patch_embed.proj.bias": [dim],
        **{f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in blocks.items()},
        "norm.weight": [dim],
        "norm.bias": [dim],
    }


def tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


ENCODER = tensors(shapes())
DECODER = tensors(
    {
        "mask_token": [1, 1, 96],
        "decoder_pos_embed": [1, 37, 96],
        "decoder_embed.weight": [96, 128],
        "decoder_embed.bias": [96],
        "decoder_blocks.0.norm1.weight": [96],
        "decoder_norm.weight": [96],
        "decoder_pred.weight": [192, 96],
    },
    seed=1,
)
HEAD = tensors({"head.weight": [10, 128], "head.bias": [10]}, seed=2)
FC_NORM = tensors({"fc_norm.weight": [128], "fc_norm.bias": [128]}, seed=3)
PROBE = {
    **tensors({"head.0.running_mean": [128], "head.0.running_var": [128], "head.1.weight": [10, 128]}, seed=4),
    "head.0.num_batches_tracked": torch.tensor(7),
}
TRUNK = {name: tensor for name, tensor in ENCODER.items() if not name.startswith("norm.")}
ARGS = argparse.Namespace(epochs=800, norm_pix_loss=True, output_dir=Path("/jobs/1"), lr=None)
RUN = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "epoch": 399, "scaler": {"scale": 65536.0}}


def without(state, *prefixes):
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def put(tmp_path):
    """Write a value as a file in a given way and return its path."""

    def write(content, name="file.pth", **options):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(content, path, **options)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path, **options)
        return path

    return write


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
    assert read_checkpoint(put(content)).meta == {
        "image_size": 48,
        "epochs": 800,
        "norm_pix": True,
        "epochs_done": 400,
    }
    # The arguments of a fine-tuning say nothing about the pre-training.
    assert read_checkpoint(put({"model": {**ENCODER, **HEAD}, "args": ARGS, **RUN})).meta == {"image_size": 48}


def test_paths_that_python_3_13_wrote_are_read(put, monkeypatch):
    class PosixPath(PurePosixPath):
        __module__ = "pathlib._local"
        __qualname__ = "PosixPath"

        def __reduce__(self):
            return PosixPath, self.parts

    module = types.ModuleType("pathlib._local")
    module.PosixPath = PosixPath
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pathlib._local", module)
        args = argparse.Namespace(epochs=1600, output_dir=PosixPath("/jobs/1"))
        path = put({"model": {**ENCODER, **DECODER}, "args": args})
    assert b"pathlib._local" in path.read_bytes()
    assert equal(read_checkpoint(path).encoder, ENCODER)


def test_our_own_files_are_read(tmp_path, put):
    model = MaskedAutoencoder("vit_mini_patch8", decoder_dim=32, decoder_depth=1, decoder_heads=2)
    path = tmp_path / "mae.safetensors"
    save_weights(path, model.state_dict(), {"epochs": "100", "norm_pix": "false"})
    training = {
        "format": "mae-transfer training",
        "model": model.state_dict(),
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
        assert equal(
            {**checkpoint.encoder, **checkpoint.decoder}, {k: v.detach() for k, v in model.state_dict().items()}
        )


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


@pytest.mark.parametrize(
    ("arch", "size", "count"),
    [("vit_base_patch16", (768, 12, 16, 14), 150), ("vit_large_patch16", (1024, 24, 16, 14), 294)],
)
def test_the_released_files_tensors_are_those_of_the_model(arch, size, count):
    with torch.device("meta"):
        model = build_vit(arch).state_dict()
    assert {name: list(tensor.shape) for name, tensor in model.items()} == shapes(*size)
    assert len(shapes(*size)) == count  # counted on the official models, as timm has them


def test_a_vit_b_is_recognised_by_its_shapes(put):
    state = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes(768, 12, 16, 14).items()}
    checkpoint = read_checkpoint(put({"model": state}, "mae_pretrain_vit_large.pth"))  # the name is no evidence
    assert (checkpoint.arch, len(checkpoint.encoder)) == ("vit_base_patch16", 150)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(put, dtype):
    state = {name: tensor.to(dtype) for name, tensor in ENCODER.items()}
    encoder = read_checkpoint(put(state, "half.safetensors")).encoder
    assert equal(encoder, {name: tensor.float() for name, tensor in state.items()})
    assert {tensor.dtype for tensor in encoder.values()} == {torch.float32}


def test_the_old_pickle_format_is_read(put):
    path = put({"model": ENCODER}, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(path)
    assert equal(read_checkpoint(path).encoder, ENCODER)


def test_parameters_come_back_as_plain_tensors(put):
    checkpoint = read_checkpoint(put({"model": {name: nn.Parameter(tensor) for name, tensor in ENCODER.items()}}))
    assert equal(checkpoint.encoder, ENCODER)
    assert not any(tensor.requires_grad for tensor in checkpoint.encoder.values())


def test_what_belongs_to_no_part_is_listed_as_dropped(put):
    state = {**ENCODER, "mask_token": torch.zeros(1, 128), "ibot_head.weight": torch.zeros(3), "epoch": 3}
    checkpoint = read_checkpoint(put(state))
    assert sorted(checkpoint.dropped) == ["epoch", "ibot_head.weight", "mask_token"]
    assert checkpoint.decoder == {}


BAD = {
    "a missing tensor": (without(ENCODER, "blocks.3.attn.qkv.bias"), "no blocks.3.attn.qkv.bias"),
    "a missing block": (without(ENCODER, "blocks.2."), "no blocks.2.norm1.weight"),
    "a missing last block": (without(ENCODER, "blocks.5."), "128/5/8; known: vit_mini_patch8 128/6/8"),
    "no final norm": (TRUNK, "no norm.weight"),
    "half a final norm": ({**without(ENCODER, "norm.bias"), **FC_NORM}, "no norm.bias"),
    "no patches": (without(ENCODER, "patch_embed"), "no patch_embed.proj.weight"),
    "no positions": (without(ENCODER, "pos_embed"), "no pos_embed"),
    "a transposed tensor": (
        {**ENCODER, "blocks.0.attn.qkv.weight": ENCODER["blocks.0.attn.qkv.weight"].t().contiguous()},
        "blocks.0.attn.qkv.weight is [128, 384] where vit_mini_patch8 has [384, 128]",
    ),
    "positions without a class token": ({**ENCODER, "pos_embed": torch.zeros(1, 36, 128)}, "pos_embed is [1, 36, 128]"),
    "positions of another width": ({**ENCODER, "pos_embed": torch.zeros(1, 37, 64)}, "pos_embed is [1, 37, 64]"),
    "a flat projection": ({**ENCODER, "patch_embed.proj.weight": torch.zeros(128, 192)}, "128/6/192"),
    "an unknown width": (tensors(shapes(dim=64)), "unknown size, width/depth/patch 64/6/8"),
    "mixed prefixes": ({**without(ENCODER, "norm."), "module.norm.weight": torch.ones(128)}, "no norm.weight"),
    "a decoder alone": (DECODER, "holds only a decoder"),
    "a ResNet": (
        {"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.bn1.running_mean": torch.zeros(8)},
        "none of its 2 tensors is named like blocks.0.attn.qkv.weight, they are like conv1.weight",
    ),
    "half a BEiT": (
        {**ENCODER, "blocks.0.attn.q_bias": torch.zeros(128)},
        "no blocks.0.gamma_1, which vit_mini_patch8 needs",
    ),
    "BEiT's shared table over plain attention": (
        {**ENCODER, "rel_pos_bias.relative_position_bias_table": torch.zeros(1)},
        "has rel_pos_bias.relative_position_bias_table, which none of the ViTs",
    ),
    "BEiT's own tables over plain attention": (
        {**ENCODER, "blocks.0.attn.relative_position_bias_table": torch.zeros(1)},
        "has blocks.0.attn.relative_position_bias_table, which vit_mini_patch8 does not have",
    ),
    "half a DINOv2": ({**ENCODER, "blocks.0.ls1.gamma": torch.ones(128)}, "no blocks.0.ls2.gamma"),
    "DINOv2 without positions": (
        {**without(ENCODER, "pos_embed"), "register_tokens": torch.zeros(1, 4, 128)},
        "no complete dinov2-registers file",
    ),
    "DeiT's token without its position": (
        {**ENCODER, "dist_token": torch.zeros(1, 1, 128)},
        "pos_embed is [1, 37, 128]",
    ),
    "CLIP": ({**ENCODER, "norm_pre.weight": torch.zeros(128)}, "has norm_pre.weight, which none of the ViTs"),
    "NaN": ({**ENCODER, "norm.bias": torch.tensor([float("nan")] * 128)}, "norm.bias holds NaN or infinite"),
    "infinity in a decoder": (
        {**ENCODER, **DECODER, "decoder_norm.weight": torch.full((96,), float("-inf"))},
        "decoder_norm.weight holds NaN or infinite",
    ),
    "integers": ({**ENCODER, "norm.bias": torch.zeros(128, dtype=torch.int8)}, "norm.bias is of type torch.int8"),
    "a sparse tensor": ({**ENCODER, "norm.bias": torch.zeros(128).to_sparse()}, "norm.bias is not a dense tensor"),
    "no tensors": ({"epoch": 3, "lr": 0.1}, "no named tensors (only epoch, lr)"),
    "a list": ([torch.zeros(3)], "no named tensors"),
    "an empty state dict": ({"model": {}}, "no named tensors"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("wrapped", [True, False], ids=["model", "flat"])
def test_a_state_dict_that_is_no_complete_plain_vit_is_refused(put, case, wrapped):
    state, message = BAD[case]
    path = put({"model": state} if wrapped and isinstance(state, dict) else state)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 343249461\n", "Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"epoch 1 {loss: 0.3}\n", "text file"),
        (b"12345678{ is text too\n", "text file"),
        (b"\x93NUMPY\x01\x00v\x00", "begins with b'\\x93NUMPY"),
        (b"PK\x03\x04 and no more", "cut short"),
        ((2**20).to_bytes(8, "little") + b'{"a":', "cut short inside its safetensors header"),
        (b"\x80\x02", "cut short or damaged"),
    ],
)
def test_what_is_no_checkpoint_is_named(put, content, message):
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(put(content))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_archives_folders_and_absent_files_are_named(tmp_path, put):
    plain, archive = tmp_path / "plain.zip", tmp_path / "old.tar"
    with zipfile.ZipFile(plain, "w") as file:
        file.writestr("readme.txt", "hello")
    with tarfile.open(archive, "w") as file:
        file.add(plain, "plain.zip")
    program = tmp_path / "program.pt"  # TorchScript's layout
    with zipfile.ZipFile(program, "w") as file:
        for member in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            file.writestr(f"program/{member}", b"")
    misnamed = put({"model": ENCODER}).rename(tmp_path / "file.safetensors")
    for path, message in (
        (plain, "zip archive that torch.save did not write"),
        (archive, "tar archive"),
        (program, "TorchScript program"),
        (misnamed, "rename it to .pth"),
        (tmp_path, "is a folder without model.safetensors or pytorch_model.bin"),
        (tmp_path / "absent.pth", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


class Attack:
    """Unpickles to a call that makes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("way", ["zip", "old pickle", "plain pickle 2", "plain pickle 4", "in the arguments"])
def test_code_in_a_pickle_never_runs(put, tmp_path, way):
    target = tmp_path / "attacked"
    attack = Attack(target)
    content = {"model": {**ENCODER, "norm.bias": attack}}
    if way == "in the arguments":
        content = {"model": {**ENCODER, **DECODER}, "args": argparse.Namespace(output_dir=attack), **RUN}
    if way.startswith("plain"):
        path = put(pickle.dumps({"model": attack}, protocol=int(way[-1])), "evil.pth")
    else:
        path = put(content, "evil.pth", _use_new_zipfile_serialization=way != "old pickle")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert not target.exists()
    assert f"{os.name}.system" in str(error.value)
    assert "\n" not in str(error.value)
    # Loaded the unsafe way on purpose: an attack that does nothing anyway would prove nothing about the reader.
    torch.load(path, weights_only=False) if way in ("zip", "old pickle") else pickle.loads(pickle.dumps(attack))
    assert target.exists()  # the attack is real


def test_a_pickled_model_is_refused_by_the_name_of_its_class(put):
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.\w+\.\w+.*save only its state_dict"):
        read_checkpoint(put(nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["zip.pth", "old.pth", "flat.safetensors"])
def test_a_damaged_file_is_a_checkpoint_error_and_nothing_else(put, name):
    content = ENCODER if name.endswith("safetensors") else {"model": ENCODER}
    options = {"_use_new_zipfile_serialization": False} if name == "old.pth" else {}
    path = put(content, name, **options)
    whole = path.read_bytes()
    for length in (1, 9, 100, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
    draw = random.Random(0)
    messages = []
    for _ in range(40):  # in the part that says what the tensors are
        damaged = bytearray(whole)
        damaged[draw.randrange(9000)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


def cubic_convolution(size, new):
    """[new, size] weights of Keys' kernel with a = -0.75, as PyTorch has it: centres at halves, edges repeated."""

    def kernel(t):
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    weights = np.zeros((new, size))
    for i in range(new):
        x = (i + 0.5) * size / new - 0.5
        for k in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
            weights[i, min(max(k, 0), size - 1)] += kernel(x - k)
    return weights


@pytest.mark.parametrize(("side", "grid"), [(14, (28, 28)), (14, (32, 32)), (14, (9, 21)), (16, (32, 32)), (6, (6, 5))])
def test_positions_are_resized_by_cubic_convolution(side, grid):
    positions = torch.randn(1, 1 + side * side, 8, generator=torch.Generator().manual_seed(0))
    resized = resize_position_embedding(positions, grid)
    table = positions[0, 1:].double().numpy().reshape(side, side, 8)
    rows, columns = (cubic_convolution(side, new) for new in grid)
    expected = np.einsum("hi,wj,ijd->hwd", rows, columns, table).reshape(-1, 8)
    assert resized.shape == (1, 1 + grid[0] * grid[1], 8)
    assert torch.equal(resized[:, 0], positions[:, 0])
    np.testing.assert_allclose(resized[0, 1:].numpy(), expected, atol=1e-5)  # float32 coordinates


def test_positions_of_the_same_grid_are_not_touched():
    positions = torch.randn(1, 197, 8)
    assert resize_position_embedding(positions, (14, 14)) is positions
    # As many patches in another shape are another grid.
    assert not torch.equal(resize_position_embedding(positions, (7, 28)), positions)
    with pytest.raises(CheckpointError, match="square grid"):
        resize_position_embedding(torch.zeros(1, 196, 8), (14, 14))


def timm_model(**options):
    return VisionTransformer(
        48, 8, embed_dim=128, depth=6, num_heads=4, norm_layer=partial(nn.LayerNorm, eps=1e-6), **options
    )


def test_a_loaded_encoder_computes_what_timms_own_model_computes(put):
    reference = timm_model(num_classes=0).eval()
    reference.load_state_dict(ENCODER, strict=True)
    vit = build_vit("vit_mini_patch8").eval()
    report = load_encoder(vit, read_checkpoint(put({"model": ENCODER})))
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), reference(images), atol=1e-6, rtol=0)
    assert (len(report.loaded), report.resized, report.dropped, report.missing) == (78, (), (), ())
    assert equal(vit.state_dict(), ENCODER)


@pytest.mark.parametrize(("pool", "norm"), [("avg", FC_NORM), ("token", {})])
def test_a_loaded_classifier_computes_what_timms_own_model_computes(put, pool, norm):
    state = {**(TRUNK if norm else ENCODER), **norm, **HEAD}
    reference = timm_model(num_classes=10, global_pool=pool).eval()
    reference.load_state_dict(state, strict=True)
    checkpoint = read_checkpoint(put({"model": state}))
    vit = build_vit("vit_mini_patch8", num_classes=10, pool=pool).eval()
    report = load_classifier(vit, checkpoint)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), reference(images), atol=1e-6, rtol=0)
    assert (set(report.loaded), report.dropped, report.missing) == (set(state), (), ())
    wider = build_vit("vit_mini_patch8", image_size=(64, 48), num_classes=10, pool=pool)
    assert load_classifier(wider, checkpoint).resized == ("pos_embed",)
    other = build_vit("vit_mini_patch8", num_classes=10, pool="token" if norm else "avg")
    with pytest.raises(CheckpointError, match=f"pool='{pool}'"):
        load_classifier(other, checkpoint)
    with pytest.raises(CheckpointError, match=r"head.weight is \[10, 128\] where the model has \[12, 128\]"):
        load_classifier(build_vit("vit_mini_patch8", num_classes=12, pool=pool), checkpoint)


def test_an_average_pooling_model_takes_the_trunk_and_keeps_its_new_head(put):
    checkpoint = read_checkpoint(put({"model": {**ENCODER, **DECODER}}))
    vit = build_vit("vit_mini_patch8", image_size=(64, 96), num_classes=5, pool="avg")
    head = vit.head.weight.detach().clone()
    report = load_encoder(vit, checkpoint)
    assert report.missing == ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias")
    assert report.resized == ("pos_embed",)
    assert set(report.dropped) == {"norm.weight", "norm.bias", *DECODER}
    assert set(report.loaded) == set(TRUNK)
    assert report.summary() == (
        "76 tensors loaded (pos_embed resized), 9 dropped, new: fc_norm.weight, fc_norm.bias, head.weight, head.bias; "
        "100 % of the encoder"
    )
    assert torch.equal(vit.head.weight, head)
    assert torch.equal(vit.pos_embed, resize_position_embedding(ENCODER["pos_embed"], (8, 12)))
    assert equal(without(vit.state_dict(), "pos_embed", "fc_norm", "head"), without(TRUNK, "pos_embed"))


def test_a_linear_probes_frozen_encoder_can_be_loaded(put):
    report = load_encoder(build_vit("vit_mini_patch8"), read_checkpoint(put({"model": {**ENCODER, **PROBE}})))
    assert set(report.dropped) == set(PROBE)


def test_a_load_that_does_not_fit_is_refused_and_leaves_the_model_alone(put):
    good = read_checkpoint(put({"model": ENCODER}))
    fine_tuned = read_checkpoint(put({"model": {**TRUNK, **FC_NORM, **HEAD}}, "ft.pth"))

    def changed(**encoder):
        return dataclasses.replace(good, encoder={**ENCODER, **encoder})

    vit = build_vit("vit_mini_patch8")
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    for load, checkpoint, message in (
        (load_encoder, dataclasses.replace(good, encoder=without(ENCODER, "norm.bias")), "has no norm.bias"),
        (load_encoder, changed(**{"norm.bias": torch.zeros(64)}), r"norm.bias is \[64\]"),
        (load_encoder, changed(**{"blocks.6.norm1.bias": torch.zeros(128)}), "blocks.6.norm1.bias, which the model"),
        (load_encoder, read_checkpoint("random:vit_tiny_patch16"), r"cls_token is \[1, 1, 192\]"),
        (load_encoder, fine_tuned, "fine-tuned classifier, not a pre-trained encoder"),
        (load_classifier, good, "no fine-tuned classifier but encoder weights"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load(vit, checkpoint)
        assert equal(vit.state_dict(), before)


def test_saved_weights_come_back_and_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "mae.safetensors"
    state = {**ENCODER, "pos_embed": ENCODER["pos_embed"].expand(1, -1, -1).requires_grad_()}
    save_weights(path, {**state, "norm.weight": ENCODER["norm.bias"]}, {"epochs": "3"})  # two names, one tensor
    checkpoint = read_checkpoint(path)
    assert equal(checkpoint.encoder, {**ENCODER, "norm.weight": ENCODER["norm.bias"]})
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable by whoever may read the folder's files

    def break_off(state, part, metadata):
        Path(part).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights_file, "save_file", break_off)
    with pytest.raises(CheckpointError, match="No space left"):
        save_weights(path, ENCODER, {})
    assert read_checkpoint(path).sha256 == checkpoint.sha256
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mae.safetensors", "plain"]
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_weights(tmp_path / "absent" / "mae.safetensors", ENCODER, {})


def test_the_command_says_what_a_file_holds(put, capsys):
    path = put({"model": {**ENCODER, **DECODER, "other.weight": torch.zeros(1)}, "args": ARGS, **RUN})
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    parameters = sum(tensor.numel() for tensor in ENCODER.values())
    for expected in (
        "vit_mini_patch8",
        "mae-training",
        "encoder",
        f"78 tensors, {parameters:,} parameters",
        hashlib.sha256(path.read_bytes()).hexdigest(),
        "dropped    mask_token",
        "other.weight",
        "epochs=800 norm_pix=True",
    ):
        assert expected in printed


def test_the_command_exits_with_2_and_one_sentence(tmp_path):
    child = subprocess.run(
        [sys.executable, "-m", "mae_core.checkpoint", str(tmp_path / "absent.pth")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stdout) == (2, "")
    forms = "give a checkpoint file or folder, hf:NAME, timm:NAME or random:ARCH"
    assert child.stderr.strip() == f"{tmp_path / 'absent.pth'} does not exist: {forms}"


# VmHWM and not resource.getrusage: at exec Linux hands the parent's peak down to the child's ru_maxrss.
MEASURE = """
import sys
from mae_core.checkpoint import read_checkpoint
def kilobytes(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])
read_checkpoint(sys.argv[1])
before = kilobytes("VmRSS:")
checkpoint = read_checkpoint(sys.argv[2])
print(1024 * (kilobytes("VmHWM:") - before), sum(4 * t.numel() for t in checkpoint.encoder.values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", ["zip.pth", "old.pth", "flat.safetensors", "hf.safetensors"])
def test_reading_takes_at_most_a_fifth_more_memory_than_the_file(put, name):
    flat = name.endswith("safetensors")
    options = {"_use_new_zipfile_serialization": False} if name == "old.pth" else {}
    big, little = tensors(shapes(768, 12, 16, 14)), ENCODER
    if name == "hf.safetensors":  # whose queries, keys and values are joined
        big, little = hf(big), hf(little)
    small = put(little if flat else {"model": ENCODER}, f"small_{name}", **options)
    path = put(big if flat else {"model": big}, name, **options)
    size = path.stat().st_size
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    path.unlink()
    growth, held = map(int, child.stdout.split())
    print(f"{name}: {size / 2**20:.0f} MiB, peak {growth / size:.3f} of it")
    assert held > 0.99 * size > 300e6
    assert growth < 1.2 * size
