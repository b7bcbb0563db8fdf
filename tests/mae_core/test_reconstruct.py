import argparse
import os

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core.checkpoint import CheckpointError, read_checkpoint, save_weights
from mae_core.data import MEAN, STD
from mae_core.errors import UserError
from mae_core.patches import normalise_patches, patchify
from mae_core.reconstruct import load_autoencoder, load_images, main, reconstruct


def pixels_of(images, row, column):
    return images[..., 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]


@pytest.fixture
def shown(small_mae):
    """Images, the mask of their patches (True: hidden) at 75 % and the reconstruction."""
    model, images = small_mae(), torch.randn(2, 3, 48, 48)
    noise = torch.rand(2, 36, generator=torch.Generator().manual_seed(3))
    hidden = torch.ones(2, 36, dtype=torch.bool).scatter(1, noise.argsort(dim=1)[:, :9], False)
    return model, images, hidden, reconstruct(model, images, 0.75, seed=3)


def test_masked_prediction_and_pasted(shown):
    model, images, hidden, parts = shown
    with torch.no_grad():
        predicted = model.predict(images, torch.where(hidden, 1.0, 0.0), 0.75)[0]
    for b in range(2):
        for patch in range(36):
            true, masked, prediction, pasted = (pixels_of(part[b], patch // 6, patch % 6) for part in (images, *parts))
            expected = predicted[b, patch].reshape(8, 8, 3).permute(2, 0, 1)
            torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-5)
            if hidden[b, patch]:
                assert (masked == 0).all()
                assert torch.equal(pasted, prediction)
            else:
                assert torch.equal(masked, true)
                assert torch.equal(pasted, true)


def test_seed_decides_the_mask_and_larger_ratios_hide_more_of_the_same(shown):
    model, images, _, parts = shown
    again, other = reconstruct(model, images, 0.75, seed=3), reconstruct(model, images, 0.75, seed=4)
    assert torch.equal(again.masked, parts.masked)
    assert not torch.equal(other.masked, parts.masked)
    few = reconstruct(model, images, 0.95, seed=3).masked
    assert 0 < (few != 0).sum() < (parts.masked != 0).sum()
    assert (parts.masked[few != 0] != 0).all()


def test_normalised_predictions_are_taken_back_by_each_patch_s_own_statistics(small_mae, monkeypatch):
    model, images = small_mae(norm_pix=True), 2 * torch.randn(2, 3, 48, 48) + 1
    perfect = normalise_patches(patchify(images, 8))
    original = type(model).predict
    monkeypatch.setattr(type(model), "predict", lambda self, *args: (perfect, original(self, *args)[1]))
    parts = reconstruct(model, images, 0.75)
    torch.testing.assert_close(parts.prediction, images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(parts.pasted, images, atol=1e-4, rtol=1e-4)


def test_images_are_resized_by_the_short_side_and_cut_at_the_centre(tmp_path):
    # 96 high, 192 wide, halved: columns 72..119 of the original 24..167 stay. Red tells the column.
    pixels = np.zeros((96, 192, 3), np.uint8)
    pixels[..., 0] = np.arange(192)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = load_images([tmp_path / "wide.png"], 48)
    assert image.shape == (1, 3, 48, 48)
    red = (image[0, 0] * STD[0] + MEAN[0]) * 255
    assert red[20, 0].item() == pytest.approx(48.5, abs=1.5)
    assert red[20, -1].item() == pytest.approx(142.5, abs=1.5)
    assert (image[0, 1] * STD[1] + MEAN[1]).abs().max() < 1e-6


@pytest.fixture
def file(small_mae, tmp_path):
    """Write the small autoencoder's weights with this metadata; its path."""

    def write(state=None, **metadata):
        path = tmp_path / "mae.safetensors"
        save_weights(path, small_mae().state_dict() if state is None else state, metadata)
        return path

    return write


@pytest.fixture
def command(file, noise_images, tmp_path):
    """Run the command with the small autoencoder and flags; later flags win."""

    def run(*flags):
        path = file(decoder_heads="2")
        what = ["--ckpt", path, "--images", noise_images, "--out", tmp_path / "picture.png", *flags]
        return main([str(word) for word in what])

    return run


def test_a_loaded_autoencoder_predicts_what_the_saved_one_did(file, small_mae):
    saved, images, noise = small_mae(), torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    loaded = load_autoencoder(read_checkpoint(file(decoder_heads="2", norm_pix="false")))
    with torch.no_grad():
        assert torch.equal(loaded(images, noise).prediction, saved(images, noise).prediction)
    # 16 heads, as in every released decoder, where the file does not say: another function of the same weights.
    assert {b.attn.num_heads for b in load_autoencoder(read_checkpoint(file())).decoder_blocks} == {16}


@pytest.mark.parametrize(
    ("said", "flag", "norm_pix"),
    [("true", False, True), ("true", True, True), ("false", False, False), (None, True, True), (None, False, False)],
)
def test_the_file_names_its_target_or_else_the_flag_does(file, said, flag, norm_pix):
    path = file(**({"norm_pix": said} if said else {}))
    assert load_autoencoder(read_checkpoint(path), flag).norm_pix is norm_pix


def test_an_official_training_checkpoint_says_its_target(small_mae, tmp_path):
    run = {"optimizer": {}, "epoch": 3, "args": argparse.Namespace(norm_pix_loss=True, epochs=800)}
    torch.save({"model": small_mae().state_dict(), **run}, tmp_path / "checkpoint-3.pth")
    assert load_autoencoder(read_checkpoint(tmp_path / "checkpoint-3.pth")).norm_pix


def test_a_flag_that_contradicts_the_file_is_refused(file):
    with pytest.raises(CheckpointError, match="says that it predicts plain pixels: leave out --norm-pix"):
        load_autoencoder(read_checkpoint(file(norm_pix="false")), norm_pix=True)


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "a.png")
    monkeypatch.setattr("mae_core.reconstruct.read_image", lambda file: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=r"a.png is no regular file"):
        load_images([tmp_path / "a.png"], 48)


def test_a_name_that_is_a_broken_formula_is_shown_as_it_is(command, file, tmp_path):
    odd = file(decoder_heads="2").rename(tmp_path / "$\\frac{1$ €.safetensors")
    assert command("--ckpt", odd, "--limit", "1") == 0


def test_ctrl_c_ends_with_a_word(command, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mae_core.reconstruct.read_checkpoint", interrupted)
    assert command() == 130
    assert capsys.readouterr() == ("", "stopped\n")


@pytest.mark.parametrize(
    ("changes", "metadata", "sentence"),
    [
        ({}, {"decoder_heads": "3"}, "is 32 wide, which must be divisible by 4 and by its 3 heads"),
        ({"decoder_embed.weight": torch.zeros(0, 128)}, {}, "is 0 wide"),
        ({"decoder_embed.weight": torch.tensor(1.0)}, {}, "is 1 wide"),
        ({"decoder_embed.weight": torch.zeros(10**5, 128)}, {}, r"mask_token is \[1, 1, 32\] where"),
        ({"decoder_target.components": torch.zeros(5, 192)}, {}, "has no mean, which its target needs"),
        ({"decoder_target.components": torch.zeros(5), "decoder_target.mean": torch.zeros(192)}, {}, "components is"),
        (
            {"decoder_target.tokenizer.centres": torch.zeros(5, 7)},
            {},
            r"centres is \[5, 7\] where its target",
        ),
    ],
)
def test_a_decoder_that_no_model_has_is_refused(small_mae, file, changes, metadata, sentence):
    path = file({**small_mae().state_dict(), **changes}, **{"decoder_heads": "2", **metadata})
    with pytest.raises(CheckpointError, match=sentence):
        load_autoencoder(read_checkpoint(path))


def test_a_file_without_a_decoder_is_refused(small_mae, file):
    encoder = {n: t for n, t in small_mae().state_dict().items() if not n.startswith(("decoder", "mask_token"))}
    with pytest.raises(CheckpointError, match=r"has no decoder: .* full checkpoint, such as mae_visualize_"):
        load_autoencoder(read_checkpoint(file(encoder)))
    with pytest.raises(CheckpointError, match="random:vit_mini_patch8 has no decoder"):
        load_autoencoder(read_checkpoint("random:vit_mini_patch8"))


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("decoder_norm.bias", None, "has no decoder_norm.bias, which its decoder needs"),
        ("mask_token", None, "has no mask_token, which its decoder needs"),
        ("decoder_pred.weight", (48, 32), r"decoder_pred.weight is \[48, 32\] where its decoder has \[192, 32\]"),
        ("decoder_extra", (3,), "has decoder_extra, which its decoder does not have"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(small_mae, file, name, change, sentence):
    state = small_mae().state_dict()
    if change is None:
        del state[name]
    else:
        state[name] = torch.zeros(change)
    with pytest.raises(CheckpointError, match=sentence):
        load_autoencoder(read_checkpoint(file(state)))


def test_the_picture_has_a_row_per_image_and_three_columns_per_ratio(command, tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    assert command("--out", out, "--mask-ratio", ".75", ".9", "--limit", "3") == 0
    assert capsys.readouterr().out == f"{out}: 3 images at mask ratios 0.75, 0.9\n"
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    # Random pixels and predictions are nowhere white: the pictures are the runs between white lines.
    ink = pixels.min(axis=2) < 250
    for fraction, axis, count in ((0.5, 0, 7), (0.5, 1, 3)):
        runs = (np.diff((ink.mean(axis=axis) > fraction).astype(int)) == 1).sum()
        assert runs == count


def test_several_checkpoints_stand_side_by_side_with_the_same_patches_hidden(
    command, file, small_mae, tmp_path, monkeypatch
):
    other = file(small_mae(seed=1).state_dict(), decoder_heads="2").rename(tmp_path / "other.safetensors")
    drawn = []
    monkeypatch.setattr("mae_core.reconstruct.draw", lambda columns, *_: drawn.extend(columns))
    assert command("--limit", "2", "--ckpt", other, tmp_path / "mae.safetensors") == 0
    titles, images = zip(*drawn)
    parts = ("reconstruction", "pasted on visible")
    assert titles == ("other\n75 % masked", *parts, "mae\n75 % masked", *parts, "original")
    assert torch.equal(images[0], images[3])
    hidden = images[0] == 0
    assert torch.equal(images[2][~hidden], images[5][~hidden])
    assert not torch.isclose(images[2][hidden], images[5][hidden]).any()


def test_the_picture_shows_the_originals_spread_over_the_folder(command, tmp_path):
    colours = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]
    for number, colour in enumerate(colours):
        (tmp_path / "images" / f"class{number // 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 50), colour).save(tmp_path / "images" / f"class{number // 2}" / f"{number}.png")
    assert command("--images", tmp_path / "images", "--limit", "2") == 0
    with Image.open(tmp_path / "picture.png") as picture:
        last_column = np.asarray(picture.convert("RGB"))[:, int(picture.width * 0.9)]
    seen = {tuple(int(v) for v in pixel) for pixel in last_column}
    assert {colours[0], colours[2]} <= seen
    assert not {colours[1], colours[3]} & seen


@pytest.mark.parametrize("number", ["9" * 30, "-1", "x"])
def test_a_seed_is_a_whole_number_below_two_to_the_63(command, capsys, number):
    with pytest.raises(SystemExit, match="2"):
        command("--seed", number)
    assert f"argument --seed: {number} is not a whole number from 0 to 2^63 - 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--mask-ratio", "0.75", "1"], "--mask-ratio 1.0: give the share of hidden patches, between 0 and 1"),
        (["--mask-ratio", "75"], "--mask-ratio 75.0: give the share"),
        (["--mask-ratio", "0.99"], "a mask ratio of 0.99 leaves 0 of 36 patches visible"),
        (["--limit", "0"], "--limit 0: give a positive number of images"),
        (["--out", "picture.bmp"], "--out picture.bmp: the picture is a PNG"),
        (["--images", "nowhere"], "nowhere is not a folder of images"),
        (["--images", "EMPTY"], "holds no image"),
        (["--images", "BROKEN"], "broken.png cannot be read as an image"),
        (["--ckpt", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--ckpt", "random:vit_mini_patch8"], "has no decoder"),
        (["--out", "/proc/x.png"], "/proc/x.png cannot be written"),
        (["--out", f"{__file__}/x.png"], "test_reconstruct.py is a file, give a folder"),
        (["--out", f"{'x' * 300}.png"], "cannot be written: File name too long"),
        (["--mask-ratio", *["0.75"] * 100], "8 rows of 301 pictures are too large for one"),
    ],
)
def test_the_command_line_refuses_in_one_sentence(command, tmp_path, capsys, flags, sentence):
    for folder in ("EMPTY", "BROKEN"):
        (tmp_path / folder).mkdir()
    (tmp_path / "BROKEN" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert command(*(tmp_path / flag if flag in ("EMPTY", "BROKEN") else flag for flag in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "picture.png").exists()
