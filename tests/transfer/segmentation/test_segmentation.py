"""ADE20K's recipe, the configuration that it becomes, the counting, and what mmsegmentation is told; no training."""

import inspect
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mae_core.data import Sample, seed_all
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.settings import override
from tests.fixtures import ROOT
from tests.fixtures.image import odd_files
from tests.fixtures.segmentation import TASK, make_config, make_job, write_ade20k
from tests.fixtures.transfer import ARCH
from transfer.data.ade20k import FOLDER, check_pair
from transfer.segmentation import mmseg_plugin as segmentation_mm
from transfer.segmentation import tasks as segmentation
from transfer.segmentation.evaluate import bootstrap, class_scores, metrics_of
from transfer.segmentation.mmseg_config import LOAD_IMAGE, multi_scale_pipeline
from transfer.segmentation.mmseg_config import test_loader as make_loader
from transfer.segmentation.recipe import MINI, recipe, sources
from transfer.segmentation.tasks import Crops, make_runner, with_progress

ARCHS = ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14", "vit_small_patch16", ARCH)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_ade20k(tmp_path_factory.mktemp("ade20k"))


@pytest.fixture(scope="module")
def mmseg():
    segmentation_mm.register()
    return pytest.importorskip("mmseg")


# --- recipes


@pytest.mark.parametrize(
    ("arch", "values"),
    [
        ("vit_base_patch16", (1e-4, 0.65, 0.1, (3, 5, 7, 11), 768)),
        ("vit_large_patch16", (9e-5, 0.75, 0.2, (7, 11, 15, 23), 1024)),
        ("vit_huge_patch14", (9e-5, 0.75, 0.3, (9, 15, 20, 31), 1280)),
    ],
)
def test_paper_recipe(arch, values):
    paper = asdict(recipe(arch, "paper"))
    values = dict(zip(("lr", "layer_decay", "drop_path", "taps", "head_channels"), values))
    common = {
        "image_size": 512, "iterations": 160000, "warmup_iterations": 1500, "batch": 16, "weight_decay": 0.05,
        "power": 1.0, "pool_scales": (1, 2, 3, 6), "head_dropout": 0.1, "auxiliary_channels": 256,
        "auxiliary_weight": 0.4, "min_scale": 0.5, "max_scale": 2.0, "max_class_share": 0.75,
        "test_short_side": 512, "test_long_side": 2048, "stride": 341, "multi_scale": False,
    }  # fmt: skip
    assert paper == paper | common | values


@pytest.mark.parametrize("arch", ARCHS)
def test_every_value_has_a_source_and_stand_ins_are_called_so(arch):
    found = sources(arch)
    assert found.keys() == asdict(recipe(arch, "paper")).keys()
    for name in ("lr", "layer_decay", "drop_path"):
        assert found[name].startswith("stand-in") == (arch != "vit_base_patch16")
    assert "derived" in sources("vit_huge_patch14")["lr"]


@pytest.mark.parametrize("arch", ARCHS)
def test_mini_changes_what_is_declared_alone(arch):
    paper, mini = asdict(recipe(arch, "paper")), asdict(recipe(arch, "mini"))
    assert {name for name in paper if paper[name] != mini[name]} <= set(MINI)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("iterations=1000", "warmup_iterations=1500 must be below iterations=1000"),
        ("stride=600", "stride=600 must not be above image_size=512"),
        ("layer_decay=1.5", "layer_decay=1.5: it must be from"),
        ("min_scale=3", "min_scale=3.0 must not be above max_scale=2.0"),
        ("taps=3,3,7,11", "four numbers of blocks"),
        ("lrr=1", "did you mean lr"),
    ],
)
def test_a_knob_that_no_training_can_have_is_refused(setting, says):
    with pytest.raises(UserError, match=says):
        override(recipe("vit_base_patch16", "paper"), [setting])


