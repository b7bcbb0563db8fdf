"""iNaturalist, Places and a user's folder, read with the traps of their official formats; and their miniatures."""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

from mae_core.checkpoint import read_checkpoint
from tests.fixtures import SHARED
from tests.fixtures.transfer import make_job, write_noise_image
from transfer.classification.tasks import TASKS, folder_task
from transfer.data.labelled import INAT2021, SETS, inspect_set, read_folder, read_list
from transfer.data.split import Split
from transfer.jobs import find_tasks, task_argument
from transfer.miniature import labelled as miniature_sets
from transfer.run import run_job

KNOWN = {known.name: known for known in (*SETS, INAT2021)}


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "JPEG")


def write_inat(root: Path, year: int, train: dict[str, int], val: dict[str, int], skip: tuple[str, ...] = ()) -> Path:
    """root/inatYEAR with those files (below the archive's folder) and labels; `skip`: files that are not written."""
    folder = root / f"inat{year}"
    images = {2017: "train_val_images", 2021: "."}.get(year, f"train_val{year}")
    number = 0
    for split, labels in (("train", train), ("val", val)):
        content = {"info": {}, "licenses": [], "categories": [], "images": [], "annotations": []}
        for name, label in labels.items():
            number += 1
            file = f"{images}/{name}"
            content["images"].append({"id": number, "file_name": file, "width": 4, "height": 4})
            # Ids of annotations are not those of images, and the order differs.
            content["annotations"].insert(0, {"id": 1000 - number, "image_id": number, "category_id": label})
            if name not in skip:
                touch(folder / file)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / (f"{split}.json" if year == 2021 else f"{split}{year}.json")).write_text(json.dumps(content))
    return folder


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_official_counts():
    """Written down a second time, from the sources that labelled.py names."""
    assert {name: known.counts for name, known in KNOWN.items()} == {
        "inat2017": (5089, 579184, 95986),
        "inat2018": (8142, 437513, 24426),
        "inat2019": (1010, 265213, 3030),
        "inat2021": (10000, 2686843, 100000),
        "places205": (205, 2448873, 20500),
        "places365": (365, 1803460, 36500),
    }


def labels_of(split: Split) -> dict[str, int]:
    return {file.name: label for file, label in zip(split.files, split.labels)}


def test_inaturalist_takes_the_split_and_the_label_from_the_json(tmp_path):
    """Train and val lie in one folder of one class; the folder's number is not padded and not the label's rank; an
    image that no json lists plays no part."""
    train = {"Plantae/7477/a.jpg": 7477, "Aves/12/b.jpg": 12, "Aves/9/c.jpg": 9}
    folder = write_inat(tmp_path, 2018, train, {"Plantae/7477/d.jpg": 7477, "Aves/9/e.jpg": 9})
    touch(folder / "train_val2018/Aves/12/unlisted.jpg")
    reading = KNOWN["inat2018"].read(folder)
    assert not reading.problems
    assert reading.classes == 8142
    assert labels_of(reading.train) == {"a.jpg": 7477, "b.jpg": 12, "c.jpg": 9}
    assert labels_of(reading.val) == {"d.jpg": 7477, "e.jpg": 9}
    data = inspect_set(KNOWN["inat2018"], tmp_path)
    assert (data.status, data.label, data.chance) == ("found", "subset", 50.0)


def test_inaturalist_2021_has_a_folder_for_each_split(tmp_path):
    """Its archives unpack to train.json, val.json, train/ and val/; train_mini.json beside them plays no part."""
    species = "02912_Animalia_Chordata_Aves_Accipitriformes_Accipitridae_Circus_cyaneus"
    names = {f"{split}/{species}/{split}.jpg": 2912 for split in ("train", "val")}
    train, val = ({name: label} for name, label in names.items())
    folder = write_inat(tmp_path, 2021, train, val)
    (folder / "train_mini.json").write_text("{}")
    reading = KNOWN["inat2021"].read(folder)
    assert not reading.problems
    assert (reading.classes, labels_of(reading.train), labels_of(reading.val)) == (
        10000,
        {"train.jpg": 2912},
        {"val.jpg": 2912},
    )
    (folder / "val.json").unlink()
    assert f"{folder}/val.json is missing" in inspect_set(KNOWN["inat2021"], tmp_path).detail


