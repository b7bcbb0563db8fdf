"""The lists of few training images: which images they are, and what is refused."""

import shutil

import pytest

from mae_core.errors import UserError
from tests.fixtures.lowshot import name_of, write_list, write_numbered, write_shots
from tests.fixtures.transfer import CLASSES, make_job
from transfer.classification.job import images_of
from transfer.classification.tasks import TASKS
from transfer.data.imagenet import wnids
from transfer.data.lowshot import SUBSETS, inspect_subset, read_subset
from transfer.jobs import obstacle
from transfer.miniature import imagenet as miniature

TASK = {task.name: task for task in TASKS}
PERCENT, _, ONE, TWO, FIVE = SUBSETS


@pytest.fixture
def data(tmp_path):
    return write_numbered(tmp_path / "data")


def test_a_subset_is_exactly_its_list(data):
    wanted = [name_of(CLASSES[2], 5), name_of(CLASSES[0], 7), *(name_of(c, 3) for c in CLASSES)]
    write_list(data / "imagenet_subsets/1percent.txt", *wanted)
    split, problems = read_subset(data, PERCENT, seed=5)  # it has one list, whatever the seed
    assert problems == []
    assert [file.name for file in split.files] == wanted
    assert split.labels == (CLASSES[2], CLASSES[0], *CLASSES)
    found = inspect_subset(PERCENT, data)
    assert (found.status, found.label, found.counts) == ("found", "subset", {"classes": 4, "train": 6, "val": 8})
    job = make_job(TASK["imagenet_finetune_1pct"], data, data / "work", batch=2)
    reading = images_of(job)
    assert [file.name for file in reading.train.files] == wanted
    assert (len(reading.val.files), reading.classes) == (8, 1000)


@pytest.mark.parametrize(("seed", "indices"), [(0, {0, 1}), (1, {2, 3}), (2, {6, 7})])
def test_the_seed_is_the_number_of_the_split(data, seed, indices):
    write_shots(data)
    job = make_job(TASK["imagenet_finetune_2shot"], data, data / "work", seed=seed, batch=2)
    assert obstacle(job) == ("", "")
    assert {file.name for file in images_of(job).train.files} == {name_of(c, i) for c in CLASSES for i in indices}


def test_a_fourth_split_is_refused(data):
    write_shots(data)
    job = make_job(TASK["imagenet_finetune_2shot"], data, data / "work", seed=3, batch=2)
    with pytest.raises(UserError, match="three lists of 2 images a class: give seeds 0, 1 and 2"):
        obstacle(job)


def test_the_third_list_of_five_has_the_name_that_msn_gave_it(data):
    write_shots(data, 5)
    old = data / "imagenet_subsets3/5imgs_class.txt"
    old.rename(old.with_name("3imgs_class.txt"))
    split, problems = read_subset(data, FIVE, seed=2)
    assert problems == []
    assert {file.name for file in split.files} == {name_of(c, i) for c in CLASSES for i in range(3, 8)}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([name_of(CLASSES[0], 99)], "lists 1 images that are not there: "),
        (["ILSVRC2012_val_00000001.JPEG"], "no training image of ImageNet: ILSVRC2012_val_00000001.JPEG"),
        (["n99999999_1.JPEG"], "no training image of ImageNet: n99999999_1.JPEG"),
        ([f"{wnids()[0]}_1./../../x.JPEG"], "no training image of ImageNet"),
        ([name_of(CLASSES[0], 0)], "lists 1 images twice: "),
        ([], "val has classes that"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(data, lines, said):
    write_list(data / "imagenet_subsets/1percent.txt", name_of(CLASSES[0], 0), *lines)
    found = inspect_subset(PERCENT, data)
    assert found.status == "incomplete"
    assert said in found.detail


def test_a_list_of_shots_has_as_many_of_each_class(data):
    write_shots(data)
    path = data / "imagenet_subsets2/2imgs_class.txt"
    write_list(path, *path.read_text().split()[:-1])
    found = inspect_subset(TWO, data)
    assert found.status == "incomplete"
    assert f"{path} does not list 2 images a class: 1 of {wnids()[CLASSES[0]]}" in found.detail


def test_what_is_missing_is_said(data):
    found = inspect_subset(ONE, data)
    assert found.status == "missing"
    assert f"must lie at {data}/imagenet_subsets1/1imgs_class.txt, " in found.detail
    write_shots(data, 1)
    assert inspect_subset(ONE, data).status == "found"
    before = inspect_subset(ONE, data).fingerprint
    write_list(data / "imagenet_subsets3/1imgs_class.txt", *(name_of(c, 0) for c in CLASSES))
    assert inspect_subset(ONE, data).fingerprint != before
    shutil.rmtree(data / "imagenet/val")
    assert inspect_subset(ONE, data).status == "missing"


def test_official_counts():
    """simclr's lists have 12,811 and 128,116 lines."""
    assert {s.name: s.images for s in SUBSETS} == {
        "1pct": 12811, "10pct": 128116, "1shot": 1000, "2shot": 2000, "5shot": 5000
    }  # fmt: skip


def test_the_miniatures_lists_are_read(tmp_path, monkeypatch):
    for name, count in (("TRAIN", 6), ("VAL", 1)):
        monkeypatch.setattr(miniature, name, count)
    miniature.imagenet_lists(tmp_path)
    for subset, images in zip(SUBSETS, (16, 80, 16, 32, 80)):
        found = inspect_subset(subset, tmp_path)
        assert (found.status, found.label) == ("found", "miniature"), found.detail
        assert found.counts["train"] == images
    splits = [set(read_subset(tmp_path, FIVE, seed)[0].files) for seed in range(3)]
    assert len(set(map(frozenset, splits))) == 3
