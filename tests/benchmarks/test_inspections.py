"""Several sets are looked at at a time: what is found, and what is not lost when a process is."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks import inspections
from benchmarks.inspections import inspect_all, look
from benchmarks.suite import TASKS
from mae_core.errors import UserError
from tests.fixtures.transfer import write_imagenet
from transfer.data.findings import Data
from transfer.jobs import find_tasks


@pytest.fixture(autouse=True)
def four_cores(monkeypatch) -> None:
    monkeypatch.setattr(inspections, "cores", lambda: 4)


def test_all_tasks_find_what_they_find_one_by_one(tmp_path):
    """Of a folder's task too, whose function is made on the spot."""
    root = write_imagenet(tmp_path, train=2, val=1)
    tasks = [*TASKS, *find_tasks([f"folder:{root / 'imagenet'}"], TASKS)]
    titles = {task.inspect: task.name for task in tasks}
    assert len(titles) > 10
    found = inspect_all(titles, root, 1)
    assert found == {function: look(function, root, 1) for function in titles}
    assert {data.status for data in found.values()} >= {"found", "missing"}


def test_they_run_side_by_side(tmp_path):
    def meet(root: Path, mine: str, other: str) -> Data:
        (root / mine).touch()
        deadline = time.monotonic() + 300
        while not (root / other).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return Data(str(root), "found", f"{os.getpid()}")

    both = [partial(meet, mine="a", other="b"), partial(meet, mine="b", other="a")]
    found = inspect_all(dict.fromkeys(both, ""), tmp_path, 0)
    assert len({data.detail for data in found.values()} | {str(os.getpid())}) == 3


def test_what_a_killed_process_would_have_found_is_found_here(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(inspections, "SAYING", 600)  # however slow this machine is

    def killed(root: Path) -> Data:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return Data(str(root), "found", "here")

    parent, well = os.getpid(), lambda root: Data(str(root), "found", "there")
    assert [data.detail for data in inspect_all({killed: "", well: ""}, tmp_path, 0).values()].count("here") == 1

    def wrong(root: Path) -> Data:
        raise UserError("such data")

    with pytest.raises(UserError, match="such data"):
        inspect_all({wrong: "", well: ""}, tmp_path, 0)
    assert capfd.readouterr().err == ""


def test_a_stop_ends_them_and_long_ones_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inspections, "SAYING", 0.2)

    def endless(root: Path) -> Data:
        (root / str(os.getpid())).touch()
        time.sleep(600)
        raise AssertionError

    def stop(running: list, seconds: float) -> list:  # once both are at work and have been named
        if len(list(tmp_path.iterdir())) == 2 and waited[-2:] == [0, 0]:
            os.kill(os.getpid(), signal.SIGINT)
        ready = wait(running, seconds)
        waited.append(len(ready))
        return ready

    waited, wait = [], inspections.wait
    monkeypatch.setattr(inspections, "wait", stop)
    with pytest.raises(KeyboardInterrupt):
        inspect_all({endless: "one", partial(endless): "another"}, tmp_path, 0)
    assert f"looking at the data below {tmp_path}: one, another" in capsys.readouterr().err
    for name in os.listdir(tmp_path):
        deadline = time.monotonic() + 300
        while Path("/proc", name).exists() and "Z" not in Path("/proc", name, "stat").read_text().split()[2]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
