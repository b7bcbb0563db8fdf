"""ImageNet-V2, ReaL and ObjectNet by a classifier whose answers are known."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.compare import main as compare
from benchmarks.verify import verify
from tests.fixtures.transfer import CLASSES, make_job, one_hot_logits, write_code
from transfer.classification import retests
from transfer.data.imagenet import wnids
from transfer.data.imagenet_retests import REAL_FILE
from transfer.data.objectnet import OBJECTS
from transfer.data.predictions import read_predictions
from transfer.data.transforms import eval_transform
from transfer.run import run_job
from transfer.task import RECORD_FILE

V2, REAL, OBJECTNET = retests.TASKS


def done(task, root: Path, work: Path):
    record = run_job(make_job(task, root, work))
    assert record.status == "ok", record.reason
    assert verify(work / RECORD_FILE) == pytest.approx(record.metrics)
    return record


def test_a_folder_of_imagenet_v2_is_the_number_of_its_class(tmp_path, loads):
    """By the rank of their names, 10 would be the second class and 2 the third."""
    for folder in ("0", "10", "2"):
        write_code(tmp_path / "imagenetv2-matched-frequency-format-val" / folder / "a.jpeg.png", int(folder) % 3)
    loads(one_hot_logits([0, 10, 2]))
    record = done(V2, tmp_path, tmp_path / "work")
    assert record.metrics["top1"] == 100.0
    assert record.data["counts"] == {"classes": 3, "images": 3}


def write_real(root: Path, labels: list[list[int]], codes: list[int]) -> None:
    """Validation images 1, 2, ... of the class CLASSES[0], what each says, and their new labels."""
    for number, code in enumerate(codes, 1):
        folder = root / "imagenet" / "val" / wnids()[CLASSES[0]]
        write_code(folder / f"ILSVRC2012_val_{number:08d}.png", code)
    (root / REAL_FILE).parent.mkdir()
    (root / REAL_FILE).write_text(json.dumps(labels))


def test_real_counts_any_label_and_leaves_out_images_without_one(tmp_path, loads):
    """Code 0 says CLASSES[0], 1 says class 7. By hand: right, right by the second label, out, wrong, wrong."""
    old = CLASSES[0]
    write_real(tmp_path, [[old], [3, 7], [], [3], [7, 3]], [0, 1, 0, 1, 0])
    loads(one_hot_logits([old, 7]))
    record = done(REAL, tmp_path, tmp_path / "work")
    assert record.metrics["top1"] == 50.0
    assert record.n_eval == 4
    assert record.stderr["top1"] == pytest.approx(25.0)
    assert "loss" not in record.metrics
    (rows,) = read_predictions(tmp_path / "work" / "predictions.parquet").values()
    assert rows["labels"].tolist() == [str(old), "3 7", "3", "3 7"]


def test_a_class_of_the_object_is_right_whichever_of_the_thousand_it_is(tmp_path, loads):
    """Code 0 says the second class of "chair", 1 a class of no object. Images of no class of ImageNet do not count."""
    second = OBJECTS["chair"][1]
    for name, codes in {"chair": [0, 0, 1], "banana": [0], "air_freshener": [0, 0]}.items():
        for i, code in enumerate(codes):
            write_code(tmp_path / "objectnet-1.0" / "images" / name / f"{i}.png", code)
    loads(one_hot_logits([second, 1]))
    record = done(OBJECTNET, tmp_path, tmp_path / "work")
    assert record.metrics["top1"] == 50.0
    assert (record.n_eval, record.data["counts"]["classes"]) == (4, 2)


def test_the_red_border_is_cut_off_before_the_image_is_resized():
    inner = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    framed = Image.new("RGB", (64, 44), (255, 0, 0))
    framed.paste(inner, (2, 2))
    assert torch.equal(eval_transform(32, border=2)(framed), eval_transform(32)(inner))
    assert not torch.equal(eval_transform(32)(framed), eval_transform(32)(inner))


def test_two_classifiers_are_compared_by_what_counts_as_right(tmp_path, loads, capsys):
    """Six images whose old label is wrong: the one side is always right by the new ones, the other never."""
    old = CLASSES[0]
    write_real(tmp_path, [[7]] * 6, [0] * 6)
    for name, says in (("a", 7), ("b", old)):
        loads(one_hot_logits([says]))
        done(REAL, tmp_path, tmp_path / name / "runs" / "run")
    capsys.readouterr()
    assert compare([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "imagenet_real" in line)
    assert "+100.00" in row