def test_inaturalist_2017_has_names_for_folders(tmp_path):
    folder = write_inat(tmp_path, 2017, {"Aves/Turdus merula/a.jpg": 5088}, {"Aves/Turdus merula/b.jpg": 5088})
    reading = KNOWN["inat2017"].read(folder)
    assert not reading.problems
    assert labels_of(reading.train) == {"a.jpg": 5088}
    assert reading.train.files[0].parent.name == "Turdus merula"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=1010), "training labels outside 0..1009: 1010"),
        (lambda c: c["annotations"].append({"id": 5, "image_id": 1, "category_id": 3}), "labels 1 images twice"),
        (lambda c: c["annotations"].append({"id": 5, "image_id": 77, "category_id": 3}), "does not list: 77"),
        (lambda c: c["annotations"].pop(), "1 images without a label"),
        (lambda c: c.pop("images"), "is no annotation file of iNaturalist (KeyError: 'images')"),
        (lambda c: c["images"][0].update(file_name="train_val2019/x/9/v.jpg"), "1 images are in both splits"),
        (lambda c: c["images"][0].update(file_name="train_val2019/x/9/b.jpg"), "1 training images are listed twice"),
        (lambda c: c["annotations"][0].update(category_id=2.7), "category_id is '2.7', not a whole number"),
        (lambda c: c["annotations"][0].update(category_id="3"), "category_id is '3', not a whole number"),
        (lambda c: c["images"][0].update(file_name="../x.jpg"), "'../x.jpg' leaves its folder"),
        (lambda c: c["images"][0].update(file_name="/etc/x.jpg"), "'/etc/x.jpg' leaves its folder"),
        (lambda c: c["images"][0].update(file_name=7), "is no annotation file of iNaturalist"),
    ],
)
def test_inaturalist_with_a_wrong_json(tmp_path, change, message):
    folder = write_inat(tmp_path, 2019, {"x/3/a.jpg": 3, "x/9/b.jpg": 9}, {"x/9/v.jpg": 9})
    edit(folder / "train2019.json", change)
    data = inspect_set(KNOWN["inat2019"], tmp_path)
    assert data.status == "incomplete"
    assert message in data.detail


def test_inaturalist_with_files_that_are_not_there(tmp_path):
    train = {f"x/3/{i}.jpg": 3 for i in range(6)}
    write_inat(tmp_path, 2019, train, {"x/3/v.jpg": 3}, skip=("x/3/1.jpg", "x/3/4.jpg"))

    def detail() -> str:
        return inspect_set(KNOWN["inat2019"], tmp_path).detail

    assert "2 of the 6 training images are not there" in detail()
    assert "x/3/1.jpg" in detail()
    (tmp_path / "inat2019" / "val2019.json").unlink()
    assert "val2019.json is missing" in detail()
    (tmp_path / "inat2019" / "val2019.json").write_text("{not json")
    assert "is no annotation file of iNaturalist (JSONDecodeError" in detail()


def write_places365(root: Path, images: str = "data_256_standard", val: str = "val_256", lists: str = "") -> Path:
    folder = root / "places365"
    (folder / lists).mkdir(parents=True, exist_ok=True)
    train = {"/f/field/wild/00000001.jpg": 141, "/a/airfield/00000001.jpg": 0}
    for name in train:
        touch(folder / images / name[1:])
    names = {"Places365_val_00000001.jpg": 0, "Places365_val_00000002.jpg": 141}
    for name in names:
        touch(folder / val / name)
    for file, labels in (("places365_train_standard.txt", train), ("places365_val.txt", names)):
        (folder / lists / file).write_text("".join(f"{name} {label}\n" for name, label in labels.items()))
    return folder


