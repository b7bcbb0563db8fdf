import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2.functional import pil_to_tensor

from mae_core.decode import UNREADABLE, read_image, read_pixels
from tests.fixtures import SHARED
from tests.fixtures.image import broken_files, encoded, odd_files, photograph


def by_pillow(path) -> torch.Tensor:
    return pil_to_tensor(read_image(path))


@pytest.mark.parametrize("quality", [40, 95])
@pytest.mark.parametrize(
    "options", [{"subsampling": n} for n in (0, 1, 2)] + [{"progressive": True}, {"restart_marker_blocks": 3}]
)
def test_torchvision_and_pillow_decode_a_jpeg_to_the_same_pixels(tmp_path, options, quality):
    for size in ((1, 1), (7, 5), (16, 16), (33, 17), (101, 75)):
        for image in (photograph(*size), photograph(*size).convert("L")):
            (tmp_path / "image.jpg").write_bytes(encoded(image, "JPEG", quality=quality, **options))
            pixels = read_pixels(tmp_path / "image.jpg")
            assert (pixels.dtype, pixels.shape) == (torch.uint8, (3, *size[::-1]))
            assert torch.equal(pixels, by_pillow(tmp_path / "image.jpg"))
            assert size < (16, 16) or (pixels.float() - pil_to_tensor(image).float()).abs().mean() < 10


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real images here")
@pytest.mark.parametrize("pattern", ["imagenet/*/*/*", "imagenet_samples/*/*", "places365/*/*/*/*.jpg", "coco/*2017/*"])
def test_torchvision_and_pillow_decode_real_photographs_to_the_same_pixels(pattern):
    files = sorted(SHARED.glob(pattern))
    for file in files[:: max(1, len(files) // 12)]:
        assert torch.equal(read_pixels(file), by_pillow(file))


def horizontal_first(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Pillow's bicubic resize as it was up to Pillow 12. From 13 on the vertical pass, which leaves 8 bits, too, comes
    first where the height shrinks more (python-pillow/Pillow#9549)."""
    rows = image.resize((size[0], image.height), Image.Resampling.BICUBIC)
    return pil_to_tensor(rows.resize(size, Image.Resampling.BICUBIC))


def difference(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    ours = v2.Resize(size[::-1], InterpolationMode.BICUBIC)(pil_to_tensor(image))
    return (ours.int() - horizontal_first(image, size).int()).abs()


@pytest.mark.parametrize("source", [(500, 375), (375, 500), (256, 256), (120, 90), (60, 240)])
def test_torchvision_resizes_to_pillow_s_pixels_but_for_rounding(source):
    for seed in range(3):
        for size in ((224, 224), (48, 48), (341, 256)):
            found = difference(photograph(*source, seed), size)
            assert found.max() <= 2
            assert (found > 0).float().mean() < 0.02


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real images here")
def test_torchvision_resizes_crops_of_real_photographs_to_pillow_s_pixels_but_for_rounding():
    files, found = sorted(SHARED.glob("imagenet_samples/*/*"))[::4], []
    crop = v2.RandomResizedCrop(224, scale=(0.2, 1.0))
    for number, file in enumerate(files):
        image = read_image(file)
        torch.manual_seed(number)
        box = crop.make_params([image])
        found.append(difference(v2.functional.crop(image, **box), (224, 224)))
    found = torch.stack(found)
    assert found.max() <= 2
    assert (found > 0).float().mean() < 0.01


@pytest.mark.parametrize("name", odd_files())
def test_every_mode_becomes_rgb(tmp_path, name):
    content, colour = odd_files()[name]
    (tmp_path / name).write_bytes(content)
    expected = np.broadcast_to(colour, (4, 8, 3))  # of the stored size: an orientation in the EXIF turns nothing
    np.testing.assert_allclose(np.asarray(read_image(tmp_path / name)).astype(int), expected, atol=1)
    assert torch.equal(read_pixels(tmp_path / name), by_pillow(tmp_path / name))


@pytest.mark.parametrize("read", [read_image, read_pixels])
@pytest.mark.parametrize("name", [*broken_files(), "absent.jpg"])
def test_a_broken_file_is_unreadable(tmp_path, name, read):
    if name in broken_files():
        (tmp_path / name).write_bytes(broken_files()[name])
    with pytest.raises(UNREADABLE):
        read(tmp_path / name)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_cut_anywhere_is_read_by_both_or_by_neither(tmp_path, options):
    whole = encoded(photograph(24, 24), "JPEG", **options)
    read = 0
    for length in range(0, len(whole) + 1, 5):
        (tmp_path / "cut.jpg").write_bytes(whole[:length])
        try:
            expected = by_pillow(tmp_path / "cut.jpg")
        except UNREADABLE:
            with pytest.raises(UNREADABLE):
                read_pixels(tmp_path / "cut.jpg")
        else:
            assert torch.equal(read_pixels(tmp_path / "cut.jpg"), expected)
            read += 1
    assert read <= 1  # only the end of the image, if that, can be missed


def test_an_oversized_image_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "large.jpg").write_bytes(encoded(photograph(64, 64), "JPEG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        read_pixels(tmp_path / "large.jpg")


def test_pixels_of_no_fixed_range_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    for read in (read_image, read_pixels):
        with pytest.raises(ValueError, match="no fixed range"):
            read(tmp_path / "float.tif")
