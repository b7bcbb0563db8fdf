"""Two processes give the numbers of one, on splits that they cannot share evenly: each command runs here and by
torchrun."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.suite import TASKS
from mae_core.checkpoint import save_weights
from mae_core.vit import build_vit
from tests.fixtures.classification import assert_same_training
from tests.fixtures.transfer import ARCH, CLASSES, TORCHRUN, finished, write_c, write_imagenet, write_split
from transfer.cli import main
from transfer.run import read_record
from transfer.task import RECORD_FILE, Record

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Nine images to validate and in each shifted set: in batches of two, five for the first process and four for the
    second. ImageNet-C has three in each folder."""
    root = write_imagenet(tmp_path_factory.mktemp("odd"), train=8, val=3, classes=CLASSES[:3])
    for name in ("a", "r", "sketch"):
        write_split(root / f"imagenet-{name}", 3, CLASSES[:3], seed=3)
    return write_c(root, codes=lambda number, severity: [number, severity, 20])


@pytest.fixture
def both(data, tmp_path):
    """What a command leaves when one process runs it and when two do: each task's record, and its folder."""

    def run(*what: str) -> list[dict[str, tuple[Record, Path]]]:
        flags = ["--recipe", "mini", "--device", "cpu", "--data", str(data), "--task", *what]
        (family,) = {task.module for task in TASKS if task.name in what}
        assert main(TASKS, [*flags, "--out", str(tmp_path / "one")]) == 0
        finished([*TORCHRUN, "-m", family, *flags, "--out", str(tmp_path / "two")])
        found = []
        for name, processes in (("one", 1), ("two", 2)):
            records = {path.parent: read_record(path) for path in (tmp_path / name).rglob(RECORD_FILE)}
            assert {record.machine["processes"] for record in records.values()} == {processes}
            found.append({record.task: (record, folder) for folder, record in records.items()})
        return found

    return run


def assert_same_numbers(one: Record, two: Record) -> None:
    assert (one.status, two.status) == ("ok", "ok")
    assert (two.metrics, two.stderr, two.tables, two.n_eval) == (one.metrics, one.stderr, one.tables, one.n_eval)
    assert two.n_eval % 2


def test_evaluations_of_a_classifier_are_equal_to_the_bit(tmp_path, both):
    file = tmp_path / "tuned.safetensors"
    save_weights(file, build_vit(ARCH, num_classes=1000, pool="avg").state_dict(), {})
    tasks = ("imagenet_eval", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_c")
    one, two = both(*tasks, "--ckpt", str(file), "--micro-batch", "2")
    assert set(one) == set(two) == set(tasks)
    for task in tasks:
        assert_same_numbers(one[task][0], two[task][0])
    assert one["imagenet_c"][0].n_eval == 15 * 5 * 3


def test_nearest_neighbours_are_equal_to_the_bit(both):
    """All images that vote fit into one part: the second process has none of the images to classify."""
    one, two = both("imagenet_knn", "--ckpt", f"random:{ARCH}", "--micro-batch", "2", "--set", "k=5")
    assert_same_numbers(one["imagenet_knn"][0], two["imagenet_knn"][0])


def test_trainings_are_equal_to_rounding(data, both):
    """The probe is left with the running statistics of the first process's images, so its accuracy is not compared."""
    folder = f"folder:{data}/imagenet"
    knobs = ["--micro-batch", "4", "--set", "batch=8", "epochs=2", "warmup_epochs=1"]
    one, two = both("imagenet_linprobe", folder, "--ckpt", f"random:{ARCH}", *knobs)
    (a, first), (b, second) = one["folder:imagenet"], two["folder:imagenet"]
    assert (a.n_eval, a.images_seen) == (b.n_eval, b.images_seen) == (9, 48)
    assert b.metrics["loss"] == pytest.approx(a.metrics["loss"], rel=1e-3)
    assert_same_training(*(load_file(work / "classifier.safetensors") for work in (second, first)))
    heads = [load_file(found["imagenet_linprobe"][1] / "probe.safetensors") for found in (one, two)]
    learnt = [{name: head[name] for name in ("head.1.weight", "head.1.bias")} for head in heads]
    assert_same_training(*learnt)
