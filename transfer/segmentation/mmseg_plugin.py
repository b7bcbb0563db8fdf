"""This project's parts for mmsegmentation's registries, and a stand-in for the operators that mmseg imports.

mmseg imports a few of mmcv's compiled operators, of which UperNet uses none. Full mmcv does not build against current
torch: where it is absent, the stand-in takes the operators' place. Nothing here imports mmseg before `register`.
"""

import importlib.machinery
import importlib.util
import re
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mae_core import distributed
from mae_core.vit import Variant
from mae_core.workers import begin_worker, bytes_of, fitting_workers
from transfer.data.ade20k import check_pair
from transfer.data.findings import spread
from transfer.pyramid import ViTPyramid, layer_of, pyramid_class

# The names that mmseg 1.2.2 imports from mmcv.ops. The classes appear in isinstance checks and as bases.
FUNCTIONS = ("point_sample", "sigmoid_focal_loss")
CLASSES = ("CrissCrossAttention", "PSAMask", "DeformConv2d", "ModulatedDeformConv2d")
SIZED = 8  # images, of different sizes, of which the largest tells how much a worker holds


def provide_operators() -> bool:
    """Put a stand-in for mmcv.ops into this process if compiled mmcv is absent. Returns whether it stands there now."""
    import mmcv

    if importlib.util.find_spec("mmcv._ext") is not None:
        return False
    if getattr(sys.modules.get("mmcv.ops"), "stand_in", False):
        return True
    module = types.ModuleType("mmcv.ops", "Stand-in for mmcv's compiled operators.")
    module.__spec__ = importlib.machinery.ModuleSpec("mmcv.ops", loader=None)
    functions = {name: absent_operator(name) for name in FUNCTIONS}
    classes = {n: type(n, (), {"__init__": absent_operator(n), "__module__": "mmcv.ops"}) for n in CLASSES}
    vars(module).update(stand_in=True, **functions, **classes)
    sys.modules["mmcv.ops"] = mmcv.ops = module
    return True


