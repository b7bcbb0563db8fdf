"""ImageNet on disk: what is found, and that what is wrong with it is said in a sentence."""

import hashlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fixtures import SHARED
from tests.fixtures.transfer import CLASSES, make_job, write_imagenet, write_noise_image, write_split
from transfer.data import imagenet
from transfer.data.imagenet import columns, inspect_imagenet, inspect_imagenet_val, read_split, wnids
from transfer.frozen.tasks import KNN
from transfer.run import describe, read_record, write_record

TENCH, GOLDFISH = wnids()[CLASSES[0]], wnids()[CLASSES[1]]


def test_there_are_1000_sorted_classes():
    assert len(set(wnids())) == 1000
    assert list(wnids()) == sorted(wnids())
    assert (wnids()[0], wnids()[999]) == ("n01440764", "n15075141")  # tench, toilet tissue


@pytest.mark.parametrize(
    ("which", "total", "sha256"),
    [
        ("imagenet_a", 102178, "973e8c3e530bf5dbd49999d046e74084ba5184ab98036b42b111d8dcdecf1015"),
        ("imagenet_r", 86135, "a1d9a9ace3098120f5db861d97049116efe80683f4e48c65a62f9bd30fc3366a"),
    ],
)
def test_the_200_classes_are_those_of_the_published_evaluation_scripts(which, total, sha256):
    """Sum and hash of the index lists in hendrycks/natural-adv-examples and hendrycks/imagenet-r, eval.py."""
    assert len(columns(which)) == 200
    assert sum(columns(which)) == total
    assert hashlib.sha256(",".join(map(str, columns(which))).encode()).hexdigest() == sha256


def test_a_and_r_share_86_classes():
    assert len(set(columns("imagenet_a")) & set(columns("imagenet_r"))) == 86


def test_labels_come_from_the_wnid_and_not_from_the_rank_of_the_folder(tmp_path):
    write_split(tmp_path, 2, classes=(980, 6, 301))
    split, problems = read_split(tmp_path)
    assert split.labels == (6, 6, 301, 301, 980, 980)
    assert [f.parent.name for f in split.files[::2]] == [wnids()[6], wnids()[301], wnids()[980]]
    assert problems == []


def test_every_usual_extension_and_names_with_spaces_are_found(tmp_path):
    folder = tmp_path / wnids()[13]
    names = ["a.JPEG", "b.jpg", "c.png", "d e f.JPG", "g.jpeg", "h.PNG", "ü.webp"]
    for i, name in enumerate(names):
        write_noise_image(folder / name, (9, 9, 9), i, (8, 8))
    (folder / "notes.txt").write_text("no image")
    split, problems = read_split(tmp_path)
    assert sorted(f.name for f in split.files) == sorted(names)
    assert problems == []


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    write_split(tmp_path, 1, classes=(6,))
    write_noise_image(tmp_path / "loose.png", (0, 0, 0), 0)
    write_noise_image(tmp_path / "goldfish" / "x.png", (0, 0, 0), 0)
    (tmp_path / wnids()[7]).mkdir()
    split, problems = read_split(tmp_path)
    assert len(split.files) == 1
    text = " | ".join(problems)
    assert "1 images lie in" in text
    assert "goldfish" in text
    assert wnids()[7] in text


def test_a_folder_without_images_is_a_problem(tmp_path):
    assert read_split(tmp_path)[1] == [f"{tmp_path} has no class folder with images in it: unpack the archive there"]


def test_absent_data_says_where_it_must_lie(tmp_path):
    data = inspect_imagenet(tmp_path)
    assert data.status == "missing"
    assert f"{tmp_path}/imagenet/train/WNID" in data.detail


def test_half_a_dataset_is_incomplete(tmp_path):
    write_split(tmp_path / "imagenet" / "train", 1)
    data = inspect_imagenet(tmp_path)
    assert data.status == "incomplete"
    assert "lacks val" in data.detail


def test_a_class_that_cannot_be_learnt_is_incomplete(tmp_path):
    write_split(tmp_path / "imagenet" / "train", 1, CLASSES[:3])
    write_split(tmp_path / "imagenet" / "val", 1, CLASSES)
    data = inspect_imagenet(tmp_path)
    assert data.status == "incomplete"
    assert wnids()[CLASSES[3]] in data.detail


def test_a_part_of_imagenet_is_a_subset_and_chance_counts_the_classes_that_occur(tmp_path):
    data = inspect_imagenet(write_imagenet(tmp_path, train=2, val=1))
    assert (data.status, data.label) == ("found", "subset")
    assert data.counts == {"classes": 4, "train": 8, "val": 4}
    assert data.chance == 25.0


