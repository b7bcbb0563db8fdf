"""Running a job: the record it leaves whatever happens, and which record is that of which experiment."""

import json
import multiprocessing
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from mae_core import machine
from mae_core.claim import claimed
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.training import CHECKPOINT_FILE
from mae_core.writing import write_json
from tests.fixtures.transfer import ARCH, make_job, raising
from transfer.classification.tasks import FINETUNE
from transfer.jobs import cached_or_skipped
from transfer.run import (
    describe,
    finished,
    mark,
    read_record,
    run_job,
    sealed,
    shortened,
    slug,
    with_work_folder,
    write_record,
)
from transfer.task import RECORD_FILE, Data, Job, Record, Result

DATA = Data("root", "found", "4 classes", "subset", "f" * 64, {"classes": 4}, 25.0)


def job_that(run, work: Path, **changes) -> Job:
    """A job whose task is to call `run`."""
    task = replace(FINETUNE, run=run, inspect=lambda root: DATA)
    return replace(make_job(task, Path("root"), work), **changes)


def succeed(job: Job) -> Result:
    return Result({"top1": 71.25}, {"top1": 1.5}, n_eval=50, images_seen=200, seconds=4.0, notes=("odd",))


@pytest.fixture
def job(tmp_path) -> Job:
    """A job that succeeds."""
    return job_that(succeed, tmp_path)


def test_a_job_that_succeeds_leaves_a_record_with_its_biography(job):
    record = run_job(job)
    assert read_record(job.work / RECORD_FILE) == record
    assert (record.status, record.reason, record.metrics) == ("ok", "", {"top1": 71.25})
    assert (record.n_eval, record.chance, record.notes) == (50, 25.0, ("odd",))
    assert record.images_per_second == 50.0  # 200 images in 4 seconds
    assert (record.wall_seconds, record.estimated_seconds) == (4.0, None)
    assert record.checkpoint["sha256"] == job.checkpoint.sha256
    assert record.recipe["epochs"] == 2
    assert torch.__version__.startswith(record.versions["torch"])
    assert record.peak_memory_gib > 0


def test_the_commit_is_that_of_the_code_that_ran(tmp_path, monkeypatch):
    """Not that of a checkout which was updated meanwhile."""
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "mae_core" / "machine.py"))
    file = tmp_path / machine.COMMIT_FILE
    file.write_text("monday")

    def run(job: Job) -> Result:
        file.write_text("tuesday")
        return succeed(job)

    machine.commit.cache_clear()
    try:
        assert run_job(job_that(run, tmp_path / "work")).commit == "monday"
    finally:
        machine.commit.cache_clear()


def test_names_that_no_file_may_have_are_shortened_and_stay_apart(job):
    folders = set()
    for name in ("a" * 235, "a" * 234 + "b", "ü" * 150, "a" * 201):
        task = replace(job.task, name=f"folder:{name}")
        work = with_work_folder(replace(job, checkpoint=replace(job.checkpoint, name=name), task=task)).work
        work.mkdir(parents=True)
        folders.add((work.parent.parent.name, work.parent.name))
    assert len({checkpoint for checkpoint, _ in folders}) == len({task for _, task in folders}) == 4
    # A name that fits stays as it is: its records are found again.
    assert slug("mae vit-l_1.5") == "mae-vit-l_1.5"
    assert shortened("a" * 200) == slug("a" * 200) == "a" * 200


def test_a_users_mistake_is_the_reason_in_one_sentence(tmp_path):
    record = run_job(job_that(raising(UserError("the batch is too large: make it smaller")), tmp_path))
    assert (record.status, record.reason) == ("failed", "the batch is too large: make it smaller")
    assert not (tmp_path / "error.txt").exists()
    assert read_record(tmp_path / RECORD_FILE) == sealed(record)


def test_an_unexpected_error_leaves_its_traceback_beside_the_record_until_the_next_attempt(job):
    record = run_job(job_that(raising(ZeroDivisionError("first line\nsecond line")), job.work))
    file = job.work / "error.txt"
    assert record.status == "failed"
    assert record.reason.startswith("ZeroDivisionError: first line (")
    assert str(file) in record.reason
    assert "second line" in file.read_text()
    assert "in run" in file.read_text()
    assert run_job(job).status == "ok"
    assert not file.exists()


def test_an_error_without_a_message_has_its_name_for_a_reason(tmp_path):
    assert run_job(job_that(raising(AssertionError()), tmp_path)).reason.startswith("AssertionError: ")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["metrics", "stderr"])
