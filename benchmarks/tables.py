"""The tables of the MAE paper as data.

To add a table: add a `Table` to TABLES and, if numbers are published for it, results/published/<published>.csv.
"""

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from mae_core.errors import UserError
from transfer.data.lowshot import SUBSETS
from transfer.data.shipped import shipped
from transfer.data.vtab import GROUPS, VTAB
from transfer.task import Record

PUBLISHED = shipped("published")
FROM_SCRATCH = "supervised, from scratch"


@dataclass(frozen=True)
class Column:
    """One metric of one task, in the metric's own unit.

    better: "higher", "lower", or "" if unknown.
    optional: shown only in sections with a record that has the metric or was meant to (its headline).
    reference: the published method that ours is compared with (benchmarks/verdict.py). delta: whether the difference
    has a column. tolerance: what two numbers of the very same weights may differ by, in place of standard errors.
    train_fraction: the share of the training images that was used; published numbers are for all of them. mean_of: the
    tasks whose mean it is, where all of them have a number.
    """

    task: str
    metric: str
    title: str
    better: str = "higher"
    decimals: int = 2
    optional: bool = False
    reference: str = "MAE"
    delta: bool = True
    tolerance: float | None = None
    train_fraction: float = 1.0
    mean_of: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.task}.{self.metric}" + ("" if self.train_fraction == 1 else f"@{self.train_fraction:g}")

    @property
    def header(self) -> str:
        arrow = {"higher": "↑", "lower": "↓"}.get(self.better, "")
        return f"{self.title} {arrow}".strip()

    def shows(self, record: Record) -> bool:
        return (record.task, train_fraction(record)) == (self.task, self.train_fraction)


@dataclass(frozen=True)
class Table:
    """One table: its columns, and the file in results/published whose rows for these columns it shows."""

    name: str
    title: str
    caption: str
    columns: tuple[Column, ...]
    published: str = ""
    by_engine: bool = False  # its tasks have several engines: each has sections of its own


def train_fraction(record: Record) -> float:
    return record.recipe.get("train_fraction", 1.0)


def with_fractions(table: Table, records: Iterable[Record]) -> Table:
    """The table, each column followed by one for every smaller share of the training images that its task's records
    were trained on."""
    shares: dict[str, set[float]] = {}
    for r in records:
        shares.setdefault(r.task, set()).add(train_fraction(r))
    columns = []
    for c in table.columns:
        columns.append(c)
        for share in sorted(shares.get(c.task, set()) - {1.0}, reverse=True):
            title = f"{c.title}, {100 * share:g} % of training"
            columns.append(replace(c, title=title, optional=True, train_fraction=share))
    return replace(table, columns=tuple(columns))


