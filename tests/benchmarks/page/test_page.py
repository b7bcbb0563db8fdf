"""What the page says, against the records that it was made from."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.report import report
from mae_core.claim import SILENT, claimed
from mae_core.errors import UserError
from tests.fixtures import ROOT
from tests.fixtures.page import Parsed, read_page
from tests.fixtures.records import CHECKPOINT, broken, made, official, ok
from transfer.run import write_record


@pytest.fixture(scope="module")
def miniature(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("miniature")
    shutil.copytree(ROOT / "results" / "miniature" / "runs", out / "runs")
    report(out)
    return out


def values_of(page: Parsed) -> dict[str, dict[str, str]]:
    """Path of a record -> what its biography says in each group but the tables, by name."""
    return {
        record["path"]: {
            line[0]: line[1] for title, lines in record["groups"] for line in lines if not title.startswith("Table: ")
        }
        for record in page.data["records"]
    }


def test_every_number_of_the_summary_is_on_the_page(miniature):
    page = read_page(miniature)
    cells = re.findall(r"\d+\.\d+ ± \d+\.\d+", (miniature / "summary.md").read_text())
    assert len(cells) == 60
    assert [cell for cell in cells if cell not in page.text] == []


def test_every_record_has_a_biography_with_all_its_metrics(miniature):
    page = read_page(miniature)
    told = values_of(page)
    records = {str(p.relative_to(miniature)): json.loads(p.read_text()) for p in miniature.rglob("record.json")}
    assert told.keys() == records.keys()
    for path, record in records.items():
        for metric, value in record["metrics"].items():
            error = f" ± {record['stderr'][metric]:.4f}" if metric in record["stderr"] else ""
            assert told[path][metric] == f"{value:.4f}{error}"
        for key in ("engine", "hardware", "commit", "finished"):
            assert told[path][key] == record[key]
        assert told[path]["sha256"] == record["checkpoint"]["sha256"]
        assert told[path]["fingerprint"] == record["data"]["fingerprint"]
        assert told[path]["precision"] == record["machine"]["precision"]
        assert told[path]["seconds"] == f"{record['seconds']:.1f}"
        assert told[path]["torch"] == record["versions"]["torch"]
    opened = {int(button["data-story"]) for button in page.all("button") if "data-story" in button}
    reached = {index for story in opened for index in page.data["stories"][story]["records"]}
    assert reached == set(range(len(records)))


def test_a_button_opens_the_story_of_its_own_number(miniature):
    page = read_page(miniature)
    summary = pd.read_csv(miniature / "summary.csv")
    shown = 0
    for story, text in re.findall(r'data-story="(\d+)"[^>]*>(\d+\.\d+) ±', page.html):
        found = page.data["stories"][int(story)]
        records = [page.data["records"][i] for i in found["records"]]
        values = [float(record["values"][found["metric"]].split()[0]) for record in records]
        assert sum(values) / len(values) == pytest.approx(float(text), abs=0.006)
        assert summary.value.round(4).isin(values).any()
        shown += len(values) > 1
    assert shown > 10


def test_the_biography_of_a_recipe_has_sources_and_overrides(tmp_path):
    changed = replace(
        ok("imagenet_finetune", top1=61.0, stderr={"top1": 0.5}),
        overrides={"batch": 8},
        recipe={"batch": 8, "lr": 0.0015, "image_size": 224},
        sources={"lr": "the paper's Table 9", "batch": "the paper's Table 9"},
        data={**official(ok("x", m=1.0)).data, "findings": ["12 images are missing"]},
        notes=("resumed at step 7",),
    )
    page = read_page(made(tmp_path, changed))
    groups = dict(page.data["records"][0]["groups"])
    assert groups["Recipe"] == [
        ["recipe", "mini"],
        ["batch", "8", "override"],
        ["image_size", "224", ""],
        ["lr", "0.0015", "the paper's Table 9"],
    ]
    assert groups["Notes"] == [["", "resumed at step 7"]]
    assert ["finding", "12 images are missing"] in groups["Data"]


def test_what_is_missing_has_its_reason(tmp_path):
    made(tmp_path, ok("imagenet_finetune", top1=61.0), broken("imagenet_a", "failed", "CUDA out of memory", 3))
    write_record(broken("imagenet_r", "skipped", "no data in /datasets/imagenet-r"), tmp_path / "runs" / "b")
    bad = tmp_path / "runs" / "bad" / "record.json"
    bad.parent.mkdir()
    bad.write_text("{")
    with pytest.raises(UserError):
        report(tmp_path)
    page = read_page(tmp_path)
    assert "failed imagenet_a , enc abababab, seed 3: CUDA out of memory" in page.text
    assert "skipped imagenet_r , enc abababab, seed 0: no data in …/imagenet-r" in page.text
    assert "unreadable runs/bad/record.json is not a record of this version" in page.text
    assert str(tmp_path) not in page.html


HOSTILE = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", '" onclick="x', "{{ 7 * 7 }}", "&lt;"]


def test_names_are_text_wherever_they_come_from(tmp_path):
    for i, text in enumerate(HOSTILE):
        record = ok("imagenet_finetune", i, top1=float(i))
        record = replace(
            record,
            checkpoint={**CHECKPOINT, "name": text, "meta": {text: text}},
            recipe_name=text,
            recipe={text: text},
            notes=(text,),
            data={**record.data, "root": f"/a/{text}", "label": "own", "findings": [text]},
            tables={text: {text: text}},
            versions={text: text},
        )
        write_record(record, tmp_path / "runs" / str(i))
        write_record(broken(f"x{text}", "failed", text), tmp_path / "runs" / f"{i}{text.replace('/', '-')}")
    (tmp_path / "<b>.png").write_text("no picture")
    report(tmp_path)
    page = read_page(tmp_path)
    for text in HOSTILE:
        assert text in page.text
        assert text in json.dumps(page.data["records"], ensure_ascii=False).replace('\\"', '"')
    assert [script.get("id") for script in page.all("script")] == ["data", "library", None]
    assert page.all("img") == []
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "49" not in page.text
    assert "<b>.png" in page.text


def test_the_same_files_give_the_same_bytes(miniature, tmp_path):
    first = (miniature / "index.html").read_bytes()
    records = sorted(miniature.rglob("record.json"), reverse=True)
    for path in records:
        other = tmp_path / path.relative_to(miniature)
        other.parent.mkdir(parents=True)
        shutil.copy(path, other)
    report(tmp_path)
    assert (tmp_path / "index.html").read_bytes() == first
    assert len(first) < 3_000_000


def test_it_reloads_only_while_jobs_are_at_work(tmp_path):
    made(tmp_path, ok("imagenet_finetune", top1=61.0))
    assert not read_page(tmp_path).reloads
    report(tmp_path, going=True)
    assert read_page(tmp_path).reloads
    with claimed(tmp_path / "runs" / "enc" / "imagenet_a" / "mini"):
        report(tmp_path)
        page = read_page(tmp_path)
        assert page.reloads
        assert "enc/imagenet_a/mini" in page.text
    report(tmp_path)
    assert not read_page(tmp_path).reloads


@pytest.mark.parametrize(("age", "at_work"), [(SILENT / 2, True), (SILENT * 2, False)])
def test_a_job_on_another_machine_is_at_work_while_it_touches_its_claim(tmp_path, age, at_work):
    made(tmp_path, ok("imagenet_finetune", top1=61.0))
    claim = tmp_path / "runs" / "enc" / ".claim.0"
    claim.parent.mkdir()
    claim.write_text('{"place": "elsewhere", "pid": 1}')
    now = claim.stat().st_mtime
    os.utime(claim, (now - age, now - age))
    report(tmp_path)
    assert read_page(tmp_path).reloads is at_work


def overview(page: Parsed, line: str) -> list[tuple[str, str]]:
    """The entries of a line of the first overview: class and text of each number."""
    row = next(row for row in re.findall(r"<tr.*?</tr>", page.html, re.S) if f'"row">{line}' in row)
    return re.findall(r'<button type="button" class="(.*?)" data-story.*?>(.*?)</button>', row)


def test_the_overview_marks_the_best_and_what_may_be_as_good(tmp_path):
    def of(name: str, top1: float) -> object:
        record = ok("imagenet_finetune", top1=top1, stderr={"top1": 0.5})
        return replace(record, checkpoint={**CHECKPOINT, "name": name})

    page = read_page(made(tmp_path, of("a", 80.0), of("b", 78.7), of("c", 78.5)))
    assert overview(page, "fine-tuning") == [
        ("number ok best", "80.00 ± 0.50"),
        ("number ok best", "78.70 ± 0.50"),  # within 2 * sqrt(2) * 0.5
        ("number ok", "78.50 ± 0.50"),
    ]


def summary(out: Path) -> str:
    return (out / "summary.md").read_text(encoding="utf-8")


def test_the_mark_allows_for_the_spread_over_seeds(tmp_path):
    """3.3 apart: three standard errors of the images, but 1.6 of both means over three seeds."""
    records = [
        replace(ok("imagenet_finetune", seed, {"top1": 0.8}, top1=mean + 2.45 * (seed - 1)),
                checkpoint={**CHECKPOINT, "name": name, "sha256": name * 64})
        for name, mean in (("a", 74.9), ("b", 71.6)) for seed in range(3)
    ]  # fmt: skip
    marks = [kind for kind, _ in overview(read_page(made(tmp_path, *records)), "fine-tuning")]
    assert marks == ["number ok best"] * 2


def test_a_number_published_for_another_recipe_has_its_source_too(tmp_path):
    record = official(ok("coco", box_ap=51.0, mask_ap=45.0), engine="detectron2")
    page = read_page(made(tmp_path, replace(record, recipe_name="vitdet", recipe={"image_size": 1024})))
    stories = [story for story in page.data["stories"] if "(published)" in story["title"]]
    assert "51.6" in {story["text"] for story in stories}
    assert all("source" in {line[0] for line in story["lines"]} for story in stories)


def test_an_official_number_stands_beside_the_published_ones(tmp_path):
    page = read_page(made(tmp_path, official(ok("imagenet_finetune", top1=82.1, stderr={"top1": 0.2}))))
    [(_, text)] = overview(page, "fine-tuning")
    assert text == "82.10 ± 0.20"
    verdict = re.search(r"enc abababab, fine-tuning: (below by .*?\(.*?\)).*?; published: (83.6)", summary(tmp_path))
    assert f"{verdict[1]}, 1600 epochs assumed published {verdict[2]}" in page.text
    story = next(story for story in page.data["stories"] if story["title"] == "enc abababab: fine-tuning")
    assert ["verdict", f"{verdict[1]}, 1600 epochs assumed"] in story["lines"]
    assert {"published", "could explain it"} <= {line[0] for line in story["lines"]}
    published = [story for story in page.data["stories"] if story["title"].startswith("MAE (published): fine-tuning")]
    assert "83.6" in {story["text"] for story in published}
    sources = {line[1] for story in published for line in story["lines"] if line[0] == "source"}
    assert any("Table 3" in source for source in sources)
    mini = read_page(made(tmp_path / "mini", ok("imagenet_finetune", top1=83.1)))
    assert "not comparable" in mini.text
    assert "(published)" not in json.dumps(mini.data)
