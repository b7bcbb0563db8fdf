"""What signals do: Ctrl-C, a scheduler's SIGTERM and a closed terminal's SIGHUP stop a run alike."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def stop_signals() -> list[int]:
    """SIGHUP is among them unless it is ignored, as under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def stop_on_signals() -> None:
    """From now on each of them raises KeyboardInterrupt. SIGINT too: a script's background job inherits it ignored."""
    for number in stop_signals():
        signal.signal(number, signal.default_int_handler)


@contextmanager
def stop_postponed() -> Iterator[None]:
    """A signal that comes within is answered at the end. A library in C or Rust that KeyboardInterrupt interrupts may
    raise another error in its place, such as that of a damaged file."""
    if threading.current_thread() is not threading.main_thread():  # whom alone signals interrupt
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda n, frame: came.append(n)) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


@contextmanager
def stop_held() -> Iterator[None]:
    """A signal that comes within is answered at the end. For forks: what a handler raises while Python prepares one or
    tidies up after it is printed and lost. A process that is forked within lets signals in by `admit_stop`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def admit_stop() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """A list that each of them enters, so that the current step ends before anything is saved; a second signal raises
    KeyboardInterrupt at once."""
    stop: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    before = {number: signal.signal(number, ask) for number in stop_signals()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
