"""What a case is, how it is judged, and the table of all."""

import re
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.campaign.starts import Done


class Broken(AssertionError):
    """The product did not hold."""


class Skipped(Exception):
    """This machine cannot try the case; the text says why."""


@dataclass(frozen=True)
class Case:
    """One thing to try. run: called with an empty folder; raises Broken or Skipped. small: it is among those that the
    tests run too. tries: how many faults it counts for in the table."""

    kind: str
    name: str
    run: Callable[[Path], None]
    small: bool = False
    tries: int = 1


@dataclass(frozen=True)
class Outcome:
    kind: str
    name: str
    result: str  # "held", "broken" or "skipped"
    why: str
    tries: int
    seconds: float


def attempt(case: Case, work: Path) -> Outcome:
    began, result, why = time.monotonic(), "held", ""
    work.mkdir(parents=True)
    try:
        case.run(work)
    except Skipped as e:
        result, why = "skipped", str(e)
    except Broken as e:
        result, why = "broken", str(e)
    except Exception:  # a fault of the case counts as broken, and the other cases still run
        result, why = "broken", "the case itself failed: " + traceback.format_exc()
    if result != "broken":
        shutil.rmtree(work, ignore_errors=True)
    return Outcome(case.kind, case.name, result, why, case.tries, time.monotonic() - began)


def table(outcomes: Iterable[Outcome]) -> str:
    """Tried, held, broken and skipped for each kind, in Markdown."""
    counts: dict[str, Counter] = {}
    for one in outcomes:
        for kind in (one.kind, "**all**"):
            counts.setdefault(kind, Counter())[one.result] += one.tries
    counts["**all**"] = counts.pop("**all**", Counter())  # last
    lines = ["| kind of fault | tried | held | broken | skipped |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind, found in counts.items():
        held, broken, skipped = (found[result] for result in ("held", "broken", "skipped"))
        lines.append(f"| {kind} | {held + broken} | {held} | {broken} | {skipped} |")
    return "\n".join(lines)


TRACEBACK = re.compile(r"^ *Traceback \(most recent call last\)", re.MULTILINE)


def require(held: object, what: str, done: Done | None = None) -> None:
    if not held:
        printed = f"\n--- exit code {done.code}, printed:\n{done.text[-3000:]}" if done else ""
        raise Broken(what + printed)


def no_traceback(done: Done, work: Path) -> None:
    """Neither printed nor left in a log or an error.txt below the folder. With no traceback a killed process says
    nothing, which is for the caller to judge."""
    require(not TRACEBACK.search(done.text), "a traceback was printed", done)
    for path in (*work.rglob("error.txt"), *work.rglob("*.log")):
        text = path.read_text("utf-8", "replace")
        require(not TRACEBACK.search(text), f"a traceback in {path.name}: {text[-1500:]}", done)


def refused(done: Done, work: Path, said: str = "") -> None:
    """A sentence and an exit code of its own: no traceback, no signal, no acceptance, no silence."""
    require(done.code != -9, f"it hung, or filled the memory: {done.seconds:.0f} s", done)
    no_traceback(done, work)
    require(done.code in (1, 2), "accepted, or killed", done)
    lines = [line for line in done.text.strip().splitlines() if not line.startswith("tables: ")]
    require(lines and len(lines[-1].split()) > 4, "no sentence", done)
    require(said in done.text, f"it does not say {said!r}", done)


def succeeded(done: Done, work: Path) -> None:
    require(done.code == 0, "the command failed", done)
    no_traceback(done, work)
