"""What shares a section, a row and a cell, and what a cell says, against cells worked out by hand."""

from dataclasses import replace

import pandas as pd
import pytest
import timm
import torch

from benchmarks.checkpoints import parameters, pretraining
from tests.fixtures.records import CHECKPOINT, DATA, broken, cells, grid, made, official, ok, ours
from transfer.task import Record

PRECISION = {"precision": "bf16"}


@pytest.mark.parametrize(
    ("values", "errors", "said"),
    [
        ((61.234,), (1.096,), "61.23 ± 1.10"),
        # mean (60 + 62 + 67) / 3 = 63; deviations -3, -1, 4: sd = sqrt((9 + 1 + 16) / 2) = sqrt(13) = 3.6056;
        # mean standard error (1.0 + 1.1 + 1.5) / 3 = 1.2
        ((60.0, 62.0, 67.0), (1.0, 1.1, 1.5), "63.00 ± 1.20 (3 seeds, sd 3.61)"),
        ((60.0, 62.0), (1.0, None), "61.00 (2 seeds, sd 1.41)"),  # an error that only some seeds have is not shown
    ],
)
def test_seeds_are_averaged_and_the_two_errors_stay_apart(tmp_path, values, errors, said):
    stderr = [{} if error is None else {"top1": error} for error in errors]
    out = made(tmp_path, *(ok("imagenet_finetune", i, stderr[i], top1=value) for i, value in enumerate(values)))
    assert grid(out)[0]["fine-tuning ↑"] == grid(out, "tables/imagenet.md")[0]["fine-tuning ↑"] == said
    found = cells(out, "imagenet").iloc[0]
    assert found["imagenet_finetune.top1"] == pytest.approx(sum(values) / len(values))
    assert found["imagenet_finetune.top1.seeds"] == len(values)
    error = float("nan") if None in errors else sum(errors) / len(errors)
    assert found["imagenet_finetune.top1.stderr"] == pytest.approx(error, nan_ok=True)
    sd = {1: float("nan"), 2: 2**0.5, 3: 13**0.5}[len(values)]
    assert found["imagenet_finetune.top1.sd"] == pytest.approx(sd, abs=1e-4, nan_ok=True)


def test_holes_stay_holes_and_have_their_reasons(tmp_path):
    out = made(
        tmp_path,
        ok("imagenet_a", top1=12.0),
        broken("imagenet_r", "skipped", "no data"),
        broken("imagenet_c", "failed", "fog/3 is missing", metric="mce"),
    )
    [row] = grid(out, "tables/robustness.md")
    assert (row["IN-C mCE ↓"], row["IN-A ↑"], row["IN-R ↑"], row["IN-Sketch ↑"]) == ("failed", "12.00", "skipped", "-")
    text = (out / "tables/robustness.md").read_text()
    assert "- failed: imagenet_c, enc abababab, seed 0: fog/3 is missing" in text
    assert "- skipped: imagenet_r, enc abababab, seed 0: no data" in text
    assert not (out / "tables/imagenet.md").exists()
    [found] = cells(out, "robustness").to_dict("records")
    assert (found["imagenet_c.mce.status"], found["imagenet_r.top1.status"]) == ("failed", "skipped")
    assert pd.isna(found["imagenet_c.mce"])
    assert pd.isna(found["imagenet_sketch.top1.status"])


