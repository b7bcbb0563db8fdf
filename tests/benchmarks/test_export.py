"""Results for other programs, read back by these programs."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pandas as pd
import pytest
from huggingface_hub import ModelCard

from benchmarks.export import main
from benchmarks.latex import escaped
from tests.fixtures import ROOT
from tests.fixtures.records import CHECKPOINT, broken, made, official, ok

HOSTILE = [
    r"a_b%c#d$e&f{g}h~i^j\k", r"\input{/etc/passwd}", "\\\\*[1cm]", '"quo\'te": - x', "--- a ---", "---", "null", "1e3",
    "two\nlines", "<b>|`''--,,?`!`", "{{ 7 * 7 }}", "café Ångström ß ø", "多 🙂 \u202e", "@x: [y](z)", "%", "\\",
]  # fmt: skip


def named(record, name, number):
    checkpoint = {**CHECKPOINT, "name": name, "sha256": f"{number:02x}" * 32}
    return replace(record, checkpoint=checkpoint, notes=(name,))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Hostile names, official and miniature numbers, seeds, a failure, every kind of table."""
    records = [named(ok("imagenet_finetune", top1=50 + i / 3), name, i) for i, name in enumerate(HOSTILE)]
    records += [official(ok("imagenet_finetune", top1=83.4567, stderr={"top1": 0.1645}))]
    records += [ok("coco", seed, box_ap=50.25 + seed, mask_ap=44.5) for seed in (0, 1)]
    records += [broken("ade20k", "failed", "out of memory at /a/path_of/this_machine 100 %", metric="miou")]
    records += [official(ok("imagenet_partial", **{f"top1@{k}": 70.0 + k for k in (1, 4, 6, 12)}))]
    return made(tmp_path_factory.mktemp("out"), *records)


def export(out, tmp_path, *flags):
    file = tmp_path / "file"
    assert main(["--out", str(out), "--file", str(file), *flags]) == 0
    return file


# LaTeX


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a_b 50 % & #1 $x$", r"a\_b 50 \% \& \#1 \$x\$"),
        (r"\x{~^}", r"\textbackslash{}x\{\textasciitilde{}\textasciicircum{}\}"),
        ("vit-b -- ---", "vit-b -{}- -{}-{}-"),
        ("1 ± 2 – 3 Δ", r"1 $\pm$ 2 -- 3 $\Delta$"),
        ("é å ß 中", r"\'{e} \r{a} \ss{} \texttt{U+4E2D}"),
    ],
)
def test_a_text_is_escaped(text, expected):
    assert escaped(text) == expected


def check_latex(text):
    """Whole environments and groups, as many cells in each row as the table has columns, nothing that acts."""
    assert text.isascii()
    body = text[text.index(r"\begin{document}") :]
    open_ones = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        if kind == "begin":
            open_ones.append(name)
        else:
            assert open_ones.pop() == name
    assert open_ones == []
    plain = re.sub(r"\\[{}$&#%_\\]|\{!\}\{%", "", body)
    assert plain.count("{") + body.count("{!}{%") == plain.count("}")  # two of which the pattern took, and one "}"
    assert plain.count("$") % 2 == 0
    assert not re.search(r"(?<!\\)[#%_~^]", re.sub(r"Table~\\ref\{[\w:-]+\}|\\label\{[\w:-]+\}", "", plain))
    tables = re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", body, re.S)
    for columns, rows in tables:
        lines = [line for line in rows.splitlines() if line.endswith(r"\\")]
        assert len(lines) > 1
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in lines} == {len(columns)}
    assert not re.search(r"\\(input|include|write|def)\b", body)
    return tables


def test_the_latex_is_whole_and_has_ours_beside_published_rows(out, tmp_path):
    text = export(out, tmp_path, "--to", "latex").read_text()
    tables = check_latex(text)
    assert len(tables) == 5
    assert r"\textbf{a\_b\%c\#d\$e\&f\{g\}h\textasciitilde{}i" in text
    official = text[text.index(r"\section*{Recipe paper, official data}") : text.index(r"\clearpage")]
    (ours,) = [line for line in official.splitlines() if r"\textbf{enc}" in line and "83.46" in line]
    assert r"83.46 $\pm$ 0.16 & $-$0.14" in ours  # MAE's ViT-B: 83.6
    assert "MAE (published)" in official
    assert "failed: ade20k" in text
    assert "/a/path_of" not in text


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
@pytest.mark.parametrize("records", ["hostile", "committed"])
def test_the_latex_compiles(out, tmp_path, records):
    out = out if records == "hostile" else ROOT / "results" / "miniature"
    file = export(out, tmp_path, "--to", "latex").rename(tmp_path / "tables.tex")
    call = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "-no-shell-escape", file.name]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Float too large" not in done.stdout
    assert (tmp_path / "tables.pdf").read_bytes().startswith(b"%PDF")
    assert "Missing character" not in (tmp_path / "tables.log").read_text(errors="replace")


