"""Write images into tar files with a smaller short side, which pre-training reads faster.

python -m mae_core.write_shards --data DIR --out DIR --short 256

Members keep their path below --data, so that the folder of its class stays in an image's name. Goes on after a stop.
"""

import argparse
import hashlib
import io
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mae_core import distributed
from mae_core.command_line import answered
from mae_core.data import MAX_UNREADABLE
from mae_core.decode import UNREADABLE, as_rgb, opened
from mae_core.errors import UserError
from mae_core.files import printable
from mae_core.flags import named_path, non_negative_int
from mae_core.listing import images_or_shards
from mae_core.machine import cores
from mae_core.progress import Progress
from mae_core.shards import LISTING, bytes_of, member_name
from mae_core.stopping import stop_on_signals
from mae_core.workers import begin_worker, lost_batches_explained, started
from mae_core.writing import read_object, replacing, write_json

QUALITY = 95
AT_A_TIME = 32  # images


class Smaller(Dataset):
    """Entry -> (bytes of a JPEG whose short side is at most `short`, whether the image could be read).

    A JPEG of three colours or one that is small enough stays as it is, and so does what cannot be read: whoever reads
    the shard will name it. Resized by Pillow (bicubic), stored at quality 95 with colour at half the resolution.
    """

    def __init__(self, entries: Sequence[str], short: int) -> None:
        self.entries, self.short = entries, short

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[bytes, bool]:
        entry = self.entries[index]
        content = bytes_of(os.fsencode(entry))
        try:
            with opened(entry) as image:
                width, height = image.size
                plain = image.format == "JPEG" and image.mode in ("RGB", "L")
                if plain and min(width, height) <= self.short:
                    image.load()  # or it would not show that the file is cut short
                    return content, True
                scale = min(1.0, self.short / min(width, height))
                size = round(width * scale), round(height * scale)
                small = as_rgb(image).resize(size, Image.Resampling.BICUBIC)
        except UNREADABLE:
            return content, False
        file = io.BytesIO()
        small.save(file, "JPEG", quality=QUALITY, subsampling="4:2:0")
        return file.getvalue(), True


def names_of(entries: Sequence[str], data: Path) -> list[str]:
    """What each is called in its shard: its path below data, or in its tar; ".jpg" follows another format's name."""
    names = []
    for entry in entries:
        inner = member_name(entry)
        name = inner if inner is not None else Path(entry).relative_to(data).as_posix()
        names.append(name if PurePosixPath(name).suffix.lower() in (".jpg", ".jpeg") else f"{name}.jpg")
    if len(set(names)) < len(names):
        ((twice, _),) = Counter(names).most_common(1)
        raise UserError(f"{data} has {printable(twice)} twice: rename one")
    return names


def write_shards(data: Path, out: Path, short: int, each: int, workers: int) -> None:
    """Write all images of a folder, or of its tars, into out/00000.tar, ...: `each` images a shard, in their order.

    The same call goes on where one was stopped. UserError for no images, a folder that holds something else or was
    begun otherwise, and more than MAX_UNREADABLE images that cannot be read.
    """
    entries = images_or_shards(data)
    names = names_of(entries, data)
    digest = hashlib.sha256("\n".join(map(repr, names)).encode()).hexdigest()
    shards = [f"{number:05}.tar" for number in range(-(-len(entries) // each))]
    plan = {"short": short, "quality": QUALITY, "each": each, "images": len(entries), "names": digest, "shards": shards}
    begin(out, plan)
    with distributed.alone_in(out):
        missing = [number for number, shard in enumerate(shards) if not (out / shard).exists()]
        wanted = [i for number in missing for i in range(number * each, min((number + 1) * each, len(entries)))]
        smaller, progress = (
            Smaller(entries, short),
            Progress(f"shards in {out}", len(entries), len(entries) - len(wanted)),
        )
        made, done, bad = encoded(smaller, wanted, workers), len(entries) - len(wanted), []
        for number in missing:
            with replacing(out / shards[number]) as unfinished, tarfile.open(unfinished, "w") as tar:
                for index in range(number * each, min((number + 1) * each, len(entries))):
                    content, readable = next(made)
                    tar.addfile(header(names[index], len(content)), io.BytesIO(content))
                    bad += [] if readable else [entries[index]]
                    if len(bad) > MAX_UNREADABLE:
                        raise UserError(f"more than {MAX_UNREADABLE} images cannot be read, {bad[0]} first: mend them")
                    done += 1
                    progress.update(done, 1)
        for entry in bad:
            print(f"unreadable image, copied as it is: {printable(entry)}")


def begin(out: Path, plan: dict[str, Any]) -> None:
    """Make the folder and its listing; UserError if it holds something else."""
    listing = out / LISTING
    if listing.exists():
        try:
            found = read_object(listing)
        except (OSError, ValueError) as e:
            raise UserError(f"{listing} cannot be read ({e}): give an empty folder") from None
        changed = [key for key in plan if found.get(key) != plan[key]]
        if changed:
            raise UserError(f"{out} was begun with another {' and another '.join(changed)}: give an empty folder")
    elif out.exists() and any(not path.name.startswith(".claim.") for path in out.iterdir()):
        raise UserError(f"{out} is not empty, and holds no shards that were begun here: give an empty folder")
    else:
        write_json(listing, plan)


def encoded(smaller: Smaller, wanted: Sequence[int], workers: int) -> Iterator[tuple[bytes, bool]]:
    batches = DataLoader(
        smaller,
        batch_sampler=[list(wanted[first : first + AT_A_TIME]) for first in range(0, len(wanted), AT_A_TIME)],
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=begin_worker,
    )
    with lost_batches_explained():
        for batch in started(batches):
            yield from batch


def header(name: str, size: int) -> tarfile.TarInfo:
    """The same for the same image, whoever writes it and when."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=named_path, required=True, help="folder of images, or of tar files with images")
    parser.add_argument("--out", type=named_path, required=True, help="folder for the shards")
    parser.add_argument("--short", type=non_negative_int, default=256, help="px of the short side (default: 256)")
    parser.add_argument("--each", type=non_negative_int, default=10_000, help="images in a shard (default: 10000)")
    parser.add_argument("--workers", type=non_negative_int, default=-1, help="processes (default: all cores)")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    if args.short < 1 or args.each < 1:
        raise UserError("--short and --each must be 1 or more")
    if args.out.resolve().is_relative_to(args.data.resolve()):
        raise UserError(f"--out {args.out} lies in --data {args.data}: its shards would be read as data")
    stop_on_signals()
    workers = args.workers if args.workers >= 0 else cores()
    write_shards(args.data, args.out, args.short, args.each, workers if workers > 1 else 0)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return answered(partial(run, parse(arguments)), "stopped: the same command goes on after the last whole shard")


if __name__ == "__main__":
    sys.exit(main())