def test_a_seed_that_failed_is_named_beside_the_mean_of_the_others(tmp_path):
    good = [ok("imagenet_finetune", seed, top1=60.0 + 2 * seed) for seed in (0, 1)]
    out = made(tmp_path, *good, broken("imagenet_finetune", "failed", "out of memory", seed=2))
    assert grid(out)[0]["fine-tuning ↑"] == "61.00 (2 seeds, sd 1.41, 1 failed)"
    assert "seed 2: out of memory" in (out / "summary.md").read_text()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_ok_beats_failed_beats_skipped_then_the_latest_counts(tmp_path, order):
    by_hour = {
        10: ok("imagenet_finetune", top1=50.0),
        11: ok("imagenet_finetune", top1=51.0),
        13: broken("imagenet_finetune", "failed", "newest failure"),
        14: broken("imagenet_linprobe", "skipped", "newest skip"),
        12: broken("imagenet_linprobe", "failed", "older failure"),
    }
    records = [
        replace(record, finished=f"2026-05-01T{hour}:00:00+00:00", identity={**record.identity, "task_version": hour})
        for hour, record in by_hour.items()
    ]
    out = made(tmp_path, *(records[i] for i in order), records[4])
    text, row = (out / "summary.md").read_text(), grid(out)[0]
    assert (row["fine-tuning ↑"], row["linear probing ↑"]) == ("51.00", "failed")
    assert "older failure" in text
    assert "newest" not in text
    assert "summary.csv alone shows: 3." in text
    assert len(pd.read_csv(out / "summary.csv")) == 5


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (2, 0, 1)])
def test_equal_times_are_decided_by_identity(tmp_path, order):
    base = ok("imagenet_finetune", top1=0.0)
    records = [replace(base, metrics={"top1": v}, identity={"seed": 0, "task_version": v}) for v in (1.0, 2.0, 3.0)]
    assert grid(made(tmp_path, *(records[i] for i in order)))[0]["fine-tuning ↑"] == "3.00"


def test_seeds_of_two_experiments_are_not_averaged(tmp_path):
    old = [ok("imagenet_finetune", seed, top1=40.0 + seed) for seed in (0, 1, 2)]
    new = [replace(r, metrics={"top1": 50.0 + r.seed}, identity={**r.identity, "task_version": 2}) for r in old[:2]]
    new = [replace(r, finished="2026-06-01T10:00:00+00:00") for r in new]
    # Version 2 has seeds 0 and 1 with 50 and 51; seed 2 of version 1 is another experiment's.
    assert grid(made(tmp_path, *old, *new))[0]["fine-tuning ↑"] == "50.50 (2 seeds, sd 0.71)"


def test_seeds_with_their_own_fine_tuned_classifier_are_one_experiment(tmp_path):
    records = [ok("imagenet_a", s, top1=10.0 + s) for s in (0, 1)]
    out = made(tmp_path, *(replace(r, identity={**r.identity, "parent": str(r.seed)}) for r in records))
    assert grid(out)[0]["IN-A ↑"] == "10.50 (2 seeds, sd 0.71)"


RANDOM = {**CHECKPOINT, "format": "random"}


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("imagenet_knn", [{}, {}, {}], "32.00 ± 1.00"),
        ("imagenet_a", [{}, {}, {}], "32.00 ± 1.00"),
        # What differs beside the seed, or could: the number, the classifier, the weights; and a training.
        ("imagenet_knn", [{}, {}, {"metrics": {"top1": 32.0, "top1@20": 1.0}}], "32.00 ± 1.00 (3 seeds, sd 0.00)"),
        ("imagenet_a", [{}, {"parent": "x"}, {"parent": "y"}], "32.00 ± 1.00 (3 seeds, sd 0.00)"),
        ("imagenet_knn", [{"checkpoint": RANDOM}] * 3, "32.00 ± 1.00 (3 seeds, sd 0.00)"),
        ("imagenet_linprobe", [{}, {}, {}], "32.00 ± 1.00 (3 seeds, sd 0.00)"),
    ],
)
def test_a_task_that_the_seed_does_not_enter_has_one_number(tmp_path, task, changes, said):
    records = []
    for seed, change in enumerate(changes):
        record = ok(task, seed, {"top1": 1.0}, top1=32.0)
        identity = record.identity | {"parent": change.get("parent", "")}
        records.append(replace(record, identity=identity, **{k: v for k, v in change.items() if k != "parent"}))
    out = made(tmp_path, *records)
    table = "robustness" if task == "imagenet_a" else "imagenet"
    assert said in grid(out, f"tables/{table}.md")[0].values()
    assert cells(out, table).iloc[0][f"{task}.top1.seeds"] == (3 if "seeds" in said else 1)


