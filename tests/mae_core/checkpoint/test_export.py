import json

import pytest
import torch
from safetensors.torch import load_file

from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import CheckpointError, read_checkpoint
from mae_core.checkpoint import __main__ as checkpoint_report
from mae_core.checkpoint.__main__ import KNOWN_SHA256, main
from mae_core.checkpoint.export import TARGETS, export
from mae_core.checkpoint.formats import FORMATS
from mae_core.checkpoint.weights_file import save_weights
from mae_core.errors import UserError
from mae_core.vit import build_vit
from tests.fixtures.checkpoint import beit, vit
from tests.mae_core.checkpoint.test_formats import PLAIN_VIT, assert_same_output, equal, loaded, put  # noqa: F401

OUT = {"timm": "out.safetensors", "fair": "out.pth", "detectron2": "out.pth", "hf": "out"}
READ_AS = {"timm": "timm", "fair": "mae-pretrain", "detectron2": "detectron2", "hf": "hf-vit"}


@pytest.mark.parametrize("form", TARGETS)
def test_an_export_comes_back_bit_for_bit(put, tmp_path, form):  # noqa: F811
    checkpoint = read_checkpoint(put({"model": PLAIN_VIT}))
    export(checkpoint, form, tmp_path / OUT[form])
    again = read_checkpoint(tmp_path / OUT[form])
    assert again.format == READ_AS[form]
    assert equal(again.encoder, PLAIN_VIT)
    assert (again.arch, again.mean, again.std, again.eps) == (
        checkpoint.arch,
        checkpoint.mean,
        checkpoint.std,
        checkpoint.eps,
    )
    # And a second time, to the same bytes where the form is a single safetensors file.
    export(again, form, tmp_path / f"again-{OUT[form]}")
    assert equal(read_checkpoint(tmp_path / f"again-{OUT[form]}").encoder, PLAIN_VIT)


def test_exports_hold_what_their_readers_expect(put, tmp_path):  # noqa: F811
    """timm: strict into its own model. FAIR: {"model"}. detectron2: names below the backbone's net."""
    reference = vit(num_classes=10)
    checkpoint = read_checkpoint(put({"model": reference.state_dict()}))
    for form in ("timm", "fair", "detectron2"):
        export(checkpoint, form, tmp_path / f"{form}-{OUT[form]}")
    reference.load_state_dict(load_file(tmp_path / "timm-out.safetensors"), strict=True)
    assert equal(torch.load(tmp_path / "fair-out.pth", weights_only=True)["model"], reference.state_dict())
    content = torch.load(tmp_path / "detectron2-out.pth", weights_only=True)
    assert content["matching_heuristics"] is True
    assert equal(content["model"], {f"backbone.net.{n}": t for n, t in checkpoint.encoder.items()})


def test_what_is_no_plain_vit_goes_to_timm_alone(put, tmp_path):  # noqa: F811
    reference = beit()
    checkpoint = read_checkpoint(put({"model": reference.state_dict()}))
    export(checkpoint, "timm", tmp_path / "b.safetensors")
    assert equal(load_file(tmp_path / "b.safetensors"), reference.state_dict())
    for form in ("fair", "hf", "detectron2"):
        with pytest.raises(CheckpointError, match="not a plain ViT: only --to timm holds it"):
            export(checkpoint, form, tmp_path / "b")


def test_a_class_that_transformers_has_not_is_refused(put, tmp_path):  # noqa: F811
    checkpoint = read_checkpoint(put({"model": vit(num_classes=10, global_pool="avg").state_dict()}))
    with pytest.raises(CheckpointError, match="pools by average"):
        export(checkpoint, "hf", tmp_path / "b")
    with pytest.raises(UserError, match="unknown form 'tim'; did you mean timm"):
        export(checkpoint, "tim", tmp_path / "b")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="is a folder: give another name"):
        export(checkpoint, "timm", tmp_path / "folder")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export(checkpoint, "timm", tmp_path / "absent" / "x.safetensors")


def test_transformers_reads_the_export(put, tmp_path):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    export(read_checkpoint(put({"model": PLAIN_VIT})), "hf", tmp_path / "out")
    model = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    assert_same_output(lambda images: model(images).last_hidden_state, vit().forward_features)


def test_the_export_of_a_masked_autoencoder_keeps_its_decoder(small_mae, put, tmp_path):  # noqa: F811
    state = small_mae().state_dict()
    checkpoint = read_checkpoint(put({"model": state}))
    export(checkpoint, "hf", tmp_path / "out")
    again = read_checkpoint(tmp_path / "out")
    assert again.format == "hf-vit-mae"
    assert equal({**again.encoder, **again.decoder}, {name: tensor.detach() for name, tensor in state.items()})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["decoder_hidden_size"], config["decoder_num_hidden_layers"]) == (32, 1)


# The command


def test_the_report_tells_the_fate_of_every_tensor(put, capsys):  # noqa: F811
    state = {
        **beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True).state_dict(),
        "mask_token": torch.zeros(1, 1, 128),
    }
    assert main([str(put({"model": state}, "beit.pth"))]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "format     beit",
        "BEiT's relative positions and layer scale",
        "no detection or segmentation: not a plain ViT",
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


def test_the_report_knows_released_files_and_what_others_are(put, tmp_path, capsys, monkeypatch):  # noqa: F811
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
    digest = read_checkpoint(put({"model": PLAIN_VIT}, "z.pth")).sha256
    monkeypatch.setitem(KNOWN_SHA256, digest[:8], "a file of some fame")
    main([str(tmp_path / "z.pth")])
    assert "this is a file of some fame" in capsys.readouterr().out
    monkeypatch.delitem(KNOWN_SHA256, digest[:8])
    monkeypatch.setattr(
        checkpoint_report, "KNOWN_MD5", {checkpoint_report.md5_of(tmp_path / "z.pth")[:6]: "the paper's"}
    )
    main([str(tmp_path / "z.pth")])
    assert "this is the paper's" in capsys.readouterr().out


def test_convert_and_to_write_and_formats_lists(put, tmp_path, capsys):  # noqa: F811
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


def test_what_a_form_does_not_hold_is_said(tmp_path, capsys):
    """A decoder, and pixels and eps that are not MAE's; the canonical form and transformers' hold all."""
    state = MaskedAutoencoder("vit_mini_patch8", decoder_dim=32, decoder_depth=1, decoder_heads=2).state_dict()
    save_weights(
        tmp_path / "a.safetensors",
        state,
        {"mean": "0.5 0.5 0.5", "std": "0.5 0.5 0.5", "eps": "1e-12", "pool": "token"},
    )
    for form, said in (
        ("timm", "the decoder (20 tensors), mean 0.5 0.5 0.5"),
        ("fair", "mean 0.5 0.5 0.5"),
        ("hf", ""),
    ):
        out = tmp_path / {"timm": "b.safetensors", "fair": "b.pth", "hf": "b"}[form]
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
