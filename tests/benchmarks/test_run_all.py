"""The main command as users call it: a child process, from another folder."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import ablations, execute, run_all, speed, twins
from benchmarks.plan import Item
from benchmarks.report import report
from benchmarks.suite import TASKS
from tests.fixtures import ROOT
from tests.fixtures.transfer import CLASSES, write_imagenet, write_split
from transfer.data.imagenet import wnids
from transfer.data.labelled import SETS
from transfer.detection.engines import ENGINES
from transfer.run import read_record
from transfer.task import Record

RUN_ALL = Path(run_all.__file__).resolve()
TWO = CLASSES[:2]
ARCH = "random:vit_mini_patch8"
KNOBS = ("epochs=1", "batch=4", "warmup_epochs=0")
QUICK = [f"{task}.{knob}" for task in ("imagenet_finetune", "imagenet_linprobe") for knob in KNOBS]
QUICK = ["--set", *QUICK, "imagenet_knn.k=2"]  # of the few images there are
LONG = ["--tasks", "imagenet_finetune", "--set", "imagenet_finetune.epochs=150", "imagenet_finetune.batch=8"]
LONG += ["imagenet_finetune.warmup_epochs=0"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_imagenet(tmp_path / "the data", train=4, val=3, classes=TWO)


@pytest.fixture
def mini(tmp_path: Path, data: Path) -> list[str]:
    """The flags of a run of the mini recipe on that data."""
    return ["--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", str(tmp_path / "out")]


def command(*arguments: str) -> dict:
    """What subprocess starts run_all.py with, as a user would."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return {"args": [sys.executable, str(RUN_ALL), *arguments], "env": env, "text": True}


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(**command(*arguments), cwd=folder, capture_output=True, timeout=900)


def records(out: Path) -> dict[str, Record]:
    """The last record of each task: other data give a task another folder."""
    found = [read_record(path) for path in out.glob("runs/**/record.json")]
    return {record.task: record for record in sorted(found, key=lambda record: record.finished)}


@pytest.mark.slow
def test_one_failing_task_leaves_the_others(tmp_path: Path, data: Path, monkeypatch) -> None:
    for name in ("imagenet-a", "imagenet-sketch"):
        write_split(data / name, 2, TWO)
    broken = data / "imagenet-sketch" / wnids()[TWO[0]] / "broken.jpg"
    broken.write_bytes(b"not an image")
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "elsewhere" / "out"
    common = ("--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", "out", *QUICK)

    first = call(out.parent, *common)
    assert first.returncode == 1, first.stdout + first.stderr
    found = records(out)
    absent = ("imagenet_r", "imagenet_c", *(known.name for known in SETS), "coco", "ade20k")
    assert {task: record.status for task, record in found.items()} == {
        **dict.fromkeys(("imagenet_knn", "imagenet_linprobe", "imagenet_finetune", "imagenet_a"), "ok"),
        "imagenet_sketch": "failed",
        **dict.fromkeys(absent, "skipped"),
    }
    assert "broken.jpg" in found["imagenet_sketch"].reason
    assert "imagenet-r" in found["imagenet_r"].reason
    assert found["imagenet_a"].identity["parent"] == found["imagenet_finetune"].artifacts["classifier.safetensors"]
    table = (out / "tables" / "robustness.md").read_text()
    assert "failed" in table
    assert "skipped" in table
    assert "Traceback" not in first.stdout + first.stderr

    # Mended and called again: only the failed task runs, the numbers of the others stay.
    broken.unlink()
    second = call(out.parent, *common)
    assert second.returncode == 0, second.stdout + second.stderr
    again = records(out)
    assert (again["imagenet_sketch"].status, again["imagenet_sketch"].n_eval) == ("ok", 4)
    assert again["imagenet_finetune"].finished == found["imagenet_finetune"].finished

    # A skipped task that was asked for by name is a failure of the call; on its own, nothing could run.
    monkeypatch.chdir(out.parent)
    assert run_all.main([*common, "--tasks", "imagenet_knn", "imagenet_linprobe", "imagenet_r"]) == 1
    own = [part for part in common if not part.startswith(("imagenet_knn.", "imagenet_linprobe."))]
    assert run_all.main([*own, "--tasks", "imagenet_r"]) == 2


@pytest.mark.slow
def test_interrupt_stops_cleanly_and_the_next_call_goes_on(tmp_path: Path, mini: list[str]) -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(**command(*mini, *LONG, "--save-minutes", "0"), cwd=tmp_path, **pipes)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("out/runs/*/*/*/checkpoint.pth")):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=600)
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert not records(tmp_path / "out")
    last = call(tmp_path, *mini, *LONG)
    assert last.returncode == 0, last.stdout + last.stderr
    assert "resuming" in next((tmp_path / "out" / "logs").glob("*.log")).read_text()