@pytest.mark.parametrize("sizes", [("data_256_standard", "val_256"), ("data_large_standard", "val_large")])
@pytest.mark.parametrize("lists", ["", "filelist_places365-standard"])
def test_places365_nested_classes_flat_validation_leading_slash(tmp_path, sizes, lists):
    folder = write_places365(tmp_path, *sizes, lists)
    reading = KNOWN["places365"].read(folder)
    assert not reading.problems
    assert reading.classes == 365
    found = {str(f.relative_to(folder)): c for s in (reading.train, reading.val) for f, c in zip(s.files, s.labels)}
    assert found == {
        f"{sizes[0]}/f/field/wild/00000001.jpg": 141,
        f"{sizes[0]}/a/airfield/00000001.jpg": 0,
        f"{sizes[1]}/Places365_val_00000001.jpg": 0,
        f"{sizes[1]}/Places365_val_00000002.jpg": 141,
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"Places365_val_00000001.jpg 0\nPlaces365_val_00000002.jpg\n", "line 2, is not `path label`"),
        (b"Places365_val_00000001.jpg,0\n", "line 1, is not `path label`"),  # commas, as the name .csv suggests
        (b"\x1f\x8b\x08\xff", "places365_val.txt is no text: unpack the list"),  # gzip
        (b"Places365_val_00000001.jpg 365\n", "validation labels outside 0..364: 365"),
        (b"Places365_val_00000001.jpg 7\n", "classes that training lacks: 7"),
        (b"Places365_val_00000001.jpg " + b"1" * 5000 + b"\n", "line 1, is not `path label`"),
        (b"../val_256/Places365_val_00000001.jpg 0\n", "line 1, leaves the folder of the images"),
        (2 * b"Places365_val_00000001.jpg 0\n", "1 validation images are listed twice"),
        (None, "places365_val.txt is missing"),
    ],
)
def test_places365_with_a_wrong_list(tmp_path, content, said):
    file = write_places365(tmp_path) / "places365_val.txt"
    file.write_bytes(content) if content else file.unlink()
    assert said in inspect_set(KNOWN["places365"], tmp_path).detail


WORDS = st.text(st.sampled_from("a./1 \t\r\n\v\f\x1c\x85\u00a0\u2028\u0663"), max_size=3)


@given(
    st.lists(st.tuples(WORDS, st.sampled_from([" ", "  ", "\t", "", "\u00a0"]), WORDS | st.just("7"))), st.booleans()
)
@example([("a", " ", "1"), ("b", " ", "2")], True)
@example([("1", " ", "2 3"), ("", "", "4")], True)  # four words in two lines, not two in each
@example([("a\u00a05", " ", "1"), ("\u00a0", " ", "2")], False)
@example([("a\x1c5", " ", "1"), ("\x1c", " ", "2")], False)
def test_a_list_is_read_as_line_by_line(tmp_path_factory, lines, ends):
    """By the rule of its docstring: the label behind the last space, the path before it."""
    path = tmp_path_factory.getbasetemp() / "list.txt"
    text = "\n".join("".join(line) for line in lines) + "\n" * ends
    path.write_bytes(text.encode())
    expected: list[tuple[str, int]] | None = []
    for line in text.splitlines():
        name, _, label = line.rpartition(" ")
        name = name.strip().lstrip("/")
        if not name or not label.isdecimal() or ".." in name.split("/"):
            expected = None
            break
        expected.append((str(Path("/images", name)), int(label)))
    problems: list[str] = []
    split = read_list(path, Path("/images"), problems)
    assert bool(problems) == (expected is None)
    assert list(zip(map(str, split.files), split.labels)) == (expected or [])


def test_places365_with_a_byte_order_mark(tmp_path):
    """As Windows' editors save a list."""
    file = write_places365(tmp_path) / "places365_val.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert inspect_set(KNOWN["places365"], tmp_path).status == "found"


def test_places205_lists_are_separated_by_spaces(tmp_path):
    folder = tmp_path / "places205"
    images = folder / "data/vision/torralba/deeplearning/images256"
    (folder / "trainvalsplit_places205").mkdir(parents=True)
    for split, name in (("train", "a/abbey/gsun_1.jpg"), ("val", "a/abbey/gsun_2.jpg")):
        touch(images / name)
        (folder / f"trainvalsplit_places205/{split}_places205.csv").write_text(f"{name} 0\n")
    reading = KNOWN["places205"].read(folder)
    assert not reading.problems
    assert reading.classes == 205
    assert reading.train.files == (images / "a/abbey/gsun_1.jpg",)


