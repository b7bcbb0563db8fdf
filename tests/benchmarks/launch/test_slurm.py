"""Plans as SLURM jobs: what is asked for, and on a real SLURM what comes of it."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import run_all
from benchmarks.launch.slurm import minutes, parameters
from mae_core.errors import UserError
from tests.benchmarks.launch.cluster import PROGRAMS, Cluster
from tests.benchmarks.launch.told import ARCH, TWO, small_data
from tests.fixtures import ROOT
from transfer.data.imagenet import wnids
from transfer.run import read_record
from transfer.task import Record

KNOBS = ["imagenet_finetune.batch=4", "imagenet_finetune.warmup_epochs=0", "imagenet_knn.k=2"]
SLURM = ["--launcher", "slurm", "--slurm", "cpus_per_task=1", "mem=2G", "time=120"]
LIMIT = 900  # seconds for what takes some thirty on two quiet cores


@pytest.mark.parametrize(
    ("text", "found"),
    [("90", 90), ("1:30", 2), ("1:30:00", 90), ("0:00:01", 1), ("2-12", 3600), ("1-00:30", 1470), ("1-00:00:01", 1441)],
)
def test_times_are_slurms(text, found) -> None:
    """The forms of sbatch's manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours, and so on."""
    assert minutes(text) == found


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("partition", "write KEY=VALUE"),
        ("partitin=gpu", "did you mean partition?"),
        ("time=soon", "give minutes, H:MM:SS or D-HH:MM:SS"),
        ("nodes=2", "unknown key"),
        ("signal_delay_s=2m", "give seconds"),
    ],
)
def test_a_wrong_setting_is_refused(setting, said) -> None:
    with pytest.raises(UserError, match=said):
        parameters([setting])


def test_settings_of_slurm_are_submitits() -> None:
    found = parameters(["partition=gpu", "time=1-00:00:00", "cpus_per_task=8", "mem=64G"])
    assert found == {"partition": "gpu", "time": 1440, "cpus_per_task": 8, "mem": "64G", "signal_delay_s": 120}
    slurm = pytest.importorskip("submitit.slurm.slurm")
    from benchmarks.launch.slurm import KNOWN

    assert set(KNOWN) <= slurm._get_default_parameters().keys()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_data(tmp_path / "data", "imagenet-a", "imagenet-sketch")


def flags(data: Path, out: Path, *tasks: str, epochs: int = 2) -> list[str]:
    common = ["--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", str(out), "--device", "cpu"]
    knobs = [knob for knob in (*KNOBS, f"imagenet_finetune.epochs={epochs}") if knob.partition(".")[0] in tasks]
    return [*common, "--tasks", *tasks, "--set", *knobs]


def test_the_plan_as_json_has_a_command_for_each_job_and_its_needs(data, tmp_path, capsys) -> None:
    wanted = flags(data, tmp_path / "out", "imagenet_knn", "imagenet_finetune", "imagenet_a")
    assert run_all.main([*wanted, "--json"]) == 0
    jobs = {job["tasks"][0]: job for job in json.loads(capsys.readouterr().out)["jobs"]}
    assert jobs["imagenet_a"]["after"] == [jobs["imagenet_finetune"]["id"]]
    assert jobs["imagenet_knn"]["after"] == []
    assert all(0 < job["hours"] < 10 and job["bytes"] >= 0 for job in jobs.values())
    # Each command plans the very job, and no other.
    for task, job in jobs.items():
        assert job["command"][:3] == [sys.executable, "-m", "benchmarks.run_all"]
        assert run_all.main([*job["command"][3:], "--json"]) == (2 if task == "imagenet_a" else 0)
        again = json.loads(capsys.readouterr().out)["jobs"]
        assert [one["tasks"] for one in again] == ([] if task == "imagenet_a" else [[task]])


def test_without_slurm_or_submitit_it_is_a_sentence(data, tmp_path, capsys, monkeypatch) -> None:
    wanted = flags(data, tmp_path / "out", "imagenet_knn")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_all.main([*wanted, *SLURM]) == 2
    error = capsys.readouterr().err
    assert "srun" in error or "submitit" in error
    assert run_all.main([*wanted, "--slurm", "time=1"]) == 2
    assert "it is for --launcher slurm" in capsys.readouterr().err
    assert run_all.main([*wanted, "--nodes", "2"]) == 2
    assert "say where they meet, --rdzv-endpoint HOST:PORT" in capsys.readouterr().err


def test_on_a_cluster_the_gpus_are_not_those_of_the_machine_that_submits(data, tmp_path, capsys) -> None:
    wanted = flags(data, tmp_path / "out", "imagenet_knn", "imagenet_finetune")
    wanted[wanted.index("--device") + 1] = "auto"
    assert run_all.main([*wanted, *SLURM, "--gpus", "4", "--plan"]) == 0
    assert "  on SLURM, bf16" in capsys.readouterr().out.splitlines()


