"""Pre-training in this process: what a run writes, its switches, its command line."""

import os
import sys
import tarfile
from dataclasses import replace

import pytest
import torch

from mae_core import fitted_target, pretrain, space
from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import read_checkpoint
from mae_core.claim import claimed
from mae_core.dalle import DalleTokenizer
from mae_core.errors import UserError
from mae_core.follow import labelled_folder
from mae_core.machine import Machine
from mae_core.reconstruct import load_autoencoder
from tests.fixtures import pretrain as runs


def test_training_images_are_those_of_train_where_there_is_one(tmp_path):
    for name in ("train/a.png", "val/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert pretrain.training_images(tmp_path) == [f"{tmp_path}/train/a.png"]
    assert pretrain.training_images(tmp_path / "val") == [f"{tmp_path}/val/b.png"]


def test_noise_of_a_step_depends_only_on_seed_and_step():
    rest = (8, (6, 6), "random", 0.75)
    noise = pretrain.step_noise(0, 5, *rest)
    assert torch.equal(noise, pretrain.step_noise(0, 5, *rest))
    assert not torch.equal(noise, pretrain.step_noise(0, 6, *rest))
    assert not torch.equal(noise, pretrain.step_noise(1, 5, *rest))
    assert len(noise.unique()) == 8 * 36


def test_a_run_writes_official_names_and_says_how_it_was_made(reference):
    checkpoint = read_checkpoint(reference / pretrain.WEIGHTS_FILE)
    assert (checkpoint.arch, checkpoint.format) == ("vit_mini_patch8", "ours")
    assert not checkpoint.dropped
    model = MaskedAutoencoder("vit_mini_patch8", decoder_dim=32, decoder_depth=1, decoder_heads=2)
    model.load_state_dict({**checkpoint.encoder, **checkpoint.decoder}, strict=True)
    said = {"epochs": 2, "norm_pix": False, "image_size": 48, "decoder_heads": "2", "images": "64", "seed": "0"}
    assert said.items() <= checkpoint.meta.items()


def test_a_run_trains(noise_images, reference, tmp_path):
    runs.train(noise_images, tmp_path / "untrained", base_lr=0.0)
    moved = runs.differing(tmp_path / "untrained", reference)
    assert runs.weights(reference).keys() - moved == {"pos_embed", "decoder_pos_embed"}
    first, last = (line["loss"] for line in runs.log(reference))
    assert last < 0.99 * first


# What each switch changes in the tiny recipe.
SWITCHES = {
    "block": {"masking": "block"},
    "grid": {"masking": "grid"},
    "mask tokens": {"encoder_mask_tokens": True},
    "loss on all": {"loss_on": "all"},
    "none": {"augmentation": "none"},
    "fixed size": {"augmentation": "crop, fixed size"},
    "jitter": {"augmentation": "crop + colour jitter"},
    "repeated": {"repeated_augmentation": 2},
    "pca": {"target": "pca", "pca_components": 5, "fit_images": 8},
    "tokens": {"target": "tokens", "vocabulary": 7, "fit_images": 8},
}


@pytest.fixture(scope="module")
def one_epoch(noise_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("one_epoch")
    runs.train(noise_images, out, epochs=1)
    return out


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_moves_the_weights_and_is_written_to_the_file(noise_images, one_epoch, tmp_path, name):
    runs.train(noise_images, tmp_path / "a", Machine(), epochs=1, **SWITCHES[name])
    ours, theirs = runs.weights(tmp_path / "a"), runs.weights(one_epoch)
    assert not torch.equal(ours["blocks.0.attn.qkv.weight"], theirs["blocks.0.attn.qkv.weight"])
    checkpoint = read_checkpoint(tmp_path / "a" / pretrain.WEIGHTS_FILE)
    assert not checkpoint.dropped
    numbers = {"pca_components", "vocabulary", "fit_images"}  # which shapes tell, and target.safetensors
    said = {knob: str(value).lower() for knob, value in SWITCHES[name].items() if knob not in numbers}
    assert said.items() <= {knob: str(value).lower() for knob, value in checkpoint.meta.items()}.items()
    # It can be loaded again as what it is.
    model = load_autoencoder(checkpoint)
    assert model.encoder_mask_tokens == (name == "mask tokens")
    assert model.decoder_target.width == {"pca": 5, "tokens": 7}.get(name, 192)


def test_a_fitted_target_is_fitted_once(noise_images, tmp_path, monkeypatch):
    knobs = {"target": "pca", "pca_components": 5, "fit_images": 8}
    runs.train(noise_images, tmp_path / "whole", **knobs)
    runs.train_until(5, noise_images, tmp_path / "a", **knobs)
    monkeypatch.setattr(fitted_target, "fit", None)  # would fail if called
    runs.train(noise_images, tmp_path / "a", **knobs)
    assert runs.differing(tmp_path / "whole", tmp_path / "a") == []
    with pytest.raises(TypeError):  # another sample is another target
        runs.train(noise_images, tmp_path / "a", **(knobs | {"fit_images": 9}))


def test_the_user_s_tokenizer_is_used_and_part_of_the_run(noise_images, tmp_path):
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        tokenizer = DalleTokenizer((6, 6), n_hid=8, vocabulary=9)
        buffers = {name: b for name, b in tokenizer.named_buffers() if name.startswith("blocks.")}
        files.append(tmp_path / f"{seed}.pth")
        torch.save({name: torch.randn_like(b) for name, b in buffers.items()}, files[-1])
    r = replace(pretrain.recipe("vit_mini_patch8", "mini"), **runs.TINY, target="tokens", tokenizer="dall-e")
    rest = (r, tmp_path, 0, runs.EVERY_STEP)
    pretrain.pretrain(noise_images, "vit_mini_patch8", *rest, tokenizer=files[0])
    assert runs.weights(tmp_path)["decoder_pred.weight"].shape == (9, 32)
    assert not [name for name in runs.weights(tmp_path) if name.startswith("decoder_target")]
    with pytest.raises(UserError, match=r"is of another run .tokenizer: "):
        pretrain.pretrain(noise_images, "vit_mini_patch8", *rest, tokenizer=files[1])
    with pytest.raises(UserError, match="--tokenizer FILE is needed by tokenizer=dall-e"):
        pretrain.pretrain(noise_images, "vit_mini_patch8", *rest)


def test_shards_train_the_same_weights_as_loose_files(noise_images, reference, tmp_path):
    (tmp_path / "data").mkdir()
    files = sorted(noise_images.iterdir())
    for number, part in enumerate((files[:20], files[20:])):
        with tarfile.open(tmp_path / "data" / f"{number}.tar", "w") as tar:
            for file in part:
                tar.add(file, file.name)
    runs.train(tmp_path / "data", tmp_path / "a", Machine(workers=1))
    assert runs.differing(reference, tmp_path / "a") == []


def test_following_a_run_logs_accuracy_keeps_epochs_and_moves_no_weight(noise_images, reference, tmp_path):
    data = runs.labelled(noise_images, tmp_path / "labelled", val=20, classes=4)
    following = pretrain.Following(2, labelled_folder(data), keep_every=1)
    r, out = replace(pretrain.recipe("vit_mini_patch8", "mini"), **runs.TINY), tmp_path / "a"
    out.mkdir()
    pretrain.pretrain(noise_images, "vit_mini_patch8", r, out, 0, runs.EVERY_STEP, following=following)
    assert runs.differing(reference, out) == []
    assert "knn_top1" not in runs.log(out)[0]
    assert 0 <= runs.log(out)[1]["knn_top1"] <= 100
    kept = {"epoch-0001.safetensors", "epoch-0002.safetensors"}
    assert {p.name for p in out.iterdir()} - {p.name for p in reference.iterdir()} == kept
    model = MaskedAutoencoder(
        "vit_mini_patch8", 48, *(runs.TINY[f"decoder_{part}"] for part in ("dim", "depth", "heads"))
    )
    foreseen = pretrain.pretraining_space(tmp_path / "b", model, epochs=2, keep_every=1)
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.suffix in (".pth", ".safetensors")}
    assert sum(sizes.values()) == pytest.approx(foreseen.stays, rel=0.1)  # it leaves out names and headers
    assert foreseen.peak - foreseen.stays == pytest.approx(sizes["checkpoint.pth"] - sizes["mae.safetensors"], rel=0.15)
    assert pretrain.pretraining_space(out, model, 2, 1).peak == pytest.approx(sizes["checkpoint.pth"], rel=0.15)
    checkpoint = read_checkpoint(out / "epoch-0001.safetensors")
    assert (checkpoint.meta["epochs"], checkpoint.meta["epochs_planned"]) == (1, "2")


def test_fused_adamw_and_on_a_gpu_compilation_are_on_unless_switched_off(monkeypatch):
    def machine(*flags):
        monkeypatch.setattr(sys, "argv", ["pretrain", "--data", ".", "--arch", "a", "--out", "o", *flags])
        found = pretrain.machine_of(pretrain.parse())
        return found.compile, found.fused_adamw

    assert machine("--device", "cpu") == (False, True)
    assert machine("--device", "cpu", "--compile", "--no-fused-adamw") == (True, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine() == (True, True)
    assert machine("--no-compile", "--no-fused-adamw") == (False, False)
    with pytest.raises(UserError, match="--compile and --no-compile: give one of them"):
        machine("--compile", "--no-compile")


def test_fused_adamw_is_adamw(noise_images, reference, tmp_path):
    runs.train(noise_images, tmp_path / "a", Machine(fused_adamw=True))
    runs.assert_equal_to_rounding(reference, tmp_path / "a", rate_sum=5e-4)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arch", "vit_base_16"], "error: unknown arch 'vit_base_16'; did you mean vit_base_patch16?"),
        (["--recipe", "tiny"], "error: unknown recipe 'tiny'; did you mean mini?"),
        (["--set", "epoch=3"], "error: --set epoch=3: this recipe has no 'epoch'; did you mean epochs?"),
        (["--set", "batch=128"], "has 64 images, less than one batch of 128: set a smaller batch (--set batch=N)"),
        (["--set", "batch=0"], "error: batch=0: it must be at least 1"),
        (["--set", "batch=16", "mask_ratio=1"], "error: mask_ratio=1.0: it must be from 0 to below 1"),
        (["--set", "batch=16", "image_size=50"], "50x50 is not divisible by it"),
        (["--set", "batch=16", "image_size=10000000"], "10000000x10000000 px are more than this ViT could hold"),
        (["--data", "nowhere"], "error: nowhere is not a folder of images"),
        (["--set", "batch=16", "target=pca", "pca_components=500"], "error: pca_components=500: 1280 patches of 192"),
        (["--set", "batch=16", "target=tokens", "tokenizer=dall-e"], "error: --tokenizer FILE is needed by tokenizer="),
        (["--set", "batch=16", "--tokenizer", "x"], "error: --tokenizer FILE is needed by tokenizer=dall-e, and by"),
        (["--eval-data", "."], "error: --eval-data is used only with --eval-every N"),
        (["--eval-every", "1"], "has no folder train: k-NN needs"),
        (["--micro-batch", "-1"], "error: --micro-batch -1: give a positive number of images"),
        *((["--save-minutes", text], f"error: --save-minutes {text}") for text in ("nan", "inf", "-1.0")),
    ],
)
def test_the_command_line_refuses_in_one_sentence(noise_images, tmp_path, monkeypatch, capsys, flags, sentence):
    arguments = ["--data", str(noise_images), "--arch", "vit_mini_patch8", "--recipe", "mini", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments, "--out", str(tmp_path / "a"), *flags])
    assert pretrain.main() == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_too_small_a_disk_is_refused_before_the_training(noise_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(space, "free_below", lambda out: 1000)
    arguments = ["--data", str(noise_images), "--arch", "vit_mini_patch8", "--recipe", "mini", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments, "--out", str(tmp_path / "a"), "--set", "batch=16"])
    assert pretrain.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the disk is too small: up to 0.0")
    assert error.endswith("free; free some, or choose another --out\n")


def test_two_runs_in_one_folder_are_refused_by_name(noise_images, tmp_path, monkeypatch, capsys):
    arguments = ["--data", str(noise_images), "--arch", "vit_mini_patch8", "--recipe", "mini", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments, "--out", str(tmp_path / "a"), "--set", "batch=16"])
    with claimed(tmp_path / "a"):
        assert pretrain.main() == 2
    assert f"error: {tmp_path / 'a'} is in use by another run (process {os.getpid()}," in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".claim.0"]
