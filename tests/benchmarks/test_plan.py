"""What the plan says of the data, the disk and the call before anything starts."""

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import pytest

from benchmarks import run_all
from benchmarks.children import task_command
from benchmarks.launch.units import unit_command
from benchmarks.plan import make_plan, settings_by_task
from benchmarks.suite import TASKS
from mae_core.checkpoint import save_weights, sha256_of
from mae_core.errors import UserError
from mae_core.machine import Machine, hardware
from mae_core.vit import build_vit
from tests.fixtures.transfer import ARCH, write_imagenet, write_split
from transfer.run import describe, write_record
from transfer.task import CLASSIFIER_FILE


@pytest.fixture
def root(tmp_path) -> Path:
    """Four classes of ImageNet, 32 training images."""
    return write_imagenet(tmp_path / "data", train=8, val=1)


def call(capsys, out: Path, *arguments: str) -> tuple[int, list[str], str]:
    """Exit code, lines printed, error."""
    code = run_all.main(["--ckpt", f"random:{ARCH}", "--recipe", "mini", "--out", str(out), *arguments])
    printed, error = capsys.readouterr()
    return code, printed.splitlines(), error


def below(lines: list[str], task: str) -> list[str]:
    """The lines under a task's own."""
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == [task])
    return [line.strip() for line in takewhile(lambda line: line.startswith("      "), lines[start + 1 :])]


def test_findings_stand_below_their_task_and_once(root, tmp_path, capsys):
    write_split(root / "imagenet-a", 1)
    seeds = ["--seeds", "0", "1", "--set", "imagenet_knn.k=2"]
    code, lines, _ = call(capsys, tmp_path / "out", "--data", str(root), *seeds, "--plan")
    assert code == 0
    classes, counts, *_ = below(lines, "imagenet_knn")
    assert classes.startswith("data: imagenet: 996 of the 1000 classes are missing (n01440764, ")
    assert counts.startswith("data: imagenet: 32 train images, 1281135 fewer than the official 1281167; 4 val images")
    assert below(lines, "imagenet_linprobe") == ["data: as for imagenet_knn"]
    assert below(lines, "imagenet_a")[0].startswith("data: imagenet-a: 196 of the 200 classes are missing")
    assert below(lines, "coco") == []
    assert sum("996 of the 1000" in line for line in lines) == 1
    assert lines[1] == f"  on {hardware(Machine())}, fp32"
    assert lines[-1].startswith("  disk: up to 0.")


def test_a_plan_says_what_it_costs_and_a_budget_leaves_out_what_is_over_it(root, tmp_path, capsys):
    out, setting = tmp_path / "out", ["--data", str(root), "--set", "imagenet_knn.k=2"]
    code, lines, _ = call(capsys, out, *setting, "--tasks", "imagenet_knn", "--plan")
    assert code == 0
    assert re.search(r"4 val; \d+:\d\d, \d\.\d\d core hours by FLOPs$", lines[3])
    assert re.search(r"^  cost: \d\.\d\d core hours, \d+:\d\d one after the other \(1 by FLOPs\)$", lines[-2])
    for flags in (["--plan"], []):
        code, lines, _ = call(capsys, out, *setting, "--tasks", "imagenet_knn", "--budget", "0.01m", *flags)
        assert code == 2
        assert "torch          left out over --budget: " in lines[3]
        assert "hours, 0.000167 of 0.000167 are left" in lines[3]
        assert "  1 left out" in lines
    assert list(out.glob("runs/**/record.json")) == []
    with pytest.raises(SystemExit, match="2"):
        call(capsys, out, *setting, "--measure")
    assert "argument --measure: it goes with --plan" in capsys.readouterr().err