def test_numbers_of_different_meaning_share_no_row(tmp_path):
    base = ok("imagenet_finetune", top1=50.0)
    changes = {
        "machine": PRECISION, "engine": "other", "recipe": {"image_size": 448}, "resolved": {"image_size": 96},
        "checkpoint": {**CHECKPOINT, "sha256": "cd" * 32}, "overrides": {"epochs": 1},
        "data": {**DATA, "label": "subset", "root": "/home/someone/pets"},
    }  # fmt: skip
    out = made(tmp_path, base, *(replace(base, **{name: value}) for name, value in changes.items()))
    found = cells(out, "imagenet")
    assert len(found) == 8
    assert set(found["imagenet_finetune.top1.seeds"]) == {1}
    labels = {"mini, miniature data", "mini with epochs=1, miniature data", "mini, subset pets"}
    assert set(found.recipe + ", " + found.data) == labels
    text = (out / "summary.md").read_text()
    assert "## Recipe mini, subset pets" in text
    assert {"engine", "precision"} <= grid(out)[0].keys()
    assert "someone" not in text + (out / "summary.csv").read_text()


def test_two_folders_of_one_name_share_no_section(tmp_path):
    def on(root: str, label: str) -> Record:
        return replace(ok("imagenet_knn", top1=20.0), data={**DATA, "root": root, "label": label})

    records = on("/x/data", "subset"), on("/y/data", "subset"), on("/z/pets", "own")
    data = cells(made(tmp_path, *records), "imagenet").data
    assert len(set(data)) == 3
    assert data.str.startswith("subset data ").sum() == 2
    assert "own pets" in set(data)
    assert not data.str.contains("/").any()


def test_a_classifier_from_an_overridden_recipe_is_not_called_paper(tmp_path):
    left = {"classifier.safetensors": "c" * 64}
    tuned = official(ok("imagenet_finetune", top1=70.0), overrides={"epochs": 1}, artifacts=left)
    sketch = official(ok("imagenet_sketch", top1=20.0), identity={"parent": "c" * 64})
    found = cells(made(tmp_path, tuned, sketch), "robustness")
    assert list(found.row) == ["ours"]
    assert found.recipe[0] == "paper, classifier from paper with epochs=1, official data"


def test_a_number_of_a_classifier_that_was_changed_after_its_record_stands_apart(tmp_path):
    """The table then shows the record of the failure, in whose identity the recorded classifier is."""
    tuned = official(ok("imagenet_finetune", top1=70.0), artifacts={"classifier.safetensors": "c" * 64})
    changed = official(ok("imagenet_a", top1=99.0), identity={"parent": "d" * 64})
    failed = official(broken("imagenet_a", "failed", "not the file"), identity={"parent": "c" * 64})
    found = cells(made(tmp_path, tuned, changed, failed), "robustness").query("row == 'ours'")
    assert dict(zip(found.recipe, found["imagenet_a.top1"].astype(object).fillna("failed"))) == {
        "paper": "failed",
        "paper, classifier changed after its record": 99.0,
    }


def test_a_number_of_an_earlier_fine_tuning_is_not_averaged_with_later_ones(tmp_path):
    """The first two seeds were fine-tuned by version 2 of the task; then one of them again by version 3."""

    def pair(seed: int, version: int, top1: float, shifted: float) -> list[Record]:
        time, sha256 = f"2026-0{version}-01T10:00:00+00:00", f"{seed}{version}" * 32
        tuned = official(ok("imagenet_finetune", seed, top1=top1), artifacts={"classifier.safetensors": sha256})
        tuned = replace(tuned, identity={**tuned.identity, "task_version": version}, finished=time)
        on_a = official(ok("imagenet_a", seed, top1=shifted))
        return [tuned, replace(on_a, identity={**on_a.identity, "parent": sha256}, finished=time)]

    records = [*pair(0, 2, 83.0, 30.0), *pair(1, 2, 83.2, 30.4), *pair(0, 3, 83.6, 36.0)]
    found = cells(made(tmp_path, *records), "robustness").query("row == 'ours'")
    assert dict(zip(found.recipe, zip(found["imagenet_a.top1"], found["imagenet_a.top1.seeds"]))) == {
        "paper": (36.0, 1),
        "paper, classifier of an earlier fine-tuning": (30.2, 2),
    }
    assert cells(tmp_path, "imagenet").query("row == 'ours'")["imagenet_finetune.top1"].tolist() == [83.6]


