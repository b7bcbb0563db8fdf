"""Following a pre-training: what is evaluated when, when it ends, and what a kill of the watcher costs."""

import csv
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from benchmarks import watch
from benchmarks.watch import Point, draw, follow, main, points_of
from mae_core.autoencoder import MaskedAutoencoder
from mae_core.checkpoint import save_weights
from mae_core.errors import UserError
from tests.fixtures import ROOT
from tests.fixtures.records import CHECKPOINT, ok
from tests.fixtures.transfer import ARCH, write_imagenet


class Suite:
    """In place of run_all: says which files it was given, and what the pre-training writes meanwhile."""

    def __init__(self, run, later=(), code=0):
        self.run, self.later, self.code, self.calls = run, list(later), code, []

    def main(self, arguments):
        files = arguments[arguments.index("--ckpt") + 1 : arguments.index("--out")]
        self.calls.append([file.rpartition("/")[2] for file in files])
        for name in self.later.pop(0) if self.later else ():
            (self.run / name).touch()
        return self.code


@pytest.fixture
def trained_on(monkeypatch):
    """Says how often a look finds that somebody trains."""
    monkeypatch.setattr(watch, "POLL", 0)

    def say(*answers):
        left = list(answers)
        monkeypatch.setattr(watch.Watch, "holder", lambda self: {} if left.pop(0) else None)

    return say


def test_what_appears_is_evaluated_once_and_the_final_weights_end_it(tmp_path, monkeypatch, trained_on):
    (tmp_path / "epoch-0001.safetensors").touch()
    suite = Suite(tmp_path, [["epoch-0002.safetensors", "epoch-0003.safetensors"], ["mae.safetensors"]])
    monkeypatch.setattr(watch.run_all, "main", suite.main)
    trained_on(True, True, False, False)
    assert follow(tmp_path, tmp_path / "out", ["--tasks", "imagenet_knn"]) == 0
    assert suite.calls == [
        ["epoch-0001.safetensors"],
        ["epoch-0002.safetensors", "epoch-0003.safetensors"],
        ["mae.safetensors"],
    ]


def test_a_task_that_failed_shows_at_the_end_and_a_wrong_call_at_once(tmp_path, monkeypatch, trained_on):
    for code, calls in ((1, 2), (2, 1), (130, 1)):
        run = tmp_path / str(code)
        run.mkdir()
        (run / "epoch-0001.safetensors").touch()
        suite = Suite(run, [["mae.safetensors"]], code)
        monkeypatch.setattr(watch.run_all, "main", suite.main)
        trained_on(True, True, False)
        assert follow(run, run / "out", []) == code
        assert len(suite.calls) == calls


def test_it_does_not_wait_for_a_pre_training_that_is_gone(tmp_path, monkeypatch, trained_on, capsys):
    (tmp_path / "epoch-0004.safetensors").touch()
    monkeypatch.setattr(watch.run_all, "main", Suite(tmp_path).main)
    trained_on(True, True, False)
    with pytest.raises(UserError, match=r"nobody trains there now.*epoch-0004\.safetensors"):
        follow(tmp_path, tmp_path / "out", [])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "say with --tasks"),
        (["--tasks", "imagenet_knn", "--ckpt", "x"], "--ckpt does not go with watch"),
        (["--tasks", "imagenet_knn", "--launcher=slurm"], "--launcher does not go with watch"),
        (["--tasks", "imagenet_knn"], "is no folder"),
    ],
)
def test_wrong_calls_are_refused(tmp_path, capsys, flags, said):
    assert main([str(tmp_path / "none"), *flags]) == 2
    assert said in capsys.readouterr().err


def record(path, epochs, seed=0, top1=50.0):
    made = ok("imagenet_knn", seed, top1=top1)
    return replace(made, checkpoint={**CHECKPOINT, "path": str(path), "meta": {"epochs": epochs}})


