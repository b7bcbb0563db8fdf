"""Curves: what TensorBoard reads back, what a tracker is told, and that a training survives both."""

import argparse
import json
import shutil
import sqlite3
import sys

import pytest

from mae_core.flags import TRACKERS, add_tracker_flag
from mae_core.tracker import Curves, Run
from mae_core.training import CHECKPOINT_FILE
from tests.fixtures import pretrain as runs
from tests.fixtures.curves import curves

DRAWN = ("train/loss", "train/lr", "train/images_per_second")


def drawn_twice(images, out, **options):
    """A run that was killed after its end, with a checkpoint of its middle, and that went on from there."""
    runs.train_until(2, images, out, **options)
    shutil.copy(out / CHECKPOINT_FILE, out / "kept")
    runs.train(images, out, **options)
    shutil.move(out / "kept", out / CHECKPOINT_FILE)
    return runs.train(images, out, **options)


def test_what_an_epoch_s_evaluation_finds_is_a_curve(tmp_path):
    with Curves(Run(tmp_path, 0, "a", {})) as drawn:
        drawn.evaluation(3, {"knn_top1": 12.5})
        drawn.evaluation(7, {})
        assert curves(tmp_path) == {"eval/knn_top1": [(3, 12.5)]}  # while it runs


FAKE = """
import json, os
class Run:
    def log(self, values, step=None): note("log", step=step, values=values)
    def finish(self, **options): note("finish", **options)
def note(what, **options):
    with open(os.environ["NOTES"], "a") as file:
        print(json.dumps([what, options], default=str), file=file)
def Settings(**options): return None
def setup(settings): pass
def init(**options):
    note("init", **options)
    if os.environ.get("BROKEN") == "init": raise RuntimeError("no\\n  network")
    return Run()
"""


@pytest.fixture(params=TRACKERS)
def fake(request, tmp_path, monkeypatch):
    """A package of a tracker's name that notes its calls: (the name, a function that returns them)."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / f"{request.param}.py").write_text(FAKE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)

    def notes(what):
        lines = map(json.loads, (tmp_path / "notes").read_text().splitlines())
        return [options for name, options in lines if name == what]

    yield request.param, notes
    sys.modules.pop(request.param, None)


@pytest.mark.parametrize("fake", ["wandb"], indirect=True)
def test_the_curves_of_a_killed_run_are_those_of_an_undisturbed_one(noise_images, reference, tmp_path, fake):
    drawn_twice(noise_images, tmp_path / "a", tracker="wandb")
    found, expected = curves(tmp_path / "a"), curves(reference)
    assert tuple(expected) == DRAWN
    assert [step for step, _ in expected["train/loss"]] == list(range(8))
    assert [found[name] for name in DRAWN[:2]] == [expected[name] for name in DRAWN[:2]]
    assert [step for step, _ in found["train/images_per_second"]] == list(range(8))
    mean = [sum(loss for _, loss in expected["train/loss"][4 * e : 4 * e + 4]) / 4 for e in (0, 1)]
    assert mean == pytest.approx(runs.losses(reference)[1::2], rel=1e-6)  # as the log has them
    assert len(list((tmp_path / "a" / "tensorboard").iterdir())) == 3
    _, notes = fake
    assert len(notes("init")) == len(notes("finish")) == 3
    assert notes("init")[0]["config"]["recipe"]["epochs"] == runs.TINY["epochs"]
    last = {entry["step"]: entry["values"]["train/loss"] for entry in notes("log")}
    assert list(last.items()) == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected["train/loss"]]


def draw(run, name, steps):
    with Curves(run, name) as drawn:
        for step in steps:
            drawn.training(step, 0.5, 0.1, 9.0)


def test_a_tracker_is_told_one_run_however_often_it_goes_on(tmp_path, fake):
    name, notes = fake
    config = {"recipe": {"epochs": 2}, "seed": 0}
    draw(Run(tmp_path / "a", 0, "pre-train x", config), name, [3, 4])
    draw(Run(tmp_path / "a", 4, "pre-train x", config), name, [4, 5])
    first, second = notes("init")
    assert first == second
    assert (first["project"], first["resume"], first["config"]) == ("mae-transfer", "allow", config)
    assert [entry["step"] for entry in notes("log")] == [3, 4, 4, 5]
    assert notes("log")[0]["values"] == {"train/loss": 0.5, "train/lr": 0.1, "train/images_per_second": 9.0}
    assert len(notes("finish")) == 2
    draw(Run(tmp_path / "b", 0, "pre-train x", config), name, [])
    draw(Run(tmp_path / "a", 0, "pre-train x", {**config, "seed": 1}), name, [])
    names = [entry["name"] for entry in notes("init")]
    assert len(set(names)) == 3
    assert all(found.startswith("pre-train x ") for found in names)


def test_what_fails_is_a_warning_and_costs_no_number(noise_images, reference, tmp_path, fake, monkeypatch, capsys):
    name, _ = fake
    monkeypatch.setenv("BROKEN", "init")
    draw(Run(tmp_path / "own", 0, "a", {}), name, [1, 2])
    refused = f"warning: {name}: no network; the training goes on without it"
    assert capsys.readouterr().err.splitlines() == [refused]
    assert curves(tmp_path / "own")["train/loss"] == [(1, 0.5), (2, 0.5)]
    if name == "trackio":
        return  # a training is long
    (tmp_path / "a").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a" / "tensorboard").symlink_to(tmp_path / "elsewhere")
    runs.train(noise_images, tmp_path / "a", tracker=name)
    linked, other = capsys.readouterr().err.splitlines()
    assert linked.startswith(f"warning: TensorBoard: {tmp_path}/a/tensorboard: it is a symbolic link")
    assert other == refused
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert runs.differing(reference, tmp_path / "a") == []


def test_a_tracker_that_is_unknown_or_not_installed_is_refused_with_what_to_do(tmp_path, monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    add_tracker_flag(parser)
    assert parser.parse_args([]).tracker == ""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "wandb").mkdir()  # as wandb itself leaves it, which is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name, said in (("wandb", "wandb is not installed here: "), ("wand", "did you mean wandb?")):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["--tracker", name])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def test_wandb_itself_keeps_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (0, 3):
        draw(Run(tmp_path / "a", first, "a", {"seed": 0}), "wandb", range(first, first + 5))
    folders = list((tmp_path / "a" / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # one id


def test_trackio_itself_keeps_one_run_without_doubled_points(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # it is read by the import
    pytest.importorskip("trackio")
    for first in (0, 3):
        draw(Run(tmp_path / "a", first, "a", {"seed": 0}), "trackio", range(first, first + 5))
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step from metrics order by step").fetchall()
    assert len({name for name, _ in rows}) == 1
    assert [step for _, step in rows] == list(range(8))
