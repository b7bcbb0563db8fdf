"""ImageNet-A, -R, -Sketch and -C on disk: what is found, and that what is wrong with it is said in a sentence."""

import re
import shutil
from functools import partial

import pytest

from tests.fixtures import SHARED
from tests.fixtures.transfer import CLASSES, make_job, write_c, write_imagenet, write_split
from transfer.classification.robustness import ALEXNET_ERROR, TASKS
from transfer.data import imagenet_shifts as shifted_sets
from transfer.data.imagenet import columns, wnids
from transfer.data.imagenet_shifts import CORRUPTIONS, folder_of, inspect_c, inspect_shift, read_c
from transfer.data.split import folders_of
from transfer.jobs import obstacle

C = TASKS[3]


def test_the_corruptions_are_those_of_mce():
    assert len(CORRUPTIONS) == 15
    assert set(CORRUPTIONS) == set(ALEXNET_ERROR)


def test_a_complete_tree_is_found(tmp_path):
    data = inspect_c(write_c(tmp_path))
    assert (data.status, data.label) == ("found", "subset")
    assert data.counts == {"classes": 2, "images": 15 * 5 * 4, "versions": 75}


def test_the_released_archives_groups_are_found(tmp_path):
    groups = {c: "noise" for c in CORRUPTIONS if c.endswith("noise")}
    groups |= {c: "blur" for c in CORRUPTIONS if c.endswith("blur")}
    groups |= dict.fromkeys(("snow", "frost", "fog", "brightness"), "weather")
    groups |= dict.fromkeys(("contrast", "elastic_transform", "pixelate", "jpeg_compression"), "digital")
    assert len(groups) == 15
    data = inspect_c(write_c(tmp_path, groups))
    assert data.counts["images"] == 300


def test_corruptions_beyond_the_fifteen_are_ignored(tmp_path):
    """The archive of extra corruptions, unpacked beside the others."""
    before = inspect_c(write_c(tmp_path))
    for extra in ("speckle_noise", "gaussian_blur", "spatter", "saturate", "clean"):
        shutil.copytree(tmp_path / "imagenet-c" / "fog", tmp_path / "imagenet-c" / extra)
    assert inspect_c(tmp_path) == before


def test_folders_that_do_not_hold_the_same_images_are_named(tmp_path):
    """As many in each, but one is another: the versions of an image could not be taken together."""
    base = write_c(tmp_path) / "imagenet-c"
    file = next((base / "snow" / "2" / wnids()[CLASSES[0]]).iterdir())
    file.rename(file.with_name("another.png"))
    data = inspect_c(tmp_path)
    assert data.status == "incomplete"
    assert data.detail.endswith("the same images in every folder: gaussian_noise/1 differs from snow/2")


def test_all_versions_have_the_names_in_one_place(tmp_path):
    """75 times 50,000 names would fill half a GiB; what file browsers leave behind changes nothing."""
    base = write_c(tmp_path) / "imagenet-c"
    (base / "snow" / "2" / wnids()[CLASSES[0]] / ".DS_Store").touch()
    splits, problems = read_c(tmp_path)
    assert not problems
    lists = [[names for _, names in folders_of(split.files)] for split in splits.values()]
    assert len(lists) == 75
    assert all(len({id(names) for names in of_class}) == 1 for of_class in zip(*lists, strict=True))
    assert len({id(split.labels) for split in splits.values()}) == 1


def test_findings_of_parts(tmp_path, monkeypatch):
    write_split(tmp_path / "imagenet-r", 1)
    classes, counts = inspect_shift("imagenet_r", tmp_path).findings
    assert classes.startswith("imagenet-r: 196 of the 200 classes are missing (n01443537, ")  # the goldfish
    assert counts == "imagenet-r: 4 images, 29996 fewer than the official 30000: not the official set"
    classes, counts = inspect_c(write_c(tmp_path)).findings
    assert classes.startswith("imagenet-c: 998 of the 1000 classes")
    assert "300 images, 3749700 fewer than the official 3750000" in counts
    (tmp_path / "imagenet-r" / "miniature.json").write_text("{}")
    assert inspect_shift("imagenet_r", tmp_path).findings == ()


def test_an_empty_image_is_reported(tmp_path):
    write_split(tmp_path / "imagenet-a", 1)
    file = next((tmp_path / "imagenet-a").rglob("*.JPEG"))
    file.write_bytes(b"")
    detail = inspect_shift("imagenet_a", tmp_path).detail
    assert f"1 of 4 images looked at (of 4) cannot be used: {file} is empty" in detail


