"""Recipes as data: overriding a knob by name, naming the differences, writing JSON that is never half there."""

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mae_core.errors import UserError


def did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def override(recipe: Any, settings: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The recipe with "knob=value" settings applied, and the values that differ from it.

    UserError for an unknown knob or a value of the wrong type.
    """
    types = {f.name: f.type for f in dataclasses.fields(recipe)}
    parsed = {}
    for setting in settings:
        knob, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting}: write knob=value")
        if knob not in types:
            raise UserError(f"--set {setting}: this recipe has no '{knob}'; {did_you_mean(knob, sorted(types))}")
        parsed[knob] = parse_value(knob, text, getattr(recipe, knob), types[knob])
    # A knob set to the value it has changes nothing, the recipe's name neither.
    parsed = {knob: value for knob, value in parsed.items() if value != getattr(recipe, knob)}
    return dataclasses.replace(recipe, **parsed), parsed


# What a recipe's numbers must lie in, whichever recipe has them: lowest, highest, and whether the highest is allowed.
RANGES = {
    "image_size": (1, math.inf, True),
    "epochs": (1, math.inf, True),
    "batch": (1, math.inf, True),
    "warmup_epochs": (0, math.inf, True),
    "base_lr": (0, math.inf, True),
    "min_lr": (0, math.inf, True),
    "betas": (0, 1, False),
    "momentum": (0, 1, False),
    "trust_coefficient": (0, math.inf, True),
    "weight_decay": (0, math.inf, True),
    "layer_decay": (0, 1, True),
    "drop_path": (0, 1, False),
    "head_std": (0, math.inf, True),
    "min_scale": (0, 1, True),
    "random_erasing": (0, 1, True),
    "mixup": (0, math.inf, True),
    "cutmix": (0, math.inf, True),
    "label_smoothing": (0, 1, False),
    "ema": (0, 1, False),
    "mask_ratio": (0, 1, False),
    "decoder_dim": (4, math.inf, True),
    "decoder_depth": (1, math.inf, True),
    "decoder_heads": (1, math.inf, True),
    "pca_components": (1, math.inf, True),
    "vocabulary": (2, math.inf, True),
    "fit_images": (1, math.inf, True),
    "repeated_augmentation": (1, math.inf, True),
    "train_fraction": (1e-6, 1, True),
}


def check_ranges(recipe: Any) -> None:
    """UserError for a number that no training can have, such as a negative number of epochs."""
    for knob, (low, high, closed) in RANGES.items():
        values = getattr(recipe, knob, ())
        for value in values if isinstance(values, tuple) else (values,):
            if not (low <= value <= high and (closed or value < high)):
                limit = f"from {low} on" if high == math.inf else f"from {low} to {'' if closed else 'below '}{high}"
                raise UserError(f"{knob}={value}: it must be {limit}")
    if getattr(recipe, "warmup_epochs", 0) > getattr(recipe, "epochs", math.inf):
        raise UserError(
            f"warmup_epochs={recipe.warmup_epochs} is longer than the training (epochs={recipe.epochs}): set both"
        )


def listed(values: Sequence[Any]) -> str:
    """Several values as they are typed."""
    return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)


def finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def parse_value(knob: str, text: str, current: Any, kind: Any) -> Any:
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, int):
            return int(text)
        if isinstance(current, float):
            return finite(text)
        if isinstance(current, tuple):
            parts = [part.strip() for part in text.strip("[]()").split(",")]
            if get_args(kind)[-1:] == (Ellipsis,):
                return tuple(finite(part) for part in parts)
            if len(parts) != len(current):
                raise UserError(
                    f"--set {knob}={text}: {knob} takes {len(current)} numbers, "
                    f"as in {knob}={','.join(map(str, current))}"
                )
            return tuple(int(p) if isinstance(c, int) else finite(p) for p, c in zip(parts, current))
    except (ValueError, KeyError):
        if isinstance(current, tuple):
            raise UserError(f"--set {knob}={text}: {knob} takes numbers, as in {knob}={listed(current)}") from None
        raise UserError(f"--set {knob}={text}: {knob} is of type {getattr(kind, '__name__', kind)}") from None
    return text


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for every entry in which two nested dicts differ."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as f:
            json.dump(value, f, indent=1, sort_keys=True, ensure_ascii=False)
            f.write("\n")
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
