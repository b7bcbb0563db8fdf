"""The grid against the recipe and the published file; the tables from cells given by hand; a run in little (slow)."""

import csv
import re
from dataclasses import replace

import pytest

from benchmarks import ablations
from benchmarks.ablation_grid import DEFAULTS, TABLES, Cell, Default
from benchmarks.ablation_tables import ACCURACY, TASKS, WALL_CLOCK, Row, cell_text, published_rows, write_table
from benchmarks.plan import settings_by_task
from mae_core.errors import UserError
from mae_core.recipe import recipe
from transfer.classification import tasks as classification
from transfer.jobs import resolve
from transfer.miniature import imagenet as miniature
from transfer.miniature.unlabelled import unlabelled


def arguments(*flags):
    return ablations.parse(["--out", "o", *flags])


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, table in TABLES.items() for kind in table.cells])
def test_cells_state_only_what_differs_and_none_stands_twice(name, kind):
    args, cells = arguments("--table", name, "--recipe", kind), TABLES[name].cells[kind]
    found = [ablations.resolve_cell(cell, args) for cell in cells]
    for cell, (arch, r) in zip(cells, found):
        assert replace(ablations.resolve_cell(Cell("", arch=cell.arch), args)[1], **cell.knobs) == r
        assert arch == (cell.arch or DEFAULTS[kind].arch)
    assert len(set(found)) == len(found)
    assert found.count(ablations.resolve_cell(Cell(""), args)) == 1


def test_the_paper_s_default_is_section_4_s():
    arch, r = ablations.resolve_cell(Cell(""), arguments("--table", "1a"))
    assert arch == "vit_large_patch16"
    assert r == replace(recipe(arch, "paper"), epochs=800, norm_pix=False)


def test_the_paper_s_cells_are_the_published_ones():
    for name, table in TABLES.items():
        published = [row["label"] for row in published_rows(table.title)]
        labels = [cell.label.removeprefix("ViT-L, ").removeprefix("ViT-H, ") for cell in table.cells["paper"]]
        if name == "1d":
            labels[-1] = "dVAE token"  # its tokenizer is the user's file; without it k-means stands in
        if name == "1c":
            labels, published = sorted(labels), sorted(published)
        assert labels == published, name


def test_the_papers_cells_are_fine_tuned_by_its_table_9(tmp_path):
    """Base rate 1e-3, layer decay 0.75, drop path 0.1 for ViT-L, the class token, no erasing; probed by Table 10."""
    call = ablations.evaluation_args(tmp_path, arguments("--table", "1a", "--data", str(tmp_path)))
    settings = settings_by_task(call.set, classification.TASKS)
    tasks = {task.name: task for task in classification.TASKS if task.name in call.tasks}
    found = {name: resolve(task, "vit_large_patch16", "paper", settings[name]) for name, task in tasks.items()}
    _, name, r, overrides = found["imagenet_finetune"]
    assert (name, overrides) == ("table-9", {})
    assert (r.base_lr, r.layer_decay, r.drop_path, r.pool, r.random_erasing) == (1e-3, 0.75, 0.1, "token", 0.0)
    probe = tasks["imagenet_linprobe"].recipe("vit_large_patch16", "paper")
    assert found["imagenet_linprobe"][1:] == ("paper", probe, {})


def number(title, label, key, arch="vit_large_patch16"):
    return next(row[key] for row in published_rows(title) if (row["label"], row["arch"]) == (label, arch))


def test_published_numbers():
    # MAE paper, Tables 1 and 2, Figures 5 and 7.
    assert number("Table 1a", "1 block", "imagenet_linprobe") == "65.5"
    assert number("Table 1b", "width 1024", "imagenet_finetune") == "84.3"
    assert number("Table 1c", "encoder with mask tokens", "relative_flops") == "3.3"
    assert number("Table 1d", "dVAE token", "imagenet_linprobe") == "71.6"
    assert number("Table 1e", "none (centre crop, no flip)", "imagenet_linprobe") == "65.7"
    assert number("Table 1f", "block 75 %", "imagenet_finetune") == "82.8"
    assert number("Figure 5", "10 %", "imagenet_linprobe") == "54.6"
    assert number("Figure 7", "1600 epochs", "imagenet_finetune") == "85.1"
    label = "encoder without mask tokens, decoder depth 8"
    assert number("Table 2", label, "speed_up", "vit_huge_patch14") == "3.5"
    for title in ("Table 1a", "Table 1b", "Table 1e", "Table 1f", "Figure 5", "Figure 7"):
        found = [row for row in published_rows(title) if row["imagenet_finetune"] == "84.9"]
        assert any(row["imagenet_linprobe"] == "73.5" for row in found), title  # the default


