import math

import numpy as np
import pytest
import torch
from scipy.special import erf

from mae_core import vit
from mae_core.autoencoder import MaskedAutoencoder, look_up
from mae_core.errors import UserError
from mae_core.patches import patchify, unpatchify


# The paper's model once more in numpy, one sample at a time and in float64, from only the state dict: each patch is cut
# out by itself, the visible ones stay in raster order, and nothing is shuffled or restored. With `encoder_mask_tokens`
# (Table 1c) the encoder sees all patches, the hidden ones as mask tokens.
def normalised(x, weight, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * weight + bias


def block_by_hand(x, w, heads):
    h = normalised(x, w["norm1.weight"], w["norm1.bias"])
    q, k, v = np.split(h @ w["attn.qkv.weight"].T + w["attn.qkv.bias"], 3, axis=1)
    size, mixed = x.shape[1] // heads, []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        mixed.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
    x = x + np.concatenate(mixed, axis=1) @ w["attn.proj.weight"].T + w["attn.proj.bias"]
    h = normalised(x, w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    return x + (h * 0.5 * (1 + erf(h / math.sqrt(2)))) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"]


def blocks_by_hand(x, w, prefix, heads):
    for number in range(len({name.split(".")[1] for name in w if name.startswith(f"{prefix}.")})):
        start = f"{prefix}.{number}."
        x = block_by_hand(x, {k.removeprefix(start): v for k, v in w.items() if k.startswith(start)}, heads)
    return x


def sample_by_hand(w, image, noise, mask_ratio, norm_pix, encoder_mask_tokens):
    """Squared errors of the hidden patches, prediction [N, P] and mask [N] of one image [3, H, W] (4 and 2 heads)."""
    kernel, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    side = kernel.shape[-1]
    rows, columns = image.shape[1] // side, image.shape[2] // side
    cut = [image[:, r * side : (r + 1) * side, c * side : (c + 1) * side] for r in range(rows) for c in range(columns)]
    visible = sorted(np.argsort(noise)[: int(len(cut) * (1 - mask_ratio))])
    seen = list(range(len(cut))) if encoder_mask_tokens else visible
    embedded = [(kernel * cut[i]).sum((1, 2, 3)) + bias if i in visible else w["mask_token"][0, 0] for i in seen]
    x = np.stack([w["cls_token"][0, 0], *embedded]) + w["pos_embed"][0, [0, *(1 + i for i in seen)]]
    x = normalised(blocks_by_hand(x, w, "blocks", 4), w["norm.weight"], w["norm.bias"])

    x = x @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
    all_tokens = [x[0]] + [x[1 + seen.index(i)] if i in seen else w["mask_token"][0, 0] for i in range(len(cut))]
    x = blocks_by_hand(np.stack(all_tokens) + w["decoder_pos_embed"][0], w, "decoder_blocks", 2)
    x = normalised(x, w["decoder_norm.weight"], w["decoder_norm.bias"])
    prediction = x[1:] @ w["decoder_pred.weight"].T + w["decoder_pred.bias"]

    errors = []
    for i, patch in enumerate(cut):
        target = np.array([patch[c, y, x] for y in range(side) for x in range(side) for c in range(3)])
        if norm_pix:
            target = (target - target.mean()) / np.sqrt(target.var(ddof=1) + 1e-6)
        if i not in visible:
            errors.append(np.mean((prediction[i] - target) ** 2))
    return errors, prediction, np.array([float(i not in visible) for i in range(len(cut))])


def assert_as_by_hand(model, images, noise, mask_ratio):
    """Loss, predictions of hidden patches and of all, and the mask, which is returned."""
    with torch.no_grad():
        output = model(images, noise, mask_ratio)
        every, mask = model.predict(images, noise, mask_ratio)
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    options = (mask_ratio, model.norm_pix, model.encoder_mask_tokens)
    samples = [sample_by_hand(w, *pair, *options) for pair in zip(images.double().numpy(), noise.numpy())]
    errors, prediction, expected = zip(*samples)
    np.testing.assert_array_equal(mask.numpy(), expected)
    assert output.loss.item() == pytest.approx(np.mean(np.concatenate(errors)), rel=1e-5)
    np.testing.assert_allclose(every.numpy(), prediction, atol=1e-5)
    for sample, index in enumerate(output.predicted.tolist()):
        assert sorted(index) == np.flatnonzero(expected[sample]).tolist()
        np.testing.assert_allclose(output.prediction[sample].numpy(), prediction[sample][index], atol=1e-5)
    return mask


@pytest.mark.parametrize("options", [{}, {"norm_pix": True}, {"encoder_mask_tokens": True}])
@pytest.mark.parametrize(("size", "mask_ratio"), [((48, 48), 0.75), ((32, 64), 0.75), ((48, 48), 0.5)])
def test_loss_prediction_and_mask_agree_with_the_paper_written_out(small_mae, size, mask_ratio, options):
    model = small_mae(image_size=size, **options)
    images, noise = torch.randn(3, 3, *size), torch.rand(3, size[0] * size[1] // 64)
    assert_as_by_hand(model, images, noise, mask_ratio)


@pytest.mark.parametrize(("patch", "patches", "kept"), [(16, 196, 49), (14, 256, 64)])
def test_the_grids_of_b_l_and_h_agree_with_the_paper_written_out(monkeypatch, patch, patches, kept):
    monkeypatch.setitem(vit.ARCHS, "small", vit.Arch("small", 32, 2, 4, patch, 224))
    torch.manual_seed(0)
    model = MaskedAutoencoder("small", decoder_dim=32, decoder_depth=2, decoder_heads=2, norm_pix=True)
    images, noise = torch.randn(2, 3, 224, 224), torch.rand(2, patches)
    mask = assert_as_by_hand(model, images, noise, 0.75)
    assert (mask == 0).sum(dim=1).tolist() == [kept, kept]


def in_raster_order(model, images, noise):
    """The loss as MAE is usually written: patches back in raster order, all of them predicted, the hidden averaged."""
    patches, order = patchify(images, 8), noise.argsort(dim=1)
    x = model.patch_embed(images) + model.pos_embed[:, 1:]
    x = torch.stack([sample[index[:9]] for sample, index in zip(x, order)])
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    x = model.decoder_embed(model.norm(model.blocks(x)))
    x_ = torch.cat([x[:, 1:], model.mask_token.expand(len(x), 27, -1)], dim=1)
    x_ = torch.stack([sample[index.argsort()] for sample, index in zip(x_, order)])
    x = torch.cat([x[:, :1], x_], dim=1) + model.decoder_pos_embed
    for block in model.decoder_blocks:
        x = block(x)
    prediction = model.decoder_pred(model.decoder_norm(x))[:, 1:]
    hidden = torch.ones_like(noise).scatter_(1, order[:, :9], 0)
    return ((prediction.float() - patches).square().mean(dim=-1) * hidden).sum() / hidden.sum()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])  # the first and the last block of the decoder have ways of their own
def test_gradients_equal_those_of_predicting_every_patch(small_mae, depth, fused):
    model, images, noise = (
        small_mae(decoder_depth=depth).double(),
        torch.randn(3, 3, 48, 48).double(),
        torch.rand(3, 36),
    )
    for block in (*model.blocks, *model.decoder_blocks):
        block.attn.fused_attn = fused
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ours = torch.autograd.grad(model(images, noise).loss, list(parameters.values()))
    usual = torch.autograd.grad(in_raster_order(model, images, noise), list(parameters.values()))
    for name, a, b in zip(parameters, ours, usual):
        assert (a - b).norm() <= 1e-12 * b.norm() + 1e-15, name


@pytest.mark.parametrize(
    ("mask_ratio", "visible"), [(0.75, 9), (0.5, 18), (0.9, 3), (0.85, 5), (0.97, 1), (1 / 36 + 1e-9, 34)]
)
def test_the_number_of_visible_patches_is_rounded_down(small_mae, mask_ratio, visible):
    with torch.no_grad():
        mask = small_mae().predict(torch.zeros(4, 3, 48, 48), torch.rand(4, 36), mask_ratio)[1]
    assert (mask == 0).sum(dim=1).tolist() == [visible] * 4
    assert ((mask == 0) | (mask == 1)).all()


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, 0.98, -0.5, 1.5])
def test_a_mask_that_leaves_none_or_all_visible_is_refused(small_mae, mask_ratio):
    with pytest.raises(UserError, match=f"mask ratio of {mask_ratio} leaves -?[0-9]+ of 36 patches visible"):
        small_mae()(torch.zeros(1, 3, 48, 48), mask_ratio=mask_ratio)


