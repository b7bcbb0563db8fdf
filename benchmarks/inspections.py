"""What the tasks find of their data: several sets at a time, since the official ones have millions of files."""

import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from mae_core.machine import cores
from mae_core.stopping import admit_stop, stop_held, stop_signals
from transfer.data.findings import Data, guarded, limited

Inspect = Callable[[Path], Data]
SAYING = 10.0  # seconds after which, and after which again, a plan says what it still looks at


def inspect_all(titles: Mapping[Inspect, str], root: Path, limit: int) -> dict[Inspect, Data]:
    """What each function finds below root, `limited`; on Linux in as many processes at a time as there are cores.
    titles: of what they look at."""
    places = min(cores(), len(titles)) if sys.platform == "linux" else 1
    functions = list(titles)
    found = in_processes(functions, list(titles.values()), root, limit, places) if places > 1 else {}
    # What a process did not find, since it was killed or met an error, is looked at again, where that is seen.
    return {each: found[i] if i in found else look(each, root, limit) for i, each in enumerate(functions)}


def in_processes(
    functions: Sequence[Inspect], titles: Sequence[str], root: Path, limit: int, places: int
) -> dict[int, Data]:
    """What they find, by their numbers. Each process takes the next number from one pipe until that is empty."""
    context = multiprocessing.get_context("fork")  # a new process would import torch first
    numbers, into = os.pipe()
    os.write(into, bytes(reversed(range(len(functions)))))  # COCO's annotations take longest: not at last
    os.close(into)
    running: dict[Connection, BaseProcess] = {}
    at: dict[Connection, int] = {}  # what a process is looking at
    found: dict[int, Data] = {}
    try:
        for _ in range(places):
            receiver, sender = context.Pipe(duplex=False)
            given = (sender, numbers, functions, root, limit)
            running[receiver] = context.Process(target=answer, args=given, daemon=True)
            with stop_held():
                running[receiver].start()
            sender.close()
        while running:
            ready = wait(list(running), SAYING)
            if not ready:
                now = ", ".join(titles[number] for number in sorted(at.values()))
                print(f"looking at the data below {root}: {now}", file=sys.stderr, flush=True)
            for receiver in [each for each in running if each in ready]:
                try:
                    at[receiver], data = receiver.recv()
                except EOFError:
                    running.pop(receiver).join()
                    at.pop(receiver, None)
                    continue
                if data is not None:
                    found[at.pop(receiver)] = data
    finally:
        os.close(numbers)
        for process in running.values():
            if process.pid is not None:  # else it could not be started
                process.kill()
    return found


def look(function: Inspect, root: Path, limit: int) -> Data:
    return limited(guarded(function, root), limit)


def answer(sender: Connection, numbers: int, functions: Sequence[Inspect], root: Path, limit: int) -> None:
    """In a process of its own, which says nothing of its errors: (number, None) before it looks, (number, what it
    found) then."""
    for stop in stop_signals():
        signal.signal(stop, signal.SIG_DFL)
    admit_stop()
    gc.disable()  # it would look through millions of names again and again, and there are no cycles
    parent = os.getppid()
    try:
        while (taken := os.read(numbers, 1)) and os.getppid() == parent:
            sender.send((taken[0], None))
            sender.send((taken[0], look(functions[taken[0]], root, limit)))
    except BaseException:
        os._exit(1)