def test_ctrl_c_leaves_no_job_that_nobody_has_noted(data, tmp_path) -> None:
    """It reaches sbatch too, as in a terminal: the next call would submit the job again."""
    pytest.importorskip("submitit")
    # As a program in C, which inherits the signals that are blocked.
    strike = f"#!{sys.executable}\nimport os\nfor p in (os.getppid(), os.getpid()): os.kill(p, 2)\n"
    strike += "print('Submitted batch job 17')\n"
    for name, script in {"srun": "#!/bin/sh\n", "sbatch": strike}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "out"
    call = [sys.executable, "-m", "benchmarks.run_all", *flags(data, out, "imagenet_knn"), *SLURM]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(call, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 130, done.stderr
    assert list(json.loads((out / "slurm" / "jobs.json").read_text()).values()) == ["17"]


@pytest.fixture(scope="session")
def cluster():
    pytest.importorskip("submitit")
    if os.getuid() != 0 or not all(shutil.which(program) for program in PROGRAMS):
        pytest.skip("no SLURM here (Debian: apt install slurm-wlm munge), or not as root")
    started = Cluster()
    yield started
    started.stop()


def submit(cluster: Cluster, *arguments: str) -> str:
    call = [sys.executable, "-m", "benchmarks.run_all", *arguments]
    done = subprocess.run(call, env=cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def records(out: Path) -> dict[tuple[str, int], Record]:
    found = [read_record(path) for path in out.glob("runs/**/record.json")]
    return {(record.task, record.seed): record for record in found}


@pytest.mark.slow
def test_jobs_of_a_plan_run_in_arrays_and_after_what_they_need(cluster, data, tmp_path) -> None:
    """One of them fails: its job does too, and its record says why. None starts before the queue has been looked at."""
    out = tmp_path / "out"
    cluster.call("scontrol", "update", "PartitionName=low", "State=DOWN")
    (data / "imagenet-sketch" / wnids()[TWO[0]] / "broken.jpg").write_bytes(b"not an image")
    wanted = flags(data, out, "imagenet_knn", "imagenet_finetune", "imagenet_a", "imagenet_sketch")
    first = submit(cluster, *wanted, *SLURM)
    assert first.count("SLURM job ") == 3
    queued = cluster.queue()
    assert len({name.partition("_")[0] for name in queued}) == 2  # an array of two, and the one that waits for it
    again = submit(cluster, *wanted, *SLURM)
    assert "SLURM job " not in again.partition("disk:")[2]
    assert "0 submitted, 4 tasks queued before" in again
    cluster.call("scontrol", "update", "PartitionName=low", "State=UP")
    cluster.wait(lambda: not cluster.queue(), LIMIT)
    found, logs = records(out), [path.read_text() for path in out.glob("slurm/**/*.err")]
    fine = {(task, 0): "ok" for task in ("imagenet_knn", "imagenet_finetune", "imagenet_a")}
    assert {key: record.status for key, record in found.items()} == {**fine, ("imagenet_sketch", 0): "failed"}, logs
    assert "broken.jpg" in found["imagenet_sketch", 0].reason
    [last] = [name for name in queued if "_" not in name]
    assert "JobState=FAILED" in cluster.call("scontrol", "show", "job", last)
    assert "failed" in (out / "tables" / "robustness.md").read_text()
    finished = [task for task, _ in fine]
    assert "0 submitted, 0 tasks queued before" in submit(cluster, *flags(data, out, *finished), *SLURM)


@pytest.mark.slow
@pytest.mark.parametrize("by", [("scancel", "--signal=USR2"), ("scontrol", "requeue")], ids=["signal", "requeue"])
def test_a_training_that_is_preempted_goes_on_and_ends_with_the_same_weights(cluster, data, tmp_path, by) -> None:
    """USR2 is what SLURM sends before a preemption or the time limit; a requeue by hand ends the job without it."""
    out, plain = tmp_path / "out", tmp_path / "plain"
    wanted = ["imagenet_finetune"]
    submit(cluster, *flags(data, out, *wanted, epochs=150), *SLURM, "--save-minutes", "600")
    cluster.wait(lambda: any(log.read_text() for log in out.glob("runs/**/log.jsonl")), LIMIT)
    [job] = json.loads((out / "slurm" / "jobs.json").read_text()).values()
    cluster.call(*by, job)
    cluster.wait(lambda: not cluster.queue(), LIMIT)
    log = next((out / "logs").glob("*.log")).read_text()
    assert "resuming" in log
    assert records(out)["imagenet_finetune", 0].status == "ok"
    submit(cluster, *flags(data, plain, *wanted, epochs=150))
    names = [next(folder.glob("runs/**/classifier.safetensors")) for folder in (out, plain)]
    assert names[0].read_bytes() == names[1].read_bytes()


@pytest.mark.slow
def test_two_nodes_of_one_process_give_the_numbers_of_one_node_of_two(cluster, data, tmp_path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    environment = cluster.environment | {"GLOO_SOCKET_IFNAME": "lo"}
    here = Namespace(environment=environment)
    submit(here, *flags(data, out, "imagenet_finetune"), *SLURM, "--nodes", "2")
    cluster.wait(lambda: not cluster.queue(), LIMIT)
    submit(here, *flags(data, plain, "imagenet_finetune"), "--gpus", "2")
    two, one = (records(folder)["imagenet_finetune", 0] for folder in (out, plain))
    assert two.status == "ok", two.reason
    assert (two.machine["processes"], one.machine["processes"]) == (2, 2)
    assert two.artifacts == one.artifacts
    assert two.metrics == one.metrics