def tables_in(out: Path) -> dict[str, str]:
    """With any that are half written."""
    files = [path for path in (*out.glob("*.*"), *out.glob("tables/*")) if not path.name.startswith(".claim.")]
    return {path.name: path.read_text() for path in files}


INTERRUPTED = """
import os, signal, sys
from benchmarks import execute, run_all

def struck(function, now):
    def call(*arguments):
        if now(*arguments) and not os.path.exists("struck"):
            open("struck", "w").close()
            signal.raise_signal(signal.SIGINT)
        return function(*arguments)
    return call

if sys.argv[1] == "reading":
    execute.report = struck(execute.report, lambda out: True)
else:
    os.replace = struck(os.replace, lambda old, new: str(new).endswith("robustness.md"))
sys.exit(run_all.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "written"), [("reading", False), ("replacing", True)])
def test_an_interrupt_while_the_last_tables_are_written_leaves_all_of_them_or_none(
    tmp_path: Path, monkeypatch, moment: str, written: bool
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    arguments = ["--ckpt", ARCH, "--data", "data", "--out", "out"]
    assert run_all.main([*arguments, "--tasks", "imagenet_a"]) == 2  # skipped: there are no data
    before = tables_in(tmp_path / "out")
    child = [sys.executable, "-c", INTERRUPTED, moment, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(child, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert (tmp_path / "struck").exists()
    assert (done.returncode, done.stderr) == (130, "stopped; the same command goes on from here\n")
    after = tables_in(tmp_path / "out")
    assert (after != before) == written
    if written:
        report(tmp_path / "out")
        assert after == tables_in(tmp_path / "out")


def test_what_a_platform_presets_for_several_processes_is_dropped(
    tmp_path: Path, data: Path, monkeypatch, capsys
) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}.items():
        monkeypatch.setenv(name, value)
    flags = ["--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", str(tmp_path / "out"), "--plan"]
    assert run_all.main([*flags, "--tasks", "imagenet_knn", "--set", "imagenet_knn.k=2"]) == 0
    assert "imagenet_knn" in capsys.readouterr().out
    assert not {"WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"} & set(os.environ)  # the children's too


@pytest.mark.parametrize(
    ("main", "flags"),
    [
        (run_all.main, ["--plan"]),
        (ablations.main, ["--table", "1a", "--plan"]),
        (speed.main, ["eval", "--arch", "vit_mini_patch8"]),
        (twins.main, ["knn", "--data", "."]),
    ],
)
def test_torchrun_is_answered_with_what_to_do(monkeypatch, capsys, main, flags) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(flags) == 2
    errors = capsys.readouterr().err
    assert "start this command plainly" in errors
    assert ("with --gpus N" in errors) == (main in (run_all.main, ablations.main))
    assert len(errors.splitlines()) == 1


def test_wrong_calls_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "not_a_checkpoint.pth").write_text("<html>")
    out = ["--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    for arguments, said in (
        (["--ckpt", str(tmp_path / "absent.pth")], "absent.pth"),
        (["--ckpt", str(tmp_path / "not_a_checkpoint.pth")], "not_a_checkpoint.pth"),
        (["--ckpt", ARCH, "--tasks", "imagenet_finetun"], "did you mean imagenet_finetune?"),
        (["--ckpt", ARCH, "--set", "imagenet_finetune.layer_deca=1"], "did you mean layer_decay?"),
        (["--ckpt", ARCH, "--set", "imagenet_finetune.epochs=ten"], "imagenet_finetune: --set epochs=ten"),
        (["--ckpt", ARCH, "--set", "imagenet_knn.image_size=0"], "imagenet_knn: image_size=0"),
        (["--ckpt", ARCH, "--tasks", "folder:a.b", "--set", "folder.batch=8"], "did you mean folder:a.b?"),
        (["--ckpt", ARCH, "--tasks", "folder:a.b", "--set", "folder:a.b.bach=8"], "did you mean batch?"),
        (["--ckpt", ARCH, "--tasks", "folder:x/a", "folder:y/a"], "would both be called folder:a"),
        (["--ckpt", ARCH, "--set", "epochs=1"], "TASK.KNOB=VALUE"),
        (["--ckpt", ARCH, "--data", str(tmp_path / "nowhere")], "nowhere"),
        (["--ckpt", ARCH, "--gpus", "0"], "--gpus 0"),
        (["--ckpt", ARCH, "--jobs", "0"], "--jobs 0: give 1 or more"),
        (["--ckpt", ARCH, "--gpus-per-job", "2"], "--gpus-per-job 2 is more than --gpus 1"),
        (["--ckpt", ARCH, "--set", "imagenet_finetune.image_size=50"], "50x50"),
        (["--ckpt", ARCH, "--set", "imagenet_finetune.epochs=-1"], "epochs=-1"),
        (["--ckpt", ARCH, "--tasks", "imagenet_linprobe", "--set", "imagenet_c.transfrm=1"], "transform"),
        (["--ckpt", ARCH, "--set", "inat2018.recipe=diet-360"], "did you mean deit-360?"),
        (["--ckpt", ARCH, "--set", "inat2018.recipe=mini"], "--recipe chooses that, for all tasks"),
        (
            ["--ckpt", ARCH, "--set", "imagenet_finetune.recipe=deit-360"],
            "unknown recipe 'deit-360'; known: paper, table-9, mini",
        ),
        (["--ckpt", ARCH, "--set", "imagenet_partial.blocks=0,2"], "1 must be among them"),
        (["--ckpt", ARCH, "--out", str(tmp_path / "not_a_checkpoint.pth")], "not_a_checkpoint.pth is a file: give"),
    ):
        assert run_all.main([*out, *arguments]) == 2
        errors = capsys.readouterr().err
        assert said in errors
        assert len(errors.splitlines()) == 1


def test_nothing_to_run_is_exit_code_2_and_the_summary_names_every_record(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    out = tmp_path / "out"
    assert run_all.main(["--ckpt", ARCH, "--data", str(tmp_path / "data"), "--out", str(out)]) == 2
    assert {r.status for r in records(out).values()} == {"skipped"}
    text = (out / "summary.csv").read_text()
    assert all(task in text for task in records(out))


@pytest.mark.parametrize(
    ("states", "statuses", "named", "code"),
    [
        (["to do", "done"], ["ok", "ok"], False, 0),
        (["to do", "skipped"], ["ok", "skipped"], False, 0),
        (["to do", "skipped"], ["ok", "skipped"], True, 1),
        (["to do", "to do"], ["ok", "failed"], False, 1),
        (["to do", "failed"], ["ok", "failed"], False, 1),
        (["skipped", "skipped"], ["skipped", "skipped"], True, 2),
        (["to do", "left out"], ["ok"], False, 0),
        (["to do", "left out"], ["ok"], True, 1),
        (["skipped", "left out"], ["skipped"], False, 2),
    ],
)
def test_exit_code(states: list[str], statuses: list[str], named: bool, code: int) -> None:
    made = [Record("task", status) for status in statuses]
    items = [Item(job=None, state=state, why="") for state in states]
    assert execute.exit_code(made, items, named) == code


@pytest.mark.parametrize("name", ["run_all.py", "ablations.py", "speed.py", "report"])
def test_missing_dependency_is_one_sentence(tmp_path: Path, name: str) -> None:
    program, folder = [str(RUN_ALL.with_name(name))], tmp_path
    if name == "report":
        program, folder = ["-m", "benchmarks.report"], ROOT
    # -S -E and an empty path: an interpreter without the project's packages.
    done = subprocess.run([sys.executable, "-S", "-E", *program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert "make" in done.stderr
    assert len(done.stderr.splitlines()) == 1


HEAVY = """
import sys
from benchmarks import run_all
try:
    run_all.main(sys.argv[1:])
