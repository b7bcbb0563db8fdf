"""ImageNet on disk: what is found, and that what is wrong with it is said in a sentence."""

from transfer_fixtures import CLASSES, write_imagenet, write_noise_image, write_split

from transfer import imagenet
from transfer.imagenet import look_imagenet
from transfer.images import wnids


def test_absent_data_says_where_it_must_lie(tmp_path):
    data = look_imagenet(tmp_path)
    assert data.status == "missing"
    assert f"{tmp_path}/imagenet/train/WNID" in data.detail


def test_half_a_dataset_is_incomplete(tmp_path):
    write_split(tmp_path / "imagenet" / "train", 1)
    data = look_imagenet(tmp_path)
    assert data.status == "incomplete"
    assert "lacks val" in data.detail


def test_a_class_that_cannot_be_learnt_is_incomplete(tmp_path):
    write_split(tmp_path / "imagenet" / "train", 1, CLASSES[:3])
    write_split(tmp_path / "imagenet" / "val", 1, CLASSES)
    data = look_imagenet(tmp_path)
    assert data.status == "incomplete"
    assert wnids()[CLASSES[3]] in data.detail


def test_a_part_of_imagenet_is_a_subset_and_chance_counts_the_classes_that_occur(tmp_path):
    data = look_imagenet(write_imagenet(tmp_path, train=2, val=1))
    assert (data.status, data.label) == ("found", "subset")
    assert data.counts == {"classes": 4, "train": 8, "val": 4}
    assert data.chance == 25.0


def test_only_the_published_counts_are_official(tmp_path, monkeypatch):
    write_imagenet(tmp_path, train=2, val=1)
    monkeypatch.setattr(imagenet, "IMAGENET_COUNTS", {"classes": 4, "train": 8, "val": 4})
    assert look_imagenet(tmp_path).label == "official"
    (tmp_path / "imagenet" / "miniature.json").write_text("{}")
    assert look_imagenet(tmp_path).label == "miniature"


def test_the_official_counts_are_those_of_ilsvrc_2012():
    assert imagenet.IMAGENET_COUNTS == {"classes": 1000, "train": 1281167, "val": 50000}


def test_the_fingerprint_follows_the_listing_and_not_the_place(tmp_path):
    root = write_imagenet(tmp_path / "one", train=2, val=1)
    seen = [look_imagenet(root).fingerprint]
    moved = root.rename(tmp_path / "two")
    assert look_imagenet(moved).fingerprint == seen[0]

    train = moved / "imagenet" / "train"
    first = train / wnids()[CLASSES[0]]
    write_noise_image(first / "added.JPEG", (1, 2, 3), 7)
    seen.append(look_imagenet(moved).fingerprint)
    (first / "added.JPEG").rename(first / "renamed.JPEG")
    seen.append(look_imagenet(moved).fingerprint)
    (first / "renamed.JPEG").rename(train / wnids()[CLASSES[1]] / "renamed.JPEG")
    seen.append(look_imagenet(moved).fingerprint)
    assert len(set(seen)) == 4
