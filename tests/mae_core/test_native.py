"""The compiled reader gives what torchvision gives, or leaves the file to it."""

import io
import itertools
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from mae_core import data, native
from mae_core.crops import Crop
from mae_core.data import Images, Sample, loader, pretraining_transform, seed_all, seed_for
from mae_core.errors import UserError
from mae_core.listing import images_or_shards
from mae_core.native.__main__ import build
from tests.fixtures import SHARED
from tests.fixtures.image import broken_files, encoded, odd_files, photograph
from tests.mae_core.test_shards import pack
from transfer.data.loop_free_crop import LoopFreeCrop
from transfer.data.transforms import probe_transform, train_transform


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The library, compiled now."""
    path = tmp_path_factory.mktemp("native") / "sample.so"
    try:
        build(path)
    except UserError as e:
        pytest.skip(str(e))
    return native.load(path)


@pytest.fixture
def used(built, monkeypatch):
    """The dataset uses it; the paths that were left to torchvision."""
    left = []
    monkeypatch.setattr(native, "library", lambda: built)
    monkeypatch.setattr(data, "read_pixels", lambda path, read=data.read_pixels: left.append(path) or read(path))
    return left


def by_torchvision(dataset, sample, *steps):
    """Decoded by Pillow, and torchvision's own transforms, seeded as data.py says."""
    image = v2.functional.pil_to_tensor(Image.open(os.fsdecode(dataset.files[sample.index])).convert("RGB"))
    seed_all(dataset.seed, sample.position)
    return v2.Compose([*steps, v2.RandomHorizontalFlip()])(image)


def crop_of(size, low=0.2):
    return v2.RandomResizedCrop(size, scale=(low, 1.0), interpolation=InterpolationMode.BICUBIC)


@pytest.mark.parametrize("options", [*[{"subsampling": n} for n in (0, 1, 2)], {"progressive": True}, {"quality": 30}])
def test_samples_are_those_of_torchvision(tmp_path, used, options):
    shapes = ((1, 1), (7, 5), (16, 16), (33, 17), (101, 75), (200, 61), (300, 500))
    for number, shape in enumerate(shapes):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(photograph(*shape), "JPEG", **options))
        (tmp_path / f"{number}grey.jpg").write_bytes(encoded(photograph(*shape).convert("L"), "JPEG", **options))
    for size in (1, 31, 48, 224):
        dataset = Images(sorted(tmp_path.iterdir()), pretraining_transform(size), seed=5)
        for position in range(6 * len(dataset)):
            sample = Sample(position % len(dataset), position)
            assert torch.equal(dataset[sample][0], by_torchvision(dataset, sample, crop_of(size)))
    # In 200 x 61 px ten draws may find no crop: the centre crop is left to torchvision.
    assert {path.split("/")[-1][0] for path in used} == {"5"}
    assert len(used) < 24


def test_crops_of_few_rows_and_columns_are_those_of_torchvision(built):
    """Of which most weights reach beyond the crop; larger and smaller ones, of any side."""
    file = encoded(photograph(40, 40), "JPEG", quality=90)
    whole = v2.functional.pil_to_tensor(Image.open(io.BytesIO(file)))
    shapes = itertools.product((1, 2, 3, 4, 5, 6, 9, 40), (1, 2, 5, 33), (1, 4, 8, 31, 33, 70))
    for number, (height, width, side) in enumerate(shapes):
        left, top, flip = number % (41 - width), number % (41 - height), number // 2 % 2
        ours = torch.zeros(3, side, side, dtype=torch.uint8)
        assert built.mae_crop(file, len(file), left, top, width, height, side, flip, ours.data_ptr())
        part = whole[:, top : top + height, left : left + width]
        expected = v2.functional.resize(part, [side, side], InterpolationMode.BICUBIC)
        assert torch.equal(ours, expected.flip(2) if flip else expected), (height, width, side, flip)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real images here")
