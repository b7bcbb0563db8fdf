"""Attentive probing: a pooling by attention and a linear layer, trained on the patch tokens of a frozen encoder."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from mae_core.data import PILLOW_PIXELS, TORCHVISION_PIXELS, Images
from mae_core.loop import batch_objections, batchnorm_objections
from mae_core.optim import lars
from mae_core.settings import bounded, check_ranges, choose
from mae_core.space import Space, training_space
from mae_core.training import unreadable_metadata
from mae_core.vit import get_arch
from transfer.data.imagenet import wnids
from transfer.data.inputs import evaluation, input_objections, of_all, training_images
from transfer.data.predictions import MAIN, write_predictions
from transfer.data.scores import evaluate
from transfer.data.transforms import eval_transform, probe_transform
from transfer.frozen.encoder import IMAGES_OF_A_GPU, Tokens, epoch_rate, frozen_encoder, imagenet_of, train_heads
from transfer.frozen.heads import POOLINGS, AttentiveProbe
from transfer.miniature.imagenet import miniature_size
from transfer.run import origin, save_trained
from transfer.task import Job, Objection, Part, Result

SOURCE = "billpsomas/efficient-probing, the commands and logs of its MAE rows"
PROBE_FILE = "probe.safetensors"


@dataclass(frozen=True, kw_only=True)
class AttnProbeRecipe:
    """head: "ep" (efficient probing), "vjepa" or "abmilp". queries: of "ep". norm: whether the tokens go through the
    encoder's final norm. train_fraction: the share of the training images that is used (`Split.share`)."""

    image_size: int = bounded(1)
    head: str = "ep"
    queries: int = bounded(1, default=32)
    norm: bool = False
    epochs: int = bounded(1)
    warmup_epochs: int = bounded(0)
    batch: int = bounded(1)
    base_lr: float = bounded(0)
    min_lr: float = bounded(0, default=0.0)
    momentum: float = bounded(0, 1, below=True, default=0.9)
    trust_coefficient: float = bounded(0, default=0.001)
    min_scale: float = bounded(0, 1, default=0.08)
    train_fraction: float = bounded(1e-6, 1, default=1.0)

    def __post_init__(self) -> None:
        check_ranges(self)
        choose("head", self.head, POOLINGS)


def recipe(arch: str, name: str) -> AttnProbeRecipe:
    """LARS for 90 epochs, as MAE's linear probe, but with a batch of 4096. "mini" keeps the absolute rate."""
    paper = AttnProbeRecipe(image_size=get_arch(arch).image_size, epochs=90, warmup_epochs=10, batch=4096, base_lr=0.1)
    mini = replace(paper, epochs=40, warmup_epochs=4, batch=256, base_lr=1.6, **miniature_size(arch))
    return choose("recipe", name, {"paper": paper, "mini": mini})


def sources(arch: str) -> dict[str, str]:
    code = dict.fromkeys(("min_lr", "momentum", "trust_coefficient", "min_scale", "norm"), "its code's defaults")
    return {f.name: f"{SOURCE}{f'; {code[f.name]}' if f.name in code else ''}" for f in fields(AttnProbeRecipe)}


def probe_of(job: Job) -> AttentiveProbe:
    r = job.recipe
    return AttentiveProbe(r.head, get_arch(job.checkpoint.arch).dim, len(wnids()), r.queries)


def attnprobe(job: Job) -> Result:
    """Train the probe; the number is that of the last epoch."""
    r, (train, val) = job.recipe, imagenet_of(job)
    encoder, load = frozen_encoder(job)
    tokens, probe = Tokens(encoder, norm=r.norm), probe_of(job).to(job.machine.device)
    dataset = Images(train.files, probe_transform(r.image_size, r.min_scale), train.labels, seed=job.seed)
    optimizer = lars(probe, r.momentum, r.trust_coefficient, weight_decay=0.0)
    rate = epoch_rate(r, len(dataset), r.base_lr, r.min_lr)
    state, checksum = train_heads(job, tokens, probe, dataset, optimizer, loss, rate, r.epochs)
    model, transform = nn.Sequential(tokens, probe), eval_transform(r.image_size)
    scores = evaluate(model, val, transform, job.checkpoint.normalization, job.machine, job.task.name)
    metadata = origin(job) | {"head": r.head, "image_size": str(r.image_size)} | unreadable_metadata(state)
    seen, official = state.micro_batch, min(IMAGES_OF_A_GPU, r.batch)
    return Result(
        *scores.metrics(),
        len(val.files),
        images_seen=state.step * r.batch,
        seconds=state.seconds,
        artifacts=save_trained(job, PROBE_FILE, probe.state_dict(), metadata),
        predictions=write_predictions(job.work, {MAIN: scores.columns()}),
        notes=state.notes + (f"BatchNorm saw batches of {seen}, not of {official}",) * (seen != official),
        resolved={
            "load": load,
            "train_images": len(train.files),
            "train_pixels": TORCHVISION_PIXELS,
            "val_pixels": PILLOW_PIXELS,
            "feature": f"patch tokens after the last block, {'after' if r.norm else 'before'} the final norm",
            "trained_parameters": sum(p.numel() for p in probe.parameters()),
            "batchnorm_batch": seen,
            "backbone_sha256": checksum,
        },
    )


def loss(probe: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(probe(tokens).float(), labels)


def objections(job: Job) -> Iterator[Objection]:
    r, machine, dim = job.recipe, job.machine, get_arch(job.checkpoint.arch).dim
    yield from input_objections(job)
    if r.head == "ep" and dim % r.queries:
        yield "queries", f"queries={r.queries} share the {dim} channels of {job.checkpoint.arch}: set a divisor"
    if job.data.status == "found":
        yield from batch_objections(training_images(job), r.batch, machine.processes, of_all(job))
    if r.batch % machine.processes == 0:
        yield from batchnorm_objections(r.batch // machine.processes, machine)


def space(job: Job) -> Space:
    with torch.device("meta"):
        numbers = sum(p.numel() for p in probe_of(job).parameters())
    return training_space(job.work, numbers, numbers, moments=1)


def parts(job: Job) -> tuple[Part, ...]:
    """The backward pass ends at the tokens: an image costs a forward pass."""
    r = job.recipe
    images = training_images(job) // r.batch * r.batch * r.epochs
    kind = f"{r.head} probe, {r.image_size} px, {job.recipe_name}"
    return Part(kind, images), evaluation(r.image_size, job.data.counts["val"])
