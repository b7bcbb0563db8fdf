"""ImageNet-A, -R, -Sketch and -C on disk, and the check that they are complete and official."""

from collections.abc import Mapping
from pathlib import Path

from transfer.data.findings import Data, found, incomplete, missing, preview, unusable
from transfer.data.imagenet import columns, read_split, without, wnids
from transfer.data.split import Split, fingerprint, joined

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
SEVERITIES = (1, 2, 3, 4, 5)
# The released archives unpack into groups (noise/gaussian_noise/1/...); others lay the corruptions side by side.
GROUPS = ("", "noise", "blur", "weather", "digital")
# Sketch's README says 50,000; its archive holds 50,889.
COUNTS = {"imagenet_a": 7500, "imagenet_r": 30000, "imagenet_sketch": 50889}
FOLDERS = {
    "imagenet_a": ("imagenet-a",),
    "imagenet_r": ("imagenet-r",),
    "imagenet_sketch": ("imagenet-sketch/sketch", "imagenet-sketch", "sketch"),
}


def folder_of(root: Path, name: str) -> Path | None:
    """The first of the usual folders that holds class folders, else the first that exists."""
    there = [root / f for f in FOLDERS[name] if (root / f).is_dir()]
    return next((f for f in there if any(d.name in wnids() for d in f.iterdir())), there[0] if there else None)


def inspect_shift(name: str, root: Path) -> Data:
    """ImageNet-A, -R or -Sketch below root, as FOLDER/WNID/*."""
    folder = folder_of(root, name)
    if folder is None:
        return missing(root, f"it must lie at {root / name.replace('_', '-')}/WNID/*")
    split, problems = read_split(folder)
    allowed = sorted(columns(name)) if name != "imagenet_sketch" else range(len(wnids()))
    if foreign := sorted(wnids()[i] for i in split.classes.difference(allowed)):
        problems.append(
            f"{folder} has classes that are not among its {len(allowed)}: {preview(foreign)}; move them away"
        )
    problems += unusable(split.files)
    if problems:
        return incomplete(root, *problems)
    counts = {"classes": len(split.classes), "images": len(split.files)}
    official = {"classes": len(allowed), "images": COUNTS[name]}
    clean = clean_split(root) if name != "imagenet_sketch" else Split()
    detail, listing = f"{counts['classes']} classes, {counts['images']} images", fingerprint(root, split, clean)
    absent, chance = without(split.classes, allowed), 100 / len(split.classes)
    return found(root, folder, detail, listing, counts, official, absent, chance)


def clean_split(root: Path) -> Split:
    """ImageNet's own validation images, if present: the accuracy on them is reported beside that on A and R."""
    folder = root / "imagenet" / "val"
    return read_split(folder)[0] if folder.is_dir() else Split()


def corruption_folder(root: Path, corruption: str) -> Path:
    base = root / "imagenet-c"
    return next((base / g / corruption for g in GROUPS if (base / g / corruption).is_dir()), base / corruption)


def inspect_c(root: Path) -> Data:
    """ImageNet-C below root: 15 corruptions x 5 severities. A tree with holes is incomplete: an mCE over the rest would
    be a different number."""
    base = root / "imagenet-c"
    if not base.is_dir():
        return missing(root, f"it must lie at {base}/CORRUPTION/SEVERITY/WNID/*")
    splits, problems = read_c(root)
    first = next((split for split in splits.values() if split.files), Split())
    sizes = {name: len(split.files) for name, split in splits.items()}
    if len(set(sizes.values())) > 1:
        full = max(sizes.values())
        short = sorted(f"{name} ({n})" for name, n in sizes.items() if n < full)
        problems.append(f"{base} has fewer than {full} images in {preview(short)}")
    elif others := [name for name, split in splits.items() if split.labels is not first.labels]:
        one = next(iter(splits))
        problems.append(f"{base} does not hold the same images in every folder: {one} differs from {preview(others)}")
    problems += unusable(joined(list(splits.values())).files)
    if problems:
        return incomplete(root, *problems)
    classes = first.classes
    counts = {"classes": len(classes), "images": sum(sizes.values()), "versions": len(sizes)}
    official = {"classes": 1000, "images": 3750000, "versions": 75}
    detail = f"{counts['classes']} classes, 15 corruptions x 5 severities, {counts['images']} images"
    return found(root, base, detail, fingerprint_c(root, splits), counts, official, without(classes))


def read_c(root: Path) -> tuple[dict[str, Split], list[str]]:
    """The images of each "CORRUPTION/SEVERITY" that is there, and the problems of their folders."""
    absent = [c for c in CORRUPTIONS if not corruption_folder(root, c).is_dir()]
    problems = []
    if absent:
        lacks = f"{root / 'imagenet-c'} lacks {len(absent)} of the 15 corruptions"
        problems.append(f"{lacks}: {', '.join(absent)}; unpack their archives")
    splits: dict[str, Split] = {}
    first = Split()
    for corruption in (c for c in CORRUPTIONS if c not in absent):
        for severity in SEVERITIES:
            folder = corruption_folder(root, corruption) / str(severity)
            if not folder.is_dir():
                problems.append(f"{folder} is missing: unpack its archive again")
                continue
            split, wrong = read_split(folder, like=first)
            first = first if first.files else split
            splits[f"{corruption}/{severity}"] = split
            problems += wrong
    return splits, problems


def fingerprint_c(root: Path, splits: Mapping[str, Split]) -> str:
    return fingerprint(root, *(splits[name] for name in sorted(splits)))
