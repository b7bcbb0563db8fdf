"""ImageNet-1k with a frozen encoder: k-NN, attentive probing, many probes at once, logistic regression from few images.

python -m transfer.frozen --task imagenet_knn --ckpt FILE --data DIR --out DIR
"""

from dataclasses import replace
from functools import partial

from transfer.data.imagenet import inspect_imagenet
from transfer.data.inputs import detail, fit_batch
from transfer.data.lowshot import SUBSETS, inspect_subset
from transfer.frozen import attnprobe, features, knn, logreg, probes
from transfer.miniature import imagenet as miniature
from transfer.task import Task

KNN = Task(
    name="imagenet_knn",
    title="ImageNet-1k, k nearest neighbours",
    module="transfer.frozen",
    metric="top1",
    version=1,
    cost=5,
    recipe=knn.recipe,
    sources=knn.sources,
    inspect=inspect_imagenet,
    run=knn.knn,
    miniature=miniature.imagenet,
    objections=knn.objections,
    space=knn.space,
    parts=knn.parts,
    flops=features.flops,
    detail=detail,
    few=knn.few,
    trains=False,
)
ATTNPROBE = replace(
    KNN,
    name="imagenet_attnprobe",
    title="ImageNet-1k, attentive probing",
    cost=22,
    recipe=attnprobe.recipe,
    sources=attnprobe.sources,
    run=attnprobe.attnprobe,
    objections=attnprobe.objections,
    space=attnprobe.space,
    parts=attnprobe.parts,
    few=fit_batch,
    trains=True,
    opt_in=True,
)
PROBES = replace(
    ATTNPROBE,
    name="imagenet_probes",
    title="ImageNet-1k, many probes in one pass",
    cost=21,
    recipe=probes.recipe,
    sources=probes.sources,
    run=probes.probes,
    objections=probes.objections,
    space=probes.space,
    parts=probes.parts,
    few=probes.few,
)
LOGREG = tuple(
    replace(
        KNN,
        name=f"imagenet_logreg_{subset.name}",
        title=f"ImageNet-1k, logistic regression on {subset.title}",
        cost=6,
        recipe=logreg.recipe,
        sources=logreg.sources,
        inspect=partial(inspect_subset, subset),
        run=partial(logreg.logreg, subset=subset),
        miniature=miniature.imagenet_lists,
        objections=partial(logreg.objections, subset=subset),
        space=logreg.space,
        parts=logreg.parts,
        detail=lambda job: job.data.detail,
        few=lambda recipe, data: recipe,
        opt_in=True,
    )
    for subset in SUBSETS
)
TASKS = (KNN, ATTNPROBE, PROBES, *LOGREG)