def absent_operator(name: str) -> Callable[..., None]:
    """A placeholder for an operator. mmseg imports all of them and UperNet calls none; a model that does call one must
    stop here rather than compute something else."""

    def call(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError(f"mmcv.ops.{name} is a compiled operator: install full mmcv in place of mmcv-lite")

    return call


def layer_groups(model: nn.Module, depth: int, layer_decay: float, weight_decay: float) -> list[dict]:
    """Parameter groups of a segmentor whose `backbone` is a ViTPyramid, for layer-wise decay of the learning rate.
    As mmseg's own constructor has them for its MAE, whose blocks it knows by another name: it leaves timm's at scale 1.

    A group's lr_scale is layer_decay ** (depth + 1 - layer), with the layer of `pyramid.layer_of`; the heads are layer
    depth + 1. No weight decay on vectors and, as in timm, learned rotary frequencies. Positions, class token and bias
    tables have it, as in implus/mae_segmentation and mmsegmentation: both would spare the first two but look for their
    names without the prefix `backbone.`.
    """
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        own = re.sub(r"^backbone\.", "", name)
        layer = layer_of(own, depth) if own != name else depth + 1
        decayed = parameter.ndim > 1 and not name.endswith("rope.freqs")
        scaled = {"lr_scale": layer_decay ** (depth + 1 - layer), "weight_decay": weight_decay if decayed else 0.0}
        group = groups.setdefault((layer, decayed), {"params": [], "names": [], **scaled})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


class CheckPair:
    """First step of the pipelines: refuses a bad pair of image and labels (`ade20k.check_pair`) as it is read."""

    def __call__(self, results: dict) -> dict:
        check_pair(Path(results["img_path"]), Path(results["seg_map_path"]))
        return results


def make_pyramid(arch: str, variant: dict[str, Any], **options: Any) -> ViTPyramid:
    """The backbone. variant: a Variant's fields, since mmengine's configuration holds plain values only."""
    return pyramid_class(arch)(arch, norm=nn.BatchNorm2d, variant=Variant(**variant), **options)


def loss_only(head: Any, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Tensor]:
    """The loss of one of mmseg's heads with one loss, in place of its own `loss_by_feat`: without the accuracy that it
    computes beside it, which nobody reads and for which the host would wait for the GPU twice. Logits are upsampled in
    float32 at least, as by mmsegmentation 0.x, which the public numbers are from."""
    seg_logits = seg_logits.to(torch.promote_types(seg_logits.dtype, torch.float32))
    labels = head._stack_batch_gt(batch_data_samples)
    size, labels = labels.shape[2:], labels.squeeze(1)
    if seg_logits.device.type == "cpu":
        # There the classes come last: torch's softmax over any other dimension takes four times as long.
        seg_logits = seg_logits.contiguous(memory_format=torch.channels_last)
    logits = functional.interpolate(seg_logits, size, mode="bilinear", align_corners=head.align_corners)
    if seg_logits.device.type == "cpu":
        logits, labels = logits.permute(0, 2, 3, 1).flatten(0, 2), labels.flatten()
    return {"loss_ce": head.loss_decode(logits, labels, ignore_index=head.ignore_index)}


def with_workers_that_fit(loader: dict[str, Any], datasets: Any) -> dict[str, Any]:
    """The configuration of mmengine's loader of single images, with as many workers as there is room for, which end
    when they cannot hand over an image. datasets: mmseg's registry."""
    workers = loader["num_workers"]
    if workers:
        dataset = datasets.build(loader["dataset"])
        images = [dataset[i] for i in spread(len(dataset), at_most=SIZED)]
        workers = fitting_workers(workers, max(images, key=bytes_of), held=1)
    return {**loader, "num_workers": workers, "worker_init_fn": {"type": begin_worker}}


@cache
def register() -> None:
    """Import mmsegmentation and register the parts that `mmseg_config` names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about mmcv-lite's missing operators, and deprecations
        provide_operators()
        import mmseg.datasets
        import mmseg.models
        from mmengine.runner import TestLoop
        from mmseg.evaluation import IoUMetric
        from mmseg.models.decode_heads import FCNHead, UPerHead
        from mmseg.registry import DATASETS, LOOPS, METRICS, MODELS, TRANSFORMS

    class FlatADE20K(mmseg.datasets.ADE20KDataset):
        """mmseg's, with only the images that `ade20k.pairs` lists: mmseg also takes those of folders in their folder,
        such as the thumbnails in @eaDir."""

        def load_data_list(self) -> list[dict]:
            folder = Path(self.data_prefix["img_path"])
            return [entry for entry in super().load_data_list() if Path(entry["img_path"]).parent == folder]

    class WatchedTestLoop(TestLoop):
        """mmengine's, in float32; calls `each` with the number of images done."""

        def __init__(self, runner: Any, dataloader: dict, evaluator: Any, each: Callable) -> None:
            super().__init__(runner, with_workers_that_fit(dataloader, DATASETS), evaluator)
            self.each = each

        @torch.inference_mode()
        def run_iter(self, idx: int, data_batch: dict) -> None:
            outputs = self.runner.model.test_step(data_batch)
            self.evaluator.process(data_samples=outputs, data_batch=data_batch)
            self.each(idx + 1)

    class ImageAreas(IoUMetric):
        """mmseg's metric with its counts per image, `areas` [N, 3, C]: intersection, union, label; and in `kept` the
        predictions of the images named there, uint8 [H, W] by file name."""

        def __init__(self, kept: Sequence[str] = ()) -> None:
            super().__init__()
            self.kept = dict.fromkeys(kept)
            self.areas = np.empty(0)

        def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
            super().process(data_batch, data_samples)
            for sample in data_samples:
                name = Path(sample["img_path"]).name
                if name in self.kept:
                    classes = sample["pred_sem_seg"]["data"].squeeze()
                    self.kept[name] = classes.byte().cpu().numpy()

        def evaluate(self, size: int) -> dict[str, float]:
            """Gathers by itself, because mmengine leaves a folder behind in the current one. The sampler deals images
            out in turn and repeats the first ones so that every process has as many."""
            mine = [np.stack([r[0], r[1], r[3]]).astype(np.int64) for r in self.results]
            everyone = distributed.gather_to_all((mine, self.kept))
            dealt = zip_longest(*(areas for areas, _ in everyone))
            self.areas = np.stack([one for group in dealt for one in group if one is not None][:size])
            self.kept = {
                name: next((kept[name] for _, kept in everyone if kept[name] is not None), None) for name in self.kept
            }
            self.results.clear()
            return {}

    DATASETS.register_module(module=FlatADE20K)
    MODELS.register_module(name="MAEPyramid", module=make_pyramid)
    for head in (UPerHead, FCNHead):
        MODELS.register_module(module=type(f"LossOnly{head.__name__}", (head,), {"loss_by_feat": loss_only}))
    TRANSFORMS.register_module(name="CheckPair", module=CheckPair)
    LOOPS.register_module(name="WatchedTestLoop", module=WatchedTestLoop)
    METRICS.register_module(name="ImageAreas", module=ImageAreas)
