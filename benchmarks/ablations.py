"""The paper's pre-training ablations: pre-train every cell of a grid, linear-probe and fine-tune it, table it.

python benchmarks/ablations.py --table 1a --recipe mini --out ablations
python benchmarks/ablations.py --table 1a --data /datasets --gpus 8 --out ablations
"""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

try:
    from benchmarks.ablation_data import check_images, note_images
    from benchmarks.ablation_grid import DEFAULTS, DVAE, MINI_IMAGES, TABLES, Cell
    from benchmarks.ablation_tables import ACCURACY, ACCURACY_FLOPS, TASKS, WALL_CLOCK, Row, write_table
    from benchmarks.children import launcher, machine_flags, run_child
    from benchmarks.flops import training_flops
    from benchmarks.launch.local import run_units
    from benchmarks.launch.units import make_units
    from benchmarks.plan import make_plan
    from benchmarks.wall_clock import measure
    from mae_core.checkpoint import sha256_of
    from mae_core.claim import claimed, clear_leftovers
    from mae_core.command_line import answered
    from mae_core.distributed import check_alone
    from mae_core.errors import UserError
    from mae_core.flags import add_common_flags, seed
    from mae_core.listing import images_or_shards
    from mae_core.machine import Machine, hardware, machine_from
    from mae_core.pretrain import WEIGHTS_FILE
    from mae_core.progress import duration
    from mae_core.recipe import PretrainRecipe, recipe
    from mae_core.settings import as_typed, override, unknown
    from mae_core.stopping import stop_on_signals
    from mae_core.training import LOG_FILE
    from transfer.data.findings import guarded
    from transfer.data.imagenet import inspect_imagenet
    from transfer.miniature import imagenet as miniature
    from transfer.miniature.unlabelled import unlabelled
    from transfer.run import slug
    from transfer.task import Record
