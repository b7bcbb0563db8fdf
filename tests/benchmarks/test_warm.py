"""Forks of a server in place of new processes: alone with their faults, their signals and their environment."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import warm
from benchmarks.children import Child, stop_all
from benchmarks.suite import TASKS
from tests.fixtures import ROOT

PATIENCE = 300  # seconds, for what takes a few where nothing is wrong
# What a server imports: it leaves a line for each time, and takes as long as a file is there.
IMPORTED = """
import os, pathlib, time
with open(os.environ["PLACE"] + "/imports", "a") as file:
    file.write(f"{os.getpid()} {os.environ.get('OMP_NUM_THREADS')}\\n")
while pathlib.Path(os.environ["PLACE"], "hold").exists():
    time.sleep(0.01)
import numpy
"""
MAIN = """
import os, pathlib, sys
exec(sys.argv[1])
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch):
    """A folder with a family of tasks whose main executes its argument; its children are forks of a server of their
    own."""
    package = tmp_path / "a_family"
    package.mkdir()
    for name, text in {"__init__": "", "tasks": IMPORTED, "__main__": MAIN}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.setattr(warm, "FAMILIES", "a_family")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("PLACE", str(tmp_path))
    yield tmp_path
    warm.server.cache_clear()


def child(place: Path, program: str, name: str = "log", **environment: str) -> Child:
    return Child([sys.executable, "-m", "a_family", program], place / name, environment)


def ended(place: Path, program: str, **environment: str) -> tuple[int | None, str]:
    one = child(place, program, **environment)
    return one.wait(PATIENCE), one.last_word


def imports(place: Path) -> list[str]:
    return (place / "imports").read_text().splitlines()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_children_share_one_import_and_are_processes_of_their_own(place: Path) -> None:
    said = "print(os.getpid(), os.getsid(0), os.getppid(), os.environ['OMP_NUM_THREADS'])"
    found = [ended(place, said, OMP_NUM_THREADS="1") for _ in range(3)]
    assert [code for code, _ in found] == [0, 0, 0]
    own, sessions, parents, threads = zip(*(line.split() for _, line in found))
    assert own == sessions
    assert len(set(own)) == 3
    assert set(threads) == {"1"}
    assert imports(place) == [f"{parents[0]} 1"]
    assert set(parents) == {parents[0]} != {str(os.getpid())}


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("sys.exit(3)", 3, ""),
        ("sys.exit('error: no')", 1, "error: no"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("os.abort()", -signal.SIGABRT, ""),
        ("import atexit; atexit.register(print, 'at the end')", 0, "at the end"),
        ("print(sys.argv[0][-20:], __name__)", 0, "a_family/__main__.py __main__"),
    ],
)
def test_they_end_as_a_new_process_does(place: Path, program: str, code: int, said: str) -> None:
    assert ended(place, program) == (code, said)
    new = subprocess.run([sys.executable, "-m", "a_family", program], capture_output=True, text=True, cwd=place)
    assert new.returncode == code
    assert (new.stdout + new.stderr).splitlines()[-1:] == ([said] if said else [])


def test_what_kills_one_leaves_the_others(place: Path) -> None:
    wait = "import time\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint('went')"
    with contextlib.chdir(place):
        other = child(place, wait, "other")
        assert ended(place, "os.kill(os.getpid(), 9)")[0] == -signal.SIGKILL
        assert ended(place, "print('later')") == (0, "later")
        (place / "go").touch()
    assert (other.wait(PATIENCE), other.last) == (0, "went")
    assert len(imports(place)) == 1


def test_the_environment_is_the_childs_own_and_what_libraries_read_at_once_takes_a_new_server(place: Path) -> None:
    said = "print(os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('OMP_NUM_THREADS'), os.environ.get('MORE'))"
    assert ended(place, said, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="3") == (0, "3 1 None")
    assert ended(place, said, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="0,1") == (0, "0,1 1 None")
    assert ended(place, said, OMP_NUM_THREADS="1") == (0, "None 1 None")
    assert len(imports(place)) == 1
    assert ended(place, said, OMP_NUM_THREADS="2") == (0, "None 2 None")
    assert [line.split()[1] for line in imports(place)] == ["1", "2"]


