import dataclasses

import pytest
import torch

from mae_core.checkpoint import CheckpointError, load_classifier, load_encoder, read_checkpoint
from mae_core.checkpoint.identify import resize_position_embedding
from mae_core.vit import build_vit
from tests.fixtures import checkpoint as small
from tests.fixtures.checkpoint import DECODER, ENCODER, FC_NORM, HEAD, PROBE, TRUNK, equal, loaded, without


def test_an_encoder_is_loaded_whole_with_its_eps(put):
    vit = build_vit("vit_mini_patch8")
    report = load_encoder(vit, dataclasses.replace(read_checkpoint(put({"model": ENCODER})), eps=1e-3))
    assert {module.eps for module in vit.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-3}
    assert (len(report.loaded), report.resized, report.dropped, report.missing) == (78, (), (), ())
    assert equal(vit.state_dict(), ENCODER)


@pytest.mark.parametrize(("pool", "norm"), [("avg", FC_NORM), ("token", {})])
def test_a_classifier_is_loaded_whole_into_a_model_of_its_pooling_and_classes(put, pool, norm):
    state = {**(TRUNK if norm else ENCODER), **norm, **HEAD}
    checkpoint = read_checkpoint(put({"model": state}))
    vit = build_vit("vit_mini_patch8", num_classes=10, pool=pool)
    report = load_classifier(vit, checkpoint)
    assert (set(report.loaded), report.dropped, report.missing) == (set(state), (), ())
    assert equal(vit.state_dict(), state)
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


def test_a_load_that_does_not_fit_is_refused_and_leaves_the_model_unchanged(put):
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


def test_registers_and_missing_class_positions_survive_another_input_size(put):
    registers = small.vit(init_values=1e-5, reg_tokens=4, no_embed_class=True)
    no_class_position = small.vit(init_values=1e-5, no_embed_class=True, num_classes=10)
    for reference in (registers, small.distilled(), no_class_position):
        checkpoint = read_checkpoint(put(reference.state_dict(), "file.safetensors"))
        model, report = loaded(checkpoint, 64)
        prefix = checkpoint.variant.positions
        assert report.resized == ("pos_embed",)
        assert model.pos_embed.shape[1] == prefix + 64
        assert torch.equal(model.pos_embed[:, :prefix], checkpoint.encoder["pos_embed"][:, :prefix])
        assert model(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_beits_tables_are_resized_as_timm_resizes_them(put):
    reference = small.beit()
    model, report = loaded(read_checkpoint(put({"model": reference.state_dict()})), 64)
    assert report.resized == tuple(f"blocks.{i}.attn.relative_position_bias_table" for i in range(6))
    if not hasattr(reference.blocks[0].attn, "set_window_size"):
        pytest.skip("timm before 1.0.31 cannot resize these tables, so there is nothing to compare with")
    for block in reference.blocks:
        block.attn.set_window_size((8, 8))
    for ours, theirs in zip(model.blocks, reference.blocks):
        table = theirs.attn.relative_position_bias_table
        torch.testing.assert_close(ours.attn.relative_position_bias_table, table, atol=1e-6, rtol=0)
        assert table.shape == (15 * 15 + 3, 4)
