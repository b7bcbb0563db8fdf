"""The lock on a folder that runs write to: who is kept out, what is said, and what is cleared."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mae_core.errors import UserError
from mae_core.lock import LOCK_FILE, take_lock


def ended() -> int:
    """The id of a process that has ended."""
    done = subprocess.Popen(["true"])
    done.wait()
    return done.pid


def heir(lock, seconds: float) -> subprocess.Popen:
    """A process that has inherited the lock, as the child of a run that is now killed."""
    child = subprocess.Popen(["sleep", str(seconds)], pass_fds=(lock.descriptor,))
    lock.owner["pid"] = ended()
    lock.name_child(child.pid)
    lock.release()
    return child


def test_a_second_run_is_refused_and_the_first_one_named(tmp_path):
    lock = take_lock(tmp_path / "new")
    with pytest.raises(UserError, match=rf"new is in use by another run \(process {os.getpid()}, since 20.*wait, or"):
        take_lock(tmp_path / "new")
    take_lock(tmp_path / "other").release()
    lock.owner["host"] = "elsewhere"
    lock.name_child(0)
    with pytest.raises(UserError, match=rf"process {os.getpid()} on elsewhere, since"):
        take_lock(tmp_path / "new")
    lock.release()
    take_lock(tmp_path / "new").release()


def test_the_child_of_a_killed_run_keeps_the_lock_and_is_named(tmp_path):
    lock = take_lock(tmp_path)
    child = heir(lock, 60)
    said = rf"process {child.pid} that process {lock.owner['pid']} had started, which was killed.*kill {child.pid};"
    with pytest.raises(UserError, match=said):
        take_lock(tmp_path)
    child.kill()
    child.wait()
    take_lock(tmp_path).release()


def test_the_workers_of_a_killed_process_are_waited_for(tmp_path):
    """They hold what they have inherited until they see that it is gone."""
    lock = take_lock(tmp_path)
    worker = heir(lock, 0.5)
    (tmp_path / LOCK_FILE).write_text(f'{{"host": "{lock.owner["host"]}", "pid": {lock.owner["pid"]}, "child": 0}}')
    take_lock(tmp_path).release()
    worker.wait()


def test_waiting_ends_with_the_holder(tmp_path):
    lock = take_lock(tmp_path)
    child = subprocess.Popen(["sleep", "0.3"], pass_fds=(lock.descriptor,))
    lock.name_child(child.pid)
    lock.release()
    take_lock(tmp_path, wait=True).release()
    assert child.wait() == 0


def test_a_killed_holder_leaves_no_lock(tmp_path):
    program = "import sys, time; from pathlib import Path; from mae_core.lock import take_lock; "
    program += "take_lock(Path(sys.argv[1])); print('taken', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "taken\n"
    with pytest.raises(UserError, match=f"process {holder.pid}, since"):
        take_lock(tmp_path)
    holder.kill()
    holder.communicate()
    take_lock(tmp_path).release()


def test_what_killed_runs_left_is_cleared_and_nothing_else(tmp_path):
    leftovers = (".record.json.4711.part", ".train.0.part", ".tmpAb12x_")
    others = ("checkpoint.pth", "notes.part", ".hidden", ".tmp", "a.tmp", ".tmp-mine", LOCK_FILE)
    for name in (*leftovers, *others):
        (tmp_path / name).write_text("x")
    (tmp_path / ".tmpfolder").mkdir()
    take_lock(tmp_path).release()
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".tmpfolder"}


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_and_one_machine_still_runs_one_at_a_time(
    tmp_path, monkeypatch, capsys, number
):
    real, folder = fcntl.flock, tmp_path / "no locks"
    (tmp_path / "machine").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "machine"))

    def flock(descriptor: int, operation: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent == folder:
            raise OSError(number, os.strerror(number))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = take_lock(folder)
    assert f"{folder} is on a file system without locks ({os.strerror(number)})" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"in use by another run .process {os.getpid()},"):
        take_lock(folder)
    take_lock(tmp_path / "other").release()
    lock.release()
    take_lock(folder).release()


def test_a_lock_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / LOCK_FILE).symlink_to(tmp_path / "file")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "linked"):
        with pytest.raises(UserError, match=f"{folder / LOCK_FILE} cannot be written: "):
            take_lock(folder)
    assert (tmp_path / "file").read_text() == "x"
