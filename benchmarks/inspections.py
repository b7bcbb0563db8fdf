"""What the tasks find of their data: several sets at a time, since the official ones have millions of files."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
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
    waiting = list(titles)
    found: dict[Inspect, Data] = {}
    if places < 2:
        return {function: look(function, root, limit) for function in waiting}
    context = multiprocessing.get_context("fork")  # a new process would import torch first
    running: dict[Connection, tuple[multiprocessing.process.BaseProcess, Inspect]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < places:
                function = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                started = context.Process(target=answer, args=(sender, function, root, limit), daemon=True)
                with stop_held():
                    started.start()
                sender.close()
                running[receiver] = started, function
            ready = wait(list(running), SAYING)
            if not ready:
                at = ", ".join(titles[function] for _, function in running.values())
                print(f"looking at the data below {root}: {at}", file=sys.stderr, flush=True)
            for receiver in [each for each in running if each in ready]:
                process, function = running.pop(receiver)
                try:
                    found[function] = receiver.recv()
                except EOFError:  # killed, or an error: again, where it is seen
                    found[function] = look(function, root, limit)
                process.join()
    finally:
        for process, _ in running.values():
            process.kill()
    return found


def look(function: Inspect, root: Path, limit: int) -> Data:
    return limited(guarded(function, root), limit)


def answer(sender: Connection, function: Inspect, root: Path, limit: int) -> None:
    """In a process of its own, which says nothing of its errors."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_DFL)
    admit_stop()
    try:
        sender.send(look(function, root, limit))
    except BaseException:
        os._exit(1)
