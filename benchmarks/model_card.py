"""A model card of one checkpoint, as the Hugging Face Hub reads it: its numbers as `model-index`, and the tables.

Only a number of the published recipe on the complete official data goes by the data set's name alone; in all others
recipe and data are part of that name, so that no leaderboard takes the miniature for ImageNet.
"""

import re
from collections.abc import Iterator

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from benchmarks.checkpoints import pretraining
from benchmarks.render import checkpoints, page, sections_markdown, tables_of
from benchmarks.rows import Line, Section, fill
from benchmarks.suite import TASKS
from benchmarks.tables import Column
from transfer.task import Record

# The Hub's names of the tasks, by metric; of all others "image-classification".
TYPES = {"box_ap": "object-detection", **dict.fromkeys(("mask_ap", "miou", "macc", "aacc"), "image-segmentation")}
METRICS = {"top1": "accuracy", "miou": "mean_iou", "box_ap": "mAP", "mask_ap": "mAP"}


def model_card(sections: dict[Section, list[Record]], records: list[Record]) -> str:
    """The README.md of a checkpoint's repository. records: all of this checkpoint's."""
    checkpoint = records[0].checkpoint
    results = list(eval_results(sections))
    data = ModelCardData(
        model_name=checkpoint["name"],
        eval_results=results or None,
        tags=["masked-autoencoder", "vision-transformer", "mae-transfer"],
    )
    versions = {", ".join(f"{name} {version}" for name, version in r.versions.items()) for r in records}
    provenance = [checkpoints(records), *(f"Versions: {found}." for found in sorted(versions) if found)]
    parts = [f"# {checkpoint['name']}", f"{checkpoint['arch']}. Pre-training: {pretraining(checkpoint) or 'unknown'}."]
    text = page([*parts, *sections_markdown(sections), "## Provenance", *provenance])
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def eval_results(sections: dict[Section, list[Record]]) -> Iterator[EvalResult]:
    """One for each cell of our tables that holds a number: the mean over its seeds."""
    for section, members in sections.items():
        for table, found in tables_of(members):
            for line in fill(table, section, found):
                for column in () if line.published else table.columns:
                    if column.key in line.cells and line.cells[column.key].status == "ok":
                        yield eval_result(section, line, column)


def eval_result(section: Section, line: Line, column: Column) -> EvalResult:
    cell, family = line.cells[column.key], column.task.partition(":")[0]
    task = next((task for task in TASKS if task.name == family), None)
    title = column.task if task is None or column.task != family else task.title
    where, section_title = title.partition(",")[0], section.title[0].lower() + section.title[1:]
    share = "" if column.train_fraction == 1 else f"{100 * column.train_fraction:g} % of training"
    if not section.official or share:
        where = f"{where} ({', '.join(filter(None, (section_title, share)))})"
    seeds = f", mean of {cell.seeds} seeds" if cell.seeds > 1 else ""
    facts = (column.task, section_title, share, f"{line.image_size} px", line.engine, line.precision)
    return EvalResult(
        task_type=TYPES.get(column.metric.removesuffix("_ms"), "image-classification") if task else "other",
        task_name=title,
        dataset_type=re.sub("[^a-z0-9]+", "-", where.lower()).strip("-"),
        dataset_name=where,
        dataset_config=", ".join(filter(None, facts)),
        metric_type=METRICS.get(column.metric.partition("@")[0], column.metric),
        metric_name=f"{column.title} ({column.metric}{seeds})",
        metric_value=cell.value,
        metric_args={
            "seeds": cell.seeds,
            "standard_error": cell.stderr,
            "standard_deviation_over_seeds": cell.sd,
            "without": cell.without or None,
            "verdict": cell.verdict or None,  # beside the published number
        },
    )
