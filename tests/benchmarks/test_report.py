"""The files that a report writes, from which records, in which order, and what it says of those it cannot read."""

import errno
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.report import main, report
from mae_core.errors import UserError
from tests.fixtures.records import CHECKPOINT, broken, cells, grid, made, official, ok
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
    assert len(first) == 8  # the summary, and three tables that show one of these numbers
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
        *(
            f'{{"task": "x", "status": "ok", "metric": "top1", "metrics": {{"top1": 1.0}}, {wrong}}}'
            for wrong in (
                '"stderr": {"top1": NaN}',
                '"chance": true',
                '"seed": 1.5',
                '"checkpoint": {"name": ["a"]}',
                '"checkpoint": {"meta": "none"}',
                '"data": {"root": ["a"]}',
                '"data": {"findings": [1]}',
                '"identity": {"parent": []}',
                '"artifacts": {"classifier.safetensors": {}}',
                '"recipe": {"train_fraction": "half"}',
                '"notes": "one"',
                '"notes": [[]]',
                '"seconds": 1e999',
                '"n_eval": ' + "9" * 5000,
            )
        ),
        '{"task": "x", "status": "ok", "metric": "top1", "metrics": {"top1": NaN}}',
        '{"task": "x", "status": "ok", "metric": "top1", "metrics": {"top1": -Infinity}}',
        '{"task": "x", "status": "ok", "metric": "top1", "metrics": {"top1": null}}',
        '{"task": "x", "status": "ok", "metric": "top1", "metrics": {"top5": 1.0}}',
        '{"task": ' + "[" * 100_000,
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


def test_no_records_is_an_error(tmp_path, capsys):
    assert main(["--out", str(tmp_path)]) == 2
    assert "holds no records" in capsys.readouterr().err


def test_tables_that_cannot_be_written_stay_as_they_were(tmp_path, monkeypatch, capsys):
    """On a full disk, which refuses the last of the files, the page."""
    made(tmp_path, ok("imagenet_finetune", top1=61.0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("[!.]*.*") if path.is_file()}
    write_record(ok("imagenet_a", top1=1.0), tmp_path / "runs" / "b")
    before[tmp_path / "runs" / "b" / "record.json"] = (tmp_path / "runs" / "b" / "record.json").read_bytes()
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 7:  # two summaries, two tables of two files, the page
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.endswith("cannot be written: the disk is full: free some space\n")
    assert error.count("\n") == 1
    left = [path for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith(".claim.")]
    assert {path: path.read_bytes() for path in left} == before


def test_a_table_is_not_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "summary.md").symlink_to(tmp_path / "victim")
    made(tmp_path, ok("imagenet_finetune", top1=61.0))
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "summary.md").is_symlink()


def test_names_break_no_table_reach_no_terminal_and_are_no_formula(tmp_path):
    """Line breaks, tags, links, colours of terminals, marks that turn the writing, formulas of spreadsheets."""
    names = ["=HYPERLINK(1)", "+1+1", "-x", "@SUM(1)", "a\nb", "<script>x</script>", "\x1b[2J", "a\u202eb", "[a](b:c)"]
    records = [
        replace(ok("imagenet_finetune", top1=-1.25), checkpoint={**CHECKPOINT, "name": name}, notes=(name,))
        for name in names
    ]
    records.append(broken("imagenet_a", "failed", "\x1b[2J<b>"))
    out = made(tmp_path, *records)
    for path in out.rglob("*.md"):
        text = path.read_text()
        assert grid(out, str(path.relative_to(out)))  # which needs as many cells in each line
        assert all(character.isprintable() for character in text.replace("\n", ""))
        assert not re.search(r"(?<!\\)<|\]\(", text)
    for path in out.rglob("*.csv"):
        found = pd.read_csv(path, dtype=str, keep_default_na=False)
        assert not found.map(lambda cell: cell[:1] in "=+-@" and cell != "" and cell != "-1.2500").any(axis=None)
    found = pd.read_csv(out / "summary.csv")
    assert sorted(found.checkpoint)[:4] == ["'+1+1", "'-x", "'=HYPERLINK(1)", "'@SUM(1)"]
    assert found.value.dropna().unique().tolist() == [-1.25]


def test_a_table_without_records_is_removed(tmp_path):
    made(tmp_path, ok("imagenet_a", top1=1.0))
    made(tmp_path, ok("imagenet_finetune", top1=1.0))
    assert sorted(p.name for p in (tmp_path / "tables").glob("[!.]*")) == ["imagenet.csv", "imagenet.md"]


def test_the_command_prints_the_files_that_it_wrote(tmp_path, capsys):
    write_record(ok("imagenet_finetune", top1=61.0), tmp_path / "runs" / "x")
    assert main(["--out", str(tmp_path)]) == 0
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.name for path in printed] == ["summary.csv", "summary.md", "imagenet.csv", "imagenet.md", "index.html"]
    assert all(path.is_file() for path in printed)