@pytest.mark.parametrize(
    ("inspect", "where"),
    [
        (inspect_c, "imagenet-c/CORRUPTION/SEVERITY/WNID"),
        (partial(inspect_shift, "imagenet_r"), "imagenet-r/WNID"),
    ],
)
def test_an_absent_set_says_where_it_must_lie(tmp_path, inspect, where):
    data = inspect(tmp_path)
    assert data.status == "missing"
    assert f"{tmp_path}/{where}" in data.detail


def test_what_is_missing_is_listed(tmp_path):
    base = write_c(tmp_path) / "imagenet-c"
    (base / "fog").rename(base / "foggy")
    (base / "snow" / "3").rename(base / "snow" / "6")
    shutil.rmtree(base / "frost" / "2" / wnids()[CLASSES[1]])
    data = inspect_c(tmp_path)
    assert data.status == "incomplete"
    assert re.search(r"lacks 1 of the 15 corruptions: fog\b", data.detail)
    assert str(base / "snow" / "3") in data.detail
    assert "fewer than 4 images in frost/2 (2)" in data.detail


def test_an_incomplete_tree_fails_and_gives_no_number(tmp_path):
    base = write_c(tmp_path) / "imagenet-c"
    (base / "fog" / "5").rename(base / "five")
    status, reason = obstacle(make_job(C, tmp_path, tmp_path / "work"))
    assert status == "failed"
    assert str(base / "fog" / "5") in reason


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_classes_that_do_not_belong_to_a_set_are_named(tmp_path, name):
    foreign = next(c for c in range(1000) if c not in columns(name))
    write_split(tmp_path / name.replace("_", "-"), 1, (CLASSES[0], foreign))
    data = inspect_shift(name, tmp_path)
    assert data.status == "incomplete"
    assert wnids()[foreign] in data.detail
    assert wnids()[CLASSES[0]] not in data.detail


@pytest.mark.parametrize("folder", ["imagenet-sketch", "imagenet-sketch/sketch", "sketch"])
def test_sketch_is_found_under_its_usual_names(tmp_path, folder):
    write_split(tmp_path / folder, 1, (CLASSES[0], 999))
    assert folder_of(tmp_path, "imagenet_sketch") == tmp_path / folder
    data = inspect_shift("imagenet_sketch", tmp_path)
    assert (data.status, data.counts) == ("found", {"classes": 2, "images": 2})


def test_the_clean_images_beside_a_set_are_part_of_its_data(tmp_path):
    write_split(tmp_path / "imagenet-a", 1)
    before = inspect_shift("imagenet_a", tmp_path).fingerprint
    write_imagenet(tmp_path, train=1, val=1)
    assert inspect_shift("imagenet_a", tmp_path).fingerprint != before


@pytest.mark.parametrize(("name", "images"), [("imagenet_a", 7500), ("imagenet_r", 30000)])
def test_a_part_of_a_set_is_not_official(tmp_path, monkeypatch, name, images):
    """7500 and 30000 images of 200 classes are (timm's results and the authors' pages)."""
    assert shifted_sets.COUNTS[name] == images
    write_split(tmp_path / name.replace("_", "-"), 1)
    assert inspect_shift(name, tmp_path).label == "subset"


needs_real_images = pytest.mark.skipif(not SHARED.is_dir(), reason="no real images beside this checkout")


@needs_real_images
def test_real_images_are_found_whatever_their_names():
    assert inspect_shift("imagenet_a", SHARED).counts == {"classes": 2, "images": 2}
    assert inspect_shift("imagenet_sketch", SHARED).counts == {"classes": 9, "images": 36}
    assert any(" " in path.name for path in (SHARED / "imagenet-a").rglob("*"))


@needs_real_images
def test_six_real_corruptions_are_not_imagenet_c():
    data = inspect_c(SHARED)
    assert data.status == "incomplete"
    there = {path.name for path in (SHARED / "imagenet-c").iterdir()}
    assert data.detail.startswith(f"{SHARED / 'imagenet-c'} lacks 9 of the 15 corruptions: ")
    assert all((c in data.detail) != (c in there) for c in CORRUPTIONS)


@needs_real_images
def test_findings_of_the_real_parts_say_what_they_lack():
    classes, counts = inspect_shift("imagenet_sketch", SHARED).findings
    assert classes.startswith("imagenet-sketch: 991 of the 1000 classes are missing (n01440764, ")
    assert counts == "imagenet-sketch: 36 images, 50853 fewer than the official 50889: not the official set"
