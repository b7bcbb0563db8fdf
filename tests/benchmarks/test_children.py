"""What a child process is called with, and what comes of it."""

import argparse
import os
import signal
import sys
import threading
import time
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters, c10d_rendezvous_backend
from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.run import config_from_args, parse_args

from benchmarks import run_all
from benchmarks.children import Child, launcher, run_child, stop_all, task_command
from benchmarks.plan import make_plan
from benchmarks.suite import TASKS
from benchmarks.warm import surroundings
from mae_core.checkpoint import save_weights
from mae_core.claim import begun
from mae_core.stopping import stop_on_signals
from mae_core.vit import build_vit
from tests.fixtures.terminal import closed_terminal
from tests.fixtures.transfer import CLASSES, write_c, write_imagenet
from tests.fixtures.waiting import wait_for
from transfer import cli
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
    assert "--estimated-seconds" not in command
    expected = task_command([replace(job, estimated_seconds=seconds) for seconds in (12.5, 3.0)], args)
    assert expected[expected.index("--estimated-seconds") + 1 :][:2] == ["12.5", "3.0"]
    args.tracker = "trackio"
    tracked = task_command([job], args)
    assert tracked[tracked.index("--tracker") + 1] == "trackio"
    assert "--tracker" not in command
    known = replace(job, tracker="trackio")
    assert known.identity() == job.identity()
    assert "track" not in str(describe(known, status="skipped"))
    [task] = find_tasks(["inat2018"], TASKS)
    again = make_job(task, job.checkpoint, "paper", knobs, job.data, args.out, 0, job.machine)
    assert again.work == job.work
    assert "facebookresearch/deit issues 105" in describe(job, status="skipped").sources["epochs"]
    default = {item.job.task.name: item.job for item in make_plan(run_all.parse(common))}["inat2018"]
    assert default.recipe_label == "paper"
    assert default.work != job.work


def test_a_child_takes_what_the_plan_found_of_imagenet_c(tmp_path: Path, monkeypatch, capsys) -> None:
    root = write_c(write_imagenet(tmp_path / "data", train=4, val=3, classes=CLASSES[:2]))
    classifier = build_vit(ARCH.partition(":")[2], num_classes=1000).state_dict()
    save_weights(tmp_path / "classifier.safetensors", classifier, {"arch": ARCH.partition(":")[2]})
    flags = [
        "--ckpt",
        str(tmp_path / "classifier.safetensors"),
        "--recipe",
        "mini",
        "--data",
        str(root),
        "--limit",
        "3",
    ]
    args = run_all.parse([*flags, "--out", str(tmp_path / "out"), "--tasks", "imagenet_c", "imagenet_eval"])
    jobs = {item.job.task.name: item.job for item in make_plan(args)}
    arguments = task_command([jobs["imagenet_c"], jobs["imagenet_eval"]], args)[3:]
    found = cli.found_before(arguments[arguments.index("--found") + 1])
    assert found == {"imagenet_c": jobs["imagenet_c"].data}

    def unwanted(root: Path) -> None:
        raise AssertionError("it is looked through again")

    tasks = [replace(task, inspect=unwanted) if task.name == "imagenet_c" else task for task in TASKS]
    assert cli.main(tasks, arguments) == 0, capsys.readouterr().out
    assert (jobs["imagenet_c"].work / "record.json").exists()
    assert "--found" not in task_command([jobs["imagenet_eval"]], args)


@pytest.mark.parametrize("text", ["{", "[]", '{"imagenet_c": 1}', '{"imagenet_c": {"root": "x"}}'])
def test_what_no_plan_wrote_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="not what a plan writes"):
        cli.found_before(text)


def test_the_exit_code_and_the_last_line_come_back_and_all_lines_are_logged(tmp_path: Path) -> None:
    program = "import sys; print('one'); print('two', file=sys.stderr); print('', flush=True); sys.exit(3)"
    log = tmp_path / "logs" / "a.log"
    for _ in range(2):
        assert run_child([sys.executable, "-u", "-c", program], log) == (3, "two")
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
    told, log = "import sys; print(sys.argv[1])", tmp_path / "log"
    assert run_child([sys.executable, "-c", told, report], log) == (0, "exitcode  : -9 (pid: 4711)")
    assert report in log.read_text()
    lines = f"error: the disk is full\nstopped: another process of this run has ended\n{report}"
    assert run_child([sys.executable, "-c", told, lines], log) == (0, "error: the disk is full")


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
    assert run_child([sys.executable, "-c", program], tmp_path / "a.log") == (0, found)


def test_what_a_child_has_left_behind_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    """It holds the pipe that the child printed to."""
    program = "import subprocess, sys; print(subprocess.Popen(['sleep', '900']).pid)"
    code, left = run_child([sys.executable, "-c", program], tmp_path / "log")
    assert code == 0
    os.kill(int(left), signal.SIGKILL)  # an error if it has ended


