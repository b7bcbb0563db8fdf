"""Our number beside a published one: do they match, and if not, what of the record could explain it?

The tolerance is THRESHOLD standard errors of the difference. Four errors enter it, in quadrature:

- the sampling of the test images, of ours (from its record) and of the published number: binomial for an accuracy, else
  taken to be as large as ours. All seeds see the same images, so several of them make this error no smaller. The two
  are not independent, being of one test set, so the tolerance is on the safe side.
- the spread over seeds, of ours and of the published number, each over the root of how many seeds were averaged: our
  own spread where there are several seeds, else the published one (of ViT-B and ViT-L fine-tuned), else none.
"""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

from benchmarks.checkpoints import Pretraining, in_words, is_random, pretraining_of
from benchmarks.deviations import deviations, other_method
from benchmarks.tables import Column, Published
from transfer.task import Record, recipe_label

THRESHOLD = 2.0
OFFICIAL = ("paper", "official data")  # the labels of recipe and data whose numbers are compared
# What a checkpoint that does not say how it was pre-trained is taken for: the encoders that MAE's authors released.
ASSUMED = Pretraining(1600, 1600, "normalised pixels")


class Number(NamedTuple):
    """A cell's mean over its seeds. stderr: of one run, from the sampling of the test images; sd: over seeds."""

    value: float
    stderr: float | None
    sd: float | None
    seeds: int


class Verdict(NamedTuple):
    """words: "matches", "below by 0.4 (2.1 SE)", "not comparable: ...", or "" where nothing is published for that arch.
    why: what could explain it, a sentence each. reference: the published row; delta: ours minus that row."""

    words: str = ""
    why: tuple[str, ...] = ()
    reference: Published | None = None
    delta: float | None = None


def judge(
    column: Column,
    records: Sequence[Record],
    number: Number,
    side: str,
    section: tuple[str, str],
    published: Sequence[Published],
) -> Verdict:
    """The verdict on the number of one cell, made of these records. side: input side in px, "" if unknown. section: the
    labels of its recipe and of its data. published: what is published for the table by that recipe, else by the
    paper's."""
    checkpoint = records[0].checkpoint
    rows = [n for n in published if is_for(n, column, str(checkpoint.get("arch")))]
    if not rows:
        return Verdict()
    recipes = {n.recipe or OFFICIAL[0] for n in rows}
    official = section[0] in recipes and section[1] == OFFICIAL[1] and column.train_fraction == 1
    fitting = [n for n in rows if side in ("", n.resolution)] if official else []
    reference = nearest_row(fitting, column, pretraining_of(checkpoint))
    delta = None if reference is None else number.value - float(reference.value)
    obstacles = obstacles_of(column, records, section, recipes)
    if official and reference is None:
        sides = " or ".join(dict.fromkeys(n.resolution for n in rows))
        obstacles.append((f"input of {side or 'unknown'} px", f"published numbers are for {sides} px"))
    if reference is not None and delta is not None and not obstacles:
        words = compared(column, records[0].n_eval, number, delta, reference, rows)
        if words:
            length = other_length(column, pretraining_of(checkpoint), reference)
            return Verdict(words + length, deviations(column, records, reference), reference, delta)
        obstacles.append(("no standard error", "neither the record nor its number of test images gives one"))
    short, why = zip(*obstacles)
    return Verdict(f"not comparable: {'; '.join(short)}", why, reference, delta)


def is_for(n: Published, column: Column, arch: str) -> bool:
    """Whether a published number is of the column's method, whoever ran it: "MAE" or "MAE, mmpretrain"."""
    of_method = column.reference and (n.method == column.reference or n.method.startswith(f"{column.reference}, "))
    return bool(of_method) and (n.task, n.metric, n.arch) == (column.task, column.metric, arch)


def nearest_row(rows: Sequence[Published], column: Column, ours: Pretraining) -> Published | None:
    """The row of our pre-training length, else of the nearest (by ratio); among those one of our target, then one of
    the paper's own. None if the rows are of several input sides, or none is there."""
    epochs, target = ours.epochs or ASSUMED.epochs, ours.target or ASSUMED.target
    assert epochs is not None

    def distance(n: Published) -> tuple[float, bool, bool, bool]:
        length = abs(math.log(int(n.epochs) / epochs)) if n.epochs else 0.0
        return length, bool(n.target) and n.target != target, n.method != column.reference, n.target != target

    return min(rows, key=distance) if len({n.resolution for n in rows}) == 1 else None


