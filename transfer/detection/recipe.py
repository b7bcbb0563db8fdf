"""The recipe of Mask R-CNN with a ViT-FPN on COCO, and what its engines share.

Li et al. 2021, "Benchmarking Detection Transfer Learning with Vision Transformers" (arXiv 2111.11429), which the MAE
paper's Table 4 follows. The later ViTDet recipe is another experiment.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_util
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from mae_core import distributed
from mae_core.checkpoint.weights_file import save_weights, sha256_of
from mae_core.data import seed_for
from mae_core.decode import UNREADABLE, read_image
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.optim import half_cosine
from mae_core.progress import Progress
from mae_core.settings import bounded, check_ranges, choose, write_json
from transfer.data.coco import IDS, Example, read_split
from transfer.pyramid import ViTPyramid, decays, load_pyramid, pretraining_grid
from transfer.task import Job

RESULTS_FILE = "coco_results.json"
DETECTOR_FILE = "detector.safetensors"
# Of both engines, as in detectron2: anchors of 8 strides a side in three shapes; what a detection must score; the
# overlap at which the lower of two is dropped; detections an image.
ANCHOR_STRIDES, ANCHOR_RATIOS = 8, (0.5, 1.0, 2.0)
SCORE_THRESHOLD, NMS_THRESHOLD, DETECTIONS = 0.05, 0.5, 100


@dataclass(frozen=True)
class DetectionRecipe:
    """Every number of one detector's training.

    image_size: side in px of the square that images are padded to. lr: at that batch, not scaled with it. min_scale,
    max_scale: range of the large-scale jitter. window: patches along one side, 0 for global attention
    everywhere. rpn_batch, roi_batch: anchors and proposals an image that enter the losses. proposals: what the RPN
    keeps of an image.
    """

    image_size: int = bounded(1, default=1024)
    epochs: int = bounded(1, default=100)
    warmup_epochs: float = bounded(0, default=0.25)
    batch: int = bounded(1, default=64)
    lr: float = 8e-5
    betas: tuple[float, float] = bounded(0, 1, below=True, default=(0.9, 0.999))
    weight_decay: float = bounded(0, default=0.1)
    drop_path: float = bounded(0, 1, below=True, default=0.1)
    window: int = bounded(0, default=14)
    min_scale: float = bounded(0, 1, default=0.1)
    max_scale: float = 2.0
    fpn_dim: int = bounded(1, default=256)
    head_dim: int = bounded(1, default=256)
    fc_dim: int = bounded(1, default=1024)
    rpn_convs: int = bounded(1, default=2)
    rpn_batch: int = bounded(1, default=256)
    roi_batch: int = bounded(1, default=512)
    proposals: int = bounded(1, default=1000)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_scale < self.min_scale:
            raise UserError(f"max_scale={self.max_scale} is below min_scale={self.min_scale}")


DROP_PATH = {"vit_large_patch16": 0.3, "vit_huge_patch14": 0.3}  # else 0.1
PUBLISHED = ("vit_base_patch16", "vit_large_patch16")
# The miniature: 96 px images that hold objects of 16 to 48, and heads that two cores can train in half a minute.
MINI = {
    "image_size": 96,
    "epochs": 4,
    "warmup_epochs": 0.5,
    "batch": 2,
    "lr": 1e-3,
    "drop_path": 0.0,
    "min_scale": 0.8,
    "max_scale": 1.25,
    "fpn_dim": 32,
    "head_dim": 32,
    "fc_dim": 128,
    "rpn_batch": 64,
    "roi_batch": 32,
    "proposals": 100,
}


def recipe(arch: str, name: str) -> DetectionRecipe:
    """The recipe of that name; UserError for an unknown one."""
    paper = DetectionRecipe(drop_path=DROP_PATH.get(arch, 0.1), window=pretraining_grid(arch))
    return choose("recipe", name, {"paper": paper, "mini": replace(paper, **MINI)})


def sources(arch: str) -> dict[str, str]:
    """Where each number of the paper recipe comes from."""
    li, d2 = "Li et al. 2021 (arXiv 2111.11429)", "detectron2's defaults"
    found = {f.name: li for f in fields(DetectionRecipe)}
    found |= dict.fromkeys(("rpn_batch", "roi_batch", "proposals"), d2)
    found["epochs"] += ", facebookresearch/mae issue 43 (50.3 box AP of ViT-B after 100); counted over the images with "
    found["epochs"] += "objects, 183,200 iterations of 64 where the published 184,375 count 118,000 images"
    found["weight_decay"] += "; none on vectors, positions and bias tables: hustvl/MIMDet"
    found["window"] += ": the pre-training grid; hustvl/MIMDet has 16"
    found["drop_path"] = li if arch in PUBLISHED else "stand-in: nobody published it"
    if arch not in PUBLISHED:
        return {knob: f"derived from ViT-B and ViT-L: {text}" for knob, text in found.items()}
    return found


@dataclass(frozen=True)
class Predictions:
    """What an engine leaves of one job: a COCO-results file and the training's story.

    iterations, seconds: of the training alone, over all its parts. artifacts: file name in the work folder -> SHA-256.
    """

    results: Path
    iterations: int
    seconds: float
    notes: tuple[str, ...] = ()
    resolved: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)


def leave(job: Job, model: nn.Module, found: list[dict]) -> tuple[Path, dict[str, str]]:
    """Gather what every process found and write it into the work folder as a COCO-results file, and the detector's
    weights beside it. Returns the file and {file name of the weights: SHA-256}."""
    results, artifacts = job.work / RESULTS_FILE, {}
    everyone = distributed.gather_to_all(found)
    if distributed.is_main():
        write_json(results, [entry for part in everyone for entry in part])
        metadata = {"format": "mae-transfer detector", "arch": job.checkpoint.arch, "engine": job.engine}
        save_weights(job.work / DETECTOR_FILE, model.state_dict(), metadata)
        artifacts = {DETECTOR_FILE: sha256_of(job.work / DETECTOR_FILE)}
    return results, artifacts


class RoIBatchNorm(nn.BatchNorm2d):
    """BatchNorm that lets an empty batch pass: an image without a single object gives the mask head none, whose mean
    over nothing would make the running statistics NaN."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel():
            return super().forward(x)
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def build_pyramid(job: Job) -> tuple[ViTPyramid, str]:
    """The pyramid with the checkpoint's weights, and what loading did, in a line."""
    r, machine = job.recipe, job.machine
    torch.manual_seed(seed_for(job.seed) % 2**63)
    pyramid = ViTPyramid(
        job.checkpoint.arch,
        r.image_size,
        window=r.window,
        drop_path=r.drop_path,
        activation_checkpointing=machine.activation_checkpointing,
    )
    report = load_pyramid(pyramid, job.checkpoint)
    return pyramid, report.summary()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if decays(name, p)]
    others = [p for name, p in named if not decays(name, p)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def schedule(r: DetectionRecipe, images: int) -> tuple[int, Callable[[int], float]]:
    """Iterations in all, and the learning rate of each."""
    steps = images // r.batch
    rate = partial(
        half_cosine, steps_per_epoch=steps, lr=r.lr, epochs=r.epochs, warmup_epochs=r.warmup_epochs, min_lr=0.0
    )
    return steps * r.epochs, rate


def batchnorm_facts(
    r: DetectionRecipe, machine: Machine, micro_batch: int, synchronised: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How many images a BatchNorm of the heads saw at a time, and a note where that is not the recipe's batch."""
    images = micro_batch * (machine.processes if synchronised else 1)
    facts = {"batchnorm": "synchronised" if synchronised else "plain", "batchnorm_images": images}
    return facts, () if images == r.batch else (f"BatchNorm saw {images} images at a time, not {r.batch}",)


def fitted(image: Image.Image, size: int) -> Image.Image:
    """The image with its long side at `size` px (bilinear)."""
    ratio = size / max(image.size)
    width, height = (max(1, round(side * ratio)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def to_square(image: Image.Image, size: int) -> Tensor:
    """uint8 [3, size, size]: the image in the upper left corner, zeros beside it."""
    square = torch.zeros(3, size, size, dtype=torch.uint8)
    pixels = pil_to_tensor(image)
    square[:, : pixels.shape[1], : pixels.shape[2]] = pixels
    return square


def validation_batches(job: Job, size: int) -> Iterator[list[tuple[Example, Image.Image]]]:
    """This process's batches of the validation images (`distributed.local_batches`). Shows progress."""
    examples = read_split(Path(job.data.root), "val").examples
    batches = distributed.local_batches(len(examples), size)
    total, done = sum(map(len, batches)), 0
    progress = Progress(f"predict {job.task.name} {job.checkpoint.name}", total, enabled=distributed.is_main())
    for batch in batches:
        yield [(examples[i], open_image(examples[i])) for i in batch]
        done += len(batch)
        progress.update(done, len(batch))


def open_image(example: Example) -> Image.Image:
    """UserError for a file that is no image, or not the one that the annotations are of."""
    try:
        image = read_image(example.file)
    except UNREADABLE as e:
        raise UserError(f"{example.file} cannot be read as an image ({e}): replace it") from None
    if image.size != (example.width, example.height):
        said = f"{example.width}x{example.height}"
        raise UserError(f"{example.file} is {image.size[0]}x{image.size[1]} px, its annotations are for {said}")
    return image


def as_results(example: Example, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, masks: np.ndarray) -> list:
    """Entries of a COCO-results file. boxes [n, 4] x0, y0, x1, y1 px; labels 0..79; masks uint8 [n, height, width]."""
    found = []
    for (x0, y0, x1, y1), score, label, mask in zip(boxes.tolist(), scores.tolist(), labels.tolist(), masks):
        rle = mask_util.encode(np.asfortranarray(mask))
        found.append(
            {
                "image_id": example.id,
                "category_id": IDS[label],
                "bbox": [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)],
                "score": score,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )
    return found
