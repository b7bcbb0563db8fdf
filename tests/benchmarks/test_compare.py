"""Which runs of two checkpoints are compared, what is refused, what is named; hand-made predictions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.compare import main, rows_of, runs_of
from benchmarks.samples import areas_of, corruption_errors
from mae_core.errors import UserError
from tests.fixtures.records import CHECKPOINT, DATA, ok
from transfer.classification.robustness import ALEXNET_ERROR, mce, mce_stderr
from transfer.data.miou import columns_of, scores
from transfer.data.predictions import write_predictions
from transfer.run import write_record

IMAGES = [f"{i}.jpg" for i in range(200)]


def right(share: float, seed: int = 0, images: int = 200) -> dict:
    """The columns of a classifier that is right on that share of the images."""
    label = np.arange(images) % 10
    wrong = np.random.default_rng(seed).random(images) >= share
    return {"image": IMAGES[:images], "label": label, "top1": np.where(wrong, label + 1, label)}


def write(out: Path, name: str, columns: dict, task: str = "imagenet_knn", seed: int = 0, **changes) -> Path:
    work = out / "runs" / name / task / f"{seed}-{len(list(out.rglob('record.json')))}"
    record = ok(task, seed, top1=100 * float(np.mean(columns["top1"] == columns["label"])))
    checkpoint = {**CHECKPOINT, "name": name, "sha256": name.encode().hex().ljust(64, "0")}
    work.mkdir(parents=True)
    record = replace(record, checkpoint=checkpoint, predictions=write_predictions(work, {"": columns}))
    write_record(replace(record, **changes), work)
    return work


def rows(out: Path, a: str = "a", b: str = "b"):
    return rows_of(runs_of(a, out), runs_of(b, out), None)


def test_the_better_one_is_called_better_and_the_same_difference_turned_round(tmp_path, capsys):
    write(tmp_path, "a", right(0.8, 1))
    write(tmp_path, "b", right(0.5, 2))
    (row,), (turned,) = rows(tmp_path), rows(tmp_path, "b", "a")
    assert row.difference.value == pytest.approx(-turned.difference.value)
    assert (row.difference.low, row.difference.high) == pytest.approx((-turned.difference.high, -turned.difference.low))
    assert row.difference.p == turned.difference.p < 0.001
    assert main(["a", "b", "--out", str(tmp_path)]) == 0
    assert "| better |" in capsys.readouterr().out
    assert main(["b", "a", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.replace("  ", " ")
    assert "| worse |" in printed
    assert "same runs" not in printed


def test_a_checkpoint_against_itself_is_said_to_be_the_same(tmp_path, capsys):
    write(tmp_path, "a", right(0.8, 1))
    assert main(["a", "a", "--out", str(tmp_path)]) == 0
    assert "A and B are the same runs" in capsys.readouterr().out


def test_other_folders_are_compared_too(tmp_path):
    write(tmp_path / "mine", "a", right(0.8, 1))
    write(tmp_path / "theirs", "b", right(0.5, 2))
    found = rows_of(runs_of("a", tmp_path / "mine"), runs_of(str(tmp_path / "theirs"), tmp_path / "mine"), None)
    assert [row.task for row in found] == ["imagenet_knn"]


@pytest.mark.parametrize(
    ("columns", "changes", "said"),
    [
        (right(0.5, images=150), {}, "different images"),
        (right(0.5) | {"image": IMAGES[::-1]}, {}, "different images"),
        (right(0.5), {"identity": {"task": "imagenet_knn", "task_version": 2}}, "version 1 of the task against 2"),
        (right(0.5), {"predictions": {}}, "B kept no predictions"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_its_reason(tmp_path, columns, changes, said, capsys):
    write(tmp_path, "a", right(0.8, 1))
    write(tmp_path, "b", columns, **changes)
    (row,) = rows(tmp_path)
    assert row.difference is None
    assert said in row.why
    assert main(["a", "b", "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().out


def test_what_else_differs_is_named(tmp_path, capsys):
    changes = {"recipe": {"image_size": 224, "k": 20}, "machine": {"device": "cpu", "precision": "bf16"}}
    write(tmp_path, "a", right(0.8, 1), recipe={"image_size": 224, "k": 10}, overrides={"k": 10})
    write(tmp_path, "b", right(0.5, 2), **changes)
    (row,) = rows(tmp_path)
    assert row.differs == ("precision: fp32 -> bf16", "k: 10 -> 20")
    main(["a", "b", "--out", str(tmp_path)])
    assert "k: 10 -> 20" in capsys.readouterr().out


def test_equal_recipes_are_compared_and_others_left_alone(tmp_path):
    for name in ("a", "b"):
        write(tmp_path, name, right(0.8, 1), overrides={"k": 10})
        write(tmp_path, name, right(0.6, 1))
    assert [row.difference.a for row in rows(tmp_path)] == pytest.approx([row.difference.b for row in rows(tmp_path)])
    assert len(rows(tmp_path)) == 2


def tuned(out: Path, name: str, version: int = 1, seed: int = 0, **changes) -> dict:
    """A fine-tuning in `out`; returns what the identity of a run on its classifier says beside its task."""
    sha256 = f"{name}{version}{seed}{sorted(changes.get('overrides', ()))}".encode().hex().ljust(64, "0")
    identity = {"task": "imagenet_finetune", "task_version": version, "seed": seed, "overrides": changes}
    changes = {"artifacts": {"classifier.safetensors": sha256}, "identity": identity} | changes
    write(out, name, right(0.8), "imagenet_finetune", seed, **changes)
    return {"task": "imagenet_a", "task_version": 1, "seed": seed, "parent": sha256}


def test_classifiers_of_different_recipes_are_compared_each_with_its_like(tmp_path):
    """The latest number on ImageNet-A is of an overridden fine-tuning, but its own recipe is called the same."""
    for name, shares in (("a", (0.8, 0.2)), ("b", (0.5,))):
        for share, overrides, month in zip(shares, ({}, {"epochs": 1}), (5, 6)):
            on = tuned(tmp_path, name, overrides=overrides)
            finished = f"2026-0{month}-01T10:00:00+00:00"
            write(tmp_path, name, right(share, 1), "imagenet_a", identity=on, finished=finished)
    row = rows(tmp_path)[-1]
    assert (row.task, row.seeds, row.differs) == ("imagenet_a", (1, 1), ())
    assert row.difference.a == 100 * np.mean(right(0.8, 1)["top1"] == right(0.8, 1)["label"])


def test_a_classifier_of_another_recipe_is_named_and_one_of_another_version_refused(tmp_path):
    write(tmp_path, "a", right(0.8, 1), "imagenet_a", identity=tuned(tmp_path, "a", overrides={"epochs": 1}))
    write(tmp_path, "b", right(0.5, 2), "imagenet_a", identity=tuned(tmp_path, "b"))
    row = rows(tmp_path)[-1]
    assert any("mini with epochs=1, miniature data" in what for what in row.differs)
    write(tmp_path, "c", right(0.5, 2), "imagenet_a", identity=tuned(tmp_path, "c", version=2))
    assert rows(tmp_path, "b", "c")[-1].why.startswith("version 1 of the fine-tuning against 2")


def test_only_the_latest_experiment_of_a_side_counts(tmp_path):
    """Seed 1 was run by an earlier version: it is neither averaged with seed 0 nor what the other side is held to."""
    times = {version: {"finished": f"2026-0{version}-01T10:00:00+00:00"} for version in (2, 3)}
    for name, versions in (("a", {0: 3, 1: 2}), ("b", {0: 3})):
        for seed, version in versions.items():
            identity = {"task": "imagenet_knn", "task_version": version, "seed": seed}
            write(tmp_path, name, right(0.8, seed), seed=seed, identity=identity, **times[version])
    (row,) = rows(tmp_path)
    assert (row.seeds, row.why) == ((1, 1), "")


def test_other_data_are_named(tmp_path):
    write(tmp_path, "a", right(0.8, 1))
    write(tmp_path, "b", right(0.5, 2), data={**DATA, "fingerprint": "e" * 64})
    assert rows(tmp_path)[0].differs == ("the data are not the same files",)
    for name, fingerprint in (("c", "c" * 64), ("d", "d" * 64)):
        on = tuned(tmp_path, name, data={**DATA, "label": "subset", "fingerprint": fingerprint})
        write(tmp_path, name, right(0.5, 2), "imagenet_a", identity=on)
    assert rows(tmp_path, "c", "d")[-1].differs == ("the data of the fine-tunings are not the same files",)


def test_several_recipes_of_which_no_two_agree_are_named(tmp_path):
    for k in (10, 20):
        write(tmp_path, "a", right(0.8, 1), overrides={"k": k})
    write(tmp_path, "b", right(0.6, 1))
    (row,) = rows(tmp_path)
    assert "k=10" in row.why
    assert "no two agree" in row.why


def test_seeds_that_change_nothing_count_once(tmp_path):
    for seed in range(3):
        write(tmp_path, "a", right(0.8, 1), seed=seed)
        write(tmp_path, "b", right(0.6, seed), seed=seed)
    assert rows(tmp_path)[0].seeds == (1, 3)


def test_one_training_each_says_what_is_not_counted(tmp_path, capsys):
    for name, share in (("a", 0.8), ("b", 0.5)):
        write(tmp_path, name, right(share, 1), "imagenet_finetune")
    main(["a", "b", "--out", str(tmp_path)])
    assert "how much trainings differ by chance is not counted" in capsys.readouterr().out


def test_more_tasks_raise_every_p(tmp_path, capsys):
    for number, task in enumerate(("imagenet_knn", "imagenet_linprobe", "imagenet_a", "imagenet_r")):
        write(tmp_path, "a", right(0.62, 2 * number + 1), task)
        write(tmp_path, "b", right(0.50, 2 * number), task)
    main(["a", "b", "--out", str(tmp_path)])
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| imagenet")]
    pairs = [(float(line[6]), float(line[7])) for line in lines]
    assert len(pairs) == 4
    assert min(holm / p for p, holm in pairs if p < 0.2) >= 1
    assert max(holm / p for p, holm in pairs) == pytest.approx(4, rel=0.1)


def test_a_probability_below_what_a_float_holds_is_not_printed_as_0(tmp_path, capsys):
    images = [f"{i}.jpg" for i in range(2000)]
    for name, share in (("a", 1.0), ("b", 0.0)):
        write(tmp_path, name, right(share, images=2000) | {"image": images})
    assert main(["a", "b", "--out", str(tmp_path)]) == 0
    assert "| < 1e-300 |" in capsys.readouterr().out.replace("\\<", "<")


def test_a_number_of_a_fine_tuned_classifier_rests_on_one_training_too(tmp_path, capsys):
    for name, share in (("a", 0.8), ("b", 0.5)):
        identity = {"task": "imagenet_a", "task_version": 1, "parent": "ab" * 32}
        write(tmp_path, name, right(share, 1), "imagenet_a", identity=identity)
    assert main(["a", "b", "--out", str(tmp_path)]) == 0
    assert "how much trainings differ by chance is not counted" in capsys.readouterr().out


def test_a_folder_that_is_no_out_is_refused_whatever_lies_below_it(tmp_path, capsys):
    write(tmp_path / "deep", "a", right(0.8))
    assert main(["a", "a", "--out", str(tmp_path)]) == 2
    assert "holds no runs/" in capsys.readouterr().err
    run = next((tmp_path / "deep" / "runs").iterdir())
    assert main(["a", str(run), "--out", str(tmp_path / "deep")]) == 0


@pytest.mark.parametrize("digits", ["6100", "61000000"])
def test_the_first_digits_of_a_hash_name_a_checkpoint(tmp_path, digits):
    write(tmp_path, "a", right(0.8))
    write(tmp_path, "b", right(0.8))
    assert [run.record.checkpoint["name"] for run in runs_of(digits, tmp_path)] == ["a"]


def test_a_task_that_cannot_be_compared_is_told_by_the_exit_code(tmp_path):
    for name in ("a", "b"):
        write(tmp_path, name, right(0.8))
        write(tmp_path, name, right(0.8) | {"image": IMAGES[:: 1 if name == "a" else -1]}, "imagenet_linprobe")
    assert main(["a", "b", "--out", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["a", "nobody"], "has no record of 'nobody'"), (["a", "c"], "no task was run with both a and c")],
)
def test_a_wrong_name_is_answered_in_a_sentence(tmp_path, arguments, said, capsys):
    write(tmp_path, "a", right(0.8))
    write(tmp_path, "c", right(0.8), "imagenet_a")
    assert main([*arguments, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_a_name_of_two_checkpoints_asks_which(tmp_path):
    write(tmp_path, "a", right(0.8))
    write(tmp_path, "a", right(0.8), checkpoint={**CHECKPOINT, "name": "a", "sha256": "99" * 32})
    with pytest.raises(UserError, match="several checkpoints: a 61000000, a 99999999"):
        runs_of("a", tmp_path)
    assert len(runs_of("99999999", tmp_path)) == 1


def test_an_altered_prediction_is_not_compared(tmp_path):
    write(tmp_path, "a", right(0.8))
    work = write(tmp_path, "b", right(0.8))
    write_predictions(work, {"": right(0.9)})
    (row,) = rows(tmp_path)
    assert "was altered" in row.why


def test_an_images_errors_average_to_mce_and_its_standard_error():
    rng = np.random.default_rng(0)
    wrong = {c: [rng.random(30) < 0.5 for _ in range(5)] for c in ALEXNET_ERROR}
    sets = {
        f"{c}/{s}": {"label": np.zeros(30), "top1": part.astype(float)}
        for c, parts in wrong.items()
        for s, part in enumerate(parts, 1)
    }
    found = corruption_errors(sets)
    assert found.mean() == pytest.approx(mce({c: [float(p.mean()) for p in parts] for c, parts in wrong.items()}))
    assert found.std(ddof=1) / 30**0.5 == pytest.approx(mce_stderr(wrong)["mce"])


def test_pixel_counts_come_back_as_they_were():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 50, (12, 7)) * (rng.random((12, 7)) < 0.5)
    hit = (label * rng.random((12, 7))).astype(int)
    areas = np.stack([hit, label + rng.integers(0, 9, (12, 7)), label], axis=1)
    areas[3] = 0  # an image without a labelled pixel
    names = [f"{i:02}" for i in range(12)]
    rows = {key: np.array(values) for key, values in columns_of(names, areas).items()}
    back = areas_of(rows)
    np.testing.assert_array_equal(back, areas)
    assert scores(back) == scores(areas)
