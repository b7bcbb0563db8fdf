"""Rates from the lines of progress that a child prints, at times given by hand."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest

from benchmarks import run_all
from benchmarks.measure import MEASURED, PROGRESS, SETTLING, Sightings
from mae_core.progress import Progress
from tests.fixtures.transfer import ARCH, write_imagenet


@pytest.mark.parametrize("unit", ["", "it"])
def test_the_lines_are_those_that_progress_prints(unit):
    out = io.StringIO()
    with redirect_stdout(out):
        Progress("imagenet_knn features val", 640, unit=unit).update(128, 128, "loss 1.2345")
    found = PROGRESS.match(out.getvalue())
    assert (found["label"], found["done"], found["total"]) == ("imagenet_knn features val", "128", "640")
    assert bool(found["unit"]) == bool(unit)


def training(done: int, label: str = "imagenet_finetune enc", rate: int = 7) -> str:
    return f"{label} {done}/360 | {rate} images/s | 0.25 s/it | ETA 1:00 | epoch 1/30 loss 2.7 lr 1e-3"


def evaluation(done: int, label: str = "evaluate imagenet_a", rate: int = 7) -> str:
    return f"{label} {done}/640 | {rate} images/s | ETA 0:01"


def test_a_trainings_rate_is_that_of_what_was_done_once_it_had_settled():
    seen = Sightings("imagenet_finetune", images=36_000)  # 100 a step
    seen.add("imagenet_finetune: data: 32 train images", 90)
    for step, now in ((1, 100), (2, 100 + SETTLING - 1), (11, 100 + SETTLING), (11, 100 + SETTLING + 1)):
        seen.add(training(step), now)
        assert not seen.enough()
    assert seen.rate() == 7  # too few, so what is said
    seen.add(evaluation(64), 110)
    seen.add(training(71), 100 + SETTLING + MEASURED)
    assert seen.enough()
    assert seen.rate() == pytest.approx(60 * 100 / MEASURED)
    assert seen.started() == pytest.approx(99.5)  # one step of 0.5 s before it was first seen


def test_an_evaluations_rate_is_in_images_and_of_one_of_its_sets():
    seen = Sightings("imagenet_a", images=None)
    for done, now in ((64, 0), (128, SETTLING), (256, SETTLING + 4)):
        seen.add(evaluation(done), now)
    assert seen.rate() == pytest.approx(128 / 4)
    seen.add(evaluation(64, "evaluate imagenet_a clean", rate=50), SETTLING + 5)
    assert seen.rate() == 50


def test_no_rate_without_progress_or_from_another_training():
    seen = Sightings("imagenet_partial", images=100)
    seen.add("error: no room", 0)
    assert (seen.rate(), seen.enough()) == (None, False)
    seen.add(training(5, "imagenet_linprobe enc"), 1)
    assert (seen.rate(), seen.enough()) == (None, True)


@pytest.mark.slow
def test_a_plan_is_measured_by_its_own_jobs_which_leave_nothing_but_rates(tmp_path, capsys):
    out, root = tmp_path / "out", write_imagenet(tmp_path / "data", train=8, val=4)
    short = ["imagenet_knn.k=2", "imagenet_linprobe.batch=8", "imagenet_linprobe.epochs=2"]
    flags = ["--ckpt", f"random:{ARCH}", "--recipe", "mini", "--device", "cpu", "--data", str(root), "--out", str(out)]
    flags += ["--tasks", "imagenet_knn", "imagenet_linprobe", "--set", *short, "imagenet_linprobe.warmup_epochs=0"]
    assert run_all.main([*flags, "--plan", "--measure"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"measuring \[1/2\] imagenet_knn vit_mini_patch8: [\d.]+ images/s, \d+ s to start\n", printed)
    assert printed.count("core hours by measured rates") == 2
    assert [path.name for path in out.iterdir()] == ["rates.json"]
    rates = json.loads((out / "rates.json").read_text())
    for measured in ("start-up in seconds", "probe, 48 px, mini", "evaluation, 48 px"):
        assert sum(measured in key for key in rates) == 2
    assert printed.count(" s to start") == 2
