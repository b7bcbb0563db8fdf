"""The miniature: layouts, class lists, determinism, atomic writing, and that the images are what they claim."""

import hashlib
import importlib.util
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from mae_core.errors import UserError
from transfer.miniature import dense as miniature_dense
from transfer.miniature import imagenet as miniature
from transfer.miniature import scenes
from transfer.miniature.corruptions import CORRUPTIONS, SEVERITIES, corrupt

# The 15 names of ImageNet-C in the paper's order (Hendrycks and Dietterich, arXiv 1903.12261).
PUBLISHED_CORRUPTIONS = [
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
]  # fmt: skip


def timm_list(name: str) -> list[str]:
    folder = Path(importlib.util.find_spec("timm").origin).parent / "data" / "_info"
    return (folder / name).read_text().split()


def digests(folder: Path) -> dict[str, str]:
    """Path below the folder -> SHA-256 of the image file."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != miniature.MARKER)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    for make in (
        miniature.imagenet, miniature.imagenet_a, miniature.imagenet_r, miniature.imagenet_sketch, miniature.imagenet_c
    ):  # fmt: skip
        make(folder)
    miniature.unlabelled(folder, count=300)
    return folder


def test_classes_stand_under_wnids_that_every_dataset_lists():
    wnids = list(miniature.class_wnids().values())
    assert wnids == sorted(set(wnids))
    assert len(wnids) == 16
    for name in ("imagenet_synsets.txt", "imagenet_a_synsets.txt", "imagenet_r_synsets.txt"):
        assert set(wnids) <= set(timm_list(name))


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
    wnids = sorted(miniature.class_wnids().values())
    assert sorted(p.name for p in (root / folder).iterdir() if p.is_dir()) == wnids
    for wnid in wnids:
        files = list((root / folder / wnid).glob(pattern))
        assert len(files) == per_class == len(list((root / folder / wnid).iterdir()))
        with Image.open(files[0]) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (48, 48))


def test_imagenet_c_layout(root):
    wnids = sorted(miniature.class_wnids().values())
    val = {p.name for p in (root / "imagenet/val").rglob("*.JPEG")}
    folder = root / "imagenet-c"
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(PUBLISHED_CORRUPTIONS)
    for name in PUBLISHED_CORRUPTIONS:
        for severity in ("1", "2", "3", "4", "5"):
            assert sorted(p.name for p in (folder / name / severity).iterdir()) == wnids
            files = list((folder / name / severity).rglob("*.JPEG"))
            assert len(files) == 64
            assert {p.name for p in files} <= val


def test_marker_tells_version_seed_and_counts(root):
    marker = json.loads((root / "imagenet" / miniature.MARKER).read_text())
    assert marker == {"version": miniature.VERSION, "seed": 0, "counts": {"train": 800, "val": 1600}}
    for folder in root.iterdir():
        if folder.is_dir():
            counts = json.loads((folder / miniature.MARKER).read_text())["counts"]
            assert len(digests(folder)) == sum(counts.values()), folder.name


def test_same_seed_gives_the_same_bytes_and_another_seed_none_of_them(root, tmp_path):
    again = digests(miniature.imagenet_a(tmp_path / "again"))
    assert again == digests(root / "imagenet-a")
    other = digests(miniature.imagenet_a(tmp_path / "other", seed=1))
    assert not set(other.values()) & set(again.values())


def test_process_pool_changes_no_byte(root, tmp_path):
    """An image depends on its index alone: 2000 images come from the pool, the first 300 were made without it."""
    many = digests(miniature.unlabelled(tmp_path, count=2000))
    few = digests(root / "unlabelled")
    assert len(many) == 2000
    assert few == {name: many[name] for name in few}


def test_no_image_occurs_twice(root):
    counts = Counter()
    for folder in ("imagenet", "imagenet-a", "imagenet-r", "imagenet-sketch", "unlabelled"):
        counts.update(digests(root / folder).values())
    assert sum(counts.values()) == 800 + 1600 + 3 * 640 + 300
    assert max(counts.values()) == 1


def test_a_complete_set_is_left_alone_and_a_damaged_or_other_one_is_made_again(tmp_path):
    folder = miniature.imagenet_sketch(tmp_path)
    whole = digests(folder)
    file = folder / next(iter(whole))
    written = file.stat().st_mtime_ns
    miniature.imagenet_sketch(tmp_path)
    assert file.stat().st_mtime_ns == written

    file.unlink()
    miniature.imagenet_sketch(tmp_path)
    assert digests(folder) == whole

    miniature.imagenet_sketch(tmp_path, seed=1)
    assert json.loads((folder / miniature.MARKER).read_text())["seed"] == 1
    assert not set(digests(folder).values()) & set(whole.values())


def test_interrupted_writing_leaves_no_set_and_is_made_good(tmp_path, monkeypatch):
    draw = scenes.line_drawing
    calls = []

    def stops(*args):
        calls.append(1)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(scenes, "line_drawing", stops)
    with pytest.raises(KeyboardInterrupt):
        miniature.imagenet_sketch(tmp_path)
    assert not (tmp_path / "imagenet-sketch").exists()
    monkeypatch.undo()
    assert len(digests(miniature.imagenet_sketch(tmp_path))) == 640
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["imagenet-sketch"]


def test_real_data_are_never_overwritten(tmp_path):
    own = tmp_path / "imagenet-r" / "n01498041" / "photo.jpg"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    with pytest.raises(UserError, match="not a miniature"):
        miniature.imagenet_r(tmp_path)
    assert own.read_bytes() == b"mine"


def test_command_line(tmp_path, capsys, monkeypatch):
    for name, per_class in {"TRAIN": 2, "VAL": 3, "HARD": 1, "RENDITION": 1, "SKETCH": 1, "CORRUPTED": 1}.items():
        monkeypatch.setattr(miniature, name, per_class)
    monkeypatch.setattr(miniature_dense, "TRAIN", 3)
    monkeypatch.setattr(miniature_dense, "VAL", 2)
    assert miniature.main(["--out", str(tmp_path / "data"), "--unlabelled", "20"]) == 0
    printed = capsys.readouterr().out.splitlines()
    names = ["ADEChallengeData2016", "coco"]
    names += ["imagenet", "imagenet-a", "imagenet-c", "imagenet-r", "imagenet-sketch", "unlabelled"]
    assert sorted(p.name for p in (tmp_path / "data").iterdir() if p.is_dir()) == names
    assert len(printed) == 8
    assert "train 32, val 48 images" in printed[0]
    assert len(digests(tmp_path / "data" / "imagenet-c")) == 16 * 15 * 5

    (tmp_path / "file").write_text("")
    for wrong in (["--out", str(tmp_path / "file")], ["--out", str(tmp_path / "data"), "--seed", "-1"]):
        assert miniature.main(wrong) == 1
        assert capsys.readouterr().err.startswith("error: ")


def area(points: np.ndarray) -> float:
    """Shoelace formula."""
    x, y = points.T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


@pytest.mark.parametrize("kind", scenes.CLASSES)
def test_outline_and_drawn_pixels_agree(kind):
    """A white object on black: its mean brightness is its polygon's share of the picture, and its centre of mass the
    polygon's (taken from a fine grid of points inside it)."""
    thing = scenes.PlacedObject(kind, (22.0, 26.5), 17.0, 0.2, (255, 255, 255))
    drawn = scenes.render(scenes.Scene(((0, 0, 0),) * 4, (thing,)))[..., 0] / 255
    polygon = scenes.outline(thing)
    # The filled outline's border pixels count as inside, hence a little more than the exact area.
    assert drawn.sum() == pytest.approx(area(polygon), rel=0.08)
    x, y = polygon.T
    nx, ny = np.roll(x, -1), np.roll(y, -1)
    cross = x * ny - nx * y
    centroid = np.array([((x + nx) * cross).sum(), ((y + ny) * cross).sum()]) / (3 * cross.sum())
    row, column = ndimage.center_of_mass(drawn)
    assert (column + 0.5, row + 0.5) == pytest.approx(tuple(centroid), abs=0.25)


