"""VTAB-1k's lists: which images are trained and scored on, what is refused, and the mean over its sets."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from benchmarks.render import section_grid
from benchmarks.rows import Section, fill
from benchmarks.tables import TABLES
from mae_core.errors import UserError
from tests.fixtures.records import ok
from tests.fixtures.transfer import make_job, write_noise_image
from transfer.classification import job as training
from transfer.classification.tasks import TASKS
from transfer.data.labelled import inspect_set
from transfer.data.transforms import eval_transform, whole_transform
from transfer.data.vtab import VTAB, read_vtab
from transfer.miniature import vtab as miniature
from transfer.run import run_job

TASK = next(task for task in TASKS if task.name == "vtab_eurosat")
KNOWN = next(known for known in VTAB if known.name == TASK.name)
TABLE = next(table for table in TABLES if table.name == "vtab")


def write_eurosat(root: Path, **changed: str) -> Path:
    """Six images to train on, of which two are val200's, and three of the test; of two classes."""
    folder = root / "vtab-1k" / "eurosat"
    lines = [f"images/train800val200/{i}.jpg {i % 2}" for i in range(6)]
    test = [f"images/test/{i}.jpg {i % 2}" for i in range(3)]
    for i, line in enumerate(lines + test):
        write_noise_image(folder / line.split(" ")[0], (40 + 170 * (i % 2), 60, 80), i, (16, 8))
    lists = {"train800": lines[:4], "val200": lines[4:], "train800val200": lines, "test": test}
    for name, text in ({key: "\n".join(value) + "\n" for key, value in lists.items()} | changed).items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_the_lists_say_what_is_trained_and_scored_on(tmp_path):
    folder = write_eurosat(tmp_path)
    for scored_on, train, val in (("test", "012345", "012"), ("val200", "0123", "45")):
        reading = read_vtab(folder, 10, scored_on)
        assert not reading.problems
        assert ["".join(f.stem for f in split.files) for split in (reading.train, reading.val)] == [train, val]
        assert reading.val.labels == ((0, 1, 0) if scored_on == "test" else (0, 1))
        assert reading.val.files[0].parent.name == ("test" if scored_on == "test" else "train800val200")
    data = inspect_set(KNOWN, tmp_path)
    assert (data.status, data.label, data.counts) == ("found", "subset", {"classes": 2, "train": 6, "val": 3})
    assert "8 of the 10 classes are missing" in data.findings[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"val200": "images/train800val200/4.jpg 1\nimages/train800val200/5.jpg 1\n"},
            "is not train800.txt and val200",
        ),
        ({"test": "images/test/9.jpg 0\n"}, "1 of the 1 validation images are not there"),
        ({"test": "images/test/0.jpg 10\n"}, "validation labels outside 0..9: 10"),
        ({"test": "images/test/0.jpg\n"}, "line 1, is not `path label`"),
        ({"test": "../../x.jpg 0\n"}, "leaves the folder of the images"),
        ({"test": "images/train800val200/1.jpg 1\n"}, "1 images are in both splits"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(tmp_path, changed, said):
    write_eurosat(tmp_path, **changed)
    data = inspect_set(KNOWN, tmp_path)
    assert data.status == "incomplete"
    assert said in data.detail


@pytest.mark.parametrize("name", ["train800", "val200", "train800val200", "test"])
def test_a_list_that_is_not_there_is_named(tmp_path, name):
    assert f"must lie at {tmp_path}/vtab-1k/eurosat/" in inspect_set(KNOWN, tmp_path).detail
    (write_eurosat(tmp_path) / f"{name}.txt").unlink()
    assert f"{name}.txt is missing: unpack the archive that holds it" in inspect_set(KNOWN, tmp_path).detail


def test_every_set_has_its_official_counts():
    """The benchmark's 19 sets in groups of 7, 4 and 8."""
    assert [len(column.mean_of) for column in TABLE.columns[:4]] == [7, 4, 8, 19]
    assert {known.counts[1] for known in VTAB} == {1000}
    assert {known.name for known in VTAB} == set(TABLE.columns[3].mean_of) == {c.task for c in TABLE.columns[4:]}


def test_images_are_shown_whole(tmp_path):
    """A mark in a corner is there in training and in the test, on the same side."""
    image = Image.new("RGB", (64, 32), (0, 0, 0))
    image.paste((255, 255, 255), (56, 0, 64, 8))
    for shown in (whole_transform(16)(pil_to_tensor(image)), eval_transform(16, "stretch")(image)):
        assert shown.shape == (3, 16, 16)
        assert shown[0, :3, 14:].float().mean() > 200
        assert shown[0, 5:].float().max() < 20
        assert shown[0, :, :10].float().max() < 20
    assert eval_transform(16)(image)[0].float().max() < 20  # the crop would lose it


@pytest.mark.parametrize(("knob", "value"), [("min_scale", 0.5), ("rand_augment", "rand-m9-mstd0.5-inc1")])
def test_a_knob_that_does_nothing_is_refused(knob, value):
    with pytest.raises(UserError, match=f"{knob} does nothing"):
        replace(TASK.recipe("vit_mini_patch8", "paper"), **{knob: value})
    with pytest.raises(UserError, match="did you mean val200"):
        replace(TASK.recipe("vit_mini_patch8", "paper"), scored_on="val20")


def test_a_training_takes_its_lists_and_its_transform(tmp_path, monkeypatch):
    root = tmp_path / "data"
    write_eurosat(root)
    seen = []

    def no_training(job, model, split, transform):
        seen.append((len(split.files), transform(torch.zeros(3, 8, 16, dtype=torch.uint8)).shape))
        return training.State(), model

    monkeypatch.setattr(training, "train_classifier", no_training)
    for scored_on, images in (("test", 3), ("val200", 2)):
        job = make_job(TASK, root, tmp_path / scored_on, batch=2, scored_on=scored_on)
        record = run_job(job)
        assert record.status == "ok", record.reason
        assert (record.n_eval, record.resolved["train_images"]) == (images, seen[-1][0])
        assert TASK.detail(job).startswith("val200" if scored_on == "val200" else "2 of 10 classes")
    assert [number for number, _ in seen] == [6, 4]


def test_the_mean_is_over_all_sets_or_a_hole():
    records = [ok(known.name, top1=float(10 + i)) for i, known in enumerate(VTAB)]
    section = Section("paper", "miniature")
    (line,) = fill(TABLE, section, records)
    means = {key: line.cells[f"vtab.{key}"] for key in ("natural", "specialized", "structured", "all")}
    assert {key: cell.value for key, cell in means.items()} == {
        "natural": pytest.approx(13.0),  # 10 to 16
        "specialized": pytest.approx(18.5),  # 17 to 20
        "structured": pytest.approx(24.5),  # 21 to 28
        "all": pytest.approx(19.0),
    }
    seeds = [replace(r, seed=seed) for r in records for seed in (0, 1, 2)]
    (row,) = section_grid(TABLE, section, seeds).rows
    assert "19.00 (3 seeds)" in row[1]  # of the sets' means; how it varies with the seed is not known from them
    (line,) = fill(TABLE, section, records[:-1])
    assert [line.cells[f"vtab.{key}"].status for key in means] == ["ok", "ok", "", ""]
    assert "natural ↑" in section_grid(TABLE, section, records[:-1]).header


def test_the_miniature_is_read(tmp_path, monkeypatch):
    for name, count in (("TRAIN", 2), ("VAL", 1), ("TEST", 1)):
        monkeypatch.setattr(miniature, name, count)
    for name, classes in (("eurosat", 4), ("patch_camelyon", 2)):
        miniature.vtab(tmp_path, name=name)
        data = inspect_set(next(known for known in VTAB if known.name == f"vtab_{name}"), tmp_path)
        assert (data.status, data.label) == ("found", "miniature"), data.detail
        assert data.counts == {"classes": classes, "train": 3 * classes, "val": classes}
