import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import auto_augment
from torchvision import transforms as v1
from torchvision.transforms.v2.functional import pil_to_tensor

from mae_core.data import MEAN, STD, normalize, seed_all
from mae_core.errors import UserError
from tests.fixtures.image import photograph
from transfer.data import transforms
from transfer.data.loop_free_crop import LoopFreeCrop
from transfer.data.transforms import eval_transform, posterize, probe_transform, train_transform


def pixels_of(tensor: torch.Tensor) -> np.ndarray:
    """uint8 [3, H, W] -> int [H, W, 3]."""
    assert tensor.dtype == torch.uint8
    return tensor.permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("size", [(500, 374), (375, 501), (224, 224), (150, 90)])
@pytest.mark.parametrize(("side", "resized"), [(224, 256), (448, 448), (192, 219), (96, 109), (48, 54)])
def test_evaluation_equals_the_official_resize_and_crop(size, side, resized):
    """util/datasets.py of facebookresearch/mae, in torchvision's first transforms: crop ratio 224/256 up to 224 px, 1
    above, the resized side truncated to an integer."""
    image = photograph(*size)
    reference = v1.Compose(
        [v1.Resize(resized, v1.InterpolationMode.BICUBIC), v1.CenterCrop(side), v1.ToTensor(), v1.Normalize(MEAN, STD)]
    )
    ours = normalize(eval_transform(side)(image)[None])[0]
    assert ours.shape == (3, side, side)
    torch.testing.assert_close(ours, reference(image), rtol=0, atol=1e-6)


def test_evaluation_equals_pillow_by_hand():
    image = photograph(512, 384)
    # Short side 384 -> 256, long side 512 * 256 / 384 = 341; the crop begins at (341 - 224) // 2 = 58, (256 - 224) / 2.
    by_hand = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 58 + 224, 16 + 224))
    np.testing.assert_array_equal(pixels_of(eval_transform(224)(image)), np.asarray(by_hand).astype(int))


def test_centre_crop_leaves_a_file_of_that_size_and_resize_takes_the_whole_image_to_a_larger_input():
    image = photograph(224, 224)
    np.testing.assert_array_equal(pixels_of(eval_transform(224, "center_crop")(image)), np.asarray(image).astype(int))
    by_hand = np.asarray(image.resize((448, 448), Image.Resampling.BICUBIC)).astype(int)
    np.testing.assert_array_equal(pixels_of(eval_transform(448, "resize")(image)), by_hand)


def test_an_unknown_transform_is_refused():
    with pytest.raises(UserError, match="resize_crop"):
        eval_transform(224, "resise_crop")


def parameters(crop: LoopFreeCrop, width: int, height: int, draws: int, seed: int = 0) -> np.ndarray:
    """[draws, 4]: top, left, height, width."""
    torch.manual_seed(seed)
    image = Image.new("RGB", (width, height))
    drawn = [crop.make_params([image]) for _ in range(draws)]
    return np.array([[p["top"], p["left"], p["height"], p["width"]] for p in drawn])


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (64, 500), (500, 375)])
def test_the_probes_crop_takes_its_first_draw_cut_to_the_image(width, height):
    top, left, h, w = parameters(LoopFreeCrop(224, scale=(0.08, 1.0)), width, height, 1500).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    cut = (h == height) | (w == width)
    assert cut.any()  # the usual crop would have drawn again
    assert not cut.all()
    # Sides are rounded to whole pixels: allow half a pixel on each.
    share = h * w / (width * height)
    slack = (h + w + 1) / 2 / (width * height)
    assert (share >= 0.08 - slack)[~cut].all()
    assert (share <= 1 + slack)[~cut].all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4)[~cut].all()
    assert ((w - 0.5) / (h + 0.5) <= 4 / 3)[~cut].all()


def test_the_probes_crop_is_uniform_in_area_log_aspect_and_place():
    top, left, h, w = parameters(LoopFreeCrop(224, scale=(0.08, 0.3)), 800, 800, 4000).T
    for values, low, high in (
        (h * w / 640000, 0.08, 0.3),
        (np.log(w / h), math.log(3 / 4), math.log(4 / 3)),
        (top / (800 - h), 0, 1),
        (left / (800 - w), 0, 1),
    ):
        # Quantiles of a uniform variable; 0.03 of the range is four standard errors and more at 4000 draws.
        quantiles = np.quantile((values - low) / (high - low), [0.05, 0.25, 0.5, 0.75, 0.95])
        np.testing.assert_allclose(quantiles, [0.05, 0.25, 0.5, 0.75, 0.95], atol=0.03)


def test_the_probes_crop_draws_as_often_for_every_image():
    after = []
    for width, height in ((300, 300), (1000, 60), (40, 900)):
        parameters(LoopFreeCrop(224, scale=(0.5, 1.0)), width, height, 1)
        after.append(torch.get_rng_state())
    assert all(torch.equal(state, after[0]) for state in after)


def test_the_probe_only_crops_and_flips():
    """Neither shows on an image of one colour."""
    torch.manual_seed(0)
    out = pixels_of(probe_transform(48, 0.08)(pil_to_tensor(Image.new("RGB", (70, 50), (200, 30, 90)))))
    assert (out == [200, 30, 90]).all()
    image = photograph(48, 48)
    seen = {pixels_of(probe_transform(48, 1.0)(pil_to_tensor(image))).tobytes() for _ in range(40)}
    assert pixels_of(eval_transform(48, "center_crop")(ImageOps.mirror(image))).tobytes() in seen


def test_posterize_with_no_bit_is_black_and_else_pillows():
    image = photograph(40, 30)
    assert not np.asarray(posterize(image, 0)).any()
    assert posterize(image, 0).size == (40, 30)
    for bits in range(1, 9):
        kept = np.asarray(image) & (256 - 2 ** (8 - bits))
        np.testing.assert_array_equal(np.asarray(posterize(image, bits)), kept)


@pytest.mark.parametrize(("magnitude", "must_reach_zero"), [(9, False), (10, True)])
def test_fine_tunings_augmentation_never_trips_over_posterize(monkeypatch, magnitude, must_reach_zero):
    """Magnitude 9 with its random spread reaches 10, and so 0 bits, about once in 600 images; 10 does it often."""
    bits_seen = []

    def spy(image, bits, **more):
        bits_seen.append(bits)
        return posterize(image, bits, **more)

    timms = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    monkeypatch.setattr(transforms, "posterize", spy)
    transform = train_transform(32, 0.08, f"rand-m{magnitude}-mstd0.5-inc1")
    image = pil_to_tensor(photograph(48, 40))
    outputs = []
    for seed in range(300):
        seed_all(seed)
        outputs.append(transform(image))
    assert all((out.shape, out.dtype) == ((3, 32, 32), torch.uint8) for out in outputs)
    assert len({out.numpy().tobytes() for out in outputs}) > 250
    assert bits_seen
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is timms
    assert 0 in bits_seen or not must_reach_zero


def test_fine_tunings_augmentation_is_decided_by_the_seed():
    transform, image = train_transform(32, 0.08, "rand-m9-mstd0.5-inc1"), pil_to_tensor(photograph(48, 40))
    first, second, third = [(seed_all(s), transform(image))[1] for s in (5, 5, 6)]
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