except SystemExit as e:
    print(e.code, {"numpy", "torch", "pandas", "timm"} & set(sys.modules))
"""


@pytest.mark.parametrize(("flags", "code"), [(["--help"], 0), (["--gpus", "two"], 2), (["--engine", "keras"], 2)])
def test_a_command_line_is_read_before_anything_heavy_is_imported(flags: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-c", HEAVY, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{code} set()"


PLANNED = """
import sys
from benchmarks import run_all
code = run_all.main(sys.argv[1:])
print(code, {"timm", "torchvision", "torch._dynamo", "triton", "scipy", "pandas"} & set(sys.modules))
"""


def test_a_second_plan_imports_neither_timm_nor_torchvision_and_says_the_same(tmp_path: Path) -> None:
    """Of the jobs that run unless others are named. What the first one found is kept; only the rate of the machine is
    measured again."""
    tasks = ["imagenet_finetune", "imagenet_linprobe", "imagenet_a", "imagenet_knn"]
    tasks += ["coco", "ade20k", "ade20k_linear"]
    out, cache = tmp_path / "out", {"MAE_TRANSFER_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", PLANNED, "--recipe", "mini", "--plan", "--out", str(out), "--tasks", *tasks]
    plans = []
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **cache}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        plans.append(done.stdout.splitlines())
    assert plans[0][-1].startswith("0 {")
    assert plans[1][-1] == "0 set()"
    measured = re.compile(r"; \d.* by FLOPs$|cost: .*|[\d.]+ GiB free")
    same = [[measured.sub("", line) for line in plan[:-1]] for plan in plans]
    assert same[0] == same[1]


def test_the_engines_that_it_offers_are_those_of_the_tasks() -> None:
    several = {task.name: list(task.engines) for task in TASKS if len(task.engines) > 1}
    assert several == {"coco": list(ENGINES)}
