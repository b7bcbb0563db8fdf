"""What a plan costs as a whole, and what of it fits into a budget."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.cost import FLOPS, MEASURED, RECORDS, Rates, estimate, hours_in_words, hours_of
from benchmarks.plan import Item, jobs_to_do
from mae_core.progress import duration


def with_estimates(items: Sequence[Item], rates: Rates) -> list[Item]:
    """The items, those to do with what they are expected to take."""
    found = []
    for item in items:
        expected = estimate(item.job, rates) if item.state == "to do" else None
        if expected:
            job = replace(item.job, estimated_seconds=round(expected.seconds, 1))
            item = replace(item, job=job, source=expected.source)
        found.append(item)
    return found


def cost_line(items: Sequence[Item], wall: float, how: str) -> str:
    """What all that is to do will take. wall: seconds from start to end, run as `how` says."""
    jobs, sources = jobs_to_do(items), [item.source for item in items if item.state == "to do"]
    by = [f"{sources.count(source)} by {source}" for source in (MEASURED, RECORDS, FLOPS) if source in sources]
    unknown = sum(job.estimated_seconds is None for job in jobs)
    by += [f"{unknown} of unknown length, which {'is' if unknown == 1 else 'are'} not counted"] * bool(unknown)
    return f"{hours_in_words(jobs)}, {duration(wall)} {how} ({', '.join(by)})"


def within(items: Sequence[Item], hours: float) -> list[Item]:
    """The items, those that do not fit into so many GPU hours (on a CPU core hours) left out. The cheapest come first;
    what takes a classifier comes behind its fine-tuning, and goes with it."""
    by_work = {item.job.work: item for item in items}
    left = hours
    out: dict[Path, Item] = {}

    def rank(item: Item) -> tuple[float, bool]:
        first = by_work.get(item.finetune.work) if item.finetune else None
        return max(hours_of(item.job), hours_of(first.job) if first else 0.0), first is not None

    for item in sorted((item for item in items if item.state == "to do"), key=rank):
        needed = hours_of(item.job)
        if item.finetune and item.finetune.work in out:
            why = f"over --budget: so is {item.finetune.task.name}, which it takes the classifier of"
        elif needed > left:
            why = f"over --budget: {needed:.3g} hours, {left:.3g} of {hours:.3g} are left"
        else:
            left -= needed
            continue
        out[item.job.work] = replace(item, state="left out", why=why)
    return [out.get(item.job.work, item) for item in items]
