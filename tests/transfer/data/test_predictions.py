"""Stored predictions: what is written comes back, the same rows give the same bytes, other images another hash."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mae_core.errors import UserError
from transfer.data.predictions import MAIN, PREDICTIONS_FILE, digest_of, names_of, read_predictions, write_predictions


def columns(images: int = 6) -> dict:
    rng = np.random.default_rng(images)
    return {
        "image": [f"n{i // 2}/é{i}.JPEG" for i in range(images)],
        "label": np.arange(images, dtype=np.int32),
        "loss": rng.random(images).astype(np.float32),
        "neighbours": rng.integers(0, 99, (images, 3), dtype=np.int32),
    }


def test_every_set_and_column_comes_back(tmp_path):
    sets = {MAIN: columns(), "clean": columns(4)}
    write_predictions(tmp_path, sets)
    found = read_predictions(tmp_path / PREDICTIONS_FILE)
    assert list(found) == [MAIN, "clean"]
    for name, rows in sets.items():
        for column, values in rows.items():
            np.testing.assert_array_equal(found[name][column], values)
            assert column == "image" or found[name][column].dtype == values.dtype


def test_pandas_reads_it(tmp_path):
    write_predictions(tmp_path, {MAIN: columns(), "clean": columns(4)})
    table = pd.read_parquet(tmp_path / PREDICTIONS_FILE)
    assert list(table.columns) == ["set", "image", "label", "loss", "neighbours"]
    assert table.groupby("set", observed=True).size().to_dict() == {"": 6, "clean": 4}


def test_the_same_rows_give_the_same_bytes_and_what_the_record_keeps(tmp_path):
    kept = [
        write_predictions(tmp_path / name, {MAIN: columns()}) for name in ("a", "b") if not (tmp_path / name).mkdir()
    ]
    assert kept[0] == kept[1]
    assert kept[0]["images"] == digest_of(read_predictions(tmp_path / "a" / PREDICTIONS_FILE))


@pytest.mark.parametrize(
    "change",
    [
        {"image": columns()["image"][::-1]},
        {"image": ["other", *columns()["image"][1:]]},
        {"label": np.arange(6)[::-1]},
    ],
)
def test_other_images_or_labels_have_another_hash(change):
    assert digest_of({MAIN: columns() | change}) != digest_of({MAIN: columns()})
    assert digest_of({"other": columns()}) != digest_of({MAIN: columns()})


def test_other_answers_on_the_same_images_have_the_same_hash():
    assert digest_of({MAIN: columns() | {"loss": np.zeros(6)}}) == digest_of({MAIN: columns()})
    rows = {"image": ["a", "a", "b"], "class": np.array([0, 1, 0])}
    assert digest_of({MAIN: rows}) == digest_of({MAIN: {"image": ["a", "b"]}})


def test_names_are_below_the_common_folder_on_any_machine():
    files = ["val/n01/a.JPEG", "val/n01/b.JPEG", "val/n02/a.JPEG"]
    found = [names_of([Path(root) / file for file in files]) for root in ("/data/imagenet", "other")]
    assert found[0] == found[1] == [file.removeprefix("val/") for file in files]
    assert names_of([Path("/x/images/1.jpg"), Path("/x/images/2.jpg")]) == ["1.jpg", "2.jpg"]
    assert names_of([]) == []
    assert "\udce9" not in names_of([Path("caf\udce9.jpg")])[0]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}"])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    (tmp_path / PREDICTIONS_FILE).write_bytes(content)
    with pytest.raises(UserError, match=PREDICTIONS_FILE):
        read_predictions(tmp_path / PREDICTIONS_FILE)


def test_a_table_of_something_else_is_refused_by_name(tmp_path):
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UserError, match=r"other\.parquet"):
        read_predictions(tmp_path / "other.parquet")
