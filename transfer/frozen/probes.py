"""Many probes in one pass: linear and attentive heads over rates, blocks and poolings train on the same tokens of a
frozen encoder, and the one that counts is chosen on a held-out part of the training images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mae_core import distributed
from mae_core.data import PILLOW_PIXELS, TORCHVISION_PIXELS, Images, seed_for
from mae_core.errors import UserError
from mae_core.loop import batch_objections, batch_within, batchnorm_objections
from mae_core.outputs import outputs_of
from mae_core.settings import as_typed, bounded, check_ranges, choose
from mae_core.space import Space, training_space
from mae_core.training import unreadable_metadata
from mae_core.vit import get_arch
from transfer.data.findings import Data
from transfer.data.imagenet import wnids
from transfer.data.inputs import evaluation, input_objections, of_all, training_images
from transfer.data.predictions import MAIN, names_of, write_predictions
from transfer.data.split import Split
from transfer.data.transforms import eval_transform, train_transform
from transfer.frozen.encoder import Tokens, epoch_rate, frozen_encoder, imagenet_of, train_heads
from transfer.frozen.heads import AttentiveProbe, LinearProbe
from transfer.miniature.imagenet import miniature_size
from transfer.run import origin, save_trained
from transfer.task import Job, Objection, Part, Result

DINOV2 = "facebookresearch/dinov2 dinov2/eval/linear.py"
HELD_OUT = "held_out"  # the set that the head is chosen on
PROBES_FILE = "probes.safetensors"
LINEAR, ATTENTIVE = "linear", "attentive"


@dataclass(frozen=True, kw_only=True)
class ProbesRecipe:
    """A linear head for each of rates, of last_blocks (how many blocks' class tokens it gets) and with and without the
    mean of the patch tokens; an attentive one ("ep", `queries`) for each of attentive_rates. Rates are before scaling,
    as base_lr. held_out: the share of the training images on which the head is chosen."""

    image_size: int = bounded(1)
    rates: tuple[float, ...] = bounded(0)
    last_blocks: tuple[float, ...] = bounded(1)
    attentive_rates: tuple[float, ...] = bounded(0)
    queries: int = bounded(1, default=32)
    held_out: float = bounded(1e-6, 0.5)
    epochs: int = bounded(1)
    warmup_epochs: int = bounded(0, default=0)
    batch: int = bounded(1)
    momentum: float = bounded(0, 1, below=True, default=0.9)
    trust_coefficient: float = bounded(0, default=0.001)
    min_scale: float = bounded(0, 1, default=0.08)
    train_fraction: float = bounded(1e-6, 1, default=1.0)

    def __post_init__(self) -> None:
        check_ranges(self)
        if any(n % 1 for n in self.last_blocks) or not self.rates or not self.last_blocks:
            raise UserError(f"last_blocks={as_typed(self.last_blocks)}: give whole numbers, and at least one rate")


def recipe(arch: str, name: str) -> ProbesRecipe:
    """DINOv2's 52 linear heads by SGD, whose 12,500 iterations are 10 epochs of ImageNet, and four attentive ones."""
    paper = ProbesRecipe(
        image_size=get_arch(arch).image_size,
        rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1),
        last_blocks=(1.0, 4.0),
        attentive_rates=(0.025, 0.05, 0.1, 0.2),
        held_out=0.01,
        epochs=10,
        batch=1024,
    )
    # The absolute rates stay but for factors of 4: base rates are times batch / 256.
    rates = tuple(4 * rate for rate in paper.rates)
    attentive = tuple(16 * rate for rate in paper.attentive_rates)
    little: dict[str, Any] = {"rates": rates, "attentive_rates": attentive, "held_out": 0.2, "epochs": 40, "batch": 128}
    mini = replace(paper, **little, **miniature_size(arch))
    return choose("recipe", name, {"paper": paper, "mini": mini})


def sources(arch: str) -> dict[str, str]:
    ours = "ours: DINOv2 chooses on the test images, its leaderboard by the epoch too"
    found = {field.name: DINOV2 for field in fields(ProbesRecipe)} | {"held_out": ours}
    attentive = "billpsomas/efficient-probing, for a quarter, half, once and twice its rate; without its warm-up"
    return found | dict.fromkeys(("attentive_rates", "queries", "trust_coefficient"), attentive)