def test_a_metric_that_is_not_finite_is_a_failure(tmp_path, bad, where):
    result = {"metrics": {"top1": 1.0}, "stderr": {"top1": 1.0}} | {where: {"top1": bad}}
    record = run_job(job_that(lambda job: Result(**result), tmp_path))
    assert (record.status, record.metrics) == ("failed", {})
    assert "top1 came out infinite or NaN" in record.reason
    json.loads((tmp_path / RECORD_FILE).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("end", [KeyboardInterrupt, BrokenPipeError], ids=["Ctrl-C", "its reader was killed"])
def test_a_stop_leaves_no_record_not_even_an_earlier_one(tmp_path, end):
    run_job(job_that(raising(UserError("no")), tmp_path))
    assert (tmp_path / RECORD_FILE).exists()
    with pytest.raises(end):
        run_job(job_that(raising(end()), tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {".claim.1", "job.json"}  # no error.txt either


def test_a_digest_is_of_every_field_but_itself():
    record = sealed(Record("imagenet_c", "ok", metric="mce", metrics={"mce": 51.7}, tables={"t": {2: 1.0, 10: 2.0}}))
    assert sealed(record) == record
    changes = ({"notes": ("b",)}, {"metrics": {"mce": 51.8}}, {"seed": 1}, {"predictions": {"file": "x"}})
    assert len({sealed(replace(record, **change)).digest for change in ({}, *changes)}) == 5


def test_a_record_comes_back_from_json_as_it_was(tmp_path):
    recipe = {"betas": [0.9, 0.95], "epochs": 3}
    record = Record(
        "imagenet_c", "ok", metric="mce", metrics={"mce": 51.7}, chance=None, recipe=recipe, notes=("a", "ü")
    )
    write_record(record, tmp_path)
    assert read_record(tmp_path / RECORD_FILE) == sealed(record)


def test_a_live_record_equals_what_is_read_whatever_was_overridden(job):
    """Tuples become lists in JSON: the label of the tables must not change with them."""
    job = replace(job, overrides={"betas": (0.8, 0.95)})
    record = run_job(job)
    assert read_record(job.work / RECORD_FILE).recipe_label == record.recipe_label == job.recipe_label


def test_a_folder_where_a_run_is_at_work_is_left_alone(job):
    with claimed(job.work), pytest.raises(UserError, match="is in use by another run"):
        run_job(job)
    assert [path.name for path in job.work.iterdir()] == [".claim.0"]
    assert run_job(job).status == "ok"


def test_a_run_that_was_killed_behind_its_record_is_tidied_by_the_next_call(job):
    record = run_job(job)
    for name in (CHECKPOINT_FILE, ".tmpAb12Cd", ".record.json.4711.part"):
        (job.work / name).write_text("x")
    assert cached_or_skipped(job) == record
    assert {path.name for path in job.work.iterdir()} == {RECORD_FILE, "job.json", ".claim.0"}


@pytest.mark.parametrize("done", [False, True], ids=["run", "done before"])
def test_what_was_away_and_is_back_leaves_no_record_beside_the_number(job, done):
    """A run whose data or classifier vanish says so in a folder of its own: it is another experiment."""
    job = with_work_folder(replace(job, parent=job.checkpoint))
    if done:
        run_job(job)
    away = replace(DATA, status="incomplete", fingerprint="")
    for changes in ({"data": away}, {"parent": None}, {"data": away, "parent": None}):
        other = with_work_folder(replace(job, **changes))
        write_record(describe(other, status="failed", reason="no data"), other.work)
    elsewhere = with_work_folder(replace(job, data=replace(DATA, fingerprint="e" * 64)))
    write_record(describe(elsewhere, status="failed", reason="of another data set"), elsewhere.work)
    assert (cached_or_skipped if done else run_job)(job).status == "ok"
    assert {path.parent for path in job.out.rglob(RECORD_FILE)} == {job.work, elsewhere.work}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"task": "x"}', '{"task": "x", "status": "ok", "colour": "red"}'])
def test_a_file_that_is_not_a_record_is_refused_by_name(tmp_path, text):
    (tmp_path / RECORD_FILE).write_text(text)
    with pytest.raises(UserError, match=RECORD_FILE):
        read_record(tmp_path / RECORD_FILE)


def test_only_the_untouched_recipe_is_called_paper():
    assert Record("t", "ok", recipe_name="paper").recipe_label == "paper"
    touched = Record("t", "ok", recipe_name="paper", overrides={"epochs": 3, "batch": 8})
    assert touched.recipe_label == "paper with batch=8, epochs=3"


def test_the_sources_stand_only_beside_paper_numbers(job, tmp_path):
    assert run_job(job).sources == {}
    paper = run_job(replace(job, recipe_name="paper", recipe=FINETUNE.recipe(ARCH, "paper"), work=tmp_path / "paper"))
    assert paper.sources.keys() == paper.recipe.keys()


def write_again_and_again(path: Path, size: int) -> None:
    for _ in range(60):
        write_json(path, {"values": [size] * size})


def test_a_reader_never_sees_half_a_record(tmp_path):
    path, fork = tmp_path / "r.json", multiprocessing.get_context("fork")
    write_json(path, {"values": []})
    writers = [fork.Process(target=write_again_and_again, args=(path, size)) for size in (10, 20000)]
    for writer in writers:
        writer.start()
    lengths = set()
    while any(writer.is_alive() for writer in writers):
        values = json.loads(path.read_text())["values"]
        assert all(value == len(values) for value in values)
        lengths.add(len(values))
    assert {10, 20000} <= lengths
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_folder_is_claimed_once_and_another_experiment_is_refused_with_the_differences(job):
    mark(job)
    mark(job)
    other = replace(job, seed=3, recipe=replace(job.recipe, epochs=7))
    with pytest.raises(UserError, match=r"recipe\.epochs: 2 -> 7; seed: 0 -> 3"):
        mark(other)
    with pytest.raises(UserError, match="another experiment"):
        run_job(other)
    assert not (job.work / RECORD_FILE).exists()


CHANGES = {
    "task": lambda job: replace(job, task=replace(job.task, name="other")),
    "task_version": lambda job: replace(job, task=replace(job.task, version=job.task.version + 1)),
    "checkpoint": lambda job: replace(job, checkpoint=replace(job.checkpoint, sha256="0" * 64)),
    "recipe": lambda job: replace(job, recipe=replace(job.recipe, drop_path=0.3)),
    "engine": lambda job: replace(job, engine="other"),
    "seed": lambda job: replace(job, seed=1),
    "precision": lambda job: replace(job, machine=Machine(precision="bf16")),
    "data": lambda job: replace(job, data=replace(job.data, fingerprint="0" * 64)),
    "parent": lambda job: replace(job, parent=job.checkpoint),
}


def test_every_field_of_the_identity_is_tried(job):
    assert CHANGES.keys() == job.identity().keys()


@pytest.mark.parametrize("field", CHANGES)
def test_a_number_answers_only_for_its_own_experiment(job, field):
    record = run_job(job)
    assert finished(job) == record
    other = CHANGES[field](job)
    assert [name for name, value in other.identity().items() if value != job.identity()[name]] == [field]
    assert finished(other) is None


def test_an_altered_record_is_not_taken_for_done_nor_overwritten(job):
    record = run_job(job)
    write_json(job.work / RECORD_FILE, asdict(replace(record, metrics={**record.metrics, record.metric: 99.0})))
    with pytest.raises(UserError, match=rf"{RECORD_FILE} was altered after its run: put the original back, or delete"):
        finished(job)
    with pytest.raises(UserError, match="was altered"):
        run_job(job)
    assert read_record(job.work / RECORD_FILE).metrics[record.metric] == 99.0


@pytest.mark.parametrize("knob", [f.name for f in fields(type(FINETUNE.recipe(ARCH, "mini")))])
def test_every_knob_is_part_of_the_identity(job, knob):
    other = replace(job.recipe)
    object.__setattr__(other, knob, "changed")
    assert replace(job, recipe=other).identity() != job.identity()


def test_of_the_machine_only_the_precision_is_part_of_the_experiment(job):
    machine = Machine(micro_batch=4, workers=3, activation_checkpointing=True, processes=2, threads=7, save_minutes=0)
    assert replace(job, machine=machine).identity() == job.identity()


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_a_job_that_gave_no_number_is_run_again(job, status):
    write_record(Record("imagenet_finetune", status, "why", identity=job.identity()), job.work)
    assert finished(job) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_claim_is_a_sentence(job, content):
    mark(job)
    (job.work / "job.json").write_bytes(content)
    with pytest.raises(UserError, match=r"job\.json is damaged \(.*\): delete it, or choose another --out"):
        run_job(job)
