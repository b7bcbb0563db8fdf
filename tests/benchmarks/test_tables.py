"""Our rows among the published ones; the published files against the paper, each other and the collected facts."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import timm

from benchmarks.tables import PUBLISHED, TABLES
from mae_core.vit import ARCHS
from tests.fixtures import ROOT
from tests.fixtures.records import CHECKPOINT, DATA, cells, grid, made, official, ok, ours

LARGE, HUGE = ({**CHECKPOINT, "arch": arch} for arch in ("vit_large_patch16", "vit_huge_patch14"))


def test_published_rows_and_differences_stand_beside_official_paper_records(tmp_path):
    meta = {**CHECKPOINT, "meta": {"epochs": "800", "norm_pix": "true"}}
    numbers = {"imagenet_finetune": {"top1": 83.1}, "imagenet_linprobe": {"top1": 68.25}, "imagenet_c": {"mce": 50.0}}
    out = made(tmp_path, *(official(ok(task, **metrics), checkpoint=meta) for task, metrics in numbers.items()))
    text, rows = (out / "tables/imagenet.md").read_text(), grid(out, "tables/imagenet.md")
    # ViT-B after 800 epochs, mmpretrain: 83.3 fine-tuned, 65.1 linear probe. The paper after 1600: 51.7 mCE.
    assert (ours(rows)["Δ MAE"], ours(rows)["Δ MAE 2"]) == ("-0.20", "+3.15")
    mine = cells(out, "imagenet").set_index("name").loc["enc"]
    assert mine["imagenet_finetune.top1.delta"] == pytest.approx(-0.2)
    assert mine["imagenet_finetune.top1.verdict"] == "not comparable: no standard error"
    assert mine["imagenet_finetune.top1.published"] == "83.3 (MAE, mmpretrain, 800 ep, normalised pixels)"
    assert cells(out, "robustness").set_index("name").loc["enc", "imagenet_c.mce.delta"] == pytest.approx(-1.7)
    assert "- verdict: enc abababab, fine-tuning, linear probing: not comparable: no standard error" in text
    named = {r["checkpoint"] for r in rows}
    assert {"DINO (published)", "MoCo v3 (published)", "BEiT (published)", "MAE (published)"} <= named
    huge = [r for r in rows if r["arch"] == "vit_huge_patch14" and r["checkpoint"] == "MAE (published)"]
    huge = [r for r in huge if r["pre-training"] == "1600 ep, normalised pixels"]
    assert [(r["input px"], r["fine-tuning ↑"]) for r in huge] == [("224", "86.9"), ("448", "87.8")]


SUBSET, MINIATURE = ({"data": {**DATA, "label": label}} for label in ("subset", "miniature"))


@pytest.mark.parametrize("changes", [{"recipe_name": "mini"}, {"overrides": {"epochs": 1}}, SUBSET, MINIATURE])
def test_nothing_published_elsewhere(tmp_path, changes):
    out = made(tmp_path, replace(official(ok("imagenet_finetune", top1=83.1)), **changes))
    text = (out / "summary.md").read_text() + (out / "tables/imagenet.csv").read_text()
    assert "(published)" not in text
    assert set(cells(out, "imagenet").row) == {"ours"}
    assert "Δ" not in text
    assert "83.6" not in text
    assert "enc abababab, fine-tuning: not comparable: " in text


def test_a_difference_that_rounds_to_nothing_has_no_minus(tmp_path):
    assert ours(grid(made(tmp_path, official(ok("imagenet_finetune", top1=83.599)))))["Δ MAE"] == "+0.00"


def test_huge_at_448_is_compared_with_448(tmp_path):
    huge = official(ok("imagenet_finetune", top1=87.0), checkpoint=HUGE)
    found = cells(made(tmp_path, *(replace(huge, recipe={"image_size": side}) for side in (224, 448))), "imagenet")
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
    out = made(tmp_path, record)
    text = (out / "tables/imagenet.md").read_text()
    assert f"published: {expected} (MAE, official PyTorch code, 1600 ep" in text
    assert "facebookresearch/mae FINETUNE.md, under fp16" in text
    rows = grid(out, "tables/imagenet.md")
    assert ours(rows)["evaluation only ↑"] == "83.700"
    assert float(ours(rows)["Δ MAE"]) == pytest.approx(83.7 - expected)
    code = next(r for r in rows if r["arch"] == arch and r["checkpoint"] == "MAE, official PyTorch code (published)")
    assert float(code["evaluation only ↑"]) == expected


def test_partial_fine_tuning_stands_among_figure_9(tmp_path):
    record = ok("imagenet_partial", **{"top1@1": 80.1, "top1@0": 72.2, "top1@0.5": 78.3})
    out = made(tmp_path, official(record, checkpoint=LARGE))
    rows = {row["checkpoint"]: list(row.items())[5:-1] for row in grid(out, "tables/partial.md")}
    columns = ("0 ↑", "0.5 ↑", "1 ↑")
    assert rows["MAE (published)"] == list(zip(columns, ("73.5", "79.1", "81.0")))
    assert rows["MoCo v3 (published)"] == list(zip(columns, ("77.6", "-", "79.9")))
    assert rows["**enc** abababab"] == list(zip(columns, ("72.20", "78.30", "80.10")))
    mini = made(tmp_path / "mini", record)
    assert "(published)" not in (mini / "tables/partial.md").read_text()


def test_training_from_scratch_stands_among_the_papers(tmp_path):
    out = made(tmp_path, official(ok("imagenet_scratch", top1=82.0, top1_without_ema=81.8)))
    rows = {(row["checkpoint"], row["arch"]): row for row in grid(out, "tables/scratch.md")}
    paper = rows["supervised, from scratch (published)", "vit_base_patch16"]
    assert (paper["EMA ↑"], paper["without EMA ↑"]) == ("82.3", "82.1")
    mine = rows["**enc** abababab", "vit_base_patch16"]
    assert (mine["EMA ↑"], mine["without EMA ↑"]) == ("82.00", "81.80")


FILES = {"imagenet", "robustness", "coco", "ade20k", "inaturalist_places", "ablations", "partial", "scratch"}
FILES |= {"frozen", "frozen_segmentation", "depth"}
TASKS = {
    "imagenet": {"imagenet_finetune/top1", "imagenet_linprobe/top1", "imagenet_eval/top1", "imagenet_knn/top1"},
    "frozen": {"imagenet_attnprobe/top1", "imagenet_probes/top1_best_on_test"},
    "frozen_segmentation": {"ade20k_linear/miou", "ade20k_knn/miou"},
    "depth": {"nyu_linear/rmse"},
    "robustness": {f"imagenet_{name}/top1" for name in ("a", "r", "sketch", "v2", "real")} | {"imagenet_c/mce"},
    "coco": {"coco/box_ap", "coco/mask_ap"},
    "ade20k": {"ade20k/miou"},
    "partial": {f"imagenet_partial/top1@{k}" for k in ("0", "0.5", "1", "2", "4", "6", "12", "18", "24")},
    "scratch": {"imagenet_scratch/top1", "imagenet_scratch/top1_without_ema"},
    "ablations": {"imagenet_finetune/top1", "imagenet_linprobe/top1"}
    | {f"pretrain/{metric}" for metric in ("relative_flops", "hours", "speed_up")},
    "inaturalist_places": {f"{t}/top1" for t in ("inat2017", "inat2018", "inat2019", "places205", "places365")},
}
# (lowest, highest) that any method of 2021, ViTDet, or on ReaL BEiT v2, could have printed.
RANGES = {
    "top1": (15, 91),
    "mce": (30, 55),
    "box_ap": (45, 57),
    "mask_ap": (40, 51),
    "miou": (45, 56),
    "rmse": (0.3, 0.5),
}
RANGES |= {"ade20k_knn/miou": (25, 40), "relative_flops": (1, 3.3), "hours": (10, 120), "speed_up": (2, 5)}


def printed(name: str) -> pd.DataFrame:
    return pd.read_csv(PUBLISHED / f"{name}.csv", dtype=str, keep_default_na=False)


def test_every_published_file_is_known():
    assert {p.stem for p in PUBLISHED.glob("*.csv")} == FILES
    assert {t.published for t in TABLES} - {""} <= FILES  # for some nothing is published


@pytest.mark.parametrize("name", sorted(FILES))
def test_published_file(name):
    rows = printed(name)
    header = "table method arch epochs target resolution task metric value seeds sd source confidence"
    assert list(rows.columns) == header.split() + ["recipe"] * (name == "coco")
    recipe = ["recipe"] * ("recipe" in rows)
    assert not rows.duplicated(["method", "arch", "epochs", "target", "resolution", "task", "metric", *recipe]).any()
    assert set(rows.epochs) <= {"", "100", "200", "300", "400", "800", "1600"}
    assert set(rows.target) <= {"", "pixels", "normalised pixels", "PCA coefficients", "dVAE tokens"}
    assert ((rows.sd != "") == (rows.seeds != "")).all()
    assert set(rows.task + "/" + rows.metric) == TASKS[name]
    assert set(rows.arch) <= {"", *ARCHS, *timm.list_models("*dinov3")}
    assert (rows[["table", "method", "value", "source", "confidence"]] != "").all(axis=None)
    assert rows.source.str.contains(
        "arXiv 2111.06377|arXiv 2111.11429|facebookresearch/mae|mmpretrain|efficient-probing|detectron2 projects/ViTDet"
        "|huggingface/pytorch-image-models|facebookresearch/(?:dinov2|dinov3|capi)"
    ).all()
    for task, metric, value in zip(rows.task, rows.metric, rows.value.astype(float)):
        name = re.split("@|_without|_best", metric)[0]
        low, high = RANGES.get(f"{task}/{metric}") or RANGES[name]
        assert low <= value <= high


def test_published_numbers_that_agree_across_tables():
    """Properties of the paper: larger encoders are better, mask AP is below box AP, 448 px helps but not on IN-C."""
    for name in FILES - {"partial"}:  # of ViT-L only
        rows = pd.read_csv(PUBLISHED / f"{name}.csv", keep_default_na=False)
        mae = rows[(rows.method == "MAE") & (rows.resolution.astype(str) != "448") & (rows.epochs == 1600)]
        mae = mae[mae.target.isin(["", "normalised pixels"])].assign(recipe=mae.get("recipe", ""))
        for (_, metric, recipe), group in mae.groupby(["task", "metric", "recipe"]):
            by_arch = group.set_index("arch").value
            sizes = [by_arch[a] for a in ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14") if a in by_arch]
            assert sizes == sorted(sizes, reverse=metric == "mce")
            assert len(sizes) >= 2 or recipe.endswith("-epochs")  # of ViT-B only
    coco = pd.read_csv(PUBLISHED / "coco.csv").query("table == 'Table 4'")
    coco = coco.pivot(index=["method", "arch"], columns="metric", values="value")
    assert (coco.mask_ap < coco.box_ap).all()
    for _, curve in pd.read_csv(PUBLISHED / "partial.csv").groupby("method"):
        assert curve.value.is_monotonic_increasing
    scratch = pd.read_csv(PUBLISHED / "scratch.csv").pivot(index=["method", "arch"], columns="metric", values="value")
    assert (scratch.top1 > scratch.top1_without_ema)[:3].all()
    huge = printed("robustness").query("method == 'MAE' and arch == 'vit_huge_patch14' and task == 'imagenet_c'")
    error = dict(zip(huge.resolution, huge.value.astype(float), strict=True))
    assert error["448"] > error["224"]
    for (_, arch), of_timm in printed("robustness").query("table == 'timm'").groupby(["method", "arch"]):
        by_set = dict(zip(of_timm.task, of_timm.value.astype(float)))
        order = ["imagenet_real", "imagenet_v2", "imagenet_r", "imagenet_sketch"]
        assert sorted(by_set, key=by_set.get, reverse=True)[:3] == order[:3], arch
    larger = printed("robustness").query("table == 'timm'").groupby(["method", "task"]).value
    assert all(values.astype(float).is_monotonic_increasing for _, values in larger)  # the file's order is by size


def test_of_each_dino_the_larger_is_better():
    """But for the very largest pairs, which their owners print as equal or a tenth apart; the files go by size."""
    for name in ("imagenet", "frozen", "frozen_segmentation", "depth"):
        dino = printed(name)
        dino = dino[dino.method.str.startswith("DINOv") & dino.table.isin(["README", "model card"])]
        assert len(dino)
        for (_, task), rows in dino.groupby(["method", "task"]):
            values = rows.value.astype(float) * (-1 if task == "nyu_linear" else 1)
            assert values.diff().min() >= -0.11, task
            assert values.is_unique or task in ("imagenet_knn", "nyu_linear")
    with_registers = (
        printed("imagenet")
        .query("method.str.startswith('DINOv2')")
        .pivot(index="arch", columns="method", values="value")
    )
    assert len(with_registers) == 4
    assert with_registers.astype(float).diff(axis=1).abs().max(axis=None) <= 0.31


def test_published_numbers_against_the_facts():
    path = ROOT.parent / "shared" / "facts" / "published_results.csv"
    if not path.exists():
        pytest.skip("the collected facts are not on this machine")
    facts = pd.read_csv(path, dtype=str, keep_default_na=False)
    known = {(t, v.split()[0].removesuffix("x")) for t, v in zip(facts.table, facts.value) if v}
    for name in FILES:
        rows = printed(name)
        rows = rows[
            ~rows.table.isin(["leaderboard", "timm", "README", "model card"])
        ]  # each with the commit that it was read from
        for table, value in zip(rows.table, rows.value):
            assert (table.replace("Figure", "Fig"), value) in known
    # 25, 50 and 100 epochs on COCO.
    said = (path.parent / "users_and_peers.md").read_text()
    by_schedule = pd.read_csv(PUBLISHED / "coco.csv", dtype=str).query("recipe.notna()").set_index(["recipe", "metric"])
    for metric, word in (("box_ap", "box"), ("mask_ap", "mask")):
        values = [by_schedule.value[name, metric] for name in ("25-epochs", "50-epochs")]
        assert re.search(rf"{word} {'/'.join(values)}/\d", said)
    # ViTDet's, each with its size.
    released = facts.query(
        "table == 'ViTDet release' and method == 'ViTDet Mask R-CNN, MAE init' and dataset == 'COCO 2017 val'"
    )
    by_size = {(r.metric.replace(" ", "_").lower(), r.arch, r.value) for r in released.itertuples()}
    sizes = {"vit_base_patch16": "ViT-B", "vit_large_patch16": "ViT-L", "vit_huge_patch14": "ViT-H"}
    ours = pd.read_csv(PUBLISHED / "coco.csv", dtype=str).query("recipe == 'vitdet'")
    assert {(r.metric, sizes[r.arch], r.value) for r in ours.itertuples()} == by_size
    assert len(ours) == 6
    # Those of other lengths, row by row: a number beside the wrong length would make a wrong verdict.
    columns = zip(*(facts[c] for c in ("method", "task", "arch", "setting", "value")))
    theirs = {(task, arch, re.match(r"\d+", s)[0], v) for m, task, arch, s, v in columns if m.startswith("mmpretrain")}
    tasks = {"imagenet_finetune": "fine-tuning", "imagenet_linprobe": "linear probing"}
    names = {"vit_base_patch16": "ViT-B/16", "vit_large_patch16": "ViT-L/16", "vit_huge_patch14": "ViT-H/14"}
    ours = [r for r in printed("imagenet").to_dict("records") if r["method"] == "MAE, mmpretrain"]
    side = {"224": "", "448": " @448"}
    assert {
        (tasks[r["task"]], names[r["arch"]] + side[r["resolution"]], r["epochs"], r["value"]) for r in ours
    } == theirs
    assert len(ours) == len(theirs) == 16
