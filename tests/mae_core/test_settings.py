from dataclasses import dataclass, replace

import pytest

from mae_core.errors import UserError
from mae_core.settings import as_typed, did_you_mean, differences, override


@dataclass(frozen=True)
class Recipe:
    epochs: int = 100
    base_lr: float = 1e-3
    norm_pix: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    pool: str = "avg"
    blocks: tuple[float, ...] = (1.0,)


def test_override_parses_by_the_knob_s_own_type():
    recipe, parsed = override(Recipe(), ["epochs=7", "base_lr=1", "norm_pix=False", "betas=.8,0.9", "pool=token"])
    assert recipe == Recipe(7, 1.0, False, (0.8, 0.9), "token")
    assert parsed == {"epochs": 7, "base_lr": 1.0, "norm_pix": False, "betas": (0.8, 0.9), "pool": "token"}
    assert type(recipe.base_lr) is float
    assert type(recipe.norm_pix) is bool


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        *(("base_lr", value) for value in (1e-30, 0.1 + 0.2, 1.0, 1234567.0)),
        *(("betas", value) for value in ((0.1 + 0.2, 1.0), (0.9, 1 / 3))),
        *(("blocks", value) for value in ((0.0, 0.5, 12.0), (1234567.0,), [2.0, 1 / 3])),
        ("epochs", 12345678),
        ("norm_pix", False),
        ("pool", "token"),
    ],
)
def test_a_value_as_typed_reads_back_as_it_was(knob, value):
    found = getattr(override(Recipe(), [f"{knob}={as_typed(value)}"])[0], knob)
    assert found == (tuple(value) if isinstance(value, list) else value)
    assert as_typed((0.0, 0.5, 12.0)) == "0,0.5,12"


def test_a_tuple_of_any_length_takes_as_many_numbers_as_are_given():
    for text, value in (("0,0.5,12", (0.0, 0.5, 12.0)), ("3", (3.0,))):
        assert override(Recipe(), [f"blocks={text}"])[1] == {"blocks": value}
    with pytest.raises(UserError, match=r"blocks=1,x: blocks takes numbers, as in blocks=1$"):
        override(Recipe(), ["blocks=1,x"])


def test_override_without_settings_changes_nothing():
    assert override(Recipe(), []) == (Recipe(), {})
    assert override(Recipe(), ["norm_pix=true", "pool=a=b"])[0] == replace(Recipe(), pool="a=b")


@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        ("epoch=3", r"--set epoch=3: this recipe has no 'epoch'; did you mean epochs\?"),
        ("xyz=3", r"has no 'xyz'; known: base_lr, betas, blocks, epochs, norm_pix, pool"),
        ("epochs", r"--set epochs: write knob=value"),
        ("epochs=1.5", r"--set epochs=1.5: epochs takes a whole number, as in epochs=100"),
        ("epochs=", r"epochs takes a whole number"),
        ("base_lr=fast", r"base_lr takes a number"),
        ("base_lr=nan", r"base_lr"),
        ("base_lr=inf", r"base_lr"),
        ("norm_pix=1", r"norm_pix takes true or false"),
        ("betas=0.9", r"betas takes 2 numbers, as in betas="),
        ("betas=0.9,0.95,0.99", r"betas takes 2 numbers, as in betas="),
        ("betas=a,b", r"betas takes numbers, as in betas=0.9,0.95"),
    ],
)
def test_override_refuses_in_one_sentence(setting, answer):
    with pytest.raises(UserError, match=answer):
        override(Recipe(), [setting])


def test_did_you_mean():
    assert did_you_mean("imagenet_linprob", ["imagenet_linprobe", "imagenet_c"]) == "did you mean imagenet_linprobe?"
    assert did_you_mean("coco", ["a", "b"]) == "known: a, b"


def test_differences_names_every_changed_entry():
    old = {"arch": "b", "recipe": {"epochs": 3, "lr": 0.1, "gone": 1}, "same": [1, 2]}
    new = {"arch": "l", "recipe": {"epochs": 3, "lr": 0.2, "new": None}, "same": [1, 2], "more": {"x": 1}}
    assert differences(old, new) == [
        "arch: b -> l",
        "more: None -> {'x': 1}",
        "recipe.gone: 1 -> None",
        "recipe.lr: 0.1 -> 0.2",
    ]
    assert differences(old, old) == []
