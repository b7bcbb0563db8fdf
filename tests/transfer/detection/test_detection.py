"""The recipe against the papers' numbers, the choice of an engine, and whole jobs on a COCO of a few small images."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors.torch import load_file

import transfer.detection
from mae_core import distributed
from mae_core.data import Sample
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.settings import override
from mae_core.training import CHECKPOINT_FILE, LOG_FILE
from mae_core.vit import ARCHS
from tests.fixtures import ROOT
from tests.fixtures.coco import COLOURS, FIRST_ID, NAMES, change, crowd, rectangle, write_coco, write_split
from tests.fixtures.transfer import ARCH, kill_when, make_job
from transfer import cli
from transfer.data.coco import annotation_file, inspect_coco, read_split
from transfer.detection import engine_torchvision as detection_tv
from transfer.detection import evaluate as coco_eval
from transfer.detection import picture as coco_picture
from transfer.detection import shared
from transfer.detection import tasks as detection
from transfer.detection.picture import PICTURE_FILE, draw_predictions
from transfer.detection.recipe import DetectionRecipe, recipe, sources
from transfer.detection.shared import (
    DETECTOR_FILE,
    RESULTS_FILE,
    Predictions,
    batchnorm_facts,
    build_pyramid,
    pad_to_square,
    schedule,
    validation_batches,
)
from transfer.task import read_record, run_job, work_folder

TASK = detection.TASKS[0]
# A detector of 64 px images that a test can train for four steps of two epochs.
TINY = {
    "image_size": 64, "epochs": 2, "batch": 4, "warmup_epochs": 0.5, "drop_path": 0.1, "fpn_dim": 16, "head_dim": 16,
    "fc_dim": 32, "rpn_batch": 16, "roi_batch": 16, "proposals": 20, "window": 3,
}  # fmt: skip
KNOBS = [f"{knob}={value}" for knob, value in TINY.items()]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))


def job_of(root: Path, work: Path, machine: Machine | None = None, **changes):
    work.mkdir(parents=True, exist_ok=True)
    return replace(make_job(TASK, root, work, machine, **{**TINY, **changes}), engine="torchvision")


def call(root: Path, out: Path, *more: str) -> list[str]:
    arguments = ["--task", "coco", "--ckpt", f"random:{ARCH}", "--recipe", "mini", "--data", str(root)]
    return [*arguments, "--out", str(out), "--device", "cpu", *more]


# The recipe

# Li et al. 2021 (arXiv 2111.11429) for what Table 4 of the MAE paper used; heads' widths and betas: hustvl/MIMDet;
# what enters the losses and what the RPN keeps: detectron2's config/defaults.py.
PAPER = {
    "image_size": 1024, "epochs": 100, "warmup_epochs": 0.25, "batch": 64, "lr": 8e-5, "betas": (0.9, 0.999),
    "weight_decay": 0.1, "drop_path": 0.1, "window": 14, "min_scale": 0.1, "max_scale": 2.0, "fpn_dim": 256,
    "head_dim": 256, "fc_dim": 1024, "rpn_convs": 2, "rpn_batch": 256, "roi_batch": 512, "proposals": 1000,
}  # fmt: skip


def test_the_paper_recipe_is_that_of_li_et_al():
    assert vars(recipe("vit_base_patch16", "paper")) == PAPER
    assert vars(recipe("vit_large_patch16", "paper")) == {**PAPER, "drop_path": 0.3}
    assert vars(recipe("vit_huge_patch14", "paper")) == {**PAPER, "drop_path": 0.3, "window": 16}
    assert (shared.SCORE_THRESHOLD, shared.NMS_THRESHOLD, shared.DETECTIONS) == (
        0.05,
        0.5,
        100,
    )


def test_every_number_has_a_source_and_derived_ones_say_so():
    knobs = {f.name for f in fields(DetectionRecipe)}
    for arch in ARCHS:
        found = sources(arch)
        assert set(found) == knobs
        derived = [text.startswith("derived from ViT-B and ViT-L") for text in found.values()]
        assert all(derived) if arch not in ("vit_base_patch16", "vit_large_patch16") else not any(derived)
    assert "2111.11429" in sources("vit_base_patch16")["lr"]
    assert "detectron2" in sources("vit_base_patch16")["proposals"]
    assert "nobody published" in sources("vit_huge_patch14")["drop_path"]


def test_the_mini_recipe_trains_small_images_with_the_same_plan():
    for arch in (ARCH, "vit_base_patch16"):
        mini = recipe(arch, "mini")
        assert mini.image_size <= 128
        assert (mini.weight_decay, mini.betas, mini.rpn_convs) == (0.1, (0.9, 0.999), 2)
        assert mini.window == {ARCH: 6, "vit_base_patch16": 14}[arch]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("window=-1", "window=-1"),
        ("proposals=0", "proposals=0"),
        ("image_size=0", "image_size=0"),
        ("rpn_convs=0", "rpn_convs=0"),
        ("fc_dim=-5", "fc_dim=-5"),
        ("max_scale=0.05", "max_scale=0.05 is below min_scale=0.1"),
        ("min_scale=-1", "min_scale=-1"),
        ("drop_path=1", "drop_path=1"),
        ("warmup_epochs=101", "warmup_epochs=101"),
        ("window=wide", "window is of type int"),
        ("windows=14", "did you mean window"),
    ],
)
def test_numbers_that_no_training_can_have_are_refused(setting, said):
    with pytest.raises(UserError, match=said):
        override(recipe("vit_base_patch16", "paper"), [setting])


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UserError, match="did you mean paper"):
        recipe("vit_base_patch16", "papers")


def test_the_schedule_of_the_paper():
    """117,266 images of train2017 have an object: 1832 iterations an epoch, half a cosine after 458 of warm-up."""
    iterations, rate = schedule(recipe("vit_base_patch16", "paper"), 117266)
    assert iterations == 183200
    assert rate(0) == 0
    assert rate(229) == pytest.approx(4e-5)
    assert rate(458) == pytest.approx(8e-5)
    assert rate(458 + (183200 - 458) // 2) == pytest.approx(4e-5)
    assert rate(183199) == pytest.approx(0, abs=1e-12)
    assert all(rate(i) >= rate(i + 1000) for i in range(458, 180000, 1000))


def test_batchnorm_facts_tell_where_it_saw_another_batch():
    r = recipe("vit_base_patch16", "paper")
    facts, notes = batchnorm_facts(r, Machine(processes=32), 2, synchronised=True)
    assert (facts, notes) == ({"batchnorm": "synchronised", "batchnorm_images": 64}, ())
    facts, notes = batchnorm_facts(r, Machine(processes=32), 2, synchronised=False)
    assert facts == {"batchnorm": "plain", "batchnorm_images": 2}
    assert notes == ("BatchNorm saw 2 images at a time, not 64",)


# Engines


def test_detectron2_is_refused_where_it_is_not_installed(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "installed", lambda module: module != "detectron2")
    assert cli.main(detection.TASKS, call(root, tmp_path, "--engine", "detectron2")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --engine detectron2: it is not installed here; ")
    assert "docs/coco.md" in said
    assert "--engine torchvision" in said
    assert not list(tmp_path.rglob("record.json"))


def test_an_unknown_engine_is_refused(root, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(detection.TASKS, call(root, tmp_path, "--engine", "tensorflow"))
    assert stopped.value.code == 2
    assert "detectron2" in capsys.readouterr().err


@pytest.mark.parametrize(("there", "chosen"), [(True, "detectron2"), (False, "torchvision")])
def test_auto_takes_detectron2_where_it_is_installed(monkeypatch, there, chosen):
    monkeypatch.setattr(cli, "installed", lambda module: there or module != "detectron2")
    assert cli.choose_engine(TASK) == chosen
    assert cli.choose_engine(TASK, "torchvision") == "torchvision"


def test_each_engine_does_its_own_jobs(root, tmp_path, monkeypatch):
    jobs = []
    for name in ("engine_detectron2", "engine_torchvision"):
        stand_in = SimpleNamespace(train_and_predict=lambda job, name=name: jobs.append((name, job)))
        monkeypatch.setitem(sys.modules, f"transfer.detection.{name}", stand_in)
        monkeypatch.setattr(transfer.detection, name, stand_in, raising=False)
    job = job_of(root, tmp_path)
    for engine, name in (("detectron2", "engine_detectron2"), ("torchvision", "engine_torchvision")):
        detection.train_and_predict(replace(job, engine=engine))
        assert jobs.pop()[0] == name


def test_engines_seeds_and_precisions_have_work_folders_of_their_own(root, tmp_path):
    job = job_of(root, tmp_path)

    def folder(job):
        identity = job.identity()
        return work_folder(tmp_path, job.checkpoint, "coco", job.recipe_label, job.seed, identity)

    jobs = [job, replace(job, engine="detectron2"), replace(job, seed=1), replace(job, recipe=recipe(ARCH, "mini"))]
    jobs.append(replace(job, machine=Machine(precision="bf16")))
    assert len({folder(one) for one in jobs}) == 5


# What the engines share


def test_the_new_parts_of_the_pyramid_depend_on_the_seed_alone(root, tmp_path):
    job = job_of(root, tmp_path)
    torch.manual_seed(99)
    first, said = build_pyramid(job)
    torch.manual_seed(5)
    second, _ = build_pyramid(job)
    third, _ = build_pyramid(replace(job, seed=1))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.upsample_2x.weight, third.upsample_2x.weight)
    assert torch.equal(first.blocks[3].attn.qkv.weight, job.checkpoint.encoder["blocks.3.attn.qkv.weight"])
    assert "75 tensors loaded (pos_embed resized), 3 dropped" in said
    assert not first.activation_checkpointing
    assert build_pyramid(replace(job, machine=Machine(activation_checkpointing=True)))[0].activation_checkpointing


def test_the_square_has_the_image_in_its_upper_left_corner():
    pixels = np.random.default_rng(0).integers(1, 256, (30, 50, 3), dtype=np.uint8)
    square = pad_to_square(Image.fromarray(pixels), 64).permute(1, 2, 0).numpy()
    assert np.array_equal(square[:30, :50], pixels)
    assert not square[30:].any()
    assert not square[:, 50:].any()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_validation_image_is_predicted_once_over_all_processes(root, tmp_path, monkeypatch, world):
    job, seen = job_of(root, tmp_path), []
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        batches = list(validation_batches(job, 2))
        assert all(len(batch) <= 2 for batch in batches)
        seen += [example.id for batch in batches for example, _ in batch]
        for example, image in (pair for batch in batches for pair in batch):
            assert image.size == (example.width, example.height)
    assert sorted(seen) == [FIRST_ID["val"] + i for i in range(3)]


# A whole job


@pytest.fixture(scope="module")
def ran(root, tmp_path_factory):
    """A job whose every detection counts, so that its files are not empty; its record."""
    work = tmp_path_factory.mktemp("ran")
    job = job_of(root, work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection_tv, "SCORE_THRESHOLD", 0.0)
        return job, run_job(job)


def test_a_job_leaves_a_record_of_its_number_and_its_story(ran):
    job, record = ran
    assert (record.status, record.reason, record.metric) == ("ok", "", "box_ap")
    assert {"box_ap", "mask_ap", "box_ap50", "box_ap75", "mask_ap50", "mask_ap75", "box_ap_small"} <= set(
        record.metrics
    )
    assert set(record.stderr) == {"box_ap", "mask_ap"}
    classes = {NAMES[category] for category in list(COLOURS)[:3]}  # of the three validation images
    assert set(record.tables["per_class"]["box_ap"]) == set(record.tables["per_class"]["mask_ap"]) == classes
    assert (record.engine, record.n_eval, record.images_seen) == ("torchvision", 3, 16)
    assert set(detection_tv.DEPARTURES) <= set(record.notes)
    assert record.resolved["iterations"] == 4
    assert record.resolved["seconds_per_iteration"] > 0
    assert record.resolved["batchnorm"] == "plain"
    assert record.resolved["batchnorm_images"] == 4
    assert "tensors loaded" in record.resolved["loaded"]
    assert record.images_per_second == pytest.approx(16 / record.seconds, rel=0.1)
    assert record.peak_memory_gib > 0
    assert "pycocotools" in record.versions
    assert record.data["label"] == "subset"
    assert record == replace(read_record(job.work / "record.json"), notes=record.notes)
    assert not (job.work / CHECKPOINT_FILE).exists()


def test_the_results_file_is_what_pycocotools_scores(ran, root):
    job, record = ran
    found = json.loads((job.work / RESULTS_FILE).read_text())
    assert {entry["image_id"] for entry in found} == {FIRST_ID["val"] + i for i in range(3)}
    assert {entry["category_id"] for entry in found} <= set(NAMES)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(annotation_file(root, "val"))
            key = {"bbox": "segmentation", "segm": "bbox"}[kind]
            entries = [{k: v for k, v in entry.items() if k != key} for entry in found]
            evaluator = COCOeval(truth, truth.loadRes(entries), kind)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        assert record.metrics[f"{name}_ap"] == pytest.approx(100 * evaluator.stats[0])


def test_the_picture_and_the_weights_are_there(ran):
    job, record = ran
    with Image.open(job.work / PICTURE_FILE) as picture:
        # Three tiles of 320 px in a row, 6 px between and around them.
        assert (picture.format, picture.size) == ("PNG", (3 * 326 + 6, 326 + 6))
    weights = load_file(job.work / DETECTOR_FILE)
    assert {"body.bias_global", "roi_heads.mask_predictor.mask_fcn_logits.weight"} <= set(weights)
    assert not torch.equal(weights["body.blocks.0.attn.qkv.weight"], job.checkpoint.encoder["blocks.0.attn.qkv.weight"])
    assert set(record.artifacts) == {DETECTOR_FILE}


def test_a_job_that_is_done_is_not_run_again(root, tmp_path, monkeypatch, capsys):
    arguments = call(root, tmp_path, "--engine", "torchvision", "--set", *KNOBS)
    assert cli.main(detection.TASKS, arguments) == 0
    assert "coco: box_ap" in capsys.readouterr().out
    monkeypatch.setattr(detection_tv, "fit", None)  # which would fail
    assert cli.main(detection.TASKS, arguments) == 0
    (path,) = tmp_path.rglob("record.json")
    record = read_record(path)
    assert (record.recipe_name, record.overrides["fpn_dim"], record.engine) == ("mini", 16, "torchvision")


def test_what_was_repaired_is_noted(tmp_path, monkeypatch):
    root = write_coco(tmp_path / "data")
    first = FIRST_ID["train"]
    objects = [rectangle(first + i, 1, -5, 6, 20, 24) for i in range(4)] + [rectangle(first, 1, 5, 5, 0, 3)]
    write_split(root, "train", [(64, 48)] * 4, objects)
    (tmp_path / RESULTS_FILE).write_text("[]")
    monkeypatch.setattr(detection, "train_and_predict", lambda job: Predictions(tmp_path / RESULTS_FILE, 1, 1.0))
    record = run_job(job_of(root, tmp_path / "work"))
    assert record.status == "ok", record.reason
    left_out = "1 objects of no area or without a valid outline left out"
    assert f"of 5 training objects 4 boxes cut to their image and {left_out}" in record.notes


@pytest.mark.parametrize("broken", ["json", "image", "category", "annotations"])
def test_bad_data_ends_the_command_before_any_training(tmp_path, capsys, monkeypatch, broken):
    root = write_coco(tmp_path / "data")
    path = annotation_file(root, "val")
    if broken == "json":
        path.write_text("{")
    elif broken == "image":
        next((root / "coco" / "train2017").iterdir()).unlink()
    elif broken == "category":
        change(path, categories=[{"id": 12, "name": "hat"}])
    else:
        change(path, annotations=[])
    monkeypatch.setattr(detection, "train_and_predict", None)
    assert cli.main(detection.TASKS, call(root, tmp_path / "out", "--engine", "torchvision")) == 1
    said = capsys.readouterr().out
    assert said.startswith("coco: failed: ")
    assert str(path) in said or "are not in" in said
    (record,) = (tmp_path / "out").rglob("record.json")
    assert read_record(record).status == "failed"


def test_a_missing_data_set_is_skipped_with_the_place_to_put_it(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(detection.TASKS, call(tmp_path / "empty", tmp_path / "out", "--engine", "torchvision")) == 1
    assert "coco: skipped: no data: COCO must lie at" in capsys.readouterr().out


def test_a_size_that_the_patches_do_not_divide_is_refused(root, tmp_path, capsys):
    arguments = call(root, tmp_path, "--engine", "torchvision", "--set", "image_size=60")
    assert cli.main(detection.TASKS, arguments) == 2
    assert "image_size=60: vit_mini_patch8 has patches of 8 px" in capsys.readouterr().err


def test_vit_h_is_cut_into_patches_of_16_px(root, tmp_path):
    """1024 px are no multiple of its own 14."""
    checkpoint = SimpleNamespace(arch="vit_huge_patch14", sha256="", name="h", identity="")
    data = inspect_coco(root)
    job = cli.make_job(TASK, checkpoint, "paper", [], data, tmp_path, 0, Machine(), "torchvision")
    assert (job.recipe.image_size, job.recipe.window) == (1024, 16)


# The picture


def test_the_picture_shows_what_was_found(tmp_path):
    """The box and the mask of a sure detection are drawn; an unsure one is not, and the rest of the image stays."""
    write_coco(tmp_path)
    write_split(tmp_path, "val", [(160, 80)], [rectangle(FIRST_ID["val"], 1, 5, 5, 9, 9)])
    examples = read_split(tmp_path, "val").examples

    def drawn(entries, name):
        results = tmp_path / f"{name}.json"
        results.write_text(json.dumps(entries))
        draw_predictions(examples, results, tmp_path / f"{name}.png")
        return np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)

    def entry(box, score):
        x, y, w, h = box
        mask = np.zeros((80, 160), np.uint8)
        mask[y : y + h, x : x + w] = 1
        runs = crowd(0, 1, mask)["segmentation"]
        rle = coco_picture.mask_util.frPyObjects(runs, 80, 160)
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        return {
            "image_id": FIRST_ID["val"],
            "category_id": 18,
            "bbox": box,
            "score": score,
            "segmentation": segmentation,
        }

    plain = drawn([], "plain")
    found = drawn([entry([100, 30, 40, 30], 0.9), entry([10, 10, 30, 30], 0.2)], "found")
    assert plain.shape == (320, 320, 3)
    assert (found[162:] == 255).all()  # 160 x 80 px fill the upper half of the square
    assert (plain[162:300] == 255).all()
    assert (plain[300:] < 100).any()  # where nothing was found, it is written
    plain[300:] = 255
    changed = np.abs(found - plain).sum(axis=2) > 20
    rows, columns = np.nonzero(changed)
    # Twice the size: the box from (200, 60) to (280, 120).
    assert 196 <= columns.min() <= 201
    assert 279 <= columns.max() <= 284
    assert rows.max() <= 124
    assert changed[64:116, 204:276].mean() > 0.95


def test_the_grid_shows_sixteen_images_at_most(tmp_path, monkeypatch):
    """Four in a row; here five in all, whose picture is sooner written."""
    assert coco_picture.IMAGES == 16
    monkeypatch.setattr(coco_picture, "IMAGES", 5)
    write_coco(tmp_path)
    write_split(tmp_path, "val", [(64, 48)] * 7, [rectangle(FIRST_ID["val"], 1, 5, 5, 9, 9)])
    (tmp_path / "found.json").write_text("[]")
    draw_predictions(read_split(tmp_path, "val").examples, tmp_path / "found.json", tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (4 * 326 + 6, 2 * 326 + 6)


# Resuming


class PowerCut(Exception):
    pass


def interrupted(job, monkeypatch, position: int) -> None:
    """Run a job that saves after every step until an image of that position in the stream is asked for."""

    class Failing(detection_tv.Jittered):
        def __getitem__(self, sample: Sample):
            if sample.position >= position:
                raise PowerCut("no power")
            return super().__getitem__(sample)

    with monkeypatch.context() as patch:
        patch.setattr(detection_tv, "Jittered", Failing)
        record = run_job(job)
    assert "PowerCut" in record.reason


def test_a_stopped_job_goes_on_at_its_step_and_ends_with_the_same_weights(root, tmp_path, monkeypatch, capsys):
    """From the images of that step on: what came before is not read again."""
    machine = Machine(save_minutes=0)
    whole, stopped = job_of(root, tmp_path / "whole", machine), job_of(root, tmp_path / "stopped", machine)
    first = run_job(whole)
    interrupted(stopped, monkeypatch, 12)
    positions = []

    class Recording(detection_tv.Jittered):
        def __getitem__(self, sample: Sample):
            positions.append(sample.position)
            return super().__getitem__(sample)

    monkeypatch.setattr(detection_tv, "Jittered", Recording)
    second = run_job(stopped)
    assert "resuming coco random:vit_mini_patch8 at step 3/4" in capsys.readouterr().out
    assert sorted(positions) == [12, 13, 14, 15]
    assert second.status == "ok", second.reason
    assert (second.metrics, second.stderr, second.images_seen) == (first.metrics, first.stderr, first.images_seen)
    a, b = (load_file(job.work / DETECTOR_FILE) for job in (whole, stopped))
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    logs = [
        [json.loads(line)["loss"] for line in (j.work / LOG_FILE).read_text().splitlines()] for j in (whole, stopped)
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


@pytest.mark.slow
def test_a_kill_after_the_training_costs_the_prediction_alone(root, tmp_path, monkeypatch):
    """The last checkpoint stands until the record is written; its normalisation predicts as the trained model's."""
    job = job_of(root, tmp_path)
    monkeypatch.setattr(detection_tv, "SCORE_THRESHOLD", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(detection_tv, "predict", lambda model, job: 1 / 0)
        assert run_job(job).status == "failed"
    assert (tmp_path / CHECKPOINT_FILE).exists()
    with monkeypatch.context() as patch:
        patch.setattr(detection_tv, "Jittered", lambda *arguments: [None] * 8)  # no image can be read from it
        record = run_job(job)
    assert (record.status, record.images_seen) == ("ok", 16), record.reason
    again = run_job(job_of(root, tmp_path / "whole"))
    assert record.metrics == again.metrics
    assert (tmp_path / RESULTS_FILE).read_bytes() == (tmp_path / "whole" / RESULTS_FILE).read_bytes()


def test_a_checkpoint_that_does_not_fit_is_told_in_a_sentence(root, tmp_path, monkeypatch):
    job = job_of(root, tmp_path / "a", Machine(save_minutes=0))
    interrupted(job, monkeypatch, 8)
    path = job.work / CHECKPOINT_FILE
    good = torch.load(path, weights_only=True)

    other = job_of(root, tmp_path / "other", fc_dim=48)
    shutil.copy(path, other.work)
    record = run_job(other)
    assert record.status == "failed"
    assert "is of another run (recipe.fc_dim: 32 -> 48)" in record.reason

    content = dict(good, model=dict(good["model"]))
    content["model"]["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(92, 32)
    torch.save(content, path)
    record = run_job(job)
    assert record.status == "failed"
    assert f"{path} does not fit this model" in record.reason
    assert "cls_score" in record.reason
    assert not (job.work / "error.txt").exists()  # a sentence, no traceback

    path.write_bytes(path.read_bytes()[:1000])
    assert f"{path} is damaged" in run_job(job).reason


def test_a_loss_that_is_no_number_ends_the_job_in_a_sentence(root, tmp_path):
    record = run_job(job_of(root, tmp_path, lr=1e30))
    assert record.status == "failed"
    assert "infinite or NaN" in record.reason or "the loss is" in record.reason
    assert not (tmp_path / DETECTOR_FILE).exists()
    assert not (tmp_path / "error.txt").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_with_the_same_weights(root, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    more = ["--engine", "torchvision", "--save-minutes", "0"]
    knobs = ["--set", *KNOBS, "epochs=12"]
    command = {
        name: [sys.executable, "-m", "transfer.detection", *call(root, tmp_path / name, *more, *knobs)]
        for name in ("whole", "killed")
    }
    subprocess.run(command["whole"], env=env, check=True, timeout=300, cwd=tmp_path)
    kill_when(lambda: any((tmp_path / "killed").rglob(LOG_FILE)), command["killed"], tmp_path, env)
    assert not any((tmp_path / "killed").rglob("record.json"))
    (checkpoint,) = (tmp_path / "killed").rglob(CHECKPOINT_FILE)
    assert 0 < torch.load(checkpoint, weights_only=True)["state"]["step"] < 24
    again = subprocess.run(
        command["killed"], env=env, check=True, timeout=300, capture_output=True, text=True, cwd=tmp_path
    )
    assert "resuming coco random:vit_mini_patch8 at step" in again.stdout
    found = [next((tmp_path / name).rglob(DETECTOR_FILE)) for name in ("whole", "killed")]
    a, b = map(load_file, found)
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert [p.with_name("record.json").exists() for p in found] == [True, True]
    assert not checkpoint.exists()


@pytest.mark.slow
def test_two_processes_train_one_detector(root, tmp_path):
    """On images that may lose their object to the jitter. Both predict with the weights and the running statistics that
    are left: one process that loads them finds the same."""
    data = tmp_path / "data"
    shutil.copytree(root, data)
    first = FIRST_ID["train"]
    objects = [rectangle(first + i, 1, 4, 6, 20, 24) for i in range(8)]
    write_split(data, "train", [(64, 48)] * 8, objects)
    objects = [rectangle(FIRST_ID["val"] + i, 1, 30 - 10 * i, 10, 20, 24) for i in range(3)]
    write_split(data, "val", [(64, 48)] * 3, objects)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    knobs = ["--set", *KNOBS, "epochs=24", "lr=2e-3", "max_scale=2"]
    arguments = call(data, tmp_path / "out", "--engine", "torchvision", *knobs)
    subprocess.run([*launcher, "-m", "transfer.detection", *arguments], env=env, check=True, timeout=300, cwd=tmp_path)
    (path,) = (tmp_path / "out").rglob("record.json")
    record = read_record(path)
    assert (record.status, record.machine["processes"], record.n_eval, record.images_seen) == ("ok", 2, 3, 192)
    assert record.resolved["batchnorm"] == "plain"
    assert record.resolved["batchnorm_images"] == 2
    assert "BatchNorm saw 2 images at a time, not 4" in record.notes
    weights = load_file(path.parent / DETECTOR_FILE)
    assert all(value.isfinite().all() for value in weights.values())
    # As many steps as one process takes, each over both halves of the batch.
    assert weights["roi_heads.box_head.0.1.num_batches_tracked"] == 48

    job = job_of(data, tmp_path / "one")
    model = detection_tv.MaskRCNN(build_pyramid(job)[0], job.recipe, shared.RoIBatchNorm)
    model.load_state_dict(weights)
    found, expected = json.loads((path.parent / RESULTS_FILE).read_text()), detection_tv.predict(model, job)
    for image in (FIRST_ID["val"] + i for i in range(3)):  # the second is the second process's
        ours, theirs = ([e for e in entries if e["image_id"] == image] for entries in (found, expected))
        assert ours
        assert [e["category_id"] for e in ours] == [e["category_id"] for e in theirs]
        np.testing.assert_allclose([e["score"] for e in ours], [e["score"] for e in theirs], atol=1e-4)


def test_predictions_of_an_engine_are_all_that_is_evaluated(root, tmp_path, monkeypatch):
    """Ground truth as an engine's file: AP 100, its notes and facts in the record."""
    job, entries = job_of(root, tmp_path), []
    for example in read_split(root, "val").examples:
        boxes, scores = example.boxes, np.linspace(0.9, 0.8, len(example.boxes))
        entries += shared.to_results(example, boxes, scores, example.labels, example.masks())
    results = tmp_path / RESULTS_FILE
    results.write_text(json.dumps(entries))
    made = Predictions(results, 7, 3.5, ("a departure",), {"batchnorm": "plain"}, {"x": "y"})
    monkeypatch.setattr(detection, "train_and_predict", lambda job: made)
    record = run_job(job)
    assert record.metrics["box_ap"] == record.metrics["mask_ap"] == 100.0
    assert (record.seconds, record.images_seen, record.notes) == (3.5, 28, ("a departure",))
    assert record.resolved == {"iterations": 7, "seconds_per_iteration": 0.5, "batchnorm": "plain"}
    assert record.artifacts == {"x": "y"}
    assert set(record.tables["per_class"]["box_ap"].values()) == {100.0}

    results.write_text(json.dumps(entries[1:]))  # one image unanswered: the error depends on what is drawn
    record = run_job(job_of(root, tmp_path / "other", seed=5))
    by_seed = [coco_eval.evaluate(annotation_file(root, "val"), results, seed).stderr for seed in (5, 0)]
    assert record.stderr == by_seed[0] != by_seed[1]
