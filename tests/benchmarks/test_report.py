"""The tables against cells worked out by hand, the paper's numbers, and the published files against each other."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.report import main, report
from benchmarks.tables import PUBLISHED, TABLES
from mae_core.errors import UserError
from tests.fixtures import ROOT
from transfer.task import Record, write_record

CHECKPOINT = {"name": "enc", "sha256": "ab" * 32, "arch": "vit_base_patch16", "format": "ours", "meta": {}}
DATA = {"root": "/somewhere/sets", "status": "found", "label": "miniature", "detail": "", "fingerprint": "f" * 64}


def ok(task: str, seed: int = 0, stderr: dict | None = None, **metrics: float) -> Record:
    """A successful record of `task`, its first metric the headline."""
    return Record(
        task=task,
        status="ok",
        metric=next(iter(metrics)),
        metrics=metrics,
        stderr=stderr or {},
        checkpoint=CHECKPOINT,
        recipe_name="mini",
        recipe={"image_size": 224},
        seed=seed,
        data=DATA,
        identity={"task": task, "task_version": 1, "seed": seed},
        machine={"device": "cpu", "precision": "fp32"},
        finished="2026-05-01T10:00:00+00:00",
    )


def broken(task: str, status: str, reason: str, seed: int = 0, metric: str = "top1") -> Record:
    return replace(ok(task, seed, top1=0.0), status=status, reason=reason, metric=metric, metrics={})


def official(record: Record, **changes) -> Record:
    return replace(record, recipe_name="paper", data={**DATA, "label": "official"}, **changes)


def made(out: Path, *records: Record) -> Path:
    for i, record in enumerate(records):
        write_record(record, out / "runs" / "a" / str(i))
    report(out)
    return out


def cells(out: Path, table: str) -> pd.DataFrame:
    return pd.read_csv(out / "tables" / f"{table}.csv")


def grid(text: str) -> list[dict[str, str]]:
    """The first Markdown table in a text, as rows by header; of equal headers the later is "HEADER 2", ..."""
    block = next(block for block in text.split("\n\n") if block.startswith("|"))
    lines = [[c.strip() for c in line[2:-2].split(" | ")] for line in block.splitlines()]
    header = [h if lines[0].index(h) == i else f"{h} {lines[0][: i + 1].count(h)}" for i, h in enumerate(lines[0])]
    return [dict(zip(header, line, strict=True)) for line in lines[2:]]


def test_one_seed_shows_its_test_sampling_error_alone(tmp_path):
    out = made(tmp_path, ok("imagenet_finetune", top1=61.234, stderr={"top1": 1.096}))
    row = grid((out / "tables/imagenet.md").read_text())[0]
    assert row["fine-tuning ↑"] == "61.23 ± 1.10"
    found = cells(out, "imagenet").iloc[0]
    assert found["imagenet_finetune.top1.stderr"] == 1.096
    assert found["imagenet_finetune.top1.seeds"] == 1
    assert pd.isna(found["imagenet_finetune.top1.sd"])


def test_seeds_are_averaged_and_the_two_errors_stay_apart(tmp_path):
    # mean (60 + 62 + 67) / 3 = 63; deviations -3, -1, 4: sd = sqrt((9 + 1 + 16) / 2) = sqrt(13) = 3.6056;
    # mean standard error (1.0 + 1.1 + 1.5) / 3 = 1.2
    values, errors = (60.0, 62.0, 67.0), (1.0, 1.1, 1.5)
    out = made(tmp_path, *(ok("imagenet_finetune", i, {"top1": errors[i]}, top1=values[i]) for i in range(3)))
    assert grid((out / "summary.md").read_text())[0]["fine-tuning ↑"] == "63.00 ± 1.20 (3 seeds, sd 3.61)"
    found = cells(out, "imagenet").iloc[0]
    assert found["imagenet_finetune.top1"] == 63
    assert found["imagenet_finetune.top1.sd"] == pytest.approx(13**0.5, abs=1e-4)
    assert found["imagenet_finetune.top1.stderr"] == pytest.approx(1.2)


def test_an_error_that_only_some_seeds_have_is_not_shown(tmp_path):
    records = ok("imagenet_finetune", 0, {"top1": 1.0}, top1=60.0), ok("imagenet_finetune", 1, top1=62.0)
    out = made(tmp_path, *records)
    assert grid((out / "summary.md").read_text())[0]["fine-tuning ↑"] == "61.00 (2 seeds, sd 1.41)"


def test_holes_stay_holes_and_have_their_reasons(tmp_path):
    out = made(
        tmp_path,
        ok("imagenet_a", top1=12.0),
        broken("imagenet_r", "skipped", "no data"),
        broken("imagenet_c", "failed", "fog/3 is missing", metric="mce"),
    )
    text = (out / "tables/robustness.md").read_text()
    [row] = grid(text)
    assert (row["IN-C mCE ↓"], row["IN-A ↑"], row["IN-R ↑"], row["IN-Sketch ↑"]) == ("failed", "12.00", "skipped", "-")
    assert "- failed: imagenet_c, enc abababab, seed 0: fog/3 is missing" in text
    assert "- skipped: imagenet_r, enc abababab, seed 0: no data" in text
    assert not (out / "tables/imagenet.md").exists()
    [found] = cells(out, "robustness").to_dict("records")
    assert (found["imagenet_c.mce.status"], found["imagenet_r.top1.status"]) == ("failed", "skipped")
    assert pd.isna(found["imagenet_c.mce"])
    assert pd.isna(found["imagenet_sketch.top1.status"])


def test_a_seed_that_failed_is_named_beside_the_mean_of_the_others(tmp_path):
    out = made(
        tmp_path,
        ok("imagenet_finetune", 0, top1=60.0),
        ok("imagenet_finetune", 1, top1=62.0),
        broken("imagenet_finetune", "failed", "out of memory", seed=2),
    )
    text = (out / "summary.md").read_text()
    assert grid(text)[0]["fine-tuning ↑"] == "61.00 (2 seeds, sd 1.41, 1 failed)"
    assert "seed 2: out of memory" in text


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_ok_beats_failed_beats_skipped_then_the_latest_counts(tmp_path, order):
    def at(record, hour):
        return replace(
            record, finished=f"2026-05-01T{hour}:00:00+00:00", identity={**record.identity, "task_version": hour}
        )

    records = [
        at(ok("imagenet_finetune", top1=50.0), 10),
        at(ok("imagenet_finetune", top1=51.0), 11),
        at(broken("imagenet_finetune", "failed", "newest failure"), 13),
        at(broken("imagenet_linprobe", "skipped", "newest skip"), 14),
    ]
    records.append(at(broken("imagenet_linprobe", "failed", "older failure"), 12))
    out = made(tmp_path, *(records[i] for i in order), records[4])
    text = (out / "summary.md").read_text()
    row = grid(text)[0]
    assert (row["fine-tuning ↑"], row["linear probing ↑"]) == ("51.00", "failed")
    assert "older failure" in text
    assert "newest" not in text
    assert "summary.csv alone shows: 3." in text
    assert len(pd.read_csv(out / "summary.csv")) == 5


def test_equal_times_are_decided_by_identity(tmp_path):
    records = [
        replace(ok("imagenet_finetune", top1=v), identity={"seed": 0, "task_version": v}) for v in (1.0, 2.0, 3.0)
    ]
    for i, some in enumerate((records, records[::-1], [records[2], records[0], records[1]])):
        out = made(tmp_path / str(i), *some)
        assert grid((out / "summary.md").read_text())[0]["fine-tuning ↑"] == "3.00"


def test_seeds_of_two_experiments_are_not_averaged(tmp_path):
    new = {"finished": "2026-06-01T10:00:00+00:00"}
    records = [ok("imagenet_finetune", seed, top1=40.0 + seed) for seed in (0, 1, 2)]
    records += [replace(r, identity={**r.identity, "task_version": 2}, **new) for r in records[:2]]
    out = made(
        tmp_path, *(replace(r, metrics={"top1": r.metrics["top1"] + 10 * (i > 2)}) for i, r in enumerate(records))
    )
    # Version 2 has seeds 0 and 1 with 50 and 51; seed 2 of version 1 is another experiment's.
    assert grid((out / "summary.md").read_text())[0]["fine-tuning ↑"] == "50.50 (2 seeds, sd 0.71)"


def test_seeds_with_their_own_fine_tuned_classifier_are_one_experiment(tmp_path):
    records = [ok("imagenet_a", s, top1=10.0 + s) for s in (0, 1)]
    out = made(tmp_path, *(replace(r, identity={**r.identity, "parent": str(r.seed)}) for r in records))
    assert grid((out / "summary.md").read_text())[0]["IN-A ↑"] == "10.50 (2 seeds, sd 0.71)"


def test_numbers_of_different_meaning_share_no_row(tmp_path):
    base = ok("imagenet_finetune", top1=50.0)
    others = [
        replace(base, machine={"precision": "bf16"}),
        replace(base, engine="other"),
        replace(base, recipe={"image_size": 448}),
        replace(base, resolved={"image_size": 96}),
        replace(base, checkpoint={**CHECKPOINT, "sha256": "cd" * 32}),
        replace(base, overrides={"epochs": 1}),
        replace(base, data={**DATA, "label": "subset", "root": "/home/someone/pets"}),
    ]
    out = made(tmp_path, base, *others)
    found = cells(out, "imagenet")
    assert len(found) == 8
    assert set(found["imagenet_finetune.top1.seeds"]) == {1}
    assert set(found.recipe + ", " + found.data) == {
        "mini, miniature data",
        "mini with epochs=1, miniature data",
        "mini, subset pets",
    }
    text = (out / "summary.md").read_text()
    assert "## Recipe mini, subset pets" in text
    assert {"engine", "precision"} <= grid(text)[0].keys()
    assert "someone" not in text + (out / "summary.csv").read_text()


def test_engine_and_precision_are_columns_only_where_they_vary(tmp_path):
    out = made(tmp_path, ok("imagenet_finetune", top1=50.0))
    assert not {"engine", "precision"} & grid((out / "summary.md").read_text())[0].keys()


def test_a_classifier_from_an_overridden_recipe_is_not_called_paper(tmp_path):
    tuned = official(
        ok("imagenet_finetune", top1=70.0), overrides={"epochs": 1}, artifacts={"classifier.safetensors": "c" * 64}
    )
    sketch = official(ok("imagenet_sketch", top1=20.0), identity={"parent": "c" * 64})
    out = made(tmp_path, tuned, sketch)
    found = cells(out, "robustness")
    assert list(found.row) == ["ours"]
    assert found.recipe[0] == "paper, classifier from paper with epochs=1, official data"


def test_skipped_and_failed_stand_in_the_row_of_the_checkpoint(tmp_path):
    out = made(
        tmp_path,
        replace(
            ok("imagenet_a", top1=10.0),
            machine={"precision": "bf16"},
            recipe={"image_size": 0},
            resolved={"image_size": 224},
        ),
        # Failed before the classifier's own side was known; skipped before anything was.
        replace(
            broken("imagenet_c", "failed", "x", metric="mce"), machine={"precision": "bf16"}, recipe={"image_size": 0}
        ),
        replace(
            broken("imagenet_r", "skipped", "y"), machine={}, recipe={}, data={**DATA, "label": "", "status": "missing"}
        ),
    )
    [row] = grid((out / "tables/robustness.md").read_text())
    assert (row["IN-C mCE ↓"], row["IN-A ↑"], row["IN-R ↑"]) == ("failed", "10.00", "skipped")


def test_a_failure_under_another_precision_has_its_own_row(tmp_path):
    fails = replace(broken("imagenet_finetune", "failed", "x"), machine={"precision": "bf16"})
    rows = grid((made(tmp_path, ok("imagenet_finetune", top1=1.0), fails) / "summary.md").read_text())
    assert [(r["precision"], r["fine-tuning ↑"]) for r in rows[:2]] == [("bf16", "failed"), ("fp32", "1.00")]


def test_nothing_found_has_a_section_even_without_any_number(tmp_path):
    nothing = {"root": "/x", "status": "missing", "detail": "/x/imagenet", "label": ""}
    out = made(
        tmp_path, replace(broken("imagenet_finetune", "skipped", "no data under /home/me/sets/imagenet"), data=nothing)
    )
    text = (out / "summary.md").read_text()
    assert "## Recipe mini, no data" in text
    assert grid(text)[0]["fine-tuning ↑"] == "skipped"
    assert "no data under …/imagenet" in text


def published(table: str, **key: str) -> float:
    rows = pd.read_csv(PUBLISHED / f"{table}.csv", dtype=str, keep_default_na=False)
    for name, value in key.items():
        rows = rows[rows[name] == value]
    [value] = rows.value
    return float(value)


def test_published_rows_and_differences_stand_beside_official_paper_records(tmp_path):
    meta = {**CHECKPOINT, "meta": {"epochs": "800", "norm_pix": "true"}}
    out = made(
        tmp_path,
        official(ok("imagenet_finetune", top1=83.1), checkpoint=meta),
        official(ok("imagenet_linprobe", top1=68.25), checkpoint=meta),
        official(ok("imagenet_c", mce=50.0), checkpoint=meta),
    )
    text = (out / "tables/imagenet.md").read_text()
    rows = grid(text)
    ours = next(r for r in rows if r["checkpoint"].startswith("**enc**"))
    # Paper, ViT-B: 83.6 fine-tuned, 68.0 linear probe, 51.7 mCE.
    assert (ours["Δ MAE"], ours["Δ MAE 2"]) == ("-0.50", "+0.25")
    assert cells(out, "imagenet").set_index("name").loc["enc", "imagenet_finetune.top1.delta"] == pytest.approx(-0.5)
    assert cells(out, "robustness").set_index("name").loc["enc", "imagenet_c.mce.delta"] == pytest.approx(-1.7)
    assert "Table 3 (1600 ep, normalised pixels)" in text
    assert "enc abababab: 800 ep, normalised pixels" in text
    named = {r["checkpoint"] for r in rows}
    assert {"DINO (published)", "MoCo v3 (published)", "BEiT (published)", "MAE (published)"} <= named
    huge = [r for r in rows if r["arch"] == "vit_huge_patch14" and r["checkpoint"] == "MAE (published)"]
    assert [(r["input px"], r["fine-tuning ↑"]) for r in huge] == [("224", "86.9"), ("448", "87.8")]


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe_name": "mini"},
        {"overrides": {"epochs": 1}},
        {"data": {**DATA, "label": "subset"}},
        {"data": {**DATA, "label": "miniature"}},
    ],
)
def test_nothing_published_elsewhere(tmp_path, changes):
    out = made(tmp_path, replace(official(ok("imagenet_finetune", top1=83.1)), **changes))
    text = (out / "summary.md").read_text() + (out / "tables/imagenet.csv").read_text()
    assert "published" not in text
    assert "Δ" not in text
    assert "83.6" not in text


def test_a_difference_that_rounds_to_nothing_has_no_minus(tmp_path):
    text = (made(tmp_path, official(ok("imagenet_finetune", top1=83.599))) / "summary.md").read_text()
    assert next(r for r in grid(text) if r["checkpoint"].startswith("**enc**"))["Δ MAE"] == "+0.00"


def test_huge_at_448_is_compared_with_448(tmp_path):
    huge = {**CHECKPOINT, "arch": "vit_huge_patch14"}
    records = [
        official(ok("imagenet_finetune", top1=87.0), checkpoint=huge, recipe={"image_size": side})
        for side in (224, 448)
    ]
    found = cells(made(tmp_path, *records), "imagenet")
    found = found[found.row == "ours"].set_index("image_size")["imagenet_finetune.top1.delta"]
    assert found[224] == pytest.approx(87.0 - 86.9)
    assert found[448] == pytest.approx(87.0 - 87.8)


def test_an_arch_without_published_numbers_has_no_difference(tmp_path):
    small = {**CHECKPOINT, "arch": "vit_small_patch16"}
    out = made(tmp_path, official(ok("imagenet_finetune", top1=80.0), checkpoint=small))
    assert "Δ" not in (out / "summary.md").read_text()
    assert "MAE (published)" in (out / "summary.md").read_text()


@pytest.mark.parametrize(
    ("arch", "expected"), [("vit_base_patch16", 83.664), ("vit_large_patch16", 85.952), ("vit_huge_patch14", 86.928)]
)
def test_a_released_classifier_is_checked_against_the_official_evaluation(tmp_path, arch, expected):
    record = official(ok("imagenet_eval", top1=83.7), checkpoint={**CHECKPOINT, "arch": arch})
    rows = grid((made(tmp_path, record) / "tables/imagenet.md").read_text())
    ours = next(r for r in rows if r["checkpoint"].startswith("**enc**"))
    assert ours["evaluation only ↑"] == "83.700"
    assert float(ours["Δ MAE"]) == pytest.approx(83.7 - expected)
    code = next(r for r in rows if r["arch"] == arch and r["checkpoint"] == "MAE, official PyTorch code (published)")
    assert float(code["evaluation only ↑"]) == expected


def test_optional_columns_come_with_their_records(tmp_path):
    without = grid((made(tmp_path / "a", ok("imagenet_c", mce=60.0)) / "summary.md").read_text())[0]
    assert {"IN-C mean error ↓", "clean, classes of IN-A ↑"}.isdisjoint(without)
    records = ok("imagenet_c", mce=60.0, mean_err=45.5), ok("imagenet_a", top1=20.0, clean_200_top1=70.0)
    row = grid((made(tmp_path / "b", *records) / "summary.md").read_text())[0]
    assert (row["IN-C mean error ↓"], row["clean, classes of IN-A ↑"]) == ("45.50", "70.00")
    assert (
        "evaluation only ↑"
        not in grid((made(tmp_path / "c", ok("imagenet_finetune", top1=1.0)) / "summary.md").read_text())[0]
    )


def test_chance_images_and_notes_stand_below(tmp_path):
    record = replace(ok("imagenet_a", top1=20.0), chance=8.3333, n_eval=7500, notes=("decoded by another library",))
    text = (made(tmp_path, record) / "tables/robustness.md").read_text()
    assert "- IN-A: 7500 test images, chance 8.33" in text
    assert "- note: imagenet_a, enc abababab, seed 0: decoded by another library" in text


def test_what_the_data_lack_stands_below_once_with_its_columns(tmp_path):
    lack = ["imagenet: 990 of the 1000 classes are missing (n01440764)", "imagenet: see /data/sets/imagenet/train"]
    data = {**DATA, "label": "subset", "findings": lack}
    runs = [replace(ok("imagenet_finetune", seed, top1=50.0), data=data) for seed in (0, 1)]
    other = replace(ok("imagenet_knn", top1=9.0), data={**data, "findings": lack[:1]})
    lost = replace(broken("imagenet_linprobe", "failed", "why"), data=data)
    out = made(tmp_path, *runs, other, lost)
    lines = [line for line in (out / "tables/imagenet.md").read_text().splitlines() if line.startswith("- data of")]
    assert lines == [
        "- data of fine-tuning, k-NN: imagenet: 990 of the 1000 classes are missing (n01440764)",
        "- data of fine-tuning: imagenet: see …/train",  # no path of this machine
    ]
    rows = pd.read_csv(out / "summary.csv", keep_default_na=False)
    (told,) = set(rows[rows.task == "imagenet_finetune"].data_findings)
    assert told == f"{lack[0]}; imagenet: see …/train"
    plain = made(tmp_path / "plain", ok("imagenet_finetune", top1=50.0))
    assert "data of" not in (plain / "summary.md").read_text()
    assert set(pd.read_csv(plain / "summary.csv", keep_default_na=False).data_findings) == {""}


def test_a_task_without_a_table_is_in_the_summary(tmp_path):
    out = made(tmp_path, ok("old_task", top1=33.0, top5=50.0), broken("new_task", "failed", "a reason", metric="ap"))
    text = (out / "summary.md").read_text()
    assert (grid(text)[0]["old_task top1"], grid(text)[0]["new_task ap"]) == ("33.00", "failed")
    assert "a reason" in text


def some_records() -> list[Record]:
    rng = random.Random(0)
    records = []
    for name in ("a", "b"):
        for task, metric in (
            ("imagenet_finetune", "top1"),
            ("imagenet_c", "mce"),
            ("imagenet_r", "top1"),
            ("other", "ap"),
        ):
            for seed in range(3):
                record = ok(task, seed, {metric: rng.random()}, **{metric: rng.uniform(1, 90), "loss": rng.random()})
                record = replace(record, checkpoint={**CHECKPOINT, "name": name}, notes=(f"note {rng.random()}",))
                records += [record, official(record), broken(task, "skipped", f"reason {rng.random()}", seed, metric)]
    return records


def test_any_order_and_any_place_of_the_records_gives_the_same_bytes(tmp_path):
    def written(out: Path) -> dict[str, bytes]:
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.suffix in (".md", ".csv")}

    records = some_records()
    first = written(made(tmp_path / "first", *records))
    assert len(first) == 6
    for i in range(3):
        random.Random(i).shuffle(records)
        assert written(made(tmp_path / f"other place {i}", *records)) == first
    report(tmp_path / "first")
    assert written(tmp_path / "first") == first


def test_summary_csv_has_every_record_and_every_metric(tmp_path):
    records = some_records()
    found = pd.read_csv(made(tmp_path, *records) / "summary.csv")
    assert len(found) == sum(max(1, len(r.metrics)) for r in records)
    by_status = found.groupby("status").reason.apply(lambda reasons: reasons.notna().all())
    assert by_status["skipped"]
    assert not by_status["ok"]
    for r in records:
        for metric, value in r.metrics.items():
            mine = found[(found.checkpoint == r.checkpoint["name"]) & (found.task == r.task) & (found.seed == r.seed)]
            mine = mine[(mine.metric == metric) & (mine.recipe == r.recipe_name)]
            assert mine.value.tolist() == [pytest.approx(value, abs=5e-5)]


def test_markdown_columns_are_aligned(tmp_path):
    out = made(tmp_path, *some_records(), ok("imagenet_finetune", top1=1.0, stderr={"top1": 123.0}))
    blocks = (out / "summary.md").read_text().split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) >= 5
    for table in tables:
        assert {tuple(i for i, c in enumerate(line) if c == "|") for line in table} == {
            tuple(i for i, c in enumerate(table[0]) if c == "|")
        }


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "null",
        '{"task": "x"}',
        '{"task": "x", "status": "ok", "no_such_field": 1}',
        '{"task": "x", "status": "done"}',
        '{"task": "x", "status": "ok", "metrics": {"top1": "high"}}',
        '{"task": "x", "status": "ok", "seconds": null}',
        '{"task": "x", "status": "ok", "data": []}',
    ],
)
def test_an_unreadable_record_is_named_and_the_others_are_tabled(tmp_path, text, capsys):
    made(tmp_path, ok("imagenet_finetune", top1=61.0))
    (tmp_path / "runs" / "bad").mkdir()
    bad = tmp_path / "runs" / "bad" / "record.json"
    bad.write_text(text)
    shutil.rmtree(tmp_path / "tables")
    assert main(["--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(bad) in error
    assert cells(tmp_path, "imagenet")["imagenet_finetune.top1"].tolist() == [61.0]
    with pytest.raises(UserError, match=r"record\.json"):
        report(tmp_path)


def test_no_records_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no records"):
        report(tmp_path)


def test_a_table_without_records_is_removed(tmp_path):
    made(tmp_path, ok("imagenet_a", top1=1.0))
    made(tmp_path, ok("imagenet_finetune", top1=1.0))
    assert sorted(p.name for p in (tmp_path / "tables").iterdir()) == ["imagenet.csv", "imagenet.md"]


def test_the_command_prints_the_files_that_it_wrote(tmp_path, capsys):
    write_record(ok("imagenet_finetune", top1=61.0), tmp_path / "runs" / "x")
    assert main(["--out", str(tmp_path)]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in printed] == ["summary.csv", "summary.md", "imagenet.csv", "imagenet.md"]
    assert all(path.is_file() for path in printed)


def test_partial_fine_tuning_stands_among_figure_9(tmp_path):
    large = {**CHECKPOINT, "arch": "vit_large_patch16"}
    found = {"top1@1": 80.1, "top1@0": 72.2, "top1@0.5": 78.3}
    out = made(tmp_path, official(ok("imagenet_partial", **found), checkpoint=large))
    rows = {row["checkpoint"]: row for row in grid((out / "tables/partial.md").read_text())}
    assert [*rows["MAE (published)"]][3:] == ["0 ↑", "0.5 ↑", "1 ↑"]
    assert [rows["MAE (published)"][k] for k in ("0 ↑", "0.5 ↑", "1 ↑")] == ["73.5", "79.1", "81.0"]
    assert [rows["MoCo v3 (published)"][k] for k in ("0 ↑", "0.5 ↑", "1 ↑")] == ["77.6", "-", "79.9"]
    assert [rows["**enc** abababab"][k] for k in ("0 ↑", "0.5 ↑", "1 ↑")] == ["72.20", "78.30", "80.10"]
    mini = made(tmp_path / "mini", ok("imagenet_partial", **found))
    assert "published" not in (mini / "tables/partial.md").read_text()


def test_training_from_scratch_stands_among_the_papers(tmp_path):
    out = made(tmp_path, official(ok("imagenet_scratch", top1=82.0, top1_without_ema=81.8)))
    rows = {(row["checkpoint"], row["arch"]): row for row in grid((out / "tables/scratch.md").read_text())}
    paper = rows["supervised, from scratch (published)", "vit_base_patch16"]
    assert (paper["EMA ↑"], paper["without EMA ↑"]) == ("82.3", "82.1")
    ours = rows["**enc** abababab", "vit_base_patch16"]
    assert (ours["EMA ↑"], ours["without EMA ↑"]) == ("82.00", "81.80")


# --- the published numbers

FILES = {"imagenet", "robustness", "coco", "ade20k", "inaturalist_places", "ablations", "partial", "scratch"}
TASKS = {
    "imagenet": {"imagenet_finetune/top1", "imagenet_linprobe/top1", "imagenet_eval/top1"},
    "robustness": {"imagenet_a/top1", "imagenet_r/top1", "imagenet_sketch/top1", "imagenet_c/mce"},
    "coco": {"coco/box_ap", "coco/mask_ap"},
    "ade20k": {"ade20k/miou"},
    "partial": {f"imagenet_partial/top1@{k}" for k in ("0", "0.5", "1", "2", "4", "6", "12", "18", "24")},
    "scratch": {"imagenet_scratch/top1", "imagenet_scratch/top1_without_ema"},
    "ablations": {"imagenet_finetune/top1", "imagenet_linprobe/top1"}
    | {f"pretrain/{metric}" for metric in ("relative_flops", "hours", "speed_up")},
    "inaturalist_places": {f"{t}/top1" for t in ("inat2017", "inat2018", "inat2019", "places205", "places365")},
}
# (lowest, highest) that any method of 2021 could have printed.
RANGES = {"top1": (25, 90), "mce": (30, 55), "box_ap": (45, 55), "mask_ap": (40, 50), "miou": (45, 55)}
RANGES |= {"relative_flops": (1, 3.3), "hours": (10, 120), "speed_up": (2, 5)}


def test_every_published_file_is_known():
    assert {p.stem for p in PUBLISHED.glob("*.csv")} == FILES
    assert {t.published for t in TABLES} <= FILES


@pytest.mark.parametrize("name", sorted(FILES))
def test_published_file(name):
    rows = pd.read_csv(PUBLISHED / f"{name}.csv", dtype=str, keep_default_na=False)
    header = "table method arch pretrain resolution task metric value source confidence"
    assert list(rows.columns) == header.split()
    assert not rows.duplicated(["method", "arch", "resolution", "task", "metric"]).any()
    assert set(rows.task + "/" + rows.metric) == TASKS[name]
    assert set(rows.arch) <= {"", "vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"}
    assert (rows[["table", "method", "value", "source", "confidence"]] != "").all(axis=None)
    assert rows.source.str.contains("arXiv 2111.06377|facebookresearch/mae").all()
    for metric, value in zip(rows.metric, rows.value.astype(float)):
        low, high = RANGES[metric.split("@")[0].split("_without")[0]]
        assert low <= value <= high


def test_published_numbers_that_agree_across_tables():
    """Properties of the paper: larger encoders are better, mask AP is below box AP, 448 px helps but not on IN-C."""
    for name in FILES - {"partial"}:  # of ViT-L alone
        rows = pd.read_csv(PUBLISHED / f"{name}.csv", keep_default_na=False)
        mae = rows[(rows.method == "MAE") & (rows.resolution.astype(str) != "448")]
        for (_, metric), group in mae.groupby(["task", "metric"]):
            by_arch = group.set_index("arch").value
            sizes = [by_arch[a] for a in ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14") if a in by_arch]
            assert sizes == sorted(sizes, reverse=metric == "mce")
            assert len(sizes) >= 2
    coco = pd.read_csv(PUBLISHED / "coco.csv").pivot(index=["method", "arch"], columns="metric", values="value")
    assert (coco.mask_ap < coco.box_ap).all()
    for _, curve in pd.read_csv(PUBLISHED / "partial.csv").groupby("method"):
        assert curve.value.is_monotonic_increasing
    scratch = pd.read_csv(PUBLISHED / "scratch.csv").pivot(index=["method", "arch"], columns="metric", values="value")
    assert (scratch.top1 > scratch.top1_without_ema)[:3].all()
    key = {"method": "MAE", "arch": "vit_huge_patch14"}
    assert published("robustness", **key, resolution="448", task="imagenet_c") > published(
        "robustness", **key, resolution="224", task="imagenet_c"
    )


def test_published_numbers_against_the_facts():
    path = ROOT.parent / "shared" / "facts" / "published_results.csv"
    if not path.exists():
        pytest.skip("the collected facts are not on this machine")
    facts = pd.read_csv(path, dtype=str, keep_default_na=False)
    printed = {(t, v.split()[0].removesuffix("x")) for t, v in zip(facts.table, facts.value) if v}
    for name in FILES:
        rows = pd.read_csv(PUBLISHED / f"{name}.csv", dtype=str, keep_default_na=False)
        for table, value in zip(rows.table, rows.value):
            assert (table.replace("Figure", "Fig"), value) in printed


def test_two_folders_of_one_name_share_no_section(tmp_path):
    def on(root: str, label: str, **changes) -> Record:
        return replace(ok("imagenet_knn", top1=20.0), data={**DATA, "root": root, "label": label}, **changes)

    out = made(tmp_path, on("/x/data", "subset"), on("/y/data", "subset"), on("/z/pets", "own"))
    data = cells(out, "imagenet").data
    assert len(set(data)) == 3
    assert data.str.startswith("subset data ").sum() == 2
    assert "own pets" in set(data)
    assert not data.str.contains("/").any()


def test_a_share_of_the_training_images_is_a_column_of_its_own(tmp_path):
    def trained_on(share: float, top1: float, **changes) -> Record:
        record = official(ok("imagenet_finetune", top1=top1), **changes)
        override = {} if share == 1 else {"train_fraction": share}
        identity = {**record.identity, "recipe": {"train_fraction": share}}
        return replace(record, overrides=override, recipe={"image_size": 224} | override, identity=identity)

    few = trained_on(0.01, 51.0, artifacts={"classifier.safetensors": "few"})
    shifted = official(ok("imagenet_a", top1=9.0), identity={"task": "imagenet_a", "parent": "few"})
    out = made(tmp_path, trained_on(1, 83.7), few, trained_on(0.1, 71.0), shifted)
    text = (out / "tables/imagenet.md").read_text()
    row = next(line for line in grid(text) if "enc" in line["checkpoint"])
    assert row["fine-tuning ↑"] == "83.70"
    assert row["fine-tuning, 10 % of training ↑"] == "71.00"
    assert row["fine-tuning, 1 % of training ↑"] == "51.00"
    assert row["Δ MAE"] == "+0.10"  # 83.6 in Table 3; nothing is published for a share of the images
    assert text.count("Δ MAE |") == 1
    found = cells(out, "imagenet").query("row == 'ours'").iloc[0]
    assert found["imagenet_finetune.top1@0.01"] == 51.0
    assert pd.isna(found["imagenet_finetune.top1@0.01.delta"])
    robustness = (out / "tables/robustness.md").read_text()
    assert "classifier from paper with train_fraction=0.01, official data" in robustness