def rows_by_hand():
    numbers = {"relative_flops": 0.8, "seconds": 75.0, "imagenet_finetune": 50.0, "imagenet_linprobe": 20.0}
    errors = {"imagenet_finetune_stderr": 1.25, "imagenet_linprobe_stderr": 1.0}
    texts = {"imagenet_finetune": "50.00 ± 1.25", "imagenet_linprobe": "20.00 ± 1.00"}
    failed = dict.fromkeys(texts, "failed: out of memory")
    return [
        Row("1 block", "decoder_depth=1", numbers | errors, texts, 1),
        Row("2 blocks", "decoder_depth=2", {"relative_flops": 1.0}, failed, 2),
    ]


def test_tables_keep_ours_and_the_published_apart_and_a_failed_cell_a_word(tmp_path):
    paths = write_table(tmp_path, "table_1a", TABLES["1a"], ACCURACY, rows_by_hand(), "vit_mini_patch8, miniature")
    assert [p.name for p in paths] == ["table_1a.csv", "table_1a.md", "table_1a.png"]
    with open(paths[0], newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == ["published"] * 5 + ["ours"] * 2
    assert [lines[0][key] for key in ("cell", "imagenet_linprobe", "arch")] == ["1 block", "65.5", "vit_large_patch16"]
    first, second = lines[5:]
    assert (first["imagenet_finetune"], first["imagenet_finetune_stderr"], first["status"]) == ("50", "1.25", "ok")
    assert (second["imagenet_finetune"], second["seconds"]) == ("", "")
    assert second["status"] == "imagenet_finetune: failed: out of memory; imagenet_linprobe: failed: out of memory"
    text = paths[1].read_text()
    ours, published = text.split("## Published: vit_large_patch16")
    assert "| 1 block | 50.00 ± 1.25 | 20.00 ± 1.00 | 0.80x | 1:15 |" in ours
    assert "| 2 blocks | failed: out of memory | failed: out of memory | 1.00x | failed |" in ours
    assert "| 1 block | 84.8 | 65.5 |" in published
    assert "50.00" not in published
    assert "84.8" not in ours
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_wall_clock_table(tmp_path):
    numbers = {"epoch_seconds": 12.34, "spread": 1.5, "speed_up": 2.5, "relative_flops": 1.0}
    rows = [Row("a", "", numbers, {}), Row("b", "", numbers | {"epoch_seconds": 7200.0}, {})]
    text = write_table(tmp_path, "table_2", TABLES["2"], WALL_CLOCK, rows, "CPU")[1].read_text()
    assert "| a | 12.3 s | ± 1.5 % | 2.50x | 1.00x |" in text
    assert "| b | 2.00 h |" in text
    assert "| encoder without mask tokens, decoder depth 8 | 15.4 | 2.8 | 84.9 |" in text
    assert text.count("## Published") == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--table", "1g"], r"unknown table '1g'; did you mean 1[a-f]\?"),
        (
            ["--table", "1a", "--set", "decoder_dept=3"],
            r"this recipe has no 'decoder_dept'; did you mean decoder_depth",
        ),
        (["--table", "1a", "--gpus", "0"], r"--gpus 0: give 1 or more"),
        (["--table", "1a", "--tokenizer", "x.pth"], r"--tokenizer x.pth: there is no such file"),
        (["--table", "1a", "--tokenizer", __file__], r"only --table 1d uses it"),
        (["--table", "1f", "--set", "mask_ratio=0.6"], r"grid-wise masking hides 0.75"),
        (["--table", "1a"], r"--data DIR is needed"),
        (["--table", "1a", "--data", "nowhere"], r"ImageNet must lie at nowhere/imagenet/train"),
        (["--table", "1a", "--recipe", "mini", "--data", "nowhere", "--plan"], r"must lie at nowhere/imagenet"),
    ],
)
def test_wrong_calls_are_refused_before_anything_runs(tmp_path, capsys, flags, sentence):
    assert ablations.main([*flags, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert error.count("\n") == 1


def test_table_2_needs_images_to_pre_train_on_and_no_classes(tmp_path):
    (tmp_path / "unlabelled").mkdir()
    ablations.check_data(arguments("--table", "2", "--recipe", "mini", "--data", str(tmp_path)))
    with pytest.raises(UserError, match=r"ImageNet must lie at"):
        ablations.check_data(arguments("--table", "2", "1a", "--recipe", "mini", "--data", str(tmp_path)))


def test_plan_lists_the_cells_and_what_they_cost(capsys, tmp_path):
    assert ablations.main(["--table", "1f", "fig7", "--recipe", "mini", "--plan", "--out", str(tmp_path / "o")]) == 0
    assert not (tmp_path / "o").exists()
    out = capsys.readouterr().out
    assert re.search(r"16 epochs +2\.00x  to do", out)  # of a default of 8
    assert re.search(r"4 epochs +0\.50x  to do", out)
    assert "block 50 %" in out
    assert "masking=block, mask_ratio=0.5" in out
    assert out.count("  the default\n") == 1  # the fig7 cell of 8 epochs names them
    assert "epochs=16" in out


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "TRAIN", 4)
        patch.setattr(miniature, "VAL", 2)
        miniature.imagenet(root)
    unlabelled(root, 64)
    return root


SHORT = {"epochs": 1, "warmup_epochs": 0, "batch": 32}
TINY = Default("vit_mini_patch8", SHORT, {"imagenet_finetune": SHORT, "imagenet_linprobe": SHORT})


@pytest.mark.slow
def test_a_table_is_filled_and_resumed_cell_by_cell(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DEFAULTS, "mini", TINY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    call = ["--table", "1c", "--recipe", "mini", "--data", str(tiny_data), "--out", str(tmp_path), "--device", "cpu"]
    assert ablations.main(call) == 0
    first = (tmp_path / "tables" / "table_1c.csv").read_text()
    lines = list(csv.DictReader(first.splitlines()))
    ours = [line for line in lines if line["row"] == "ours"]
    assert [line["status"] for line in ours] == ["ok", "ok"]
    assert float(ours[0]["relative_flops"]) == pytest.approx(2.76, abs=0.05)
    assert all(0 <= float(line[key]) <= 100 for line in ours for key in ("imagenet_finetune", "imagenet_linprobe"))
    # Again: nothing is trained, the table comes out the same.
    folders = sorted((tmp_path / "pretraining").iterdir())
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("**/*.safetensors")}
    assert ablations.main(call) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("**/*.safetensors")} == before
    assert (tmp_path / "tables" / "table_1c.csv").read_text() == first
    capsys.readouterr()
    assert ablations.main([*call, "--plan"]) == 0
    assert capsys.readouterr().out.count("x  done ") == 2
    next((tmp_path / "runs").glob("*/imagenet_linprobe/*/record.json")).unlink()
    assert ablations.main([*call, "--plan"]) == 0
    assert capsys.readouterr().out.count("x  pre-trained; to do: imagenet_linprobe") == 1
    # The default of another table is the same pre-training: nothing is trained for it.
    monkeypatch.setitem(TABLES["1a"].cells, "mini", TABLES["1a"].cells["mini"][1:2])
    assert ablations.main(["--table", "1a", *call[2:]]) == 0
    assert sorted((tmp_path / "pretraining").iterdir()) == folders
    # A cell that fails stays a word, and the exit code says so.
    monkeypatch.setitem(TABLES["1a"].cells, "mini", (Cell("wrong", {"target": "pca", "pca_components": 500}),))
    assert ablations.main(["--table", "1a", *call[2:]]) == 1
    text = (tmp_path / "tables" / "table_1a.md").read_text()
    assert "failed: pre-training ended with exit code 2: error: pca_components=500: 1280 patches of 192 values" in text