@pytest.mark.parametrize("commits", [("1" * 40, "f" * 40), ("f" * 40, "1" * 40)])
def test_a_fine_tuning_that_a_later_version_repeats_to_the_bit_hides_no_number(tmp_path, commits):
    """As where the recipe does not use what the version changed: both records have left the same classifier, and the
    number on ImageNet-A is of either."""
    tuned = official(ok("imagenet_finetune", top1=83.0), artifacts={"classifier.safetensors": "c" * 64})
    now, times = tuned.identity["task_version"], ("2026-02-01T10:00:00+00:00", "2026-03-01T10:00:00+00:00")
    twice = [
        replace(tuned, identity={**tuned.identity, "task_version": version}, commit=commit, finished=time)
        for version, commit, time in zip((now - 1, now), commits, times)
    ]
    on_a = official(ok("imagenet_a", top1=30.0))
    out = made(tmp_path, *twice, replace(on_a, identity={**on_a.identity, "parent": "c" * 64}))
    found = cells(out, "robustness").query("row == 'ours'")
    assert dict(zip(found.recipe, found["imagenet_a.top1"])) == {"paper": 30.0}
    assert "the classifier is of version" not in (out / "summary.md").read_text()


def test_a_classifier_of_an_earlier_version_is_named_beside_its_numbers(tmp_path):
    """One encoder was fine-tuned again by this version, the other one never: their columns on shifted images are the
    same."""
    records = []
    for name, back in (("new", 0), ("old", 1)):
        checkpoint = {**CHECKPOINT, "name": name, "sha256": name.encode().hex().ljust(64, "0")}
        tuned = official(ok("imagenet_finetune", top1=83.0), checkpoint=checkpoint, artifacts={"c": name * 20})
        version = tuned.identity["task_version"] - back
        records.append(replace(tuned, identity={**tuned.identity, "task_version": version}))
        on_a = official(ok("imagenet_a", top1=30.0), checkpoint=checkpoint)
        records.append(replace(on_a, identity={**on_a.identity, "parent": name * 20}))
    text = (made(tmp_path, *records) / "tables" / "robustness.md").read_text()
    notes = [line for line in text.splitlines() if "the classifier is of version" in line]
    assert len(notes) == 1
    assert notes[0].startswith("- note: imagenet_a, old ")
    assert notes[0].endswith(f"of version {version} of imagenet_finetune, which is at {version + 1} now")


def test_skipped_and_failed_stand_in_the_row_of_the_checkpoint(tmp_path):
    missing = {**DATA, "label": "", "status": "missing"}
    unknown_side = {"machine": PRECISION, "recipe": {"image_size": 0}}
    out = made(
        tmp_path,
        replace(ok("imagenet_a", top1=10.0), **unknown_side, resolved={"image_size": 224}),
        # Failed before the classifier's own side was known; skipped before anything was.
        replace(broken("imagenet_c", "failed", "x", metric="mce"), **unknown_side),
        replace(broken("imagenet_r", "skipped", "y"), machine={}, recipe={}, data=missing),
    )
    [row] = grid(out, "tables/robustness.md")
    assert (row["IN-C mCE ↓"], row["IN-A ↑"], row["IN-R ↑"]) == ("failed", "10.00", "skipped")


def test_a_failure_under_another_precision_has_its_own_row(tmp_path):
    fails = replace(broken("imagenet_finetune", "failed", "x"), machine=PRECISION)
    rows = grid(made(tmp_path, ok("imagenet_finetune", top1=1.0), fails))
    assert [(r["precision"], r["fine-tuning ↑"]) for r in rows[:2]] == [("bf16", "failed"), ("fp32", "1.00")]


def test_nothing_found_has_a_section_even_without_any_number(tmp_path):
    nothing = {"root": "/x", "status": "missing", "detail": "/x/imagenet", "label": ""}
    skipped = broken("imagenet_finetune", "skipped", "no data under /home/me/sets/imagenet")
    out = made(tmp_path, replace(skipped, data=nothing))
    text = (out / "summary.md").read_text()
    assert "## Recipe mini, no data" in text
    assert grid(out)[0]["fine-tuning ↑"] == "skipped"
    assert "no data under …/imagenet" in text


