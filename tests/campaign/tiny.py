"""Tiny data sets of every task, and commands on them that take seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import ablation_grid
from mae_core.autoencoder import MaskedAutoencoder
from tests.fixtures import ROOT
from tests.fixtures.coco import write_coco
from tests.fixtures.segmentation import write_ade20k
from tests.fixtures.transfer import CLASSES, write_imagenet, write_noise_image, write_split
from transfer.miniature import dense, depth, imagenet, labelled

RUN_ALL = ROOT / "benchmarks" / "run_all.py"
ABLATIONS = ROOT / "benchmarks" / "ablations.py"
ARCH = "vit_mini_patch8"
MACHINE = ("--device", "cpu", "--workers", "0", "--save-minutes", "0.002")  # a state every tenth of a second
TRAINING = ("image_size=24", "batch=8", "warmup_epochs=1", "epochs=3")
DETECTOR = (
    "image_size=64", "epochs=2", "batch=2", "warmup_epochs=0.5", "fpn_dim=16", "head_dim=16", "fc_dim=32",
    "rpn_batch=16", "roi_batch=16", "proposals=20", "window=3",
)  # fmt: skip
SEGMENTER = (
    "image_size=48", "stride=32", "batch=2", "iterations=8", "warmup_iterations=1", "head_channels=8",
    "auxiliary_channels=8", "test_short_side=48", "test_long_side=96",
)  # fmt: skip
SUITE = ("--recipe", "mini", "--device", "cpu", "--workers", "0", "--out", "out")
DECODER = ("decoder_dim=32", "decoder_depth=1", "decoder_heads=2")


@dataclass(frozen=True)
class World:
    """Where the data and the checkpoint lie that all cases read, and the folder in which they work."""

    data: Path
    ckpt: Path
    work: Path

    @property
    def images(self) -> Path:
        return self.data / "unlabelled"


def make_world(folder: Path) -> World:
    shrink()
    data = folder / "data"
    write_imagenet(data, train=12, val=4)
    for name in ("imagenet-a", "imagenet-r"):
        write_split(data / name, 3)
    for number, corruption in enumerate(sorted(imagenet.CORRUPTIONS)):
        for severity in (1, 2, 3, 4, 5):
            write_split(data / "imagenet-c" / corruption / str(severity), 1, CLASSES[:2], seed=number)
    for number in range(48):
        write_noise_image(data / "unlabelled" / f"{number:03}.png", (90, 120, 150), number)
    write_coco(data, train=8, val=2)
    write_ade20k(data, train=6, val=2)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MOST": 4, "LEAST": 2, "VAL": 1, "PLACES_TRAIN": 4, "PLACES_VAL": 1}.items():
            patch.setattr(labelled, name, value)
        labelled.inaturalist(data, year=2018)
        labelled.places(data, which=365)
    dense.voc(data)
    depth.nyu(data)
    write_split(data / "flowers" / "train", 6, seed=3)
    write_split(data / "flowers" / "val", 2, seed=4)
    torch.manual_seed(0)
    model = MaskedAutoencoder(ARCH, None, decoder_dim=32, decoder_depth=1, decoder_heads=2)
    ckpt = folder / "mae.safetensors"
    save_file(model.state_dict(), ckpt, {"decoder_heads": "2"})
    work = folder / "work"
    work.mkdir()
    return World(data, ckpt, work)


def suite(world: World, tasks: Sequence[str], knobs: Sequence[str], *flags: str, ckpt: object = None) -> list[str]:
    """run_all on these tasks, each with these knobs."""
    names = [f"folder:{world.data}/flowers" if task == "folder" else task for task in tasks]
    of = ["folder:flowers" if task == "folder" else task for task in tasks]
    settings = [f"{task}.{knob}" for task in of for knob in knobs if task not in EVALUATED]
    command = [RUN_ALL, "--ckpt", ckpt or world.ckpt, "--data", world.data, "--out", "out", "--recipe", "mini"]
    command += MACHINE
    command += ["--tasks", *names, *(["--set", *settings] if settings else []), *flags]
    return [str(part) for part in command]


EVALUATED = ("imagenet_knn", "imagenet_a", "imagenet_r", "imagenet_c")


def pretraining(world: World, *flags: str, epochs: int = 4) -> list[str]:
    knobs = (*DECODER, "image_size=24", "batch=8", "warmup_epochs=1", f"epochs={epochs}")
    what = ["--data", world.images, "--arch", ARCH, "--recipe", "mini", "--out", "out", *MACHINE]
    return [str(part) for part in ["-m", "mae_core.pretrain", *what, *flags, "--set", *knobs]]


def shrink() -> None:
    """Make what no flag sets as small as the rest, here and in all forks: the evaluation of the ablations, and the
    miniature."""
    for knobs in ablation_grid.DEFAULTS["mini"].transfer.values():
        knobs |= {"image_size": 24, "batch": 16, "epochs": 2, "warmup_epochs": 1}
    for name in ("TRAIN", "VAL", "HARD", "RENDITION", "SKETCH", "CORRUPTED"):
        setattr(imagenet, name, 1)
    dense.TRAIN = dense.VAL = 2


def two_ranks(world: World) -> dict[str, list[str]]:
    """Runs of two processes, which average their gradients by gloo."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return {
        "fine-tuning on two ranks": suite(world, ["imagenet_finetune"], TRAINING, "--gpus", "2"),
        "pre-training on two ranks": [*launch, *pretraining(world)],
    }


def pipelines(world: World) -> dict[str, list[str]]:
    """Every kind of run that can be killed, by name."""
    partial = (*TRAINING, "blocks=1,6")
    ablations = [ABLATIONS, "--table", "1c", "--recipe", "mini", "--data", world.data, "--out", "out", *MACHINE]
    ablations += ["--set", *DECODER, "image_size=24", "batch=16", "warmup_epochs=0", "epochs=3"]
    return {
        "fine-tuning, probing, k-NN, A, R, C": suite(
            world,
            ["imagenet_knn", "imagenet_linprobe", "imagenet_finetune", "imagenet_a", "imagenet_r", "imagenet_c"],
            TRAINING,
        ),
        "partial": suite(world, ["imagenet_partial"], partial),
        "from scratch, iNaturalist, Places, a folder": suite(
            world, ["imagenet_scratch", "inat2018", "places365", "folder"], TRAINING
        ),
        "coco": suite(world, ["coco"], DETECTOR, "--engine", "torchvision"),
        "ade20k": suite(world, ["ade20k"], SEGMENTER),
        "pre-training": pretraining(world),
        "pre-training with workers": pretraining(world, "--workers", "2"),
        "pre-training with k-NN": pretraining(world, "--eval-every", "2", "--eval-data", f"{world.data}/imagenet"),
        "ablations": [str(part) for part in ablations],
    }