def test_masks_are_uniform_and_differ_between_samples(monkeypatch):
    monkeypatch.setitem(vit.ARCHS, "tiny", vit.Arch("tiny", 8, 1, 1, 8, 48))
    torch.manual_seed(0)
    model = MaskedAutoencoder("tiny", decoder_dim=8, decoder_depth=1, decoder_heads=1)
    samples = 4000
    with torch.no_grad():
        hidden = model(torch.zeros(samples, 3, 48, 48)).predicted
    visible = torch.ones(samples, 36).scatter_(1, hidden, 0)
    assert len(visible.unique(dim=0)) > 0.99 * samples
    # Each patch stays with probability 1/4. The sum of its squared deviations over the variance, times 35/36 for the
    # fixed total, is chi-square with 35 degrees of freedom: within 10..80 but for one seed in ten thousand.
    chance, counts = 0.25, visible.sum(dim=0)
    statistic = ((counts - samples * chance) ** 2 / (samples * chance * (1 - chance))).sum() * 35 / 36
    assert 10 < statistic < 80


def test_hidden_pixels_reach_neither_encoder_nor_prediction(small_mae):
    model, images, noise = small_mae(), torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    order = noise.argsort(dim=1)
    with torch.no_grad():
        before = model(images, noise)
        patches = patchify(images, 8)
        hidden, shown = patches.clone(), patches.clone()
        hidden.scatter_(1, order[:, 9:, None].expand(-1, -1, 192), torch.randn(2, 27, 192))
        shown[0, order[0, 4], 7] += 1.0  # one value of one visible patch
        encoded = [model.encode(p, order, 9) for p in (patches, hidden, shown)]
        other_hidden, other_shown = (model(unpatchify(p, 8, (6, 6)), noise) for p in (hidden, shown))
    assert encoded[0].shape == (2, 10, 128)
    assert torch.equal(encoded[0], encoded[1])
    assert torch.equal(before.prediction, other_hidden.prediction)
    assert not torch.equal(before.loss, other_hidden.loss)
    assert not torch.equal(encoded[0][0], encoded[2][0])
    assert (before.prediction[0] != other_shown.prediction[0]).any(dim=1).all()
    assert torch.equal(encoded[0][1], encoded[2][1])
    torch.testing.assert_close(before.prediction[1], other_shown.prediction[1])