def test_a_share_of_the_training_images_is_a_column_of_its_own(tmp_path):
    def trained_on(share: float, top1: float, **changes) -> Record:
        record = official(ok("imagenet_finetune", top1=top1), **changes)
        override = {} if share == 1 else {"train_fraction": share}
        identity = {**record.identity, "recipe": {"train_fraction": share}}
        return replace(record, overrides=override, recipe={"image_size": 224} | override, identity=identity)

    few = trained_on(0.01, 51.0, artifacts={"classifier.safetensors": "few"})
    shifted = official(ok("imagenet_a", top1=9.0), identity={"task": "imagenet_a", "parent": "few"})
    out = made(tmp_path, trained_on(1, 83.7), few, trained_on(0.1, 71.0), shifted)
    row = ours(grid(out, "tables/imagenet.md"))
    assert row["fine-tuning ↑"] == "83.70"
    assert row["fine-tuning, 10 % of training ↑"] == "71.00"
    assert row["fine-tuning, 1 % of training ↑"] == "51.00"
    assert row["Δ MAE"] == "+0.10"  # 83.6 in Table 3; nothing is published for a share of the images
    assert (out / "tables/imagenet.md").read_text().count("Δ MAE |") == 1
    found = cells(out, "imagenet").query("row == 'ours'").iloc[0]
    assert found["imagenet_finetune.top1@0.01"] == 51.0
    assert pd.isna(found["imagenet_finetune.top1@0.01.delta"])
    robustness = (out / "tables/robustness.md").read_text()
    assert "classifier from paper with train_fraction=0.01, official data" in robustness


def test_a_row_says_its_size_its_pretraining_and_what_it_cost(tmp_path):
    meta = {"epochs": "300", "epochs_planned": "1600", "norm_pix": "false", "images": "1281167"}
    gpus = {"device": "cuda", "precision": "bf16", "processes": 8}
    tuned = replace(ok("imagenet_finetune", top1=80.0), machine=gpus, seconds=3600.0, wall_seconds=4500.0)
    probes = [replace(ok("imagenet_linprobe", seed, top1=50.0), machine=gpus, seconds=450.0) for seed in (0, 1)]
    failed = replace(broken("imagenet_knn", "failed", "x"), machine=gpus, seconds=9999.0)
    records = [replace(r, checkpoint={**CHECKPOINT, "meta": meta}) for r in (tuned, *probes, failed)]
    on_cpu = replace(ok("imagenet_knn", top1=9.0), checkpoint={**CHECKPOINT, "arch": "vit_huge_patch14"}, seconds=36.0)
    out = made(tmp_path, *records, on_cpu)
    first, second = grid(out, "tables/imagenet.md")
    # 8 processes: 4500 s with the evaluation, and twice 450 s.
    assert (first["params"], first["hours"]) == ("85.8 M", "12.00 GPU h")
    assert first["pre-training"] == "300 of 1600 ep, pixels, 1,281,167 images"
    assert (second["params"], second["pre-training"], second["hours"]) == ("630.8 M", "-", "0.01 CPU h")
    row = cells(out, "imagenet").iloc[0]
    assert (row.parameters, row.epochs, row.pretraining_images, row.target) == (85_798_656, 300, 1_281_167, "pixels")
    assert (row.gpu_hours, pd.isna(row.cpu_hours)) == (12.0, True)


@pytest.mark.parametrize("arch", ["vit_small_patch16", "vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"])
def test_parameters_are_those_of_timms_model(arch):
    with torch.device("meta"):
        model = timm.create_model(f"{arch}_224", num_classes=0)
    assert parameters(arch) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({}, ""),
        ({"epochs": 40, "norm_pix": False}, "40 ep, pixels"),
        ({"epochs": "800", "norm_pix": "true", "images": 5}, "800 ep, normalised pixels, 5 images"),
        ({"epochs": "800", "epochs_done": 400}, "400 of 800 ep"),
        ({"epochs": "2", "norm_pix": "false", "target": "tokens"}, "2 ep, k-means tokens"),
        ({"epochs": "2", "norm_pix": "false", "target": "tokens", "tokenizer": "dall-e"}, "2 ep, dVAE tokens"),
        ({"epochs": "2", "norm_pix": "false", "target": "pca"}, "2 ep, PCA coefficients"),
        ({"epochs": "many", "images": [1], "norm_pix": None}, ""),
    ],
)
def test_pretraining_is_what_the_checkpoint_says(meta, words):
    assert pretraining({**CHECKPOINT, "meta": meta}) == words
