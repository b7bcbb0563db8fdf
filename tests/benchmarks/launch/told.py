"""Plans of small jobs, and children that only say what they would do."""

import sys
from pathlib import Path

from benchmarks import run_all
from benchmarks.launch import local
from benchmarks.plan import make_plan
from tests.fixtures.transfer import CLASSES, write_imagenet, write_split
from transfer.run import describe, write_record

TWO = CLASSES[:2]
ARCH = "random:vit_mini_patch8"
# A child that writes down when it runs and where, and ends when that many have begun.
CHILD = """
import os, pathlib, shutil, sys, time
log, company = sys.argv[1:]
def note(text):
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{text} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ.get('OMP_NUM_THREADS')}\\n".encode())
note("begin " + sys.argv[0])
deadline = time.monotonic() + 300
while pathlib.Path(log).read_text().count("begin") < int(company) and time.monotonic() < deadline:
    time.sleep(0.01)
note("end " + sys.argv[0])
"""


def small_data(root: Path, *shifted: str) -> Path:
    """ImageNet of two classes, and one image of each in these other sets; returns root."""
    write_imagenet(root, train=4, val=3, classes=TWO)
    for name in shifted:
        write_split(root / name, 1, TWO)
    return root


def plan(flags: list[str], *more: str):
    args = run_all.parse([*flags, *more])
    return make_plan(args), args


class Told:
    """Stands for the children's command: each notes its jobs in a file, waits until so many have begun, and leaves a
    record of each job, or of the first few."""

    def __init__(self, folder: Path, monkeypatch, company: int = 1, leave: int | None = None) -> None:
        self.log, self.company, self.leave, self.started = folder / "children", company, leave, []
        monkeypatch.setattr(local, "task_command", self.command)

    def command(self, jobs, args) -> list[str]:
        self.started.append([job.task.name for job in jobs])
        names = "+".join(f"{job.task.name}/{job.seed}" for job in jobs)
        lines = [f"import sys; sys.argv = {[names, str(self.log), str(self.company)]!r}", CHILD]
        for job in jobs[: self.leave]:
            prepared = job.work.parent / f"{job.work.name}.prepared"
            done = describe(job, status="ok", metrics={job.task.metric: 1.0})
            write_record(done, prepared)
            lines.append(f"os.makedirs({str(job.work)!r}, exist_ok=True)")
            lines.append(f"shutil.move({str(prepared / 'record.json')!r}, {str(job.work)!r})")
        return [sys.executable, "-c", "\n".join(lines)]

    def events(self) -> list[list[str]]:
        return [line.split() for line in self.log.read_text().splitlines()]

    def together(self) -> int:
        """The most children that ran at a time."""
        running, most = 0, 0
        for what, *_ in self.events():
            running += 1 if what == "begin" else -1
            most = max(most, running)
        return most
