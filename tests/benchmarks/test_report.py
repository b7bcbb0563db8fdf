"""The files that a report writes, from which records, in which order, and what it says of those it cannot read."""

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.report import main, report
from mae_core.errors import UserError
from tests.fixtures.records import CHECKPOINT, broken, cells, made, official, ok
from transfer.run import write_record
from transfer.task import Record


def some_records() -> list[Record]:
    rng = random.Random(0)
    records = []
    for name in ("a", "b"):
        for task in ("imagenet_finetune", "imagenet_c", "imagenet_r", "other"):
            metric = {"imagenet_c": "mce", "other": "ap"}.get(task, "top1")
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


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[1]", "null", '{"task": "x"}'),
        '{"task": "x", "status": "ok", "no_such_field": 1}',
        '{"task": "x", "status": "done"}',
        '{"task": "x", "status": "ok", "metrics": {"top1": "high"}}',
        '{"task": "x", "status": "ok", "seconds": null}',
        '{"task": "x", "status": "ok", "data": []}',
    ],
)
def test_an_unreadable_record_is_named_and_the_others_are_tabled(tmp_path, text, capsys):
    made(tmp_path, ok("imagenet_finetune", top1=61.0))
    bad = tmp_path / "runs" / "bad" / "record.json"
    bad.parent.mkdir()
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