@pytest.mark.skipif(not (SHARED / "places365").is_dir(), reason="no real images here")
def test_the_real_part_of_places365():
    data = inspect_set(KNOWN["places365"], SHARED)
    assert data.counts == {"classes": 10, "train": 300, "val": 100}
    assert (data.status, data.label) == ("found", "subset")
    reading = KNOWN["places365"].read(SHARED / "places365")
    names = dict(line.split() for line in (SHARED / "places365/categories_places365.txt").read_text().splitlines())
    for file, label in zip(reading.train.files, reading.train.labels):
        assert names["/" + str(file.parent.relative_to(SHARED / "places365/data_256_standard"))] == str(label)


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "places365").is_dir(), reason="no real images here")
def test_the_real_part_is_learnt_under_a_head_of_365(tmp_path):
    """Ten classes whose ids have gaps: the head keeps all 365, and chance counts the ten."""
    (task,) = find_tasks(["places365"], TASKS)
    record = run_job(make_job(task, SHARED, tmp_path / "work", batch=50, epochs=1, warmup_epochs=0))
    assert record.status == "ok", record.reason
    assert (record.n_eval, record.chance) == (100, 10.0)
    head = read_checkpoint(tmp_path / "work" / "classifier.safetensors").classifier["head.weight"]
    assert head.shape[0] == 365
    assert any("355 of the 365 classes are missing (0, 1, 3 and 352 more)" in f for f in record.data["findings"])


def test_a_part_of_a_set_has_findings_and_the_whole_has_none(tmp_path):
    """With counts of its own a tiny set is the official one."""
    write_places365(tmp_path)
    classes, counts = inspect_set(KNOWN["places365"], tmp_path).findings
    assert classes.startswith("places365: 363 of the 365 classes are missing (1, 2, 3 and 360 more)")
    assert counts.startswith("places365: 2 train images, 1803458 fewer than the official 1803460; 2 val images, 36498")
    train = {f"x/{c}/t.jpg": c for c in range(1010)}
    write_inat(tmp_path, 2019, train, {f"x/{c}/v.jpg": c for c in range(1009)})
    data = inspect_set(replace(KNOWN["inat2019"], counts=(1010, 1010, 1009)), tmp_path)
    assert (data.label, data.findings) == ("official", ("inat2019: validation lacks 1 classes of training: 1009",))
    data = inspect_set(replace(KNOWN["inat2019"], counts=(1010, 1010, 1010)), tmp_path)
    assert data.findings[0].startswith("inat2019: 1009 val images, 1 fewer than the official 1010: files were lost")


def test_the_256_px_images_are_taken_where_both_sizes_are_there(tmp_path):
    write_places365(tmp_path, "data_large_standard", "val_large")
    folder = write_places365(tmp_path)
    reading = KNOWN["places365"].read(folder)
    assert {f.relative_to(folder).parts[0] for f in reading.train.files} == {"data_256_standard"}
    assert {f.relative_to(folder).parts[0] for f in reading.val.files} == {"val_256"}


def test_images_that_are_empty_broken_links_or_pipes_are_reported(tmp_path):
    train = {f"x/3/{i}.jpg": 3 for i in range(4)}
    folder = write_inat(tmp_path, 2018, train, {"x/3/v.jpg": 3})
    (folder / "train_val2018/x/3/2.jpg").write_bytes(b"")
    (folder / "train_val2018/x/3/v.jpg").unlink()
    (folder / "train_val2018/x/3/v.jpg").symlink_to("gone.jpg")
    (folder / "train_val2018/x/3/1.jpg").unlink()
    os.mkfifo(folder / "train_val2018/x/3/1.jpg")
    detail = inspect_set(KNOWN["inat2018"], tmp_path).detail
    assert "2 of 4 training images looked at (of 4) cannot be used" in detail
    assert "1.jpg is no regular file" in detail
    assert "2.jpg is empty" in detail
    assert "v.jpg is a broken link" in detail


def test_inaturalist_without_the_super_category_in_its_paths(tmp_path):
    """As some loaders want it unpacked: the json's names have it, so the images are not there."""
    folder = write_inat(tmp_path, 2018, {"Aves/12/a.jpg": 12}, {"Aves/12/b.jpg": 12})
    (folder / "train_val2018/Aves/12").rename(folder / "train_val2018/12")
    assert "1 of the 1 training images are not there" in inspect_set(KNOWN["inat2018"], tmp_path).detail


