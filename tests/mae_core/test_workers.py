"""The processes that decode images, where the machine is short of something."""

import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mae_core import workers
from mae_core.data import Images, Sample, Targets, loader, pretraining_transform
from mae_core.errors import UserError
from mae_core.listing import list_images
from mae_core.workers import MIB, fitting_workers
from tests.fixtures import ROOT

BATCH = (torch.zeros(4, MIB, dtype=torch.uint8), torch.zeros(0), ["name"])  # 4 MiB in two tensors


@pytest.fixture
def machine(monkeypatch):
    """(MiB free in shared memory, open files) of a machine."""

    def set_to(free, files):
        status = SimpleNamespace(f_bavail=free * 256, f_frsize=4096)
        monkeypatch.setattr(workers.os, "statvfs", lambda path: status)
        monkeypatch.setattr(workers.resource, "getrlimit", lambda kind: (files, files))
        monkeypatch.setattr(workers.resource, "setrlimit", lambda kind, limits: None)

    return set_to


@pytest.mark.parametrize(
    ("free", "files", "processes", "fits", "said"),
    [
        (10_000, 10_000, 1, 16, ""),
        (64, 10_000, 1, 6, "/dev/shm has 64 MiB free and 16 --workers would fill 136 MiB"),  # 57.6 MiB: 14 batches
        (256, 10_000, 4, 6, "/dev/shm has 64 MiB free"),  # each of four processes takes its part
        (6, 10_000, 1, 0, "starting 0 of them"),
        (10_000, 128 + 2 * 12, 1, 5, "152 files may be open (ulimit -n): starting 5 of them"),
        (10_000, resource.RLIM_INFINITY, 1, 16, ""),
    ],
)
def test_no_more_workers_than_there_is_room_for(machine, monkeypatch, capsys, free, files, processes, fits, said):
    machine(free, files)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(processes))
    assert fitting_workers(16, BATCH, held=2) == fits
    out = capsys.readouterr().out
    assert (said in out) if said else not out
    assert fitting_workers(0, BATCH, held=2) == 0


def test_targets_are_counted_tensor_by_tensor(machine):
    machine(10_000, 128 + 2 * 5 * 3)
    targets = Targets([{"boxes": torch.zeros(2, 4), "masks": torch.zeros(2, 9)}] * 2)
    assert fitting_workers(16, (torch.zeros(2, 3), targets, []), held=0) == 3


def test_tensors_within_objects_of_other_libraries_are_counted(machine):
    """As detectron2's Instances and mmengine's PixelData hold them."""
    machine(64, 10_000)
    boxes, labels = SimpleNamespace(tensor=torch.zeros(MIB)), SimpleNamespace(_data=torch.zeros(MIB, dtype=torch.int64))
    fields = {"boxes": boxes, "size": (4, 4), "labels": [labels]}
    assert fitting_workers(16, [{"instances": SimpleNamespace(_fields=fields)}], held=0) == 2  # 12 MiB each of 57.6


class Numbers:
    """A data set of numbers; `happen` is called in the worker that makes one."""

    def __init__(self, happen) -> None:
        self.happen = happen

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index):
        return torch.tensor([float(index)]), 0, self.happen() if index else ""


class Unpicklable(str):
    def __reduce__(self):
        raise OSError("unable to allocate shared memory")


@pytest.mark.parametrize(
    "happen", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: Unpicklable("name")], ids=["killed", "no room"]
)
def test_a_worker_that_dies_ends_the_run_with_a_sentence(happen):
    """Without shared memory a batch cannot be handed over: the training would wait for it for ever."""
    with pytest.raises(
        UserError, match=r"a process that decodes images died .*: memory or /dev/shm .* fewer --workers"
    ):
        list(loader(Numbers(happen), [[0], [1], [2]], 1, "cpu"))


def test_workers_are_started_only_as_many_as_fit(machine, capsys):
    machine(0, 10_000)
    here = []
    images = [images for images, _, _ in loader(Numbers(lambda: here.append(os.getpid()) or ""), [[0], [1]], 2, "cpu")]
    assert torch.cat(images).flatten().tolist() == [0.0, 1.0]
    assert here == [os.getpid()]
    assert "starting 0 of them" in capsys.readouterr().out