def test_no_two_classes_share_an_outline_even_mirrored_except_the_discs():
    """Training flips images: were two classes mirror images, no classifier could tell them apart."""

    def drawn(kind: str, mirrored: bool) -> np.ndarray:
        thing = scenes.PlacedObject(kind, (24.0, 24.0), 18.0, 0.0, (255, 255, 255))
        picture = scenes.render(scenes.Scene(((0, 0, 0),) * 4, (thing,)))[..., 0] / 255
        return picture[:, ::-1] if mirrored else picture

    for i, one in enumerate(scenes.CLASSES):
        for other in scenes.CLASSES[:i]:
            difference = min(np.abs(drawn(one, False) - drawn(other, flip)).sum() for flip in (False, True))
            if {one, other} == {"disc_blue", "disc_red"}:
                assert difference == 0
            else:
                assert difference > 60, (one, other)


def test_object_stands_out_from_its_background():
    for index in range(50):
        for make in (scenes.plain_scene, scenes.hard_scene):
            scene = make(scenes.CLASSES[index % 16], np.random.default_rng(index))
            thing = next(o for o in scene.objects if o.kind in scenes.CLASSES)
            ground = np.mean(scene.background, axis=0)
            assert np.abs(ground - thing.colour).sum() > 80


def test_only_the_disc_classes_are_red_or_blue():
    def hue(kind: str, index: int) -> float:
        thing = scenes.plain_scene(kind, np.random.default_rng(index)).objects[0]
        return Image.new("RGB", (1, 1), thing.colour).convert("HSV").getpixel((0, 0))[0] * 360 / 256

    for index in range(100):
        assert min(hue("disc_red", index), 360 - hue("disc_red", index)) < 20
        assert 205 < hue("disc_blue", index) < 247
        assert 35 < hue("star", index) < 190 or 260 < hue("star", index) < 325


