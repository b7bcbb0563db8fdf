"""The published recipes, value by value; what mini and the stand-ins change of them; names that are misspelt."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from mae_core.errors import UserError
from mae_core.optim import half_cosine, layer_decay_groups, learning_rate
from mae_core.settings import override
from mae_core.vit import ARCHS as ALL_ARCHS
from mae_core.vit import build_vit
from tests.fixtures.transfer import ARCH
from transfer.classification.recipes import stand_in_recipe, vtab_recipe
from transfer.classification.tasks import FINETUNE, LINPROBE, PARTIAL, SCRATCH, TASKS
from transfer.classification.train import UNUSED, ClassifierRecipe
from transfer.data.lowshot import subset_of

INAT = next(task for task in TASKS if task.name == "inat2018")
B, L, H = "vit_base_patch16", "vit_large_patch16", "vit_huge_patch14"
ARCHS = (B, L, H, "vit_small_patch16", ARCH)

# All that "mini" may change.
SIZES = {"image_size", "epochs", "warmup_epochs", "batch", "base_lr"}
TUNING = SIZES | {"mixup", "cutmix", "drop_path", "min_scale", "rand_augment", "random_erasing", "label_smoothing"}
MINI_FIELDS = {"imagenet_linprobe": SIZES, "imagenet_scratch": TUNING | {"ema"}}
MINI_FIELDS |= {t.name: TUNING for t in TASKS if t in (FINETUNE, PARTIAL) or t.recipe is stand_in_recipe}
MINI_FIELDS |= {t.name: TUNING for t in TASKS if subset_of(t)}
MINI_FIELDS |= {t.name: SIZES for t in TASKS if t.recipe is vtab_recipe}
DISTINCT = list({(task.recipe, task.sources): task for task in TASKS}.values())  # one of those with the same recipe


def every(items):
    return pytest.mark.parametrize("task", items, ids=lambda task: task.name)


@every(DISTINCT)
@pytest.mark.parametrize("arch", ARCHS)
def test_mini_differs_from_paper_only_in_the_declared_fields(task, arch):
    paper, mini = asdict(task.recipe(arch, "paper")), asdict(task.recipe(arch, "mini"))
    assert paper.keys() == mini.keys()
    assert {name for name in paper if paper[name] != mini[name]} <= MINI_FIELDS.get(task.name, set())


@every(DISTINCT)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_value_of_a_paper_recipe_has_its_source(task, arch):
    sources, recipe = task.sources(arch), task.recipe(arch, "paper")
    assert sources.keys() == asdict(recipe).keys()
    assert all(len(text) > 5 for text in sources.values())
    unused = UNUSED[recipe.optimizer] if isinstance(recipe, ClassifierRecipe) else {}
    for name in unused:
        if "not used" in sources[name]:
            assert getattr(recipe, name) == unused[name]


@pytest.mark.parametrize("arch", ARCHS)
def test_a_size_that_was_never_published_is_called_a_stand_in(arch):
    for name in ("base_lr", "layer_decay", "drop_path", "epochs"):
        assert FINETUNE.sources(arch)[name].startswith("stand-in") != (arch in (B, L, H))


# base_lr, layer_decay, drop_path and epochs of FINETUNE.md, and epochs and drop_path of Table 11, for every size.
SIZED = dict.fromkeys(ALL_ARCHS, ((5e-4, 0.65, 0.1, 100), (300, 0.1)))
SIZED |= dict.fromkeys(("vit_large_patch14", L), ((1e-3, 0.75, 0.2, 50), (200, 0.2)))
SIZED |= dict.fromkeys((H, "vit_giant_patch14"), ((1e-3, 0.75, 0.3, 50), (200, 0.2)))


@pytest.mark.parametrize("arch", SIZED)
def test_a_size_takes_the_values_of_the_published_one_nearest_to_it(arch):
    tuning, scratch = FINETUNE.recipe(arch, "paper"), SCRATCH.recipe(arch, "paper")
    found = (tuning.base_lr, tuning.layer_decay, tuning.drop_path, tuning.epochs), (scratch.epochs, scratch.drop_path)
    assert found == SIZED[arch]
    # The lowest block's rate: at least that of ViT-H's, or, with more blocks, what its decay gives.
    depth = ALL_ARCHS[arch].depth
    assert tuning.layer_decay**depth >= 0.75 ** max(depth, 32)


@pytest.mark.parametrize(
    ("arch", "size"), [("vit_small_patch16", "B"), ("vit_large_patch14", "L"), ("vit_giant_patch14", "H")]
)
def test_a_stand_in_names_the_size_it_is_taken_from(arch, size):
    assert FINETUNE.sources(arch)["layer_decay"].startswith(f"stand-in: ViT-{size}'s value")
    assert SCRATCH.sources(arch)["drop_path"].startswith(f"stand-in: ViT-{size}'s value")


@every(DISTINCT)
@pytest.mark.parametrize(("wrong", "right"), [("papr", "paper"), ("minni", "mini")])
def test_an_unknown_recipe_is_answered_with_the_right_name(task, wrong, right):
    with pytest.raises(UserError, match=f"unknown recipe '{wrong}'; did you mean {right}"):
        task.recipe(ARCH, wrong)


@every(DISTINCT)
def test_an_unknown_knob_is_answered_with_the_right_name(task):
    with pytest.raises(UserError, match=r"did you mean image_size\?"):
        override(task.recipe(ARCH, "paper"), ["imagesize=224"])


@pytest.mark.parametrize(("arch", "epochs", "drop_path"), [(B, 300, 0.1), (L, 200, 0.2), (H, 200, 0.2)])
def test_training_from_scratch_is_the_papers(arch, epochs, drop_path):
    """Table 11; the absolute rate is 1e-4 * 4096 / 256."""
    r = SCRATCH.recipe(arch, "paper")
    assert learning_rate(r.base_lr, r.batch) == pytest.approx(1.6e-3)
    assert (r.optimizer, r.betas, r.weight_decay, r.layer_decay) == ("adamw", (0.9, 0.95), 0.3, 1.0)
    assert (r.image_size, r.batch, r.epochs, r.warmup_epochs, r.drop_path) == (224, 4096, epochs, 20, drop_path)
    assert (r.rand_augment, r.label_smoothing, r.mixup, r.cutmix) == ("rand-m9-mstd0.5-inc1", 0.1, 0.8, 1.0)
    assert (r.ema, r.random_erasing) == (0.9999, 0.0)


@pytest.mark.parametrize(
    ("arch", "blocks", "epochs"),
    [
        (ARCH, (0, 0.5, 1, 2, 4, 6), 100),
        (B, (0, 0.5, 1, 2, 4, 6, 12), 100),
        (L, (0, 0.5, 1, 2, 4, 6, 12, 18, 24), 50),
        (H, (0, 0.5, 1, 2, 4, 6, 12, 18, 24, 32), 50),
    ],
)
def test_partial_fine_tuning_is_table_9_for_the_blocks_of_figure_9(arch, blocks, epochs):
    recipe, tuning = vars(PARTIAL.recipe(arch, "paper")), vars(FINETUNE.recipe(arch, "table-9"))
    assert recipe == tuning | {"blocks": blocks}
    assert recipe["epochs"] == epochs
    assert "best of 50, 100 and 200" in PARTIAL.sources(arch)["epochs"]


# For ViT-B on iNaturalist: facebookresearch/deit issues 105 and 141, facebookresearch/dino issue 171. The rate 7.5e-5
# is said to be after scaling, 5e-5 before it, and DeiT's main.py scales by batch / 512.
@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "erasing"),
    [("deit-360", 360, 768, 7.5e-5, 0.1), ("dino-300", 300, 1024, 5e-5 * 1024 / 512, 0.25)],
)
def test_the_longer_stand_ins_are_what_their_authors_said(name, epochs, batch, lr, erasing):
    r = INAT.recipe(B, name)
    assert learning_rate(r.base_lr, r.batch) == pytest.approx(lr)
    assert (r.epochs, r.batch, r.warmup_epochs, r.random_erasing) == (epochs, batch, 5, erasing)
    assert (r.optimizer, r.weight_decay, r.layer_decay, r.drop_path) == ("adamw", 0.05, 1.0, 0.1)
    assert (r.rand_augment, r.label_smoothing, r.mixup, r.cutmix) == ("rand-m9-mstd0.5-inc1", 0.1, 0.8, 1.0)
    assert (r.pool, r.min_lr, r.ema, r.repeated_augmentation) == ("token", 1e-5, 0.0, 3)
    sources = INAT.sources(B, name)
    assert sources.keys() == asdict(r).keys()
    assert name.split("-")[0] in sources["epochs"]
    assert all(text.startswith("stand-in") or text == "not used" for text in sources.values())


@every([task for task in TASKS if task.name.startswith(("inat", "places"))])
def test_the_default_of_iNaturalist_and_Places_is_imagenets(task):
    for arch in ARCHS:
        assert task.recipe(arch, "paper") == FINETUNE.recipe(arch, "paper")
    with pytest.raises(UserError, match=r"unknown recipe 'deit360'; did you mean deit-360\?"):
        task.recipe(ARCH, "deit360")


@pytest.mark.parametrize(
    ("arch", "lr", "layer_decay", "drop_path", "epochs"),
    [(B, 2e-3, 0.65, 0.1, 100), (L, 4e-3, 0.75, 0.2, 50), (H, 4e-3, 0.75, 0.3, 50)],
)
def test_fine_tuning_is_the_official_repositorys(arch, lr, layer_decay, drop_path, epochs):
    """facebookresearch/mae FINETUNE.md; the absolute rate is base_lr * 1024 / 256."""
    r = FINETUNE.recipe(arch, "paper")
    assert learning_rate(r.base_lr, r.batch) == pytest.approx(lr)
    assert (r.layer_decay, r.drop_path, r.epochs) == (layer_decay, drop_path, epochs)
    assert (r.image_size, r.batch, r.warmup_epochs, r.min_lr) == (224, 1024, 5, 1e-6)
    assert (r.optimizer, r.betas, r.weight_decay) == ("adamw", (0.9, 0.999), 0.05)
    assert (r.mixup, r.cutmix, r.label_smoothing, r.random_erasing) == (0.8, 1.0, 0.1, 0.25)
    assert (r.rand_augment, r.pool, r.head_std, r.ema) == ("rand-m9-mstd0.5-inc1", "avg", 2e-5, 0.0)


@pytest.mark.parametrize(("arch", "drop_path", "epochs"), [(B, 0.1, 100), (L, 0.1, 50), (H, 0.2, 50)])
def test_fine_tuning_by_table_9_is_the_papers(arch, drop_path, epochs):
    """MAE paper, Table 9, which Tables 1 and 2 and Figures 5, 7 and 9 follow: class token, nothing erased."""
    r = FINETUNE.recipe(arch, "table-9")
    assert (r.base_lr, r.layer_decay, r.drop_path, r.epochs) == (1e-3, 0.75, drop_path, epochs)
    assert (r.optimizer, r.betas, r.weight_decay) == ("adamw", (0.9, 0.999), 0.05)
    assert (r.image_size, r.batch, r.warmup_epochs, r.pool, r.random_erasing) == (224, 1024, 5, "token", 0.0)
    assert (r.rand_augment, r.label_smoothing, r.mixup, r.cutmix) == ("rand-m9-mstd0.5-inc1", 0.1, 0.8, 1.0)
    sources = FINETUNE.sources(arch, "table-9")
    assert sources.keys() == asdict(r).keys()
    assert all("Table 9" in sources[knob] for knob in ("base_lr", "layer_decay", "drop_path", "random_erasing"))


@pytest.mark.parametrize("arch", [B, L, H])
def test_linear_probing_is_the_papers(arch):
    """Table 10: LARS, base rate 0.1 at batch 16384, so 6.4; 90 epochs; nothing but crop and flip."""
    r = LINPROBE.recipe(arch, "paper")
    assert learning_rate(r.base_lr, r.batch) == pytest.approx(6.4)
    assert (r.batch, r.epochs, r.warmup_epochs, r.min_lr) == (16384, 90, 10, 0.0)
    assert (r.optimizer, r.momentum, r.trust_coefficient, r.weight_decay) == ("lars", 0.9, 0.001, 0.0)
    assert (r.image_size, r.pool, r.head_std) == (224, "token", 0.01)
    assert r.mixup == r.cutmix == r.label_smoothing == r.drop_path == r.random_erasing == 0.0
    assert r.rand_augment == ""


def test_the_rate_of_vit_b_over_its_hundred_epochs():
    """Per iteration, 1281167 // 1024 = 1251 of them an epoch: 0 -> 2e-3 over 5 epochs, then half a cosine to 1e-6."""
    r = FINETUNE.recipe(B, "paper")
    lr = learning_rate(r.base_lr, r.batch)
    at = [half_cosine(step, 1251, lr, r.epochs, r.warmup_epochs, r.min_lr) for step in range(125100)]
    assert at[0] == 0.0
    assert at[1251] == pytest.approx(4e-4)
    assert max(at) == at[5 * 1251] == pytest.approx(2e-3)
    # Half way through the 95 epochs of cosine: the mean of both ends.
    assert at[int(52.5 * 1251)] == pytest.approx((2e-3 + 1e-6) / 2, rel=1e-4)
    assert at[-1] == pytest.approx(1e-6, abs=1e-9)


