"""How fast pre-training, fine-tuning, evaluation and image loading run, and how well they use the device.

python benchmarks/speed.py pretrain --arch vit_base_patch16 --precision bf16
python benchmarks/speed.py pretrain --arch vit_base_patch16 --compare /path/to/mae    # beside the official code
python benchmarks/speed.py coco --image-size 512 --batch 1    # beside detectron2's ViTDet
python benchmarks/speed.py loader --data /datasets/imagenet/train --workers 16    # beside decoding alone
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

try:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from benchmarks.markdown import markdown_table
    from benchmarks.speed_dense import dense_workloads
    from benchmarks.speed_loader import loader_table, loader_values, read_arms
    from benchmarks.speed_parts import parts_table, seconds_of_parts
    from benchmarks.speed_workloads import SHIPPED, make_workloads
    from benchmarks.timing import PEERS, Timing, alternate, matmul_rate
    from mae_core.command_line import answered
    from mae_core.distributed import check_alone
    from mae_core.errors import UserError
    from mae_core.flags import add_machine_flags, named_path, non_negative_int
    from mae_core.machine import Machine, commit, cores, hardware, machine_from, peak_memory_gib, versions
    from mae_core.settings import choose
    from mae_core.vit import ARCHS, get_arch
    from mae_core.writing import write_json, write_text
except ModuleNotFoundError as e:
    where = "run it with the Python that has this project installed: .venv/bin/python after `make install`"
    print(f"error: {sys.executable} lacks {e.name}: {where}", file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:  # before anything of ours is imported, which answers it
    sys.exit(130)

DENSE, DENSE_BATCH = ("coco", "ade20k"), 2
KINDS = ("pretrain", "finetune", "eval", *DENSE, "loader")


@dataclass(frozen=True)
class Result:
    """One arm. utilisation: its FLOP/s in percent of the device's measured rate of matrix products."""

    name: str
    timing: Timing
    images: int
    flops: int
    peak_memory_gib: float
    matmul_rate: float

    @property
    def rate(self) -> float:
        return self.images / self.timing.median

    @property
    def utilisation(self) -> float | None:
        return 100 * self.rate * self.flops / self.matmul_rate if self.flops and self.matmul_rate else None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=KINDS, metavar="WHAT", help=", ".join(KINDS))
    parser.add_argument("--arch", default="vit_base_patch16", help="default: vit_base_patch16")
    batch_help = "images per step (default: 2 of coco and ade20k; 128 on a GPU, of mini and of `loader`; else 16)"
    parser.add_argument("--batch", type=non_negative_int, default=0, help=batch_help)
    size_help = "px, of coco and ade20k (default: the recipe's)"
    parser.add_argument("--image-size", type=non_negative_int, default=0, metavar="PX", help=size_help)
    parser.add_argument("--data", type=Path, help="images for `loader`: class folders, or tar files")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="checkout of facebookresearch/mae, timed too")
    parser.add_argument("--warmup", type=non_negative_int, default=3, help="steps before the clock runs (default: 3)")
    parser.add_argument("--repeats", type=non_negative_int, default=10, help="timed steps of each arm (default: 10)")
    parser.add_argument("--out", type=named_path, default=Path("speed"), help="folder for the JSON and the table")
    parser.add_argument(
        "--fused-adamw", action=argparse.BooleanOptionalAction, default=True, help="for pretrain (default: on)"
    )
    profile_help = "print where the time of our step goes; of coco and ade20k also by parts of each model"
    parser.add_argument("--profile", action="store_true", help=profile_help)
    add_machine_flags(parser)
    args = parser.parse_args(arguments)
    if args.batch == 0 and any(a.startswith("--batch") for a in arguments or sys.argv):
        parser.error("argument --batch: give a number from 1 on")
    return args


def measure(args: argparse.Namespace, machine: Machine) -> list[Result]:
    large = machine.device == "cuda" or args.arch == "vit_mini_patch8"
    batch = args.batch or (128 if large else 16)
    if args.what in DENSE:
        batch = args.batch or DENSE_BATCH
        workloads = dense_workloads(args.what, args.arch, args.image_size, batch, machine)
        flops = 0
    else:
        workloads, flops = make_workloads(args.what, args.arch, batch, machine, args.compare)
    if args.profile:
        print_profile(next(iter(workloads.values())), machine)
        for name, work in workloads.items() if args.what in DENSE else ():
            print(f"{name}\n\n{parts_table(seconds_of_parts(work, machine.device))}\n", flush=True)
    _, clock = clock_for(machine)
    timings = alternate(workloads, args.warmup, args.repeats, machine.device, clock)
    rate_of = cache(partial(matmul_rate, machine.device, clock=clock))
    results = []
    for name, work in workloads.items():
        precision = machine.precision
        if name == SHIPPED:  # in fp32 on a CPU, and on a GPU in fp16, which is as fast as bf16
            precision = "fp32" if machine.device == "cpu" else "bf16"
        rate = rate_of(precision) if flops else 0.0
        results.append(Result(name, timings[name], batch, flops, peak_memory(work, machine), rate))
    return results