def test_a_missing_set_says_where_it_must_lie(tmp_path):
    for known in SETS:
        data = inspect_set(known, tmp_path)
        assert data.status == "missing"
        assert f"{tmp_path}/{known.name}/" in data.detail


@pytest.mark.parametrize("task", [t for t in TASKS if t.name in KNOWN], ids=lambda task: task.name)
def test_miniatures_are_read_by_the_official_readers(task, tmp_path, monkeypatch):
    for name, count in {"MOST": 8, "LEAST": 2, "VAL": 1, "PLACES_TRAIN": 2, "PLACES_VAL": 1}.items():
        monkeypatch.setattr(miniature_sets, name, count)
    task.miniature(tmp_path)
    data = task.inspect(tmp_path)
    assert (data.status, data.label) == ("found", "miniature"), data.detail
    reading = KNOWN[task.name].read(tmp_path / task.name)
    counts = Counter(reading.train.labels)
    if task.name.startswith("inat"):
        assert (max(counts.values()), min(counts.values()), len(counts)) == (8, 2, 16)
    else:
        assert set(counts.values()) == {2}
    assert reading.train.files[0].read_bytes()[:2] == b"\xff\xd8"  # JPEG


def write_listed(folder: Path, train: str, val: str) -> Path:
    """A set as it is published: images in one folder, lists of them."""
    for line in {*train.splitlines(), *val.splitlines()}:
        touch(folder / line.split(" ")[0])
    (folder / "train.txt").write_text(train)
    (folder / "val.txt").write_text(val)
    return folder


def test_a_folder_may_have_lists_instead(tmp_path):
    folder = write_listed(tmp_path / "pets", "images/b_1.jpg 1\nimages/a_1.jpg 0\n", "images/a_2.jpg 0\n")
    reading = read_folder(folder)
    assert not reading.problems
    assert reading.classes == 2
    assert labels_of(reading.train) == {"b_1.jpg": 1, "a_1.jpg": 0}
    assert labels_of(reading.val) == {"a_2.jpg": 0}
    data = folder_task(str(folder)).inspect(tmp_path)
    assert (data.status, data.label, data.counts) == ("found", "own", {"classes": 2, "train": 2, "val": 1})


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        ("a.jpg 0\nb.jpg 3\n", "c.jpg 0\n", "no image of the labels 1, 2: number the classes from 0 on"),
        ("a.jpg 1\nb.jpg 2\n", "c.jpg 1\n", "no image of the labels 0"),
        ("a.jpg 0\nb.jpg 1\n", "c.jpg 2\n", "validation labels outside 0..1: 2"),
        ("a.jpg 0\nb.jpg 0\n", "c.jpg 0\n", "one label only"),
        ("a.jpg 0\nb.jpg 1\n", "a.jpg 0\n", "1 images are in both splits"),
        ("a.jpg 0\nb.jpg x\n", "c.jpg 0\n", "train.txt, line 2, is not `path label`"),
    ],
)
def test_lists_of_a_folder_that_cannot_be_used_are_refused(tmp_path, train, val, said):
    data = folder_task(str(write_listed(tmp_path / "pets", train, val))).inspect(tmp_path)
    assert data.status == "incomplete"
    assert said in data.detail


def test_a_list_that_names_a_missing_file_is_refused(tmp_path):
    folder = write_listed(tmp_path / "pets", "a.jpg 0\nb.jpg 1\n", "c.jpg 0\n")
    (folder / "b.jpg").unlink()
    assert "1 of the 2 training images are not there: " in folder_task(str(folder)).inspect(tmp_path).detail


def write_flowers(root: Path) -> Path:
    for split, count in (("train", 8), ("val", 2)):
        for kind, colour in (("daisy", (220, 220, 220)), ("rose", (220, 40, 40)), ("tulip", (40, 200, 60))):
            for i in range(count):
                write_noise_image(root / "flowers" / split / kind / f"{i}.jpg", colour, seed=i)
    return root / "flowers"


