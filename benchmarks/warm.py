"""Child processes that start in a moment: forks of a server that has imported what they need.

Importing torch, torchvision and timm takes longer than a small job. The server does it once, or is itself the fork of
a process that has done so. It computes nothing and starts no thread, so that its forks are as good as new processes:
each has a session, an environment and an exit code of its own. The server ends after its client and its last fork.

A client's socket to the server carries two descriptors for each child: a channel, and where the child prints. On the
channel the client sends a line of JSON, then the numbers of the signals that the child shall get; the server answers
with the child's process number and, at its end, with its exit code.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import IO, Any, NoReturn

from benchmarks.imports import import_late_ones, importing
from mae_core.stopping import stop_held

FAMILIES = "transfer."  # python -m transfer.NAME runs tasks that are in transfer.NAME.tasks
# A server's forks have its environment, since libraries read theirs when they are loaded. But for these:
READ_LATE = {"CUDA_VISIBLE_DEVICES"}
GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # NVIDIA's driver, also under Windows; AMD's
SAVING = 600  # seconds that torchrun leaves its processes to finish a step and save; by default 30
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # a scheduler sends them to all processes of a job


def waiting(environment: Mapping[str, str]) -> dict[str, str]:
    """How long OpenMP's threads spin at a barrier before they sleep, unless the user says it. By default it is so long
    that beside one other busy process a training on two cores kept 16 % of one core's speed (docs/speed.md)."""
    return {} if "OMP_WAIT_POLICY" in environment else {"GOMP_SPINCOUNT": "10000"}


def surroundings() -> dict[str, str]:
    """The environment of the children of this process."""
    saving = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING)}
    return {**saving, **waiting(os.environ), **os.environ, "PYTHONUNBUFFERED": "1"}