def clock_for(machine: Machine) -> tuple[str, Callable[[], float]]:
    """One thread on a CPU is timed by its CPU time, to which the work of others adds little."""
    if machine.device == "cpu" and machine.threads == 1:
        return "process CPU", time.process_time
    return "wall", time.perf_counter


def peak_memory(work: Callable[[], object], machine: Machine) -> float:
    """GiB: on a GPU the peak of this work, with all arms' weights in memory; on a CPU the process's peak so far."""
    if machine.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        work()
    return peak_memory_gib(machine.device)


def print_profile(work: Callable[[], object], machine: Machine) -> None:
    gpu = machine.device == "cuda"
    work()
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        for _ in range(3):
            work()
    order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))


def table(results: Sequence[Result]) -> str:
    """A Markdown table without empty columns."""
    rows = [
        {
            "arm": r.name,
            "images/s": f"{r.rate:.1f}" if r.rate >= 10 else f"{r.rate:.3f}",
            "step (ms)": f"{1000 * r.timing.median:.1f}",
            "spread": "" if r.timing.spread is None else f"± {r.timing.spread:.1f} %",
            "peak GiB": f"{r.peak_memory_gib:.2f}",
            "utilisation": "" if r.utilisation is None else f"{r.utilisation:.0f} %",
            "ours is": "" if r is results[0] else f"{results[0].rate / r.rate:.2f}x",
        }
        for r in results
    ]
    shown = [column for column in rows[0] if any(row[column] for row in rows)]
    return markdown_table([shown, *([row[column] for column in shown] for row in rows)])


def write_results(args: argparse.Namespace, machine: Machine, results: Sequence[Result]) -> Path:
    """Write WHAT-ARCH-PRECISION.json and .md below --out; the JSON's path."""
    arms = [
        {
            "name": r.name,
            "images_per_second": r.rate,
            "step_seconds": r.timing.median,
            "spread_percent": r.timing.spread,
            "seconds": list(r.timing.seconds),
            "flops_per_image": r.flops,
            "utilisation_percent": r.utilisation,
            "peak_memory_gib": r.peak_memory_gib,
            "ours_over_it": results[0].rate / r.rate,
        }
        for r in results
    ]
    name = f"{args.what}-{args.arch}-{machine.precision}{'-compiled' * machine.compile}"
    value = {"what": args.what, "arch": args.arch, "batch": results[0].images, "arms": arms, "warmup": args.warmup}
    if args.image_size:
        name, value["image_size"] = f"{name}-{args.image_size}px", args.image_size
    value |= {
        "machine": dataclasses.asdict(machine),
        "hardware": hardware(machine),
        "versions": versions(PEERS),
        "commit": commit(),
        "clock": clock_for(machine)[0],
    }
    value["matmul_flops_per_second"] = results[0].matmul_rate
    path = args.out / f"{name}.json"
    write_json(path, value)
    size = f" {args.image_size} px," if args.image_size else ""
    title = f"{args.what}, {args.arch}, {machine.precision},{size} batch {results[0].images}, {hardware(machine)}"
    write_text(path.with_suffix(".md"), f"{title}\n\n{table(results)}\n")
    return path


def run_loader(args: argparse.Namespace, machine: Machine) -> int:
    """Measure the reading of --data, with 1, 2, 4, ... up to --workers processes; write loader-FOLDER.json and .md."""
    if args.compare is not None:
        raise UserError("loader is measured beside torchvision and Pillow: no --compare")
    torch.set_num_threads(1)
    size, batch = get_arch(args.arch).image_size, args.batch or 128
    most = args.workers if args.workers >= 0 else cores()
    counts = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | ({most} - {0}))
    arms = read_arms(args.data, args.arch, batch, counts, args.warmup, args.repeats, machine)
    path = args.out / f"loader-{args.data.resolve().name}.json"
    value = {"what": "loader", "image_size": size, "batch": batch, "warmup": args.warmup, **loader_values(arms)}
    value |= {"hardware": hardware(machine), "cores": cores(), "versions": versions(PEERS), "commit": commit()}
    write_json(path, value)
    text = loader_table(arms)
    write_text(path.with_suffix(".md"), f"loader, {size} px, batch {batch}, {hardware(machine)}\n\n{text}\n")
    print(text)
    print(path)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return answered(partial(run, parse(arguments)))


def run(args: argparse.Namespace) -> int:
    check_alone()
    choose("arch", args.arch, ARCHS)
    if args.repeats < 1:
        raise UserError("--repeats 0: give at least one")
    if args.compare is not None and args.what in DENSE:
        raise UserError(f"{args.what} is compared with the package that is installed: no --compare")
    if args.image_size and args.what not in DENSE:
        raise UserError(f"--image-size is for {' and '.join(DENSE)}: {args.what} has its recipe's")
    if (args.what == "loader") != (args.data is not None):
        raise UserError("--data DIR is needed by loader, and by nothing else")
    machine = replace(machine_from(args), fused_adamw=args.fused_adamw)
    if args.what == "loader":
        return run_loader(args, machine)
    results = measure(args, machine)
    path = write_results(args, machine, results)
    print(table(results))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
