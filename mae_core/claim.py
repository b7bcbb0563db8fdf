"""One process at a time in a folder that runs write to: its claim, and what killed runs left there.

The claim is the file `.claim.N` with the highest N. Only one process can create it (O_EXCL), on shared file systems
without locks too. Whoever takes over, also after a release, creates N + 1. The highest one is never deleted: a process
that has seen an older state may create a lower one by mistake, and then sees that it is not the highest.

Its owner touches it every few seconds. On the same machine a claim ends with its owner's process. On another one it
ends when it has not been touched for a while by the clock of the one who watches, so that no two clocks are compared.
"""

import contextlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from mae_core.errors import UserError
from mae_core.writing import named_if_refused

CLAIM_FILE = re.compile(r"\.claim\.(\d{1,9})")
RELEASED = b"released\n"
BEAT = 10.0  # seconds between two touches
SILENT = 120.0  # seconds without one after which the owner counts as gone
# What `replacing` and safetensors call a file until it is whole.
LEFTOVER = re.compile(r"\..+\.\d+\.part|\.tmp\w{6}")


class InUse(UserError):
    """Another run holds the folder."""


class Claim:
    """A held claim: touched by a thread of its own until `release`."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        self.ended = threading.Event()
        threading.Thread(target=self.keep, daemon=True, name=f"claim on {folder}").start()

    @property
    def path(self) -> Path:
        return self.folder / f".claim.{self.number}"

    def keep(self) -> None:
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):  # the next one may come through; who takes over deletes the file
                os.utime(self.path, follow_symlinks=False)
            latest = self.number
            with contextlib.suppress(OSError):
                latest = highest(self.folder)
            if latest > self.number and not self.ended.is_set():
                # What this process writes from here on would mix with what the other one does.
                print(f"error: {self.folder}: another run took over while this one stood still", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    def release(self) -> None:
        self.ended.set()
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                os.pwrite(descriptor, RELEASED, 0)
                os.ftruncate(descriptor, len(RELEASED))
            finally:
                os.close(descriptor)


class Watch:
    """Looks at the claim on a folder again and again, at least every 2 * BEAT seconds: a claim of another machine shows
    only by its touches whether it still holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = -1  # of the claim looked at; -1: there is none
        self.seen: tuple[int, int] = (-1, 0)  # that number and the time of its last touch
        self.since = 0.0
        self.looked = 0.0  # when it last did: it may itself have stood still, as in a call of NFS
        self.certain = False  # the holder is known to be at work

    def holder(self) -> dict[str, Any] | None:
        """What the claim says about its owner ({}: it does not say yet); None if nobody holds the folder, or only one
        who is gone."""
        number = self.number = highest(self.folder)
        if number < 0:
            return None
        try:
            descriptor = os.open(self.folder / f".claim.{number}", os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:  # taken over and deleted meanwhile
            return {}
        try:  # opened anew each time: only then does NFS ask the server
            content, touched = os.pread(descriptor, 4096, 0), os.fstat(descriptor).st_mtime_ns
        finally:
            os.close(descriptor)
        if content.startswith(RELEASED):
            return None
        owner = parsed(content)
        if owner.get("place") == place():
            self.certain = is_alive(owner)
            return owner if self.certain else None
        now = time.monotonic()
        if self.seen != (number, touched):
            self.certain = self.seen[0] == number
            self.seen, self.since = (number, touched), now
        elif now - self.looked > 2 * BEAT:  # nobody watched meanwhile
            self.since = now
        self.looked = now
        return owner if now - self.since < SILENT else None


def take_claim(folder: Path, wait: bool = False, patience: float = math.inf) -> Claim:
    """Claim a folder, which is made if missing, and clear it of what killed runs left. InUse, which names who holds it
    already; wait: until that one ends, instead, or for `patience` seconds (more than SILENT)."""
    with named_if_refused(folder / ".claim"):
        folder.mkdir(parents=True, exist_ok=True)
        watch, told, deadline = Watch(folder), False, time.monotonic() + patience
        while True:
            owner = watch.holder()
            if owner is None and (claim := create(folder, watch.number + 1)):
                clear_leftovers(folder)
                return claim
            if owner and ((watch.certain and not wait) or time.monotonic() > deadline):
                raise InUse(f"{folder} is in use by {in_words(owner)}: wait, or use another --out")
            if owner and not told:
                told = True
                what = "waiting for it" if wait else f"watching for {SILENT:.0f} s whether it is at work"
                print(f"{folder} is in use by {in_words(owner)}: {what}", file=sys.stderr, flush=True)
            time.sleep(0.05 if owner is None else 0.2)


@contextlib.contextmanager
def claimed(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the claim on a folder for a block (`take_claim`)."""
    claim = take_claim(folder, wait)
    try:
        yield
    finally:
        claim.release()


def create(folder: Path, number: int) -> Claim | None:
    """The claim with this number, one above that whose owner is gone; None if another process was quicker."""
    path = folder / f".claim.{number}"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    except FileExistsError:
        return None
    try:
        os.write(descriptor, json.dumps(this_process()).encode())
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    if highest(folder) != number:  # others have come and gone since the owner was looked at
        path.unlink(missing_ok=True)
        return None
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (found := CLAIM_FILE.fullmatch(entry.name)) and int(found[1]) < number:
                os.unlink(entry.path)
    return Claim(folder, number)


def highest(folder: Path) -> int:
    """The number of the folder's latest claim; -1 if it has none."""
    try:
        with os.scandir(folder) as entries:
            found = [CLAIM_FILE.fullmatch(entry.name) for entry in entries]
    except FileNotFoundError:
        return -1
    return max((int(name[1]) for name in found if name), default=-1)


def parsed(content: bytes) -> dict[str, Any]:
    try:
        owner = json.loads(content)
    except ValueError:  # it is being written
        return {}
    return owner if isinstance(owner, dict) else {}


def this_process() -> dict[str, Any]:
    pid = os.getpid()
    owner = {"host": socket.gethostname(), "place": place(), "pid": pid, "begun": begun(pid)}
    owner |= {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "allocation": allocation()}
    return owner | {"since": datetime.now(UTC).isoformat(timespec="seconds")}


def allocation() -> str:
    """The scheduler's job, within which the numbers of GPUs mean the same."""
    return os.environ.get("SLURM_JOB_ID", "")


@cache
def place() -> str:
    """Where a process id means the same process: one start of one machine, and within it one space of ids, such as a
    container's."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def begun(pid: int) -> str:
    """When a process began, in ticks since the machine's start, as ids are used again; "" if it has ended, or where
    that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def is_alive(owner: dict[str, Any]) -> bool:
    """Whether this machine still runs the process."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if Path("/proc/self/stat").exists():
        return begun(pid) == owner.get("begun") != ""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def in_words(owner: dict[str, Any]) -> str:
    pid, host, since = (owner.get(key) for key in ("pid", "host", "since"))
    where = f" on {host}" if owner.get("place") != place() else ""
    return f"another run (process {pid}{where}, since {since})"


def clear_leftovers(folder: Path) -> None:
    """Delete the files that killed runs had not finished. Only for who holds the folder's claim."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if LEFTOVER.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
