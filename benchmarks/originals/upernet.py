"""Twin of ADE20K: our UperNet beside mmsegmentation's own Runner.

Theirs are the config for MAE's ViT-B, made small, and all that it names: backbone, neck, heads, losses,
pipelines, preprocessor, optimizer and its constructor, schedulers, loop, sliding test and metric. Ours are the start,
the order of the images and the seeds of the random numbers; BatchNorm is plain in both. Both models compute in float64:
through BatchNorm over four small images, float32's rounding errors grow a hundredfold and more in thirty steps, by an
amount that differs from run to run. mmcv's compiled operators, of which none is called, are the stand-in of
`mmseg_plugin`.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from benchmarks.originals import Call, Difference
from benchmarks.originals.watch import Step, Watched, curves
from mae_core.checkpoint import read_checkpoint
from mae_core.data import Sample, TrainingStream, seed_all
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.training import State, Training
from mae_core.vit import get_arch
from transfer.data.ade20k import FOLDER, SPLITS, inspect_ade20k, pairs
from transfer.data.miou import metrics_of
from transfer.segmentation import train
from transfer.segmentation.mmseg_config import config_of
from transfer.segmentation.mmseg_plugin import register
from transfer.segmentation.recipe import recipe
from transfer.segmentation.tasks import TAKES_GPU, TASKS
from transfer.task import Job

ARCH = "vit_mini_patch8"
CONFIG = "configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py"
IMAGES = {"train": 100, "val": 5}  # at most
# Without drop path, for which timm and mmcv call the random generator in other ways.
SMALL: dict[str, Any] = {
    "image_size": 64, "iterations": 30, "warmup_iterations": 5, "batch": 4, "lr": 1e-3, "drop_path": 0.0,
    "head_channels": 32, "auxiliary_channels": 32, "test_short_side": 96, "test_long_side": 384, "stride": 43,
}  # fmt: skip

DOUBLE = 1e-9  # of what thirty steps in float64 give

# Our names of the weights, from the first letter on, and mmsegmentation's.
NAMES = {
    r"backbone\.blocks\.(\d+)\.bias$": r"backbone.layers.\1.attn.relative_position_bias_table",
    r"backbone\.blocks\.(\d+)\.norm([12])": r"backbone.layers.\1.ln\2",
    r"backbone\.blocks\.(\d+)\.ls([12])\.gamma": r"backbone.layers.\1.gamma_\2",
    r"backbone\.blocks\.(\d+)\.mlp\.fc1": r"backbone.layers.\1.ffn.layers.0.0",
    r"backbone\.blocks\.(\d+)\.mlp\.fc2": r"backbone.layers.\1.ffn.layers.1",
    r"backbone\.blocks\.(\d+)\.attn": r"backbone.layers.\1.attn",
    r"backbone\.patch_embed\.proj": "backbone.patch_embed.projection",
    r"backbone\.upsample_4x": "neck.upsample_4x",
    r"backbone\.upsample_2x": "neck.upsample_2x.0",
}


def segmentation(call: Call) -> list[Difference]:
    """Loss and rate at every step, the weights and the test's metrics at the end."""
    job = job_of(call)
    ours, model, found = our_run(replace(job, work=call.work / "ours"))
    start, mine = renamed(ours.start), renamed(model.state_dict())
    hook, theirs = their_run(job, start)
    rows = curves("UperNet", ours, DOUBLE, hook.losses, hook.rates)
    way, gap = distance(mine, start), distance(mine, theirs)
    name = f"UperNet: weights after step {job.recipe.iterations}, of how far they went"
    rows.append(Difference(name, way, distance(theirs, start), gap / way, DOUBLE))
    for name, key in (("mIoU", "miou"), ("pixel accuracy", "aacc")):
        value, at_theirs = float(found[key]), float(hook.metrics["mIoU" if key == "miou" else "aAcc"])
        allowed = 0.005 + 1e-5  # IoUMetric rounds to two decimals, in float32
        rows.append(Difference(f"UperNet: {name} in the test, %", value, at_theirs, abs(value - at_theirs), allowed))
    return rows


