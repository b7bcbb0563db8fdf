"""The choice of an engine, and whole jobs on a COCO of a few small images."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import transfer.detection
from mae_core.machine import Machine
from mae_core.training import CHECKPOINT_FILE, LOG_FILE
from mae_core.vit import variant_in_words
from tests.fixtures.coco import COLOURS, FIRST_ID, NAMES, change, rectangle, write_coco, write_split
from tests.fixtures.curves import curves
from tests.fixtures.detection import TASK, TINY, by_hand, job_of
from tests.fixtures.timm import register_timm, timm_checkpoint
from tests.fixtures.transfer import (
    ARCH,
    OTHERS,
    TORCHRUN,
    assert_same_weights,
    finished,
    kill_at,
    other_checkpoint,
    raising,
    record_samples,
)
from transfer import cli, jobs
from transfer.data.coco import annotation_file, inspect_coco, read_split
from transfer.detection import engine_torchvision, shared, tasks
from transfer.detection.evaluate import evaluate
from transfer.detection.picture import PICTURE_FILE
from transfer.detection.recipe import recipe
from transfer.detection.shared import DETECTOR_FILE, RESULTS_FILE, Predictions
from transfer.run import read_record, run_job, with_work_folder

KNOBS = [f"{knob}={value}" for knob, value in TINY.items()]


def call(root: Path, out: Path, *more: str, engine: str = "torchvision") -> list[str]:
    arguments = ["--task", "coco", "--ckpt", f"random:{ARCH}", "--recipe", "mini", "--data", str(root)]
    return [*arguments, "--out", str(out), "--device", "cpu", "--engine", engine, *more]


def test_detectron2_is_refused_where_it_is_not_installed(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "installed", lambda module: module != "detectron2")
    assert cli.main(tasks.TASKS, call(root, tmp_path, engine="detectron2")) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --engine detectron2: it is not installed here; ")
    assert "docs/coco.md" in said
    assert "--engine torchvision" in said
    assert not list(tmp_path.rglob("record.json"))


def test_an_unknown_engine_is_refused(root, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(tasks.TASKS, call(root, tmp_path, engine="tensorflow"))
    assert stopped.value.code == 2
    assert "detectron2" in capsys.readouterr().err


@pytest.mark.parametrize(("there", "chosen"), [(True, "detectron2"), (False, "torchvision")])
def test_auto_takes_detectron2_where_it_is_installed(monkeypatch, there, chosen):
    monkeypatch.setattr(jobs, "installed", lambda module: there or module != "detectron2")
    assert jobs.choose_engine(TASK) == chosen
    assert jobs.choose_engine(TASK, "torchvision") == "torchvision"


def test_each_engine_does_its_own_jobs(root, tmp_path, monkeypatch):
    engines = ("detectron2", "torchvision")
    for engine in engines:
        name, stand_in = f"engine_{engine}", SimpleNamespace(train_and_predict=lambda job, engine=engine: engine)
        monkeypatch.setitem(sys.modules, f"transfer.detection.{name}", stand_in)
        monkeypatch.setattr(transfer.detection, name, stand_in, raising=False)
    job = job_of(root, tmp_path)
    for engine in engines:
        assert tasks.train_and_predict(replace(job, engine=engine)) == engine


def test_engines_seeds_and_precisions_have_work_folders_of_their_own(root, tmp_path):
    job = job_of(root, tmp_path)
    changes = ({}, {"engine": "detectron2"}, {"seed": 1}, {"recipe": recipe(ARCH, "mini")})
    changes = (*changes, {"machine": Machine(precision="bf16")})
    assert len({with_work_folder(replace(job, **changed)).work for changed in changes}) == 5


@pytest.fixture(scope="module")
def ran(root, tmp_path_factory):
    """A job whose every detection counts, so that its files are not empty; its record."""
    work = tmp_path_factory.mktemp("ran")
    job = job_of(root, work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "SCORE_THRESHOLD", 0.0)
        return job, run_job(job)


def test_a_job_records_its_numbers_and_how_they_came_about(ran):
    job, record = ran
    assert (record.status, record.reason, record.metric) == ("ok", "", "box_ap")
    metrics = {"box_ap", "mask_ap", "box_ap50", "box_ap75", "mask_ap50", "mask_ap75", "box_ap_small"}
    assert metrics <= set(record.metrics)
    assert set(record.stderr) == {"box_ap", "mask_ap"}
    classes = {NAMES[category] for category in list(COLOURS)[:3]}  # of the three validation images
    assert set(record.tables["per_class"]["box_ap"]) == set(record.tables["per_class"]["mask_ap"]) == classes
    assert (record.engine, record.n_eval, record.images_seen) == ("torchvision", 3, 16)
    assert set(engine_torchvision.DEPARTURES) <= set(record.notes)
    known = {"iterations": 4, "batchnorm": "plain", "batchnorm_images": 4}
    assert record.resolved.items() >= known.items()
    assert record.resolved["seconds_per_iteration"] > 0
    assert "tensors loaded" in record.resolved["loaded"]
    assert record.seconds == pytest.approx(16 / record.images_per_second, abs=0.06, rel=0.1)  # it is rounded to 0.1
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
        evaluator = by_hand(annotation_file(root, "val"), found, kind)
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


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_an_encoder_that_is_no_plain_vit_is_trained_and_named(root, tmp_path, name):
    job = replace(job_of(root, tmp_path), checkpoint=other_checkpoint(OTHERS[name]))
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert record.resolved["encoder"] == variant_in_words(OTHERS[name])
    weights = load_file(job.work / DETECTOR_FILE)
    own = "blocks.5.ls1.gamma" if "ls1" in " ".join(weights) else "blocks.5.norm1.weight"
    start = job.checkpoint.encoder.get(own, job.checkpoint.encoder.get("blocks.5.gamma_1"))
    assert not torch.equal(weights[f"body.{own}"], start)
    assert ("body.bias_global" in weights) != (name == "BEiT")


@pytest.mark.parametrize("name", ["little_eva02", pytest.param("little_siglip", marks=pytest.mark.slow)])
def test_an_encoder_that_timm_builds_is_trained_and_named(root, tmp_path, monkeypatch, name):
    register_timm(monkeypatch)
    job = replace(job_of(root, tmp_path, layer_decay=0.5), checkpoint=timm_checkpoint(name))
    assert jobs.obstacle(job) == ("", "")
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert record.resolved["encoder"] == f"timm's {name}"
    weights, key = load_file(job.work / DETECTOR_FILE), "net.blocks.5.mlp.fc2.weight"
    assert not torch.equal(weights[f"body.{key}"], job.checkpoint.encoder[key])
    assert weights["body.bias_windowed"].any()
    numbers = tasks.numbers_of(job.checkpoint.arch, job.checkpoint.variant, job.recipe)
    assert sum(t.numel() for t in weights.values()) == numbers
    assert tasks.image_flops(job.checkpoint.arch, job.checkpoint.variant, job.recipe) > 0


def test_vitdets_recipe_is_refused_where_timm_builds_the_encoder(root, tmp_path, monkeypatch):
    register_timm(monkeypatch)
    recipe = TASK.recipe("timm/little_eva02", "vitdet")
    job = replace(job_of(root, tmp_path), checkpoint=timm_checkpoint("little_eva02"), recipe=recipe)
    assert "leave recipe=vitdet out" in dict(tasks.objections(job))["recipe"]
    assert "recipe" not in dict(tasks.objections(replace(job, checkpoint=job_of(root, tmp_path).checkpoint)))


def test_layer_scales_and_bias_tables_have_no_weight_decay(root, tmp_path):
    for name in ("BEiT", "DINOv2 with registers"):
        pyramid, _ = shared.build_pyramid(replace(job_of(root, tmp_path), checkpoint=other_checkpoint(OTHERS[name])))
        names = {id(p): key for key, p in pyramid.named_parameters()}
        decayed, others = ({names[id(p)] for p in group["params"]} for group in shared.parameter_groups(pyramid, 0.1))
        assert not [key for key in decayed if key.endswith(("gamma", "blocks.0.bias", "pos_embed"))]
        assert {"blocks.0.ls1.gamma", "blocks.0.norm1.bias"} <= others
        assert {"blocks.0.attn.qkv.bias", "blocks.0.mlp.fc1.weight"} <= decayed
        assert ("blocks.0.bias" in others) == (name == "BEiT")


def test_a_job_that_is_done_is_not_run_again(root, tmp_path, monkeypatch, capsys):
    arguments = call(root, tmp_path, "--set", *KNOBS)
    assert cli.main(tasks.TASKS, arguments) == 0
    assert "coco: box_ap" in capsys.readouterr().out
    monkeypatch.setattr(engine_torchvision, "fit", None)  # which would fail
    assert cli.main(tasks.TASKS, arguments) == 0
    (path,) = tmp_path.rglob("record.json")
    record = read_record(path)
    assert (record.recipe_name, record.overrides["fpn_dim"], record.engine) == ("mini", 16, "torchvision")


def test_what_was_repaired_is_noted(tmp_path, monkeypatch):
    root = write_coco(tmp_path / "data")
    first = FIRST_ID["train"]
    objects = [rectangle(first + i, 1, -5, 6, 20, 24) for i in range(4)] + [rectangle(first, 1, 5, 5, 0, 3)]
    write_split(root, "train", [(64, 48)] * 4, objects)
    (tmp_path / RESULTS_FILE).write_text("[]")
    monkeypatch.setattr(tasks, "train_and_predict", lambda job: Predictions(tmp_path / RESULTS_FILE, 1, 1.0))
    record = run_job(job_of(root, tmp_path / "work"))
    assert record.status == "ok", record.reason
    left_out = "1 objects of no area or without a valid outline left out"
    assert f"of 5 training objects 4 boxes cut to their image and {left_out} (ids 5)" in record.notes


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
    monkeypatch.setattr(tasks, "train_and_predict", None)
    assert cli.main(tasks.TASKS, call(root, tmp_path / "out")) == 1
    said = capsys.readouterr().out
    assert said.startswith("coco: failed: ")
    assert str(path) in said or "are not in" in said
    (record,) = (tmp_path / "out").rglob("record.json")
    assert read_record(record).status == "failed"


def test_a_missing_data_set_is_skipped_with_the_place_to_put_it(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(tasks.TASKS, call(tmp_path / "empty", tmp_path / "out")) == 1
    assert "coco: skipped: no data: COCO must lie at" in capsys.readouterr().out


def test_a_size_that_the_patches_do_not_divide_is_refused(root, tmp_path, capsys):
    assert cli.main(tasks.TASKS, call(root, tmp_path, "--set", "image_size=60")) == 2
    assert "image_size=60: vit_mini_patch8 has patches of 8 px" in capsys.readouterr().err


def test_vit_h_is_cut_into_patches_of_16_px(root, tmp_path):
    """Its own 14 px do not divide 1024."""
    checkpoint = SimpleNamespace(arch="vit_huge_patch14", sha256="", name="h", identity="")
    data = inspect_coco(root)
    job = jobs.make_job(TASK, checkpoint, "paper", [], data, tmp_path, 0, Machine(), "torchvision")
    assert (job.recipe.image_size, job.recipe.window) == (1024, 16)


def interrupted(job, monkeypatch, position: int) -> None:
    """Run a job that saves after every step until an image of that position in the stream is asked for."""
    get, power_cut = engine_torchvision.Jittered.__getitem__, raising(RuntimeError("power cut"))
    with monkeypatch.context() as patch:
        patch.setattr(
            engine_torchvision.Jittered,
            "__getitem__",
            lambda self, sample: (get if sample.position < position else power_cut)(self, sample),
        )
        assert "power cut" in run_job(job).reason


def test_a_stopped_job_goes_on_at_its_step_and_ends_with_the_same_weights(root, tmp_path, monkeypatch, capsys):
    """From the images of that step on: what came before is not read again."""
    machine = Machine(save_minutes=0)
    whole, stopped = job_of(root, tmp_path / "whole", machine), job_of(root, tmp_path / "stopped", machine)
    first = run_job(whole)
    interrupted(stopped, monkeypatch, 12)
    taken = record_samples(engine_torchvision.Jittered, monkeypatch)
    second = run_job(stopped)
    assert "resuming coco random:vit_mini_patch8 at step 3/4" in capsys.readouterr().out
    assert sorted(sample.position for sample in taken) == [12, 13, 14, 15]
    assert second.status == "ok", second.reason
    assert (second.metrics, second.stderr, second.images_seen) == (first.metrics, first.stderr, first.images_seen)
    assert_same_weights(*(job.work / DETECTOR_FILE for job in (whole, stopped)))
    lines = [(job.work / LOG_FILE).read_text().splitlines() for job in (whole, stopped)]
    logs = [[json.loads(line)["loss"] for line in log] for log in lines]
    assert logs[0] == logs[1]
    drawn = [curves(job.work)["train/loss"] for job in (whole, stopped)]
    assert drawn[0] == drawn[1]
    assert [step for step, _ in drawn[0]] == [0, 1, 2, 3]
    assert len(logs[0]) == 2


@pytest.mark.slow
def test_a_kill_after_the_training_costs_only_the_prediction(root, tmp_path, monkeypatch):
    """The last checkpoint stands until the record is written; its normalisation predicts as the trained model's."""
    job = job_of(root, tmp_path)
    monkeypatch.setattr(shared, "SCORE_THRESHOLD", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(engine_torchvision, "predict", lambda model, job: 1 / 0)
        assert run_job(job).status == "failed"
    assert (tmp_path / CHECKPOINT_FILE).exists()
    with monkeypatch.context() as patch:
        patch.setattr(engine_torchvision, "Jittered", lambda *arguments: [None] * 8)  # no image can be read from it
        record = run_job(job)
    assert (record.status, record.images_seen) == ("ok", 16), record.reason
    again = run_job(job_of(root, tmp_path / "whole"))
    assert record.metrics == again.metrics
    assert (tmp_path / RESULTS_FILE).read_bytes() == (tmp_path / "whole" / RESULTS_FILE).read_bytes()


def test_a_checkpoint_that_does_not_fit_is_reported_in_a_sentence(root, tmp_path, monkeypatch):
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


def test_a_loss_that_is_not_a_number_ends_the_job_with_a_sentence(root, tmp_path):
    record = run_job(job_of(root, tmp_path, lr=1e30))
    assert record.status == "failed"
    assert "infinite or NaN" in record.reason or "the loss is" in record.reason
    assert not (tmp_path / DETECTOR_FILE).exists()
    assert not (tmp_path / "error.txt").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on_and_ends_with_the_same_weights(root, tmp_path):
    more = ["--save-minutes", "0", "--set", *KNOBS, "epochs=12"]
    whole, killed = (["-m", "transfer.detection", *call(root, tmp_path / n, *more)] for n in ("whole", "killed"))
    finished(whole)
    kill_at(f"*/{CHECKPOINT_FILE}", 10, killed)
    assert not any((tmp_path / "killed").rglob("record.json"))
    (checkpoint,) = (tmp_path / "killed").rglob(CHECKPOINT_FILE)
    assert torch.load(checkpoint, weights_only=True)["state"]["step"] == 9
    assert "resuming coco random:vit_mini_patch8 at step" in finished(killed)
    found = [next((tmp_path / name).rglob(DETECTOR_FILE)) for name in ("whole", "killed")]
    assert_same_weights(*found)
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
    arguments = call(data, tmp_path / "out", "--set", *KNOBS, "epochs=24", "lr=2e-3", "max_scale=2")
    finished([*TORCHRUN, "-m", "transfer.detection", *arguments])
    (path,) = (tmp_path / "out").rglob("record.json")
    record = read_record(path)
    assert (record.status, record.machine["processes"], record.n_eval, record.images_seen) == ("ok", 2, 3, 192)
    assert (record.resolved["batchnorm"], record.resolved["batchnorm_images"]) == ("plain", 2)
    assert "BatchNorm saw 2 images at a time, not 4" in record.notes
    weights = load_file(path.parent / DETECTOR_FILE)
    assert all(value.isfinite().all() for value in weights.values())
    # As many steps as one process takes, each over both halves of the batch.
    assert weights["roi_heads.box_head.0.1.num_batches_tracked"] == 48

    job = job_of(data, tmp_path / "one")
    model = engine_torchvision.MaskRCNN(shared.build_pyramid(job)[0], job.recipe, shared.RoIBatchNorm)
    model.load_state_dict(weights)
    found, expected = json.loads((path.parent / RESULTS_FILE).read_text()), engine_torchvision.predict(model, job)
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
    monkeypatch.setattr(tasks, "train_and_predict", lambda job: made)
    record = run_job(job)
    assert record.metrics["box_ap"] == record.metrics["mask_ap"] == 100.0
    assert (record.seconds, record.images_seen, record.notes) == (3.5, 28, ("a departure",))
    assert record.resolved == {"iterations": 7, "seconds_per_iteration": 0.5, "batchnorm": "plain"}
    assert record.artifacts == {"x": "y"}
    assert set(record.tables["per_class"]["box_ap"].values()) == {100.0}

    results.write_text(json.dumps(entries[1:]))  # one image unanswered: the error depends on what is drawn
    record = run_job(job_of(root, tmp_path / "other", seed=5))
    by_seed = [evaluate(annotation_file(root, "val"), results, seed).stderr for seed in (5, 0)]
    assert record.stderr == by_seed[0] != by_seed[1]
