"""Pre-training in this process (quick) and in processes of its own that are killed, stopped and run in pairs (slow)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

from mae_core import fitted_target, loop, pretrain
from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import read_checkpoint
from mae_core.dalle import DalleTokenizer
from mae_core.errors import UserError
from mae_core.follow import labelled_folder
from mae_core.machine import Machine
from mae_core.recipe import MINI_FIELDS
from mae_core.reconstruct import load_autoencoder
from mae_core.training import CHECKPOINT_FILE, LOG_FILE
from tests.fixtures import ROOT

TINY = {"batch": 16, "epochs": 2, "warmup_epochs": 1, "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
EVERY_STEP = Machine(save_minutes=0)


def train(images, out, machine=EVERY_STEP, seed=0, **knobs):
    """Pre-train vit_mini_patch8 on 64 images with the tiny settings: 4 steps an epoch. The final state."""
    out.mkdir(exist_ok=True)
    r = replace(pretrain.recipe("vit_mini_patch8", "mini"), **{**TINY, **knobs})
    return pretrain.pretrain(images, "vit_mini_patch8", r, out, seed, machine)[0]


def command(images, out, *flags, **knobs):
    settings = [f"{knob}={value}" for knob, value in {**TINY, **knobs}.items()]
    what = ["--data", images, "--out", out, "--arch", "vit_mini_patch8", "--recipe", "mini", "--device", "cpu"]
    what += ["--no-fused-adamw"]  # as in `train`: it rounds otherwise
    return [str(part) for part in ["-m", "mae_core.pretrain", *what, *flags, "--set", *settings]]


def start(arguments):
    # One thread, as here: a sum over two has other last bits. The path, because torchrun's children know no other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def weights(out):
    return load_file(out / pretrain.WEIGHTS_FILE)


def log(out):
    return [json.loads(line) for line in (out / LOG_FILE).read_text().splitlines()]


def differing(a, b):
    """Names of the tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def assert_equal_to_rounding(a, b, rate_sum):
    """Equal up to a small part of the way that Adam can go, the sum of all rates. The keys' bias is left out: a softmax
    takes no notice of it, so that its gradient is rounding error alone, which Adam scales up to full steps."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name], b[name]
        if name.endswith("attn.qkv.bias"):
            third = len(x) // 3
            x, y = (torch.cat([t[:third], t[2 * third :]]) for t in (x, y))
        torch.testing.assert_close(x, y, rtol=1e-4, atol=0.01 * rate_sum, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def reference(noise_images, tmp_path_factory):
    """An uninterrupted run of two epochs."""
    out = tmp_path_factory.mktemp("reference")
    train(noise_images, out)
    return out


def test_the_paper_s_recipe():
    # MAE paper, Table 8, sections 3 and A.1; crop, decoder heads and final rate as in facebookresearch/mae.
    paper = {
        "image_size": 224, "mask_ratio": 0.75, "norm_pix": True, "decoder_dim": 512, "decoder_depth": 8,
        "decoder_heads": 16, "epochs": 1600, "warmup_epochs": 40, "batch": 4096, "base_lr": 1.5e-4, "min_lr": 0.0,
        "weight_decay": 0.05, "betas": (0.9, 0.95), "min_scale": 0.2, "masking": "random", "loss_on": "masked",
        "encoder_mask_tokens": False, "target": "pixels", "augmentation": "crop, random size",
        "repeated_augmentation": 1, "pca_components": 96, "tokenizer": "k-means", "vocabulary": 8192,
        "fit_images": 10000,
    }  # fmt: skip
    for arch in ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"):
        assert asdict(pretrain.recipe(arch, "paper")) == paper


def test_the_mini_recipe_differs_in_the_declared_fields_alone():
    paper, mini = (asdict(pretrain.recipe("vit_mini_patch8", name)) for name in ("paper", "mini"))
    assert {knob for knob in paper if paper[knob] != mini[knob]} <= set(MINI_FIELDS)


def test_unknown_recipe():
    with pytest.raises(UserError, match=r"unknown recipe 'papr'; did you mean paper\?"):
        pretrain.recipe("vit_base_patch16", "papr")


def test_training_images_are_those_of_train_where_there_is_one(tmp_path):
    for name in ("train/a.png", "val/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert pretrain.training_images(tmp_path) == [f"{tmp_path}/train/a.png"]
    assert pretrain.training_images(tmp_path / "val") == [f"{tmp_path}/val/b.png"]


def test_noise_of_a_step_depends_on_seed_and_step_alone():
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
    train(noise_images, tmp_path / "untrained", base_lr=0.0)
    before, after = weights(tmp_path / "untrained"), weights(reference)
    assert set(before) - set(differing(before, after)) == {"pos_embed", "decoder_pos_embed"}
    losses = [line["loss"] for line in log(reference)]
    assert losses[1] < 0.99 * losses[0]


def test_log_has_one_line_per_epoch(reference):
    lines = log(reference)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 4), (1, 8)]
    # base_lr 1.5e-3 at batch 16: 9.375e-5 at the peak. Step 3 is 3/4 of the warm-up, step 7 3/4 of the cosine's way.
    assert [line["lr"] for line in lines] == pytest.approx([0.75 * 9.375e-5, 9.375e-5 * (1 - 2**-0.5) / 2])
    assert (reference / "tensorboard").is_dir()


def test_logged_loss_is_the_mean_over_the_epoch(noise_images, tmp_path, monkeypatch):
    losses, original = [], MaskedAutoencoder.forward

    def forward(self, images, noise, mask_ratio):
        output = original(self, images, noise, mask_ratio)
        losses.append(output.loss.item())
        return output

    monkeypatch.setattr(MaskedAutoencoder, "forward", forward)
    train(noise_images, tmp_path / "a", Machine(micro_batch=8))
    assert len(losses) == 16
    assert [line["loss"] for line in log(tmp_path / "a")] == pytest.approx([sum(losses[:8]) / 8, sum(losses[8:]) / 8])


def test_the_seed_decides_the_weights(noise_images, reference, tmp_path):
    train(noise_images, tmp_path / "same", Machine(workers=1, save_minutes=60))
    assert differing(weights(reference), weights(tmp_path / "same")) == []
    train(noise_images, tmp_path / "other", seed=1)
    assert len(differing(weights(reference), weights(tmp_path / "other"))) > 50


@pytest.mark.parametrize("micro_batch", [4, 5])  # 5 does not divide 16: 4 is taken
def test_accumulated_micro_batches_equal_the_whole_batch(noise_images, reference, tmp_path, micro_batch):
    state = train(noise_images, tmp_path / "a", Machine(micro_batch=micro_batch))
    assert state.micro_batch == 4
    assert_equal_to_rounding(weights(reference), weights(tmp_path / "a"), rate_sum=5e-4)


# Each as a difference from the tiny recipe; what it changes beside the weights.
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
    train(noise_images, out, epochs=1)
    return out


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_moves_the_weights_and_stands_in_the_file(noise_images, one_epoch, tmp_path, name):
    train(noise_images, tmp_path / "a", Machine(), epochs=1, **SWITCHES[name])
    ours, theirs = weights(tmp_path / "a"), weights(one_epoch)
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
    train(noise_images, tmp_path / "whole", **knobs)
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(noise_images, tmp_path / "a", **knobs)
    monkeypatch.setattr(fitted_target, "fit", None)  # would fail if called
    train(noise_images, tmp_path / "a", **knobs)
    assert differing(weights(tmp_path / "whole"), weights(tmp_path / "a")) == []
    with pytest.raises(TypeError):  # another sample is another target
        train(noise_images, tmp_path / "a", **(knobs | {"fit_images": 9}))


def test_a_tokenizer_of_the_user_s_is_used_and_part_of_the_run(noise_images, tmp_path):
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        tokenizer = DalleTokenizer((6, 6), n_hid=8, vocabulary=9)
        buffers = {name: b for name, b in tokenizer.named_buffers() if name.startswith("blocks.")}
        files.append(tmp_path / f"{seed}.pth")
        torch.save({name: torch.randn_like(b) for name, b in buffers.items()}, files[-1])
    r = replace(pretrain.recipe("vit_mini_patch8", "mini"), **TINY, target="tokens", tokenizer="dall-e")
    rest = (r, tmp_path, 0, EVERY_STEP)
    pretrain.pretrain(noise_images, "vit_mini_patch8", *rest, tokenizer=files[0])
    assert weights(tmp_path)["decoder_pred.weight"].shape == (9, 32)
    assert not [name for name in weights(tmp_path) if name.startswith("decoder_target")]
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
    train(tmp_path / "data", tmp_path / "a", Machine(workers=1))
    assert differing(weights(reference), weights(tmp_path / "a")) == []


def test_following_a_run_logs_keeps_and_changes_nothing(noise_images, reference, tmp_path):
    for split, files in (("train", slice(0, 40)), ("val", slice(40, 60))):
        for number, file in enumerate(sorted(noise_images.iterdir())[files]):
            (tmp_path / "labelled" / split / f"c{number % 4}").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "labelled" / split / f"c{number % 4}" / file.name)
    following = pretrain.Following(2, labelled_folder(tmp_path / "labelled"), keep_every=1)
    r, out = replace(pretrain.recipe("vit_mini_patch8", "mini"), **TINY), tmp_path / "a"
    out.mkdir()
    pretrain.pretrain(noise_images, "vit_mini_patch8", r, out, 0, EVERY_STEP, following=following)
    assert differing(weights(reference), weights(out)) == []
    assert "knn_top1" not in log(out)[0]
    assert 0 <= log(out)[1]["knn_top1"] <= 100
    kept = {"epoch-0001.safetensors", "epoch-0002.safetensors"}
    assert {p.name for p in out.iterdir()} - {p.name for p in reference.iterdir()} == kept
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
    assert machine() == (True, True)
    assert machine("--no-compile", "--no-fused-adamw") == (False, False)
    with pytest.raises(UserError, match="--compile and --no-compile: give one of them"):
        machine("--compile", "--no-compile")


def test_fused_adamw_is_adamw(noise_images, reference, tmp_path):
    train(noise_images, tmp_path / "a", Machine(fused_adamw=True))
    assert_equal_to_rounding(weights(reference), weights(tmp_path / "a"), rate_sum=5e-4)


def out_of_memory_above(monkeypatch, limit, only_call=None):
    original, calls = MaskedAutoencoder.forward, []

    def forward(self, images, noise, mask_ratio):
        calls.append(len(images))
        if len(images) > limit and only_call in (None, len(calls)):
            raise torch.OutOfMemoryError("simulated")
        return original(self, images, noise, mask_ratio)

    monkeypatch.setattr(MaskedAutoencoder, "forward", forward)
    return calls


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(
    noise_images, reference, tmp_path, monkeypatch, capsys
):
    calls = out_of_memory_above(monkeypatch, limit=4)
    state = train(noise_images, tmp_path / "a")
    assert calls == [16, 8] + [4] * 4 * 8
    assert state.micro_batch == 4
    assert [note.split(",")[0] for note in state.notes] == [
        "out of GPU memory: micro-batch reduced to 8",
        "out of GPU memory: micro-batch reduced to 4",
    ]
    assert "micro-batch reduced to 4, effective batch kept" in capsys.readouterr().out
    assert_equal_to_rounding(weights(reference), weights(tmp_path / "a"), rate_sum=5e-4)
    assert [line["loss"] for line in log(tmp_path / "a")] == pytest.approx([line["loss"] for line in log(reference)])


def test_out_of_memory_after_part_of_a_step_counts_nothing_twice(noise_images, tmp_path, monkeypatch):
    train(noise_images, tmp_path / "whole", Machine(micro_batch=8))
    # The second half of the third step fails once: its first half has left gradients by then.
    calls = out_of_memory_above(monkeypatch, limit=4, only_call=6)
    train(noise_images, tmp_path / "a", Machine(micro_batch=8))
    assert calls == [8] * 6 + [4] * 4 * 6
    assert_equal_to_rounding(weights(tmp_path / "whole"), weights(tmp_path / "a"), rate_sum=5e-4)


def test_out_of_memory_with_a_single_image_is_an_error(noise_images, tmp_path, monkeypatch):
    calls = out_of_memory_above(monkeypatch, limit=0)
    with pytest.raises(UserError, match=r"out of GPU memory at step 0 with a micro-batch of 1: .*--activation-check"):
        train(noise_images, tmp_path / "a")
    assert calls == [16, 8, 4, 2, 1]


def stop_at(monkeypatch, step, number=signal.SIGINT):
    """Send this process a signal while it prepares that step."""
    original = pretrain.step_noise

    def step_noise(seed, current, *rest):
        if current == step:
            os.kill(os.getpid(), number)
        return original(seed, current, *rest)

    monkeypatch.setattr(pretrain, "step_noise", step_noise)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_after_the_step_under_way_and_the_rest_is_the_same(
    noise_images, reference, tmp_path, monkeypatch, number
):
    out, handlers = tmp_path / "a", [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        stop_at(patch, 5, number)
        with pytest.raises(KeyboardInterrupt):
            train(noise_images, out, Machine(save_minutes=60))
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert torch.load(out / CHECKPOINT_FILE)["state"]["step"] == 6
    assert not (out / pretrain.WEIGHTS_FILE).exists()
    assert train(noise_images, out).step == 8
    assert differing(weights(reference), weights(out)) == []
    assert [line["loss"] for line in log(out)] == [line["loss"] for line in log(reference)]


def test_a_finished_run_is_not_run_again(noise_images, reference, tmp_path, monkeypatch):
    out = shutil.copytree(reference, tmp_path / "a")
    (out / pretrain.WEIGHTS_FILE).unlink()  # as if killed between the last checkpoint and this file
    calls = out_of_memory_above(monkeypatch, limit=0)
    train(noise_images, out)
    assert calls == []
    assert differing(weights(reference), weights(out)) == []


def test_log_lines_after_the_checkpoint_are_made_again(noise_images, reference, tmp_path, monkeypatch):
    out = tmp_path / "a"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(noise_images, out)
    # Killed after the first epoch was logged and while the second was, but before the next checkpoint.
    (out / LOG_FILE).write_text('{"epoch": 0, "loss": -1}\n{"epoch": 1, "lo')
    train(noise_images, out)
    assert [(line["epoch"], line["loss"]) for line in log(out)] == [
        (line["epoch"], line["loss"]) for line in log(reference)
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 3, "weight_decay": 0.1}, r"recipe.epochs: 2 -> 3; recipe.weight_decay: 0.05 -> 0.1"),
        ({"seed": 1}, r"seed: 0 -> 1"),
        ({"images": "fewer"}, r"data: [0-9a-f]{64} -> [0-9a-f]{64}"),
    ],
)
def test_a_work_folder_of_another_run_is_refused(noise_images, reference, tmp_path, change, named):
    images, out = noise_images, shutil.copytree(reference, tmp_path / "a")
    before = (out / CHECKPOINT_FILE).read_bytes()
    if "images" in change:
        images = shutil.copytree(noise_images, tmp_path / "images")
        (images / "00.png").unlink()
        change = {}
    with pytest.raises(UserError, match=rf"is of another run \({named}\): choose another --out"):
        train(images, out, **change)
    assert (out / CHECKPOINT_FILE).read_bytes() == before


def test_a_changed_machine_is_named(noise_images, reference, tmp_path, capsys):
    out = tmp_path / "a"
    train(noise_images, out, Machine(threads=1, micro_batch=8))
    capsys.readouterr()
    state = train(noise_images, out, Machine(threads=2, micro_batch=4))
    assert "resuming pre-train vit_mini_patch8 at step 8/8; micro_batch: 8 -> 4; threads: 1 -> 2" in (
        capsys.readouterr().out
    )
    assert state.micro_batch == 4
    assert state.notes == (
        "resumed at step 8 on a changed machine (micro_batch: 8 -> 4; threads: 1 -> 2): equal only to rounding",
    )


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_checkpoint_that_is_none_of_ours_is_refused(noise_images, tmp_path, content):
    out = tmp_path / "a"
    out.mkdir()
    if content is None:
        torch.save({"model": {}, "epoch": 3}, out / CHECKPOINT_FILE)
    else:
        (out / CHECKPOINT_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint.pth is damaged or no training checkpoint of ours: delete it"):
        train(noise_images, out)


def assert_good(out, step):
    content = torch.load(out / CHECKPOINT_FILE)
    assert content["state"]["step"] == step
    assert all(tensor.isfinite().all() for tensor in content["model"].values())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(noise_images, tmp_path, monkeypatch):
    original, calls = MaskedAutoencoder.forward, []

    def forward(self, images, noise, mask_ratio):
        output = original(self, images, noise, mask_ratio)
        calls.append(1)
        return output._replace(loss=output.loss * float("inf")) if len(calls) == 6 else output

    monkeypatch.setattr(MaskedAutoencoder, "forward", forward)
    with pytest.raises(
        UserError, match=r"the loss is inf at step 5 \(epoch 1, lr .*checkpoint.pth holds the last good"
    ):
        train(noise_images, tmp_path / "a")
    assert_good(tmp_path / "a", 5)
    monkeypatch.undo()
    assert train(noise_images, tmp_path / "a").step == 8


def test_weights_that_are_not_finite_are_not_saved(noise_images, tmp_path, monkeypatch):
    # A finite loss with a gradient that is not: only the next loss would show it.
    original, steps = loop.train_step, []

    def train_step(model, *args, **options):
        loss = original(model, *args, **options)
        steps.append(1)
        if len(steps) == 3:
            model.cls_token.data[0, 0, 5] = float("nan")
        return loss

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(UserError, match=r"a weight became infinite or NaN at step 2 .*holds the last good state"):
        train(noise_images, tmp_path / "a")
    assert_good(tmp_path / "a", 2)


def test_an_absurd_rate_diverges_with_a_sentence(noise_images, tmp_path):
    with pytest.raises(UserError, match=r"at step [1-7] \(epoch [01], lr .*a lower base_lr, a longer warm-up"):
        train(noise_images, tmp_path / "a", Machine(save_minutes=60), base_lr=1e30)
    assert not (tmp_path / "a" / pretrain.WEIGHTS_FILE).exists()


def test_unreadable_images_are_named_and_too_many_stop_the_run(noise_images, tmp_path, capsys):
    images = shutil.copytree(noise_images, tmp_path / "images")
    for number in range(3):
        (images / f"{number:02}.png").write_bytes(b"broken")
    assert train(images, tmp_path / "a").step == 8
    out = capsys.readouterr().out
    for number in range(3):
        assert out.count(f"unreadable image, replaced by black: {images}/{number:02}.png") == 1
    for number in range(3, 20):
        (images / f"{number:02}.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="images cannot be read"):
        train(images, tmp_path / "b")


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
        (["--data", "nowhere"], "error: nowhere is not a folder of images"),
        (["--set", "batch=16", "target=pca", "pca_components=500"], "error: pca_components=500: 1280 patches of 192"),
        (["--set", "batch=16", "target=tokens", "tokenizer=dall-e"], "error: --tokenizer FILE is needed by tokenizer="),
        (
            ["--tokenizer", "x.pth", "--set", "batch=16"],
            "error: --tokenizer FILE is needed by tokenizer=dall-e, and by",
        ),
        (["--eval-data", "."], "error: --eval-data is used only with --eval-every N"),
        (["--eval-every", "1"], "has no folder train: k-NN needs"),
        (["--micro-batch", "-1"], "error: --micro-batch -1: give a positive number of images"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(noise_images, tmp_path, monkeypatch, capsys, flags, sentence):
    arguments = ["--data", str(noise_images), "--arch", "vit_mini_patch8", "--recipe", "mini", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments, "--out", str(tmp_path / "a"), *flags])
    assert pretrain.main() == 1
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def wait_for_lines(path, count, process):
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_weights(noise_images, tmp_path):
    train(noise_images, tmp_path / "whole", epochs=12)
    out = tmp_path / "killed"
    steps = []
    for lines, workers in ((2, 0), (6, 2)):
        process = start(command(noise_images, out, "--save-minutes", 0, "--workers", workers, epochs=12))
        wait_for_lines(out / LOG_FILE, lines, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        steps.append(torch.load(out / CHECKPOINT_FILE)["state"]["step"])
    assert 4 <= steps[0] < steps[1] < 48
    process = start(command(noise_images, out, epochs=12))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert f"resuming pre-train vit_mini_patch8 at step {steps[1]}/48\n" in output
    assert differing(weights(tmp_path / "whole"), weights(out)) == []
    assert [(line["epoch"], line["loss"]) for line in log(out)] == [
        (line["epoch"], line["loss"]) for line in log(tmp_path / "whole")
    ]


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_130(noise_images, tmp_path):
    process = start(command(noise_images, tmp_path, epochs=500))
    wait_for_lines(tmp_path / LOG_FILE, 1, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    assert f"stopped; the same command goes on from {tmp_path / CHECKPOINT_FILE}" in output
    assert "Traceback" not in output
    step = torch.load(tmp_path / CHECKPOINT_FILE)["state"]["step"]
    assert 4 <= step < 2000
    assert len(log(tmp_path)) == step // 4


# Run by torchrun: pre-train, with the second of two processes out of memory in its first forward passes, or stopped
# alone in the sixth step.
MISHAP = """
import os, signal, sys, torch
from mae_core import pretrain
from mae_core.autoencoder import MaskedAutoencoder