def test_hard_images_are_smaller_and_cluttered():
    rng = np.random.default_rng(0)
    plain = [scenes.plain_scene("star", rng) for _ in range(40)]
    hard = [scenes.hard_scene("star", rng) for _ in range(40)]
    assert all([o.kind for o in s.objects] == ["star"] for s in plain)
    for scene in hard:
        kinds = [o.kind for o in scene.objects]
        assert kinds.count("star") == 1
        assert kinds[-1] in scenes.CLUTTER
        assert len(kinds) == 6
    assert np.mean([s.objects[4].radius for s in hard]) < 0.8 * np.mean([s.objects[0].radius for s in plain])


def test_sketches_are_dark_lines_on_white(root):
    for file in sorted((root / "imagenet-sketch").rglob("*.JPEG"))[::20]:
        image = pixels(file).astype(int)
        assert np.ptp(image, axis=2).max() <= 8  # grey
        assert (image.min(axis=2) > 230).mean() > 0.6
        assert 0.01 < (image.max(axis=2) < 128).mean() < 0.25


def test_renditions_have_every_style_and_no_noise(root):
    for folder in (root / "imagenet-r").iterdir():
        if folder.is_dir():
            assert Counter(p.name.split("_")[0] for p in folder.iterdir()) == dict.fromkeys(scenes.STYLES, 8)
    rng = np.random.default_rng(0)
    scene = scenes.plain_scene("square", rng)
    for style in scenes.STYLES:
        image = scenes.rendition(scene, style, rng)
        flat = (image[:, 1:] == image[:, :-1]).all(axis=2).mean()
        assert flat > 0.6, style
    noisy = scenes.photograph(scene, rng)
    assert (noisy[:, 1:] == noisy[:, :-1]).all(axis=2).mean() < 0.05
    with pytest.raises(ValueError, match="unknown style"):
        scenes.rendition(scene, "fresco", rng)


def test_corruption_names_are_the_published_ones():
    assert list(CORRUPTIONS) == PUBLISHED_CORRUPTIONS
    assert SEVERITIES == (1, 2, 3, 4, 5)


@pytest.mark.parametrize("name", PUBLISHED_CORRUPTIONS)
def test_severity_grows(name):
    """The mean squared difference to the clean image rises with every step of severity."""
    clean = [
        scenes.photograph(scenes.plain_scene(kind, np.random.default_rng(i)), np.random.default_rng(i))
        for i, kind in enumerate(scenes.CLASSES)
    ]

    def distance(severity: int) -> float:
        changed = [corrupt(image, name, severity, np.random.default_rng(i)) for i, image in enumerate(clean)]
        return float(np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(changed, clean)]))

    distances = [distance(severity) for severity in SEVERITIES]
    assert distances[0] > 1
    assert all(low < high for low, high in pairwise(distances)), distances


def test_imagenet_c_files_are_corrupted_val_images(root):
    """Mild severities stay nearer to their own val image than to any other of val's first images."""
    wnids = sorted(miniature.class_wnids().values())
    val = {p.name: pixels(p).astype(float) for w in wnids for p in sorted((root / "imagenet/val" / w).iterdir())[:4]}
    for file in sorted((root / "imagenet-c/pixelate/1").rglob("*.JPEG")):
        image = pixels(file).astype(float)
        assert min(val, key=lambda name: np.square(val[name] - image).mean()) == file.name
