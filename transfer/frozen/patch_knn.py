"""k nearest neighbours on the patches of a frozen encoder: each pixel gets the class that is most frequent at its place
in the nearest training patches, as CAPI evaluates (Darcet et al., arXiv 2502.08769)."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mae_core import distributed
from mae_core.data import seed_for
from mae_core.decode import read_image
from mae_core.errors import UserError
from mae_core.outputs import forward
from mae_core.progress import Progress
from mae_core.settings import as_typed, bounded, check_ranges, choose
from mae_core.space import FLOAT, GIB
from mae_core.vit import get_arch
from transfer.data.inputs import input_objections
from transfer.data.miou import columns_of, metrics_of, scores
from transfer.data.predictions import MAIN, names_of, write_predictions
from transfer.frozen.encoder import Tokens, frozen_encoder
from transfer.frozen.features import flops
from transfer.frozen.scenes import ADE20K, VOID, Pair, areas_of, readable
from transfer.task import Job, Objection, Part, Result

CAPI = "facebookresearch/capi eval_segmentation.py and default_eval_config.yaml"
DISTANCES = ("cosine", "L2")
QUERIES, KEYS = 1024, 131072  # patches compared at a time


@dataclass(frozen=True, kw_only=True)
class PatchKnnRecipe:
    """image_size: side to which images and labels are scaled, whatever their shape. ks: numbers of neighbours; the one
    that counts, and the distance (cosine or L2), are chosen on held_out, a share of the training images."""

    image_size: int = bounded(1)
    ks: tuple[float, ...] = bounded(1, default=(1.0, 3.0, 10.0, 30.0))
    held_out: float = bounded(1e-6, 0.5, default=0.1)

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.ks or any(k % 1 for k in self.ks):
            raise UserError(f"ks={as_typed(self.ks)}: give whole numbers of neighbours")


def recipe(arch: str, name: str) -> PatchKnnRecipe:
    patch = get_arch(arch).patch
    paper = PatchKnnRecipe(image_size=224 - 224 % patch)
    return choose("recipe", name, {"paper": paper, "mini": replace(paper, image_size=48 - 48 % patch)})


def sources(arch: str) -> dict[str, str]:
    return {field.name: CAPI for field in fields(PatchKnnRecipe)}


class Patches:
    """Patches in the order of their images: features [P, D] float32, and labels [P, side * side] uint8."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def scale(self, mean: Tensor, std: Tensor) -> None:
        """In place: all of ADE20K's take 11 GiB at a width of 768."""
        self.features.sub_(mean).div_(std)

    @cached_property
    def voting(self) -> Tensor:
        """Those whose most frequent label is a class: bool [P]."""
        return most_frequent(self.labels) != VOID


def patches_of(job: Job, tokens: Tokens, pairs: Sequence[Pair], what: str) -> Patches:
    """All processes compute some images, and each gets all of them."""
    side, patch = job.recipe.image_size, get_arch(job.checkpoint.arch).patch
    size = job.machine.micro_batch or 32
    batches = distributed.local_batches(len(pairs), size)
    progress = Progress(f"{job.task.name} {what}", len(pairs), enabled=distributed.is_main())
    found, done = [], 0
    for batch in batches:
        images, labels = zip(*(pixels_of(pairs[index], side) for index in batch))
        with torch.inference_mode():
            parts, size = forward(tokens, torch.stack(images), job.checkpoint.normalization, job.machine, size)
        if not parts.isfinite().all():
            raise UserError(f"{job.checkpoint.name} gives features that are not finite")
        cut = torch.stack(labels).unfold(1, patch, patch).unfold(2, patch, patch)  # [B, h, w, patch, patch]
        found.append((parts[:, -1, 1:].cpu().numpy(), cut.flatten(3).flatten(1, 2).numpy()))
        done += len(batch)
        progress.update(min(len(pairs), done * distributed.world_size()), len(batch))
    batched = distributed.gather_in_turn(found)
    del found
    _, patches, width = batched[0][0].shape
    whole = Patches(
        torch.empty(len(pairs) * patches, width), torch.empty(len(pairs) * patches, patch**2, dtype=torch.uint8)
    )
    end = len(whole.features)
    while batched:  # from the end on, so that each is freed once it is copied
        features, classes = (torch.from_numpy(one).flatten(0, 1) for one in batched.pop())
        start = end - len(features)
        whole.features[start:end], whole.labels[start:end] = features, classes
        end = start
    return whole


def pixels_of(pair: Pair, side: int) -> tuple[Tensor, Tensor]:
    """The image uint8 [3, side, side], bicubic, and its label [side, side], nearest."""
    from torchvision.transforms.v2.functional import pil_to_tensor

    image = readable(pair[0], read_image).resize((side, side), Image.Resampling.BICUBIC)
    label = Image.fromarray(readable(pair[1], ADE20K.label)).resize((side, side), Image.Resampling.NEAREST)
    return pil_to_tensor(image), torch.from_numpy(np.array(label))


def neighbours(train: Patches, queries: Tensor, k: int, distance: str, device: str) -> Tensor:
    """The places [Q, k] in `train` of the k voting patches that are nearest to each of queries [Q, D], the nearest
    first. Keys go to the device once, KEYS at a time. What is kept there of all queries takes at most 48 bytes for each
    neighbour, while two blocks' are merged: 0.6 GB for the 396,116 patches of ADE20K's held-out images and k=30."""
    near = torch.empty(len(queries), 0, device=device)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for start in range(0, len(train.features), KEYS):
        voters = start + train.voting[start : start + KEYS].nonzero()[:, 0]
        if not len(voters):
            continue
        keys, places = train.features[voters].to(device), voters.to(device)
        found = [closest(query.to(device), keys, min(k, len(keys)), distance) for query in queries.split(QUERIES)]
        near = torch.cat([near, torch.cat([closeness for closeness, _ in found])], dim=1)
        index = torch.cat([index, places[torch.cat([rows for _, rows in found])]], dim=1)
        near, best = near.topk(min(k, near.shape[1]), dim=1)
        index = index.gather(1, best)
    return index.cpu()


