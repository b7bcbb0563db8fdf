"""Recipes as data: overriding a knob by name, naming the differences, writing JSON that is never half there."""

import dataclasses
import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def parse_value(knob: str, text: str, current: Any, kind: Any) -> Any:
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(current, int):
            return int(text)
        if isinstance(current, float):
            return float(text)
        if isinstance(current, tuple):
            parts = tuple(float(part) for part in text.split(","))
            if len(parts) != len(current):
                raise ValueError
            return parts
    except (ValueError, KeyError):
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
