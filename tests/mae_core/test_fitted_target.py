from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mae_core.checkpoint import read_file, save_weights
from mae_core.data import Images, Sample, normalize, pretraining_transform
from mae_core.errors import UserError
from mae_core.fitted_target import PATCHES_PER_IMAGE, TARGET_FILE, make_target, sample_patches
from mae_core.listing import list_images
from mae_core.patches import patchify
from mae_core.recipe import recipe


def as_rows(patches):
    return {tuple(row) for row in patches.reshape(-1, patches.shape[-1])[:, :4].tolist()}


def test_patches_are_of_augmented_images_and_seeded(noise_images):
    images = Images(list_images(noise_images), pretraining_transform(48), seed=0)
    patches = sample_patches(images, 8, 10, seed=3)
    assert patches.shape == (10 * PATCHES_PER_IMAGE, 192)
    assert torch.equal(patches, sample_patches(images, 8, 10, seed=3))
    assert not torch.equal(patches, sample_patches(images, 8, 10, seed=4))
    everything = as_rows(torch.cat([patchify(normalize(images[Sample(i, i)][0][None]), 8)[0] for i in range(64)]))
    assert as_rows(patches) <= everything
    assert len(as_rows(patches)) == len(patches)  # none twice
    assert len(sample_patches(images, 24, 99, seed=0)) == 64 * 4  # all there are


def test_unreadable_images_are_left_out(noise_images, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    files = [*list_images(noise_images)[:2], tmp_path / "broken.png"]
    assert len(sample_patches(Images(files, pretraining_transform(48)), 8, 3, seed=0)) == 2 * PATCHES_PER_IMAGE
    with pytest.raises(UserError, match="none of the images that a target is fitted on can be read"):
        sample_patches(Images([Path("nowhere.png")], pretraining_transform(48)), 8, 3, seed=0)


def test_a_kept_target_that_is_cut_short_or_has_another_shape_is_a_sentence(noise_images, tmp_path):
    r = replace(recipe("vit_mini_patch8", "mini"), target="pca", pca_components=8, fit_images=4)
    images = Images(list_images(noise_images), pretraining_transform(48), seed=0)
    make_target(r, 8, images, 0, tmp_path, None)
    path = tmp_path / TARGET_FILE
    tensors, metadata = read_file(path)
    save_weights(path, {**tensors, "components": tensors["components"][:4]}, metadata)
    with pytest.raises(
        UserError, match=r"target\.safetensors: components is \[4, 192\] where its target has \[8, 192\]"
    ):
        make_target(r, 8, images, 0, tmp_path, None)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"target\.safetensors is damaged: delete it, and it is fitted again"):
        make_target(r, 8, images, 0, tmp_path, None)
    path.unlink()
    assert len(make_target(r, 8, images, 0, tmp_path, None).components) == 8
