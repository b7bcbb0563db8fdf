import hashlib
import os
import subprocess
import sys

import pytest
import torch

from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import read_checkpoint, save_weights
from mae_core.checkpoint.__main__ import KNOWN_MD5, KNOWN_SHA256, main
from mae_core.checkpoint.formats import FORMATS
from mae_core.vit import build_vit
from tests.fixtures import ROOT
from tests.fixtures.checkpoint import ARGS, DECODER, ENCODER, PLAIN_VIT, RUN, beit, equal, folder, hf, vit


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
    absent = tmp_path / "absent.pth"
    command = [sys.executable, "-m", "mae_core.checkpoint", str(absent)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (2, "")
    forms = "give a checkpoint file or folder, hf:NAME, timm:NAME or random:ARCH"
    assert child.stderr.strip() == f"error: {absent} does not exist: {forms}"


def test_the_report_tells_the_fate_of_every_tensor(put, capsys):
    state = beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True).state_dict()
    state["mask_token"] = torch.zeros(1, 1, 128)
    assert main([str(put({"model": state}, "beit.pth"))]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "format     beit",
        "BEiT's relative positions and layer scale",
        "fine-tuning, linear probing, k-NN, detection, segmentation",
        "mean 0.5 0.5 0.5, std 0.5 0.5 0.5",
        "pooling avg",
        "6 of them converted, 1 dropped; 100 % of the encoder",
        "dropped    mask_token",
        "converted  blocks.*.attn.relative",
        "<- rel_pos_bias.relative_position_bias_table (6)",
        "blocks.*.attn.q_bias (6)",
    ):
        assert expected in printed, expected
    shown = {line[11:].partition(" ")[0] for line in printed.splitlines()}
    folded = {name.replace(f"blocks.{i}.", "blocks.*.") for i in range(6) for name in state if f"blocks.{i}." in name}
    assert folded <= shown


def test_the_report_knows_released_files_and_what_others_are(put, tmp_path, capsys, monkeypatch):
    tuned = vit(num_classes=10, global_pool="avg").state_dict()
    full = {**PLAIN_VIT, "decoder_embed.weight": torch.zeros(32, 128)}
    for content, name, expected in (
        ({"model": tuned}, "x.pth", "this is a fine-tuned classifier, not a pre-trained encoder"),
        ({"model": full}, "mae_visualize_vit_large.pth", "by its name this is the un-normalised visualise model"),
        ({"model": full}, "y.pth", "nothing in the file tells whether its target was normalised pixels"),
    ):
        path = put(content, name)
        assert main([str(path)]) == 0
        assert expected in capsys.readouterr().out
    famous = put({"model": PLAIN_VIT}, "z.pth")
    for table, algorithm, digits in ((KNOWN_SHA256, "sha256", 8), (KNOWN_MD5, "md5", 6)):
        digest = hashlib.new(algorithm, famous.read_bytes()).hexdigest()
        with monkeypatch.context() as patch:
            patch.setitem(table, digest[:digits], f"known by its {algorithm}")
            main([str(famous)])
        assert f"this is known by its {algorithm}" in capsys.readouterr().out


