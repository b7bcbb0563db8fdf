"""What a child process is called with, what comes of it, and the lock that it shares."""

import io
import sys
from pathlib import Path

import pytest

from benchmarks import run_all
from benchmarks.children import follow, run_child, task_command
from benchmarks.plan import make_plan
from benchmarks.suite import TASKS
from mae_core.lock import take_lock
from tests.fixtures.transfer import CLASSES, write_imagenet
from transfer.jobs import find_tasks, make_job
from transfer.run import describe

ARCH = "random:vit_mini_patch8"


def test_a_recipe_by_name_holds_only_for_its_task_and_reaches_the_child(tmp_path: Path) -> None:
    data = write_imagenet(tmp_path / "data", train=4, val=3, classes=CLASSES[:2])
    common = ["--ckpt", ARCH, "--data", str(data), "--out", str(tmp_path / "out")]
    args = run_all.parse([*common, "--set", "inat2018.recipe=deit-360", "inat2018.batch=64"])
    jobs = {item.job.task.name: item.job for item in make_plan(args)}
    job = jobs["inat2018"]
    assert {name for name in jobs if jobs[name].recipe_label != "paper"} == {"inat2018"}
    assert job.recipe_label == "deit-360 with batch=64"
    assert (job.recipe.epochs, job.recipe.batch, job.recipe.layer_decay) == (360, 64, 1.0)
    command = task_command([job], args)
    knobs = command[command.index("--set") + 1 :][:2]
    [task] = find_tasks(["inat2018"], TASKS)
    again = make_job(task, job.checkpoint, "paper", knobs, job.data, args.out, 0, job.machine)
    assert again.work == job.work
    assert "facebookresearch/deit issues 105" in describe(job, status="skipped").sources["epochs"]
    default = {item.job.task.name: item.job for item in make_plan(run_all.parse(common))}["inat2018"]
    assert default.recipe_label == "paper"
    assert default.work != job.work


def test_the_exit_code_and_the_last_line_come_back_and_all_lines_are_logged(tmp_path: Path, capsys) -> None:
    program = "import sys; print('one'); print('two', file=sys.stderr); print('', flush=True); sys.exit(3)"
    log, lock = tmp_path / "logs" / "a.log", take_lock(tmp_path)
    for title in ("", "[1/1] a"):
        assert run_child([sys.executable, "-u", "-c", program], log, lock, title) == (3, "two")
        assert capsys.readouterr().out == (f"{title} | one\n" if title else "")
    lock.release()
    first, second = log.read_text().split("$ ")[1:]
    assert first == second
    assert first.splitlines()[-3:] == ["one", "two", ""]


def test_the_reason_comes_back_and_not_the_report_behind_it(tmp_path: Path) -> None:
    """torchrun's: rulers, and a line that is the same for every failure."""
    report = """\
        Root Cause (first observed failure):
        [0]:
          exitcode  : -9 (pid: 4711)
          error_file: <N/A>
          traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
        ============================================================
    """
    log = io.StringIO()
    assert follow(report.splitlines(keepends=True), log, "") == "exitcode  : -9 (pid: 4711)"
    assert log.getvalue() == report
    lines = ["error: the disk is full\n", "stopped: another process of this run has ended\n", *report.splitlines()]
    assert follow(lines, log, "") == "error: the disk is full"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, "10000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE"),
    ],
)
def test_threads_of_a_child_sleep_soon_unless_the_user_says_otherwise(
    tmp_path: Path, monkeypatch, given, found
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    program = "import os; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))"
    lock = take_lock(tmp_path)
    assert run_child([sys.executable, "-c", program], tmp_path / "a.log", lock) == (0, found)
    lock.release()


def test_a_child_inherits_the_lock_and_is_written_down(tmp_path: Path) -> None:
    lock = take_lock(tmp_path)
    read = "json.loads((p / '.lock').read_text())"
    program = f"""import json, os, sys, time
from pathlib import Path
p = Path(sys.argv[1])
while not {read}["child"]:
    time.sleep(0.01)
found = {read}
inherited = os.path.samefile("/proc/self/fd/{lock.descriptor}", p / ".lock")
print(found["pid"] == os.getppid(), found["child"] == os.getpid(), inherited)
"""
    assert run_child([sys.executable, "-c", program, str(tmp_path)], tmp_path / "log", lock) == (0, "True True True")
    lock.release()
