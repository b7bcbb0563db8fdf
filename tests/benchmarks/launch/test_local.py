"""Units of a plan side by side: which start when, where, and what becomes of their children."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import run_all
from benchmarks.launch import local
from benchmarks.launch.local import read_or_write_failure, run_units
from benchmarks.launch.units import Unit, make_units
from benchmarks.plan import Item
from mae_core.claim import claimed
from mae_core.machine import Machine
from tests.benchmarks.launch.told import ARCH, Told, plan
from tests.fixtures import ROOT
from tests.fixtures.page import read_page
from transfer.run import describe, read_record, with_work_folder, write_record


def test_the_sets_of_one_classifier_share_a_unit_that_waits_for_its_training(flags) -> None:
    items, _ = plan(flags, "--seeds", "0", "1", "--set", "imagenet_finetune.batch=4", "imagenet_knn.k=2")
    units = make_units([item for item in items if item.state == "to do"])
    by_label = {unit.label.removeprefix(f"{ARCH} "): unit for unit in units}
    shifted = by_label["imagenet_a imagenet_r seed 1"]
    assert [unit.label for unit in shifted.after] == [f"{ARCH} imagenet_finetune seed 1"]
    assert by_label["imagenet_knn seed 0"].after == []
    items, _ = plan(flags, "--tasks", "imagenet_partial", "imagenet_linprobe")
    partial = next(unit for unit in make_units(items) if unit.first.task.name == "imagenet_partial")
    assert [unit.first.task.name for unit in partial.after] == ["imagenet_linprobe"]


def test_tables_and_page_are_renewed_after_each_job(flags, tmp_path, monkeypatch) -> None:
    """What lies in --out when a child starts, and at the end: only the last page looks for no more results."""
    items, args = plan(flags, "--tasks", "imagenet_knn", "--set", "imagenet_knn.k=2", "--seeds", *"012")
    told, seen = Told(tmp_path, monkeypatch), []

    def look() -> tuple[int, bool]:
        page, summary = (tmp_path / "out" / name for name in ("index.html", "summary.csv"))
        lines = summary.read_text().count("imagenet_knn") if summary.exists() else 0
        return lines, page.exists() and read_page(tmp_path / "out").reloads

    def command(jobs, args) -> list[str]:
        seen.append(look())
        return told.command(jobs, args)

    monkeypatch.setattr(local, "task_command", command)
    run_units(make_units(items), args)
    assert [*seen, look()] == [(0, False), (1, True), (2, True), (3, False)]


def test_units_run_side_by_side_as_far_as_there_is_room(flags, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    tasks = ["--tasks", "imagenet_knn", "--set", "imagenet_knn.k=2", "--seeds", *"01234"]
    items, args = plan(flags, *tasks, "--jobs", "3")
    told = Told(tmp_path, monkeypatch, company=3)
    made = run_units(make_units(items), args)
    assert [record.status for record in made] == ["ok"] * 5
    assert told.together() == 3
    assert {(gpus, threads) for *_, gpus, threads in told.events()} == {("None", str(max(1, local.cores() // 3)))}


def test_what_takes_a_result_waits_for_it_and_nothing_else_does(flags, tmp_path, monkeypatch) -> None:
    quick = ["--set", "imagenet_finetune.batch=4", "imagenet_linprobe.batch=4", "imagenet_knn.k=2", "--jobs", "4"]
    items, args = plan(flags, *quick)
    told = Told(tmp_path, monkeypatch, company=3)
    made = run_units(make_units([item for item in items if item.state == "to do"]), args)
    assert Counter(record.status for record in made) == {"ok": 3, "skipped": 2}  # no classifier was left by this child
    assert sorted(told.started) == [["imagenet_finetune"], ["imagenet_knn"], ["imagenet_linprobe"]]
    assert told.together() == 3


def test_gpus_are_shared_out_and_named_as_the_caller_sees_them(flags, tmp_path, monkeypatch) -> None:
    """The units and slots of a machine with four GPUs, of which the caller was given 4 to 7."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    tasks = ["--tasks", "imagenet_knn", "imagenet_linprobe", "--seeds", "0", "1", "2"]
    items, args = plan(flags, *tasks, "--set", "imagenet_knn.k=2", "imagenet_linprobe.batch=6")
    args.gpus = 4

    def on_gpus(item: Item) -> Item:
        processes = 3 if item.job.task.trains else 1
        return replace(item, job=replace(item.job, machine=Machine(device="cuda", processes=processes)))

    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    told = Told(tmp_path, monkeypatch)
    made = run_units(make_units([on_gpus(item) for item in items]), args)
    assert Counter(record.status for record in made) == {"ok": 6}
    assert Counter(len(gpus.split(",")) for what, _, gpus, _ in told.events() if what == "begin") == {3: 3, 1: 3}
    held: set[str] = set()
    for what, _, gpus, _ in told.events():
        names = set(gpus.split(","))
        assert names <= set("4567")
        assert not names & held if what == "begin" else names <= held
        held = held | names if what == "begin" else held - names
    assert told.started[0] == ["imagenet_linprobe"]  # the longest first; which of two children notes it first is chance


