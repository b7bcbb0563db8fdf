"""Where a check runs and what it finds."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mae_core.errors import UserError

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"


@dataclass(frozen=True)
class Line:
    """One line of the table. figure: what was measured, with its unit and, where there is one, the bound that it was
    held to. values: the same for machines."""

    name: str
    status: str
    figure: str
    values: dict[str, Any]


def line(name: str, holds: bool, figure: str, **values: Any) -> Line:
    return Line(name, PASS if holds else FAIL, figure, values)


def skipped(name: str, why: str) -> Line:
    return Line(name, SKIPPED, why, {})


@dataclass(frozen=True)
class Room:
    """device: "cuda", or "cpu" for a rehearsal, in which the mini model stands in for every size and a few steps for
    many, so that the checks themselves can be tried anywhere. work: folder for data, runs and logs."""

    device: str
    work: Path

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"

    @property
    def base(self) -> str:
        return "vit_mini_patch8" if self.rehearsal else "vit_base_patch16"

    @property
    def large(self) -> str:
        return "vit_mini_patch8" if self.rehearsal else "vit_large_patch16"

    @property
    def recipe(self) -> str:
        return "mini" if self.rehearsal else "paper"

    def many(self, number: int, few: int) -> int:
        return few if self.rehearsal else number

    @property
    def data(self) -> Path:
        """The miniature with 2,560 unlabelled images (64 in a rehearsal)."""
        root = self.work / "data"
        if not (root / "complete").exists():
            call = [sys.executable, "-m", "transfer.miniature", "--out", str(root)]
            call += ["--unlabelled", str(self.many(2560, 64))]
            self.run("data", call)
            (root / "complete").touch()
        return root

    @property
    def unlabelled(self) -> Path:
        return self.data / "unlabelled"

    def run(self, name: str, command: Sequence[str], env: dict[str, str] | None = None, seconds: float = 3600) -> str:
        """Run a command of this project to its end; what it printed. UserError with its last line if it fails."""
        log = self.work / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            try:
                code: int | str = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, timeout=seconds,
                    check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = f"no end after {seconds:.0f} s"
        text = log.read_text(encoding="utf-8", errors="replace")
        if code != 0:
            raise UserError(f"{name} ended with {code}: {last_line(text)} (log: {log})")
        return text

    def pretraining(self, name: str, arch: str, *more: str, device: str = "") -> list[str]:
        """The command of a pre-training on the unlabelled images; its --out is work/NAME."""
        call = ["mae_core.pretrain", "--data", str(self.unlabelled), "--out", str(self.work / name), "--arch", arch]
        return [sys.executable, "-m", *call, "--device", device or self.device, *more]

    def tasks(self, arch: str, tasks: Sequence[str], settings: Sequence[str], *more: str) -> dict[str, dict[str, Any]]:
        """Run tasks on random weights of that size and the miniature, as a user does; {task: record}."""
        name = "-".join((arch, *tasks, *more)).replace("--", "")
        out = self.work / name
        script = str(Path(__file__).parent.parent / "run_all.py")
        call = [sys.executable, script, "--ckpt", f"random:{arch}", "--data", str(self.data), "--out", str(out)]
        call += ["--recipe", self.recipe, "--device", self.device, "--tasks", *tasks, "--set", *settings, *more]
        self.run(name, call)
        found = [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("runs/*/*/*/record.json")]
        return {record["task"]: record for record in found}


def last_line(text: str) -> str:
    """The last line that says something."""
    said = [words.strip() for words in text.replace("\r", "\n").splitlines() if words.strip(" =-\t")]
    return said[-1] if said else "it printed nothing"


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The epochs of a training: what its log.jsonl says of each."""
    return [json.loads(text) for text in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """|ours - truth| / |truth|, by the Euclidean norm, in float64."""
    a, b = ours.detach().double().cpu(), truth.detach().double().cpu()
    return float((a - b).norm() / b.norm())
