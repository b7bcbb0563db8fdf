"""The claim on a folder that runs write to: who is kept out, what is said, who takes over, and what is cleared."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mae_core import claim
from mae_core.claim import Watch, claimed, take_claim
from mae_core.errors import UserError
from tests.fixtures import ROOT

HOLD = """
import sys, time
from pathlib import Path
from mae_core.claim import take_claim
take_claim(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(600)
"""
# Every process does what is left of the jobs; each writes down when it begins and ends one.
WORK = """
import os, sys, time
from pathlib import Path
from mae_core.claim import claimed
from mae_core.errors import UserError
out, jobs = Path(sys.argv[1]), int(sys.argv[2])
def note(text):
    log = os.open(out / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, text.encode())
    os.close(log)
while left := [n for n in range(jobs) if not (out / str(n) / "record").exists()]:
    for n in left:
        try:
            with claimed(out / str(n)):
                if not (out / str(n) / "record").exists():
                    note(f"begin {n}\\n")
                    time.sleep(0.02)
                    note(f"end {n}\\n")
                    (out / str(n) / "record").touch()
        except UserError:
            time.sleep(0.05)
"""


def start(program: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


class Clock:
    """Stands for the module `time`: it goes on only while somebody sleeps, and what is to happen meanwhile does."""

    def __init__(self) -> None:
        self.now, self.happens = 1000.0, lambda: None

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.happens()


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(claim, "time", clock)
    return clock


def elsewhere(folder: Path) -> Path:
    """A claim of another machine."""
    folder.mkdir(exist_ok=True)
    path = folder / ".claim.0"
    path.write_text(json.dumps(claim.this_process() | {"host": "node7", "place": "another boot", "pid": 4711}))
    return path


def test_a_second_run_is_refused_and_the_first_one_named(tmp_path):
    with claimed(tmp_path / "new"):
        said = rf"new is in use by another run \(process {os.getpid()}, since 20.*\): wait, or use another --out"
        with pytest.raises(UserError, match=said):
            take_claim(tmp_path / "new")
        take_claim(tmp_path / "other").release()
    take_claim(tmp_path / "new").release()


def test_waiting_ends_with_the_holder(tmp_path, capsys, clock):
    held = take_claim(tmp_path)
    clock.happens = lambda: clock.now > 1001 and held.release()
    take_claim(tmp_path, wait=True).release()
    assert held.ended.is_set()
    assert f"{tmp_path} is in use by another run" in capsys.readouterr().err


def test_a_killed_holder_leaves_no_claim(tmp_path):
    holder = start(HOLD, tmp_path)
    assert holder.stdout.readline() == "taken\n"
    with pytest.raises(UserError, match=f"process {holder.pid}, since"):
        take_claim(tmp_path)
    holder.send_signal(signal.SIGSTOP)  # it stands still, as on a suspended machine, and may go on
    assert Watch(tmp_path).holder()["pid"] == holder.pid
    holder.kill()
    while Watch(tmp_path).holder():  # a zombie, until it is waited for, is no holder
        time.sleep(0.01)
    take_claim(tmp_path).release()
    holder.communicate()


def test_another_process_of_the_same_id_is_not_the_holder(tmp_path):
    (tmp_path / ".claim.3").write_text(json.dumps(claim.this_process() | {"begun": "12"}))
    assert Watch(tmp_path).holder() is None
    assert take_claim(tmp_path).number == 4
    assert sorted(os.listdir(tmp_path)) == [".claim.4"]


def test_another_machine_is_believed_while_it_touches_its_claim(tmp_path, clock, capsys):
    path, beats = elsewhere(tmp_path), [clock.now]

    def beat() -> None:
        if clock.now > beats[-1] + claim.BEAT:
            beats.append(clock.now)
            hours = 5 * (len(beats) % 2)  # its clock is hours off, and once set back
            os.utime(path, (1_000_000_000 + len(beats) - 3600 * hours,) * 2)

    clock.happens = beat
    with pytest.raises(UserError, match=r"process 4711 on node7, since"):
        take_claim(tmp_path)
    assert clock.now < 1000 + 2 * claim.BEAT
    watch = Watch(tmp_path)
    while clock.now < 1000 + 3 * claim.SILENT:
        assert watch.holder()["host"] == "node7"
        clock.sleep(0.5)
    clock.happens = lambda: None
    last = clock.now
    assert take_claim(tmp_path).number == 1  # as nothing touches it now
    assert last + claim.SILENT <= clock.now < last + claim.SILENT + 1
    assert "watching for 120 s whether it is at work" in capsys.readouterr().err


def test_a_claim_that_is_being_written_is_respected_and_one_that_stays_empty_is_not(tmp_path, clock):
    (tmp_path / ".claim.0").touch()
    watch = Watch(tmp_path)
    assert watch.holder() == {}
    assert take_claim(tmp_path).number == 1
    assert 1000 + claim.SILENT <= clock.now < 1000 + claim.SILENT + 1


def test_a_watcher_that_stood_still_itself_begins_to_watch_anew(tmp_path, clock):
    """A call of NFS took ten minutes, in which nobody could touch the claim."""
    elsewhere(tmp_path)
    watch = Watch(tmp_path)
    assert watch.holder()["host"] == "node7"
    clock.now += 600
    awake = clock.now
    while watch.holder():
        clock.sleep(0.5)
    assert awake + claim.SILENT <= clock.now < awake + claim.SILENT + 1


def test_a_run_whose_claim_was_taken_over_ends_before_it_does_harm(tmp_path):
    """Who takes over deletes the file that the old holder touches."""
    program = HOLD.replace("take_claim(Path", "import mae_core.claim as c; c.BEAT = 0.05\ntake_claim(Path")
    sleeper = start(program, tmp_path)
    assert sleeper.stdout.readline() == "taken\n"
    other = claim.create(tmp_path, 1)
    assert os.listdir(tmp_path) == [".claim.1"]
    _, said = sleeper.communicate(timeout=300)
    other.release()
    assert sleeper.returncode == 1
    assert said == f"error: {tmp_path}: another run took over while this one stood still\n"


def test_who_saw_an_old_state_cannot_create_an_old_claim_again(tmp_path):
    """It had found claim 0 abandoned; since then 1 was taken, released and, by the owner of 2, deleted."""
    late = 0 + 1
    first, second = take_claim(tmp_path), None
    first.release()
    (tmp_path / ".claim.0").rename(tmp_path / ".claim.1")
    second = take_claim(tmp_path)
    assert (second.number, os.listdir(tmp_path)) == (2, [".claim.2"])
    assert claim.create(tmp_path, late) is None
    assert os.listdir(tmp_path) == [".claim.2"]
    assert claim.create(tmp_path, 2) is None
    second.release()


def test_a_hundred_processes_do_every_job_once_and_none_together(tmp_path):
    jobs = 8
    workers = [start(WORK, tmp_path, jobs) for _ in range(100)]
    assert [(w.communicate(timeout=900)[1], w.returncode) for w in workers] == [("", 0)] * 100
    events = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert Counter(map(tuple, events)) == Counter({(what, str(n)): 1 for what in ("begin", "end") for n in range(jobs)})


def test_what_killed_runs_left_is_cleared_and_nothing_else(tmp_path):
    leftovers = (".record.json.4711.part", ".train.0.part", ".tmpAb12x_")
    others = ("checkpoint.pth", "notes.part", ".hidden", ".tmp", "a.tmp", ".tmp-mine", ".claim.x")
    for name in (*leftovers, *others):
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmpfolder").mkdir()
    take_claim(tmp_path).release()
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".tmpfolder", ".claim.0"}


def test_a_claim_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".claim.0").symlink_to(tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "linked"):
        with pytest.raises(UserError, match=f"{folder / '.claim'} cannot be written: "):
            take_claim(folder)
    assert (tmp_path / "file").read_text() == "x"


def test_the_owner_is_described(tmp_path):
    with claimed(tmp_path):
        owner = json.loads((tmp_path / ".claim.0").read_text())
    assert (owner["host"], owner["pid"]) == (socket.gethostname(), os.getpid())
    assert (tmp_path / ".claim.0").read_text() == "released\n"
