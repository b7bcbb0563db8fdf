"""Numbers computed again from what was stored, and every kind of change that has to be noticed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compare import main as compare_main
from benchmarks.compare import rows_of, runs_of
from benchmarks.report import UnreadableRecords, report
from benchmarks.verify import main, verify
from mae_core.checkpoint import read_checkpoint
from mae_core.errors import UserError
from tests.fixtures import ROOT
from tests.fixtures.suite import run_suite, write_data
from transfer.data.predictions import MAIN, PREDICTIONS_FILE, read_predictions, write_predictions
from transfer.run import read_record, write_record
from transfer.task import RECORD_FILE

pytestmark = pytest.mark.slow
MINI = ROOT / "results" / "miniature" / "mae_mini.safetensors"
WITH_IMAGES = {"imagenet_knn", "imagenet_linprobe", "imagenet_finetune", "imagenet_a", "imagenet_c", "ade20k"}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    root = write_data(tmp_path_factory.mktemp("data"))
    return run_suite(read_checkpoint(str(MINI)), root, tmp_path_factory.mktemp("suite"))


@pytest.fixture
def copied(out, tmp_path):
    """A task -> its record's file in a copy of the suite."""
    shutil.copytree(out, tmp_path / "out")
    found = {read_record(path).task: path for path in (tmp_path / "out").rglob(RECORD_FILE)}
    return lambda task: found[task]


def test_every_number_of_every_task_is_computed_again(out, capsys):
    paths = sorted(out.rglob(RECORD_FILE))
    assert {read_record(path).task for path in paths} == WITH_IMAGES | {"coco"}
    for path in paths:
        record = read_record(path)
        assert verify(path) == pytest.approx(record.metrics, rel=1e-6)
        assert record.metrics
    assert main([str(out)]) == 0
    assert capsys.readouterr().out.count("\n") == len(paths)


def test_predictions_are_of_each_image_once_with_its_own_name(out):
    for path in out.rglob(RECORD_FILE):
        record = read_record(path)
        if record.task in WITH_IMAGES:
            sets = read_predictions(path.parent / PREDICTIONS_FILE)
            images = [len(set(rows["image"])) for rows in sets.values()]
            main_set = sets.get(MAIN)
            if main_set is not None:
                assert len(set(main_set["image"])) == record.n_eval
            if record.task == "imagenet_c":
                assert sum(images) == record.n_eval
                assert len(sets) == 75


@pytest.mark.parametrize("task", sorted(WITH_IMAGES | {"coco"}))
def test_an_altered_number_is_refused_by_the_records_name(copied, task):
    path = copied(task)
    values = json.loads(path.read_text())
    values["metrics"][values["metric"]] += 0.01
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"{RECORD_FILE} was altered"):
        verify(path)
    with pytest.raises(UnreadableRecords, match=f"{RECORD_FILE} was altered"):
        report(path.parents[4])


@pytest.mark.parametrize("task", sorted(WITH_IMAGES | {"coco"}))
def test_a_number_altered_together_with_its_digest_is_refused_by_what_it_is_made_of(copied, task):
    path = copied(task)
    record = read_record(path)
    record.metrics[record.metric] += 0.01
    write_record(record, path.parent)
    with pytest.raises(UserError, match=rf"{record.metric} is [\d.]+, but [\d.]+ by "):
        verify(path)


@pytest.mark.parametrize("task", sorted(WITH_IMAGES | {"coco"}))
def test_an_altered_file_is_refused_by_its_name(copied, task):
    path = copied(task)
    name = read_record(path).predictions["file"]
    content = bytearray((path.parent / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path.parent / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} was altered"):
        verify(path)


def test_an_altered_classifier_is_refused_by_its_name(copied):
    path = copied("imagenet_finetune")
    with open(path.parent / "classifier.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"classifier\.safetensors was altered"):
        verify(path)


def all_right(rows):
    return {"top1": rows["label"]}


def all_wrong(rows):
    return {"top1": rows["label"] + 1}


def worse_loss(rows):
    return {"loss": rows["loss"] + np.float32(1)}


@pytest.mark.parametrize(
    ("task", "change", "said"),
    [
        ("imagenet_linprobe", all_right, "losses are not those of the log-probabilities"),
        ("imagenet_linprobe", worse_loss, "losses are not those of the log-probabilities|loss is"),
        ("imagenet_knn", all_wrong, "winners are not those of their neighbours"),
    ],
)
def test_predictions_that_contradict_themselves_are_refused(copied, task, change, said):
    """Even where the record was made to fit."""
    path = copied(task)
    sets, record = read_predictions(path.parent / PREDICTIONS_FILE), read_record(path)
    kept = write_predictions(path.parent, {name: rows | change(rows) for name, rows in sets.items()})
    write_record(replace(record, predictions=kept), path.parent)
    with pytest.raises(UserError, match=said):
        verify(path)


def test_what_is_missing_is_named(copied, capsys):
    path = copied("imagenet_linprobe")
    (path.parent / PREDICTIONS_FILE).unlink()
    assert main([str(path)]) == 1
    said = capsys.readouterr().err
    assert PREDICTIONS_FILE in said
    assert "Traceback" not in said
    for wrong in (path.parent / "nowhere", path.parent / "record.txt", path.parent / "x" / RECORD_FILE):
        assert main([str(wrong)]) == 2
    (path.parent / "empty").mkdir()
    assert main([str(path.parent / "empty")]) == 2


def test_coco_without_its_annotations_asks_for_them(copied, tmp_path):
    path = copied("coco")
    with pytest.raises(UserError, match="give --data"):
        verify(path, tmp_path)


def test_a_against_a_is_nothing_in_every_task(out, capsys):
    rows = rows_of(runs_of("mae_mini", out), runs_of(str(out), out), None)
    assert {row.task for row in rows} == WITH_IMAGES | {"coco"}
    for row in rows:
        record = read_record(next(p for p in out.rglob(RECORD_FILE) if read_record(p).task == row.task))
        assert row.difference.a == pytest.approx(record.metrics[record.metric], rel=1e-6)
        assert (row.difference.value, row.difference.p) == (0, 1)
    assert compare_main(["mae_mini", "ffe8a8b5", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count(" tied ") == len(rows)
    assert "better |" not in said


def test_a_record_of_an_earlier_version_says_so(copied):
    path = copied("imagenet_finetune")
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "digest"}))
    with pytest.raises(UserError, match="an earlier version made it"):
        verify(path)