def test_learning_rate_is_that_of_mmengines_schedulers(mmseg):
    """LinearLR and PolyLR as mmsegmentation's configs chain them, stepped beside ours."""
    from mmengine.optim import LinearLR, PolyLR

    r = replace(recipe("vit_base_patch16", "paper"), iterations=60, warmup_iterations=12)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=r.lr)
    schedulers = [
        LinearLR(optimizer, start_factor=1e-6, by_epoch=False, begin=0, end=12),
        PolyLR(optimizer, power=1.0, eta_min=0.0, by_epoch=False, begin=12, end=60),
    ]
    for step in range(60):
        assert r.lr_at(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


# --- the configuration


def test_every_key_of_the_configuration_is_one_that_the_runner_takes(root, tmp_path, mmseg):
    """mmengine ignores the others without a word; it reads none of ours from elsewhere."""
    from mmengine.runner import Runner

    config = make_config(make_job(root, tmp_path))
    assert set(config) <= set(inspect.signature(Runner.__init__).parameters)


@pytest.mark.slow
def test_a_key_that_a_part_does_not_take_is_an_error(root, tmp_path, mmseg):
    """Below the top level mmengine is strict: so nothing in our configuration is ignored there either."""
    job = make_job(root, tmp_path)

    def use(config: dict) -> None:
        runner = make_runner(config, job)
        runner.train()
        runner.test()

    for part in ("model", "train_dataloader", "test_cfg", "test_evaluator"):
        config = with_progress(make_config(job), job)
        config["train_cfg"] = {"type": "OurLoop", "run": lambda *_: None}
        config[part].get("dataset", config[part])["fp16"] = True
        with pytest.raises(TypeError, match="fp16"):
            use(config)


def test_taps_beyond_the_last_block_are_refused(root, tmp_path):
    with pytest.raises(UserError, match="taps=1,2,3,6: the last block of vit_mini_patch8 is 5"):
        make_config(make_job(root, tmp_path, taps=(1, 2, 3, 6)))


@pytest.fixture
def runner(root, tmp_path, mmseg):
    job = make_job(root, tmp_path, layer_decay=0.5, drop_path=0.3, weight_decay=0.07)
    return make_runner(make_config(job) | {"train_cfg": {"type": "OurLoop", "run": lambda *_: None}}, job)


def test_layer_decay_takes_effect_on_every_block(runner):
    """depth + 2 distinct scales, through the runner's own way to build an optimizer."""
    runner.train()
    groups = runner.optim_wrapper.optimizer.param_groups
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    parameters = dict(runner.model.named_parameters())
    assert scale.keys() == parameters.keys()
    assert sum(len(group["params"]) for group in groups) == len(parameters)
    assert all(p is parameters[n] for g in groups for p, n in zip(g["params"], g["names"]))
    assert len(set(scale.values())) == 6 + 2
    for name, value in scale.items():
        part = name.split(".")
        if part[0] != "backbone" or part[1] in ("upsample_4x", "upsample_2x"):
            assert value == 1
        elif part[1] == "blocks":
            assert value == 0.5 ** (6 - int(part[2]))
        else:
            assert part[1] in ("patch_embed", "pos_embed")
            assert value == 0.5**7


def test_weight_decay_spares_vectors_positions_and_bias_tables(runner):
    runner.train()
    decay = {n: g["weight_decay"] for g in runner.optim_wrapper.optimizer.param_groups for n in g["names"]}
    for name, parameter in runner.model.named_parameters():
        spared = parameter.ndim <= 1 or name == "backbone.pos_embed" or name.endswith("].bias")
        table = name.startswith("backbone.blocks.") and name.count(".") == 3 and name.endswith(".bias")
        assert decay[name] == (0.0 if spared or table else 0.07), name
    assert {0.0, 0.07} == set(decay.values())


def test_drop_path_rises_linearly_from_nothing(runner):
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in runner.model.backbone.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.3, 6).tolist())


