"""A plan beside other runs: on other nodes, or left behind on this machine by a run that was killed."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from benchmarks.launch import local
from benchmarks.launch.local import run_units
from benchmarks.launch.units import make_units
from benchmarks.plan import Item
from mae_core.claim import claimed
from mae_core.errors import UserError
from mae_core.machine import Machine
from tests.benchmarks.launch.told import Told, plan
from tests.fixtures import ROOT
from transfer.run import describe, read_record, write_record


def test_nodes_start_no_training_before_what_another_one_is_at_work_on_has_ended(flags, tmp_path, monkeypatch) -> None:
    """The second node of a plan, with two GPUs: the first one evaluates, and would come to the training later."""
    tasks = ["--tasks", "imagenet_knn", "imagenet_linprobe", "--seeds", "0", "1"]
    knobs = ["--set", "imagenet_knn.k=2", "imagenet_linprobe.batch=8"]
    items, args = plan(flags, *tasks, *knobs, "--nodes", "2", "--rdzv-endpoint", "node1:29500")
    args.gpus = 2

    def on_gpus(item: Item) -> Item:
        trains = item.job.task.trains
        machine = Machine(device="cuda", processes=4 if trains else 1)
        return replace(item, job=replace(item.job, machine=machine, estimated_seconds=900.0 if trains else 1.0))

    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    told, when_alone = Told(tmp_path, monkeypatch), []

    class Ends(local.Suite):
        def goes_on(self) -> bool:
            going = super().goes_on()
            if told.started and not self.running and not when_alone:
                when_alone.extend(told.started)
                write_record(describe(theirs, status="ok", metrics={"top1": 7.0}), theirs.work)
                held.__exit__(None, None, None)
            return going

    monkeypatch.setattr(local, "Suite", Ends)
    units = make_units([on_gpus(item) for item in items], args.nodes)
    theirs = units[0].first
    held = claimed(theirs.work)
    held.__enter__()
    made = run_units(units, args)
    assert when_alone == [["imagenet_knn"]]  # evaluations are shared out between the nodes
    assert told.started == [["imagenet_knn"], ["imagenet_linprobe"], ["imagenet_linprobe"]]
    assert [record.status for record in made] == ["ok"] * 4


@pytest.mark.parametrize("flag", ["--gpus-per-job", "--jobs"])
def test_two_trainings_do_not_meet_at_one_endpoint(flags, flag) -> None:
    nodes = ["--nodes", "2", "--rdzv-endpoint", "node1:29500"]
    more = ["--device", "cpu", "--gpus", "4", flag, "2"]
    with pytest.raises(UserError, match=f"{flag} with --nodes: two trainings would meet at one endpoint"):
        plan(flags, *more, *nodes)
    plan(flags, "--tasks", "imagenet_knn", "--device", "cpu", "--gpus", "4", *nodes)


@pytest.mark.parametrize("result", ["none", "of the other node"])
def test_a_training_that_ends_early_on_one_node_is_not_started_again_there(
    flags, tmp_path, monkeypatch, result
) -> None:
    """The other node may be at the next one by then, or at the first again: they would wait for each other."""
    tasks = ["--tasks", "imagenet_linprobe", "--set", "imagenet_linprobe.batch=8"]
    items, args = plan(flags, *tasks, "--nodes", "2", "--rdzv-endpoint", "node1:29500")
    args.gpus = 2
    items = [replace(i, job=replace(i.job, machine=Machine(device="cuda", processes=4))) for i in items]
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    monkeypatch.setattr(local, "LATE", 0.0)
    started, [job] = [], [item.job for item in items]

    def dies(jobs, args) -> list[str]:
        started.append(jobs)
        held.__enter__()
        return [sys.executable, "-c", "import sys; sys.exit(1)"]

    class Ends(local.Suite):
        def goes_on(self) -> bool:
            going = super().goes_on()
            if self.parted and not ended:
                ended.append(True)
                if result != "none":
                    write_record(describe(job, status="failed", reason="a rank was killed"), job.work)
                held.__exit__(None, None, None)
            return going

    held, ended = claimed(job.work), []
    monkeypatch.setattr(local, "task_command", dies)
    monkeypatch.setattr(local, "Suite", Ends)
    if result == "none":
        with pytest.raises(UserError, match="no other one has left its result: start the same command again on all"):
            run_units(make_units(items, args.nodes), args)
        assert not (job.work / "record.json").exists()
    else:
        assert [record.reason for record in run_units(make_units(items, args.nodes), args)] == ["a rank was killed"]
    assert len(started) == 1


@pytest.mark.parametrize(("allocation", "left_over"), [("", {"1"}), ("7", {"0", "1"})])
def test_gpus_that_the_children_of_a_killed_run_still_use_are_not_free(
    flags, tmp_path, monkeypatch, capsys, allocation, left_over
) -> None:
    """GPU 0 of another of the scheduler's jobs is another one."""
    items, args = plan(flags, "--tasks", "imagenet_knn", "--set", "imagenet_knn.k=2", "--seeds", "0", "1", "2")
    args.gpus = 2
    items = [replace(item, job=replace(item.job, machine=Machine(device="cuda"))) for item in items]
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "H100")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told, theirs = Told(tmp_path, monkeypatch), items[2].job
    program = "import sys, time; from mae_core.claim import *; take_claim(Path(sys.argv[1])); print(); time.sleep(900)"
    orphan = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs.work)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_ID": allocation},
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert orphan.stdout.readline()

    class Ends(local.Suite):
        def goes_on(self) -> bool:
            going = super().goes_on()
            if len(self.records) == 2 and orphan.returncode is None:
                orphan.kill()  # and so it leaves no record
                orphan.communicate()
            return going

    monkeypatch.setattr(local, "Suite", Ends)
    made = run_units(make_units(items), args)
    assert [record.status for record in made] == ["ok"] * 3
    used = {name: gpus for what, name, gpus, _ in told.events() if what == "begin"}
    assert {used[f"imagenet_knn/{seed}"] for seed in range(2)} == left_over
    assert told.together() <= len(left_over)
    assert f"imagenet_knn seed 2: another run (process {orphan.pid}, since" in capsys.readouterr().out


@pytest.mark.parametrize("failed_before", [False, True])
def test_a_result_that_another_run_leaves_between_two_looks_is_kept(flags, monkeypatch, failed_before) -> None:
    items, args = plan(flags, "--tasks", "imagenet_knn", "--set", "imagenet_knn.k=2")
    [job] = [item.job for item in items]
    if failed_before:
        write_record(describe(job, status="failed", reason="earlier"), job.work)
    real = local.cached_or_skipped

    def another_ends_behind_it(job):
        found = real(job)
        write_record(describe(job, status="ok", metrics={"top1": 7.0}), job.work)
        return found

    monkeypatch.setattr(local, "cached_or_skipped", another_ends_behind_it)
    made = run_units(make_units(items), args)
    assert [record.metrics for record in made] == [{"top1": 7.0}]
    assert read_record(job.work / "record.json") == made[0]


def test_the_record_of_an_earlier_attempt_is_not_taken_for_that_of_a_child_that_left_none(
    flags, tmp_path, monkeypatch
) -> None:
    items, args = plan(flags, "--tasks", "imagenet_knn", "--set", "imagenet_knn.k=2")
    [job] = [item.job for item in items]
    write_record(describe(job, status="failed", reason="earlier"), job.work)
    monkeypatch.setattr(local, "LATE", 0.0)
    Told(tmp_path, monkeypatch, leave=0)
    [record] = run_units(make_units(items), args)
    assert record.reason.startswith("its process ended with exit code 0 and left no record")