def obstacles_of(
    column: Column, records: Sequence[Record], section: tuple[str, str], recipes: Collection[str]
) -> list[tuple[str, str]]:
    """Why a number cannot be compared with any published one, each in a few words and as a sentence. recipes: those
    that the published numbers are of."""
    recipe, data = section
    first, found = records[0], []
    if column.reference.startswith("MAE"):
        if is_random(first.checkpoint):
            found.append(("random weights", "the encoder was not pre-trained"))
        elif method := other_method(first.checkpoint):
            found.append((f"an encoder of {method}", f"the published number is MAE's, the checkpoint is {method}'s"))
    if column.tolerance is not None and (first.checkpoint.get("meta") or {}).get("encoder_sha256"):
        found.append(("other weights", "the published number is of the released classifier, this one was trained here"))
    if first.limit:
        found.append((f"limited to {first.limit} images", f"at most {first.limit} images of each split were used"))
        recipe = recipe.replace(f", limit {first.limit}", "", 1)
    if recipe not in recipes:
        found.append((f"recipe {recipe}", recipe_sentence(first)))
    if data != OFFICIAL[1]:
        findings = dict.fromkeys(finding for r in records for finding in r.data.get("findings") or ())
        lack = f": {'; '.join(findings)}" if findings else ""
        found.append((data, f"the data are not the official set but {data}{lack}"))
    if column.train_fraction < 1:
        share = f"{100 * column.train_fraction:g} % of the training images"
        found.append((share, f"trained on {share}, published numbers are for all of them"))
    return found


def recipe_sentence(record: Record) -> str:
    if record.recipe_name == "mini":
        return "the mini recipe is made for the generated miniature"
    knobs = {knob: value for knob, value in record.overrides.items() if knob != "train_fraction"}
    if knobs:
        return f"recipe knobs differ from the published recipe: {recipe_label('', knobs).removeprefix(' with ')}"
    if record.recipe_name != "paper":
        return f"{record.recipe_name} is another recipe than the one of the published number"
    return "the classifier that was evaluated was not fine-tuned by the published recipe on the official data"


def compared(
    column: Column, images: int, number: Number, delta: float, reference: Published, rows: Sequence[Published]
) -> str:
    """ "matches", "below by 0.4 (2.1 SE)" or "above ..."; "" without a standard error."""
    side = "below" if delta < 0 else "above"
    if column.tolerance is not None:
        # Rounded, so that binary fractions cannot decide.
        inside = round(abs(delta), 6) <= column.tolerance
        return "matches" if inside else f"{side} by {abs(delta):.2f} (tolerance {column.tolerance:g})"
    error = standard_error(column, images, number, reference, rows)
    if not error:
        return ""
    if abs(delta) <= THRESHOLD * error:
        return "matches"
    return f"{side} by {abs(delta):.1f} ({abs(delta) / error:.1f} SE)"


def standard_error(
    column: Column, images: int, number: Number, reference: Published, rows: Sequence[Published]
) -> float | None:
    """Of the difference, in the metric's unit; None if the sampling error of ours is not known."""
    accuracy = column.metric.startswith("top1") and images > 0
    ours = number.stderr
    if ours is None:
        ours = binomial(number.value, images) if accuracy else None
    if ours is None:
        return None
    theirs = binomial(float(reference.value), images) if accuracy else ours
    spreads = [float(n.sd) for n in rows if n.sd]
    published = spreads[0] if spreads else number.sd or 0.0
    own = published if number.sd is None else number.sd
    seeds = (own**2 / number.seeds, published**2 / int(reference.seeds or 1))
    return math.sqrt(ours**2 + theirs**2 + sum(seeds))


def binomial(percent: float, images: int) -> float:
    return math.sqrt(max(percent * (100 - percent), 0.0) / images)


def other_length(column: Column, ours: Pretraining, reference: Published) -> str:
    """ ", 200 against 300 epochs" where the published number is of another pre-training length than ours; of an unknown
    one ", 1600 epochs assumed"."""
    if not reference.epochs or column.tolerance is not None:
        return ""
    if not ours.epochs:
        return f", {reference.epochs} epochs assumed"
    return f", {ours.epochs} against {reference.epochs} epochs" if str(ours.epochs) != reference.epochs else ""


def reference_in_words(n: Published) -> str:
    """ "83.3 (MAE, mmpretrain, 800 ep, normalised pixels)"."""
    made = in_words(n.epochs, n.target)
    return f"{n.value} ({n.method}{f', {made}' if made else ''})"