def test_the_heads_are_those_of_the_recipe(runner):
    decode, auxiliary = runner.model.decode_head, runner.model.auxiliary_head
    assert type(decode).__name__ == "UPerHead"
    assert [type(p[0]).__name__ for p in decode.psp_modules] == ["AdaptiveAvgPool2d"] * 4
    assert [p[0].output_size for p in decode.psp_modules] == [1, 2, 3, 6]
    assert (decode.num_classes, decode.dropout.p, decode.loss_decode.loss_weight) == (150, 0.1, 1.0)
    assert (auxiliary.in_index, len(auxiliary.convs), auxiliary.loss_decode.loss_weight) == (2, 1, 0.4)
    assert type(runner.model.backbone.upsample_4x[1]) is nn.BatchNorm2d


def test_several_gpus_share_their_batch_norm_statistics(root, tmp_path):
    job = make_job(root, tmp_path, Machine(device="cuda:0", processes=8))
    config = make_config(job)["model"]
    assert config["backbone"]["norm"] == "SyncBN"
    assert config["decode_head"]["norm_cfg"]["type"] == "SyncBN"
    norm = segmentation_mm.make_pyramid("SyncBN", arch=ARCH, image_size=48).upsample_4x[1]
    assert type(norm) is nn.SyncBatchNorm


# --- images


def test_crops_are_normalised_padded_and_labelled(root, tmp_path, mmseg):
    """An image smaller than the crop: on the right and below nothing but 0 and 255; classes are ids minus 1."""
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS, MODELS

    init_default_scope("mmseg")
    job = make_job(root, tmp_path, image_size=128, flip=0.0, photometric=False, min_scale=1.0, max_scale=1.0,
                   test_short_side=56, test_long_side=224)  # fmt: skip
    config = make_config(job)
    crops = Crops(
        DATASETS.build(config["train_dataloader"]["dataset"]),
        MODELS.build(config["model"]["data_preprocessor"]),
        seed=0,
    )
    image, target, bad = crops[Sample(0, 0)]
    label = target["label"]
    assert (image.shape, image.dtype, label.shape, bad) == ((3, 128, 128), torch.float32, (128, 128), "")
    first = sorted((root / FOLDER / "images/training").iterdir())[0]
    width, height = Image.open(first).size  # 96 x 96, resized to 56 x 56
    assert (width, height) == (96, 96)
    assert (image[:, 56:] == 0).all()
    assert (image[:, :, 56:] == 0).all()
    assert (label[56:] == 255).all()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    small = np.asarray(Image.open(first).resize((56, 56), Image.Resampling.BILINEAR)) / 255
    inside = image[:, :56, :56].permute(1, 2, 0) * std + mean
    assert np.abs(inside.numpy() - small).mean() < 0.02  # of one colour order, one scale
    truth = np.asarray(Image.open(root / FOLDER / "annotations/training" / f"{first.stem}.png"))
    seen = {int(c) for c in label[:56, :56].unique()}
    assert seen <= {int(c) - 1 if c else 255 for c in np.unique(truth)}
    assert len(seen) > 2


def test_a_crop_depends_on_seed_and_position_alone(root, tmp_path, mmseg):
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS, MODELS

    init_default_scope("mmseg")
    config = make_config(make_job(root, tmp_path))
    dataset = DATASETS.build(config["train_dataloader"]["dataset"])
    preprocessor = MODELS.build(config["model"]["data_preprocessor"])

    def crop(seed: int, position: int, noise: int) -> torch.Tensor:
        seed_all(noise)
        return Crops(dataset, preprocessor, seed)[Sample(3, position)][0]

    assert torch.equal(crop(0, 7, noise=1), crop(0, 7, noise=2))
    assert not torch.equal(crop(0, 7, noise=1), crop(0, 8, noise=1))
    assert not torch.equal(crop(0, 7, noise=1), crop(1, 7, noise=1))


def test_a_wrong_label_is_also_found_when_its_turn_comes(root, tmp_path, mmseg):
    """Only some pairs are opened before the training."""
    step = segmentation_mm.CheckPair()
    image = next((root / FOLDER / "images/training").iterdir())
    label = tmp_path / "label.png"
    Image.new("L", Image.open(image).size, 200).save(label)
    with pytest.raises(UserError, match="has the label 200"):
        step({"img_path": str(image), "seg_map_path": str(label)})
    config = make_config(make_job(root, tmp_path))
    pipelines = (config["train_dataloader"]["dataset"]["pipeline"], config["test_dataloader"]["dataset"]["pipeline"])
    assert [pipeline[0]["type"] for pipeline in pipelines] == ["CheckPair", "CheckPair"]


