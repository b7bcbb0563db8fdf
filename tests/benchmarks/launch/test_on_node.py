"""What a SLURM job makes of SLURM's signals, which come to its first process alone or to all: here without SLURM."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.children import with_descendants
from benchmarks.launch.on_node import OnNode
from mae_core.claim import begun
from mae_core.errors import UserError
from tests.fixtures import ROOT
from tests.fixtures.waiting import PATIENCE, wait_for

pytest.importorskip("submitit")
# In place of submitit: SLURM's signal before the limit saves, and the job is queued again.
JOB = """
import os, signal, sys
from pathlib import Path
from benchmarks.launch.on_node import OnNode
node = OnNode(sys.argv[2:], 1, 86400.0, 600.0, Path(sys.argv[1]), 0)
def requeue(*_):
    node.checkpoint()
    os._exit(75)
signal.signal(signal.SIGUSR2, requeue)
node()
"""
# It does not heed what it is asked, nor does its child.
DEAF = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child:
    pathlib.Path(sys.argv[2]).write_text(f"{os.getpid()} {child}")
    pathlib.Path(sys.argv[1]).touch()
while True:
    time.sleep(1)
"""
# One that has something to go on from if it is told so, and ends when it is asked.
WORK = """
import pathlib, sys, time
folder, kept = map(pathlib.Path, sys.argv[1:])
kept.parent.mkdir(parents=True, exist_ok=True)
kept.write_text(str(time.time()))
(folder / "begun").touch()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "reached"),
    [(signal.SIGTERM, "the first process"), (signal.SIGTERM, "all processes"), (signal.SIGUSR2, "all processes")],
)
def test_a_training_saves_whichever_processes_the_signal_reaches(flags, tmp_path, number, reached) -> None:
    """It saves by itself after ten hours: what is there comes from the signal. Behind SIGTERM the job waits for what
    SLURM makes of it, and fails by no exit code of its own."""
    quick = [f"imagenet_finetune.{knob}" for knob in ("epochs=5000", "batch=4", "warmup_epochs=0")]
    command = [sys.executable, "-m", "benchmarks.run_all", *flags, "--tasks", "imagenet_finetune", "--set", *quick]
    command += ["--save-minutes", "600", "--device", "cpu"]
    out = tmp_path / "out"
    job = subprocess.Popen([sys.executable, "-c", JOB, str(out / "runs"), *command], cwd=ROOT)
    try:
        wait_for(lambda: any(log.read_text() for log in out.glob("runs/**/log.jsonl")))
        assert not list(out.glob("runs/**/checkpoint.pth"))
        processes = with_descendants(job.pid)
        assert len(processes) >= 4  # run_all, its server, the training
        for process in processes if reached == "all processes" else processes[:1]:
            os.kill(process, number)
        wait_for(lambda: not any(begun(process) for process in processes[1:]))
        if number == signal.SIGUSR2:
            assert job.wait(PATIENCE) == 75
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                job.wait(5)
        assert len(list(out.glob("runs/**/checkpoint.pth"))) == 1
        assert not list(out.glob("runs/**/record.json"))
    finally:
        job.kill()
        job.wait()


class Requeued(Exception):
    pass


def attempt(node: OnNode, ready: Path) -> OnNode:
    """Run it until it is ready, then send what SLURM does before the limit; what the job shall go on with."""

    def requeue(*_) -> None:
        raise Requeued(node.checkpoint().function)

    def strike() -> None:
        wait_for(ready.exists)
        ready.unlink()
        os.kill(os.getpid(), signal.SIGUSR2)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    signal.signal(signal.SIGUSR2, requeue)
    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        node()
    except Requeued as e:
        return e.args[0]
    finally:
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    raise AssertionError("it ended by itself")


def test_a_command_that_does_not_end_is_killed_and_queued_again(tmp_path) -> None:
    command = [sys.executable, "-c", DEAF, str(tmp_path / "begun"), str(tmp_path / "pids")]
    again = attempt(OnNode(command, 1, 86400.0, 4.0, tmp_path / "runs", 0), tmp_path / "begun")
    assert again.command == command
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    wait_for(lambda: not any(map(begun, pids)))


@pytest.mark.parametrize(
    ("kept", "idle"),
    [
        ("imagenet_a/paper-seed0-1/record.json", 0),
        ("imagenet_finetune/paper-seed0-1/checkpoint.pth", 0),
        ("imagenet_partial/2/paper-seed0-1/result.json", 0),
        ("imagenet_knn/features-12ab/train.safetensors", 0),
        ("imagenet_finetune/paper-seed1-1/checkpoint.pth", 1),
        ("imagenet_finetune/paper-seed0-1/log.jsonl", 1),
    ],
)
def test_a_limit_that_is_used_up_for_nothing_is_counted(tmp_path, kept, idle) -> None:
    command = [sys.executable, "-c", WORK, str(tmp_path), str(tmp_path / "runs" / kept)]
    node = OnNode(command, 1, 0.0, 0.0, tmp_path / "runs", 0)
    again = attempt(node, tmp_path / "begun")
    assert again.idle == idle
    if idle:
        with pytest.raises(UserError, match="has ended it 2 times before it had anything to go on from"):
            attempt(again, tmp_path / "begun")


def test_a_preemption_long_before_the_limit_is_not_counted(tmp_path) -> None:
    command = [sys.executable, "-c", WORK, str(tmp_path), str(tmp_path / "notes")]
    node = OnNode(command, 1, 86400.0, 120.0, tmp_path / "runs", 0, idle=1)
    assert attempt(node, tmp_path / "begun").idle == 1
