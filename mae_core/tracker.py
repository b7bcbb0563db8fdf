"""Where the curves of a training go: TensorBoard's files in its work folder and, if it was asked for, a tracker.

No number depends on them: what fails here is one warning, and the training goes on without that curve.
"""

import contextlib
import errno
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mae_core import distributed
from mae_core.command_line import describe_os_error
from mae_core.files import printable

FOLDER = "tensorboard"  # in the work folder
PROJECT = "mae-transfer"


@dataclass(frozen=True)
class Run:
    """What the curves of a training are filed under. first: the step that it starts or goes on from. config: what
    identifies it, in plain JSON values."""

    work: Path
    first: int
    label: str
    config: dict[str, Any]

    @property
    def id(self) -> str:
        """The same for every process that goes on with this training in this folder."""
        identity = json.dumps([str(self.work.resolve()), self.config], sort_keys=True)
        return hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:16]

    @property
    def name(self) -> str:
        return printable(f"{self.label} {self.id[:8]}")


class Sink(NamedTuple):
    """log: (step, {curve: value}). close: (whether the training ended early)."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[bool], None]


class Curves:
    """The curves of one training, on the main process; the others draw none. tracker: one of TRACKERS, or ""."""

    def __init__(self, run: Run, tracker: str = "") -> None:
        self.sinks: dict[str, Sink] = {}
        for name in ("TensorBoard", tracker) if distributed.is_main() else ():
            if name:
                with self.surviving(name):
                    self.sinks[name] = SINKS[name](run)

    def training(self, step: int, loss: float, lr: float, images_per_second: float) -> None:
        self.log(step, {"train/loss": loss, "train/lr": lr, "train/images_per_second": images_per_second})

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self.log(step, {f"eval/{name}": value for name, value in metrics.items()})

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, sink in list(self.sinks.items()) if values else ():
            with self.surviving(name):
                sink.log(step, values)

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, sink in list(self.sinks.items()):
            with self.surviving(name):
                sink.close(kind is not None)

    @contextlib.contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """What fails in the block is one warning; nothing more is logged there."""
        try:
            yield
        except Exception as e:  # of a package that is not ours, over a network
            self.sinks.pop(name, None)
            why = describe_os_error(e) if isinstance(e, OSError) else " ".join(str(e).split()) or type(e).__name__
            print(printable(f"warning: {name}: {why[:300]}; the training goes on without it"), file=sys.stderr)


def to_tensorboard(run: Run) -> Sink:
    """An event file, written through at once. Points that an earlier process drew at or beyond run.first, which this
    one draws again, are cut off where the files are read."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # late: a tenth of a second
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = run.work / FOLDER
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "", str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads all files with this infix in the order of their names. It would put the host's name there too.
    file = open(folder / f"events.out.tfevents.{time.time_ns():020d}", "xb")  # noqa: SIM115  # until Sink.close
    records = RecordWriter(file)

    def write(step: int, **what: Any) -> None:
        records.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())
        file.flush()

    def log(step: int, values: dict[str, float]) -> None:
        write(step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()]))

    write(0, file_version="brain.Event:2")
    write(run.first, session_log=SessionLog(status=SessionLog.START))
    return Sink(log, lambda early: file.close())


def to_wandb(run: Run) -> Sink:
    import wandb

    # It asks nobody for a login, which would hold up a training that nobody watches.
    settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True, init_timeout=30)
    wandb.setup(settings)
    started = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=run.id,
        name=run.name,
        config=run.config,
        resume="allow",
        dir=run.work,
        settings=settings,
    )
    return Sink(lambda step, values: started.log(values, step=step), lambda early: started.finish(exit_code=int(early)))


def to_trackio(run: Run) -> Sink:
    import trackio

    started = trackio.init(project=PROJECT, name=run.name, config=run.config, resume="allow", embed=False)
    drawn = getattr(started, "_next_step", 0)  # behind its last point: it would draw a repeated step again

    def log(step: int, values: dict[str, float]) -> None:
        if step >= drawn:
            started.log(values, step=step)

    return Sink(log, lambda early: started.finish())


SINKS: dict[str, Callable[[Run], Sink]] = {"TensorBoard": to_tensorboard, "wandb": to_wandb, "trackio": to_trackio}