def test_batches_of_images_are_counted_only_until_they_are_taken(machine, noise_images, monkeypatch, capsys):
    """They are copied out of shared memory one by one: a step of many keeps none there."""
    files = list_images(noise_images)[:4]
    size = 4 * (3 * 48 * 48 + 8)  # bytes of the images and their labels
    monkeypatch.setattr(workers, "MIB", 1)
    machine(0, 10_000)
    # Nine tenths of it are two of each of four workers, and the one taken.
    free = SimpleNamespace(f_bavail=10 * size, f_frsize=1)
    monkeypatch.setattr(workers.os, "statvfs", lambda path: free)
    images = Images(files, pretraining_transform(48))
    batches = [[Sample(i, i) for i in range(4)]] * 2
    list(loader(images, batches, 16, "cpu", held=32))
    said = capsys.readouterr().out
    assert f"16 --workers would fill {33 * size} MiB" in said
    assert "starting 4 of them" in said


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError("gone")])
def test_a_connection_that_ends_with_its_worker_is_explained(monkeypatch, error):
    """A worker closes its connections before it ends: the batch on its way is lost first."""
    monkeypatch.setattr(workers, "END_SECONDS", 0)
    died = pytest.raises(UserError, match=r"a process that decodes images died \((EOFError|gone)\)")
    with died, workers.lost_batches_explained():
        raise error


def test_what_the_data_set_itself_raises_is_left_alone():
    def happen():
        raise EOFError("a file ends early")

    with pytest.raises(EOFError, match="a file ends early"):
        list(loader(Numbers(happen), [[0], [1]], 1, "cpu"))


def test_workers_end_with_their_parent():
    """It is killed while their pipe is full: they hold each other's ends of it open."""
    script = """if True:
        import os, signal
        from torch.utils.data import DataLoader
        from mae_core.workers import begin_worker, started

        loader = DataLoader([b"x" * 1_000_000] * 64, 4, num_workers=2, collate_fn=list, worker_init_fn=begin_worker)
        batches = started(loader)
        next(batches)
        print("begun", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    # The workers have this pipe too: it ends with the last of them.
    assert process.communicate(timeout=600)[0] == "begun\n"


def test_workers_leave_a_signal_to_all_processes_to_their_parent():
    """A scheduler sends it so; the parent needs them for the step that it finishes. What it sends itself ends them."""
    script = """if True:
        import os, signal
        from torch.utils.data import DataLoader, get_worker_info
        from mae_core.workers import begin_worker, started

        class Pids:
            def __len__(self): return 400
            def __getitem__(self, index): return os.getpid()

        batches = started(DataLoader(Pids(), 1, num_workers=2, collate_fn=list, worker_init_fn=begin_worker))
        own = {next(batches)[0] for _ in range(2)}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            for pid in own:
                os.system(f"kill -{int(number)} {pid}")
        assert {pid for batch in batches for pid in batch} == own
        print("all batches came", flush=True)
        batches = started(DataLoader(Pids(), 1, num_workers=2, collate_fn=list, worker_init_fn=begin_worker))
        os.kill(next(batches)[0], signal.SIGTERM)
        try:
            list(batches)
        except RuntimeError as e:
            print(str(e)[:17])
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("all batches came\nDataLoader worker\n", 0), done.stderr


@pytest.mark.parametrize("error", ["ConnectionResetError", "ValueError"])
def test_a_worker_whose_parent_is_killed_says_nothing_of_its_connections(error):
    """Of other errors it does. multiprocessing's own thread, which hands over memory, calls the hook so."""
    script = f"""if True:
        import os, signal, sys
        from torch.utils.data import DataLoader
        from mae_core.workers import begin_worker, started

        class Last:
            def __len__(self): return 1
            def __getitem__(self, index):
                os.kill(os.getppid(), signal.SIGKILL)
                try:
                    raise {error}("gone")
                except Exception:  # the one just raised, with its trace, as the hook would get it
                    sys.excepthook(*sys.exc_info())

        list(started(DataLoader(Last(), num_workers=1, worker_init_fn=begin_worker)))
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert done.stderr.endswith(f"{error}: gone\n") if error == "ValueError" else done.stderr == ""
