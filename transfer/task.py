"""The vocabulary: Task, Job, Result, Record."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from mae_core.checkpoint import Checkpoint
from mae_core.files import printable
from mae_core.machine import Machine
from mae_core.settings import as_typed
from mae_core.space import Space
from transfer.data.findings import Data

RECORD_FILE = "record.json"
CLASSIFIER_FILE = "classifier.safetensors"  # what fine-tuning saves in its work folder


@dataclass(frozen=True)
class Result:
    """The outcome of running a job. A standard error has its metric's unit (accuracies: percent)."""

    metrics: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    n_eval: int = 0
    images_seen: int = 0
    seconds: float | None = None  # over all resumed parts; None: the wall time of this process
    tables: dict[str, Any] = field(default_factory=dict)  # e.g. error per corruption and severity
    resolved: dict[str, Any] = field(default_factory=dict)  # what the recipe leaves open and the run decides
    artifacts: dict[str, str] = field(default_factory=dict)  # file name in the work folder -> sha256
    predictions: dict[str, str] = field(default_factory=dict)  # what the number is made of: file, sha256, images
    notes: tuple[str, ...] = ()  # deviations from the recipe, for the reader of the number


class Needs(Enum):
    """What a task runs on."""

    ENCODER = "encoder"  # a pre-trained encoder
    CLASSIFIER = "classifier"  # a fine-tuned classifier, or the one that imagenet_finetune made from the encoder
    FINE_TUNED_FILE = "fine-tuned file"  # a fine-tuned classifier given as the checkpoint


FORWARD, TRAINED = 1.0, 3.0  # passes: the backward pass through all layers costs two forward ones


@dataclass(frozen=True)
class Part:
    """Images that a job takes through its model, at one rate: its training, or its evaluation.

    kind: what sets an image's cost, for one architecture, engine and machine; parts of one kind have one rate, whatever
    their task. passes: the cost of an image in forward passes.
    """

    kind: str
    images: int
    passes: float = FORWARD


Objection = tuple[str, str]  # (knob or flag, why it would make the job fail and what to do)


@dataclass(frozen=True)
class Task:
    """One transfer experiment, and everything that the rest of the program needs to know about its family.

    recipe: (arch, "paper", "mini" or the name of a further recipe) -> the recipe, a frozen dataclass. sources: (arch[,
    name of the further recipe]) -> where each value comes from. inspect: data root -> what it holds. miniature: writes
    the generated data below a root. objections: why a job would fail, checked before anything starts; its data may be
    missing. space: what the files of a job need; parts: what it computes, the part that `Record.seconds` times first
    (none: its time is not estimated); flops: of one image's forward pass. These three are called only if its data were
    found.
    """

    name: str
    title: str
    module: str  # python -m MODULE runs it
    metric: str  # the headline metric
    version: int  # raised whenever the same inputs would give another number
    cost: int  # rank for "cheapest first"
    recipe: Callable[[str, str], Any]
    sources: Callable[..., dict[str, str]]
    inspect: Callable[[Path], Data]
    run: Callable[["Job"], Result]
    miniature: Callable[[Path], Path]
    objections: Callable[["Job"], Iterable[Objection]] = lambda job: ()
    space: Callable[["Job"], Space] = lambda job: Space(0, 0)
    parts: Callable[["Job"], tuple[Part, ...]] = lambda job: ()
    flops: Callable[["Job"], int] = lambda job: 0
    detail: Callable[["Job"], str] = lambda job: job.data.detail  # what the plan says about the data
    few: Callable[[Any, Data], Any] = lambda recipe, data: recipe  # the recipe, fitted to the few images of --limit
    needs: Needs = Needs.ENCODER
    higher_is_better: bool = True
    trains: bool = True  # on all GPUs that there are; an evaluation runs on one
    after: tuple[str, ...] = ()  # tasks whose result it takes, if they run too
    exact: bool = False  # fp32 on any device, unless the user gives another precision
    engines: dict[str, str] = field(default_factory=lambda: {"torch": "torch"})  # name -> module it needs, best first
    install: str = ""  # how to install an engine that is absent
    packages: tuple[str, ...] = ()  # further packages whose versions go into the record
    opt_in: bool = False  # runs only if it is named
    looks_itself: bool = False  # its run checks that the data are those of the plan: nobody looks through them again
    from_scratch: bool = False  # it uses only the size of a checkpoint
    # Why it does not take an encoder of that arch, to be read after the task's name; "" if it does.
    refuses: Callable[[str], str] = lambda arch: ""
    of: Callable[[str], "Task"] | None = None  # "NAME:PATH" -> the task on that folder
    path: str = ""  # that folder


