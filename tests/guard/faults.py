"""Faults that turn the guard red, each planted by a patch: name -> the runs that must notice, and the patch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from transfer.classification import job, train
from transfer.detection import shared
from transfer.detection.jitter import View
from transfer.pyramid import ViTPyramid
from transfer.segmentation import mmseg_plugin
from transfer.segmentation import train as segmentation

Patch = Callable[[pytest.MonkeyPatch], None]
HALF_A_PATCH = 4  # px


def no_layer_decay(patch: pytest.MonkeyPatch) -> None:
    groups, layers = train.layer_decay_groups, mmseg_plugin.layer_groups
    patch.setattr(train, "layer_decay_groups", lambda model, decay, rate: groups(model, decay, 1.0))
    patch.setattr(segmentation, "layer_groups", lambda model, depth, rate, decay: layers(model, depth, 1.0, decay))


def dropped_weights(patch: pytest.MonkeyPatch) -> None:
    def dropping(load: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def drop(model: Any, checkpoint: Any) -> Any:
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            report = load(model, checkpoint)
            model.load_state_dict(before)
            return report

        return drop

    for module, name in ((shared, "load_pyramid"), (segmentation, "load_pyramid"), (job, "load_encoder")):
        patch.setattr(module, name, dropping(getattr(module, name)))


def shifted_boxes(patch: pytest.MonkeyPatch) -> None:
    seen = View.object

    def shifted(self: View, outline: Any) -> Any:
        found = seen(self, outline)
        return found and (found[0] + HALF_A_PATCH, found[1])

    patch.setattr(View, "object", shifted)


def labels_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """In training only."""
    crops, fit = segmentation.Crops.__getitem__, job.train_classifier

    def crop(self: Any, sample: Any) -> Any:
        image, target, note = crops(self, sample)
        label = target["label"]
        return image, {"label": torch.where(label < 149, label + 1, label)}, note

    def train_classifier(job: Any, model: Any, split: Any, transform: Any) -> Any:
        return fit(job, model, replace(split, labels=tuple(label + 1 for label in split.labels)), transform)

    patch.setattr(segmentation.Crops, "__getitem__", crop)
    patch.setattr(job, "train_classifier", train_classifier)


def bias_in_bf16(patch: pytest.MonkeyPatch) -> None:
    exact = ViTPyramid.attention_bias
    patch.setattr(ViTPyramid, "attention_bias", lambda *given: exact(*given).bfloat16().float())


FAULTS: dict[str, tuple[tuple[str, ...], Patch]] = {
    "wrong-layer-decay": (("finetune", "ade20k"), no_layer_decay),
    "dropped-weights": (("finetune", "ade20k", "coco"), dropped_weights),
    "shifted-boxes": (("coco",), shifted_boxes),
    "labels-off-by-one": (("finetune", "ade20k"), labels_off_by_one),
    "bias-in-bf16": (("maps",), bias_in_bf16),
}
