"""python -m transfer.miniature --out DIR [--seed 0] [--unlabelled 20000]

Writes ImageNet, its shifted test sets, COCO and ADE20K.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import transfer.miniature
from mae_core.command_line import answered
from mae_core.flags import named_path, non_negative_int, seed
from transfer.data.findings import MINIATURE_MARKER
from transfer.miniature import dense, imagenet
from transfer.miniature.unlabelled import unlabelled


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m transfer.miniature", description=transfer.miniature.__doc__)
    parser.add_argument("--out", type=named_path, required=True, help="folder for the datasets")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--unlabelled", type=non_negative_int, default=0, metavar="N", help="also N unlabelled images (20000 is usual)"
    )
    return answered(partial(write, parser.parse_args(arguments)))


def write(args: argparse.Namespace) -> int:
    makers: list[Callable[..., Path]] = [imagenet.imagenet, imagenet.imagenet_a, imagenet.imagenet_r]
    makers += [imagenet.imagenet_sketch, imagenet.imagenet_c, dense.coco, dense.ade20k]
    if args.unlabelled:
        makers.append(partial(unlabelled, count=args.unlabelled))
    for make in makers:
        start = time.perf_counter()
        folder = make(args.out, seed=args.seed)
        counts = json.loads((folder / MINIATURE_MARKER).read_text())["counts"]
        listed = ", ".join(f"{split} {count}" for split, count in counts.items())
        print(f"{folder}: {listed} images ({time.perf_counter() - start:.1f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