def test_a_root_that_is_not_there_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MAE_TRANSFER_DATA", raising=False)
    code, lines, error = call(capsys, tmp_path / "out", "--recipe", "paper", "--plan")
    assert (code, lines, error.count("\n")) == (2, [], 1)
    assert "there is no folder datasets; set --data to the folder that holds imagenet/" in error
    monkeypatch.setenv("MAE_TRANSFER_DATA", str(tmp_path / "sets"))
    _, _, error = call(capsys, tmp_path / "out", "--recipe", "paper")
    assert f"there is no folder {tmp_path}/sets; set $MAE_TRANSFER_DATA to" in error
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    code, lines, error = call(capsys, tmp_path / "out", "--data", str(tmp_path), "--plan")
    assert (code, lines) == (2, [])
    assert error == f"error: no data: {tmp_path} may not be read by this user: change its permissions (chmod)\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "imagenet_knn.k=33"], "imagenet_knn: k=33, but there are 32 training images"),
        (["--set", "imagenet_finetune.batch=34"], "imagenet_finetune: 32 training images are less than one batch=34"),
        (
            ["--set", "imagenet_finetune.batch=8", "--gpus", "3", "--device", "cpu"],
            "batch=8 cannot be shared by 3 processes",
        ),
        (["--gpus", "2", "--device", "auto"], "2 processes, but torch can use no GPU here: add --device cpu"),
        (["--set", "imagenet_finetune.batch=7", "imagenet_finetune.mixup=1"], "each process gets 7 of batch=7"),
        (["--set", "imagenet_linprobe.batch=8", "--micro-batch", "1"], "BatchNorm cannot learn from one image"),
    ],
)
def test_a_call_that_cannot_be_run_is_refused_by_the_plan_too(root, tmp_path, capsys, arguments, said):
    for plan in (["--plan"], []):
        code, lines, error = call(capsys, tmp_path / "out", "--data", str(root), *arguments, *plan)
        assert (code, lines) == (2, [])
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_reason_stands_once(tmp_path, capsys):
    write_split(tmp_path / "data" / "imagenet" / "train", 1)
    _, lines, _ = call(capsys, tmp_path / "out", "--data", str(tmp_path / "data"), "--plan")
    assert sum("imagenet lacks val" in line for line in lines) == 1
    assert any(line.split() == ["imagenet_linprobe", "mini", "torch", "failed", "as", "imagenet_knn"] for line in lines)


def test_every_task_has_a_state_and_nothing_is_run(root, tmp_path, capsys):
    write_split(root / "imagenet-c" / "fog" / "1", 1)
    code, lines, _ = call(capsys, tmp_path / "out", "--data", str(root), "--plan")
    assert code == 0
    stated = {line.split()[0]: line for line in lines if line.startswith("    ") and line[4] != " "}
    assert "failed   32 training images are less than one batch=256: set a smaller batch" in stated["imagenet_linprobe"]
    for task, state, why in (
        ("imagenet_knn", "to do", "4 classes, 32 train, 4 val"),
        ("imagenet_c", "failed", "lacks 14 of the 15 corruptions"),
        ("imagenet_a", "skipped", str(root / "imagenet-a")),
    ):
        assert state in stated[task]
        assert why in stated[task]
    assert not (tmp_path / "out" / "runs").exists()


def test_a_full_disk_is_said_by_the_plan_and_refused_by_the_run(root, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10, 10))
    train = ["--data", str(root), "--tasks", "imagenet_finetune", "--set", "imagenet_finetune.batch=8"]
    for plan in (["--plan"], []):
        code, lines, error = call(capsys, tmp_path / "out", *train, *plan)
        said = lines[-1].removeprefix("  disk: ")
        assert said.endswith("0.00 GiB free")
        assert (code, error) == (2, f"error: the disk is too small: {said}; free some, or choose another --out\n")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_read_is_skipped_as_missing_data_are(root, tmp_path, capsys, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refuse)  # of the class folders
    code, lines, error = call(capsys, tmp_path / "out", "--data", str(root), "--tasks", "imagenet_knn")
    assert (code, error) == (2, "")
    assert "skipped  no data: " in lines[3]
    assert "/imagenet/train/n01498041 may not be read by this user" in lines[3]


def test_settings_go_to_their_task():
    found = settings_by_task(["imagenet_finetune.epochs=3", "imagenet_c.transform=resize"], TASKS)
    assert found["imagenet_finetune"] == ["epochs=3"]
    assert found["imagenet_c"] == ["transform=resize"]
    with pytest.raises(UserError, match="did you mean imagenet_c"):
        settings_by_task(["imagenet_cc.transform=resize"], TASKS)


def test_from_scratch_the_checkpoints_of_one_size_are_one_job(root, tmp_path):
    tuned, arch = tmp_path / "tuned.safetensors", f"random:{ARCH}"
    save_weights(tuned, build_vit(ARCH, num_classes=1000, pool="avg").state_dict(), {})
    common = ["--recipe", "mini", "--data", str(root), "--out", str(tmp_path / "out"), "--tasks", "imagenet_scratch"]
    args = run_all.parse(["--ckpt", str(tuned), arch, "--seeds", "0", "1", *common])
    jobs = [item.job for item in make_plan(args)]
    assert [(job.checkpoint.name, job.seed) for job in jobs] == [(f"scratch:{ARCH}", seed) for seed in (0, 1)]
    assert jobs[0].work.parent.parent.name == f"scratch-{ARCH}-{jobs[0].checkpoint.sha256[:8]}"
    command = task_command(jobs[:1], args)
    assert command[command.index("--ckpt") + 1] == arch
    assert len({job.identity()["checkpoint"] for job in jobs}) == 1


