"""Images that are not plain photographs, and broken ones, through every way that images are read."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_core import decode
from mae_core.data import IMAGENET_NORMALIZATION, Images, Sample, loader, pretraining_transform
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.reconstruct import load_images
from tests.fixtures.image import broken_files, odd_files, photograph
from tests.fixtures.transfer import TableModel, one_hot_logits, raising
from transfer.data.ade20k import check_pair
from transfer.data.coco import Example
from transfer.data.scores import evaluate
from transfer.data.split import Split
from transfer.data.transforms import eval_transform, probe_transform, train_transform
from transfer.detection.engine_torchvision import Jittered
from transfer.detection.recipe import DetectionRecipe
from transfer.detection.shared import open_image

TRANSFORMS = {
    "pre-training": pretraining_transform(8),
    "colour jitter": pretraining_transform(8, augmentation="crop + colour jitter"),
    "fine-tuning": train_transform(8, 0.08, "rand-m9-mstd0.5-inc1"),
    "probe": probe_transform(8, 0.08),
    "evaluation": eval_transform(8),
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> dict[Path, tuple[int, int, int]]:
    """{file: its one colour}; each is 8 x 4 px."""
    folder = tmp_path_factory.mktemp("odd")
    for name, (content, _) in odd_files().items():
        (folder / name).write_bytes(content)
    return {folder / name: colour for name, (_, colour) in odd_files().items()}


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("broken")
    for name, content in broken_files().items():
        (folder / name).write_bytes(content)
    return sorted(folder.iterdir())


def example(file: Path, width: int, height: int) -> Example:
    return Example(str(file), 1, height, width, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), ())


@pytest.mark.parametrize("way", TRANSFORMS)
def test_odd_files_reach_the_batch(odd, way):
    dataset = Images(list(odd), TRANSFORMS[way], pillow=way == "evaluation")
    images, _, bad = next(iter(loader(dataset, [range(len(odd))], 0, "cpu")))
    assert (images.shape, images.dtype, bad) == ((len(odd), 3, 8, 8), torch.uint8, [])
    if way not in ("colour jitter", "fine-tuning"):
        expected = torch.tensor(list(odd.values()))[:, :, None, None].expand_as(images)
        torch.testing.assert_close(images.int(), expected.int(), atol=1, rtol=0)


@pytest.mark.parametrize("way", TRANSFORMS)
def test_broken_files_are_named_by_the_worker_that_met_them(broken, way):
    dataset = Images(broken, TRANSFORMS[way], pillow=way == "evaluation")
    images, _, bad = next(iter(loader(dataset, [range(len(broken))], 1, "cpu")))
    assert bad == [str(file) for file in broken]
    assert way == "fine-tuning" or not images.any()  # black, before fine-tuning's colour operations


def evaluate_one(file: Path) -> None:
    model, split = TableModel(one_hot_logits([0])), Split((file,), (0,))
    evaluate(model, split, eval_transform(16), IMAGENET_NORMALIZATION, Machine(), "x")


READERS = {
    "evaluation": (evaluate_one, r"cannot be read as an image \(.+\): replace it; no number"),
    "picture": (lambda file: load_images([file], 48), "cannot be read as an image"),
    "COCO": (lambda file: open_image(example(file, 48, 48)), "cannot be read as an image .*: replace it"),
    "ADE20K": (lambda file: check_pair(file, file.parent / "label.pgm"), "cannot be read as an image: replace it"),
}


@pytest.mark.parametrize("way", READERS)
def test_every_reader_names_broken_files(broken, way):
    read, message = READERS[way]
    Image.new("L", (48, 48), 7).save(broken[0].parent / "label.pgm")
    for file in broken:
        with pytest.raises(UserError, match=f"{file} {message}"):
            read(file)


def test_an_oversized_validation_image_is_refused_with_its_reason(tmp_path, monkeypatch):
    photograph(64, 64).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"large.png cannot be read as an image \(Image size .* exceeds limit"):
        evaluate_one(tmp_path / "large.png")


def test_where_no_more_files_can_be_opened_no_image_is_taken_for_broken(tmp_path, monkeypatch):
    photograph(20, 20).save(tmp_path / "image.png")
    monkeypatch.setattr(decode, "open_regular", raising(OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(UserError, match=r"image.png cannot be opened \(Too many open files\): give fewer --workers"):
        Images([tmp_path / "image.png"], pretraining_transform(8))[0]


def test_coco_reads_odd_files_as_they_are_stored(odd):
    for file, colour in odd.items():
        image = open_image(example(file, 8, 4))  # an orientation in the EXIF turns nothing: so COCO's outlines lie
        np.testing.assert_allclose(np.asarray(image).reshape(-1, 3).mean(axis=0), colour, atol=1)


def test_a_worker_of_coco_names_a_broken_file_in_one_sentence(broken):
    dataset = Jittered([example(broken[0], 48, 48)], DetectionRecipe(image_size=32), seed=0)
    with pytest.raises(UserError) as raised:
        next(iter(loader(dataset, [[Sample(0, 0)]], 1, "cpu")))
    assert str(raised.value).startswith(f"{broken[0]} cannot be read as an image (")
    assert str(raised.value).count("\n") == 0


def fails(image: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such crop")


def test_a_worker_names_the_file_whatever_fails(tmp_path):
    photograph(20, 20).save(tmp_path / "image.jpg")
    with pytest.raises(UserError) as raised:
        next(iter(loader(Images([tmp_path / "image.jpg"], fails), [[0]], 1, "cpu")))
    assert str(raised.value) == f"{tmp_path}/image.jpg cannot be augmented (RuntimeError: no such crop): replace it"
