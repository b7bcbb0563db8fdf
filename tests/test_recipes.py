import hashlib
from dataclasses import asdict, fields, replace

import pytest
from transfer_fixtures import ARCH, make_job, small_checkpoint, write_imagenet

from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.settings import override
from transfer import classification, robustness
from transfer.train import UNUSED, ClassifierRecipe, EvalRecipe

TASKS = (*classification.TASKS, *robustness.TASKS)
FINETUNE, LINPROBE, *_ = classification.TASKS
ARCHS = ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14", "vit_small_patch16", ARCH)

# All that "mini" may change.
SIZES = {"image_size", "epochs", "warmup_epochs", "batch", "base_lr"}
MINI_FIELDS = {
    "imagenet_finetune": SIZES | {"mixup", "cutmix", "drop_path", "min_scale", "rand_augment", "random_erasing"},
    "imagenet_linprobe": SIZES,
    "imagenet_knn": {"image_size"},
}
MINI_FIELDS |= {t.name: MINI_FIELDS["imagenet_finetune"] for t in TASKS if t.recipe is FINETUNE.recipe}


def every(items):
    return pytest.mark.parametrize("task", items, ids=lambda task: task.name)


@every(TASKS)
@pytest.mark.parametrize("arch", ARCHS)
def test_mini_differs_from_paper_in_the_declared_fields_alone(task, arch):
    paper, mini = asdict(task.recipe(arch, "paper")), asdict(task.recipe(arch, "mini"))
    assert paper.keys() == mini.keys()
    assert {name for name in paper if paper[name] != mini[name]} <= MINI_FIELDS.get(task.name, set())


@every(TASKS)
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
    published = arch in ("vit_base_patch16", "vit_large_patch16", "vit_huge_patch14")
    for name in ("base_lr", "layer_decay", "drop_path", "epochs"):
        assert FINETUNE.sources(arch)[name].startswith("stand-in") != published


@every(TASKS)
@pytest.mark.parametrize(("wrong", "right"), [("papr", "paper"), ("minni", "mini")])
def test_an_unknown_recipe_is_answered_with_the_right_name(task, wrong, right):
    with pytest.raises(UserError, match=f"unknown recipe '{wrong}'; did you mean {right}"):
        task.recipe(ARCH, wrong)


@every(TASKS)
def test_an_unknown_knob_is_answered_with_the_right_name(task):
    with pytest.raises(UserError, match=r"did you mean image_size\?"):
        override(task.recipe(ARCH, "paper"), ["imagesize=224"])


# Every knob moves something: the weights that a short training ends with.

BASE = {"batch": 8, "epochs": 3, "warmup_epochs": 1, "base_lr": 0.05}
KNOBS = {
    "image_size": 32,
    "epochs": 2,
    "warmup_epochs": 0,
    "batch": 4,
    "base_lr": 0.06,
    "min_lr": 0.02,
    "weight_decay": 0.3,
    "drop_path": 0.5,
    "pool": None,  # the other one
    "head_std": 0.02,
    "min_scale": 0.9,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.3,
    "ema": 0.5,
    "train_fraction": 0.7,
}
OWN = {
    "imagenet_finetune": {
        "betas": (0.5, 0.9),
        "layer_decay": 0.9,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "random_erasing": 0.9,
        "optimizer": {"optimizer": "lars", "momentum": 0.9, "trust_coefficient": 0.001} | UNUSED["lars"],
    },
    "imagenet_linprobe": {
        "momentum": 0.5,
        "trust_coefficient": 0.01,
        "optimizer": {"optimizer": "adamw", "betas": (0.9, 0.999)} | UNUSED["adamw"],
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(task, changed knobs) -> SHA-256 of the weights that the task's own run ends with, on twelve images."""
    root = write_imagenet(tmp_path_factory.mktemp("data"), train=3, val=1)
    patch = pytest.MonkeyPatch()
    found = {}

    def leave(job, name, state, image_size):
        digest = hashlib.sha256()
        for key, tensor in state.items():
            digest.update(key.encode() + tensor.numpy().tobytes())
        found["weights"] = digest.hexdigest()
        return {}

    patch.setattr(classification, "leave", leave)
    patch.setattr(classification, "validate", lambda *_: ({"top1": 0.0}, {}))

    def run(task, **changes) -> str:
        others = {name: changes.pop(name) for name in ("seed", "machine") if name in changes}
        job = make_job(task, root, tmp_path_factory.mktemp("work"), **others, **(BASE | changes))
        job = replace(job, checkpoint=small_checkpoint())
        found.clear()
        task.run(job)
        return found["weights"]

    yield run
    patch.undo()


@pytest.fixture(scope="module")
def unchanged(trained):
    return {task.name: trained(task) for task in (FINETUNE, LINPROBE)}


@every((FINETUNE, LINPROBE))
def test_the_same_training_ends_with_the_same_weights(trained, unchanged, task):
    """Else the next test would see changes everywhere."""
    assert trained(task) == unchanged[task.name]


CASES = [
    pytest.param(task, knob, value, id=f"{task.name}-{knob}")
    for task in (FINETUNE, LINPROBE)
    for knob, value in (KNOBS | OWN[task.name]).items()
]


@pytest.mark.parametrize(("task", "knob", "value"), CASES)
def test_every_knob_moves_the_trained_weights(trained, unchanged, task, knob, value):
    recipe = task.recipe(ARCH, "mini")
    if knob == "pool":
        value = {"avg": "token", "token": "avg"}[recipe.pool]
    changes = value if isinstance(value, dict) else {knob: value}
    assert trained(task, **changes) != unchanged[task.name]


@every((FINETUNE, LINPROBE))
def test_a_knob_either_moves_something_or_is_refused(task):
    """Every field is in the table above or among those that this optimizer refuses."""
    recipe = task.recipe(ARCH, "mini")
    moved, refused = KNOBS.keys() | OWN[task.name].keys(), UNUSED[recipe.optimizer].keys()
    assert moved | refused == {f.name for f in fields(recipe)}
    assert not moved & refused


REFUSED = [
    (FINETUNE, "momentum", 0.9),
    (FINETUNE, "trust_coefficient", 0.001),
    (LINPROBE, "betas", (0.9, 0.999)),
    (LINPROBE, "layer_decay", 0.75),
    (LINPROBE, "rand_augment", "rand-m9-mstd0.5-inc1"),
    (LINPROBE, "random_erasing", 0.25),
    (FINETUNE, "optimizer", "sgd"),
    (FINETUNE, "pool", "max"),
]


@pytest.mark.parametrize(("task", "knob", "value"), REFUSED)
def test_a_knob_that_would_do_nothing_is_refused(task, knob, value):
    with pytest.raises(UserError, match=knob):
        replace(task.recipe(ARCH, "paper"), **{knob: value})


def test_the_knobs_of_an_evaluation_move_its_images():
    """image_size and transform end in eval_transform (test_images.py); the sets take them from the recipe."""
    assert {f.name for f in fields(EvalRecipe)} == {"image_size", "transform"}
    with pytest.raises(UserError, match="did you mean resize_crop"):
        EvalRecipe(transform="resize_corp")


@every((FINETUNE, LINPROBE))
def test_the_processes_that_decode_move_nothing(trained, unchanged, task):
    assert trained(task, machine=Machine(workers=2)) == unchanged[task.name]


@every((FINETUNE, LINPROBE))
def test_the_seed_moves_the_trained_weights(trained, unchanged, task):
    assert trained(task, seed=1) != unchanged[task.name]
