"""A frozen encoder on ImageNet-1k, ADE20K, VOC and NYUv2: k-NN, attentive and linear probes, logistic regression.

python -m transfer.frozen --task imagenet_knn --ckpt FILE --data DIR --out DIR
"""

from dataclasses import replace
from functools import partial

from transfer.data.ade20k import inspect_ade20k
from transfer.data.imagenet import inspect_imagenet
from transfer.data.inputs import detail, fit_batch
from transfer.data.lowshot import SUBSETS, inspect_subset
from transfer.data.nyu import inspect_nyu
from transfer.data.voc import inspect_voc
from transfer.frozen import attnprobe, depth, dpt, features, knn, logreg, patch_knn, probes, segment
from transfer.frozen.scenes import ADE20K, VOC
from transfer.miniature import dense
from transfer.miniature import depth as scenes_with_depth
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
    version=2,
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
        version=2,
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
ADE20K_LINEAR = Task(
    name="ade20k_linear",
    title="ADE20K, linear segmentation",
    module="transfer.frozen",
    metric="miou",
    version=3,
    cost=24,
    recipe=segment.recipe,
    sources=segment.sources,
    inspect=inspect_ade20k,
    run=partial(segment.segment, scenes=ADE20K),
    miniature=dense.ade20k,
    objections=segment.objections,
    space=partial(segment.space, classes=ADE20K.classes),
    parts=segment.parts,
    flops=features.flops,
    few=segment.few,
    opt_in=True,
)
VOC_LINEAR = replace(
    ADE20K_LINEAR,
    name="voc_linear",
    title="VOC 2012, linear segmentation",
    inspect=inspect_voc,
    run=partial(segment.segment, scenes=VOC),
    miniature=dense.voc,
    space=partial(segment.space, classes=VOC.classes),
)
ADE20K_KNN = Task(
    name="ade20k_knn",
    title="ADE20K, k nearest neighbours of patches",
    module="transfer.frozen",
    metric="miou",
    version=3,
    cost=6,
    recipe=patch_knn.recipe,
    sources=patch_knn.sources,
    inspect=inspect_ade20k,
    run=patch_knn.patch_knn,
    miniature=dense.ade20k,
    objections=patch_knn.objections,
    parts=patch_knn.parts,
    flops=features.flops,
    detail=patch_knn.detail,
    trains=False,
    opt_in=True,
)
NYU_LINEAR = replace(
    ADE20K_LINEAR,
    name="nyu_linear",
    title="NYU Depth V2, linear depth",
    metric="delta1",
    version=2,
    recipe=depth.recipe,
    sources=depth.sources,
    inspect=inspect_nyu,
    run=depth.linear,
    miniature=scenes_with_depth.nyu,
    space=depth.space,
    parts=depth.parts,
)
NYU_DPT = replace(
    NYU_LINEAR,
    name="nyu_dpt",
    title="NYU Depth V2, depth by DPT",
    recipe=dpt.recipe,
    sources=dpt.sources,
    run=dpt.dpt,
    space=dpt.space,
    parts=dpt.parts,
)
TASKS = (KNN, ATTNPROBE, PROBES, *LOGREG, ADE20K_LINEAR, VOC_LINEAR, ADE20K_KNN, NYU_LINEAR, NYU_DPT)
