"""One checkpoint through every transfer experiment, to the paper's tables.

python benchmarks/run_all.py --ckpt mae_vit_l.pth
"""

import argparse
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
try:
    from benchmarks.plan import Item, jobs_to_do, make_plan, print_plan, with_classifier
    from benchmarks.report import report
    from benchmarks.suite import TASKS
    from mae_core.errors import UserError
    from mae_core.machine import natural
    from mae_core.progress import duration
    from mae_core.settings import as_typed
    from transfer.cli import add_common_flags, headline, settle, task_argument
    from transfer.data.shipped import shipped
    from transfer.space import check_space
    from transfer.task import RECORD_FILE, Job, Record, describe, read_record, slug, write_record
except ModuleNotFoundError as e:
    python = ROOT / ".venv" / "bin" / "python"
    print(f"error: {sys.executable} lacks {e.name}: run `make -C {ROOT} install`, then use {python}", file=sys.stderr)
    sys.exit(2)

MAE_MINI = shipped("miniature/mae_mini.safetensors")
if MAE_MINI.is_relative_to(Path.cwd()):
    MAE_MINI = MAE_MINI.relative_to(Path.cwd())  # records name it so


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run_all.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ckpt",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="checkpoint files or folders, hf:NAME, timm:NAME or random:ARCH (default: the shipped mae_mini, and "
        "random weights of its size)",
    )
    several = {"nargs": "+", "action": "extend"}
    parser.add_argument("--tasks", **several, metavar="TASK", help="only these (default: all that fit the checkpoint)")
    parser.add_argument("--seeds", **several, type=natural, help="one run of every task for each (default: 0)")
    parser.add_argument("--set", **several, default=[], metavar="TASK.KNOB=VALUE", help="override recipe knobs")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes per task, by torchrun (default: 1)")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--list", action="store_true", help="list the tasks, and stop")
    add_common_flags(parser, TASKS)
    args = parser.parse_args(arguments)
    args.ckpt = list(dict.fromkeys(args.ckpt or [str(MAE_MINI), "random:vit_mini_patch8"]))
    args.seeds = list(dict.fromkeys(args.seeds or [0]))
    return args


def groups(items: Sequence[Item]) -> list[list[Item]]:
    """What shares a child process: the sets on which one classifier is evaluated, so that it is loaded once."""
    found: dict[tuple, list[Item]] = {}
    for item in items:
        job = item.job
        alone = job.task.name if job.task.needs == "encoder" or job.overrides else ""
        found.setdefault((job.checkpoint.path, job.seed, job.task.module, alone), []).append(item)
    return list(found.values())


class Child:
    """One task script as a child process; its output goes to a log file, its last line to the terminal."""

    def __init__(self, jobs: Sequence[Job], args: argparse.Namespace, lock: int, number: str) -> None:
        job = jobs[0]
        names = self.names = [job.task.name for job in jobs]
        self.title = f"[{number}] {job.checkpoint.name} {' '.join(names)} seed {job.seed}"
        self.log = args.out / "logs" / f"{slug(job.checkpoint.name)}-{'-'.join(names)}-seed{job.seed}.log"
        tasks = [task_argument(job.task) for job in jobs]
        self.command = [*launcher(args.gpus), "-m", job.task.module, "--task", *tasks, *flags(job, args)]
        self.parallel = args.gpus > 1
        self.lock = lock
        self.last = ""

    def run(self) -> int:
        """Run to the end; the exit code. Ctrl-C is passed on once, waited for, and raised again."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(self.command)}\n")
            log.flush()
            # A session of its own keeps the terminal's Ctrl-C from reaching it twice; the lock's descriptor goes along,
            # so that --out stays locked for as long as any child lives.
            process = subprocess.Popen(
                self.command,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                pass_fds=(self.lock,),
                start_new_session=True,
            )
            try:
                self.follow(process, log)
            except BaseException:  # Ctrl-C, or nobody reads what is printed here any more
                # torchrun passes SIGTERM on to its processes; a plain child takes SIGINT.
                process.send_signal(signal.SIGTERM if self.parallel else signal.SIGINT)
                self.say("stopping: the step under way is finished and saved (Ctrl-C again to kill)")
                try:
                    log.writelines(process.stdout)
                    process.wait()
                finally:
                    process.kill()
                raise
            return process.wait()

    def say(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(f"\n{line}", flush=True)

    def follow(self, process: subprocess.Popen, log) -> None:
        shown = 0.0
        for line in process.stdout:
            log.write(line)
            log.flush()
            self.last = line.strip() or self.last
            if sys.stdout.isatty():
                width = os.get_terminal_size().columns - 1
                print(f"\r\033[K{f'{self.title} | {self.last}'[:width]}", end="", flush=True)
            elif time.monotonic() - shown > 15:
                shown = time.monotonic()
                print(f"{self.title} | {self.last}", flush=True)
        process.wait()


def launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    # --standalone makes torchrun choose a free port.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]


def flags(job: Job, args: argparse.Namespace) -> list[str]:
    """The child's command line; what it computes from it must be this very job."""
    given = ["--ckpt", job.checkpoint.path, "--recipe", args.recipe]
    given += ["--data", job.data.root, "--out", str(args.out), "--seed", str(job.seed)]
    chosen = {"recipe": job.recipe_name} if job.recipe_name != args.recipe else {}
    if knobs := chosen | job.overrides:
        given += ["--set", *(f"{knob}={as_typed(value)}" for knob, value in knobs.items())]
    if len(job.task.engines) > 1:
        given += ["--engine", job.engine]
    if job.parent is not None:
        given += ["--classifier", job.parent.path]
    given += ["--device", args.device, "--precision", args.precision, "--workers", str(args.workers)]
    given += ["--micro-batch", str(args.micro_batch), "--save-minutes", str(args.save_minutes)]
    given += ["--activation-checkpointing"] * args.activation_checkpointing + ["--compile"] * args.compile
    return given


