"""What the detection engines share: constants, the model's start, the schedule, and the files that a job leaves."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_util
from torch import Tensor, nn
from torch.nn import functional as F

from mae_core import distributed
from mae_core.data import seed_for
from mae_core.decode import UNREADABLE, read_image
from mae_core.errors import UserError
from mae_core.machine import Machine, lack_of_memory_named
from mae_core.optim import half_cosine
from mae_core.progress import Progress
from mae_core.training import restart
from mae_core.vit import Variant
from mae_core.writing import write_json
from transfer.data.coco import IDS, Example, Examples, read_split
from transfer.detection.recipe import DetectionRecipe, ViTDetRecipe
from transfer.pyramid import ViTDetPyramid, ViTPyramid, layer_of, load_pyramid, pyramid_class
from transfer.run import save_trained
from transfer.task import Job

RESULTS_FILE = "coco_results.json"
DETECTOR_FILE = "detector.safetensors"
# detectron2's defaults, for both engines: anchors of 8 strides a side in three shapes; the lowest score of a detection;
# the overlap above which the lower-scored of two is dropped; detections per image.
ANCHOR_STRIDES, ANCHOR_RATIOS = 8, (0.5, 1.0, 2.0)
SCORE_THRESHOLD, NMS_THRESHOLD, DETECTIONS = 0.05, 0.5, 100
# Names of what has no weight decay, in addition to norm layers (but not those of ViTDet's maps). freqs: learned rotary
# positions. gamma_1, gamma_2: EVA's layer scales.
NO_DECAY = ("pos_embed", "freqs", "bias_global", "bias_windowed", "gamma", "gamma_1", "gamma_2")

Tested = list[tuple[Example, Image.Image]]


@dataclass(frozen=True)
class Predictions:
    """What an engine returns for one job: the path of a COCO-results file, and how the training went.

    iterations, seconds: of the training only, summed over all resumed parts. artifacts: file name in the work folder ->
    SHA-256.
    """

    results: Path
    iterations: int
    seconds: float
    notes: tuple[str, ...] = ()
    resolved: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)


def save_artifacts(job: Job, model: nn.Module, found: list[dict]) -> tuple[Path, dict[str, str]]:
    """Gather the detections of all processes into one COCO-results file in the work folder, and save the detector's
    weights beside it. Returns the file's path and {file name of the weights: SHA-256}."""
    results, everyone = job.work / RESULTS_FILE, distributed.gather_to_all(found)
    if distributed.is_main():
        write_json(results, [entry for part in everyone for entry in part])
    metadata = {"arch": job.checkpoint.arch, "engine": job.engine}
    return results, save_trained(job, DETECTOR_FILE, model.state_dict(), metadata)


class RoIBatchNorm(nn.BatchNorm2d):
    """BatchNorm that passes an empty batch through: without a single object the mask head gets no RoI, and a mean over
    nothing would turn the running statistics into NaN."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel():
            return super().forward(x)
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def in_float32(output: Any) -> Any:
    """The tensor, or those of a list, tuple or dict, as float32. Both engines hook it behind the parts that run in
    bf16: pooling, anchors, boxes, their targets, scores and pasting take the type of the maps or of the heads' outputs.
    With bf16's eight bits, coordinates above 512 px would be off by up to two, and small objects be hardly learnt."""
    if isinstance(output, Tensor):
        return output.float()
    if isinstance(output, dict):
        return {key: in_float32(part) for key, part in output.items()}
    return type(output)(in_float32(part) for part in output)


def new_pyramid(
    arch: str, variant: Variant, r: DetectionRecipe, activation_checkpointing: bool = False, pretraining_size: int = 0
) -> ViTPyramid:
    """The recipe's pyramid, without a checkpoint's weights. pretraining_size: of `ViTDetPyramid`."""
    own: dict[str, Any] = {"variant": variant, "window": r.window, "drop_path": r.drop_path}
    own |= {"activation_checkpointing": activation_checkpointing}
    if isinstance(r, ViTDetRecipe):
        return ViTDetPyramid(arch, r.image_size, dim=r.fpn_dim, pretraining_size=pretraining_size, **own)
    return pyramid_class(arch)(arch, r.image_size, **own)


def build_pyramid(job: Job) -> tuple[ViTPyramid, str]:
    """The pyramid with the checkpoint's weights, and a one-line summary of the loading."""
    r, machine = job.recipe, job.machine
    torch.manual_seed(seed_for(job.seed) % 2**63)
    source = job.checkpoint
    size = int(source.meta["image_size"])
    pyramid = new_pyramid(source.arch, source.variant, r, machine.activation_checkpointing, size)
    report = load_pyramid(pyramid, source)
    return pyramid, report.summary()


def groups_of(model: nn.Module, r: DetectionRecipe) -> list[dict]:
    """The optimizer's groups: `parameter_groups`, with a layer decay each split by layer, with lr_scale = layer_decay
    ** (depth + 1 - layer), where all that the encoder does not have is of layer depth + 1."""
    groups = parameter_groups(model, r.weight_decay, maps_decay=isinstance(r, ViTDetRecipe))
    if isinstance(r, ViTDetRecipe) and r.decay_all:
        groups = [{**group, "weight_decay": r.weight_decay} for group in groups]
    if r.layer_decay == 1:
        return groups
    (pyramid,) = (module for module in model.modules() if isinstance(module, ViTPyramid))
    top = len(pyramid.blocks) + 1
    layer = {id(p): layer_of(name, top - 1) for name, p in pyramid.named_parameters()}
    return [
        {**group, "params": chosen, "lr_scale": r.layer_decay ** (top - number)}
        for group in groups
        for number in range(top + 1)
        if (chosen := [p for p in group["params"] if layer.get(id(p), top) == number])
    ]


