"""The main command as users call it: a child process, from another folder."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from benchmarks import run_all
from benchmarks.plan import Item, settings_by_task
from benchmarks.suite import TASKS
from mae_core.checkpoint import save_weights
from mae_core.errors import UserError
from mae_core.vit import build_vit
from transfer.cli import find_tasks, make_job
from transfer.data.split import wnids
from transfer.task import Record, describe, read_record, write_record

RUN_ALL = Path(run_all.__file__).resolve()
WNIDS = sorted({*wnids("imagenet_a")} & {*wnids("imagenet_r")})[:2]
ARCH = "random:vit_mini_patch8"
QUICK = ["--set", "imagenet_finetune.epochs=1", "imagenet_finetune.batch=4", "imagenet_finetune.warmup_epochs=0"]
QUICK += ["imagenet_linprobe.epochs=1", "imagenet_linprobe.batch=4", "imagenet_linprobe.warmup_epochs=0"]
QUICK += ["imagenet_knn.k=2"]  # of the few images there are


def write_images(folder: Path, count: int) -> None:
    for wnid in WNIDS:
        (folder / wnid).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / wnid / f"image {i}.JPEG")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write_images(root / "imagenet" / "train", 4)
    write_images(root / "imagenet" / "val", 3)
    return root


def call(folder: Path, *arguments: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RUN_ALL), *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, **kwargs)


def records(out: Path) -> dict[str, Record]:
    found = [read_record(path) for path in out.glob("runs/**/record.json")]
    return {record.task: record for record in found}


@pytest.mark.slow
def test_one_failing_task_leaves_the_others(tmp_path: Path, data: Path) -> None:
    write_images(data / "imagenet-a", 2)
    write_images(data / "imagenet-sketch", 2)
    (data / "imagenet-sketch" / WNIDS[0] / "broken.jpg").write_bytes(b"not an image")
    here = tmp_path / "elsewhere"
    here.mkdir()
    common = ("--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", "out", *QUICK)

    first = call(here, *common)
    found = records(here / "out")
    assert first.returncode == 1, first.stdout + first.stderr
    assert {task: record.status for task, record in found.items()} == {
        "imagenet_knn": "ok",
        "imagenet_linprobe": "ok",
        "imagenet_finetune": "ok",
        "imagenet_a": "ok",
        "imagenet_sketch": "failed",
        "imagenet_r": "skipped",
        "imagenet_c": "skipped",
        **dict.fromkeys(("inat2017", "inat2018", "inat2019", "places205", "places365"), "skipped"),
        "coco": "skipped",
        "ade20k": "skipped",
    }
    assert "broken.jpg" in found["imagenet_sketch"].reason
    assert "imagenet-r" in found["imagenet_r"].reason
    assert found["imagenet_a"].identity["parent"] == found["imagenet_finetune"].artifacts["classifier.safetensors"]
    table = (here / "out" / "tables" / "robustness.md").read_text()
    assert "failed" in table
    assert "skipped" in table
    assert "Traceback" not in first.stdout + first.stderr

    # Mended and called again: only the failed task runs, the numbers of the others stay.
    (data / "imagenet-sketch" / WNIDS[0] / "broken.jpg").unlink()
    finished = found["imagenet_finetune"].finished
    second = call(here, *common)
    assert second.returncode == 0, second.stdout + second.stderr
    again = {r.task: r for r in map(read_record, (here / "out").glob("runs/**/record.json")) if r.status == "ok"}
    assert again["imagenet_sketch"].n_eval == 4
    assert again["imagenet_finetune"].finished == finished

    # A skipped task that was asked for by name is a failure of the call; alone, nothing could run.
    assert call(here, *common, "--tasks", "imagenet_linprobe", "imagenet_r").returncode == 1
    assert call(here, *common, "--tasks", "imagenet_r").returncode == 2


@pytest.mark.slow
def test_plan_names_data_and_runs_nothing(tmp_path: Path, data: Path) -> None:
    write_images(data / "imagenet-c" / "fog" / "1", 1)
    done = call(tmp_path, "--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", "out", "--plan", *QUICK)
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("    ")}
    assert done.returncode == 0
    assert "to do" in lines["imagenet_finetune"]
    assert "2 classes, 8 train, 6 val" in lines["imagenet_finetune"]
    assert "failed" in lines["imagenet_c"]
    assert "lacks 14 of the 15 corruptions" in lines["imagenet_c"]
    assert "skipped" in lines["imagenet_a"]
    assert str(data / "imagenet-a") in lines["imagenet_a"]
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.slow
def test_interrupt_stops_cleanly_and_the_next_call_goes_on(tmp_path: Path, data: Path) -> None:
    common = ["--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", "out", "--tasks", "imagenet_finetune"]
    common += [
        "--set",
        "imagenet_finetune.epochs=150",
        "imagenet_finetune.batch=8",
        "imagenet_finetune.warmup_epochs=0",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(RUN_ALL), *common, "--save-minutes", "0"]
    running = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("out/runs/*/*/*/checkpoint.pth")):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert not records(tmp_path / "out")
    last = call(tmp_path, *common)
    assert last.returncode == 0, last.stdout + last.stderr
    assert "resuming" in next((tmp_path / "out" / "logs").glob("*.log")).read_text()


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
        (["--ckpt", ARCH, "--set", "imagenet_finetune.image_size=50"], "50x50"),
        (["--ckpt", ARCH, "--set", "imagenet_finetune.epochs=-1"], "epochs=-1"),
        (["--ckpt", ARCH, "--tasks", "imagenet_linprobe", "--set", "imagenet_c.transfrm=1"], "transform"),
        (["--ckpt", ARCH, "--set", "inat2018.recipe=diet-360"], "did you mean deit-360?"),
        (["--ckpt", ARCH, "--set", "inat2018.recipe=mini"], "--recipe chooses that, for all tasks"),
        (
            ["--ckpt", ARCH, "--set", "imagenet_finetune.recipe=deit-360"],
            "unknown recipe 'deit-360'; known: paper, mini",
        ),
        (["--ckpt", ARCH, "--set", "imagenet_partial.blocks=0,2"], "1 must be among them"),
        (["--ckpt", ARCH, "--out", str(tmp_path / "not_a_checkpoint.pth")], "not_a_checkpoint.pth is a file: give"),
    ):
        assert run_all.main([*out, *arguments]) == 2
        errors = capsys.readouterr().err
        assert said in errors
        assert len(errors.splitlines()) == 1


def test_a_group_goes_on_behind_a_child_that_ended_early(tmp_path: Path, data: Path, monkeypatch) -> None:
    """Jobs that share a child: one record was written, then the process died; the rest gets a process of its own."""
    write_images(data / "imagenet-a", 1)
    write_images(data / "imagenet-r", 1)
    args = run_all.parse(["--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", str(tmp_path / "out")])
    items = [i for i in run_all.make_plan(args) if i.job.task.name in ("imagenet_a", "imagenet_r")]
    monkeypatch.setattr(run_all, "settle", lambda job: None)
    started = []

    def run_one(child: run_all.Child) -> int:
        started.append(child.names)
        job = next(item.job for item in items if item.job.task.name == child.names[0])
        write_record(Record(child.names[0], "ok", metric="top1", metrics={"top1": 1.0}), job.work)
        return 1

    monkeypatch.setattr(run_all.Child, "run", run_one)
    made = run_all.run(items, args, lock=0)
    assert started == [["imagenet_a", "imagenet_r"], ["imagenet_r"]]
    assert [record.status for record in made] == ["ok", "ok"]


def test_nothing_to_run_is_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert run_all.main(["--ckpt", ARCH, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    assert {r.status for r in records(tmp_path / "out").values()} == {"skipped"}


def item(state: str) -> Item:
    return Item(job=None, state=state, why="")


@pytest.mark.parametrize(
    ("states", "statuses", "named", "code"),
    [
        (["to do", "done"], ["ok", "ok"], False, 0),
        (["to do", "skipped"], ["ok", "skipped"], False, 0),
        (["to do", "skipped"], ["ok", "skipped"], True, 1),
        (["to do", "to do"], ["ok", "failed"], False, 1),
        (["to do", "failed"], ["ok", "failed"], False, 1),
        (["skipped", "skipped"], ["skipped", "skipped"], True, 2),
    ],
)
def test_exit_code(states: list[str], statuses: list[str], named: bool, code: int) -> None:
    made = [Record("task", status) for status in statuses]
    assert run_all.exit_code(made, [item(state) for state in states], named) == code


def test_settings_go_to_their_task() -> None:
    found = settings_by_task(["imagenet_finetune.epochs=3", "imagenet_c.transform=resize"], TASKS)
    assert found["imagenet_finetune"] == ["epochs=3"]
    assert found["imagenet_c"] == ["transform=resize"]
    with pytest.raises(UserError, match="did you mean imagenet_c"):
        settings_by_task(["imagenet_cc.transform=resize"], TASKS)


def test_a_recipe_by_name_holds_for_its_task_alone_and_reaches_the_child(tmp_path: Path, data: Path) -> None:
    common = ["--ckpt", ARCH, "--data", str(data), "--out", str(tmp_path / "out")]
    args = run_all.parse([*common, "--set", "inat2018.recipe=deit-360", "inat2018.batch=64"])
    jobs = {item.job.task.name: item.job for item in run_all.make_plan(args)}
    job = jobs["inat2018"]
    assert {name for name in jobs if jobs[name].recipe_label != "paper"} == {"inat2018"}
    assert job.recipe_label == "deit-360 with batch=64"
    assert (job.recipe.epochs, job.recipe.batch, job.recipe.layer_decay) == (360, 64, 1.0)
    flags = run_all.flags(job, args)
    knobs = flags[flags.index("--set") + 1 :][:2]
    again = make_job(
        find_tasks(["inat2018"], TASKS)[0], job.checkpoint, "paper", knobs, job.data, args.out, 0, job.machine
    )
    assert again.work == job.work
    assert "facebookresearch/deit issues 105" in describe(job, status="skipped").sources["epochs"]
    default = {item.job.task.name: item.job for item in run_all.make_plan(run_all.parse(common))}["inat2018"]
    assert default.recipe_label == "paper"
    assert default.work != job.work


def test_from_scratch_the_checkpoints_of_one_size_are_one_job(tmp_path: Path, data: Path) -> None:
    fair = tmp_path / "tuned.safetensors"
    save_weights(fair, build_vit("vit_mini_patch8", num_classes=1000, pool="avg").state_dict(), {})
    common = ["--recipe", "mini", "--data", str(data), "--out", str(tmp_path / "out"), "--tasks", "imagenet_scratch"]
    args = run_all.parse(["--ckpt", str(fair), ARCH, "--seeds", "0", "1", *common])
    items = run_all.make_plan(args)
    assert [(item.job.checkpoint.name, item.job.seed) for item in items] == [
        ("scratch:vit_mini_patch8", s) for s in (0, 1)
    ]
    job = items[0].job
    assert job.work.parent.parent.name == f"scratch-vit_mini_patch8-{job.checkpoint.sha256[:8]}"
    assert run_all.flags(job, args)[:2] == ["--ckpt", ARCH]
    assert len({item.job.identity()["checkpoint"] for item in items}) == 1


def test_lock_is_held_by_children_too(tmp_path: Path) -> None:
    lock = run_all.take_lock(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=(lock,))
    os.close(lock)
    with pytest.raises(UserError, match="in use by another run"):
        run_all.take_lock(tmp_path)
    child.kill()
    child.wait()
    descriptor = run_all.take_lock(tmp_path)
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def test_missing_dependency_is_one_sentence(tmp_path: Path) -> None:
    # -S -E and an empty path: an interpreter without the project's packages.
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(RUN_ALL), "--list"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "make" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_summary_names_every_record(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    run_all.main(["--ckpt", ARCH, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "summary.csv").read_text()
    for path in (tmp_path / "out").glob("runs/**/record.json"):
        assert json.loads(path.read_text())["task"] in text


def test_a_child_that_dies_leaves_a_failed_record(tmp_path: Path, data: Path) -> None:
    args = run_all.parse(["--ckpt", ARCH, "--recipe", "mini", "--data", str(data), "--out", str(tmp_path / "out")])
    job = next(i.job for i in run_all.make_plan(args) if i.job.task.name == "imagenet_linprobe")
    child = SimpleNamespace(last="step 3", log=tmp_path / "log")
    record = run_all.outcome(job, -signal.SIGKILL, child)
    assert record.status == "failed"
    assert "SIGKILL" in record.reason
    assert read_record(job.work / "record.json") == record
