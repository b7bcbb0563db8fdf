"""The miniature of ImageNet: layouts, class lists, determinism, and that the images are what they claim."""

import importlib.util
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fixtures.miniature import PUBLISHED_CORRUPTIONS, digests
from transfer.miniature import imagenet, scenes
from transfer.miniature.unlabelled import MIX, unlabelled

WNIDS = list(imagenet.class_wnids().values())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_classes_stand_under_wnids_that_every_dataset_lists():
    assert sorted(set(WNIDS)) == WNIDS
    assert len(WNIDS) == 16
    folder = Path(importlib.util.find_spec("timm").origin).parent / "data" / "_info"
    for name in ("imagenet_synsets.txt", "imagenet_a_synsets.txt", "imagenet_r_synsets.txt"):
        assert set(WNIDS) <= set((folder / name).read_text().split())


@pytest.mark.parametrize(
    ("folder", "pattern", "per_class"),
    [
        ("imagenet/train", "*.JPEG", 50),
        ("imagenet/val", "ILSVRC2012_val_*.JPEG", 100),
        ("imagenet-a", "*.jpg", 40),
        ("imagenet-r", "*.jpg", 40),
        ("imagenet-sketch", "*.JPEG", 40),
    ],
)
def test_layout(root, folder, pattern, per_class):
    assert sorted(p.name for p in (root / folder).iterdir() if p.is_dir()) == WNIDS
    for wnid in WNIDS:
        files = list((root / folder / wnid).glob(pattern))
        assert len(files) == per_class == len(list((root / folder / wnid).iterdir()))
        with Image.open(files[0]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))


def test_imagenet_c_layout(root):
    val = {p.name for p in (root / "imagenet/val").rglob("*.JPEG")}
    folder = root / "imagenet-c"
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(PUBLISHED_CORRUPTIONS)
    for name in PUBLISHED_CORRUPTIONS:
        for severity in ("1", "2", "3", "4", "5"):
            assert sorted(p.name for p in (folder / name / severity).iterdir()) == WNIDS
            files = list((folder / name / severity).rglob("*.JPEG"))
            assert len(files) == 64
            assert {p.name for p in files} <= val


def test_same_seed_gives_the_same_bytes_and_another_seed_none_of_them(root, tmp_path):
    again = digests(imagenet.imagenet_a(tmp_path / "again"))
    assert again == digests(root / "imagenet-a")
    other = digests(imagenet.imagenet_a(tmp_path / "other", seed=1))
    assert not set(other.values()) & set(again.values())


def test_process_pool_changes_no_byte(root, tmp_path):
    """An image depends only on its index: 2000 images come from the pool, the first 300 were made without it."""
    many = digests(unlabelled(tmp_path, count=2000))
    few = digests(root / "unlabelled")
    assert len(many) == 2000
    assert few == {name: many[name] for name in few}


def test_unlabelled_images_are_of_all_kinds(root):
    """Crowded scenes have no image of 48 x 48 px, and only line drawings have a white corner and no colour."""
    images = [pixels(file).astype(int) for file in (root / "unlabelled").glob("*.JPEG")]
    crowded = sum(image.shape != (48, 48, 3) for image in images)
    drawings = sum(image[0, 0].min() > 230 and np.ptp(image, axis=2).max() <= 8 for image in images)
    shares = {draw.__name__: share for draw, share in MIX.items()}
    assert sum(shares.values()) == pytest.approx(1)
    for seen, share in ((crowded, shares["_crowded"]), (drawings, shares["_drawing"])):
        assert abs(seen / 300 - share) < 4 * (share * (1 - share) / 300) ** 0.5


def test_no_image_occurs_twice(root):
    counts = Counter()
    for folder in ("imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch", "unlabelled"):
        counts.update(digests(root / folder).values())
    assert sum(counts.values()) == 800 + 1600 + 3 * 640 + 300
    assert max(counts.values()) == 1


def test_sketches_are_dark_lines_and_grey_shapes_on_white(root):
    for file in sorted((root / "imagenet-sketch").rglob("*.JPEG"))[::20]:
        image = pixels(file).astype(int)
        assert np.ptp(image, axis=2).max() <= 8  # grey
        assert (image.min(axis=2) > 230).mean() > 0.35
        assert 0.01 < (image.max(axis=2) < 120).mean() < 0.25
        assert ((image > 120) & (image < 200)).mean() > 0.03


def test_renditions_have_every_style(root):
    for folder in (root / "imagenet-r").iterdir():
        if folder.is_dir():
            assert Counter(p.name.split("_")[0] for p in folder.iterdir()) == dict.fromkeys(scenes.STYLES, 8)


def test_imagenet_c_files_are_corrupted_val_images(root):
    """Mild severities stay nearer to their own val image than to any other of val's first images."""
    val = {p.name: pixels(p).astype(float) for w in WNIDS for p in sorted((root / "imagenet/val" / w).iterdir())[:4]}
    for file in sorted((root / "imagenet-c/pixelate/1").rglob("*.JPEG")):
        image = pixels(file).astype(float)
        assert min(val, key=lambda name: np.square(val[name] - image).mean()) == file.name