def constant_prediction(model, value):
    with torch.no_grad():
        model.decoder_pred.weight.zero_()
        model.decoder_pred.bias.fill_(value)
    return model


@pytest.mark.parametrize(("loss_on", "first"), [("masked", 9), ("all", 0)])
def test_loss_is_the_mean_over_hidden_or_over_all_patches(small_mae, loss_on, first):
    # Patch k has the value k; patches 0..8 stay visible; 2 is predicted everywhere.
    images = unpatchify(torch.arange(36.0)[None, :, None].expand(1, 36, 192), 8, (6, 6))
    output = constant_prediction(small_mae(loss_on=loss_on), 2.0)(images, torch.arange(36.0)[None])
    assert output.loss.item() == pytest.approx(sum((k - 2) ** 2 for k in range(first, 36)) / (36 - first))
    assert output.predicted.sort().values.tolist() == [list(range(first, 36))]


def test_normalised_target(small_mae):
    # Predicting 0 costs var / (unbiased var + 1e-6): 191/192 for an ordinary patch, next to nothing for a flat one.
    rng = np.random.default_rng(0)
    patches = np.concatenate([np.zeros((9, 192)), rng.normal(5, 3, (20, 192)), rng.normal(5, 1e-3, (7, 192))])
    images = unpatchify(torch.tensor(patches[None], dtype=torch.float32), 8, (6, 6))
    hidden = patches[9:].astype(np.float32).astype(np.float64)
    expected = np.mean(hidden.var(axis=1) / (hidden.var(axis=1, ddof=1) + 1e-6))
    assert expected < (20 * 191 / 192 + 7 * 0.51) / 27  # the eps counts in the flat ones
    output = constant_prediction(small_mae(norm_pix=True), 0.0)(images, torch.arange(36.0)[None])
    assert output.loss.item() == pytest.approx(expected, rel=1e-4)


def test_patchify_cuts_row_by_row_and_keeps_row_column_channel_order():
    images = torch.arange(2 * 3 * 4 * 6).float().reshape(2, 3, 4, 6)  # value = b*72 + c*24 + y*6 + x
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # Patch 4 of image 1 is row 1, column 1 of the grid: y 2..3, x 2..3.
    expected = [72 + c * 24 + y * 6 + x for y in (2, 3) for x in (2, 3) for c in range(3)]
    assert patches[1, 4].tolist() == expected
    assert torch.equal(unpatchify(patches, 2, (2, 3)), images)