def job_of(call: Call) -> Job:
    """Our small job, on links to some of the user's images. UserError without ADE20K or on a machine with a GPU."""
    if torch.cuda.is_available():
        raise UserError(TAKES_GPU)
    found = inspect_ade20k(call.data)
    if found.status != "found":
        raise UserError(found.detail)
    for split, most in IMAGES.items():
        listed = pairs(call.data / FOLDER, split)
        count = min(most, len(listed))
        for number in range(count):
            for kind, file in zip(("images", "annotations"), listed[number * len(listed) // count]):
                place = call.work / FOLDER / kind / SPLITS[split] / file.name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file.resolve())
    r = replace(recipe(ARCH, "paper"), **SMALL)
    data, start = inspect_ade20k(call.work), read_checkpoint(f"random:{ARCH}")
    return Job(TASKS[0], start, r, "paper", SMALL, data, call.work, 0, "mmsegmentation", machine=Machine())


def our_run(job: Job) -> tuple[Watched, nn.Module, dict[str, Any]]:
    """What `--task ade20k` trains and tests: the training, the model and its metrics."""
    job.work.mkdir()
    config = config_of(job.checkpoint, job.recipe, Path(job.data.root) / FOLDER, job.work, job.machine)
    with watched() as run:
        runner, _ = train.train(job, config)
        areas = train.run_test(runner).areas
    return run, runner.model, metrics_of(areas.sum(axis=0))


@contextmanager
def watched() -> Iterator[Watched]:
    """The start, losses and rates of our next training, which is made to compute in float64."""
    found, fit = Watched(), train.fit

    def watching(model: nn.Module, optimizer: Any, t: Training) -> State:
        found.start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        in_float64(model)

        def loss_of(m: nn.Module, *tensors: Any) -> Tensor:
            loss = t.loss_of(m, *tensors)
            found.steps.append(Step(loss=loss.item(), rate=t.lr_at(len(found.steps))))
            return loss

        return fit(model, optimizer, replace(t, loss_of=loss_of))

    with patch.object(train, "fit", watching):
        yield found


def in_float64(model: Any) -> None:
    """In place: all but the normalisation of the images, which our dataset does in float32."""
    model.double()
    model.data_preprocessor.float()
    model.backbone.register_forward_pre_hook(lambda module, inputs: tuple(tensor.double() for tensor in inputs))


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of our segmentor by mmsegmentation's names: copies."""
    found = {}
    for name, tensor in state.items():
        if name.endswith(".bias_class"):
            continue
        if f"{name}_class" in state:  # one table there, the class token's three entries last
            tensor = torch.cat([tensor.flatten(1), state[f"{name}_class"]], dim=1).T
        for ours, theirs in NAMES.items():
            name = re.sub(f"^{ours}", theirs, name)
        found[name] = tensor.clone(memory_format=torch.contiguous_format)
    return found


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Euclidean, over the trained weights and BatchNorm's statistics."""
    squares = [(one[n].double() - other[n].double()).square().sum() for n in one if one[n].is_floating_point()]
    return float(torch.stack(squares).sum().sqrt())


def their_run(job: Job, start: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """mmsegmentation's training and test from that start: losses, rates and metrics, and the final weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the names of its own constructor's arguments
        hook = our_parts(job.seed)
        from mmengine.runner import Runner

        torch.save({"state_dict": start}, job.work / "start.pth")
        runner = Runner.from_cfg(their_config(job))
        runner.register_hook(hook)
        runner.train()
    return hook, {name: runner.model.state_dict()[name] for name in start}


def their_config(job: Job) -> Any:
    """mmsegmentation's config with our small recipe's sizes, rates and lengths."""
    import mmseg
    from mmengine.config import Config

    r, a, folder = job.recipe, get_arch(job.checkpoint.arch), str(Path(job.data.root) / FOLDER)
    config = Config.fromfile(Path(mmseg.__file__).parent / ".mim" / CONFIG)
    size, scale, norm = (r.image_size,) * 2, (r.test_long_side, r.test_short_side), {"type": "BN"}
    backbone = {"img_size": size, "patch_size": a.patch, "embed_dims": a.dim, "num_layers": a.depth}
    backbone |= {"num_heads": a.heads, "out_indices": list(r.taps), "drop_path_rate": r.drop_path}
    model = {"pretrained": None, "data_preprocessor": {"size": size}, "backbone": backbone}
    model |= {"neck": {"embed_dim": a.dim, "norm_cfg": norm}}
    model |= {"decode_head": {"in_channels": [a.dim] * 4, "channels": r.head_channels, "norm_cfg": norm}}
    model |= {"auxiliary_head": {"in_channels": a.dim, "channels": r.auxiliary_channels, "norm_cfg": norm}}
    model |= {"test_cfg": {"crop_size": size, "stride": (r.stride,) * 2}}
    loading = {"num_workers": 0, "persistent_workers": False}
    sampler = {"type": "OurOrder", "_delete_": True, "batch": r.batch, "steps": r.iterations}
    config.merge_from_dict({"model": model, "train_dataloader": {**loading, "sampler": sampler}})
    config.merge_from_dict(
        {
            "work_dir": str(job.work / "theirs"), "load_from": str(job.work / "start.pth"), "log_level": "ERROR",
            "randomness": {"seed": job.seed},
            "train_dataloader.batch_size": r.batch,
            "train_dataloader.dataset.type": "OurSeeds",
            "train_dataloader.dataset.data_root": folder,
            "train_dataloader.dataset.pipeline.2.scale": scale,
            "train_dataloader.dataset.pipeline.3.crop_size": size,
            "val_dataloader": loading,
            "val_dataloader.dataset.data_root": folder,
            "val_dataloader.dataset.pipeline.1.scale": scale,
            "optim_wrapper.optimizer.lr": r.lr,
            "optim_wrapper.paramwise_cfg": {"num_layers": a.depth, "layer_decay_rate": r.layer_decay},
            "param_scheduler.0.end": r.warmup_iterations,
            "param_scheduler.1.begin": r.warmup_iterations,
            "param_scheduler.1.end": r.iterations,
            "train_cfg.max_iters": r.iterations,
            "train_cfg.val_interval": r.iterations,
        }
    )  # fmt: skip
    return config


def our_parts(seed: int) -> Any:
    """Register the order and the seeds of ours with mmsegmentation; returns a hook that seeds its steps and watches
    them."""
    register()
    from mmengine.hooks import Hook
    from mmseg.datasets import ADE20KDataset
    from mmseg.registry import DATA_SAMPLERS, DATASETS

    class OurOrder(Sampler):
        def __init__(self, dataset: Any, batch: int, steps: int, **_: Any) -> None:
            self.stream = TrainingStream(len(dataset), batch, batch, seed, 0, steps)

        def __len__(self) -> int:
            return len(self.stream) * self.stream.batch

        def __iter__(self) -> Iterator[Sample]:
            for samples in self.stream:
                yield from samples

    class OurSeeds(ADE20KDataset):
        def __getitem__(self, sample: Sample) -> dict:
            seed_all(seed, sample.position)
            return super().__getitem__(sample.index)

    class Watching(Hook):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.rates: list[float] = []
            self.metrics: dict[str, float] = {}

        def before_train(self, runner: Any) -> None:
            in_float64(runner.model)

        def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
            self.rates.append(max(group["lr"] for group in runner.optim_wrapper.optimizer.param_groups))
            seed_all(seed, runner.iter, 0)

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            self.losses.append(float(outputs["loss"]))

        def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
            self.metrics = metrics

    DATA_SAMPLERS.register_module(name="OurOrder", module=OurOrder, force=True)
    DATASETS.register_module(name="OurSeeds", module=OurSeeds, force=True)
    return Watching()
