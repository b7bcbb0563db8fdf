import json
import multiprocessing
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from mae_core import settings
from mae_core.checkpoint import save_weights
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.vit import build_vit
from tests.fixtures.transfer import ARCH, make_job, small_checkpoint, write_imagenet
from transfer.classification import robustness
from transfer.classification import tasks as classification
from transfer.cli import main
from transfer.run import claim, finished, read_record, run_job, write_record
from transfer.task import RECORD_FILE, Data, Job, Record, Result

FINETUNE = classification.TASKS[0]
DATA = Data("root", "found", "4 classes", "subset", "f" * 64, {"classes": 4}, 25.0)


def job_that(run, work: Path, **changes) -> Job:
    """A job whose task is to call `run`."""
    task = replace(FINETUNE, run=run, inspect=lambda root: DATA)
    return replace(make_job(task, Path("root"), work), **changes)


def succeed(job: Job) -> Result:
    return Result({"top1": 71.25}, {"top1": 1.5}, n_eval=50, images_seen=200, seconds=4.0, notes=("odd",))


def fail(error: BaseException):
    def run(job: Job) -> Result:
        raise error

    return run


# Records


def test_a_job_that_succeeds_leaves_a_record_with_its_biography(tmp_path):
    job = job_that(succeed, tmp_path)
    record = run_job(job)
    assert read_record(tmp_path / RECORD_FILE) == record
    assert (record.status, record.reason, record.metrics) == ("ok", "", {"top1": 71.25})
    assert (record.n_eval, record.chance, record.notes) == (50, 25.0, ("odd",))
    assert record.images_per_second == 50.0  # 200 images in 4 seconds
    assert record.checkpoint["sha256"] == job.checkpoint.sha256
    assert record.recipe["epochs"] == 2
    assert torch.__version__.startswith(record.versions["torch"])
    assert record.peak_memory_gib > 0


def test_a_users_mistake_is_the_reason_in_one_sentence(tmp_path):
    record = run_job(job_that(fail(UserError("the batch is too large: make it smaller")), tmp_path))
    assert (record.status, record.reason) == ("failed", "the batch is too large: make it smaller")
    assert not (tmp_path / "error.txt").exists()
    assert read_record(tmp_path / RECORD_FILE) == record


def test_an_unexpected_error_leaves_its_traceback_beside_the_record(tmp_path):
    record = run_job(job_that(fail(ZeroDivisionError("first line\nsecond line")), tmp_path))
    assert record.status == "failed"
    assert record.reason.startswith("ZeroDivisionError: first line (")
    assert str(tmp_path / "error.txt") in record.reason
    traceback = (tmp_path / "error.txt").read_text()
    assert "second line" in traceback
    assert "in run" in traceback


def test_the_traceback_of_an_earlier_attempt_goes(tmp_path):
    run_job(job_that(fail(ZeroDivisionError()), tmp_path))
    assert run_job(job_that(succeed, tmp_path)).status == "ok"
    assert not (tmp_path / "error.txt").exists()


def test_an_error_without_a_message_has_its_name_for_a_reason(tmp_path):
    assert run_job(job_that(fail(AssertionError()), tmp_path)).reason.startswith("AssertionError: ")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["metrics", "stderr"])
def test_a_number_that_is_none_is_a_failure(tmp_path, bad, where):
    result = {"metrics": {"top1": 1.0}, "stderr": {"top1": 1.0}}
    result[where] = {"top1": bad}
    record = run_job(job_that(lambda job: Result(**result), tmp_path))
    assert (record.status, record.metrics) == ("failed", {})
    assert "top1 came out as infinite or NaN" in record.reason
    json.loads((tmp_path / RECORD_FILE).read_text(), parse_constant=pytest.fail)


def test_ctrl_c_leaves_no_record_not_even_an_earlier_one(tmp_path):
    run_job(job_that(fail(UserError("no")), tmp_path))
    assert (tmp_path / RECORD_FILE).exists()
    with pytest.raises(KeyboardInterrupt):
        run_job(job_that(fail(KeyboardInterrupt()), tmp_path))
    assert not (tmp_path / RECORD_FILE).exists()


def test_a_record_comes_back_from_json_as_it_was(tmp_path):
    recipe = {"betas": [0.9, 0.95], "epochs": 3}
    record = Record("imagenet_c", "ok", metrics={"mce": 51.7}, chance=None, recipe=recipe, notes=("a", "ü"))
    write_record(record, tmp_path)
    assert read_record(tmp_path / RECORD_FILE) == record


def test_a_live_record_equals_what_is_read_whatever_was_overridden(tmp_path):
    """Tuples become lists in JSON: the label of the tables must not change with them."""
    job = job_that(succeed, tmp_path, overrides={"betas": (0.8, 0.95)})
    record = run_job(job)
    assert read_record(tmp_path / RECORD_FILE).recipe_label == record.recipe_label == job.recipe_label


