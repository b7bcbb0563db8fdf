"""ImageNet-1k with a frozen encoder: k-NN, attentive probing.

python -m transfer.frozen --task imagenet_knn --ckpt FILE --data DIR --out DIR
"""

from dataclasses import replace

from transfer.data.imagenet import inspect_imagenet
from transfer.data.inputs import detail, fit_batch
from transfer.frozen import attnprobe, features, knn, probes
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
TASKS = (KNN, ATTNPROBE, PROBES)
