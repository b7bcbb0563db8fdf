"""What a record says that could make its number differ from a published one, a sentence each."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.checkpoints import is_random, pretraining_of
from benchmarks.tables import Column, Published
from mae_core.data import MEAN, PILLOW_PIXELS, STD
from mae_core.settings import as_typed
from transfer.data.findings import preview
from transfer.data.imagenet import IMAGENET_COUNTS
from transfer.task import Record

# Of the checkpoint formats that only another method's files have, by how their names begin.
METHODS = {
    "beit": "BEiT", "hf-beit": "BEiT", "dinov2": "DINOv2", "hf-dinov2": "DINOv2", "dino": "DINO",
    "moco-v3": "MoCo v3", "deit": "DeiT", "hf-deit": "DeiT", "npz": "AugReg",
}  # fmt: skip
ENGINES = {"coco": "detectron2", "ade20k": "mmsegmentation"}  # of the published numbers
# What a pre-training writes into its file where it differs from MAE's: mask_ratio always.
KNOBS = {"mask_ratio": "0.75", "masking": "random", "encoder_mask_tokens": "false", "loss_on": "masked"}
KNOBS |= {"augmentation": "crop, random size", "repeated_augmentation": "1"}


def other_method(checkpoint: Mapping[str, Any]) -> str:
    """The method whose format the checkpoint has; "" for MAE's, and for formats that any method's files may have."""
    kind = str(checkpoint.get("format"))
    return next((method for start, method in METHODS.items() if kind == start or kind.startswith(f"{start}-")), "")


def deviations(column: Column, records: Sequence[Record], reference: Published) -> tuple[str, ...]:
    """What could explain a difference, of all the records of a cell, each sentence once."""
    if column.tolerance is not None:
        same = "the published number is that of the released weights under fp16; others have a sampling error beside it"
        found = [same, *(s for r in records for s in (*of_run(r), *r.notes))]
    else:
        parts = ((*of_pretraining(r, reference), *of_model(r, reference), *of_run(r), *r.notes) for r in records)
        found = [sentence for part in parts for sentence in part]
    return tuple(dict.fromkeys(found))


def of_pretraining(r: Record, reference: Published) -> Iterator[str]:
    if is_random(r.checkpoint):
        return
    ours, meta = pretraining_of(r.checkpoint), r.checkpoint.get("meta") or {}
    if reference.epochs and not ours.epochs:
        yield f"the checkpoint does not say how long it was pre-trained: {reference.epochs} epochs are assumed"
    elif reference.epochs and str(ours.epochs) != reference.epochs:
        yield f"pre-trained for {ours.epochs} epochs, the published number for {reference.epochs}"
    if ours.epochs != ours.planned:
        yield f"its pre-training stopped after {ours.epochs} of {ours.planned} epochs"
    if reference.target and not ours.target:
        yield f"the checkpoint does not say what it reconstructed: {reference.target} are assumed"
    elif reference.target and ours.target != reference.target:
        yield f"pre-trained on {ours.target}, the published number on {reference.target}"
    if ours.images not in (None, IMAGENET_COUNTS["train"]):
        yield f"pre-trained on {ours.images:,} images, MAE on ImageNet-1K's {IMAGENET_COUNTS['train']:,}"
    changed = {knob: str(meta[knob]).lower() for knob in KNOBS if knob in meta}
    if knobs := [f"{knob}={value}" for knob, value in changed.items() if value != KNOBS[knob]]:
        yield f"pre-trained with {preview(knobs, 6)}, unlike MAE"


def of_model(r: Record, reference: Published) -> Iterator[str]:
    own = r.checkpoint.get("input") or {}
    if own.get("plain") is False:
        yield "the encoder is not a plain ViT"
    if own.get("pool", "token") != "token":
        yield "the checkpoint's own feature is the mean of the patch tokens, not MAE's class token"
    if re.search(r"new: [^;]*\bcls_token\b", str(r.resolved.get("load"))):
        yield "the checkpoint has no class token: a new one took its place"
    if r.recipe.get("pool") == "avg" and reference.method == "MAE":
        yield "fine-tuned on the mean of the patch tokens, as in the official repository; the paper has the class token"
    if own.get("mean") and [own["mean"], own.get("std")] != [list(MEAN), list(STD)]:
        yield f"inputs are normalised with the checkpoint's own mean {as_typed(own['mean'])}, not ImageNet's"


def of_run(r: Record) -> Iterator[str]:
    precision = r.machine.get("precision")
    if precision and precision != "fp16":
        yield f"precision {precision}, where the public code has fp16"
    wanted = ENGINES.get(r.task, r.engine)
    if r.engine != wanted:
        yield f"engine {r.engine}, the published numbers are of {wanted}"
    for key, text in r.resolved.items():
        if key.endswith("pixels") and text != PILLOW_PIXELS:
            which = "training images" if key.startswith("train") else "test images"
            yield f"{which}: {text}; for the published numbers {PILLOW_PIXELS}"
    stand_ins = [knob for knob, source in r.sources.items() if "stand-in" in str(source) and knob in r.recipe]
    if stand_ins:
        values = [f"{knob}={as_typed(r.recipe[knob])}" for knob in stand_ins]
        yield f"values that stand in for unpublished ones: {preview(values, 6)}"