@pytest.mark.parametrize("text", ["", "{", "[]", '{"task": "x"}', '{"task": "x", "status": "ok", "colour": "red"}'])
def test_what_is_no_record_is_refused_by_name(tmp_path, text):
    path = tmp_path / RECORD_FILE
    path.write_text(text)
    with pytest.raises(UserError, match=RECORD_FILE):
        read_record(path)


def test_only_the_untouched_recipe_is_called_paper():
    assert Record("t", "ok", recipe_name="paper").recipe_label == "paper"
    touched = Record("t", "ok", recipe_name="paper", overrides={"epochs": 3, "batch": 8})
    assert touched.recipe_label == "paper with batch=8, epochs=3"


def test_the_sources_stand_beside_paper_numbers_alone(tmp_path):
    job = job_that(succeed, tmp_path / "a")
    assert run_job(job).sources == {}
    paper = replace(job, recipe_name="paper", recipe=FINETUNE.recipe(ARCH, "paper"), work=tmp_path / "b")
    assert run_job(paper).sources.keys() == run_job(paper).recipe.keys()


def write_again_and_again(path: Path, size: int) -> None:
    for _ in range(60):
        settings.write_json(path, {"values": [size] * size})


def test_a_reader_never_sees_half_a_record(tmp_path):
    path = tmp_path / "r.json"
    settings.write_json(path, {"values": []})
    writers = [
        multiprocessing.get_context("fork").Process(target=write_again_and_again, args=(path, size))
        for size in (10, 20000)
    ]
    for writer in writers:
        writer.start()
    lengths = set()
    while any(writer.is_alive() for writer in writers):
        values = json.loads(path.read_text())["values"]
        assert all(value == len(values) for value in values)
        lengths.add(len(values))
    assert {10, 20000} <= lengths
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


# Identity


def test_a_folder_is_claimed_once_and_another_experiment_is_refused_with_the_differences(tmp_path):
    job = job_that(succeed, tmp_path)
    claim(job)
    claim(job)
    other = replace(job, seed=3, recipe=replace(job.recipe, epochs=7))
    with pytest.raises(UserError, match=r"recipe\.epochs: 2 -> 7; seed: 0 -> 3"):
        claim(other)
    with pytest.raises(UserError, match="another experiment"):
        run_job(other)
    assert not (tmp_path / RECORD_FILE).exists()


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


def test_every_field_of_the_identity_is_tried(tmp_path):
    assert CHANGES.keys() == job_that(succeed, tmp_path).identity().keys()


@pytest.mark.parametrize("field", CHANGES)
def test_a_number_answers_for_its_own_experiment_alone(tmp_path, field):
    job = job_that(succeed, tmp_path)
    record = run_job(job)
    assert finished(job) == record
    other = CHANGES[field](job)
    assert [name for name, value in other.identity().items() if value != job.identity()[name]] == [field]
    assert finished(other) is None


@pytest.mark.parametrize("knob", [f.name for f in fields(type(FINETUNE.recipe(ARCH, "mini")))])
def test_every_knob_is_part_of_the_identity(knob):
    recipe = FINETUNE.recipe(ARCH, "mini")
    other = replace(recipe)
    object.__setattr__(other, knob, "changed")
    job = job_that(succeed, Path())
    assert replace(job, recipe=recipe).identity() != replace(job, recipe=other).identity()


def small():
    return replace(small_checkpoint(), encoder={})


def test_the_machine_does_not_change_the_experiment(tmp_path):
    """But for the precision."""
    job = job_that(succeed, tmp_path)
    machine = Machine(micro_batch=4, workers=3, activation_checkpointing=True, processes=2, threads=7, save_minutes=0)
    assert replace(job, machine=machine).identity() == job.identity()


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_what_gave_no_number_is_run_again(tmp_path, status):
    job = job_that(succeed, tmp_path)
    write_record(Record("imagenet_finetune", status, "why", identity=job.identity()), tmp_path)
    assert finished(job) is None


# The command line


