"""The recipe against the papers' numbers."""

from dataclasses import fields

import pytest

from mae_core.errors import UserError
from mae_core.settings import override
from mae_core.vit import ARCHS
from tests.fixtures.transfer import ARCH
from transfer.detection.recipe import DetectionRecipe, recipe, sources

# Li et al. 2021 (arXiv 2111.11429) for what Table 4 of the MAE paper used; heads' widths and betas: hustvl/MIMDet;
# what enters the losses and what the RPN keeps: detectron2's config/defaults.py.
PAPER = {
    "image_size": 1024, "epochs": 100, "warmup_epochs": 0.25, "batch": 64, "lr": 8e-5, "betas": (0.9, 0.999),
    "weight_decay": 0.1, "layer_decay": 1.0, "drop_path": 0.1, "window": 14, "min_scale": 0.1, "max_scale": 2.0,
    "fpn_dim": 256, "head_dim": 256, "fc_dim": 1024, "rpn_convs": 2, "rpn_batch": 256, "roi_batch": 512,
    "proposals": 1000,
}  # fmt: skip


def test_the_paper_recipe_is_that_of_li_et_al():
    assert vars(recipe("vit_base_patch16", "paper")) == PAPER
    assert vars(recipe("vit_large_patch16", "paper")) == {**PAPER, "drop_path": 0.3}
    assert vars(recipe("vit_huge_patch14", "paper")) == {**PAPER, "drop_path": 0.3, "window": 16}


def test_every_number_has_a_source_and_derived_ones_say_so():
    knobs = {f.name for f in fields(DetectionRecipe)}
    for arch in ARCHS:
        found = sources(arch)
        assert set(found) == knobs
        derived = [text.startswith("derived from ViT-B and ViT-L") for text in found.values()]
        assert all(derived) if arch not in ("vit_base_patch16", "vit_large_patch16") else not any(derived)
    assert "2111.11429" in sources("vit_base_patch16")["lr"]
    assert "detectron2" in sources("vit_base_patch16")["proposals"]
    assert "stand-in: ViT-L's value, nobody published it" in sources("vit_huge_patch14")["drop_path"]


def test_the_shorter_schedules_change_nothing_but_the_epochs():
    for name, epochs in (("25-epochs", 25), ("50-epochs", 50)):
        assert vars(recipe("vit_base_patch16", name)) == {**PAPER, "epochs": epochs}
        found = sources("vit_base_patch16", name)
        assert "mae issue 43" in found["epochs"]
        assert "nobody says" in found["drop_path"]
    assert set(found) == {f.name for f in fields(DetectionRecipe)}


def test_drop_path_is_that_of_the_published_size_nearest_to_it():
    deep = {"vit_large_patch14", "vit_large_patch16", "vit_huge_patch14", "vit_giant_patch14"}
    assert {arch for arch in ARCHS if recipe(arch, "paper").drop_path == 0.3} == deep
    assert {recipe(arch, "paper").drop_path for arch in set(ARCHS) - deep} == {0.1}


def test_the_mini_recipe_trains_small_images_with_the_same_plan():
    for arch in (ARCH, "vit_base_patch16"):
        mini = recipe(arch, "mini")
        assert mini.image_size <= 128
        assert (mini.weight_decay, mini.betas, mini.rpn_convs) == (0.1, (0.9, 0.999), 2)
        assert mini.window == {ARCH: 6, "vit_base_patch16": 14}[arch]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        *((setting, setting) for setting in ("window=-1", "proposals=0", "image_size=0", "rpn_convs=0", "fc_dim=-5")),
        *((setting, setting) for setting in ("lr=-1", "min_scale=-1", "drop_path=1", "warmup_epochs=101")),
        ("max_scale=0.05", "max_scale=0.05 is below min_scale=0.1"),
        ("window=wide", "window takes a whole number"),
        ("windows=14", "did you mean window"),
    ],
)
def test_numbers_that_no_training_can_have_are_refused(setting, said):
    with pytest.raises(UserError, match=said):
        override(recipe("vit_base_patch16", "paper"), [setting])


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UserError, match="did you mean paper"):
        recipe("vit_base_patch16", "papers")