def test_children_are_stopped_together_and_killed_by_a_second_ctrl_c(tmp_path: Path, capsys) -> None:
    program = "import signal, time; signal.signal(2, lambda *_: {}); print('deaf', flush=True); time.sleep(600)".format(
        "print('asked', flush=True)"
    )
    children = [Child([sys.executable, "-c", program], tmp_path / f"{n}.log") for n in range(2)]
    wait_for(lambda: all(child.last == "deaf" for child in children))

    def strike() -> None:  # once both have been asked, which stop_all does before it says so
        wait_for(lambda: all(child.last == "asked" for child in children))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=strike, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        stop_all(children)
    assert [child.wait(300) for child in children] == [-signal.SIGKILL] * 2
    assert [child.last for child in children] == ["asked"] * 2
    assert "Ctrl-C again to kill" in capsys.readouterr().out


def test_a_schedulers_signal_that_comes_again_does_not_kill_who_still_saves(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, time; signal.signal(2, lambda *_: print('asked', flush=True)); print('begun')\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
        "print('saved')"
    )
    child = Child([sys.executable, "-u", "-c", program, str(tmp_path / "go")], tmp_path / "log")
    wait_for(lambda: child.last == "begun")

    def strike() -> None:
        wait_for(lambda: child.last == "asked")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)  # in which it would be killed
        (tmp_path / "go").touch()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    stop_on_signals()
    threading.Thread(target=strike, daemon=True).start()
    try:
        stop_all([child])
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert (child.wait(300), child.last) == (0, "saved")


def test_a_closed_terminal_does_not_kill_who_still_saves(tmp_path: Path) -> None:
    program = (
        "import signal, sys, time; asked = []; signal.signal(2, lambda *_: asked.append(1)); print('begun')\n"
        "while not asked: time.sleep(0.01)\n"
        "time.sleep(0.5); print('saved')"
    )
    child = Child([sys.executable, "-u", "-c", program], tmp_path / "log")
    wait_for(lambda: child.last == "begun")
    with closed_terminal():
        stop_all([child])
    assert (child.wait(300), child.last) == (0, "saved")


def test_a_second_ctrl_c_kills_the_processes_of_torchrun_too(tmp_path: Path) -> None:
    """They have sessions of their own, and would go on without it."""
    program = tmp_path / "deaf.py"
    program.write_text(
        "import os, pathlib, signal, time\n"
        "def note(what): pathlib.Path(__file__).with_name(f'{what}-{os.getpid()}').touch()\n"
        "signal.signal(signal.SIGTERM, lambda *_: note('asked'))\n"
        "note('begun')\n"
        "while True: time.sleep(1)\n"
    )

    def noted(what: str) -> list[int]:
        wait_for(lambda: len(list(tmp_path.glob(f"{what}-*"))) == 2)
        return [int(path.name.partition("-")[2]) for path in tmp_path.glob(f"{what}-*")]

    torchrun = Child([*launcher(2), str(program)], tmp_path / "log")
    processes = noted("begun")

    def strike() -> None:
        noted("asked")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=strike, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        stop_all([torchrun])
    assert torchrun.wait(300) == -signal.SIGKILL
    wait_for(lambda: not any(begun(process) for process in processes))  # its zombie is nobody


def test_torchrun_leaves_its_processes_time_to_save(tmp_path: Path, monkeypatch) -> None:
    """By torch's own reading of the environment, whose default is half a minute."""
    program = "from torch.distributed.launcher.api import LaunchConfig as C; print(C(1, 1, 1).shutdown_timeout)"
    if "shutdown_timeout" not in {field.name for field in fields(LaunchConfig)}:
        pytest.skip("this torch leaves half a minute, whatever it is told")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    assert run_child([sys.executable, "-c", program], tmp_path / "log") == (0, "600")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "90")
    assert surroundings()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "90"


def test_who_comes_first_to_the_meeting_of_nodes_waits(monkeypatch) -> None:
    """What torch makes of the command: how long it tries to reach the endpoint, and waits for the others there."""
    _, _, _, *flags = launcher(2, 2, "node7:29500", "a-name")
    config, _, _ = config_from_args(parse_args([*flags, "-m", "transfer.classification"]))
    options = dict(config.rdzv_configs)
    asked = []

    def store(host: str, port: int, timeout: timedelta, **others: object) -> None:
        asked.append((host, port, timeout))

    monkeypatch.setattr(c10d_rendezvous_backend, "TCPStore", store)
    meeting = RendezvousParameters(
        config.rdzv_backend, config.rdzv_endpoint, config.run_id, config.min_nodes, config.max_nodes, **options
    )
    c10d_rendezvous_backend._create_tcp_store(meeting)
    week = 7 * 24 * 3600
    assert asked == [("node7", 29500, timedelta(seconds=week))]
    assert meeting.get_as_int("join_timeout") == week