def test_a_folder_of_ones_own(tmp_path):
    (task,) = find_tasks([f"folder:{write_flowers(tmp_path)}"], TASKS)
    assert task.name == "folder:flowers"
    assert find_tasks([task_argument(task)], TASKS)[0].path == task.path
    data = task.inspect(Path("anywhere"))
    assert data.counts == {"classes": 3, "train": 24, "val": 6}
    assert (data.label, data.root) == ("own", task.path)
    record = run_job(make_job(task, Path("anywhere"), tmp_path / "work", epochs=4, base_lr=1e-2))
    assert record.status == "ok", record.reason
    assert record.n_eval == 6
    assert record.metrics["top1"] > 50  # chance is 33
    names = ["daisy", "rose", "tulip"]
    assert record.resolved["classes"] == names
    with safe_open(tmp_path / "work" / "classifier.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == names


def test_images_at_any_depth_are_taken_and_what_browsers_of_files_leave_behind_is_not(tmp_path):
    flowers = write_flowers(tmp_path)
    task = folder_task(str(flowers))
    for name in (".DS_Store", "@eaDir/1.jpg", ".ipynb_checkpoints/1.jpg", "rose/._0.jpg", "rose/.x/0.jpg", "Thumbs.db"):
        (flowers / "train" / name).parent.mkdir(exist_ok=True)
        (flowers / "train" / name).write_bytes(b"x")
    write_noise_image(flowers / "train" / "rose" / "more" / "red" / "9.jpg", (200, 9, 9), seed=9)
    (flowers / "train" / "rose" / "again").symlink_to(flowers / "train" / "rose")  # visited once
    data = task.inspect(tmp_path)
    assert (data.status, data.counts) == ("found", {"classes": 3, "train": 25, "val": 6}), data.detail


def test_folders_that_cannot_be_used(tmp_path):
    flowers = write_flowers(tmp_path)

    def detail(path: Path) -> str:
        return folder_task(str(path)).inspect(tmp_path).detail

    shutil.copy(flowers / "val" / "rose" / "0.jpg", flowers / "train" / "loose.jpg")
    assert f"1 images lie in {flowers}/train itself, not in folders of classes: loose.jpg" in detail(flowers)
    (flowers / "train" / "loose.jpg").unlink()
    (flowers / "train" / "lily").mkdir()
    assert f"{flowers}/train has folders without an image: lily; fill or remove them" in detail(flowers)
    (flowers / "train" / "lily").rmdir()
    (flowers / "train" / "lily").symlink_to("gone")
    assert f"{flowers}/train has broken links: lily" in detail(flowers)
    (flowers / "train" / "lily").unlink()
    (flowers / "val" / "tulip").rename(flowers / "val" / "kept")
    (flowers / "val" / "tulip").symlink_to(flowers / "train" / "tulip")
    assert f"{flowers}/val/tulip is the same folder as {flowers}/train/tulip" in detail(flowers)
    (flowers / "val" / "tulip").unlink()
    (flowers / "val" / "kept").rename(flowers / "val" / "tulip")
    (flowers / "val").rename(flowers / "test")
    (flowers / "val").symlink_to("train")
    assert f"{flowers}/val/daisy is the same folder as {flowers}/train/daisy" in detail(flowers)
    (flowers / "val").unlink()
    (flowers / "test").rename(flowers / "val")
    assert not detail(flowers).startswith("no data")
    (flowers / "val" / "daisy").rename(flowers / "val" / "dandelion")
    assert "has classes that train lacks: dandelion" in detail(flowers)
    (flowers / "val").rename(flowers / "test")
    assert f"{flowers}/val is missing" in detail(flowers)
    one = tmp_path / "one"
    write_noise_image(one / "train" / "a" / "0.jpg", (0, 0, 0), 0)
    write_noise_image(one / "val" / "a" / "0.jpg", (0, 0, 0), 1)
    assert "has the one class a" in detail(one)
    assert "no data" in detail(tmp_path / "nowhere")


def test_the_head_has_the_official_classes(tmp_path):
    """365 logits for a set of two classes; the record says which standard errors and how many images."""
    write_places365(tmp_path)
    (task,) = find_tasks(["places365"], TASKS)
    record = run_job(make_job(task, tmp_path, tmp_path / "work", batch=2))
    assert record.status == "ok", record.reason
    head = read_checkpoint(tmp_path / "work" / "classifier.safetensors").classifier["head.weight"]
    assert (len(head), record.n_eval) == (365, 2)
