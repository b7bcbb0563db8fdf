"""The miniature of VTAB-1k in its list layout: each set has up to four shapes at 48 px, whatever its name means.

DIR/vtab-1k/SET/{train800,val200,train800val200,test}.txt, images/{train800val200,test}/*.jpg
"""

from pathlib import Path

from transfer.data.vtab import GROUPS
from transfer.miniature.labelled import SHAPES, draw_filled
from transfer.miniature.writer import Files, jpeg, rng_of, write_set

TRAIN, VAL, TEST = 24, 6, 10  # images of each class


def _files(seed: int, name: str, shapes: list[str]) -> Files:
    lists: dict[str, list[str]] = {key: [] for key in ("train800", "val200", "train800val200", "test")}
    for split, count in (("train800val200", TRAIN + VAL), ("test", TEST)):
        for index in range(count):
            for label, shape in enumerate(shapes):
                file = f"images/{split}/{index * len(shapes) + label:06d}.jpg"
                part = split if split == "test" else "train800" if index < TRAIN else "val200"
                for key in {part, split}:
                    lists[key].append(f"{file} {label}")
                yield file, jpeg(draw_filled(shape, "plain", rng_of(seed, f"vtab/{name}/{split}", label, index)))
    for key, lines in lists.items():
        yield f"{key}.txt", ("\n".join(lines) + "\n").encode()


def vtab(root: Path, seed: int = 0, name: str = "cifar") -> Path:
    """Write root/vtab-1k/NAME. Returns that folder; what already lies there is treated as by `write_set`."""
    classes, _ = next(group[name] for group in GROUPS.values() if name in group)
    shapes = list(SHAPES.values())[:classes]
    counts = {"train": (TRAIN + VAL) * len(shapes), "test": TEST * len(shapes), "lists": 4}
    return write_set(root / "vtab-1k", name, seed, counts, _files(seed, name, shapes))
