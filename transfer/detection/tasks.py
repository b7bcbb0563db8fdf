"""COCO: Mask R-CNN with a ViT-FPN, fine-tuned end to end, on detectron2 or on torchvision.

python -m transfer.detection --task coco --ckpt FILE --data DIR --out DIR [--engine detectron2|torchvision]
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mae_core import distributed
from mae_core.checkpoint import sha256_of
from mae_core.flops import forward_flops
from mae_core.loop import batch_objections, batch_within
from mae_core.remembered import remembered
from mae_core.space import Space, training_space
from mae_core.timm_encoder import is_timm
from mae_core.vit import Variant
from transfer.data.coco import annotation_file, inspect_coco, read_split
from transfer.data.findings import Data
from transfer.data.predictions import MAIN, digest_of, names_of
from transfer.detection.engines import ENGINES
from transfer.detection.evaluate import evaluate
from transfer.detection.picture import PICTURE_FILE, draw_predictions
from transfer.detection.recipe import PUBLISHED, DetectionRecipe, ViTDetRecipe, recipe, sources
from transfer.detection.shared import Predictions, RoIBatchNorm, new_pyramid, tested_examples
from transfer.miniature import dense
from transfer.pyramid import facts, refusal, size_objections
from transfer.task import TRAINED, Job, Objection, Part, Result, Task


def train_and_predict(job: Job) -> Predictions:
    """Run the job's engine. Engines are imported here, so that neither needs the other to be installed."""
    if job.engine == "detectron2":
        from transfer.detection import engine_detectron2

        return engine_detectron2.train_and_predict(job)
    from transfer.detection import engine_torchvision

    return engine_torchvision.train_and_predict(job)


def run(job: Job) -> Result:
    """Train, detect on the validation images, evaluate the results file, and draw the first images."""
    root = Path(job.data.root)
    predictions = train_and_predict(job)
    evaluation = None
    if distributed.is_main():
        examples = tested_examples(job)
        only = examples.ids[examples.rows].tolist() if job.data.limit else None
        evaluation = evaluate(annotation_file(root, "val"), predictions.results, job.seed, only)
        draw_predictions(examples, predictions.results, job.work / PICTURE_FILE)
    evaluation = distributed.gather_to_all(evaluation)[0]
    iterations, seconds, notes = predictions.iterations, predictions.seconds, predictions.notes
    if job.recipe_name == "paper" and job.checkpoint.arch not in PUBLISHED:
        notes += (f"nobody published a recipe for {job.checkpoint.arch}: this one is derived from ViT-B's and ViT-L's",)
    resolved: dict[str, Any] = {
        "iterations": iterations,
        "seconds_per_iteration": round(seconds / max(iterations, 1), 4),
    }
    resolved |= facts(job.checkpoint.arch, job.checkpoint.variant)
    return Result(
        evaluation.metrics,
        evaluation.stderr,
        n_eval=job.data.counts["val"],
        images_seen=iterations * job.recipe.batch,
        seconds=seconds,
        tables={"per_class": evaluation.per_class},
        resolved={**resolved, **predictions.resolved},
        artifacts=predictions.artifacts,
        predictions=kept_results(job, predictions.results),
        notes=(*notes, *read_split(root, "train").notes),
    )


def few(r: DetectionRecipe, data: Data) -> DetectionRecipe:
    """The recipe with a batch that so few images fill."""
    return replace(r, batch=batch_within(r.batch, data.counts["train"]))


def kept_results(job: Job, results: Path) -> dict[str, str]:
    """What the record says of the COCO-results file."""
    if not distributed.is_main():
        return {}
    digest = digest_of({MAIN: {"image": names_of(tested_examples(job).files)}})
    return {"file": results.name, "sha256": sha256_of(results), "images": digest}


def objections(job: Job) -> Iterator[Objection]:
    if isinstance(job.recipe, ViTDetRecipe) and job.checkpoint.variant.beit:
        yield "recipe", "ViTDet adds relative positions, where BEiT has its own: leave recipe=vitdet out"
    if isinstance(job.recipe, ViTDetRecipe) and is_timm(job.checkpoint.arch):
        why = "ViTDet's relative positions depend on the query, for which timm's own attention has no place"
        yield "recipe", f"{why}: leave recipe=vitdet out"
    yield from size_objections(job.checkpoint.arch, job.recipe.image_size, job.task.name)
    if job.data.status == "found":
        yield from batch_objections(job.data.counts["train"], job.recipe.batch, job.machine.processes)


def detector(arch: str, variant: Variant, r: DetectionRecipe) -> Any:
    """torchvision's, from which detectron2's differs only in its norms."""
    from transfer.detection.engine_torchvision import MaskRCNN

    return MaskRCNN(new_pyramid(arch, variant, r), r, RoIBatchNorm)


@remembered
def numbers_of(arch: str, variant: Variant, r: DetectionRecipe) -> int:
    """How many numbers the detector holds."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in detector(arch, variant, r).state_dict().values())


def space(job: Job) -> Space:
    numbers = numbers_of(job.checkpoint.arch, job.checkpoint.variant, job.recipe)
    return training_space(job.work, numbers, numbers)


def parts(job: Job) -> tuple[Part, ...]:
    """Training, and the detection of all validation images."""
    r, counts = job.recipe, job.data.counts
    how = f"{r.image_size} px, {job.recipe_name}"
    training = Part(f"training, {how}", counts["train"] // r.batch * r.batch * r.epochs, TRAINED)
    return training, Part(f"detection, {how}", counts["val"])


@remembered
def image_flops(arch: str, variant: Variant, r: DetectionRecipe) -> int:
    """FLOPs of one image in a forward pass of the training: pyramid, RPN, and the heads on the sampled proposals, of
    which a quarter holds objects and gets masks."""

    def forward(model: Any) -> None:
        heads, image = model.roi_heads, torch.empty(1, 3, r.image_size, r.image_size)
        model.rpn.head(list(model.features(image, []).values()))
        heads.box_predictor(heads.box_head(torch.empty(r.roi_batch, r.fpn_dim, 7, 7)))
        heads.mask_predictor(heads.mask_head(torch.empty(r.roi_batch // 4, r.fpn_dim, 14, 14)))

    return forward_flops(partial(detector, arch, variant, r), forward)


TASKS = (
    Task(
        name="coco",
        refuses=refusal,
        title="COCO 2017, Mask R-CNN with a ViT-FPN",
        module="transfer.detection",
        metric="box_ap",
        version=5,
        cost=40,
        recipe=recipe,
        sources=sources,
        inspect=inspect_coco,
        run=run,
        miniature=dense.coco,
        engines=ENGINES,
        install="docs/coco.md says how to install it; or take --engine torchvision",
        packages=("detectron2", "pycocotools"),
        objections=objections,
        space=space,
        parts=parts,
        few=few,
        flops=lambda job: image_flops(job.checkpoint.arch, job.checkpoint.variant, job.recipe),
    ),
)