def parameter_groups(model: nn.Module, weight_decay: float, maps_decay: bool = False) -> list[dict]:
    """Two groups: parameters with weight decay, and those without: of norm layers, positions, layer scales and bias
    tables. Biases of linear and convolutional layers decay too, as in hustvl/MIMDet, whose rule is detectron2's.

    maps_decay: layer norms of maps decay, in pyramid and heads. They do in ViTDet's configs: detectron2 spares norm
    layers by their class, and its own LayerNorm is not on the list."""
    from timm.layers import LayerNorm2d, RmsNorm, SimpleNorm
    from timm.models.vision_transformer import Block

    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, RmsNorm, SimpleNorm)
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad:
                table = name == "bias" and isinstance(module, Block)  # BEiT's, one for each block
                norm = isinstance(module, norms) and not (maps_decay and isinstance(module, LayerNorm2d))
                (others if table or norm or name in NO_DECAY else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def schedule(r: DetectionRecipe, images: int) -> tuple[int, Callable[[int], float]]:
    """The total number of iterations, and a function from an iteration to its learning rate."""
    steps = images // r.batch
    if isinstance(r, ViTDetRecipe):
        return steps * r.epochs, partial(stepped, total=steps * r.epochs, warmup=steps * r.warmup_epochs, r=r)
    rate = partial(
        half_cosine, steps_per_epoch=steps, lr=r.lr, epochs=r.epochs, warmup_epochs=r.warmup_epochs, min_lr=0.0
    )
    return steps * r.epochs, rate


def stepped(step: int, total: int, warmup: float, r: ViTDetRecipe) -> float:
    """Linear from 0 over the warm-up; a tenth after each of r.lr_steps."""
    return r.lr * min(1.0, step / warmup if warmup else 1.0) * 0.1 ** sum(step >= share * total for share in r.lr_steps)


def batchnorm_facts(
    r: DetectionRecipe, machine: Machine, micro_batch: int, synchronised: bool
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """How many images the heads' BatchNorms see at a time, and a note where that is not the recipe's batch."""
    if isinstance(r, ViTDetRecipe):
        return {}, ()  # it has layer norms
    images = micro_batch * (machine.processes if synchronised else 1)
    facts = {"batchnorm": "synchronised" if synchronised else "plain", "batchnorm_images": images}
    return facts, () if images == r.batch else (f"BatchNorm saw {images} images at a time, not {r.batch}",)


def fit_long_side(image: Image.Image, size: int) -> Image.Image:
    """The image with its long side at `size` px (bilinear)."""
    ratio = size / max(image.size)
    width, height = (max(1, round(side * ratio)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def pad_to_square(image: Image.Image, size: int) -> Tensor:
    """uint8 [3, size, size]: the image in the upper left corner, zeros elsewhere."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    return F.pad(pil_to_tensor(image), (0, size - image.width, 0, size - image.height))


def tested_examples(job: Job) -> Examples:
    """The validation images, with --limit the first ones."""
    examples = read_split(Path(job.data.root), "val").examples
    assert isinstance(examples, Examples)  # or its data would not have been found
    return examples.few(job.data.limit)


def validation_batches(job: Job, size: int) -> Iterator[Tested]:
    """This process's batches of the validation images (`distributed.local_batches`). Shows progress."""
    examples = tested_examples(job)
    batches = distributed.local_batches(len(examples), size)
    total, done = sum(map(len, batches)), 0
    progress = Progress(f"predict {job.task.name} {job.checkpoint.name}", total, enabled=distributed.is_main())
    for batch in batches:
        yield [(examples[i], open_image(examples[i])) for i in batch]
        done += len(batch)
        progress.update(done, len(batch))


def detections(job: Job, detect: Callable[[Tested], list[dict]], at_once: int) -> list[dict]:
    """COCO results of this process's validation images: what `detect` finds in `at_once` of them; when GPU memory runs
    out, in half as many from there on. A test keeps no activations, but it is in float32. UserError if there is no
    memory for one image."""
    found: list[dict] = []
    for batch in validation_batches(job, at_once):
        while batch:
            part = batch[:at_once]
            try:
                with lack_of_memory_named():
                    found += detect(part)
                batch = batch[len(part) :]
                continue
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    what = f"out of GPU memory while one image of {job.recipe.image_size} px is tested in float32"
                    raise UserError(f"{what}: take a GPU with more, or free this one; {restart(job.work)}") from None
            # Here the error is gone, and with it what its traceback held of the GPU's memory.
            at_once = len(part) // 2
            torch.cuda.empty_cache()
    return found


def open_image(example: Example) -> Image.Image:
    """The example's image; UserError if the file cannot be read or its size is not that of the annotations."""
    try:
        image = read_image(example.file)
    except UNREADABLE as e:
        raise UserError(f"{example.file} cannot be read as an image ({e}): replace it") from None
    if image.size != (example.width, example.height):
        said = f"{example.width}x{example.height}"
        raise UserError(f"{example.file} is {image.size[0]}x{image.size[1]} px, its annotations are for {said}")
    return image


def to_results(example: Example, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, masks: np.ndarray) -> list:
    """Entries of a COCO-results file. boxes [n, 4]: x0, y0, x1, y1 in px; labels 0..79; masks uint8 [n, H, W]."""
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
