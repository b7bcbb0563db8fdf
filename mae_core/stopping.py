"""What signals do: Ctrl-C, a scheduler's SIGTERM and a closed terminal's SIGHUP stop a run alike."""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
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
    come_again_if_lost()


def come_again_if_lost() -> None:
    """From now on a KeyboardInterrupt that Python can only print, since it was raised in a `__del__`, a callback of a
    weak reference (each import has one) or a hook around a fork, comes again a moment later."""
    sys.unraisablehook = lost


def lost(what: "sys.UnraisableHookArgs") -> None:
    if issubclass(what.exc_type, KeyboardInterrupt):
        with contextlib.suppress(RuntimeError):  # Python is ending
            _thread.start_new_thread(interrupt, ())  # without threading's locks, which the main thread may hold
    else:
        sys.__unraisablehook__(what)


def interrupt() -> None:
    time.sleep(0.01)  # until then the main thread has left what could not pass it on, or it comes once more
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@contextmanager
def stop_postponed() -> Iterator[None]:
    """A signal that comes within is answered at the end. A library in C or Rust that KeyboardInterrupt interrupts may
    raise another error in its place, such as that of a damaged file."""
    if threading.current_thread() is not threading.main_thread():  # whom alone signals interrupt
        yield
        return
    own, came = os.getpid(), list[int]()
    before = {number: signal.signal(number, lambda n, frame: came.append(n)) for number in stop_signals()}
    try:
        yield
    finally:
        if os.getpid() == own:
            for number, handler in before.items():
                signal.signal(number, handler)
            for number in came[:1]:
                signal.raise_signal(number)


@contextmanager
def stop_held() -> Iterator[None]:
    """`stop_postponed` for forks: what a handler raises while Python prepares one or tidies up after it is lost. In a
    process that is forked within, signals wait until it has set its handlers and called `admit_stop`."""
    own, before = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    try:
        with stop_postponed():  # another thread may take the signal, and the main one then calls the handler
            yield
    finally:
        if os.getpid() == own:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def admit_stop() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """A list that each of them enters, so that the current step ends before anything is saved. A second Ctrl-C raises
    KeyboardInterrupt at once; no other signal does, since a scheduler's to all processes comes once more from the
    parent or torchrun. What came after the last step does so at the end."""
    stop: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in stop:
            raise KeyboardInterrupt
        stop.append(number)

    before = {number: signal.signal(number, ask) for number in stop_signals()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number in stop[:1]:
        signal.raise_signal(number)