def test_a_limit_is_in_the_plan_its_estimates_and_its_commands(root, tmp_path, capsys):
    flags = ["--ckpt", f"random:{ARCH}", "--recipe", "mini", "--data", str(root), "--out", str(tmp_path / "out")]
    flags += ["--tasks", "imagenet_linprobe,imagenet_knn"]
    few, full = (run_all.parse([*flags, *more]) for more in (["--limit", "2"], ["--set", "imagenet_linprobe.batch=4"]))
    assert run_all.main([*flags, "--limit", "2", "--plan"]) == 0
    printed = capsys.readouterr().out
    assert "mini, limit 2" in printed
    assert "at most 2 images a split of 4 classes" in printed
    assert "imagenet_linprobe, fitted to so few images: batch: 256 -> 2" in printed
    for item, other in zip(make_plan(few), make_plan(full), strict=True):
        job = item.job
        assert (job.data.counts["train"], job.recipe_label) == (2, "mini, limit 2")
        assert job.work.name.startswith("mini--limit-2-")
        assert sum(p.images for p in job.task.parts(job)) < sum(p.images for p in other.job.task.parts(other.job))
        assert job.identity()["data"] != other.job.identity()["data"]
        command = task_command([job], few)
        assert command[command.index("--limit") + 1] == "2"
        assert "--limit" not in task_command([other.job], full)
        elsewhere = unit_command([item], few, 1)
        assert elsewhere[elsewhere.index("--limit") + 1] == "2"


def test_a_plan_of_which_nothing_can_run_ends_with_2(root, tmp_path, capsys):
    common = ["--data", str(root), "--set", "imagenet_knn.k=2", "--plan", "--tasks"]
    assert call(capsys, tmp_path / "out", *common, "imagenet_knn", "coco")[0] == 0
    code, lines, error = call(capsys, tmp_path / "out", *common[:2], "--plan", "--tasks", "coco", "ade20k")
    assert (code, error) == (2, "")
    assert "  2 skipped" in lines


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (["--set", "imagenet_c.transform=resize", "--tasks", "imagenet_knn"], "imagenet_c.transform=resize"),
        (["--set", "imagenet_finetune.epochs=9", "--tasks", "imagenet_knn"], "imagenet_finetune.epochs=9"),
        (["--set", "imagenet_partial.blocks=1"], "imagenet_partial.blocks=1"),  # which runs only if it is named
    ],
)
def test_a_setting_of_a_task_that_is_not_run_is_refused(root, tmp_path, capsys, arguments, unused):
    code, _, error = call(capsys, tmp_path / "out", "--data", str(root), *arguments, "--plan")
    task = unused.partition(".")[0]
    said = f"this call does not run {task}; add it to --tasks, or leave the setting out"
    assert (code, error) == (2, f"error: --set {unused}: {said}\n")


def test_a_classifier_that_was_changed_after_its_record_is_not_evaluated(root, tmp_path, capsys):
    write_split(root / "imagenet-a", 1)
    flags = ["--ckpt", f"random:{ARCH}", "--recipe", "mini", "--data", str(root), "--out", str(tmp_path / "out")]
    args = run_all.parse([*flags, "--tasks", "imagenet_finetune", "imagenet_a", "--set", "imagenet_finetune.batch=8"])
    tuning = next(item.job for item in make_plan(args) if item.job.task.name == "imagenet_finetune")
    file = tuning.work / CLASSIFIER_FILE
    tuning.work.mkdir(parents=True)
    save_weights(file, build_vit(ARCH, num_classes=1000, pool="avg").state_dict(), {})
    done = describe(tuning, status="ok", metrics={"top1": 50.0}, artifacts={CLASSIFIER_FILE: sha256_of(file)})
    write_record(done, tuning.work)

    def states() -> dict[str, tuple[str, str]]:
        return {item.job.task.name: (item.state, item.why) for item in make_plan(args)}

    assert {task: state for task, (state, _) in states().items()} == {
        "imagenet_finetune": "done",
        "imagenet_a": "to do",
    }
    save_weights(file, build_vit(ARCH, num_classes=1000, pool="avg").state_dict(), {"changed": "yes"})
    state, why = states()["imagenet_a"]
    assert (state, why.split(": ")[0]) == (
        *("failed", f"{file} is not the file that imagenet_finetune wrote, by its hash"),
    )
    write_record(replace(done, artifacts={}), tuning.work)  # by another version
    assert states()["imagenet_a"][0] == "to do"  # which the run then finds out about