def test_a_unit_goes_on_behind_a_child_that_ended_early(flags, tmp_path, monkeypatch) -> None:
    """Jobs that share a child: one record was written, then the process died; the rest gets a process of its own."""
    items, args = plan(flags, "--tasks", "imagenet_a", "imagenet_r")
    parent = items[0].job.checkpoint
    items = [replace(item, job=with_work_folder(replace(item.job, parent=parent))) for item in items]
    monkeypatch.setattr(local, "cached_or_skipped", lambda job: None)
    monkeypatch.setattr(local, "LATE", 1.0)  # the child that died ended with 0: its second record might be on its way
    told = Told(tmp_path, monkeypatch, leave=1)
    made = run_units(make_units(items), args)
    assert told.started == [["imagenet_a", "imagenet_r"], ["imagenet_r"]]
    assert [record.status for record in made] == ["ok", "ok"]


def test_what_another_run_is_at_work_on_is_left_to_it_and_its_result_taken(
    flags, tmp_path, monkeypatch, capsys
) -> None:
    items, args = plan(flags, "--tasks", "imagenet_knn", "--set", "imagenet_knn.k=2", "--seeds", "0", "1")
    told = Told(tmp_path, monkeypatch)
    theirs, own = (item.job for item in items)

    class Ends(local.Suite):
        def goes_on(self) -> bool:
            if read_record_of(own) and not read_record_of(theirs):
                write_record(describe(theirs, status="ok", metrics={"top1": 7.0}), theirs.work)
                held.__exit__(None, None, None)
            return super().goes_on()

    def read_record_of(job):
        return (job.work / "record.json").exists()

    monkeypatch.setattr(local, "Suite", Ends)
    held = claimed(theirs.work)
    held.__enter__()
    made = run_units(make_units(items), args)
    assert told.started == [["imagenet_knn"]]
    assert {record.seed: record.metrics["top1"] for record in made} == {0: 7.0, 1: 1.0}
    said = f"another run (process {os.getpid()}, since"
    assert capsys.readouterr().out.count(said) == 1


def test_a_child_that_dies_leaves_a_failed_record(flags, tmp_path: Path) -> None:
    items, _ = plan(flags, "--tasks", "imagenet_linprobe", "--set", "imagenet_linprobe.batch=4")
    job = items[0].job
    record = read_or_write_failure(job, {}, -signal.SIGKILL, "step 3", tmp_path / "log")
    assert record.status == "failed"
    assert "SIGKILL" in record.reason
    assert read_record(job.work / "record.json") == record


@pytest.mark.slow
def test_four_jobs_side_by_side_give_the_records_of_four_in_a_row(flags, tmp_path) -> None:
    quick = [f"imagenet_linprobe.{knob}" for knob in ("epochs=2", "batch=4", "warmup_epochs=0")]
    common = ["--tasks", "imagenet_knn", "imagenet_linprobe", "--seeds", "0", "1", "--set", *quick, "imagenet_knn.k=2"]
    found = []
    for jobs in ("1", "4"):
        out = tmp_path / f"out{jobs}"
        call = [sys.executable, str(Path(run_all.__file__)), *flags[:-1], str(out), *common, "--jobs", jobs]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(call, env=env, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        paths = sorted(out.glob("runs/**/record.json"))
        records = {str(path.relative_to(out)): dataclasses.asdict(read_record(path)) for path in paths}
        for record in records.values():
            for passing in (
                "seconds",
                "wall_seconds",
                "estimated_seconds",
                "images_per_second",
                "peak_memory_gib",
                "finished",
                "digest",
            ):
                del record[passing]
            record["machine"] = {k: v for k, v in record["machine"].items() if k != "workers"}
        found.append(records)
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_units_are_told_apart(flags) -> None:
    items, _ = plan(flags, "--tasks", "imagenet_knn", "--set", "imagenet_knn.k=2")
    assert Unit(items) != Unit(items)
