"""The half hour on a GPU, tried without one."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_bundle, gpu_check
from benchmarks.gpu import numerics, trainings
from benchmarks.gpu.room import Room, last_line, line, skipped
from mae_core import machine
from tests.fixtures.transfer import write_imagenet


@pytest.fixture
def checks(monkeypatch, tmp_path):
    """Run gpu_check's main, with children replaced by `lines`: {check: its lines}; returns (exit code, checks run)."""

    def run(lines, *more):
        ran = []

        def child(name, args, seconds):
            ran.append(name)
            return lines[name]

        monkeypatch.setattr(gpu_check, "run_child", child)
        out = ["--rehearse", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--name", "card"]
        return gpu_check.main([*out, *more, "--only", *lines]), ran

    return run


def test_what_passed_is_not_run_again_and_what_failed_is(checks, tmp_path):
    good, bad = line("a", True, "1 GiB"), line("b", False, "3 | 4")
    assert checks({"device": [good], "knn": [skipped("k", "no"), bad]}) == (1, ["device", "knn"])
    assert checks({"device": [good], "knn": [line("b", True, "5")]}) == (0, ["knn"])
    table = (tmp_path / "out" / "card.md").read_text()
    assert "| a | pass | 1 GiB |" in table
    assert "| b | pass | 5 |" in table
    assert "| coco | not run |  |" in table
    found = json.loads((tmp_path / "out" / "card.json").read_text())
    assert found["checks"]["device"]["lines"] == [asdict(good)]


def test_another_commit_begins_anew(checks, monkeypatch):
    good = {"device": [line("a", True, "1")]}
    assert checks(good)[1] == ["device"]
    monkeypatch.setattr(gpu_check, "commit", lambda: "another")
    assert checks(good)[1] == ["device"]


def test_no_check_starts_when_time_is_over(checks, capsys):
    assert checks({"device": [line("a", True, "1")]}, "--minutes", "0") == (1, [])
    assert "0 minutes are over" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--work", str(tmp_path)]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err
    assert gpu_check.main(["--rehearse", "--only", "cocoa", "--work", str(tmp_path)]) == 2
    assert "did you mean coco?" in capsys.readouterr().err


def test_wrong_arithmetic_is_seen(tmp_path, monkeypatch):
    """A GPU whose results are off by more than its arithmetic explains."""
    room = Room("cpu", tmp_path)
    torch.manual_seed(0)
    model, images = torch.nn.Linear(8, 3), torch.randn(4, 8)
    found = list(numerics.compare(room, "x", model, lambda m, x: m(x).float().square().mean(), images))
    assert [one.status for one in found] == ["pass"] * 3
    assert found[0].values == {"loss": 0.0, "gradient": 0.0}  # the CPU beside itself
    calls = []

    def wrong(m, x):
        calls.append(m)
        return m(x).float().square().mean() * (1 + 0.05 * (len(calls) > 1))

    assert [one.status for one in numerics.compare(room, "x", model, wrong, images)] == ["fail"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("check", [numerics.forward, numerics.boxes, numerics.knn])
def test_a_cpu_computes_what_a_cpu_computes(check, tmp_path):
    found = list(check(Room("cpu", tmp_path)))
    assert found
    assert [one for one in found if one.status != "pass"] == []


@pytest.mark.slow
@pytest.mark.parametrize("check", ["kill", "processes"])
def test_a_rehearsed_check_passes(check, noise_images, tmp_path, capsys):
    where = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    data = write_imagenet(tmp_path / "work" / "data")
    (data / "unlabelled").symlink_to(noise_images)
    (data / "complete").touch()
    assert gpu_check.main(["--rehearse", "--only", check, *where]) == 0, capsys.readouterr().out


def test_the_last_line_says_something():
    assert last_line("a\nOutOfMemoryError: 2 GiB\n=====\n-----\n\n") == "OutOfMemoryError: 2 GiB"
    assert last_line("1/4\r2/4\r") == "2/4"
    assert last_line(" \n") == "it printed nothing"


def test_the_bundle_leaves_out_what_a_machine_with_torch_has():
    names = {pin.split("==")[0] for pin in gpu_bundle.small()}
    assert {"timm", "safetensors", "pycocotools", "mmsegmentation", "mmcv-lite", "filelock"} <= names
    assert not names & {
        "torch",
        "torchvision",
        "triton",
        "numpy",
        "pandas",
        "nvidia-nccl-cu13",
        "opencv-python-headless",
    }
    assert not names & {"pytest", "ruff", "mypy"}


def test_a_bundle_never_replaces_a_folder_of_other_files(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert gpu_bundle.main(["--out", str(tmp_path)]) != 0
    assert "holds other files" in capsys.readouterr().err
    assert (tmp_path / "mine").exists()


def test_a_bundle_knows_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "mae_core" / "machine.py"))
    (tmp_path / machine.COMMIT_FILE).write_text("0123abc\n")
    machine.commit.cache_clear()
    try:
        assert machine.commit() == "0123abc"
    finally:
        machine.commit.cache_clear()


def test_both_ways_of_pretraining_start_anew(tmp_path, monkeypatch):
    """The compiled run once found the other's finished training in its folder, and passed with its figures."""

    class GPU(Room):
        rehearsal = False
        unlabelled = tmp_path

        def run(self, name, command, env=None, seconds=3600):
            out = Path(command[command.index("--out") + 1])
            out.mkdir()  # fails if it is there
            epochs = [{"step": step, "seconds": step / 10, "loss": 1 / step} for step in (10, 20)]
            (out / "log.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
            return f"{out}: 20 steps, peak 1.0 GiB"

    monkeypatch.setattr(trainings, "matmul_rate", lambda device, precision: 1e12)
    found = list(trainings.pretraining(GPU("cuda", tmp_path)))
    assert [one.status for one in found] == ["pass", "pass"]
    assert [one.values["images_per_second"] for one in found] == [2560.0, 2560.0]  # 10 steps of 256 images in a second
