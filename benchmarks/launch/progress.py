"""What of a plan is at work or queued at this moment."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.launch.slurm import in_queue
from benchmarks.launch.units import key_of
from benchmarks.plan import Item
from mae_core.claim import Watch, in_words


def with_progress(items: Sequence[Item], args: argparse.Namespace) -> list[Item]:
    """The items, those to do with the run that is at work on them, or with the state of their SLURM job."""
    queued = in_queue(items, args.out) if args.launcher == "slurm" else {}
    found = []
    for item in items:
        owner = Watch(item.job.work).holder() if item.state == "to do" else None
        if item.state == "to do" and (why := queued.get(key_of(item.job))):
            item = replace(item, state="at work" if ": RUNNING" in why else "queued", why=why)
        elif owner:
            item = replace(item, state="at work", why=in_words(owner))
        found.append(item)
    return found