class Probes(nn.Module):
    """`Tokens` [B, blocks, 1 + N, D] -> the logits of all heads [B, heads, classes]. groups: for the optimizer."""

    def __init__(self, r: ProbesRecipe, dim: int, classes: int) -> None:
        super().__init__()
        self.names: list[str] = []
        self.groups: list[dict] = []
        heads: list[nn.Module] = []
        for n in map(int, r.last_blocks):
            for mean in (False, True):
                for rate in r.rates:
                    heads.append(LinearProbe(dim, classes, n, mean))
                    self.names.append(f"{LINEAR}, {n} blocks{', mean of patches' * mean}, rate {rate:g}")
                    self.groups.append({"params": list(heads[-1].parameters()), "lr_scale": rate})
        for rate in r.attentive_rates:
            heads.append(AttentiveProbe("ep", dim, classes, r.queries))
            self.names.append(f"{ATTENTIVE}, rate {rate:g}")
            for adapt in (True, False):  # as `lars`: a trust ratio for matrices only
                some = [p for p in heads[-1].parameters() if (p.ndim > 1) == adapt]
                self.groups.append({"params": some, "lr_scale": rate, "always_adapt": adapt})
        self.heads = nn.ModuleList(heads)

    def forward(self, tokens: Tensor) -> Tensor:
        mean = tokens[:, -1, 1:].mean(dim=1)  # once: it costs more than a linear head
        given = ((head, (tokens, mean) if isinstance(head, LinearProbe) else (tokens,)) for head in self.heads)
        return torch.stack([head(*inputs) for head, inputs in given], dim=1)


class Winners(nn.Module):
    """The class that each head gives [B, heads], as float32, which holds it exactly."""

    def __init__(self, probes: nn.Module) -> None:
        super().__init__()
        self.probes = probes

    def forward(self, tokens: Tensor) -> Tensor:
        return self.probes(tokens).argmax(dim=2).float()


def without_held_out(train: Split, share: float, seed: int) -> tuple[Split, Split]:
    """The images that are trained on, and those that the head is chosen on, drawn by the seed."""
    order = np.random.default_rng(seed_for(seed)).permutation(len(train.files))
    count = max(1, int(len(order) * share + 1e-9))
    parts = [sorted(order[count:].tolist()), sorted(order[:count].tolist())]
    kept, held = (Split(tuple(train.files[i] for i in p), tuple(train.labels[i] for i in p)) for p in parts)
    return kept, held


def loss(probes: nn.Module, tokens: Tensor, labels: Tensor) -> Tensor:
    """The sum of the heads' losses, so that each is trained as if alone."""
    logits = probes(tokens).float()
    heads = logits.shape[1]
    return heads * nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(heads))


def chosen(names: Sequence[str], held: np.ndarray, test: np.ndarray) -> tuple[dict[str, float], dict[str, int]]:
    """Metrics in percent, and which head `top1`, `top1_linear` and `top1_attentive` are of.

    names: of the heads. held, test: which images each head gets right, [images, heads]. The head is the best on the
    held-out images, the first of equals. top1_best_on_test is the best linear head on the test images, as DINOv2's
    numbers are, which is no result; optimism: by how much it is above top1_linear.
    """
    on_held, on_test = held.mean(axis=0), 100 * test.mean(axis=0)
    kinds = {f"_{kind}": [i for i, name in enumerate(names) if name.startswith(kind)] for kind in (LINEAR, ATTENTIVE)}
    places = {"": list(range(len(names)))} | {kind: heads for kind, heads in kinds.items() if heads}
    of = {f"top1{kind}": max(heads, key=lambda i: (on_held[i], -i)) for kind, heads in places.items()}
    metrics = {name: float(on_test[head]) for name, head in of.items()}
    best = float(on_test[places[f"_{LINEAR}"]].max())
    return metrics | {"top1_best_on_test": best, "optimism": best - metrics[f"top1_{LINEAR}"]}, of