mishap, second = sys.argv.pop(1), os.environ["RANK"] == "1"
forward, step_noise = MaskedAutoencoder.forward, pretrain.step_noise

def small_forward(self, images, noise, mask_ratio):
    if second and len(images) > 2:
        raise torch.OutOfMemoryError("simulated")
    return forward(self, images, noise, mask_ratio)

def stopping_noise(seed, step, *rest):
    if second and step == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return step_noise(seed, step, *rest)

if mishap == "memory":
    MaskedAutoencoder.forward = small_forward
if mishap == "stop":
    pretrain.step_noise = stopping_noise
sys.exit(pretrain.main())
"""


def torchrun(script, mishap, arguments):
    process = start(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, mishap, *arguments[2:]]
    )
    try:
        return process.communicate(timeout=240)[0], process.returncode
    finally:
        process.terminate()  # processes that wait for each other; torchrun ends its children


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["none", "memory", "stop"])
def test_two_processes_equal_one_to_rounding(noise_images, reference, tmp_path, mishap):
    script = tmp_path / "mishap.py"
    script.write_text(MISHAP)
    out = tmp_path / "two"
    output, code = torchrun(script, mishap, command(noise_images, out))
    if mishap == "stop":
        # One process was told to stop: both did, after the same step, and rank 0 has saved it.
        assert code != 0
        assert "Gloo" not in output
        assert torch.load(out / CHECKPOINT_FILE)["state"]["step"] == 6
        output, code = torchrun(script, "none", command(noise_images, out))
        assert "resuming pre-train vit_mini_patch8 at step 6/8\n" in output
    assert code == 0, output
    content = torch.load(out / CHECKPOINT_FILE)
    assert content["machine"]["processes"] == 2
    assert content["state"]["micro_batch"] == (2 if mishap == "memory" else 8)
    assert_equal_to_rounding(weights(reference), weights(out), rate_sum=5e-4)
    assert [line["loss"] for line in log(out)] == pytest.approx([line["loss"] for line in log(reference)], rel=1e-5)


@pytest.mark.slow
def test_two_processes_share_a_fitted_target_and_the_following(noise_images, tmp_path):
    for split, files in (("train", slice(0, 40)), ("val", slice(40, 64))):
        for number, file in enumerate(sorted(noise_images.iterdir())[files]):
            (tmp_path / "labelled" / split / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / "labelled" / split / f"c{number % 2}" / file.name)
    script = tmp_path / "mishap.py"
    script.write_text(MISHAP)
    flags = ["--eval-every", 2, "--eval-data", tmp_path / "labelled", "--keep-every", 1]
    knobs = {"target": "pca", "pca_components": 5, "fit_images": 8, "repeated_augmentation": 2, "masking": "block"}
    output, code = torchrun(script, "none", command(noise_images, tmp_path / "two", *flags, **knobs))
    assert code == 0, output
    process = start(command(noise_images, tmp_path / "one", *flags, **knobs))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "epoch 2/2: k-NN top-1 " in output
    assert_equal_to_rounding(weights(tmp_path / "one"), weights(tmp_path / "two"), rate_sum=5e-4)
    one, two = (log(tmp_path / name)[1]["knn_top1"] for name in ("one", "two"))
    assert abs(one - two) < 100 * 2 / 24  # a vote may turn by rounding
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