def test_the_curve_is_of_these_weights_alone_by_epochs(tmp_path):
    weights = [tmp_path / name for name in ("epoch-0002.safetensors", "epoch-0010.safetensors", "mae.safetensors")]
    records = [
        record(weights[1], 10, top1=60.0),
        record(weights[2], 10, top1=60.0),  # the final weights are those of the last epoch
        record(weights[0], 2, top1=40.0),
        record(tmp_path / "other.safetensors", 5),
        replace(record(weights[0], 2), status="failed", metrics={}),
    ]
    points = points_of(records, weights)
    assert [(point.epochs, point.value) for point in points] == [(2, 40.0), (10, 60.0)]
    draw(tmp_path, [*points, Point("ade20k_linear", "miou", 2, 1, 12.5, None)])
    with open(tmp_path / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["task"], row["epochs"], row["value"]) for row in rows] == [
        ("imagenet_knn", "2", "40.0"),
        ("imagenet_knn", "10", "60.0"),
        ("ade20k_linear", "2", "12.5"),
    ]
    with Image.open(tmp_path / "curve.png") as picture:
        assert min(picture.size) > 300


def test_a_curve_joins_no_points_of_different_recipes(tmp_path):
    """The first weights were also evaluated by another k, and the later ones only by the recipe's own."""
    weights = [tmp_path / f"epoch-{epochs:04}.safetensors" for epochs in (10, 20)]

    def at(path, epochs, k, day, top1):
        made = record(path, epochs, top1=top1)
        return replace(made, identity={**made.identity, "recipe": {"k": k}}, finished=f"2026-05-0{day}T10:00:00+00:00")

    records = [at(weights[0], 10, 20, 1, 30.0), at(weights[0], 10, 1, 2, 55.0), at(weights[1], 20, 20, 3, 40.0)]
    for order in (records, records[::-1]):
        assert [(point.epochs, point.value) for point in points_of(order, weights)] == [(10, 30.0), (20, 40.0)]


@pytest.mark.parametrize("epochs", ["ten", "", "9" * 5000, 2.5, [3], -1, True, "\x1b[2J", "\u0663"])
def test_epochs_that_are_no_number_are_a_sentence(tmp_path, epochs):
    with pytest.raises(
        UserError, match=r"/mae\.safetensors, as the record of imagenet_knn has it, .* no number"
    ) as said:
        points_of([record(tmp_path / "mae.safetensors", epochs)], [tmp_path / "mae.safetensors"])
    assert len(str(said.value)) < 400
    assert "\x1b" not in str(said.value)


@pytest.mark.slow
def test_a_killed_watcher_goes_on_where_it_was(tmp_path):
    """The record that it had is not made again."""
    root, run = write_imagenet(tmp_path / "data", train=2, val=1), tmp_path / "run"
    run.mkdir()
    for name, epochs in (("epoch-0001", 1), ("mae", 2)):
        torch.manual_seed(epochs)
        model = MaskedAutoencoder(ARCH, None, decoder_dim=32, decoder_depth=1, decoder_heads=2)
        metadata = {"arch": ARCH, "epochs": str(epochs), "decoder_heads": "2"}
        save_weights(run / f"{name}.safetensors", model.state_dict(), metadata)
    (run / "mae.safetensors").rename(tmp_path / "later")
    command = [sys.executable, "-m", "benchmarks.watch", run, "--data", root, "--recipe", "mini", "--device", "cpu"]
    command += ["--tasks", "imagenet_knn", "--workers", "0", "--set", "imagenet_knn.k=2"]
    (run / ".claim.0").write_text("")  # of a training elsewhere, which has not said yet whose it is
    with subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while not (run / "watch" / "curve.csv").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    (first,) = run.rglob("record.json")
    before = first.read_bytes()
    (run / ".claim.0").unlink()
    (tmp_path / "later").rename(run / "mae.safetensors")
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(run.rglob("record.json"))) == 2
    assert first.read_bytes() == before
    assert (run / "watch" / "curve.csv").read_text().count("\nimagenet_knn,") == 2