def test_several_scales_are_twelve_views(root, tmp_path, mmseg):
    """Six sizes, each as it is and flipped; the label at its own size in all of them."""
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    init_default_scope("mmseg")
    job = make_job(root, tmp_path)
    loader = make_loader(root / FOLDER, multi_scale_pipeline(job.recipe), job.machine)
    views = DATASETS.build(loader["dataset"])[0]  # 96 x 96 px, to be shown at 56
    assert [tuple(view.shape) for view in views["inputs"]] == [
        (3, side, side) for side in (28, 42, 56, 70, 84, 98) for _ in range(2)
    ]
    assert [bool(sample.flip) for sample in views["data_samples"]] == [False, True] * 6
    for plain, flipped in zip(views["inputs"][::2], views["inputs"][1::2]):
        assert torch.equal(plain, flipped.flip(2))
    assert {tuple(sample.gt_sem_seg.shape) for sample in views["data_samples"]} == {(96, 96)}


def test_a_mistake_found_while_decoding_is_told_without_its_traceback(root, tmp_path, monkeypatch):
    text = "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\n"

    def fails(job):
        raise UserError(text + "mae_core.errors.UserError: label.png has the label 200: replace it\n")

    monkeypatch.setattr(segmentation, "run", fails)
    with pytest.raises(UserError, match=r"^label.png has the label 200: replace it$"):
        segmentation.segment(make_job(root, tmp_path))


# --- counting

# Two images of 2 x 3 pixels and their classes 0..3; 255 is unlabelled. Class 3 occurs nowhere.
TRUTH = [[[0, 0, 1], [1, 255, 2]], [[0, 2, 2], [2, 2, 255]]]
PREDICTED = [[[0, 1, 1], [1, 3, 0]], [[0, 2, 2], [1, 2, 2]]]
# Confusion over both (rows: truth): 0: two right, one taken for 1; 1: two right; 2: three right, one as 0, one as 1.
IOU = [100 * 2 / 4, 100 * 2 / 4, 100 * 3 / 5]
ACCURACY = [100 * 2 / 3, 100 * 2 / 2, 100 * 3 / 5]


def counted(mmseg) -> tuple[np.ndarray, dict]:
    """Our counts per image through mmseg's own metric, and the numbers that mmseg itself computes from them."""
    from mmseg.registry import METRICS

    metric = METRICS.build({"type": "ImageAreas", "kept": ["b.jpg"]})
    metric.dataset_meta = {"classes": ("a", "b", "c", "d")}
    for name, truth, predicted in zip(("a.jpg", "b.jpg"), TRUTH, PREDICTED):
        sample = {
            "img_path": f"/somewhere/{name}",
            "pred_sem_seg": {"data": torch.tensor(predicted)[None]},
            "gt_sem_seg": {"data": torch.tensor(truth)[None]},
        }
        metric.process({}, [sample])
    theirs = metric.compute_metrics(list(metric.results))
    metric.evaluate(2)
    assert metric.kept["b.jpg"].tolist() == PREDICTED[1]
    return metric.areas, theirs


def test_scores_are_those_of_a_confusion_matrix_by_hand(mmseg):
    areas, theirs = counted(mmseg)
    assert areas.shape == (2, 3, 4)
    iou, accuracy = class_scores(areas.sum(axis=0))
    assert iou[:3].tolist() == pytest.approx(IOU)
    assert accuracy[:3].tolist() == pytest.approx(ACCURACY)
    # Predicted on an unlabelled pixel alone: it has no pixels at all, and no say in the mean.
    assert np.isnan(iou[3])
    ours = {name: float(value) for name, value in metrics_of(areas.sum(axis=0)).items()}
    assert ours == pytest.approx({"miou": np.mean(IOU), "macc": np.mean(ACCURACY), "aacc": 100 * 7 / 10})
    assert (theirs["mIoU"], theirs["mAcc"], theirs["aAcc"]) == pytest.approx(
        (ours["miou"], ours["macc"], ours["aacc"]), abs=0.0051
    )