def test_only_the_published_counts_are_official(tmp_path, monkeypatch):
    write_imagenet(tmp_path, train=2, val=1)
    assert imagenet.IMAGENET_COUNTS == {"classes": 1000, "train": 1281167, "val": 50000}  # ILSVRC 2012
    monkeypatch.setattr(imagenet, "IMAGENET_COUNTS", {"classes": 4, "train": 8, "val": 4})
    assert inspect_imagenet(tmp_path).label == "official"
    (tmp_path / "imagenet" / "miniature.json").write_text("{}")
    assert inspect_imagenet(tmp_path).label == "miniature"


def test_the_fingerprint_follows_the_listing_and_not_the_place(tmp_path):
    root = write_imagenet(tmp_path / "one", train=2, val=1)
    seen = [inspect_imagenet(root).fingerprint]
    moved = root.rename(tmp_path / "two")
    assert inspect_imagenet(moved).fingerprint == seen[0]

    train, added = moved / "imagenet" / "train", "added.JPEG"
    write_noise_image(train / TENCH / added, (1, 2, 3), 7)
    seen.append(inspect_imagenet(moved).fingerprint)
    for place in (train / TENCH / "renamed.JPEG", train / GOLDFISH / "renamed.JPEG"):
        next(train.rglob(added)).rename(place)
        added = place.name
        seen.append(inspect_imagenet(moved).fingerprint)
    assert len(set(seen)) == 4


@pytest.fixture
def root(tmp_path) -> Path:
    """Four classes with two training images and one validation image each, named as the official ones."""
    write_imagenet(tmp_path, train=2, val=1)
    for number, file in enumerate(sorted((tmp_path / "imagenet" / "val").rglob("*.JPEG"))):
        file.rename(file.with_name(f"ILSVRC2012_val_{number:08}.JPEG"))
    return tmp_path


def flat(imagenet: Path) -> None:
    for file in sorted((imagenet / "val").rglob("*.JPEG")):
        file.rename(imagenet / "val" / file.name)
        shutil.rmtree(file.parent)


def swapped(imagenet: Path) -> None:
    for old, new in (("train", "held"), ("val", "train"), ("held", "val")):
        (imagenet / old).rename(imagenet / new)


def as_kaggle_packs(imagenet: Path) -> None:
    (imagenet / "ILSVRC" / "Data").mkdir(parents=True)
    (imagenet / "train").rename(imagenet / "ILSVRC" / "Data" / "CLS-LOC")


def broken_class(imagenet: Path) -> None:
    shutil.rmtree(imagenet / "train" / TENCH)
    (imagenet / "train" / TENCH).symlink_to(imagenet / "nowhere")