@pytest.mark.parametrize(("arch", "depth"), [(B, 12), (L, 24), (H, 32)])
def test_layer_decay_and_drop_path_of_the_real_sizes(arch, depth):
    """depth + 2 distinct scales, decay ** (depth + 1 - layer); drop path linear from 0 at the first block."""
    r = FINETUNE.recipe(arch, "paper")
    with torch.device("meta"):
        model = build_vit(arch, r.image_size, 1000, r.pool, r.drop_path)
    scales = {}
    for group in layer_decay_groups(model, r.weight_decay, r.layer_decay):
        for p in group["params"]:
            scales[id(p)] = group["lr_scale"]
    named = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert len(set(named.values())) == depth + 2
    for name, layer in (("patch_embed.proj.weight", 0), ("pos_embed", 0), ("cls_token", 0), ("blocks.0.norm1.bias", 1)):
        assert named[name] == pytest.approx(r.layer_decay ** (depth + 1 - layer))
    for name in (f"blocks.{depth - 1}.mlp.fc2.weight", "fc_norm.weight", "head.weight"):
        assert named[name] == pytest.approx(r.layer_decay if "blocks" in name else 1.0)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, r.drop_path, depth), atol=1e-9)


@pytest.mark.parametrize(("task", "knob", "value"), [
    (FINETUNE, "momentum", 0.9), (FINETUNE, "trust_coefficient", 0.001), (FINETUNE, "optimizer", "sgd"),
    (FINETUNE, "pool", "max"), (LINPROBE, "betas", (0.9, 0.999)), (LINPROBE, "layer_decay", 0.75),
    (LINPROBE, "rand_augment", "rand-m9-mstd0.5-inc1"), (LINPROBE, "random_erasing", 0.25),
])  # fmt: skip
def test_a_knob_that_would_do_nothing_is_refused(task, knob, value):
    with pytest.raises(UserError, match=knob):
        replace(task.recipe(ARCH, "paper"), **{knob: value})
