"""Twins of fine-tuning and linear probing: our whole task beside the official script, from the same start."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, ToPILImage

from benchmarks.originals import Call, Difference, mae
from benchmarks.originals.pictures import some_images
from benchmarks.originals.watch import Replay, Watched, apart, curves, relative, watched
from mae_core.checkpoint import read_checkpoint
from mae_core.machine import Machine
from transfer.classification import train
from transfer.classification.job import finetune, linprobe
from transfer.classification.recipes import finetune_recipe, linprobe_recipe
from transfer.classification.tasks import folder_task
from transfer.classification.train import ClassifierRecipe
from transfer.data.transforms import eval_transform
from transfer.task import Job, Result

CHECKPOINT = Path(__file__).parents[2] / "results" / "miniature" / "mae_mini.safetensors"
ARCH, SIZE = "vit_mini_patch8", 24
TRAIN, VAL = 320, 64  # 10 steps of 32 in each of 10 epochs; two whole batches, as the official mean of losses needs
# head_std: so that the first loss depends on the encoder. No erasing: the official code draws it image by image.
SAME: dict[str, Any] = {"image_size": SIZE, "epochs": 10, "warmup_epochs": 2, "batch": 32, "head_std": 0.05}
FINETUNE = replace(finetune_recipe(ARCH, "mini"), drop_path=0.1, **SAME)
LINPROBE = replace(linprobe_recipe(ARCH, "mini"), **SAME)


def finetuning(call: Call) -> list[Difference]:
    """Loss and rate at every step, and the scores of the last epoch; without mixing, then with the same mixed pairs."""
    mae.load(call.checkout, "models_vit")
    data = some_images(call.data, call.work / "images", TRAIN, VAL)
    mixed = replace(FINETUNE, mixup=0.8, cutmix=1.0)
    return compare(call, data, "no mixup", FINETUNE, finetune) + compare(call, data, "mixup", mixed, finetune)


def probing(call: Call) -> list[Difference]:
    """The same of a linear probe."""
    mae.load(call.checkout, "models_vit")
    data = some_images(call.data, call.work / "images", TRAIN, VAL)
    return compare(call, data, "probe", LINPROBE, linprobe)


def compare(call: Call, data: Path, name: str, r: ClassifierRecipe, task: Callable[[Job], Result]) -> list[Difference]:
    work = call.work / name
    (ours, scores), (again, others) = (our_run(data, work / f"{other}", r, task, other) for other in (False, True))
    curve = their_run(call, data, ours, r).scalars
    found = curves(name, ours, apart(again, ours), curve["loss"], curve["lr"])
    # The last epoch's scores: of one image of the validation set more or less, and the loss as in training.
    for metric, logged in (("top1", "acc1"), ("top5", "acc5")):
        a, b = scores[metric], curve[f"perf/test_{logged}"][-1]
        found.append(Difference(f"{name}: {metric} of {VAL} images, percent", a, b, abs(a - b), 100 / VAL))
    a, b = scores["loss"], curve["perf/test_loss"][-1]
    allowed = max(found[1].allowed, relative(others["loss"], a))
    return [*found, Difference(f"{name}: loss of {VAL} images, relative", a, b, relative(a, b), allowed)]


def our_run(
    data: Path, work: Path, r: ClassifierRecipe, task: Callable[[Job], Result], other_order: bool
) -> tuple[Watched, dict[str, float]]:
    """The task on these images from the committed miniature: its training, and its metrics."""
    folder = folder_task(str(data))
    work.mkdir(parents=True)
    machine = Machine(threads=torch.get_num_threads())
    checkpoint = read_checkpoint(CHECKPOINT)
    job = Job(folder, checkpoint, r, "mini", {}, folder.inspect(data), work, machine=machine, out=work)
    with watched(train, other_order) as run:
        result = task(job)
    return run, result.metrics


def their_run(call: Call, data: Path, ours: Watched, r: ClassifierRecipe) -> mae.Curve:
    """The official script from our start."""
    probe, start = r.optimizer == "lars", call.work / "start.pth"
    torch.save({"model": ours.start}, start)

    def images(root: str, transform: Any) -> Replay | ImageFolder:
        if Path(root).name == "train":
            return Replay(ours.steps, r.epochs, transform)
        if probe:  # whose script knows only 224 px
            transform = Compose([eval_transform(SIZE), ToPILImage(), *transform.transforms[-2:]])
        return ImageFolder(root, transform)

    def build(num_classes: int, global_pool: bool, drop_path_rate: float = 0.0) -> torch.nn.Module:
        pool = "avg" if global_pool else "token"
        return mae.classifier(call.checkout, ARCH, SIZE, num_classes, drop_path_rate, pool)

    flags: dict[str, Any] = {"epochs": r.epochs, "warmup_epochs": r.warmup_epochs, "batch_size": r.batch}
    flags |= {"blr": r.base_lr, "min_lr": r.min_lr, "weight_decay": r.weight_decay, "data_path": data}
    flags |= {"resume": start, "log_dir": call.work, "nb_classes": len(list((data / "train").iterdir()))}
    if not probe:
        flags |= {"input_size": SIZE, "drop_path": r.drop_path, "layer_decay": r.layer_decay, "reprob": 0}
        flags |= {"smoothing": r.label_smoothing, "mixup": r.mixup, "cutmix": r.cutmix}
    return mae.run(call.checkout, "main_linprobe" if probe else "main_finetune", build, images, flags)
