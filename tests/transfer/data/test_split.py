import hashlib
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from transfer.data.split import Files, Split, few_of_both, fingerprint, joined, texts_of


def test_of_classes_keeps_files_and_labels_together():
    split = Split(tuple(map(Path, "abcd")), (1, 5, 1, 7))
    assert split.of_classes({1, 7}) == Split((Path("a"), Path("c"), Path("d")), (1, 1, 7))


def test_the_fingerprint_tells_train_from_val(tmp_path):
    a, b = Split((tmp_path / "a",), (1,)), Split((tmp_path / "b",), (1,))
    assert fingerprint(tmp_path, a, b) != fingerprint(tmp_path, Split((*a.files, *b.files), (1, 1)), Split((), ()))
    assert fingerprint(tmp_path, a) != fingerprint(tmp_path, replace(a, labels=(2,)))


def numbered(counts: dict[int, int]) -> Split:
    labels = [label for label, n in counts.items() for _ in range(n)]
    return Split(tuple(Path(f"{label}/{i}.jpg") for i, label in enumerate(labels)), tuple(labels))


def test_one_percent_of_imagenet_is_balanced_as_its_published_subset():
    # tensorflow_datasets imagenet2012_subset: 12,811 and 128,116 images, as many of each class but for one.
    counts = {label: 732 if label < 105 else 1300 for label in range(1000)}
    counts[999] = 1281167 - sum(counts[label] for label in range(999))
    labels = tuple(label for label, n in counts.items() for _ in range(n))
    everything = Split((Path("a.jpg"),) * len(labels), labels)
    for fraction, total, each in ((0.01, 12811, {12, 13}), (0.1, 128116, {128, 129})):
        kept = everything.share(fraction, 0)
        assert len(kept.files) == total
        assert set(Counter(kept.labels).values()) == each


def test_a_share_takes_all_of_a_rare_class_and_fills_up_from_the_others():
    # 10 of 20 images: 1 and 2 of the rare classes, then (10 - 3) / 2 of each of the others, the odd one of the larger.
    kept = numbered({3: 1, 5: 2, 7: 8, 9: 9}).share(0.5, 0)
    assert Counter(kept.labels) == {3: 1, 5: 2, 7: 3, 9: 4}
    assert list(kept.files) == sorted(kept.files, key=lambda f: int(f.stem))
    assert len(set(kept.files)) == 10
    assert Counter(numbered({3: 1, 5: 2, 7: 8}).share(0.001, 0).labels) == {3: 1, 5: 1, 7: 1}


def test_a_share_is_drawn_by_its_seed():
    everything = numbered({0: 50, 1: 50})
    assert everything.share(0.1, 0) == everything.share(0.1, 0)
    assert everything.share(0.1, 0) != everything.share(0.1, 1)
    assert everything.share(1.0, 1) is everything
    assert set(everything.share(0.1, 0).files) <= set(everything.files)


def test_a_few_images_are_spread_over_the_classes():
    everything = numbered({0: 50, 1: 2, 2: 50, 3: 50})
    # Two of each; the fifth class that there is not would be next, so the first and the last get the odd ones.
    assert Counter(everything.few(10).labels) == {0: 3, 1: 2, 2: 2, 3: 3}
    assert [file.name for file in everything.few(10).files[:3]] == ["0.jpg", "1.jpg", "2.jpg"]
    assert Counter(everything.few(2).labels) == {0: 1, 3: 1}
    assert Counter(everything.few(20).labels) == {0: 5, 1: 2, 2: 5, 3: 5}  # a small class has no more
    assert everything.few(152) is everything
    assert everything.few(0) is everything


def test_a_few_images_of_two_splits_share_their_classes():
    train, val = numbered(dict.fromkeys(range(100), 20)), numbered(dict.fromkeys(range(1, 100), 5))
    few_train, few_val = few_of_both(train, val, 10)
    assert few_train.classes == few_val.classes
    assert Counter(few_train.labels) == Counter(few_val.labels) == dict.fromkeys(few_val.classes, 1)
    assert {1, 99} <= few_val.classes
    assert few_of_both(train, val, 0) == (train, val)
    assert few_of_both(train, val, 1000)[1] is val


def test_files_are_a_sequence_of_paths(tmp_path):
    folders = [(f"{tmp_path}/a", ["1", "2"]), (f"{tmp_path}/b", []), (f"{tmp_path}/c c", ["3", "4", "5"])]
    files, same = Files(folders), tuple(tmp_path / name for name in ("a/1", "a/2", "c c/3", "c c/4", "c c/5"))
    assert tuple(files) == same
    assert files == same
    assert same == files
    assert hash(files) == hash(same)
    assert len(files) == 5
    assert [files[i] for i in range(-5, 5)] == [same[i] for i in range(-5, 5)]
    assert (files[1:4], files[::-2]) == (same[1:4], same[::-2])
    assert list(texts_of(files)) == list(map(str, same)) == list(texts_of(same))
    assert Split(files, (0,) * 5).names == Split(same, (0,) * 5).names == list("12345")
    assert files != same[:4]
    assert files != (*same[:4], same[0])
    with pytest.raises(IndexError):
        files[5]
    assert not Files()


def test_the_fingerprint_is_that_of_the_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path, Path(), Path("data")):
        paths = (root / "x" / "1.jpg", root / "x" / "2.jpg")
        files = Files([(str(root / "x"), ["1.jpg", "2.jpg"])])
        assert fingerprint(root, Split(files, (3, 4))) == fingerprint(root, Split(paths, (3, 4)))
    named = "".join(f"{paths[i].relative_to(root)} {label}\n" for i, label in enumerate((3, 4)))
    assert fingerprint(root, Split(files, (3, 4))) == hashlib.sha256(f"{named}\n".encode()).hexdigest()


def test_joined_splits_follow_each_other(tmp_path):
    one = Split(Files([(f"{tmp_path}/a", ["1", "2"])]), (0, 1))
    two = Split((tmp_path / "b",), (2,))
    for splits in ([one, one], [one, two], [two, two], [one], []):
        whole = joined(splits)
        assert list(whole.files) == [file for split in splits for file in split.files]
        assert list(whole.labels) == [label for split in splits for label in split.labels]


def test_files_of_names_keep_their_order(tmp_path):
    texts = ["/d/a/1.jpg", "/d/a/2.jpg", "/d/b/1.jpg", "/d/a/3.jpg", "/4.jpg"]
    files = Files.of(texts)
    assert list(files.texts()) == texts
    assert [len(names) for _, names in files.folders] == [2, 1, 1, 1]
    assert list(Files.of(["5.jpg"])) == [Path("5.jpg")]


def test_the_fingerprint_of_folders_of_one_label_is_that_of_their_lines(tmp_path):
    """Whose lines are joined; of mixed, empty and unlabelled ones too, and of names that are no UTF-8."""
    odd = os.fsdecode(b"caf\xe9.jpg")
    files = Files([(f"{tmp_path}/a", ["1.jpg", odd]), (f"{tmp_path}/b", []), (f"{tmp_path}/c", ["1.jpg", "2.jpg"])])
    lines = [f"a/1.jpg 7\na/{odd} 7\nc/1.jpg 3\nc/2.jpg 4\n\n", "\n"]
    expected = hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    assert fingerprint(tmp_path, Split(files, (7, 7, 3, 4)), Split()) == expected
