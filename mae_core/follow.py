"""Following a pre-training by the k-NN accuracy of its encoder on a labelled folder."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae_core import distributed
from mae_core.data import Images, loader, normalize, pretraining_transform
from mae_core.errors import UserError
from mae_core.knn import knn_predict
from mae_core.listing import image_paths
from mae_core.machine import Machine

# At most so many, spread evenly over the list: ImageNet's 1.28 million would take longer than an epoch's training.
TRAIN_IMAGES, VAL_IMAGES = 50_000, 10_000
BATCH = 128


@dataclass(frozen=True)
class Labelled:
    """Files and labels of both splits."""

    train: tuple[list[Path], list[int]]
    val: tuple[list[Path], list[int]]
    classes: int


def labelled_folder(root: Path) -> Labelled:
    """ROOT/train/CLASS/* and ROOT/val/CLASS/*; UserError if a split or a class of one of them is missing."""
    splits = {}
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise UserError(f"{root} has no folder {split}: k-NN needs {root}/train/CLASS/* and {root}/val/CLASS/*")
        above = os.path.join(root / split, "")
        splits[split] = [(f, f.removeprefix(above).partition("/")[0]) for f in image_paths(root / split)]
    names = [sorted({name for _, name in splits[split]}) for split in ("train", "val")]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))[0]
        raise UserError(f"{root}: train and val must have the same folders of classes, but only one has {odd}")
    label_of = {name: label for label, name in enumerate(names[0])}

    def thinned(pairs: list, limit: int) -> tuple[list[Path], list[int]]:
        count = min(limit, len(pairs))
        kept = [pairs[i * len(pairs) // count] for i in range(count)]
        return [Path(file) for file, _ in kept], [label_of[name] for _, name in kept]

    return Labelled(thinned(splits["train"], TRAIN_IMAGES), thinned(splits["val"], VAL_IMAGES), len(label_of))


def knn_top1(model: VisionTransformer, data: Labelled, image_size: int, machine: Machine) -> tuple[float, list[str]]:
    """Accuracy (percent) on the validation images of a vote by the 20 nearest training images (mae_core/knn.py), by the
    class token after the last norm; and the images of both that could not be read, which are left out. The processes
    share the work; all but the first return NaN. UserError if nothing is left."""
    features, labels, left_out = [], [], []
    for files, all_labels in (data.train, data.val):
        found, bad = encoder_features(model, files, image_size, machine)
        kept = torch.tensor([str(file) not in bad for file in files])
        if not kept.any():
            raise UserError(f"k-NN: no image of {files[0].parents[1]} can be read: mend them")
        features.append(found[kept].to(machine.device))
        labels.append(torch.tensor(all_labels)[kept].to(machine.device))
        left_out += sorted(bad)
    if not distributed.is_main():
        return math.nan, left_out
    predicted = knn_predict(features[0], labels[0], features[1], data.classes, k=min(20, len(features[0])))
    return 100 * (predicted == labels[1]).float().mean().item(), left_out


@torch.inference_mode()
def encoder_features(
    model: VisionTransformer, files: list[Path], image_size: int, machine: Machine
) -> tuple[Tensor, set[str]]:
    """The class token of every file's centre crop [N, D], in the order of the files, and the files that could not be
    read and were black; on every process."""
    batches = distributed.local_batches(len(files), BATCH)
    dataset = Images(files, pretraining_transform(image_size, augmentation="none"))
    was_training, found, unreadable = model.training, [], set()
    model.eval()
    for images, _, bad in loader(dataset, batches, machine.workers, machine.device):
        with machine.autocast():
            tokens = model.forward_features(normalize(images.to(machine.device, non_blocking=True)))
        found.append(tokens[:, 0].float().cpu())
        unreadable.update(bad)
    model.train(was_training)
    everyone = distributed.gather_to_all(unreadable)
    return torch.cat(distributed.gather_in_turn(found)), set().union(*everyone)