def call(capsys, tasks, *arguments: str) -> tuple[int, str, str]:
    code = main(tasks, list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def options(tmp_path: Path, task: str, data: Path | None = None) -> list[str]:
    (tmp_path / "empty").mkdir(exist_ok=True)
    places = ["--data", str(data or tmp_path / "empty"), "--out", str(tmp_path / "out")]
    return ["--task", task, "--ckpt", f"random:{ARCH}", "--recipe", "mini", "--device", "cpu", *places]


def the_record(tmp_path: Path) -> Record:
    (path,) = (tmp_path / "out").rglob(RECORD_FILE)
    return read_record(path)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (["--task", "imagenet_finetine"], "did you mean imagenet_finetune?"),
        (["--set", "epoch=3"], "did you mean epochs?"),
        (["--set", "epochs=many"], "epochs is of type int"),
        (["--set", "epochs"], "write knob=value"),
        (["--set", "optimizer=sgd"], "unknown optimizer 'sgd'"),
        (["--set", "momentum=0.9"], "momentum does nothing"),
        (["--ckpt", "random:vit_bas_patch16"], "did you mean vit_base_patch16?"),
        (["--ckpt", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--data", "nowhere"], "--data nowhere is not a folder"),
        (["--micro-batch", "-1"], "--micro-batch -1"),
    ],
)
def test_a_wrong_call_is_answered_by_one_sentence_and_exit_code_2(tmp_path, capsys, change, wrong):
    code, _, err = call(capsys, classification.TASKS, *options(tmp_path, "imagenet_finetune"), *change)
    assert code == 2
    assert wrong in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").rglob(RECORD_FILE))


@pytest.mark.parametrize("flag", ["--recipe", "--bogus"])
def test_an_unknown_flag_or_choice_ends_with_exit_code_2(tmp_path, capsys, flag):
    with pytest.raises(SystemExit, match="2"):
        main(classification.TASKS, [*options(tmp_path, "imagenet_finetune"), flag, "x"])


def test_absent_data_is_skipped_and_named(tmp_path, capsys):
    code, out, _ = call(capsys, classification.TASKS, *options(tmp_path, "imagenet_linprobe"))
    assert code == 1
    assert "imagenet_linprobe: skipped: no data" in out
    record = the_record(tmp_path)
    assert record.status == "skipped"
    assert "imagenet/train/WNID" in record.reason


def test_incomplete_data_is_a_failure(tmp_path, capsys):
    (tmp_path / "half" / "imagenet" / "val").mkdir(parents=True)
    code, *_ = call(capsys, classification.TASKS, *options(tmp_path, "imagenet_linprobe", tmp_path / "half"))
    assert code == 1
    record = the_record(tmp_path)
    assert record.status == "failed"
    assert "lacks train" in record.reason


def test_robustness_without_a_classifier_names_what_it_waits_for(tmp_path, capsys):
    write_imagenet(tmp_path, train=1, val=1)
    (tmp_path / "imagenet" / "val").rename(tmp_path / "imagenet-a")
    code, *_ = call(capsys, robustness.TASKS, *options(tmp_path, "imagenet_a", tmp_path))
    assert code == 1
    record = the_record(tmp_path)
    assert record.status == "skipped"
    assert record.reason.startswith("needs imagenet_finetune")


def test_the_evaluation_of_a_released_file_wants_a_fine_tuned_file(tmp_path, capsys):
    data = write_imagenet(tmp_path / "data", train=1, val=1)
    code, *_ = call(capsys, classification.TASKS, *options(tmp_path, "imagenet_eval", data))
    assert code == 1
    assert the_record(tmp_path).status == "skipped"
    assert "fine-tuned" in the_record(tmp_path).reason


def write_classifier(path: Path, **metadata: str) -> Path:
    model = build_vit(ARCH, num_classes=1000, pool="avg")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, model.state_dict(), metadata)
    return path


def test_fine_tuning_a_fine_tuned_file_is_skipped_and_named(tmp_path, capsys):
    data = write_imagenet(tmp_path / "data", train=1, val=1)
    file = write_classifier(tmp_path / "tuned.safetensors")
    arguments = [*options(tmp_path, "imagenet_finetune", data), "--ckpt", str(file)]
    code, *_ = call(capsys, classification.TASKS, *arguments)
    assert code == 1
    assert the_record(tmp_path).reason == "tuned is a fine-tuned classifier, not a pre-trained encoder"


@pytest.mark.parametrize("wrong", ["encoder_sha256", "recipe", "seed", None])
def test_the_classifier_of_another_checkpoint_recipe_or_seed_is_refused(tmp_path, capsys, wrong):
    write_imagenet(tmp_path, train=1, val=1)
    (tmp_path / "imagenet" / "val").rename(tmp_path / "imagenet-a")
    metadata = {"encoder_sha256": small_checkpoint().sha256, "recipe": "mini", "seed": "0"}
    metadata |= {wrong: "other"} if wrong else {}
    file = write_classifier(tmp_path / "c.safetensors", **metadata)
    arguments = [*options(tmp_path, "imagenet_a", tmp_path), "--classifier", str(file)]
    code, _, err = call(capsys, robustness.TASKS, *arguments)
    if wrong:
        assert code == 2
        assert f"{wrong}: other -> " in err
    else:
        assert code == 0
        assert the_record(tmp_path).identity["parent"]


def test_a_second_call_finds_its_number_and_runs_nothing(tmp_path, capsys, monkeypatch):
    data = write_imagenet(tmp_path / "data", train=2, val=1)
    arguments = [*options(tmp_path, "imagenet_linprobe", data), "--set", "batch=8", "epochs=1", "warmup_epochs=0"]
    code, first, _ = call(capsys, classification.TASKS, *arguments)
    assert code == 0
    before = the_record(tmp_path)
    monkeypatch.setattr("transfer.cli.run_job", fail(AssertionError("ran again")))
    code, second, _ = call(capsys, classification.TASKS, *arguments)
    assert code == 0
    assert the_record(tmp_path) == before
    assert first.splitlines()[-1] == second.splitlines()[-1]
    with pytest.raises(AssertionError, match="ran again"):
        main(classification.TASKS, [*arguments, "--seed", "1"])