DEPTH = (("delta1", "delta 1", "higher", 2), ("rmse", "RMSE", "lower", 3), ("abs_rel", "AbsRel", "lower", 3))
TABLES = (
    Table(
        name="imagenet",
        title="ImageNet-1K",
        caption="Top-1 accuracy (%), as in Tables 3 and 12 of the MAE paper.",
        published="imagenet",
        columns=(
            Column("imagenet_finetune", "top1", "fine-tuning"),
            Column("imagenet_linprobe", "top1", "linear probing"),
            Column("imagenet_knn", "top1", "k-NN", optional=True),
            Column(
                "imagenet_eval",
                "top1",
                "evaluation only",
                decimals=3,
                optional=True,
                reference="MAE, official PyTorch code",  # its fine-tuned files: the evaluation checks itself
                tolerance=0.1,  # users of its own code differ by 0.08: facebookresearch/mae issue 90
            ),
        ),
    ),
    Table(
        name="frozen",
        title="ImageNet-1K, frozen encoder",
        caption="Top-1 accuracy (%) of what is trained on a frozen encoder's tokens. Attentive probing: attention "
        "pools the patches (EP, ICLR 2026). Heads of one pass (DINOv2): one is chosen on held-out training images; "
        "the linear one best on the test images is no result; its optimism: how far it is above the one chosen.",
        published="frozen",
        columns=(
            Column("imagenet_attnprobe", "top1", "attentive probing, last epoch"),
            Column("imagenet_probes", "top1_linear", "linear heads, chosen on train, last epoch", optional=True),
            Column("imagenet_probes", "top1_attentive", "attentive heads, chosen on train, last epoch", optional=True),
            Column("imagenet_probes", "top1", "all heads, chosen on train, last epoch", optional=True),
            Column("imagenet_probes", "top1_best_on_test", "best linear head on test, no result", "", optional=True),
            Column("imagenet_probes", "optimism", "optimism of that", "", optional=True),
        ),
    ),
    Table(
        name="lowshot",
        title="ImageNet-1K from few labels",
        caption="Top-1 accuracy (%) from the lists of SimCLR (1 and 10 % of the training images) and MSN (1, 2 and 5 "
        "images a class; three lists, for the seeds 0, 1 and 2): logistic regression on the features of the frozen "
        "encoder, and fine-tuning.",
        columns=tuple(
            Column(f"imagenet_{how}_{subset.name}", "top1", f"{title}, {short}", optional=True, reference="")
            for how, title in (("logreg", "logistic regression"), ("finetune", "fine-tuning"))
            for subset, short in zip(SUBSETS, ("1 %", "10 %", "1 image", "2 images", "5 images"))
        ),
    ),
    Table(
        name="frozen_segmentation",
        title="Semantic segmentation by a frozen encoder",
        caption="mIoU (%) on the validation images. Linear: one layer on the patch tokens, at the images' own size; "
        "DINOv3's are the best of eight evaluations there. k-NN: the nearest training patches (CAPI), images scaled.",
        published="frozen_segmentation",
        columns=(
            Column("ade20k_linear", "miou", "ADE20K, linear"),
            Column("ade20k_knn", "miou", "ADE20K, k-NN", optional=True),
            Column("voc_linear", "miou", "VOC 2012, linear", optional=True),
        ),
    ),
    Table(
        name="depth",
        title="Depth by a frozen encoder",
        caption="NYU Depth V2: one layer on the patch tokens of square windows, or DPT's head on the tokens of four "
        "blocks, otherwise as DINOv2. Pixels whose depth is right within a factor of 1.25 (%), RMSE (m), mean relative "
        "error; means over images. DINOv3's rows are of whole images, without the first token.",
        published="depth",
        columns=tuple(
            Column(task, metric, title + name, better=better, decimals=decimals, optional=bool(title))
            for task, title in (("nyu_linear", ""), ("nyu_dpt", "DPT, "))
            for metric, name, better, decimals in DEPTH
        ),
    ),
    Table(
        name="partial",
        title="ImageNet-1K, partial fine-tuning",
        caption="Top-1 accuracy (%) by the number of last blocks that are tuned, as in Figure 9 of the MAE paper: 0 is "
        "linear probing, 0.5 the MLP half of the last block; with all blocks the embeddings are tuned too. Other "
        "blocks are frozen.",
        published="partial",
        columns=tuple(
            Column("imagenet_partial", f"top1@{k:g}", f"{k:g}", optional=True, delta=False)
            for k in (0, 0.5, 1, 2, 4, 6, 12, 18, 24, 32, 40)
        ),
    ),
    Table(
        name="scratch",
        title="ImageNet-1K, supervised training from scratch",
        caption="Top-1 accuracy (%) from random weights, as in Table 3 and appendix A.2 of the MAE paper: of the "
        "moving average of the weights (EMA) and of the weights themselves.",
        published="scratch",
        columns=(
            Column("imagenet_scratch", "top1", "EMA", reference=FROM_SCRATCH),
            Column("imagenet_scratch", "top1_without_ema", "without EMA", reference=FROM_SCRATCH),
        ),
    ),
    Table(
        name="robustness",
        title="Robustness of the fine-tuned classifier",
        caption="As in Table 13 of the MAE paper. IN-C: mean corruption error (mCE, AlexNet = 100) and the plain mean "
        "error (%). Others: top-1 accuracy (%), on IN-A and IN-R among the 200 classes of each set; clean: ImageNet "
        "validation images of the same classes. IN-V2: matched frequency. ReaL: any of an image's new labels is right. "
        "ObjectNet: the images of its 113 classes, all 1000 of ImageNet compete.",
        published="robustness",
        columns=(
            Column("imagenet_c", "mce", "IN-C mCE", better="lower"),
            Column("imagenet_c", "mean_err", "IN-C mean error", better="lower", optional=True),
            Column("imagenet_a", "top1", "IN-A"),
            Column("imagenet_a", "clean_200_top1", "clean, classes of IN-A", optional=True),
            Column("imagenet_r", "top1", "IN-R"),
            Column("imagenet_r", "clean_200_top1", "clean, classes of IN-R", optional=True),
            Column("imagenet_sketch", "top1", "IN-Sketch"),
            Column("imagenet_v2", "top1", "IN-V2", optional=True),
            Column("imagenet_real", "top1", "ReaL", optional=True),
            Column("objectnet", "top1", "ObjectNet", optional=True),
        ),
    ),
    Table(
        name="calibration",
        title="Calibration of the fine-tuned classifier",
        caption="ECE: expected calibration error (%) of the first class's probability, in 15 bins of equal width. NLL: "
        "mean negative log-likelihood of the label. On IN-A and IN-R among the 200 classes of each set. ECE does not "
        "rank encoders: a classifier that knows little and claims no more has a low one.",
        columns=tuple(
            Column(task, metric, f"{title} {name}", better="lower", optional=True, reference="")
            for task, title in (
                ("imagenet_finetune", "fine-tuning"),
                ("imagenet_eval", "evaluation only"),
                ("imagenet_v2", "IN-V2"),
                ("imagenet_a", "IN-A"),
                ("imagenet_r", "IN-R"),
                ("imagenet_sketch", "IN-Sketch"),
            )
            for metric, name in (("ece", "ECE"), ("loss", "NLL"))
        ),
    ),
    Table(
        name="coco",
        title="COCO object detection and instance segmentation",
        caption="Mask R-CNN with a ViT-FPN, box and mask AP (%) on COCO val2017, as in Table 4 of the MAE paper.",
        published="coco",
        columns=(
            Column("coco", "box_ap", "box AP"),
            Column("coco", "mask_ap", "mask AP"),
        ),
        by_engine=True,
    ),
    Table(
        name="inaturalist_places",
        title="iNaturalist and Places, fine-tuning",
        caption="Top-1 accuracy (%), as in Table 6 of the MAE paper. Its rates and epochs were never published: the "
        "recipe is that of ImageNet, a stand-in, unless the section names another.",
        published="inaturalist_places",
        columns=(
            Column("inat2017", "top1", "iNat 2017"),
            Column("inat2018", "top1", "iNat 2018"),
            Column("inat2019", "top1", "iNat 2019"),
            Column("inat2021", "top1", "iNat 2021", optional=True),
            Column("places205", "top1", "Places205"),
            Column("places365", "top1", "Places365"),
        ),
    ),
    Table(
        name="vtab",
        title="VTAB-1k, fine-tuning",
        caption="Top-1 accuracy (%) on the test images after training on the 1000 of train800val200; means over "
        "the sets of each group and over all 19, where each has a number.",
        columns=(
            *(
                Column("vtab", group, group, reference="", mean_of=tuple(f"vtab_{name}" for name in sets))
                for group, sets in GROUPS.items()
            ),
            Column("vtab", "all", "all 19", reference="", mean_of=tuple(known.name for known in VTAB)),
            *(Column(known.name, "top1", known.folder.split("/")[1], optional=True, reference="") for known in VTAB),
        ),
    ),
    Table(
        name="ade20k",
        title="ADE20K semantic segmentation",
        caption="UperNet, mIoU (%) on the validation images, which are resized for the test and scored at their own "
        "size; one scale unless said otherwise. The paper's are those of its Table 5.",
        published="ade20k",
        columns=(
            Column("ade20k", "miou", "mIoU"),
            Column("ade20k", "miou_ms", "mIoU, multi-scale", optional=True),
            Column("ade20k", "macc", "mean accuracy", optional=True),
            Column("ade20k", "aacc", "pixel accuracy", optional=True),
        ),
    ),
)


class Published(NamedTuple):
    """One published number as it was printed, and where. resolution: input side in px. epochs, target: of its
    pre-training, "" if it has none or the source does not say. seeds: how many runs it is the mean of, sd: their
    spread; "" for one run. recipe: the name of the further recipe that it is of; "" for the paper's."""

    table: str
    method: str
    arch: str
    epochs: str
    target: str
    resolution: str
    task: str
    metric: str
    value: str
    seeds: str
    sd: str
    source: str
    confidence: str
    recipe: str = ""


def read_published(name: str) -> list[Published]:
    """The rows of results/published/NAME.csv in file order; UserError if the file is not there."""
    path = PUBLISHED / f"{name}.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [Published(**row) for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: restore it from the repository (git checkout results/published)") from None


def published_numbers(table: Table, recipe: str = "paper") -> list[Published]:
    """What is published for the table's columns by that recipe; nothing for a table without a file."""
    wanted, found = (
        {(c.task, c.metric) for c in table.columns},
        read_published(table.published) if table.published else [],
    )
    return [n for n in found if (n.task, n.metric) in wanted and (n.recipe or "paper") == recipe]