def test_convert_and_to_write_and_formats_lists(put, tmp_path, capsys):
    path = str(put({"model": {f"module.{name}": t for name, t in PLAIN_VIT.items()}, "model_ema": PLAIN_VIT}))
    assert main([path]) == 2
    assert "model and model_ema" in capsys.readouterr().err
    out = tmp_path / "canonical.safetensors"
    assert main([path, "--key", "model_ema", "--convert", str(out), "--to", "fair", str(tmp_path / "fair.pth")]) == 0
    assert f"written: {out}" in capsys.readouterr().out
    assert equal(read_checkpoint(out).encoder, PLAIN_VIT)
    assert equal(read_checkpoint(tmp_path / "fair.pth").encoder, PLAIN_VIT)
    assert main(["--formats"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(listed) == {f.name for f in FORMATS} | {"ours", "prefixed"}
    with pytest.raises(SystemExit):
        main([])
    assert main([path, "--key", "model", "--to", "tim", "x"]) == 2
    assert "did you mean timm" in capsys.readouterr().err


def test_nothing_is_printed_before_a_mistake(put, tmp_path, capsys):
    path = str(put({"model": PLAIN_VIT}))
    flags = (["--to", "timmm", "x"], ["--to", "fair", "x.bin"], ["--convert", "x.pth"], ["--convert", str(tmp_path)])
    for wrong in (*flags, ["--to", "timm", str(tmp_path / "absent" / "x.safetensors")]):
        assert main([path, *wrong]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err[:7], printed.err.count("\n")) == ("", "error: ", 1)


def test_the_file_in_a_folder_that_is_read_is_not_overwritten(tmp_path, capsys):
    path = folder(tmp_path / "m", hf(PLAIN_VIT))
    before = (path / "model.safetensors").read_bytes()
    assert main([str(path), "--convert", str(path / "model.safetensors")]) == 2
    assert "is the file that is read" in capsys.readouterr().err
    assert (path / "model.safetensors").read_bytes() == before


def test_the_report_shows_odd_names_escaped(put, capsys):
    odd = {"a\x1b[2J\ud800\u202e": torch.ones(1), "b" * 9999: torch.ones(1)}
    assert main([str(put({"model": {**PLAIN_VIT, **odd}}))]) == 0
    printed = capsys.readouterr().out
    assert "dropped    a\\x1b[2J\\ud800\\u202e\n" in printed
    assert max(map(len, printed.splitlines())) < 1100


def test_ctrl_c_ends_with_a_word(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mae_core.checkpoint.__main__.read_checkpoint", interrupted)
    assert main(["random:vit_mini_patch8"]) == 130
    assert capsys.readouterr() == ("", "stopped\n")


def test_ctrl_c_during_the_imports_ends_with_a_word(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt\n")
    # No bytecode: two contents of one size within a second would share it.
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "mae_core.checkpoint", "random:vit_mini_patch8"]
    child = subprocess.run(command, cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True)
    assert (child.returncode, child.stdout, child.stderr) == (130, "", "stopped\n")
    (tmp_path / "torch.py").write_text("raise ZeroDivisionError\n")  # anything else is shown as ever
    child = subprocess.run(command, cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True)
    assert child.returncode == 1
    assert "ZeroDivisionError" in child.stderr


def test_the_command_says_what_a_form_does_not_hold(tmp_path, capsys):
    """A decoder, and pixels and eps that are not MAE's; the canonical form and transformers' hold all."""
    state = MaskedAutoencoder("vit_mini_patch8", decoder_dim=32, decoder_depth=1, decoder_heads=2).state_dict()
    half = "0.5 0.5 0.5"
    save_weights(tmp_path / "a.safetensors", state, {"mean": half, "std": half, "eps": "1e-12", "pool": "token"})
    for form, name, said in (
        ("timm", "b.safetensors", "the decoder (20 tensors), mean 0.5 0.5 0.5"),
        ("fair", "b.pth", "mean 0.5 0.5 0.5"),
        ("hf", "b", ""),
    ):
        out = tmp_path / name
        assert main([str(tmp_path / "a.safetensors"), "--to", form, str(out)]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        missing = f"; not in this form: {said}, std 0.5 0.5 0.5, eps 1e-12" if said else ""
        assert last == f"written for {form}: {out}{missing}"


def test_files_keep_their_suffix_and_their_source(tmp_path, capsys):
    save_weights(tmp_path / "a.safetensors", build_vit("vit_mini_patch8").state_dict(), {})
    before = (tmp_path / "a.safetensors").read_bytes()
    for arguments, message in (
        (["--convert", "a.safetensors"], "is the file that is read"),
        (["--convert", "b.pth"], "let its name end in .safetensors"),
        (["--to", "fair", "b.safetensors"], "ends in .pth or .pt"),
        (["--to", "timm", "a.bin"], "ends in .safetensors"),
        (["--convert", "a.safetensors/b.safetensors"], "cannot be written"),
    ):
        *form, name = arguments
        assert main([str(tmp_path / "a.safetensors"), *form, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors"]
