"""A recipe as mmengine's configuration in plain values: the model, the data and the test."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mae_core.checkpoint import Checkpoint
from mae_core.errors import UserError
from mae_core.flops import forward_flops
from mae_core.machine import Machine
from mae_core.remembered import remembered
from mae_core.settings import as_typed
from mae_core.vit import Variant, get_arch
from transfer.data.ade20k import CLASSES, SPLITS
from transfer.pyramid import patch_side, pyramid_class
from transfer.segmentation.recipe import SegmentationRecipe

# Without the EXIF orientation: labels are stored unturned.
LOAD_IMAGE = {"type": "LoadImageFromFile", "color_type": "color_ignore_orientation"}
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the multi-scale test
UNBOUNDED = 10**6  # px, longer than any image


def config_of(
    checkpoint: Checkpoint,
    r: SegmentationRecipe,
    folder: Path,
    work: Path,
    machine: Machine,
    kept: Sequence[str] = (),
    limit: int = 0,
) -> dict[str, Any]:
    """The arguments of mmengine's Runner, which silently ignores unknown ones.

    folder: ADEChallengeData2016. kept: names of the validation images whose predictions the metric keeps. limit: how
    many of them are tested; 0: all.
    """
    return {
        "model": model_of(checkpoint, r, machine),
        "work_dir": str(work / "mmengine"),
        "test_dataloader": test_loader(folder, test_pipeline(r), machine, limit),
        "test_cfg": {"type": "WatchedTestLoop"},
        "test_evaluator": {"type": "ImageAreas", "kept": list(kept)},
        "default_hooks": dict.fromkeys(
            ("runtime_info", "timer", "sampler_seed", "logger", "param_scheduler", "checkpoint")
        ),
        "visualizer": {"type": "Visualizer"},
        "env_cfg": {"mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0}},
        "log_level": "ERROR",
        "default_scope": "mmseg",
    }


def norm_of(machine: Machine) -> str:
    """The norm of a run, which `make_runner` puts in. torch's SyncBatchNorm runs only on GPUs and needs several
    processes; elsewhere BatchNorm."""
    return "SyncBN" if machine.device.startswith("cuda") and machine.processes > 1 else "BN"


def model_of(checkpoint: Checkpoint, r: SegmentationRecipe, machine: Machine) -> dict[str, Any]:
    if r.taps[-1] >= get_arch(checkpoint.arch).depth:
        last = get_arch(checkpoint.arch).depth - 1
        raise UserError(f"taps={as_typed(r.taps)}: the last block of {checkpoint.arch} is {last}")
    dim, norm = get_arch(checkpoint.arch).dim, {"type": "BN", "requires_grad": True}

    def loss(weight: float) -> dict[str, Any]:
        return {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": weight}

    shared = {"dropout_ratio": r.head_dropout, "num_classes": CLASSES, "norm_cfg": norm, "align_corners": False}
    return {
        "type": "EncoderDecoder",
        "data_preprocessor": {
            "type": "SegDataPreProcessor",
            "mean": [255 * m for m in checkpoint.mean],
            "std": [255 * s for s in checkpoint.std],
            "bgr_to_rgb": True,
            "pad_val": 0,
            "seg_pad_val": 255,
            "size": (r.image_size, r.image_size),
        },
        "backbone": {
            "type": "MAEPyramid",
            "arch": checkpoint.arch,
            "image_size": r.image_size,
            "taps": tuple(int(tap) for tap in r.taps),
            "variant": asdict(checkpoint.variant),
            "upernet": True,
            "drop_path": r.drop_path,
            "activation_checkpointing": machine.activation_checkpointing,
        },
        "decode_head": {
            "type": "LossOnlyUPerHead",
            "in_channels": [dim] * 4,
            "in_index": [0, 1, 2, 3],
            "pool_scales": tuple(int(scale) for scale in r.pool_scales),
            "channels": r.head_channels,
            "loss_decode": loss(1.0),
            **shared,
        },
        "auxiliary_head": {
            "type": "LossOnlyFCNHead",
            "in_channels": dim,
            "in_index": 2,
            "channels": r.auxiliary_channels,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": loss(r.auxiliary_weight),
            **shared,
        },
        "train_cfg": {},
        "test_cfg": {"mode": "slide", "crop_size": (r.image_size,) * 2, "stride": (r.stride,) * 2},
    }


@remembered
def weights_of(arch: str, variant: Variant, r: SegmentationRecipe) -> int:
    """How many numbers `model_of`'s model holds, counted without mmsegmentation, which takes seconds to import."""
    dim, wide, narrow = get_arch(arch).dim, r.head_channels, r.auxiliary_channels
    with torch.device("meta"):
        pyramid = pyramid_class(arch)(arch, r.image_size, norm=nn.BatchNorm2d, variant=variant, upernet=True)
    pooled = 4 * dim * wide + 9 * (dim + 4 * wide) * wide
    merged = 3 * dim * wide + 3 * 9 * wide * wide + 9 * 4 * wide * wide
    classifiers = (wide + 1 + narrow + 1) * CLASSES
    norms = 12 * (4 * wide + 1) + 4 * narrow + 1
    heads = pooled + merged + 9 * dim * narrow + classifiers + norms
    return heads + sum(tensor.numel() for tensor in pyramid.state_dict().values())