def test_table_2_times_all_of_a_size_in_one_run(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(DEFAULTS, "mini", TINY)
    call = ["--table", "2", "--recipe", "mini", "--data", str(tiny_data), "--out", str(tmp_path), "--device", "cpu"]
    assert ablations.main([*call, "--micro-batch", "4"]) == 0
    with open(tmp_path / "tables" / "table_2.csv", newline="") as file:
        ours = [line for line in csv.DictReader(file) if line["row"] == "ours"]
    assert len(ours) == 3
    assert float(ours[0]["speed_up"]) == 1
    flops = [float(line["relative_flops"]) for line in ours]
    assert flops[0] > flops[1] > flops[2] == 1
    seconds = [float(line["epoch_seconds"]) for line in ours]
    assert [float(line["speed_up"]) for line in ours] == pytest.approx([seconds[0] / s for s in seconds], rel=1e-3)


@pytest.mark.parametrize(
    "content", [None, b"", b"\n", b"{", b"{}", b"[]", b"\xff", b'{"seconds": null}', b'{"seconds": NaN}']
)
def test_a_damaged_log_costs_only_the_time(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / "log.jsonl").write_bytes(content)
    assert ablations.training_seconds(tmp_path) is None
    assert "log.jsonl is damaged or gone" in capsys.readouterr().out
    row = Row("a", "", {"imagenet_finetune": 50.0, "imagenet_linprobe": 1.0}, dict.fromkeys(TASKS, "50.00"))
    assert cell_text(row, "seconds") == "unknown"


def test_the_plan_without_data_lists_the_cells_and_ends_as_the_run(tmp_path, capsys):
    assert ablations.main(["--table", "1f", "--plan", "--out", str(tmp_path / "o")]) == 2
    printed, error = capsys.readouterr()
    assert "block 50 %" in printed
    assert "--data DIR is needed" in error


def test_the_tables_of_an_ablation_follow_no_link(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "victim").write_text("precious")
    for suffix in ("csv", "md", "png"):
        (tmp_path / "tables" / f"table_2.{suffix}").symlink_to(tmp_path / "victim")
    rows = [Row("=a", "", {"epoch_seconds": 1.0, "spread": 1.5, "speed_up": 2.5, "relative_flops": 1.0}, {})]
    paths = write_table(tmp_path, "table_2", TABLES["2"], WALL_CLOCK, rows, "CPU")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not any(path.is_symlink() for path in paths)