def run(items: Sequence[Item], args: argparse.Namespace, lock: int) -> list[Record]:
    """Run what the plan says; one Record for every item."""
    records = []
    parts = groups(items)
    for number, group in enumerate(parts, 1):
        todo = []
        for item in group:
            # The fine-tuning it waited for has run since the plan was made.
            job = with_classifier(item.job, item.finetune, args.out) if item.finetune else item.job
            record = settle(job)
            if record is None:
                (job.work / RECORD_FILE).unlink(missing_ok=True)  # of an earlier attempt that failed
                todo.append(job)
            else:
                records.append(record)
                print(f"[{number}/{len(parts)}] {job.checkpoint.name} {headline(record)}", flush=True)
        while todo:
            child = Child(todo, args, lock, f"{number}/{len(parts)}")
            started = time.monotonic()
            code = child.run()
            took = duration(time.monotonic() - started)
            # A child that ended early took the rest of its group with it: another one goes on behind the last record.
            left = [job for job in todo if not (job.work / RECORD_FILE).exists()]
            again = left if len(left) < len(todo) else []
            for job in (job for job in todo if job not in again):
                record = outcome(job, code, child)
                records.append(record)
                start = "\r\033[K" if sys.stdout.isatty() else ""
                tail = f"(seed {job.seed}, {took})"
                print(f"{start}[{number}/{len(parts)}] {job.checkpoint.name} {headline(record)} {tail}", flush=True)
            todo = again
    return records


def outcome(job: Job, code: int, child: Child) -> Record:
    """The record the child wrote, or a failed one in its place if it died without writing any."""
    path = job.work / RECORD_FILE
    if path.exists():
        return read_record(path)
    died = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    reason = f"its process ended with {died} and left no record; last line: {child.last} (log: {child.log})"
    record = describe(job, status="failed", reason=reason)
    write_record(record, job.work)
    return record


def take_lock(out: Path) -> int:
    """Lock --out for this run; UserError if another run holds it. Returns the descriptor, which holds the lock."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 32, 0).decode().strip()
        message = f"{out} is in use by another run (process {holder} or its child): wait, or use another --out"
        raise UserError(message) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def exit_code(records: Sequence[Record], items: Sequence[Item], named: bool) -> int:
    """0: all ran, were done, or skipped unasked; 1: something failed or a named task was skipped; 2: nothing ran."""
    if all(item.state in ("skipped", "failed") for item in items):
        return 2
    bad = {"failed", "skipped"} if named else {"failed"}
    return 1 if any(record.status in bad for record in records) else 0


def list_tasks() -> None:
    for task in TASKS:
        direction = "higher" if task.higher_is_better else "lower"
        print(f"{task.name:<18} {task.title:<50} {task.metric} ({direction} is better); needs: {task.needs}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.list:
        list_tasks()
        return 0
    # A scheduler's SIGTERM and a closed terminal stop like Ctrl-C. SIGINT too: a script's background job inherits it
    # ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        items = make_plan(args)
        print_plan(items, args)
        check_space(jobs_to_do(items), args.out)
        if args.plan:
            return 0
        lock = take_lock(args.out)
    except (UserError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    try:
        records = run(items, args, lock)
    except (KeyboardInterrupt, BrokenPipeError):
        with contextlib.suppress(BrokenPipeError):
            if any(args.out.glob(f"runs/**/{RECORD_FILE}")):
                table(args.out)
            print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (UserError, OSError) as e:
        print(f"error: {e}; the same command goes on from here", file=sys.stderr)
        return 1
    tabled = table(args.out)
    return exit_code(records, items, args.tasks is not None) or (0 if tabled else 1)


def table(out: Path) -> bool:
    """Write the tables of all records in `out` and say where; False, and why, if a record could not be read."""
    try:
        written = report(out)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return False
    print("tables: " + ", ".join(str(path) for path in written), flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
