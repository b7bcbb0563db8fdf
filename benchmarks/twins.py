"""Our runs beside the originals, on real images: the same weights, images, seeds and schedule, and how far they differ.

python benchmarks/twins.py pretrain --reference /path/to/mae --data /datasets/imagenet/train
"""

import argparse
import dataclasses
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

try:
    from benchmarks.markdown import markdown_table
    from benchmarks.originals import Call, Difference
    from mae_core.command_line import answered
    from mae_core.distributed import check_alone
    from mae_core.errors import UserError
    from mae_core.flags import named_path
    from mae_core.machine import Machine, commit, hardware, versions
    from mae_core.writing import write_json, write_text
except ModuleNotFoundError as e:
    where = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
    print(f"error: {sys.executable} lacks {e.name}: {where}", file=sys.stderr)
    sys.exit(2)


@dataclass(frozen=True)
class Twin:
    """Work that is done twice: `function(call) -> list[Difference]` in benchmarks/originals/`module`.py, imported only
    when it is chosen. checkout: whether the original is read from a folder; else it is among the installed packages."""

    module: str
    function: str
    original: str
    checkout: bool = True
    packages: tuple[str, ...] = ()  # further ones whose versions are written down

    def load(self) -> Callable[[Call], list[Difference]]:
        return getattr(importlib.import_module(f"benchmarks.originals.{self.module}"), self.function)


MMSEG = ("mmsegmentation", "mmengine", "mmcv-lite")
TWINS = {
    "pretrain": Twin("pretraining", "pretraining", "facebookresearch/mae main_pretrain.py"),
    "finetune": Twin("classifying", "finetuning", "facebookresearch/mae main_finetune.py"),
    "linprobe": Twin("classifying", "probing", "facebookresearch/mae main_linprobe.py"),
    "knn": Twin("features", "nearest_neighbours", "facebookresearch/dino eval_knn.py"),
    "eval": Twin("evaluation", "evaluation", "huggingface/pytorch-image-models validate.py"),
    "detection": Twin(
        "vitdet", "detection", "facebookresearch/detectron2, its ViTDet project", packages=("detectron2", "pycocotools")
    ),
    "upernet": Twin("upernet", "segmentation", "mmsegmentation's Runner and its MAE-B config", False, MMSEG),
    "miou": Twin("miou", "miou", "mmsegmentation's IoUMetric", False, MMSEG),
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=TWINS, metavar="WHAT", help=", ".join(TWINS))
    parser.add_argument("--reference", type=Path, metavar="DIR", help="checkout of the original, which is only read")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="images, as docs/twins.md says")
    parser.add_argument("--out", type=named_path, default=Path("twins"), help="folder for the JSON and the table")
    return parser.parse_args(arguments)


def table(differences: Sequence[Difference]) -> str:
    rows = [
        (d.quantity, f"{d.ours:.7g}", f"{d.theirs:.7g}", f"{d.difference:.2g}", f"{d.allowed:.2g}", verdict(d))
        for d in differences
    ]
    return markdown_table([("quantity", "ours", "original", "difference", "allowed", "held"), *rows])


def verdict(difference: Difference) -> str:
    return "yes" if difference.held else "NO"


def write_results(args: argparse.Namespace, differences: Sequence[Difference], seconds: float) -> Path:
    """Write WHAT.json and WHAT.md below --out; the JSON's path."""
    twin = TWINS[args.what]
    found = [dataclasses.asdict(d) | {"held": d.held} for d in differences]
    value = {"what": args.what, "original": twin.original, "differences": found, "seconds": round(seconds)}
    value |= {"hardware": hardware(Machine()), "versions": versions(twin.packages), "commit": commit()}
    path = args.out / f"{args.what}.json"
    write_json(path, value)
    title = f"{args.what}: ours beside {twin.original}, {hardware(Machine())}"
    write_text(path.with_suffix(".md"), f"{title}\n\n{table(differences)}\n")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all is within what is allowed. 1: something is not. 2: a wrong call, or the disk failed."""
    return answered(partial(run, parse(arguments)))


def run(args: argparse.Namespace) -> int:
    check_alone()
    twin = TWINS[args.what]
    if twin.checkout != (args.reference is not None):
        needs = "--reference DIR is needed" if twin.checkout else "--reference is not used"
        raise UserError(f"{args.what}: {needs}: the original is {twin.original}")
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=args.out) as work:
        differences = twin.load()(Call(args.data, args.reference, Path(work)))
    path = write_results(args, differences, time.monotonic() - started)
    print(table(differences))
    print(path)
    return 0 if all(d.held for d in differences) else 1


if __name__ == "__main__":
    sys.exit(main())