except ModuleNotFoundError as e:
    where = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
    print(f"error: {sys.executable} lacks {e.name}: {where}", file=sys.stderr)
    sys.exit(2)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"nargs": "+", "action": "extend"}
    parser.add_argument("--table", **several, required=True, metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes per cell, by torchrun (default: 1)")
    parser.add_argument(
        "--set", **several, default=[], metavar="KNOB=VALUE", help="override the default pre-training of every cell"
    )
    parser.add_argument("--tokenizer", type=Path, help="state dict of DALL-E's encoder: adds its row to Table 1d")
    parser.add_argument("--plan", action="store_true", help="list the cells, and stop")
    add_common_flags(parser, {})
    args = parser.parse_args(arguments)
    args.table = list(dict.fromkeys(args.table))
    return args


def table_cells(name: str, args: argparse.Namespace) -> tuple[Cell, ...]:
    cells = TABLES[name].cells[args.recipe]
    return (*cells, DVAE) if name == "1d" and args.tokenizer else cells


def resolve_cell(cell: Cell, args: argparse.Namespace) -> tuple[str, PretrainRecipe]:
    """The arch and the whole recipe of a cell: the default's, changed by --set, then by the cell's own knobs."""
    default = DEFAULTS[args.recipe]
    arch = cell.arch or default.arch
    base = dataclasses.replace(recipe(arch, args.recipe), **default.knobs)
    return arch, dataclasses.replace(override(base, args.set)[0], **cell.knobs)


def pretraining_data(args: argparse.Namespace) -> Path:
    """mini: the generated unlabelled images, or DATA/unlabelled; else DATA/imagenet, whose train split is used."""
    if args.data is None and args.recipe == "paper":
        raise UserError("--data DIR is needed: the folder with imagenet/train and imagenet/val")
    own = (args.data or args.out / "data") / "unlabelled"
    return own if args.recipe == "mini" and (own.is_dir() or args.data is None) else args.data / "imagenet"


def cell_folder(cell: Cell, args: argparse.Namespace) -> Path:
    """The folder of a cell's pre-training, named by a hash of all that decides the weights: equal cells share it."""
    arch, r = resolve_cell(cell, args)
    tokenizer = args.tokenizer if r.tokenizer == "dall-e" else None
    identity = {"arch": arch, "recipe": dataclasses.asdict(r), "seed": args.seed}
    identity |= {"data": str(pretraining_data(args).resolve()), "precision": args.precision}
    identity |= {"tokenizer": sha256_of(tokenizer) if tokenizer else ""}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    found = sorted(args.out.glob(f"pretraining/*-{digest}/{WEIGHTS_FILE}"))
    return found[0].parent if found else args.out / "pretraining" / f"{slug(cell.label)}-{digest}"


def pretrain_cell(cell: Cell, args: argparse.Namespace) -> tuple[Path, str]:
    """Pre-train a cell in a child process, if that is not done; its folder, and why it failed ("" if it did not)."""
    arch, r = resolve_cell(cell, args)
    work = cell_folder(cell, args)
    if (work / WEIGHTS_FILE).exists():
        return work, ""
    data, tokenizer = pretraining_data(args), args.tokenizer if r.tokenizer == "dall-e" else None
    command = [*launcher(args.gpus), "-m", "mae_core.pretrain", "--data", str(data), "--arch", arch]
    command += ["--recipe", args.recipe, "--out", str(work), "--seed", str(args.seed), *machine_flags(args)]
    command += ["--tokenizer", str(tokenizer)] if tokenizer else []
    named = dataclasses.asdict(recipe(arch, args.recipe))
    if changed := {k: v for k, v in dataclasses.asdict(r).items() if v != named[k]}:
        command += ["--set", *(f"{k}={as_typed(v)}" for k, v in changed.items())]
    note_images(work, data)
    log = args.out / "logs" / f"pretrain-{work.name}.log"
    code, last = run_child(command, log)
    if code == 0:
        return work, ""
    return work, f"pre-training ended with exit code {code}: {last} (log: {log})"


def evaluation_args(work: Path, args: argparse.Namespace) -> argparse.Namespace:
    """What run_all is called with to probe and fine-tune a pre-trained cell."""
    values = vars(args) | {"ckpt": [str(work / WEIGHTS_FILE)], "tasks": list(TASKS), "seeds": [args.seed]}
    values |= {"limit": 0, "jobs": 1, "gpus_per_job": None, "nodes": 1, "rdzv_endpoint": "", "launcher": "local"}
    transfer = DEFAULTS[args.recipe].transfer
    values["set"] = [f"{task}.{k}={as_typed(v)}" for task, knobs in transfer.items() for k, v in knobs.items()]
    return argparse.Namespace(**values)


def evaluate_cell(work: Path, args: argparse.Namespace) -> dict[str, Record]:
    """Linear probing and fine-tuning of a pre-trained cell, as run_all does them: what is done already is only read."""
    call = evaluation_args(work, args)
    return {record.task: record for record in run_units(make_units(make_plan(call)), call)}


def training_seconds(work: Path) -> float | None:
    """How long the pre-training took, by the last line of its log; None, with a word, if that is damaged."""
    log = work / LOG_FILE
    try:
        seconds = float(json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["seconds"])
        if math.isfinite(seconds):
            return seconds
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    print(f"{log} is damaged or gone: how long this pre-training took is not known", flush=True)
    return None


def run_cell(cell: Cell, args: argparse.Namespace, unit: int) -> Row:
    """Train and evaluate a cell. unit: the default's FLOPs per image."""
    arch, r = resolve_cell(cell, args)
    knobs = ", ".join(f"{knob}={value}" for knob, value in cell.knobs.items())
    numbers: dict[str, float] = {"relative_flops": training_flops(arch, r) / unit}
    work, failure = pretrain_cell(cell, args)
    if failure:
        return Row(cell.label, knobs, numbers, dict.fromkeys(TASKS, f"failed: {failure}"), cell.x)
    if (seconds := training_seconds(work)) is not None:
        numbers["seconds"] = seconds
    texts = {}
    for task, record in evaluate_cell(work, args).items():
        if record.status != "ok":
            texts[task] = f"{record.status}: {record.reason}"
            continue
        numbers[task], numbers[f"{task}_stderr"] = record.metrics["top1"], record.stderr["top1"]
        texts[task] = f"{record.metrics['top1']:.2f} ± {record.stderr['top1']:.2f}"
    return Row(cell.label, knobs, numbers, texts, cell.x)


def accuracy_table(name: str, args: argparse.Namespace) -> bool:
    """Run every cell of a table and write the table after each; True if every cell gave its numbers."""
    table, cells = TABLES[name], table_cells(name, args)
    file_name = f"table_{name}" if name[0] == "1" else name
    unit = training_flops(*resolve_cell(Cell("default"), args))
    rows: list[Row] = []
    for number, cell in enumerate(cells, 1):
        row = run_cell(cell, args, unit)
        rows.append(row)
        took = duration(row.numbers["seconds"]) if "seconds" in row.numbers else "-"
        shown = ", ".join(f"{task} {text}" for task, text in row.texts.items())
        print(f"[{number}/{len(cells)}] {table.title}, {cell.label}: {shown} (pre-training {took})", flush=True)
        columns = ACCURACY_FLOPS if name == "1c" else ACCURACY
        paths = write_table(args.out, file_name, table, columns, rows, shared_settings(args))
    print("tables: " + ", ".join(map(str, paths)), flush=True)
    return all(task in row.numbers for row in rows for task in TASKS)


def shared_settings(args: argparse.Namespace) -> str:
    """What all of our cells have in common."""
    arch, r = resolve_cell(Cell("default"), args)
    label = "miniature" if args.recipe == "mini" else "ImageNet-1k"
    length = f"{r.epochs} epochs unless the cell says otherwise"
    return f"{arch}, {length}, {label}, {args.precision}, seed {args.seed}"


def wall_clock_table(args: argparse.Namespace, machine: Machine) -> bool:
    """Table 2. Steps of all cells of one arch in alternation; an epoch's time follows from the number of images."""
    count = len(images_or_shards(pretraining_data(args)))
    cells = table_cells("2", args)
    rows: list[Row] = []
    images = args.micro_batch or (128 if args.recipe == "mini" else 64 if machine.device == "cuda" else 8)
    for arch in dict.fromkeys(cell.arch for cell in cells):
        recipes = {cell.label: resolve_cell(cell, args) for cell in cells if cell.arch == arch}
        steps = measure(recipes, images, machine)
        first = next(iter(steps.values()))
        fewest = min(step.flops for step in steps.values())
        for label, step in steps.items():
            numbers = {"epoch_seconds": count / step.rate, "spread": step.timing.spread or 0.0}
            numbers |= {"speed_up": step.rate / first.rate, "relative_flops": step.flops / fewest}
            rows.append(Row(label, "", numbers, {}))
            print(f"{label}: {count / step.rate:.1f} s per epoch, {step.rate / first.rate:.2f}x", flush=True)
    what = f"{hardware(machine)}, {machine.precision}, forward and backward of {images} images, {count} an epoch"
    paths = write_table(args.out, "table_2", TABLES["2"], WALL_CLOCK, rows, what)
    print("tables: " + ", ".join(map(str, paths)), flush=True)
    return True


def make_tables(args: argparse.Namespace, machine: Machine) -> list[bool]:
    with claimed(args.out):
        clear_leftovers(args.out / "tables")
        if args.data is None and args.recipe == "mini":
            args.data = args.out / "data"
            miniature.imagenet(args.data)
            unlabelled(args.data, MINI_IMAGES)
        for cell in (cell for table in args.table if table != "2" for cell in table_cells(table, args)):
            check_images(cell_folder(cell, args), pretraining_data(args))
        return [wall_clock_table(args, machine) if t == "2" else accuracy_table(t, args) for t in args.table]


def check_call(args: argparse.Namespace) -> Machine:
    """The machine; UserError for a wrong call, found before anything runs: every cell's recipe is resolved."""
    for name in args.table:
        if name not in TABLES:
            raise unknown("table", name, TABLES)
        for cell in table_cells(name, args):
            resolve_cell(cell, args)
    if args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: give 1 or more")
    if args.tokenizer is not None and not args.tokenizer.is_file():
        raise UserError(f"--tokenizer {args.tokenizer}: there is no such file")
    if args.tokenizer is not None and "1d" not in args.table:
        raise UserError(f"--tokenizer {args.tokenizer}: only --table 1d uses it")
    check_data(args)
    machine = machine_from(args, args.gpus)
    # As resolved: an "auto" in a cell's identity would let fp32 and bf16 share a folder.
    args.device, args.precision = machine.device, machine.precision
    return machine


def check_data(args: argparse.Namespace) -> None:
    """UserError unless the cells' data are there. Mini without --data generates them; Table 2 classifies nothing."""
    if args.data is not None and args.table != ["2"]:
        data = guarded(inspect_imagenet, args.data)
        if data.status != "found":
            raise UserError(data.detail)
        _, r = resolve_cell(Cell("default"), args)
        if data.counts["train"] < r.batch and pretraining_data(args).name == "imagenet":
            raise UserError(f"{data.detail} in {pretraining_data(args)}: train has less than one batch={r.batch}")


def cell_state(cell: Cell, args: argparse.Namespace) -> str:
    """What is left to do for a cell."""
    if args.data is None and args.recipe == "paper":
        return "to do"
    work = cell_folder(cell, args)
    if not (work / WEIGHTS_FILE).exists():
        return "begun" if work.exists() else "to do"
    call = evaluation_args(work, argparse.Namespace(**vars(args) | {"data": args.data or args.out / "data"}))
    left = [item.job.task.name for item in make_plan(call) if item.state != "done"]
    return f"pre-trained; to do: {', '.join(left)}" if left else "done"


def print_cells(args: argparse.Namespace) -> None:
    """Each cell with its pre-training's cost in FLOPs, relative to the default's, and what is left to do."""
    print("cost: FLOPs of the whole pre-training, relative to the default's")
    arch, plain = resolve_cell(Cell("default"), args)
    unit = training_flops(arch, plain) * plain.epochs
    for name in args.table:
        print(f"{TABLES[name].title}: {TABLES[name].about}; {shared_settings(args)}")
        for cell in table_cells(name, args):
            own_arch, r = resolve_cell(cell, args)
            cost = training_flops(own_arch, r) * r.epochs / unit
            state = "timed anew" if name == "2" else cell_state(cell, args)
            knobs = ", ".join(f"{k}={v}" for k, v in cell.knobs.items()) or "the default"
            print(f"  {cell.label:<50} {cost:5.2f}x  {state:<8} {knobs}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    stop_on_signals()
    return answered(partial(run, args), "stopped; the same command goes on from here")


def run(args: argparse.Namespace) -> int:
    check_alone(", with --gpus N")
    machine = check_call(args)
    if args.plan:
        print_cells(args)
        pretraining_data(args)  # without data nothing can run, as the exit code says
        return 0
    return 0 if all(make_tables(args, machine)) else 1


if __name__ == "__main__":
    sys.exit(main())