def closest(query: Tensor, keys: Tensor, k: int, distance: str) -> tuple[Tensor, Tensor]:
    """The closeness and the rows, both [Q, k], of the k of keys [K, D] that are nearest to each of query [Q, D]."""
    if distance == "L2":
        return (-torch.cdist(query, keys)).topk(k, dim=1)
    normalize = torch.nn.functional.normalize
    return (normalize(query, dim=1) @ normalize(keys, dim=1).T).topk(k, dim=1)


def vote(labels: Tensor, index: Tensor) -> Tensor:
    """The class of each pixel [Q, side * side]: the most frequent in the patches [Q, k] at these places of labels."""
    return torch.cat([most_frequent(labels[part]) for part in index.split(QUERIES)])


def most_frequent(labels: Tensor) -> Tensor:
    """The most frequent of labels (uint8) along their second dimension. Of equals it is VOID, else the lowest, as in
    CAPI, where pixels without a class are of class 0."""
    return (labels + 1).mode(dim=1).values - 1  # in uint8, where VOID + 1 is 0


def areas_by_image(classes: Tensor, patches: Patches, images: int) -> np.ndarray:
    pairs = zip(classes.reshape(images, -1).numpy(), patches.labels.reshape(images, -1).numpy())
    return np.stack([areas_of(*pair, ADE20K.classes) for pair in pairs])


def held_of(r: PatchKnnRecipe, images: int) -> int:
    """How many of the training images are held out."""
    return max(1, int(images * r.held_out + 1e-9))


def patch_knn(job: Job) -> Result:
    """mIoU of the validation images at the recipe's size, with the neighbours and distance that are best on held-out
    training images; they then vote too."""
    started, r, device = time.monotonic(), job.recipe, job.machine.device
    train, val = (ADE20K.of(job, split) for split in ("train", "val"))
    encoder, load = frozen_encoder(job)
    tokens = Tokens(encoder, norm=True)
    order = np.random.default_rng(seed_for(job.seed)).permutation(len(train))
    count = held_of(r, len(train))
    known = patches_of(job, tokens, [train[i] for i in order], "train")
    cut = count * len(known.features) // len(train)
    held, kept = (Patches(known.features[part], known.labels[part]) for part in (slice(cut), slice(cut, None)))
    std, mean = torch.std_mean(kept.features, dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    known.scale(mean, std)  # and so the parts of it
    voting, grid = int(kept.voting.sum()), list(product(map(int, r.ks), DISTANCES))
    widest = max(k for k, _ in grid)
    if voting < widest:
        raise UserError(f"ks={as_typed(r.ks)}, but only {voting} training patches have a class")
    near = {distance: neighbours(kept, held.features, widest, distance, device) for distance in DISTANCES}
    tried = {}
    for k, distance in grid:
        classes = vote(kept.labels, near[distance][:, :k])
        tried[k, distance] = float(metrics_of(areas_by_image(classes, held, count).sum(axis=0))["miou"])
    k, distance = max(tried, key=lambda choice: tried[choice])
    test = patches_of(job, tokens, val, "val")
    test.scale(mean, std)
    classes = vote(known.labels, neighbours(known, test.features, k, distance, device))
    areas = areas_by_image(classes, test, len(val))
    return Result(
        *scores(areas),
        n_eval=len(val),
        images_seen=len(train) + len(val),
        seconds=time.monotonic() - started,
        tables={"held_out_miou": {f"k={k}, {distance}": round(miou, 4) for (k, distance), miou in tried.items()}},
        predictions=write_predictions(job.work, {MAIN: columns_of(names_of([image for image, _ in val]), areas)}),
        resolved={
            "load": load,
            "neighbours": k,
            "distance": distance,
            "held_out_images": count,
            "voting_patches": int(known.voting.sum()),
            "feature": "patch tokens after the final norm, standardised",
        },
    )


def objections(job: Job) -> Iterator[Objection]:
    yield from input_objections(job)
    if job.data.status == "found" and job.data.counts["train"] < 2:
        yield "held_out", "one training image cannot be shared out: give more"


def parts(job: Job) -> tuple[Part, ...]:
    """The features and the search, which a record times together: a product of two patches' features for each pair that
    is compared, of the held-out patches by either distance, as if all patches voted."""
    r, a, train, val = job.recipe, get_arch(job.checkpoint.arch), job.data.counts["train"], job.data.counts["val"]
    held, images = held_of(r, train), train + val
    compared = (len(DISTANCES) * held * (train - held) + val * train) * (r.image_size // a.patch) ** 4
    kind = f"neighbours of patches, {train} and {val} images, {r.image_size} px"
    return (Part(kind, images, 1 + 2 * a.dim * compared / flops(job) / images),)


def detail(job: Job) -> str:
    """What the plan says about the data, and of the memory that they take if it is much."""
    a, counts = get_arch(job.checkpoint.arch), job.data.counts
    patches = sum(counts[split] for split in ("train", "val")) * (job.recipe.image_size // a.patch) ** 2
    gib = patches * (a.dim * FLOAT + a.patch**2) / GIB
    return job.data.detail + (f"; {gib:.1f} GiB of memory for the features of their patches" if gib >= 1 else "")
