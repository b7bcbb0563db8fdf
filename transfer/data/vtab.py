"""VTAB-1k (Zhai et al. 2019, arXiv 1910.04867): 19 sets of 1000 training images each, as lists.

    DIR/vtab-1k/SET/{train800,val200,train800val200,test}.txt, images/*

A line is `path label`, the path relative to the set's folder. Values are chosen on val200; the number is that of test,
after training on train800val200.
"""

from collections import Counter
from functools import partial
from pathlib import Path

from transfer.data.labelled import LabelledSet, Reading, checked, read_list

TEST, VAL200 = "test", "val200"
TRAINED_ON = {TEST: "train800val200", VAL200: "train800"}
# Folder -> classes (KMnP/vpt tune_vtab.py) and test images (VPT's table of its data sets, arXiv 2203.12119).
NATURAL = {
    "cifar": (100, 10000),
    "caltech101": (102, 6084),
    "dtd": (47, 1880),
    "oxford_flowers102": (102, 6149),
    "oxford_iiit_pet": (37, 3669),
    "svhn": (10, 26032),
    "sun397": (397, 21750),
}
SPECIALIZED = {
    "patch_camelyon": (2, 32768),
    "eurosat": (10, 5400),
    "resisc45": (45, 6300),
    "diabetic_retinopathy": (5, 42670),
}
STRUCTURED = {
    "clevr_count": (8, 15000),
    "clevr_dist": (6, 15000),
    "dmlab": (6, 22735),
    "kitti": (4, 711),
    "dsprites_loc": (16, 73728),
    "dsprites_ori": (16, 73728),
    "smallnorb_azi": (18, 12150),
    "smallnorb_ele": (9, 12150),
}
GROUPS = {"natural": NATURAL, "specialized": SPECIALIZED, "structured": STRUCTURED}


def read_vtab(folder: Path, classes: int, scored_on: str = TEST) -> Reading:
    """One set. scored_on: "test", or "val200"."""
    problems: list[str] = []
    lists = {name: read_list(folder / f"{name}.txt", folder, problems) for name in (*TRAINED_ON.values(), *TRAINED_ON)}
    parts = Counter(lists["train800"].labels) + Counter(lists[VAL200].labels)
    if not problems and parts != Counter(lists["train800val200"].labels):
        problems.append(f"{folder}/train800val200.txt is not train800.txt and val200.txt together: unpack them again")
    return checked(folder, lists[TRAINED_ON[scored_on]], lists[scored_on], classes, problems)


VTAB = tuple(
    LabelledSet(
        name=f"vtab_{name}",
        title=f"VTAB-1k {name}",
        counts=(classes, 1000, images),
        layout="{train800,val200,train800val200,test}.txt and images/*",
        read=partial(read_vtab, classes=classes),
        folder=f"vtab-1k/{name}",
    )
    for group in GROUPS.values()
    for name, (classes, images) in group.items()
)