@pytest.mark.parametrize("pattern", ["imagenet/*/*/*", "imagenet_samples/*/*", "places365/*/*/*/*.jpg", "coco/*2017/*"])
def test_samples_of_real_photographs_are_those_of_torchvision(used, pattern):
    files = sorted(SHARED.glob(pattern))
    dataset = Images(files[:: max(1, len(files) // 16)], pretraining_transform(224), seed=1)
    for index in range(len(dataset)):
        sample = Sample(index, 1000 + index)
        assert torch.equal(dataset[sample][0], by_torchvision(dataset, sample, crop_of(224)))
    assert not used


def test_crops_are_drawn_as_by_torchvision(built):
    """For seeds and positions of one word and of two; of images narrow and wide."""
    crop, box, told = Crop(crop_of(32)), np.zeros(5, np.int32), 0
    for number in range(2000):
        seed, position = (number, 2**40 + number) if number % 2 else (2**33 + number, number)
        width, height = 20 + 7 * number % 480, 20 + 11 * number % 310
        words = native.entropy(seed, position)
        if built.mae_draw(words, len(words), width, height, crop.range.data_ptr(), box.ctypes.data):
            torch.manual_seed(seed_for(seed, position) % 2**63)
            expected = crop_of(32).make_params([torch.empty(3, height, width)])
            left, top, *size, flip = box.tolist()
            assert {"left": left, "top": top, "width": size[0], "height": size[1]} == expected
            assert flip == (torch.rand(1).item() < 0.5)
            told += 1
    assert told > 1500  # the others found no crop in ten draws


def test_what_follows_a_crop_draws_what_it_drew(tmp_path, used, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(encoded(photograph(90, 70), "JPEG"))
    transforms = [
        pretraining_transform(48, augmentation="crop + colour jitter"),
        train_transform(48, 0.08, "rand-m9-mstd0.5-inc1"),
        probe_transform(48, 0.08),
    ]
    for transform in transforms:
        dataset = Images([tmp_path / "a.jpg"], transform, seed=3)
        found = [dataset[Sample(0, position)][0] for position in range(12)]
        assert not used
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            for position, image in enumerate(found):
                assert torch.equal(image, dataset[Sample(0, position)][0])
        used.clear()
    sample = Sample(0, 5)
    assert torch.equal(
        dataset[sample][0], by_torchvision(dataset, sample, LoopFreeCrop(48, (0.08, 1.0), interpolation=3))
    )


def test_odd_and_broken_files_are_left_to_torchvision_and_pillow(tmp_path, used, monkeypatch):
    contents = {name: content for name, (content, _) in odd_files(40, 30).items()} | broken_files()
    whole = encoded(photograph(64, 64), "JPEG", restart_marker_blocks=2)
    contents |= {f"cut{length}.jpg": whole[:length] for length in range(100, len(whole), 97)}
    contents |= {"tail.jpg": whole + b"\0\0", "lie.jpg": whole[:-300] + b"\xff\xd9"}
    noisy = bytearray(whole)
    noisy[len(whole) // 2 : len(whole) // 2 + 40] = bytes(40)
    contents["noisy.jpg"] = bytes(noisy)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    files = [*sorted(tmp_path.iterdir()), tmp_path / "absent.jpg"]
    for size in (224, 16):
        dataset = Images(files, pretraining_transform(size), seed=2)
        found = [dataset[index] for index in range(len(files))]
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            for index, (image, _, bad) in enumerate(found):
                expected, _, expected_bad = dataset[index]
                assert bad == expected_bad, files[index]
                assert torch.equal(image, expected), files[index]
    assert any("cut" in path for path in used)


def test_an_oversized_image_is_left_to_pillow_which_refuses_it(tmp_path, used, monkeypatch):
    (tmp_path / "large.jpg").write_bytes(encoded(photograph(64, 64), "JPEG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for transform in (pretraining_transform(16), probe_transform(16, 0.08)):
        assert Images([tmp_path / "large.jpg"], transform)[0][2] == str(tmp_path / "large.jpg")


def test_batches_are_assembled_in_their_place_whoever_reads(tmp_path, used):
    """From files and from a tar, JPEGs and others among each other, by workers and without, twice the same image."""
    for number in range(6):
        kind = "PNG" if number == 2 else "JPEG"
        (tmp_path / f"{number}.{kind.lower()}").write_bytes(encoded(photograph(60 + number, 50, number), kind))
    files = sorted(tmp_path.iterdir())
    pack(tmp_path / "x" / "0.tar", [(file.name, file.read_bytes()) for file in files])
    entries = images_or_shards(tmp_path / "x")
    batches = [[Sample(0, 0), Sample(1, 1), Sample(1, 2), Sample(2, 3)], [Sample(3, 4), Sample(4, 5), Sample(5, 6)]]
    expected = None
    for listed in (files, entries):
        dataset = Images(listed, pretraining_transform(32), labels=range(6), seed=4)
        for workers in (0, 2):
            found = list(loader(dataset, batches, workers, "cpu"))
            assert [labels.tolist() for _, labels, _ in found] == [[0, 1, 1, 2], [3, 4, 5]]
            images = torch.cat([images for images, _, _ in found])
            assert images.shape == (7, 3, 32, 32)
            expected = images if expected is None else expected
            assert torch.equal(images, expected)
    samples = [sample for batch in batches for sample in batch]
    dataset = Images(files, pretraining_transform(32), seed=4)
    for image, sample in zip(expected, samples):
        assert torch.equal(image, by_torchvision(dataset, sample, crop_of(32)))


def test_entries_of_any_name_are_found_in_their_tar(tmp_path, used):
    """As mae_core.shards finds them."""
    names = ["a.jpg", "b@5+3.jpg", "c.tar/d.jpg", "e@1+2@3+4.jpg", "f+7.jpg", "g@.jpg"]
    contents = [encoded(photograph(40 + number, 30, number), "JPEG") for number in range(len(names))]
    entries = []
    for folder in ("x", "y.tar!", "z@1+2.tar"):
        pack(tmp_path / folder / "0.tar", list(zip(names, contents)))
        entries += images_or_shards(tmp_path / folder)
    dataset = Images(entries, pretraining_transform(32), seed=4)
    assert len(entries) == 3 * len(names)
    for index in range(len(entries)):
        (tmp_path / "one.jpg").write_bytes(contents[index % len(names)])
        expected = by_torchvision(Images([tmp_path / "one.jpg"], None, seed=4), Sample(0, index), crop_of(32))
        assert torch.equal(dataset[index][0], expected), entries[index]
    assert not used


def test_an_image_unlike_the_others_of_its_batch_is_named(tmp_path):
    for name, size in (("a.png", 8), ("b.png", 9)):
        photograph(size, size).save(tmp_path / name)
    with pytest.raises(UserError, match=r"b.png cannot be augmented .*\[3, 9, 9\] in a batch of .*\[3, 8, 8\]"):
        Images([tmp_path / "a.png", tmp_path / "b.png"], v2.Identity()).__getitems__([0, 1])


def test_a_library_that_gives_other_results_is_not_used(built, monkeypatch, tmp_path):
    assert native.same_pixels(built)
    assert native.same_draws(built)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not native.same_pixels(built)
    monkeypatch.setattr(native, "entropy", lambda *parts: (native.ctypes.c_uint32 * 2)(1, 2))
    assert not native.same_draws(built)
    (tmp_path / "text.so").write_text("none")
    assert native.load(tmp_path / "text.so") is None


def test_loading_it_leaves_the_generators_alone(built):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert native.same_draws(built)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-cc", "there is no C compiler no-such-cc"), ("false", "false cannot")]
)
def test_without_a_compiler_the_command_says_what_that_means(tmp_path, monkeypatch, compiler, said):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(UserError, match=f"{said}.*images are read by torchvision, more slowly; on Debian: apt install"):
        build(tmp_path / "sample.so")
    assert not list(tmp_path.iterdir())
