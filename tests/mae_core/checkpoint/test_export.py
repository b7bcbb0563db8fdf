import json

import pytest
import torch
from safetensors.torch import load_file

from mae_core.checkpoint import CheckpointError, read_checkpoint
from mae_core.checkpoint.export import TARGETS, export
from mae_core.errors import UserError
from tests.fixtures.checkpoint import PLAIN_VIT, assert_same_output, beit, equal, vit

OUT = {"timm": "out.safetensors", "fair": "out.pth", "detectron2": "out.pth", "hf": "out"}
READ_AS = {"timm": "timm", "fair": "mae-pretrain", "detectron2": "detectron2", "hf": "hf-vit"}


@pytest.mark.parametrize("form", TARGETS)
def test_an_export_comes_back_bit_for_bit(put, tmp_path, form):
    checkpoint = read_checkpoint(put({"model": PLAIN_VIT}))
    export(checkpoint, form, tmp_path / OUT[form])
    again = read_checkpoint(tmp_path / OUT[form])
    assert again.format == READ_AS[form]
    assert equal(again.encoder, PLAIN_VIT)
    for value in ("arch", "mean", "std", "eps"):
        assert getattr(again, value) == getattr(checkpoint, value), value
    # And a second time.
    export(again, form, tmp_path / f"again-{OUT[form]}")
    assert equal(read_checkpoint(tmp_path / f"again-{OUT[form]}").encoder, PLAIN_VIT)


def test_exports_hold_what_their_readers_expect(put, tmp_path):
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


def test_only_timms_form_holds_more_than_a_plain_vit(put, tmp_path):
    reference = beit()
    checkpoint = read_checkpoint(put({"model": reference.state_dict()}))
    export(checkpoint, "timm", tmp_path / "b.safetensors")
    assert equal(load_file(tmp_path / "b.safetensors"), reference.state_dict())
    for form in ("fair", "hf", "detectron2"):
        with pytest.raises(CheckpointError, match="not a plain ViT: only --to timm holds it"):
            export(checkpoint, form, tmp_path / "b")


def test_exports_that_cannot_be_written_are_refused(put, tmp_path):
    checkpoint = read_checkpoint(put({"model": vit(num_classes=10, global_pool="avg").state_dict()}))
    with pytest.raises(CheckpointError, match="pools by average"):
        export(checkpoint, "hf", tmp_path / "b")
    with pytest.raises(UserError, match="unknown form 'tim'; did you mean timm"):
        export(checkpoint, "tim", tmp_path / "b")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="is a folder: give another name"):
        export(checkpoint, "timm", tmp_path / "folder")
    with pytest.raises(UserError, match=r"x\.safetensors cannot be written: .* its folder was removed"):
        export(checkpoint, "timm", tmp_path / "absent" / "x.safetensors")


def test_transformers_reads_the_export(put, tmp_path):
    transformers = pytest.importorskip("transformers")
    export(read_checkpoint(put({"model": PLAIN_VIT})), "hf", tmp_path / "out")
    model = transformers.ViTModel.from_pretrained(tmp_path / "out", add_pooling_layer=False).eval()
    assert_same_output(lambda images: model(images).last_hidden_state, vit().forward_features)


def test_the_export_of_a_masked_autoencoder_keeps_its_decoder(small_mae, put, tmp_path):
    state = small_mae().state_dict()
    checkpoint = read_checkpoint(put({"model": state}))
    export(checkpoint, "hf", tmp_path / "out")
    again = read_checkpoint(tmp_path / "out")
    assert again.format == "hf-vit-mae"
    assert equal({**again.encoder, **again.decoder}, {name: tensor.detach() for name, tensor in state.items()})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["decoder_hidden_size"], config["decoder_num_hidden_layers"]) == (32, 1)
