"""What stands in the Markdown beside the numbers: optional columns, what the data lack, notes."""

from dataclasses import replace

import pandas as pd

from benchmarks.markdown import markdown_table
from tests.fixtures.records import CHECKPOINT, DATA, VERSIONS, broken, grid, made, ok


def test_engine_and_precision_are_columns_only_where_they_vary(tmp_path):
    assert not {"engine", "precision"} & grid(made(tmp_path, ok("imagenet_finetune", top1=50.0)))[0].keys()


def test_optional_columns_come_with_their_records(tmp_path):
    without = grid(made(tmp_path / "a", ok("imagenet_c", mce=60.0)))[0]
    assert {"IN-C mean error ↓", "clean, classes of IN-A ↑"}.isdisjoint(without)
    records = ok("imagenet_c", mce=60.0, mean_err=45.5), ok("imagenet_a", top1=20.0, clean_200_top1=70.0)
    row = grid(made(tmp_path / "b", *records))[0]
    assert (row["IN-C mean error ↓"], row["clean, classes of IN-A ↑"]) == ("45.50", "70.00")
    assert "evaluation only ↑" not in grid(made(tmp_path / "c", ok("imagenet_finetune", top1=1.0)))[0]


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


def test_numbers_of_an_earlier_version_and_rows_on_other_data_are_named(tmp_path):
    """Two encoders beside each other: one was fine-tuned before the task changed, on data that were made again."""
    new = ok("imagenet_finetune", top1=74.0)
    old = replace(
        ok("imagenet_finetune", top1=87.0),
        checkpoint={**CHECKPOINT, "name": "old", "sha256": "cd" * 32},
        identity={**new.identity, "task_version": VERSIONS["imagenet_finetune"] - 1},
        data={**DATA, "fingerprint": "e" * 64},
    )
    lines = (made(tmp_path, new, old) / "tables/imagenet.md").read_text().splitlines()
    now = VERSIONS["imagenet_finetune"]
    assert (
        f"- version: old cdcdcdcd, fine-tuning: of version {now - 1} of imagenet_finetune, which is at {now} now"
        in ("\n".join(lines))
    )
    (data,) = (line for line in lines if line.startswith("- data of fine-tuning: not the same"))
    assert data.endswith(": old cdcdcdcd on eeeeeeee, enc abababab on ffffffff")
    same = made(tmp_path / "same", new, replace(new, checkpoint={**CHECKPOINT, "name": "other"}))
    lines = (same / "summary.md").read_text().splitlines()
    assert not any(line.startswith(("- version:", "- data of")) for line in lines)


def test_a_seed_without_the_number_of_a_column_is_counted(tmp_path):
    """As one that ran before the metric was there."""
    with_it = [ok("imagenet_a", seed, top1=36.0 + seed, clean_200_top1=90.0) for seed in (0, 1)]
    row = grid(made(tmp_path, *with_it, ok("imagenet_a", 2, top1=38.0)))[0]
    assert row["IN-A ↑"] == "37.00 (3 seeds, sd 1.00)"
    assert row["clean, classes of IN-A ↑"] == "90.00 (2 seeds, sd 0.00, 1 without this number)"


def test_a_task_without_a_table_is_in_the_summary(tmp_path):
    out = made(tmp_path, ok("old_task", top1=33.0, top5=50.0), broken("new_task", "failed", "a reason", metric="ap"))
    assert (grid(out)[0]["old_task top1"], grid(out)[0]["new_task ap"]) == ("33.00", "failed")
    assert "a reason" in (out / "summary.md").read_text()


def test_a_padded_table_lines_up_in_a_terminal_and_another_has_no_spaces_to_spare():
    rows = [["a", "b"], ["多", "1"], ["x|y", "1234"]]
    assert markdown_table(rows, padded=True).splitlines() == [
        "| a    |    b |",
        "| ---- | ---: |",
        "| 多   |    1 |",
        "| x\\|y | 1234 |",
    ]
    assert markdown_table(rows).splitlines()[:3] == ["| a | b |", "| --- | ---: |", "| 多 | 1 |"]
