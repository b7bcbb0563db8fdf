"""ImageNet-V2, ReaL's labels and ObjectNet on disk: what is found, and what is wrong with it in a sentence."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from timm.data.real_labels import RealLabelsImagenet

from tests.fixtures.transfer import CLASSES, coded_set, write_code
from transfer.data.findings import limited
from transfer.data.imagenet import wnids
from transfer.data.imagenet_retests import REAL_COUNTS, REAL_FILE, inspect_real, inspect_v2, real_split, shipped_labels
from transfer.data.objectnet import OBJECTS, OTHERS, inspect_objectnet
from transfer.miniature import imagenet as miniature

VAL = "ILSVRC2012_val_{:08d}.JPEG"


def test_the_shipped_labels_are_the_published_ones():
    """46,837 images and 57,553 labels: Beyer et al. 2020, section 3."""
    labels = shipped_labels()
    assert (len(labels), sum(map(bool, labels)), sum(map(len, labels))) == (50000, 46837, 57553)
    assert REAL_COUNTS["images"] == 46837


def test_timm_scores_the_same_images_as_right():
    rng = np.random.default_rng(0)
    names = [VAL.format(number) for number in range(1, 50001)]
    told, guesses = RealLabelsImagenet(names, topk=(1,)), rng.integers(0, 1000, 50000)
    for i in range(0, 50000, 2):  # let half of them be right
        if shipped_labels()[i]:
            guesses[i] = rng.choice(shipped_labels()[i])
    for name, guess in zip(names, guesses.tolist()):
        if told.real_labels[name]:
            told.is_correct[1].append(guess in told.real_labels[name])
    ours = [guess in labels for guess, labels in zip(guesses.tolist(), shipped_labels()) if labels]
    assert 100 * np.mean(ours) == pytest.approx(told.get_accuracy(1))


def test_the_objects_are_the_classes_that_others_took_from_the_archive():
    """The 125 classes as they stand, sorted, in other evaluations (model soups; imagenet-testbed has the same map)."""
    listed = sorted(c for classes in OBJECTS.values() for c in classes)
    assert (len(OBJECTS), len(OTHERS), len(listed), len(set(listed))) == (113, 200, 125, 125)
    assert listed[:12] == [409, 412, 414, 418, 419, 423, 434, 440, 444, 446, 455, 457]
    assert listed[-12:] == [893, 898, 902, 906, 907, 909, 923, 930, 950, 951, 954, 968, 999][-12:]
    digest = hashlib.sha256(",".join(map(str, listed)).encode()).hexdigest()
    assert digest == "c0cf4c952efbb7da9721bf339aadd36ca26f74c4515906ff4706765538790436"
    assert not OTHERS & OBJECTS.keys()


@pytest.mark.parametrize(
    ("folder", "wnid"), [("banana", "n07753592"), ("tv", "n04404412"), ("toilet_paper_roll", "n15075141")]
)
def test_an_object_is_the_class_that_its_name_says(folder, wnid):
    """WordNet: banana, television, toilet tissue."""
    assert [wnids()[c] for c in OBJECTS[folder]] == [wnid]


def test_imagenet_v2_is_found_and_its_folders_are_checked(tmp_path):
    assert "as its archive unpacks" in inspect_v2(tmp_path).detail
    folder = tmp_path / "imagenetv2-matched-frequency-format-val"
    for name in ("0", "999"):
        write_code(folder / name / "a.png", 0)
    data = inspect_v2(tmp_path)
    assert (data.status, data.label, data.counts) == ("found", "subset", {"classes": 2, "images": 2})
    assert "998 of the 1000 classes are missing" in data.findings[0]
    write_code(folder / "1000" / "a.png", 0)
    write_code(folder / "loose.png", 0)
    data = inspect_v2(tmp_path)
    assert data.status == "incomplete"
    assert "1000; its folders are 0 to 999" in data.detail
    assert "loose.png" not in data.detail or "not in class folders:" in data.detail
    shutil.move(folder, tmp_path / "imagenetv2" / folder.name)
    assert inspect_v2(tmp_path).status == "incomplete"


def real_set(root, labels, numbers=(1, 2)):
    for number in numbers:
        write_code(root / "imagenet" / "val" / wnids()[CLASSES[0]] / f"ILSVRC2012_val_{number:08d}.png", 0)
    (root / REAL_FILE).parent.mkdir(exist_ok=True)
    (root / REAL_FILE).write_text(labels if isinstance(labels, str) else json.dumps(labels))


def test_images_get_the_labels_of_their_number(tmp_path):
    real_set(tmp_path, [[1], [], [5, 6]], numbers=(3, 1, 2))
    data = inspect_real(tmp_path)
    assert data.status == "found", data.detail
    assert data.detail == "2 of 3 images have a label, 1 several"
    split, accepted = real_split(tmp_path)
    assert dict(zip((file.stem[-1] for file in split.files), accepted)) == {"1": (1,), "3": (5, 6)}
    assert limited(data, 1).counts["images"] == 1
    (tmp_path / REAL_FILE).write_text("[[1], [], [5, 7]]")
    assert inspect_real(tmp_path).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([[1]], "1 images that are not named"),
        ({"1": [1]}, "not a list of lists"),
        ([[1], [1000]], "'1000' is no class"),
        ([[1], [True]], "'True' is no class"),
        ("[[1], [2", "is not reassessed-imagenet's real.json"),
        ([[], []], "none of the images that have a label"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(tmp_path, labels, said):
    real_set(tmp_path, labels)
    data = inspect_real(tmp_path)
    assert data.status == "incomplete"
    assert said in data.detail


def test_images_of_other_names_are_refused(tmp_path):
    coded_set(tmp_path / "imagenet" / "val", {CLASSES[0]: [0]})
    assert "not named ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_00050000.JPEG" in inspect_real(tmp_path).detail


def test_the_miniature_is_not_scored_by_the_labels_of_other_images(tmp_path):
    root = tmp_path / "imagenet"
    coded_set(root / "val", {CLASSES[0]: [0]})
    (root / "miniature.json").write_text("{}")
    assert "not the miniature's" in inspect_real(tmp_path).detail


def test_objectnet_is_found_and_a_strange_folder_is_named(tmp_path):
    assert inspect_objectnet(tmp_path).status == "missing"
    images = tmp_path / "objectnet-1.0" / "images"
    for name in ("chair", "air_freshener"):
        write_code(images / name / "a.png", 0)
    data = inspect_objectnet(tmp_path)
    assert (data.status, data.counts, data.chance) == ("found", {"classes": 1, "images": 1}, pytest.approx(0.3))
    assert "112 of the 113 classes are missing (alarm_clock" in data.findings[0]
    write_code(images / "chairs" / "a.png", 0)
    assert "none of its classes: chairs" in inspect_objectnet(tmp_path).detail


def test_the_miniatures_are_read(tmp_path, monkeypatch):
    for name, count in (("VAL", 10), ("TRAIN", 1), ("V2", 1), ("OBJECTS", 1)):
        monkeypatch.setattr(miniature, name, count)
    for write, inspect, images in (
        (miniature.imagenet_v2, inspect_v2, 16),
        (miniature.imagenet_real, inspect_real, 16 * 9),
        (miniature.objectnet, inspect_objectnet, 5),
    ):
        write(tmp_path)
        data = inspect(tmp_path)
        assert (data.status, data.label) == ("found", "miniature"), data.detail
        assert data.counts["images"] == images