def test_a_class_that_is_predicted_but_never_labelled_counts_with_nothing():
    areas = np.zeros((3, 3))  # intersection, union, label of three classes
    areas[:, 0] = 8, 10, 9
    areas[1, 1] = 1  # predicted once, labelled never
    assert float(metrics_of(areas)["miou"]) == pytest.approx((80 + 0) / 2)
    assert float(metrics_of(areas)["macc"]) == pytest.approx(100 * 8 / 9)


def test_bootstrap_is_the_sampling_error_of_the_images():
    """Of equal images: none. Of the pixel accuracy of images of one size: the standard error of their mean."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, 101, 400)
    areas = np.zeros((400, 3, 2))
    areas[:, 0, 0], areas[:, 1, 0], areas[:, 2, 0] = right, 100, 100
    found = bootstrap(areas)
    assert found["aacc"] == pytest.approx(right.std(ddof=1) / np.sqrt(400), rel=0.15)
    assert found == bootstrap(areas)
    assert bootstrap(np.repeat(areas[:1], 50, axis=0))["aacc"] == pytest.approx(0, abs=1e-9)


# --- the stand-in for mmcv's operators


@pytest.mark.slow
def test_nothing_leaks_into_a_process_that_does_not_segment():
    program = (
        "import sys, transfer.segmentation, benchmarks.suite; "
        "print([m for m in sys.modules if m.split('.')[0] in ('mmcv', 'mmseg', 'mmengine')])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_stand_in_has_what_mmseg_imports_and_says_what_is_missing(mmseg):
    import mmcv.ops

    if not getattr(mmcv.ops, "stand_in", False):
        pytest.skip("full mmcv is installed")
    imported = set()
    for path in Path(mmseg.__file__).parent.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip().startswith("from mmcv.ops import"):
                imported |= {name.split(" as ")[0].strip() for name in line.split("import")[1].split(",")}
    assert imported == set(segmentation_mm.FUNCTIONS) | set(segmentation_mm.CLASSES)
    for name in imported:
        with pytest.raises(NotImplementedError, match=rf"mmcv\.ops\.{name} is a compiled operator: install full mmcv"):
            getattr(mmcv.ops, name)(1)
    assert not isinstance(nn.Conv2d(1, 1, 1), mmcv.ops.DeformConv2d)


def test_full_mmcv_is_left_alone(mmseg, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "mmcv._ext" else find(name))
    real = object()
    monkeypatch.setitem(sys.modules, "mmcv.ops", real)
    assert segmentation_mm.provide_operators() is False
    assert sys.modules["mmcv.ops"] is real


def test_the_plan_says_what_to_install(root, tmp_path, monkeypatch):
    from transfer import cli

    monkeypatch.setattr(cli, "installed", lambda module: module != "mmseg")
    state, why = cli.obstacle(make_job(root, tmp_path))
    assert state == "skipped"
    assert why == f"mmsegmentation is not installed here; {TASK.install}"
    assert "make install" in why


def test_images_are_read_as_their_labels_are_stored(tmp_path):
    """Of any mode, and not turned by an orientation in the EXIF."""
    from mmcv.transforms import LoadImageFromFile

    read = LoadImageFromFile(**{key: value for key, value in LOAD_IMAGE.items() if key != "type"})
    label = tmp_path / "label.png"
    Image.fromarray(np.full((4, 8), 7, np.uint8)).save(label)
    for name, (content, colour) in odd_files().items():
        (tmp_path / name).write_bytes(content)
        assert check_pair(tmp_path / name, label)
        pixels = read({"img_path": str(tmp_path / name)})["img"]
        assert pixels.shape == (4, 8, 3), name
        np.testing.assert_allclose(pixels.reshape(-1, 3).mean(axis=0)[::-1], colour, atol=2, err_msg=name)