def start(command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen | Fork":
    """Start a child that prints to its `stdout`, in a session of its own: else the terminal's Ctrl-C would reach it
    twice. One that runs tasks is forked, but on macOS, whose libraries do not bear that."""
    if forks(command):
        try:
            return Fork(server(shared(environment)), command, environment)
        except OSError:  # it was killed
            server.cache_clear()
            return Fork(server(shared(environment)), command, environment)
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def forks(command: Sequence[str]) -> bool:
    """Whether `start` forks it."""
    return sys.platform == "linux" and list(command[:2]) == [sys.executable, "-m"] and command[2].startswith(FAMILIES)


def shared(environment: Mapping[str, str]) -> frozenset[tuple[str, str]]:
    """What a server and its forks have in common."""
    return frozenset((name, value) for name, value in environment.items() if name not in READ_LATE)


class Server:
    """A server, as its client has it."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control


OWN: dict[frozenset[tuple[str, str]], Server] = {}  # a fork of this process, until it is used


@lru_cache(maxsize=1)
def server(environment: frozenset[tuple[str, str]]) -> Server:
    """The server of this environment; that of another one before it ends with its last fork."""
    if environment in OWN:
        return OWN.pop(environment)
    control, theirs = socket.socketpair()
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            env=dict(environment),
            pass_fds=[theirs.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Server(control)


def fork_server(environment: Mapping[str, str]) -> None:
    """Make a fork of this process, which has imported under that environment and computed nothing, its server: nobody
    imports again. In the server and its forks this does not return."""
    control, theirs = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    with stop_held():
        try:
            number = os.fork()
        except OSError:  # there is no room for another process: later there may be
            return
        if number:
            theirs.close()
            OWN[shared(environment)] = Server(control)
            return
        os.setsid()
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        for stop in STOPS:
            if signal.getsignal(stop) != signal.SIG_IGN:  # as nohup leaves it
                signal.signal(stop, signal.default_int_handler if stop == signal.SIGINT else signal.SIG_DFL)
    control.close()
    serve(theirs)


class Fork:
    """A child of a server, with what is used of a Popen."""

    def __init__(self, server: Server, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """OSError if the server is gone."""
        self.channel, theirs = socket.socketpair()
        out, into = os.pipe()
        self.stdout: IO[str] = os.fdopen(out, errors="replace")
        self.returncode: int | None = None
        self.answers = b""
        try:
            socket.send_fds(server.control, [b"1"], [theirs.fileno(), into])
        finally:
            theirs.close()
            os.close(into)
        request = {"command": list(command), "environment": dict(environment), "folder": os.getcwd()}
        self.channel.sendall(json.dumps(request).encode() + b"\n")

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, as Popen's; subprocess.TimeoutExpired if it still runs after that time."""
        while self.returncode is None:
            if not select.select([self.channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a fork", timeout or 0)
            self.take(self.channel.recv(64))
        return self.returncode

    def take(self, answer: bytes) -> None:
        self.answers += answer
        number, *codes = self.answers.split(b"\n")[:-1] or [b""]
        if codes:
            self.returncode = int(codes[0])
        elif not answer:  # the server was killed: nobody would say how the child ends
            self.returncode = -signal.SIGKILL
            if number:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(number), signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """By the server, which knows whether the child still runs. If it does not run yet, it gets the signal then."""
        with contextlib.suppress(OSError):
            self.channel.sendall(b"%d\n" % number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """A server's own side: what it does for its client, and its forks that still run."""

    def __init__(self, control: socket.socket) -> None:
        self.before = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
        self.control: socket.socket | None = control  # None: the client has ended
        self.channels: dict[int, socket.socket] = {}  # by process number
        self.deserted: set[int] = set()  # forks whose client has ended
        self.alarm, self.bell = socket.socketpair()
        self.bell.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(self.bell.fileno())

    def serve(self) -> dict[str, Any] | None:
        """In a fork, what it shall do; None in the server, at its end."""
        while self.control or self.channels:
            channels = [channel for number, channel in self.channels.items() if number not in self.deserted]
            readable = select.select([self.alarm, *channels, *filter(None, [self.control])], [], [])[0]
            if self.alarm in readable:
                self.alarm.recv(4096)
                self.reap()
            for number, channel in self.channels.items():
                if channel in readable:
                    self.pass_on(number, channel)
            if self.control in readable and (request := self.next_request(self.control)):
                return request
        return None

    def reap(self) -> None:
        for number in list(self.channels):
            ended, status = os.waitpid(number, os.WNOHANG)
            if ended:
                self.deserted.discard(number)
                with self.channels.pop(number) as channel, contextlib.suppress(OSError):  # the client may have ended
                    channel.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))

    def pass_on(self, number: int, channel: socket.socket) -> None:
        """Send a fork the signals that the client has asked for."""
        signals = channel.recv(4096).split()
        for wanted in signals:
            os.kill(number, int(wanted))
        if not signals:
            self.deserted.add(number)

    def next_request(self, control: socket.socket) -> dict[str, Any] | None:
        """Import what the next child needs, and fork. In the fork, what it shall do; None in the server."""
        message, descriptors, _, _ = socket.recv_fds(control, 1, 2)
        if not message:
            control.close()
            self.control = None
            return None
        channel, out = socket.socket(fileno=descriptors[0]), descriptors[1]
        line = read_line(channel)
        if line:
            request = json.loads(line)
            with contextlib.suppress(Exception), importing():  # the fork will meet an error too, and say it
                importlib.import_module(f"{request['command'][2]}.tasks")
                import_late_ones()
            number = self.fork()
            if number == 0:
                self.become(request, channel, out)
                return request
            if number is not None:
                self.channels[number] = channel
                with contextlib.suppress(OSError):  # the client has ended
                    channel.sendall(b"%d\n" % number)
        os.close(out)
        return None

    def fork(self) -> int | None:
        """As os.fork, but in the fork the stop signals wait; None if there is no room for another process, which the
        client sees by its channel's end."""
        gc.freeze()  # else a collection in a fork would copy all that was imported
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            number = os.fork()
        except OSError:
            number = None
        if number != 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        return number

    def become(self, request: Mapping[str, Any], channel: socket.socket, out: int) -> None:
        """Make this fork what a new process would be."""
        signal.set_wakeup_fd(-1)
        for number, handler in {signal.SIGCHLD: signal.SIG_DFL, **self.before}.items():
            signal.signal(number, handler)
        for end in (self.control, channel, self.alarm, self.bell, *self.channels.values()):
            if end is not None:
                end.close()
        os.setsid()
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(out, descriptor)
            how = {"encoding": getattr(sys, name).encoding, "errors": getattr(sys, name).errors}
            setattr(sys, name, io.TextIOWrapper(io.FileIO(descriptor, "w", closefd=False), write_through=True, **how))
        os.close(out)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        sys.path[0] = request["folder"]
        numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
        if numpy is not None:
            numpy.random.seed()  # else all forks would draw the same. Its import, in C, would lose KeyboardInterrupt
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        if torch is not None and torch.cuda._is_in_bad_fork() and any(map(os.path.exists, GPUS)):
            # A library has looked for GPUs when it was imported, which the driver does not bear: start anew.
            os.execv(request["command"][0], request["command"])


def read_line(channel: socket.socket) -> bytes:
    """To the line's end and no further, since signals may follow; b"" if it does not come."""
    line = b""
    while not line.endswith(b"\n"):
        byte = channel.recv(1)
        if not byte:
            return b""
        line += byte
    return line


def serve(control: socket.socket) -> NoReturn:
    request = Forks(control).serve()
    if request is not None:
        _, _, module, *arguments = request["command"]
        sys.argv = ["-m", *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