@dataclass(frozen=True)
class Job:
    """One task on one checkpoint with one seed, and the folder it works in."""

    task: Task
    checkpoint: Checkpoint
    recipe: Any
    recipe_name: str
    overrides: dict[str, Any]
    data: Data
    work: Path
    seed: int = 0
    engine: str = "torch"
    machine: Machine = field(default_factory=Machine)
    parent: Checkpoint | None = None  # the fine-tuned classifier that a robustness task evaluates
    out: Path = Path()  # --out, below which `work` lies
    estimated_seconds: float | None = None  # by the plan, of wall time
    tracker: str = ""  # where the curves of its training go besides TensorBoard

    @property
    def recipe_label(self) -> str:
        return recipe_label(self.recipe_name, self.overrides, self.data.limit)

    def identity(self) -> dict[str, Any]:
        """The fields that make two runs the same experiment, as plain JSON values: a number is this job's only if all
        agree."""
        fields = {
            "task": self.task.name,
            "task_version": self.task.version,
            "checkpoint": self.checkpoint.identity,
            "recipe": dataclasses.asdict(self.recipe),
            "engine": self.engine,
            "seed": self.seed,
            "precision": self.machine.precision,
            "data": self.data.fingerprint,
            "parent": self.parent.sha256 if self.parent else "",
        }
        return json.loads(json.dumps(fields))


@dataclass(frozen=True)
class Record:
    """The outcome of one job and how it came about, in one JSON file: the only source of the tables."""

    task: str
    status: str  # "ok", "failed" or "skipped"
    reason: str = ""
    metric: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    chance: float | None = None
    n_eval: int = 0
    checkpoint: dict[str, Any] = field(default_factory=dict)  # name, path, format, arch, sha256, meta
    recipe_name: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    resolved: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    engine: str = "torch"
    data: dict[str, Any] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    hardware: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    images_seen: int = 0
    seconds: float = 0.0
    wall_seconds: float = 0.0  # of the process that ended it, without start-up; at least `seconds`
    estimated_seconds: float | None = None  # what the plan expected of the wall time, with start-up
    images_per_second: float = 0.0
    peak_memory_gib: float = 0.0
    tables: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    predictions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    finished: str = ""  # UTC, ISO 8601
    digest: str = ""  # SHA-256 of all other fields, which shows whether the file was altered

    @property
    def limit(self) -> int:
        return self.data.get("limit") or 0

    @property
    def recipe_label(self) -> str:
        return recipe_label(self.recipe_name, self.overrides, self.limit)

    @property
    def headline(self) -> str:
        """ "imagenet_finetune: top1 83.66 ± 0.17" or "imagenet_a: skipped: ..."."""
        if self.status != "ok":
            return printable(f"{self.task}: {self.status}: {self.reason}")
        error = f" ± {self.stderr[self.metric]:.2f}" if self.metric in self.stderr else ""
        return f"{self.task}: {self.metric} {self.metrics[self.metric]:.2f}{error}"


def recipe_label(name: str, overrides: dict[str, Any], limit: int = 0) -> str:
    """ "paper" for the recipe without overrides, else "paper with knob=value, ..."; with --limit ", limit N" behind."""
    knobs = ", ".join(f"{knob}={as_typed(value)}" for knob, value in sorted(overrides.items()))
    return (f"{name} with {knobs}" if overrides else name) + (f", limit {limit}" if limit else "")
