"""Every figure of speed.py that this machine can give, one after the other, into one folder.

python benchmarks/speed_all.py --compare /path/to/facebookresearch/mae --data /datasets/imagenet/train

A figure that is there already, of this commit, hardware and these versions, is not measured again: the same command
goes on where it stopped.
"""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    import torch

    from benchmarks.timing import PEERS
    from mae_core.command_line import answered
    from mae_core.errors import UserError
    from mae_core.flags import named_path
    from mae_core.machine import Machine, commit, hardware, versions
    from mae_core.writing import write_text
except ModuleNotFoundError as e:
    where = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
    print(f"error: {sys.executable} lacks {e.name}: {where}", file=sys.stderr)
    sys.exit(2)

SPEED = Path(__file__).with_name("speed.py")
BASE, LARGE, MINI = "vit_base_patch16", "vit_large_patch16", "vit_mini_patch8"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", type=Path, metavar="DIR", help="checkout of facebookresearch/mae, timed too")
    parser.add_argument("--data", type=Path, help="images whose reading is measured: class folders, or tar files")
    parser.add_argument("--out", type=named_path, default=Path("speed"), help="default: speed")
    return parser.parse_args(arguments)


def cpu_precisions() -> list[str]:
    """bf16 where oneDNN computes in it: elsewhere torch does so element by element, and one step takes minutes."""
    return ["fp32", "bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ["fp32"]


def measurements(gpu: bool, compare: Path | None, data: Path | None) -> list[list[str]]:
    """The arguments of speed.py, in order of worth. On a CPU the large models would take hours."""
    beside = [] if compare is None else ["--compare", str(compare)]
    found: list[list[str]] = []
    if gpu:
        for arch, what in itertools.product((BASE, LARGE), ("pretrain", "finetune", "eval")):
            found += [[what, "--arch", arch, *how, *beside] for how in (["--compile"], [])]
        dense = ["--arch", BASE, "--batch", "8"]
        more = [["coco", *dense], ["ade20k", *dense]]
    else:
        for arch in (BASE, MINI):
            found += [["pretrain", "--arch", arch, "--precision", precision, *beside] for precision in cpu_precisions()]
        found += [[what, "--arch", BASE, *beside] for what in ("finetune", "eval")]
        few = ["--arch", BASE, "--warmup", "1", "--repeats", "5"]
        more = [["coco", *few, "--image-size", "384", "--batch", "1"], ["ade20k", *few, "--batch", "2"]]
    found += more if importlib.util.find_spec("mmseg") else more[:1]
    return found + ([["loader", "--data", str(data)]] if data is not None else [])


def made(folder: Path, about: dict[str, Any]) -> list[Path]:
    """The figures of this commit, hardware and these versions that lie in the folder."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # not one of ours
            continue
        if isinstance(values, dict) and all(values.get(key) == value for key, value in about.items()):
            found.append(path)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 if a measurement failed, 2 for a wrong call, 130 after Ctrl-C."""
    return answered(partial(run, parse(arguments)), "stopped; the same command goes on")


def run(args: argparse.Namespace) -> int:
    for folder in (args.compare, args.data):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{folder} is no folder")
    gpu = torch.cuda.is_available()
    place = hardware(Machine(device="cuda" if gpu else "cpu"))
    about: dict[str, Any] = {"hardware": place, "versions": versions(PEERS), "commit": commit()}
    known = about["commit"] and not about["commit"].endswith("-dirty")  # else other code may have had the same name
    if not gpu and "bf16" not in cpu_precisions():
        print("bf16 is left out: this CPU does not compute in it", flush=True)
    todo, failed, started = measurements(gpu, args.compare, args.data), [], time.monotonic()
    for number, what in enumerate(todo, 1):
        # A folder for each: the name of a file does not tell whether another arm was timed too.
        folder = args.out / "-".join(Path(word).name.strip("-") for word in what)
        label = f"[{number}/{len(todo)}] {' '.join(what)}"
        if known and made(folder, about):
            print(f"{label}: measured before", flush=True)
            continue
        print(f"{label} ({(time.monotonic() - started) / 60:.0f} min so far)", flush=True)
        if subprocess.run([sys.executable, str(SPEED), *what, "--out", str(folder)], check=False).returncode != 0:
            failed.append(what)
            print(f"failed: {' '.join(what)}", flush=True)
    tables = [path.with_suffix(".md") for path in sorted(args.out.glob("*/*.json")) if made(path.parent, about)]
    software = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    head = f"{about['hardware']}; {software}; commit {about['commit'][:12]}\n"
    texts = [path.read_text(encoding="utf-8") for path in tables if path.exists()]
    write_text(args.out / "speed.md", "\n".join([head, *texts]))
    print(args.out / "speed.md")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