def test_the_last_layer_writes_pixels_where_patchify_read_them(small_mae):
    model, images = constant_prediction(small_mae(image_size=(32, 64)), 0.0), torch.randn(1, 3, 32, 64)
    with torch.no_grad():
        model.decoder_pred.bias.copy_(torch.arange(192.0))
        picture = unpatchify(model.predict(images, torch.rand(1, 32), 0.75)[0], 8, (4, 8))
    assert picture.shape == images.shape
    assert picture[0, 1, 8 + 5, 16 + 3] == (5 * 8 + 3) * 3 + 1


def test_positions_are_fixed_and_everything_else_learns(small_mae):
    model = small_mae()
    model(torch.randn(2, 3, 48, 48)).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {"pos_embed", "decoder_pos_embed"}
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)


def test_activation_checkpointing_recomputes_every_block_and_changes_no_gradient(small_mae):
    images, noise = torch.randn(2, 3, 48, 48), torch.rand(2, 36)
    results = []
    for switch in (False, True):
        model, calls = small_mae(activation_checkpointing=switch), []
        for block in (*model.blocks, *model.decoder_blocks):
            block.norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        loss = model(images, noise).loss
        loss.backward()
        results.append((len(calls), loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (calls, loss, gradients), (calls_again, loss_again, gradients_again) = results
    assert (calls, calls_again) == (7, 14)
    assert torch.equal(loss, loss_again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_again[name], msg=name)


def test_state_dict_has_the_official_names_and_the_paper_s_decoder():
    # facebookresearch/mae, models_mae.py: the names in the released full checkpoints.
    layers = ["patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred"]
    for block in (*(f"blocks.{i}" for i in range(12)), *(f"decoder_blocks.{i}" for i in range(8))):
        layers += [f"{block}.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    expected |= {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"}
    with torch.device("meta"):
        model = MaskedAutoencoder("vit_base_patch16")
    assert model.state_dict().keys() == expected
    assert model.mask_token.shape == (1, 1, 512)
    assert model.decoder_pos_embed.shape == (1, 197, 512)
    assert model.decoder_pred.weight.shape == (768, 512)
    assert {b.attn.num_heads for b in model.decoder_blocks} == {16}
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize(("dim", "heads"), [(30, 2), (32, 3), (32, 0)])
def test_impossible_decoders_are_refused(dim, heads):
    with pytest.raises(UserError, match=f"decoder width {dim} must be divisible by 4 and by its {heads} heads"):
        MaskedAutoencoder("vit_mini_patch8", decoder_dim=dim, decoder_depth=1, decoder_heads=heads)


def test_mask_tokens_enter_the_decoder_once_for_the_whole_batch(small_mae):
    model, rows = small_mae(decoder_depth=2), []
    for block in model.decoder_blocks:
        block.attn.qkv.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[:-1].numel()))
    model(torch.randn(5, 3, 48, 48), torch.rand(5, 36))
    assert rows == [5 * 10 + 36, 5 * 37]  # of 36 patches 9 are seen, with the class token


def test_a_gpu_looks_tokens_up_before_the_first_block_to_the_same_effect(small_mae, monkeypatch):
    model, images, noise, found = small_mae(decoder_depth=2), torch.randn(5, 3, 48, 48), torch.rand(5, 36), []
    rows = []
    model.decoder_blocks[0].attn.qkv.register_forward_hook(lambda _, x, __: rows.append(x[0].shape[:-1].numel()))
    for late in (True, False):
        monkeypatch.setattr("mae_core.autoencoder.looks_up_late", lambda x, late=late: late)
        model.zero_grad()
        model(images, noise).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert rows == [5 * 10 + 36, 5 * 37]
    torch.testing.assert_close(*found)


def test_in_bf16_the_gradient_of_a_shared_mask_token_is_summed_in_float32():
    # Summed in bf16, from 256 on they would not grow any more.
    index = torch.zeros(1024, 1, dtype=torch.int64)
    rows = torch.ones(1, 4, dtype=torch.bfloat16, requires_grad=True)
    look_up(rows, index).backward(torch.full((1024, 1, 4), 1.0078125, dtype=torch.bfloat16))
    assert rows.grad.tolist() == [[1032.0] * 4]
