"""One run at a time in a folder that runs write to: its lock, and what killed runs left there."""

import contextlib
import fcntl
import json
import os
import re
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mae_core.errors import UserError
from mae_core.writing import named_if_refused

LOCK_FILE = ".lock"
FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
LINGER = 15.0  # seconds within which the workers of a killed process see that it is gone, and end
# What `replacing` and safetensors call a file until it is whole.
LEFTOVER = re.compile(r"\..+\.\d+\.part|\.tmp\w{6}")


@dataclass
class Lock:
    """A held lock; it ends with `release`, or with the last process that has its descriptor. owner: what its file says
    about who holds it (host, pid, since, child)."""

    descriptor: int
    owner: dict[str, Any]

    def name_child(self, pid: int) -> None:
        """Write down the process that has inherited the descriptor: it may outlive this one."""
        self.owner["child"] = pid
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, json.dumps(self.owner).encode(), 0)

    def release(self) -> None:
        os.close(self.descriptor)


def take_lock(folder: Path, wait: bool = False) -> Lock:
    """Lock a folder, which is made if missing, and clear it of what killed runs left. UserError that names who holds it
    already; wait: until that one ends, instead."""
    with named_if_refused(folder / LOCK_FILE):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock(folder)
    lock = Lock(descriptor, {"host": socket.gethostname(), "pid": os.getpid()})
    try:
        acquire(descriptor, folder, wait)
        lock.owner["since"] = datetime.now(UTC).isoformat(timespec="seconds")
        lock.name_child(0)
        clear_leftovers(folder)
    except BaseException:
        lock.release()
        raise
    return lock


def open_lock(folder: Path) -> int:
    """The folder's lock file, open; on a file system without locks, one of this machine that stands for it."""
    descriptor = os.open(folder / LOCK_FILE, FLAGS, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # changes nothing, but fails where there are no locks
    except OSError as e:
        os.close(descriptor)
        what = f"{folder} is on a file system without locks ({e.strerror}): other machines are not kept out"
        print(f"{what}, so use it from one at a time", file=sys.stderr, flush=True)
        found = os.stat(folder)
        name = f"mae-transfer-{os.getuid()}-{found.st_dev}-{found.st_ino}.lock"
        return os.open(Path(tempfile.gettempdir(), name), FLAGS, 0o600)
    return descriptor


def acquire(descriptor: int, folder: Path, wait: bool) -> None:
    deadline = time.monotonic() + LINGER
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = read_owner(descriptor)
        at_work = owner.get("host") != socket.gethostname() or alive(owner.get("pid")) or alive(owner.get("child"))
        if not wait and ((owner and at_work) or time.monotonic() > deadline):
            raise UserError(f"{folder} is in use by {in_words(owner)}")
        time.sleep(0.1)


def read_owner(descriptor: int) -> dict[str, Any]:
    """Who wrote the lock's file; nothing while it is being written."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def alive(pid: Any) -> bool:
    """Whether this machine has such a process."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def in_words(owner: dict[str, Any]) -> str:
    pid, child, host = (owner.get(key) for key in ("pid", "child", "host"))
    where = f" on {host}" if host != socket.gethostname() else ""
    if where or alive(pid):
        return f"another run (process {pid}{where}, since {owner.get('since')}): wait, or use another --out"
    left = f"process {child}" if alive(child) else "a process"
    stop = f", or stop it (kill {child}; it saves first)" if alive(child) else ""
    return f"what is left of another run: {left} that process {pid} had started, which was killed: wait for it{stop}"


def clear_leftovers(folder: Path) -> None:
    """Delete the files that killed runs had not finished. Only for who holds the folder's lock."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if LEFTOVER.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