def broken_image(imagenet: Path) -> None:
    file = next((imagenet / "val" / TENCH).iterdir())
    file.unlink()
    file.symlink_to("nowhere.JPEG")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (flat, "4 images lie in {root}/val itself, not in class folders named by WNID: the official archive is flat"),
        (flat, "valprep.sh of soumith/imagenetloader.torch"),
        (flat, "ILSVRC2012_devkit_t12.tar.gz"),
        (
            lambda d: (d / f"train/{TENCH}.tar").touch(),
            "{root}/train has 1 archives of classes, packed still; in there: for f in n*.tar; do mkdir -p",
        ),
        (
            lambda d: (d / "train" / TENCH).rename(d / "train" / "tench"),
            "{root}/train has folders that are no ImageNet class: tench; rename each to the WNID of its class",
        ),
        (swapped, "{root}/train holds only validation images (ILSVRC2012_val_*): are train and val swapped?"),
        (as_kaggle_packs, "move or link the folders from {root}/ILSVRC/Data/CLS-LOC"),
        (broken_class, "{root}/train has broken links for class folders: {tench}"),
        (broken_image, "1 of 4 validation images looked at (of 4) cannot be used: {root}/val/{tench}/"),
        (
            lambda d: (d / "val" / TENCH / "images").mkdir(),
            "{root}/val has folders inside its class folders: {tench}/images; move their images out of them",
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(root, damage, says):
    damage(root / "imagenet")
    data = inspect_imagenet(root)
    assert data.status == "incomplete"
    assert says.format(root=root / "imagenet", tench=TENCH) in data.detail


def test_what_kaggles_hint_is_for_is_there(root):
    (root / "imagenet" / "train").rename(root / "elsewhere")
    assert "Kaggle" not in inspect_imagenet(root).detail


def test_findings_of_a_part(root):
    classes, counts = inspect_imagenet(root).findings
    assert "996 of the 1000 classes are missing (n01440764" in classes
    assert "8 train images, 1281159 fewer" in counts
    assert "4 val images, 49996 fewer" in counts
    classes, counts = inspect_imagenet_val(root).findings
    assert classes.startswith("imagenet/val: 996 of the 1000 classes")


def test_findings_do_not_change_what_the_data_are(root, monkeypatch):
    before = inspect_imagenet(root)
    monkeypatch.setattr(imagenet, "IMAGENET_COUNTS", before.counts)
    assert inspect_imagenet(root).fingerprint == before.fingerprint


def test_no_findings_of_the_miniature_nor_of_the_official_set(root, monkeypatch):
    (root / "imagenet" / "miniature.json").write_text("{}")
    assert inspect_imagenet(root).findings == inspect_imagenet_val(root).findings == ()
    (root / "imagenet" / "miniature.json").unlink()
    monkeypatch.setattr(imagenet, "IMAGENET_COUNTS", {"classes": 4, "train": 8, "val": 4})
    monkeypatch.setattr(imagenet, "without", lambda *_: [])
    assert inspect_imagenet(root).label == "official"
    assert inspect_imagenet(root).findings == inspect_imagenet_val(root).findings == ()


def test_a_class_that_is_learnt_and_never_tested_is_a_finding(root):
    shutil.rmtree(root / "imagenet" / "val" / TENCH)
    data = inspect_imagenet(root)
    assert data.status == "found"
    assert f"imagenet/val lacks 1 classes of train: {TENCH}" in data.findings


def test_images_of_the_other_split_and_of_another_class_are_known_by_their_names(root):
    train, val = root / "imagenet" / "train", root / "imagenet" / "val"
    shutil.copy(val / TENCH / "ILSVRC2012_val_00000000.JPEG", train / TENCH)
    shutil.copy(train / TENCH / f"{TENCH}_1.JPEG", val / GOLDFISH)
    found = inspect_imagenet(root).findings[2:]
    assert found == (
        "imagenet/train: 1 images have names of ImageNet's validation images: ILSVRC2012_val_00000000.JPEG",
        f"imagenet/val: 1 images have names of ImageNet's training images: {TENCH}_1.JPEG",
        f"imagenet/val: 1 images are named for another class: {GOLDFISH}/{TENCH}_1.JPEG",
        f"imagenet: 2 images are there twice, by their names: ILSVRC2012_val_00000000.JPEG, {TENCH}_1.JPEG",
    )


def test_a_training_image_in_the_folder_of_another_class_is_there_twice(root):
    train = root / "imagenet" / "train"
    shutil.copy(train / TENCH / f"{TENCH}_1.JPEG", train / GOLDFISH)
    assert inspect_imagenet(root).findings[2:] == (
        f"imagenet/train: 1 images are named for another class: {GOLDFISH}/{TENCH}_1.JPEG",
        f"imagenet: 1 images are there twice, by their names: {TENCH}_1.JPEG",
    )


def test_inspecting_lists_folders_and_never_asks_for_every_file(tmp_path, monkeypatch):
    """One question for each of millions of files takes minutes: a hundred of each split are looked at."""
    for split, per_class in (("train", 300), ("val", 200)):
        for label in CLASSES:
            folder = tmp_path / "imagenet" / split / wnids()[label]
            folder.mkdir(parents=True)
            for number in range(per_class):
                (folder / f"{number}.JPEG").write_bytes(b"x")
    asked = []
    for name in ("stat", "lstat", "access", "open"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, **o: asked.append(a[0]) or real(*a, **o))
    data = inspect_imagenet(tmp_path)
    assert data.counts == {"classes": 4, "train": 1200, "val": 800}
    assert 200 <= len([path for path in asked if str(path).endswith(".JPEG")]) <= 400  # stat and access of each
    assert len(asked) < 450


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real images beside this checkout")
def test_findings_of_the_real_part_say_that_its_splits_are_not_the_official_ones():
    """Ten classes, whose images were dealt out anew: the published validation images are among those for training."""
    found = " | ".join(inspect_imagenet(SHARED).findings)
    assert "990 of the 1000 classes are missing" in found
    moved = list((SHARED / "imagenet" / "train").rglob("ILSVRC2012_val_*"))
    assert f"imagenet/train: {len(moved)} images have names of ImageNet's validation images" in found


def test_a_folder_whose_name_is_no_utf_8_is_named_in_the_plan_and_in_a_record(root, tmp_path):
    os.mkdir(os.fsencode(root / "imagenet" / "train") + b"/caf\xe9")
    said = r"has folders that are no ImageNet class: caf\xe9; rename"
    assert said in inspect_imagenet(root).detail
    job = replace(make_job(KNN, root, tmp_path / "work"), out=tmp_path)
    write_record(describe(job, status="failed", reason=job.data.detail), tmp_path)
    assert said in read_record(tmp_path / "record.json").reason


def test_what_browsers_of_files_leave_behind_is_passed_over(root):
    before = inspect_imagenet(root)
    folder = root / "imagenet" / "train"
    for name in (".DS_Store", "@eaDir/1.JPEG", f"{TENCH}/._1.JPEG", f"{TENCH}/.ipynb_checkpoints/1.JPEG", "Thumbs.db"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    assert inspect_imagenet(root) == before
