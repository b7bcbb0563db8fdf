"""Kills at random moments: afterwards the same command ends with what an undisturbed run leaves, bit for bit."""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from tests.campaign.cases import Case, no_traceback, require, succeeded
from tests.campaign.compare import compare
from tests.campaign.starts import Done, Fork, descendants, finish, kill_all, start
from tests.campaign.tiny import World, pipelines, two_ranks

PATIENCE = 300  # seconds for a run that takes some
WHOM = ("parent", "child", "group")
SIGNALS = (signal.SIGKILL, signal.SIGTERM)
EXPECTED = (0, 1, 2, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


@dataclass(frozen=True)
class Reference:
    """An undisturbed run."""

    folder: Path
    seconds: float


@dataclass(frozen=True)
class Pipeline:
    """A command; whom its kills hit; how many there are."""

    name: str
    command: list[str]
    whom: tuple[str, ...]
    kills: int


@cache
def undisturbed(pipeline_name: str, world: World) -> Reference:
    pipeline = {one.name: one for one in all_pipelines(world)}[pipeline_name]
    folder = world.work / "undisturbed" / pipeline_name.replace(" ", "-")
    folder.mkdir(parents=True)
    log = folder / "printed.txt"
    done = finish(start(pipeline.command, folder, log), log, PATIENCE)
    succeeded(done, folder)
    return Reference(folder, done.seconds)


def all_pipelines(world: World) -> list[Pipeline]:
    kills = {"coco": 7, "ade20k": 7, "partial": 6, "ablations": 7}
    kills |= {"pre-training": 7, "pre-training with workers": 7, "pre-training with k-NN": 5}
    whom = {"pre-training": ("parent",), "pre-training with workers": ("parent", "group")}
    whom["pre-training with k-NN"] = whom["pre-training"]
    found = []
    for name, command in pipelines(world).items():
        found.append(Pipeline(name, command, whom.get(name, WHOM), kills.get(name, 9)))
    for name, command in two_ranks(world).items():
        found.append(Pipeline(name, command, ("rank", "rank", "parent", "group"), 3))
    return found


def targets(whom: str, process: int, rng: random.Random) -> list[int]:
    """The processes to hit: below run_all or torchrun, or all of them."""
    below = descendants(process)
    if whom == "child":
        return below[:1]
    if whom == "rank":
        ranks = [p for p in below if b"torch.distributed.run" not in Path(f"/proc/{p}/cmdline").read_bytes()]
        return [rng.choice(ranks[-2:])] if len(ranks) > 1 else []
    return [process, *below] if whom == "group" else [process]


def disturb(pipeline: Pipeline, world: World, seed: int, work: Path) -> None:
    """Kill the command `kills` times at moments drawn by the seed, starting it again whenever it has ended; then let it
    end. If it ends before all kills have hit, what it left is compared, and it begins anew elsewhere."""
    reference = undisturbed(pipeline.name, world)
    rng = random.Random(f"{seed} {pipeline.name}")
    left, attempt = pipeline.kills, 0
    while left:
        attempt += 1
        folder = work / str(attempt)
        folder.mkdir()
        left -= disturbed_run(pipeline, folder, rng, left, reference.seconds)
        compare(reference.folder / "out", folder / "out")


def disturbed_run(pipeline: Pipeline, folder: Path, rng: random.Random, kills: int, seconds: float) -> int:
    """One run to its end, hit up to `kills` times on its way; how many hit."""
    log, hits = folder / "printed.txt", 0
    begin = partial(start, pipeline.command, folder, log)
    # torchrun prints a traceback of its own for every process that it loses, and gloo one for every peer.
    judge = (lambda done: None) if "rank" in pipeline.whom else partial(no_traceback, work=folder)
    process = begin()
    while hits < kills:
        wait = rng.uniform(0.1, 0.9) * max(seconds / 3, 1.0)
        if ended(process, wait):
            if process.returncode == 0:
                return hits
            process = again(process, log, judge, begin)
            continue
        number, whom = rng.choice(SIGNALS), rng.choice(pipeline.whom)
        try:
            hit = targets(whom, process.pid, rng)
        except FileNotFoundError:  # it ended meanwhile
            continue
        kill_all(hit, number)
        hits += bool(hit)
        if whom in ("parent", "group") and ended(process, PATIENCE):
            process = again(process, log, judge, begin)
    deadline = time.monotonic() + PATIENCE
    while True:
        done = finish(process, log, PATIENCE)
        if done.code == 0:
            judge(done)
            return hits
        require(time.monotonic() < deadline, "the same command does not end well after the kills", done)
        process = again(process, log, judge, begin)


def ended(process: Fork, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return True
        time.sleep(0.02)
    return False


def again(process: Fork, log: Path, judge: Callable[[Done], None], begin: Callable[[], Fork]) -> Fork:
    """Start a command that has ended once more; Broken if it ended in any other way than asked for. It may be refused
    while a child of a killed parent goes on: then it waits."""
    done = Done(process.returncode, log.read_text("utf-8", "replace"), 0.0)
    require(done.code in EXPECTED, "an unexpected exit code", done)
    judge(done)
    if done.code == 2:
        last = done.text.strip().splitlines()[-1]
        require("in use" in last, "refused, though only killed before", done)
        time.sleep(0.5)
    return begin()


def cases(world: World, seed: int) -> list[Case]:
    small = ("pre-training", "coco")
    return [
        Case(
            "killed: " + ("one of two ranks, launcher, group" if "rank" in one.whom else "parent, child, group"),
            one.name,
            partial(disturb, one, world, seed),
            small=one.name in small,
            tries=one.kills,
        )
        for one in all_pipelines(world)
    ]
