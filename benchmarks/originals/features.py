"""Twin of k-NN: our whole task beside DINO's evaluation, with DINO's model, on the same images and weights."""

import argparse
import contextlib
import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize
from torchvision import transforms

from benchmarks.originals import Call, Difference, check_checkout
from benchmarks.originals.pictures import some_images
from mae_core.checkpoint import Checkpoint, read_checkpoint
from mae_core.errors import UserError
from mae_core.knn import knn_predict
from mae_core.vit import get_arch
from transfer.data.imagenet import read_split, wnids
from transfer.frozen.knn import OTHER_KS, knn
from transfer.frozen.knn import recipe as knn_recipe
from transfer.frozen.tasks import KNN
from transfer.task import Job

CHECKPOINT = Path(__file__).parents[2] / "results" / "miniature" / "mae_mini.safetensors"
ARCH, SIZE = "vit_mini_patch8", 48
TRAIN, VAL = 400, 100  # DINO cuts the validation images into 100 parts


FILES = ("eval_knn.py", "utils.py", "vision_transformer.py")


def nearest_neighbours(call: Call) -> list[Difference]:
    """The features; then, for each k of DINO, how many images get the same class, and the top-1."""
    check_checkout(call.checkout, FILES, "facebookresearch/dino")
    some_images(call.data, call.work / "imagenet", TRAIN, VAL)
    checkpoint, r, data = read_checkpoint(CHECKPOINT), knn_recipe(ARCH, "mini"), KNN.inspect(call.work)
    if data.status != "found":
        raise UserError(f"{call.data} holds no ImageNet classes ({data.detail})")
    top1 = knn(Job(KNN, checkpoint, r, "mini", {}, data, call.work / "run", out=call.work)).metrics
    stored = {name: next(call.work.rglob(f"{name}.safetensors")) for name in ("train", "val")}
    ours = {name: normalize(load_file(path)["features"], dim=1) for name, path in stored.items()}
    labels = {name: torch.tensor(read_split(call.work / "imagenet" / name)[0].labels) for name in ours}
    found = []
    with dino(call, checkpoint) as (script, arguments):
        theirs = dict(zip(ours, script.extract_feature_pipeline(arguments)))
        for name, features in ours.items():
            a, b = (x.abs().max().item() for x in (features, theirs[name]))
            gap = (features - theirs[name]).abs().max().item()
            found.append(Difference(f"{name} features of unit length: largest value", a, b, gap, 1e-6))
        for k in OTHER_KS:
            predicted = knn_predict(ours["train"], labels["train"], ours["val"], len(wnids()), k, r.temperature)
            classify = partial(script.knn_classifier, theirs["train"], labels["train"], theirs["val"])
            same, accuracy = (classify(targets, k, r.temperature)[0] for targets in (predicted, labels["val"]))
            a = top1["top1" if k == r.k else f"top1@{k}"]
            found.append(Difference(f"k={k}: images of the same class, percent", 100, same, 100 - same, 0))
            found.append(Difference(f"k={k}: top-1, percent", a, accuracy, abs(a - accuracy), 1e-9))
    return found


@contextmanager
def dino(call: Call, checkpoint: Checkpoint) -> Iterator[tuple[ModuleType, argparse.Namespace]]:
    """DINO's script, with the arguments that its main part would give it, and in its process group, but on a CPU."""
    weights = call.work / "weights.pth"
    torch.save({"teacher": dict(checkpoint.encoder)}, weights)
    values = {"arch": "vit_twin", "patch_size": get_arch(ARCH).patch, "pretrained_weights": str(weights)}
    values |= {"checkpoint_key": "teacher", "data_path": str(call.work / "imagenet"), "dump_features": None}
    values |= {"batch_size_per_gpu": 128, "num_workers": 0, "use_cuda": False}
    with ExitStack() as stack:
        stack.enter_context(patch.object(sys, "path", [str(call.checkout.resolve()), *sys.path]))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        script = importlib.import_module("eval_knn")
        for moved in (Tensor, nn.Module):
            stack.enter_context(patch.object(moved, "cuda", lambda self, **_: self))
        stack.enter_context(patch.object(script.vits, "vit_twin", partial(model, script.vits), create=True))
        sizes = SimpleNamespace(**vars(transforms) | {"Compose": sized})
        stack.enter_context(patch.object(script, "pth_transforms", sizes))
        dist.init_process_group("gloo", init_method=f"file://{(call.work / 'group').resolve()}", rank=0, world_size=1)
        stack.callback(dist.destroy_process_group)
        yield script, argparse.Namespace(**values)


def model(vits: ModuleType, patch_size: int, num_classes: int) -> nn.Module:
    """DINO's ViT of our size."""
    a, norm = get_arch(ARCH), partial(nn.LayerNorm, eps=1e-6)
    sizes = {"embed_dim": a.dim, "depth": a.depth, "num_heads": a.heads, "norm_layer": norm, "qkv_bias": True}
    return vits.VisionTransformer([SIZE], patch_size, num_classes=num_classes, **sizes)


def sized(steps: list) -> transforms.Compose:
    """DINO's transform, whose sizes are written into the script, for our size."""
    resize, crop, *rest = steps
    assert (resize.size, crop.size) == (256, (224, 224))
    resize = transforms.Resize(int(SIZE * 256 / 224), resize.interpolation)
    return transforms.Compose([resize, transforms.CenterCrop(SIZE), *rest])
