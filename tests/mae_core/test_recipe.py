"""The pre-training recipe: which words and which combinations it takes."""

from dataclasses import asdict, replace

import pytest

from mae_core.errors import UserError
from mae_core.recipe import MINI_FIELDS, PretrainRecipe, recipe
from mae_core.settings import override

PLAIN = replace(PretrainRecipe(), norm_pix=False)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"masking": "blocks"}, r"unknown masking 'blocks'; did you mean block\?"),
        ({"target": "pixel"}, r"unknown target 'pixel'; did you mean pixels\?"),
        ({"loss_on": "hidden"}, r"unknown loss_on 'hidden'; known: masked, all"),
        ({"augmentation": "crop, randm size"}, r"did you mean crop, random size\?"),
        ({"target": "tokens", "tokenizer": "dalle"}, r"unknown tokenizer 'dalle'; did you mean dall-e\?"),
        ({"target": "pca", "norm_pix": True}, r"norm_pix does nothing with target=pca: leave it at False"),
        ({"target": "tokens", "norm_pix": True}, r"norm_pix does nothing with target=tokens"),
        ({"pca_components": 3}, r"pca_components does nothing with target=pixels: leave it at 96"),
        ({"target": "tokens", "pca_components": 3}, r"pca_components does nothing with target=tokens"),
        ({"tokenizer": "dall-e"}, r"tokenizer does nothing with target=pixels: leave it at k-means"),
        ({"vocabulary": 9}, r"vocabulary does nothing with a target that is no k-means token: leave it at 8192"),
        ({"target": "tokens", "tokenizer": "dall-e", "vocabulary": 9}, r"vocabulary does nothing with a target that"),
        ({"fit_images": 9}, r"fit_images does nothing with a target that is not fitted: leave it at 10000"),
        ({"target": "tokens", "tokenizer": "dall-e", "fit_images": 9}, r"fit_images does nothing"),
        ({"augmentation": "none", "min_scale": 0.5}, r"min_scale does nothing with augmentation=none"),
        ({"augmentation": "crop, fixed size", "min_scale": 0.5}, r"min_scale does nothing with augmentation=crop, fix"),
        ({"masking": "grid", "mask_ratio": 0.5}, r"mask_ratio=0.5: grid-wise masking hides 0.75 of the patches"),
        ({"repeated_augmentation": 3}, r"repeated_augmentation=3: a batch of 4096 is no multiple of it"),
        ({"repeated_augmentation": 0}, r"repeated_augmentation=0: it must be at least 1"),
        ({"pca_components": 0, "target": "pca"}, r"pca_components=0: it must be at least 1"),
        ({"epochs": 0}, "epochs=0: .* at least 1"),
        ({"batch": -4}, "batch=-4: .* at least 1"),
        ({"warmup_epochs": 2000}, "longer than the training"),
        ({"min_scale": 2.0}, "from 0 to 1"),
        ({"betas": (0.9, 1.0)}, "below 1"),
        ({"weight_decay": -0.1}, "at least 0"),
    ],
)
def test_knobs_that_are_unknown_impossible_or_do_nothing_are_refused(knobs, sentence):
    with pytest.raises(UserError, match=sentence):
        replace(PLAIN, **knobs)


@pytest.mark.parametrize(
    "knobs",
    [
        {"target": "pca", "pca_components": 4, "fit_images": 100},
        {"target": "tokens", "vocabulary": 64, "fit_images": 100},
        {"target": "tokens", "tokenizer": "dall-e"},
        {"augmentation": "crop + colour jitter", "min_scale": 0.5},
        {"masking": "block", "mask_ratio": 0.5, "loss_on": "all", "encoder_mask_tokens": True},
        {"masking": "grid"},
        {"repeated_augmentation": 4},
    ],
)
def test_knobs_that_go_together_are_accepted(knobs):
    assert replace(PLAIN, **knobs) != PLAIN


def test_words_with_commas_and_spaces_can_be_set():
    changed, knobs = override(recipe("vit_mini_patch8", "mini"), ["augmentation=crop, fixed size"])
    assert (changed.augmentation, knobs) == ("crop, fixed size", {"augmentation": "crop, fixed size"})


def test_the_paper_s_recipe():
    # MAE paper, Table 8, sections 3 and A.1; crop, decoder heads and final rate as in facebookresearch/mae.
    paper = {
        "image_size": 224, "mask_ratio": 0.75, "norm_pix": True, "decoder_dim": 512, "decoder_depth": 8,
        "decoder_heads": 16, "epochs": 1600, "warmup_epochs": 40, "batch": 4096, "base_lr": 1.5e-4, "min_lr": 0.0,
        "weight_decay": 0.05, "betas": (0.9, 0.95), "min_scale": 0.2, "masking": "random", "loss_on": "masked",
        "encoder_mask_tokens": False, "target": "pixels", "augmentation": "crop, random size",
        "repeated_augmentation": 1, "pca_components": 96, "tokenizer": "k-means", "vocabulary": 8192,
        "fit_images": 10000,
    }  # fmt: skip
    for arch in ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"):
        assert asdict(recipe(arch, "paper")) == paper


def test_the_mini_recipe_differs_only_in_the_declared_fields():
    paper, mini = (asdict(recipe("vit_mini_patch8", name)) for name in ("paper", "mini"))
    assert {knob for knob in paper if paper[knob] != mini[knob]} <= set(MINI_FIELDS)
