"""Does everything run on the GPU, how fast, in how much memory, and does it learn what a CPU learns?"""

import importlib.util
from collections.abc import Iterator
from typing import Any

from benchmarks.flops import training_flops
from benchmarks.gpu.room import Line, Room, line, log_of, skipped
from benchmarks.timing import matmul_rate
from mae_core.recipe import recipe

CURVE = {"fp32": 1e-3, "bf16": 2e-2}  # largest gap of an epoch's loss beside the CPU's in fp32, relative
TASKS = ("imagenet_finetune", "imagenet_linprobe", "imagenet_knn", "imagenet_r", "imagenet_c")


def curve(room: Room) -> Iterator[Line]:
    """The loss of the mini model's pre-training, epoch by epoch, beside the same training on the CPU."""
    knobs = ("--recipe", "mini", "--set", f"epochs={room.many(8, 2)}", "warmup_epochs=1", f"batch={room.many(128, 16)}")

    def losses(device: str, precision: str) -> list[float]:
        name = f"curve-{device}-{precision}"
        settings = (*knobs, "--precision", precision)
        room.run(name, room.pretraining(name, "vit_mini_patch8", *settings, device=device))
        return [epoch["loss"] for epoch in log_of(room.work / name)]

    truth = losses("cpu", "fp32")
    for precision, allowed in CURVE.items():
        if room.rehearsal and precision == "bf16":
            continue  # minutes on a CPU without such units
        ours = losses(room.device, precision)
        gap = max(abs(a / b - 1) for a, b in zip(ours, truth, strict=True))
        figure = f"losses of {len(truth)} epochs off by at most {gap:.1e} (allowed {allowed:.0e}), last {ours[-1]:.4f}"
        yield line(f"mini pre-training beside the CPU, {precision}", gap <= allowed, figure, ours=ours, cpu=truth)


def pretraining(room: Room) -> Iterator[Line]:
    """The training loop with its loader, 200 steps, compiled or not."""
    epochs, batch = room.many(20, 2), room.many(256, 16)
    precision = "fp32" if room.rehearsal else "bf16"
    peak_rate = matmul_rate(room.device, precision)
    flops = training_flops(room.base, recipe(room.base, room.recipe))
    for how in ("--no-compile", "--compile")[: room.many(2, 1)]:
        name = f"pretrain-{how.strip('-')}"  # a folder of its own each: the second would resume the first
        knobs = ("--recipe", room.recipe, "--set", f"epochs={epochs}", "warmup_epochs=1", f"batch={batch}")
        said = room.run(name, room.pretraining(name, room.base, how, *knobs))
        epochs_done = log_of(room.work / name)
        # The first epoch compiles and starts the loader; the rate of the log is of all since the start.
        first, last = epochs_done[0], epochs_done[-1]
        rate = (last["step"] - first["step"]) * batch / max(last["seconds"] - first["seconds"], 1e-9)
        used = 100 * rate * flops / peak_rate
        summary = next(text for text in reversed(said.splitlines()) if " peak " in text)
        memory = float(summary.rsplit("peak ", 1)[1].split(" GiB")[0])
        learns = last["loss"] < first["loss"]
        figure = f"{rate:.0f} images/s, {used:.0f} % of the measured matrix rate, {memory:.1f} GiB, "
        figure += f"loss {first['loss']:.3f} -> {last['loss']:.3f} in {last['step']} steps"
        title = f"pre-training {room.base}, {precision}{', compiled' if how == '--compile' else ''}"
        yield line(title, learns, figure, images_per_second=rate, utilisation_percent=used, peak_memory_gib=memory)


def of_record(name: str, record: dict[str, Any] | None, steps: int = 0) -> Line:
    """A task's line: its record is there, has a number, and says how fast it was."""
    if record is None or record["status"] != "ok":
        return line(name, False, record["reason"] if record else "no record")
    metric = record["metrics"][record["metric"]]
    rate, memory = record["images_per_second"], record["peak_memory_gib"]
    figure = f"{rate:.0f} images/s, {memory:.1f} GiB, {record['metric']} {metric:.2f}, {record['seconds']:.0f} s"
    if steps:
        figure = f"{record['seconds'] / steps:.2f} s a step, {figure}"
    notes = [note for note in record["notes"] if "memory" in note]
    return line(name, True, "; ".join([figure, *notes]), images_per_second=rate, peak_memory_gib=memory, metric=metric)


def classification(room: Room) -> Iterator[Line]:
    """ViT-B fine-tuned, probed, as a k-NN and on the shifted sets, by run_all as a user calls it; ViT-L fine-tuned."""
    few = [f"imagenet_finetune.{knob}" for knob in (f"epochs={room.many(5, 1)}", "warmup_epochs=0", "batch=128")]
    few += [f"imagenet_linprobe.{knob}" for knob in (f"epochs={room.many(5, 1)}", "warmup_epochs=0", "batch=256")]
    records = room.tasks(room.base, TASKS, few)
    for task in TASKS:
        yield of_record(f"{task}, {room.base}", records.get(task))
    if not room.rehearsal:
        large = room.tasks(room.large, TASKS[:1], few[:3])
        yield of_record(f"imagenet_finetune, {room.large}", large.get("imagenet_finetune"))


def coco(room: Room) -> Iterator[Line]:
    """Mask R-CNN at the recipe's 1024 px, 25 steps of 8 images, on each engine that is installed."""
    for engine in ("torchvision", "detectron2"):
        name = f"coco, {engine}, {room.base}"
        if importlib.util.find_spec(engine) is None:
            yield skipped(name, f"{engine} is not installed")
            continue
        knobs = [f"coco.{knob}" for knob in ("epochs=1", "warmup_epochs=0", f"batch={room.many(8, 2)}")]
        record = room.tasks(room.base, ["coco"], knobs, "--engine", engine).get("coco")
        yield of_record(name, record, steps=200 // room.many(8, 2))


def ade20k(room: Room) -> Iterator[Line]:
    """UperNet at the recipe's 512 px."""
    name = f"ade20k, {room.base}"
    if importlib.util.find_spec("mmseg") is None:
        yield skipped(name, "mmsegmentation is not installed")
        return
    steps = room.many(60, 4)
    record = room.tasks(room.base, ["ade20k"], [f"ade20k.iterations={steps}", "ade20k.warmup_iterations=1"])
    yield of_record(name, record.get("ade20k"), steps=steps)