def probes(job: Job) -> Result:
    """Train all heads at once; the number is that of the last epoch, of the head that was chosen on training images."""
    from timm.optim import Lars

    r, (train, val) = job.recipe, imagenet_of(job)
    kept, held = without_held_out(train, r.held_out, job.seed)
    encoder, load = frozen_encoder(job)
    tokens = Tokens(encoder, int(max((*r.last_blocks, 1))), norm=True)
    heads = Probes(r, get_arch(job.checkpoint.arch).dim, len(wnids())).to(job.machine.device)
    dataset = Images(kept.files, train_transform(r.image_size, r.min_scale, ""), kept.labels, seed=job.seed)
    optimizer = Lars(heads.groups, lr=0.0, momentum=r.momentum, trust_coeff=r.trust_coefficient)
    state, checksum = train_heads(
        job, tokens, heads, dataset, optimizer, loss, epoch_rate(r, len(dataset), 1.0), r.epochs
    )
    model = nn.Sequential(tokens, Winners(heads))
    sets: dict[str, dict[str, Any]] = {}
    right: dict[str, np.ndarray] = {}
    for name, split in ((MAIN, val), (HELD_OUT, held)):
        scored = Images(split.files, eval_transform(r.image_size), split.labels, pillow=True)
        label = f"{job.task.name} {name}".strip()
        rows = outputs_of(model, scored, job.checkpoint.normalization, job.machine, label)
        classes = np.concatenate(distributed.gather_in_turn([found.cpu().numpy() for found, _ in rows]))
        labels = np.array(split.labels, np.int32)
        right[name] = classes == labels[:, None]
        sets[name] = {"image": names_of(split.files), "label": labels, "heads": classes.astype(np.int32)}
    metrics, of = chosen(heads.names, right[HELD_OUT], right[MAIN])
    sets[MAIN]["top1"] = sets[MAIN]["heads"][:, of["top1"]]
    share = {name: right[name].mean(axis=0) for name in right}
    accuracies = {name: share[MAIN][head] for name, head in of.items()}
    errors = {name: 100 * float(np.sqrt(p * (1 - p) / len(val.files))) for name, p in accuracies.items()}
    metadata = origin(job) | {"image_size": str(r.image_size)} | unreadable_metadata(state)
    return Result(
        metrics,
        errors,
        len(val.files),
        images_seen=state.step * r.batch,
        seconds=state.seconds,
        artifacts=save_trained(job, PROBES_FILE, heads.state_dict(), metadata),
        predictions=write_predictions(job.work, sets),
        tables={
            "heads": {
                name: {"held_out": round(100 * float(a), 4), "top1": round(100 * float(b), 4)}
                for name, a, b in zip(heads.names, share[HELD_OUT], share[MAIN])
            }
        },
        notes=state.notes,
        resolved={
            "heads": heads.names,  # in the order of the predictions, which a table of the record has not
            "chosen": {name: heads.names[i] for name, i in of.items()},
            "held_out_images": len(held.files),
            "load": load,
            "train_images": len(kept.files),
            "train_pixels": TORCHVISION_PIXELS,
            "val_pixels": PILLOW_PIXELS,
            "feature": "tokens of the last blocks after the final norm",
            "batchnorm_batch": state.micro_batch,
            "backbone_sha256": checksum,
        },
    )


def trained_on(job: Job) -> int:
    images = training_images(job)
    return images - max(1, int(images * job.recipe.held_out + 1e-9))


def few(r: ProbesRecipe, data: Data) -> ProbesRecipe:
    """The recipe with a batch that the few images of --limit fill."""
    images = int(data.counts["train"] * r.train_fraction)
    return replace(r, batch=batch_within(r.batch, images - max(1, int(images * r.held_out + 1e-9))))


def objections(job: Job) -> Iterator[Objection]:
    r, machine, arch = job.recipe, job.machine, get_arch(job.checkpoint.arch)
    yield from input_objections(job)
    if r.attentive_rates and arch.dim % r.queries:
        yield "queries", f"queries={r.queries} share the {arch.dim} channels of {arch.name}: set a divisor"
    if max((*r.last_blocks, 1)) > arch.depth:
        yield "last_blocks", f"last_blocks={as_typed(r.last_blocks)}: {arch.name} has {arch.depth}"
    if job.data.status == "found":
        part = f"{of_all(job)} without the held-out ones"
        yield from batch_objections(trained_on(job), r.batch, machine.processes, part)
    if r.batch % machine.processes == 0:
        yield from batchnorm_objections(r.batch // machine.processes, machine)


def space(job: Job) -> Space:
    with torch.device("meta"):
        heads = Probes(job.recipe, get_arch(job.checkpoint.arch).dim, len(wnids()))
    numbers = sum(p.numel() for p in heads.parameters())
    return training_space(job.work, numbers, numbers, moments=1)


def parts(job: Job) -> tuple[Part, ...]:
    r, images = job.recipe, trained_on(job)
    kind = f"{len(r.rates) * len(r.last_blocks) * 2} + {len(r.attentive_rates)} probes, {r.image_size} px"
    tested = job.data.counts["val"] + training_images(job) - images
    return Part(f"{kind}, {job.recipe_name}", images // r.batch * r.batch * r.epochs), evaluation(r.image_size, tested)
