"""Full disks, folders that become read-only and files that vanish: a sentence, nothing done is lost, and the same
command goes on afterwards to what an undisturbed run leaves."""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tests.campaign.cases import Case, Skipped, no_traceback, refused, require, succeeded
from tests.campaign.compare import compare, results
from tests.campaign.kills import PATIENCE, undisturbed
from tests.campaign.starts import Done, call, finish, start
from tests.campaign.tiny import ARCH, World, pipelines, two_ranks

PRIVATE = "CAMPAIGN_MOUNTS"  # set in a process that has mounts of its own
ROOM = 512  # MiB: more than any run here needs
CLASSIFYING = "fine-tuning, probing, k-NN, A, R, C"
OTHERS = "from scratch, iNaturalist, Places, a folder"
DISTURBED = (CLASSIFYING, "coco", "ade20k", "pre-training with k-NN")
FURTHER = ("partial", OTHERS, "pre-training", "ablations")  # with fewer cases: what they share was tried before
PRETRAINING = ("pre-training", "pre-training with k-NN")
RANKS = ("fine-tuning on two ranks", "pre-training on two ranks")
FULL = ("space left", "too large", "disk", "full")
READ_ONLY = ("ead-only", "may not be written", "not writable")


def commands(world: World) -> dict[str, list[str]]:
    return pipelines(world) | two_ranks(world)


def stopped_by_fault(done: Done, work: Path, name: str, words: Sequence[str]) -> None:
    """torchrun prints a traceback of its own for every process that it loses."""
    if name in RANKS:
        require(done.code == 1, "accepted, or killed", done)
    else:
        refused(done, work)
    said(done, words)


def goes_on(world: World, name: str, work: Path) -> None:
    """The same command ends well. A log of several processes still has what torchrun printed of the fault."""
    done = call(commands(world)[name], work, PATIENCE)
    require(done.code == 0, "the command failed", done)
    if name not in RANKS:
        no_traceback(done, work)


def with_own_mounts() -> None:
    """Start this program again with mounts that nobody else sees, where that is allowed."""
    if PRIVATE in os.environ or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        return
    os.environ[PRIVATE] = "1"
    os.execvp("unshare", ["unshare", "-m", sys.executable, "-m", "tests.campaign", *sys.argv[1:]])


