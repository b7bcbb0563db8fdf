"""The target of a recipe: fitted on the images or read from the user's file where it has to be."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from mae_core import distributed
from mae_core.checkpoint import CheckpointError, check_shapes, read_file, save_weights, sha256_of
from mae_core.dalle import read_dalle
from mae_core.data import Images, Sample, normalize, pretraining_transform, seed_for
from mae_core.errors import UserError
from mae_core.patches import patchify
from mae_core.recipe import PretrainRecipe
from mae_core.targets import KMeansTokenizer, PCATarget, PixelTarget, Target, TokenTarget, fit_kmeans, fit_pca

TARGET_FILE = "target.safetensors"
PATCHES_PER_IMAGE = 20


def make_target(r: PretrainRecipe, patch: int, images: Images, seed: int, out: Path, tokenizer: Path | None) -> Target:
    """The target module. What is fitted is kept as target.safetensors in `out`, and read from there if it is of the
    same recipe, seed and images. Every process gets the same one. UserError for a tokenizer file that is missing or
    not needed."""
    if (r.target == "tokens" and r.tokenizer == "dall-e") != (tokenizer is not None):
        wanted = "--tokenizer FILE is needed by tokenizer=dall-e, and by nothing else"
        raise UserError(f"{wanted}: the state dict of DALL-E's encoder (docs/pretraining.md says how to make it)")
    if r.target == "pixels":
        return PixelTarget(patch, r.norm_pix)
    if tokenizer is not None:
        module, vocabulary = read_dalle(tokenizer, (r.image_size // patch,) * 2)
        return TokenTarget(module, vocabulary)
    path = out / TARGET_FILE
    identity = {"recipe": [r.target, r.fit_images, r.image_size, r.augmentation, r.min_scale], "seed": seed}
    identity |= {"size": r.pca_components if r.target == "pca" else r.vocabulary, "patch": patch}
    identity["images"] = hashlib.sha256(b"\n".join(images.files.tolist())).hexdigest()
    fitted_on = json.dumps(identity, sort_keys=True)
    if distributed.is_main() and not (path.exists() and read_target(path)[1].get("identity") == fitted_on):
        save_weights(path, fit(r, patch, images, seed).state_dict(), {"identity": fitted_on})
    distributed.barrier()
    tensors, _ = read_target(path)
    values = 3 * patch**2
    pca = {"mean": (values,), "components": (r.pca_components, values)}
    shapes = pca if r.target == "pca" else {"tokenizer.centres": (r.vocabulary, values)}
    check_shapes(str(path), tensors, shapes, "its target")
    if r.target == "pca":
        return PCATarget(tensors["mean"], tensors["components"])
    return TokenTarget(KMeansTokenizer(patch, tensors["tokenizer.centres"]), r.vocabulary)


def read_target(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a kept target; UserError if it is damaged."""
    try:
        return read_file(path)
    except CheckpointError:
        raise UserError(f"{path} is damaged: delete it, and it is fitted again") from None


def fit(r: PretrainRecipe, patch: int, images: Images, seed: int) -> Target:
    transform = pretraining_transform(r.image_size, r.min_scale, r.augmentation)
    patches = sample_patches(Images(images.files.tolist(), transform, seed=images.seed), patch, r.fit_images, seed)
    print(f"fitting {r.target} on {len(patches)} patches of {min(r.fit_images, len(images))} images", flush=True)
    if r.target == "pca":
        return fit_pca(patches, r.pca_components)
    return fit_kmeans(patches, patch, r.vocabulary, seed)


def sample_patches(images: Images, patch: int, count: int, seed: int) -> Tensor:
    """PATCHES_PER_IMAGE random patches (all, if there are fewer) of `count` random images, augmented as in training:
    [M, P]. Files that cannot be read are left out."""
    generator = torch.Generator().manual_seed(seed_for(seed, 2) % 2**63)
    found = []
    for index in torch.randperm(len(images), generator=generator)[:count].tolist():
        image, _, bad = images[Sample(index, index)]
        patches = patchify(normalize(image[None]), patch)[0]
        picked = torch.randperm(len(patches), generator=generator)[:PATCHES_PER_IMAGE]
        if not bad:
            found.append(patches[picked])
    if not found:
        raise UserError("none of the images that a target is fitted on can be read: mend them")
    return torch.cat(found)


def tokenizer_sha256(tokenizer: Path | None) -> str:
    return sha256_of(tokenizer) if tokenizer is not None and tokenizer.is_file() else ""