@pytest.mark.slow
def test_records_name_the_commit_of_the_code_that_was_imported(place: Path, monkeypatch) -> None:
    """A checkout that is updated changes nothing for a server that runs."""
    for package in ("mae_core", "benchmarks"):
        shutil.copytree(ROOT / package, place / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(place)
    said = "from mae_core import machine; print(machine.__file__, machine.commit())"
    found = []
    for commit in ("monday", "tuesday"):
        (place / "COMMIT").write_text(commit)
        found.append(ended(place, said))
    assert found == [(0, f"{place}/mae_core/machine.py monday")] * 2


def test_they_work_where_the_client_works_and_draw_other_numbers(place: Path, monkeypatch) -> None:
    (place / "elsewhere").mkdir()
    said = "import numpy, random; print(os.getcwd() == sys.path[0], numpy.random.rand(), random.random())"
    found = []
    for folder in (place, place / "elsewhere"):
        monkeypatch.chdir(folder)
        found.append(ended(place, said)[1].split())
        assert ended(place, "print(os.getcwd())") == (0, str(folder))
    assert [one[0] for one in found] == ["True", "True"]
    assert len({number for one in found for number in one[1:]}) == 4


def test_ctrl_c_reaches_a_child_that_does_not_run_yet(place: Path, capsys) -> None:
    (place / "hold").touch()
    one = child(place, "import time; time.sleep(900)")
    wait_for(place / "imports")
    assert one.wait(0) is None
    one.stop()
    (place / "hold").unlink()
    assert (one.wait(PATIENCE), one.last) == (130, "stopped")
    stop_all([one])  # it has ended already


def test_ctrl_c_waits_for_what_would_lose_it(place: Path) -> None:
    """numpy, which a fork seeds, imports modules in C for it."""
    losing = """
import contextlib, signal, sys, types
def seed():
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
sys.modules["numpy"] = types.SimpleNamespace(random=types.SimpleNamespace(seed=seed))
"""
    (place / "a_family" / "tasks.py").write_text(IMPORTED.replace("import numpy", "") + losing)
    assert ended(place, "print('went on')") == (130, "stopped")


def test_a_schedulers_signal_to_all_processes_ends_no_server(place: Path) -> None:
    said = "import signal, time; signal.signal(15, lambda *_: sys.exit(7)); print(os.getppid(), flush=True)"
    one = child(place, f"{said}; time.sleep(900)")
    while not one.last:
        time.sleep(0.01)
    for number in warm.STOPS:
        os.kill(int(one.last), number)
    one.process.send_signal(signal.SIGTERM)
    assert one.wait(PATIENCE) == 7
    assert ended(place, "print('on')") == (0, "on")
    assert len(imports(place)) == 1


def test_a_killed_server_takes_its_children_along_and_the_next_one_starts(place: Path) -> None:
    one = child(place, "import time; print(os.getpid(), os.getppid(), flush=True); time.sleep(900)")
    while not one.last:
        time.sleep(0.01)
    own, server = map(int, one.last.split())
    os.kill(server, signal.SIGKILL)
    assert one.wait(PATIENCE) == -signal.SIGKILL
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{own}").exists() and "Z" not in Path(f"/proc/{own}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ended(place, "print('on')") == (0, "on")
    assert len(imports(place)) == 2


CLIENT = """
import os, sys
from benchmarks import warm
warm.FAMILIES = "a_family"
child = warm.start([sys.executable, "-m", "a_family", sys.argv[1]], os.environ)
print(child.stdout.readline(), flush=True)
child.wait()
"""


def test_a_child_outlives_its_client_and_the_server_ends_with_it(place: Path) -> None:
    program = "import time; print(os.getppid())\nwhile not os.path.exists('go'): time.sleep(0.01)\n"
    program += "open('done', 'w').close()"
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, program], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    server = int(client.stdout.readline())
    client.kill()
    client.communicate()
    (place / "go").touch()
    wait_for(place / "done")
    deadline = time.monotonic() + PATIENCE
    while Path(f"/proc/{server}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


IMPORTER = """
import os, pathlib, signal, sys
from benchmarks import warm
from benchmarks.children import Child
warm.FAMILIES = "a_family"
os.environ.update(warm.waiting(os.environ))
import a_family.tasks
for number in warm.STOPS:
    signal.signal(number, lambda *_: print("the client's own"))
print("not yet printed", end=" ")
warm.fork_server(warm.surroundings())
print("printed", os.getpid(), flush=True)
for number, (environment, program) in enumerate(eval(sys.argv[1])):
    one = Child([sys.executable, "-m", "a_family", program], pathlib.Path(f"{number}"), environment)
    print(one.wait(300), one.last, flush=True)
"""


def test_a_process_that_has_imported_everything_already_is_forked_itself(place: Path) -> None:
    said = "import signal; handlers = [str(signal.getsignal(number)) for number in (2, 15)]; "
    said += "print(os.getsid(0) == os.getpid(), os.getppid(), handlers)"
    programs = [
        ({}, said),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "raise ValueError(os.environ['CUDA_VISIBLE_DEVICES'] + os.environ['MORE'])"),
        ({}, "sys.exit(3)"),
        ({}, "os.kill(os.getppid(), 9)"),
        ({}, "print('on')"),
        ({"OMP_NUM_THREADS": "7"}, "print(os.environ['OMP_NUM_THREADS'])"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", IMPORTER, repr(programs)],
        cwd=place,
        env=os.environ | {"MORE": "!", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    first, *rest = done.stdout.splitlines()
    (own,) = first.removeprefix("not yet printed printed ").split()
    told, raised, *others = rest
    assert told.startswith("0 True ")
    assert told.split()[2] != own
    assert told.endswith("['<built-in function default_int_handler>', '0']")  # as Python sets them
    assert (raised, others) == ("1 ValueError: 3!", ["3 ", "-9 ", "0 on", "0 7"])
    # What comes after a server that was killed takes one that imports anew, and so does another environment.
    assert [line.split()[1] for line in imports(place)] == ["1", "1", "7"]
    assert imports(place)[0].split()[0] == own


def test_what_is_no_task_starts_as_ever(place: Path) -> None:
    one = Child([sys.executable, "-c", "print('new')"], place / "log")
    assert isinstance(one.process, subprocess.Popen)
    assert (one.wait(PATIENCE), one.last) == (0, "new")
    assert not (place / "imports").exists()


def test_a_fork_has_threads_and_could_use_a_gpu(place: Path) -> None:
    """OpenMP's threads hang in a fork of a process that had any; CUDA refuses one of a process that looked for GPUs."""
    families = "\n".join(f"import {module}.tasks" for module in sorted({task.module for task in TASKS}))
    (place / "a_family" / "tasks.py").write_text(f"{IMPORTED}\n{families}\n")
    two = "import torch; torch.set_num_threads(2); a = torch.rand(600, 600)"
    assert ended(place, f"{two}; print(torch.get_num_threads(), len(a @ a), torch.cuda._is_in_bad_fork())") == (
        0,
        "2 600 False",
    )


def test_a_library_that_looks_for_gpus_at_its_import_costs_the_warm_start_only(place: Path) -> None:
    """CUDA does not bear a fork then: the child starts anew."""
    poisoned = "import sys, types\nsys.modules['torch'] = types.SimpleNamespace()\nsys.modules['torch'].cuda = "
    poisoned += "types.SimpleNamespace(_is_in_bad_fork=lambda: True)\n"
    said = "print('torch' in sys.modules, os.getsid(0) == os.getpid(), os.environ['CUDA_VISIBLE_DEVICES'])"
    for gpus, warm_still in ((["/no/gpu"], True), (["/no/gpu", "/dev/null"], False)):
        told = f"sys.modules['__main__'].GPUS = {gpus}\n"
        (place / "a_family" / "tasks.py").write_text(IMPORTED + poisoned + told)
        assert ended(place, said, CUDA_VISIBLE_DEVICES="2") == (0, f"{warm_still} True 2")
        warm.server.cache_clear()


def test_output_is_that_of_a_pipe(place: Path) -> None:
    program = "sys.stdout.reconfigure(errors='replace'); print(sys.stdout.seekable(), 'a'); print('b', file=sys.stderr)"
    assert ended(place, program) == (0, "b")
    assert (place / "log").read_text().splitlines()[-2:] == ["False a", "b"]