def mount(*arguments: object) -> bool:
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at a folder."""
    if PRIVATE not in os.environ:
        raise Skipped("only root may mount a small file system (unshare -m)")
    folder.mkdir(exist_ok=True)
    if not mount("-t", "tmpfs", "-o", options, "tmpfs", folder):
        raise Skipped("mounting a tmpfs is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def resize(folder: Path, options: str) -> None:
    if not mount("-o", f"remount,{options}", folder):
        raise Skipped(f"remounting with {options} is not allowed here")


def said(done: Done, words: Sequence[str]) -> None:
    require(any(word in done.text for word in words), f"it says none of {words}", done)


def no_leftovers(out: Path) -> None:
    """Half-written files that the complete run should have cleared."""
    strange = [name for name in results(out) if name.endswith((".tmp", ".part"))]
    require(not strange, f"half-written files stay: {strange}")


def full_at_each_new_file(world: World, name: str, number: int, work: Path) -> None:
    """The disk has room for one to three more files each time: a run fails at every kind of file in turn."""
    rng, out, files = random.Random(f"{number} {name}"), work / "out", 3
    with small_disk(out, f"size={ROOM}m,nr_inodes={files}"):
        while (done := call(commands(world)[name], work, PATIENCE)).code:
            refused(done, work)
            said(done, FULL)
            files += rng.randint(2, 6)
            resize(out, f"nr_inodes={files}")
            require(files < 400, "it fails though there is room", done)
        compare(undisturbed(name, world).folder / "out", out)
        no_leftovers(out)


def no_file_larger(world: World, name: str, work: Path) -> None:
    """No file may become larger than a limit that grows: the large ones fail first, then none."""
    for limit in (100, 2_000, 30_000, 300_000, 4_000_000, 9_000_000, 40_000_000):
        done = call(commands(world)[name], work, PATIENCE, largest=limit)
        if done.code == 0:
            break
        refused(done, work)
    goes_on(world, name, work)
    compare(undisturbed(name, world).folder / "out", work / "out")


def in_the_middle(name: str, world: World, work: Path, strike: Callable[[], None]) -> Done:
    """A run to which something happens once it has saved a state."""
    log = work / "printed.txt"
    process = start(commands(world)[name], work, log)
    deadline = time.monotonic() + PATIENCE
    while not any(work.glob("out/**/checkpoint.pth")) and not any(work.glob("out/**/iter_*.pth")):
        if process.poll() is not None or time.monotonic() > deadline:
            require(False, "no state is ever saved", finish(process, log, 1))
        time.sleep(0.01)
    strike()
    return finish(process, log, PATIENCE)


def full_in_the_middle(world: World, name: str, work: Path) -> None:
    """Another program fills the disk."""
    out, filler = work / "out", work / "out" / "filler"

    def fill() -> None:
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))

    with small_disk(out, f"size={ROOM}m"):
        done = in_the_middle(name, world, work, fill)
        if done.code:
            stopped_by_fault(done, work, name, FULL)
        filler.unlink(missing_ok=True)
        goes_on(world, name, work)
        compare(undisturbed(name, world).folder / "out", out)
        no_leftovers(out)


def too_small(world: World, name: str, work: Path) -> None:
    """A disk that is too small from the start."""
    with small_disk(work / "out", "size=64k"):
        done = call(commands(world)[name], work, PATIENCE)
        refused(done, work)
        said(done, FULL)


def read_only(world: World, name: str, early: bool, work: Path) -> None:
    """--out is read-only from the start, or becomes so in the middle."""
    out = work / "out"

    def strike() -> None:
        deadline = time.monotonic() + 20
        while not mount("-o", "remount,ro", out):  # refused while a file is being written
            if time.monotonic() > deadline:
                raise Skipped("the file system was never idle enough to be made read-only")

    with small_disk(out, f"size={ROOM}m"):
        if early:
            strike()
            done = call(commands(world)[name], work, PATIENCE)
        else:
            done = in_the_middle(name, world, work, strike)
        if early or done.code:
            stopped_by_fault(done, work, name, READ_ONLY)
        resize(out, "rw")
        goes_on(world, name, work)
        compare(undisturbed(name, world).folder / "out", out)
        no_leftovers(out)


def vanishes(world: World, name: str, what: str, work: Path) -> None:
    """What a run reads or writes is renamed in the middle, and comes back before the next start."""
    path = {
        "the images": next(world.data.glob("coco/train2017")) if name == "coco" else None,
        "the checkpoint": world.ckpt,
        "--out": work / "out",
    }[what]
    if path is None:
        sets = {"ade20k": "ADEChallengeData2016/images"} | dict.fromkeys(PRETRAINING, "unlabelled")
        path = world.data / sets.get(name, "imagenet/train")
    away = path.with_name(f"{path.name} away")
    try:
        done = in_the_middle(name, world, work, lambda: path.rename(away) and None)
        no_traceback(done, work)
        require(done.code in (0, 1, 2), "it ended in an odd way", done)
    finally:
        if path == work / "out" and path.exists():  # what went on to be written there
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()
        away.rename(path)
    goes_on(world, name, work)
    if "could not be read" in "".join(p.read_text() for p in work.glob("out/**/record.json")):
        return  # the number is of fewer images, and its record says so
    compare(undisturbed(name, world).folder / "out", work / "out")


def small_commands(world: World) -> dict[str, list[object]]:
    """Commands that write a file or a few, without a training."""
    return {
        "checkpoint": ["-m", "mae_core.checkpoint", world.ckpt, "--convert", "out/a.safetensors"],
        "checkpoint, to timm": ["-m", "mae_core.checkpoint", world.ckpt, "--to", "timm", "out/b.safetensors"],
        "reconstruct": [
            "-m",
            "mae_core.reconstruct",
            "--ckpt",
            world.ckpt,
            "--images",
            world.images,
            "--limit",
            "1",
            "--out",
            "out/a.png",
        ],
        "miniature": ["-m", "transfer.miniature", "--out", "out", "--unlabelled", "10"],
        "a run from random weights": [
            "-m",
            "transfer.frozen",
            "--task",
            "imagenet_knn",
            "--ckpt",
            f"random:{ARCH}",
            "--data",
            world.data,
            "--out",
            "out",
            "--recipe",
            "mini",
        ],
    }


def full_or_read_only(world: World, name: str, options: str, work: Path) -> None:
    command = small_commands(world)[name]
    with small_disk(work / "out", options):
        refused(call(command, work, 100), work)
        no_leftovers(work / "out")
        if "ro" in options.split(","):
            resize(work / "out", "rw")
        resize(work / "out", f"size={ROOM}m,nr_inodes=0")
        succeeded(call(command, work, PATIENCE), work)


def cases(world: World, number: int) -> list[Case]:
    full, gone, locked = "full disk", "a file or folder vanishes", "read-only folder"
    found = [Case(full, f"at each new file: {n}", partial(full_at_each_new_file, world, n, number)) for n in DISTURBED]
    for name in (OTHERS, "ablations"):
        found.append(Case(full, f"at each new file: {name}", partial(full_at_each_new_file, world, name, number)))
    found += [Case(full, f"at each size of file: {n}", partial(no_file_larger, world, n)) for n in DISTURBED]
    for name in (*DISTURBED, *FURTHER, *RANKS):
        found.append(Case(full, f"in the middle: {name}", partial(full_in_the_middle, world, name)))
    for name in (*DISTURBED, *FURTHER):
        found.append(Case(full, f"from the start: {name}", partial(too_small, world, name), small=name == "coco"))
    for early in (True, False):
        when = "from the start" if early else "in the middle"
        # A child's log is always open, for which the kernel refuses to make a disk read-only.
        for name in (*DISTURBED, *(FURTHER if early else PRETRAINING[:1])):
            try_it, small = partial(read_only, world, name, early), early and name == "coco"
            found.append(Case(locked, f"{when}: {name}", try_it, small=small))
    for name in small_commands(world):
        found += [
            Case(full, f"{name}: no room", partial(full_or_read_only, world, name, "size=4k")),
            Case(full, f"{name}: no new file", partial(full_or_read_only, world, name, f"size={ROOM}m,nr_inodes=1")),
            Case(locked, name, partial(full_or_read_only, world, name, f"ro,size={ROOM}m")),
        ]
    for name in (*DISTURBED, *FURTHER):
        things = (
            ("the images", "--out")
            if name in (*PRETRAINING, "ablations")
            else ("the images", "the checkpoint", "--out")
        )
        found += [Case(gone, f"{what}: {name}", partial(vanishes, world, name, what)) for what in things]
    return found
