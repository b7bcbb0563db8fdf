"""Recipes as data: their bounds, a knob set by name, and the differences of two."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from mae_core.errors import UserError

T = TypeVar("T")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among the known ones."""
    return UserError(f"unknown {kind} '{name}'; {did_you_mean(name, list(known))}")


def choose(kind: str, name: str, known: Mapping[str, T]) -> T:
    """known[name]; UserError with the nearest name if there is none."""
    if name not in known:
        raise unknown(kind, name, known)
    return known[name]


def override(recipe: Any, settings: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The recipe with "knob=value" settings applied, and those values that differ from the recipe's own.

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
    # A knob set to the value it already has changes nothing, not even the recipe's label.
    parsed = {knob: value for knob, value in parsed.items() if value != getattr(recipe, knob)}
    return dataclasses.replace(recipe, **parsed), parsed


def bounded(low: float, high: float = math.inf, *, below: bool = False, default: Any = dataclasses.MISSING) -> Any:
    """A recipe's field whose number (or each of them, in a tuple) `check_ranges` holds to low..high; below: high itself
    is not allowed."""
    return dataclasses.field(default=default, metadata={"bounds": (low, high, below)})


def check_ranges(recipe: Any) -> None:
    """UserError for a number outside its field's bounds, such as a negative number of epochs."""
    for field in dataclasses.fields(recipe):
        low, high, below = field.metadata.get("bounds", (-math.inf, math.inf, False))
        values = getattr(recipe, field.name) if "bounds" in field.metadata else ()
        for value in values if isinstance(values, tuple) else (values,):
            if not (low <= value <= high) or (below and value == high):
                limit = f"at least {low}" if high == math.inf else f"from {low} to {'below ' * below}{high}"
                raise UserError(f"{field.name}={value}: it must be {limit}")
    if getattr(recipe, "warmup_epochs", 0) > getattr(recipe, "epochs", math.inf):
        raise UserError(
            f"warmup_epochs={recipe.warmup_epochs} is longer than the training (epochs={recipe.epochs}): set both"
        )


def as_typed(value: Any) -> str:
    """A knob's value as a user types it after --set; `parse_value` reads it back."""
    if isinstance(value, tuple | list):
        return ",".join(f"{v:g}" if isinstance(v, float) and float(f"{v:g}") == v else str(v) for v in value)
    return str(value)


def finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def parse_value(knob: str, text: str, current: Any, kind: Any) -> Any:
    """The text as a value of the type that the knob has now; kind: its annotation. UserError if it is none."""
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
                    f"--set {knob}={text}: {knob} takes {len(current)} numbers, as in {knob}={as_typed(current)}"
                )
            return tuple(int(p) if isinstance(c, int) else finite(p) for p, c in zip(parts, current))
    except (ValueError, KeyError):
        if isinstance(current, tuple):
            raise UserError(f"--set {knob}={text}: {knob} takes numbers, as in {knob}={as_typed(current)}") from None
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}[type(current)]
        raise UserError(f"--set {knob}={text}: {knob} takes {wanted}, as in {knob}={str(current).lower()}") from None
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