# The card


def card_of(out, tmp_path, *flags):
    return ModelCard.load(export(out, tmp_path, "--to", "hf-card", *flags))


def test_a_card_has_the_records_values_under_names_that_cannot_be_mistaken(out, tmp_path):
    card = card_of(out, tmp_path, "--ckpt", "enc")
    found = {(r.dataset_type, r.metric_type, r.metric_name): r for r in card.data.eval_results}
    assert [name for name, *_ in found if name == "imagenet-1k"] == ["imagenet-1k"] * 5
    top1 = found["imagenet-1k", "accuracy", "fine-tuning (top1)"]
    assert (top1.metric_value, top1.metric_args["standard_error"]) == (83.4567, 0.1645)
    assert top1.metric_args["verdict"].startswith("matches")
    assert (top1.task_type, top1.task_name) == ("image-classification", "ImageNet-1k, fine-tuning")
    assert top1.dataset_name == "ImageNet-1k"
    kind = "coco-2017-recipe-mini-miniature-data-engine-torch"
    box = found[kind, "mAP", "box AP (box_ap, mean of 2 seeds)"]
    assert (box.metric_value, box.metric_args["seeds"]) == (50.75, 2)
    assert box.dataset_name == "COCO 2017 (recipe mini, miniature data, engine torch)"
    assert found[kind, "mAP", "mask AP (mask_ap, mean of 2 seeds)"].task_type == "image-segmentation"
    assert len(found) == 7  # and none for what failed
    assert "failed" in card.text
    assert "| **enc** abababab " in card.text
    assert "ab" * 32 in card.text


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_hostile_name_survives_the_card(out, tmp_path, number):
    card = card_of(out, tmp_path, "--ckpt", f"{number:02x}" * 4)
    shown = pd.read_csv(out / "summary.csv", keep_default_na=False, dtype=str).set_index("sha256").checkpoint
    assert card.data.model_name == shown[f"{number:02x}" * 4].removeprefix("'")
    assert [result.metric_value for result in card.data.eval_results] == [50 + number / 3]
    assert card.data.eval_results[0].dataset_type == "imagenet-1k-recipe-mini-miniature-data"
    assert card.text.lstrip().startswith("# ")
    assert str(card) == (tmp_path / "file").read_text()


def test_a_card_is_of_one_checkpoint(out, tmp_path, capsys):
    flags = ["--out", str(out), "--to", "hf-card"]
    for more in ([], ["--ckpt", "another"], ["--ckpt", "ab"]):  # a hash of two digits is none
        assert main([*flags, *more]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert "enc abababab" in said.err
        assert "choose one of these with --ckpt" in said.err
    drawn = {**CHECKPOINT, "name": "random:x", "format": "random"}
    random = replace(ok("imagenet_finetune", top1=9.0), checkpoint=drawn)
    both = made(tmp_path, random, named(ok("imagenet_finetune", top1=50.0), "one", 7))
    assert card_of(both, tmp_path).data.model_name == "one"
    assert card_of(both, tmp_path, "--ckpt", "random:x").data.model_name == "random:x"


# JSON


def test_json_has_each_number_as_it_is_with_its_identity(tmp_path):
    value, error = 100 / 3, 1 / 7
    records = [ok("imagenet_finetune", top1=value, top5=90.0, stderr={"top1": error}), broken("coco", "failed", "why")]
    out = made(tmp_path, *records)
    found = json.loads(export(out, tmp_path, "--to", "json").read_text())
    assert [(entry["task"], entry["metric"], entry["value"], entry["stderr"]) for entry in found] == [
        ("coco", "top1", None, None),
        ("imagenet_finetune", "top1", value, error),
        ("imagenet_finetune", "top5", 90.0, None),
    ]
    assert {*found[0]} == {*pd.read_csv(out / "summary.csv").columns, "identity"}
    assert [entry["identity"] for entry in found] == [records[1].identity, *[records[0].identity] * 2]
    assert found[0]["sha256"] == "ab" * 32
    page = (ROOT / "docs" / "export.md").read_text()
    assert {*re.findall(r"`(\w+)`", re.sub(r"\|[^|]*\|\n", "|\n", page[page.index("| field") :]))} >= {*found[0]}


def test_what_cannot_be_read_is_said_and_the_rest_is_written(tmp_path, capsys):
    out = made(tmp_path, ok("imagenet_finetune", top1=1.0))
    (out / "runs" / "b").mkdir()
    (out / "runs" / "b" / "record.json").write_text("{")
    assert main(["--out", str(out), "--to", "json"]) == 1
    said = capsys.readouterr()
    assert [entry["value"] for entry in json.loads(said.out)] == [1.0]
    assert "is not a record of this version" in said.err
    assert main(["--out", str(tmp_path / "nowhere"), "--to", "json"]) == 2
    assert "holds no records" in capsys.readouterr().err
