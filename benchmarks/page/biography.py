"""How a number came about: what a record says, in groups of lines."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.checkpoints import pretraining
from benchmarks.page.series import hours, identity_of
from benchmarks.render import fixed, without_paths
from benchmarks.rows import row_key
from mae_core.settings import as_typed
from transfer.task import Record

Lines = list[list[str]]  # [what, value] or [what, value, source]


def biography(record: Record, path: str, data: str) -> dict[str, Any]:
    """path: of the record, relative to --out. data: its title."""
    return {
        "label": identity_of(record).label,
        "seed": record.seed,
        "status": record.status,
        "path": path,
        "values": {metric: value_of(record, metric) for metric in record.metrics},
        "groups": [[title, lines] for title, lines in groups(record, path, data).items() if lines],
    }


def value_of(record: Record, metric: str) -> str:
    error = f" ± {fixed(record.stderr[metric], 4)}" if metric in record.stderr else ""
    return fixed(record.metrics[metric], 4) + error


def groups(r: Record, path: str, data: str) -> dict[str, Lines]:
    time, unit = hours(r)
    metrics = sorted(r.metrics, key=lambda metric: (metric != r.metric, metric))
    checkpoint, identity, machine, d = r.checkpoint, r.identity, r.machine, r.data
    found: dict[str, Lines] = {}
    found["Result"] = known(
        {"status": r.status, "reason": r.reason}
        | {metric: value_of(r, metric) for metric in metrics}
        | {"chance": fixed(r.chance, 4), "test images": r.n_eval or ""}
    )
    found["Notes"] = [["", without_paths(note)] for note in r.notes]
    found["Checkpoint"] = known(
        {"name": checkpoint.get("name"), "sha256": checkpoint.get("sha256"), "arch": checkpoint.get("arch")}
        | {"format": checkpoint.get("format"), "pre-training": pretraining(checkpoint)}
        | {"file": checkpoint.get("path"), "classifier": identity.get("parent")}
        | {f"meta: {key}": value for key, value in sorted((checkpoint.get("meta") or {}).items())}
    )
    overridden = [[knob, as_typed(value), "override"] for knob, value in sorted(r.overrides.items())]
    knobs = [[k, as_typed(v), r.sources.get(k, "")] for k, v in sorted(r.recipe.items()) if k not in r.overrides]
    found["Recipe"] = [["recipe", r.recipe_name], *texts(overridden), *texts(knobs)]
    found["Data"] = known(
        {"data": data, "detail": d.get("detail"), "fingerprint": d.get("fingerprint")}
        | {f"{key}": value for key, value in sorted(as_mapping(d.get("counts")).items())}
    ) + [["finding", without_paths(finding)] for finding in d.get("findings") or ()]
    found["Run"] = known(
        {"seed": r.seed, "task": r.task, "task version": identity.get("task_version"), "engine": r.engine}
        | {"precision": machine.get("precision"), "hardware": r.hardware, "device": machine.get("device")}
        | {key: machine.get(key) for key in ("processes", "threads", "micro_batch", "compile")}
        | {"seconds": fixed(r.seconds, 1), "wall seconds": fixed(r.wall_seconds, 1) if r.wall_seconds else ""}
        | {unit: fixed(time, 3), "images seen": r.images_seen or "", "images/s": fixed(r.images_per_second, 2)}
        | {"peak memory (GiB)": fixed(r.peak_memory_gib, 2), "input px": row_key(r).image_size}
        | {"commit": r.commit, "finished": r.finished, "record": path}
    )
    found["Versions"] = known(dict(sorted(r.versions.items())))
    found["Decided by the run"] = known(dict(sorted(r.resolved.items())))
    found["Files"] = known(dict(sorted(r.artifacts.items())))
    found |= {f"Table: {name}": known(as_mapping(table)) for name, table in sorted(r.tables.items())}
    return found


def known(values: Mapping[str, Any]) -> Lines:
    """A line for each value that there is."""
    return texts([key, value] for key, value in values.items() if value not in (None, "", [], {}))


def texts(lines: Iterable[Iterable[Any]]) -> Lines:
    return [[str(key), *(without_paths(shown(value)) for value in values)] for key, *values in lines]


def shown(value: Any) -> str:
    """A value of a record on one line. Numbers keep six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return "-" if value is None else str(value)


def as_mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {"": value}