@remembered
def crop_flops(arch: str, variant: Variant, r: SegmentationRecipe) -> int:
    """FLOPs of one crop's forward pass, counted without mmsegmentation: the pyramid's by torch's counter, and two for
    each weight of a head's convolutions at each position."""
    dim, patch = get_arch(arch).dim, patch_side(arch)
    wide, narrow = r.head_channels, r.auxiliary_channels
    pyramid = forward_flops(
        lambda: pyramid_class(arch)(arch, r.image_size, variant=variant, taps=r.taps, upernet=True),
        lambda model: model(torch.empty(1, 3, r.image_size, r.image_size)),
    )
    first, second, third, last = ((-(-4 * r.image_size // (patch * n))) ** 2 for n in (1, 2, 4, 8))
    pooled = last * 9 * (dim + 4 * wide) * wide + sum(scale**2 for scale in r.pool_scales) * dim * wide
    levels = (first + second + third) * (dim * wide + 9 * wide * wide)
    merged = first * (9 * 4 * wide * wide + wide * CLASSES)
    auxiliary = third * (9 * dim * narrow + narrow * CLASSES)
    return pyramid + 2 * (pooled + levels + merged + auxiliary)


def windows_of(r: SegmentationRecipe) -> int:
    """How many windows cover a validation image of 4:3, in all views of it."""
    shorts = multi_scale_sides(r) * 2 if r.multi_scale else []
    sides = [(short, short * 4 // 3) for short in (r.test_short_side, *shorts)]
    return sum(math.prod(max(-(-(side - r.image_size) // r.stride), 0) + 1 for side in pair) for pair in sides)


def dataset_of(folder: Path, split: str, pipeline: list[dict], limit: int = 0) -> dict[str, Any]:
    """limit: only the first so many images; 0: all."""
    name = SPLITS[split]
    return {
        "type": "FlatADE20K",
        "data_root": str(folder),
        "data_prefix": {"img_path": f"images/{name}", "seg_map_path": f"annotations/{name}"},
        "pipeline": pipeline,
        "indices": limit or None,
    }


def train_pipeline(r: SegmentationRecipe) -> list[dict]:
    steps: list[dict[str, Any]] = [
        {"type": "CheckPair"},
        LOAD_IMAGE,
        {"type": "LoadAnnotations"},
        {
            "type": "RandomResize",
            "scale": (r.test_long_side, r.test_short_side),
            "ratio_range": (r.min_scale, r.max_scale),
            "keep_ratio": True,
        },
        {"type": "RandomCrop", "crop_size": (r.image_size,) * 2, "cat_max_ratio": r.max_class_share},
        {"type": "RandomFlip", "prob": r.flip},
    ]
    photometric = [{"type": "PhotoMetricDistortion"}] if r.photometric else []
    return [*steps, *photometric, {"type": "PackSegInputs"}]


def resized(long_side: int, short_side: int) -> dict[str, Any]:
    """The step that makes an image as large as fits, in px."""
    return {"type": "Resize", "scale": (long_side, short_side), "keep_ratio": True}


def test_pipeline(r: SegmentationRecipe) -> list[dict]:
    """The label keeps its own size, at which predictions are compared with it."""
    steps = [{"type": "CheckPair"}, LOAD_IMAGE, resized(r.test_long_side, r.test_short_side)]
    return [*steps, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}]


def multi_scale_pipeline(r: SegmentationRecipe) -> list[dict]:
    """Twelve views of an image: its short side at RATIOS of the test's, each unflipped and flipped. No short side is
    below the window's, so some sizes come several times; the long side follows. As by `min_size` of mmsegmentation 0.x
    and by implus/mae_segmentation's Resize; 1.x has left it out."""
    views = [
        [resized(UNBOUNDED, short) for short in multi_scale_sides(r)],
        [{"type": "RandomFlip", "prob": 0.0}, {"type": "RandomFlip", "prob": 1.0}],
        [{"type": "LoadAnnotations"}],
        [{"type": "PackSegInputs"}],
    ]
    return [LOAD_IMAGE, {"type": "TestTimeAug", "transforms": views}]


def multi_scale_sides(r: SegmentationRecipe) -> list[int]:
    return [max(int(r.test_short_side * ratio), r.image_size) for ratio in RATIOS]


def test_loader(folder: Path, pipeline: list[dict], machine: Machine, limit: int) -> dict[str, Any]:
    return {
        "batch_size": 1,
        "num_workers": machine.workers,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {**dataset_of(folder, "val", pipeline, limit), "test_mode": True},
    }
