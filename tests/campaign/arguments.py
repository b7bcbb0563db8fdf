"""Wrong calls, one of each kind, and results folders that someone has changed."""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pandas as pd

from mae_core.errors import UserError
from tests.campaign.cases import Case, no_traceback, refused, require, succeeded
from tests.campaign.files import DEEP
from tests.campaign.starts import call
from tests.campaign.tiny import ABLATIONS, ARCH, RUN_ALL, SUITE, TRAINING, World, pretraining, suite
from transfer.data.predictions import digest_of, read_predictions
from transfer.run import read_record, write_record

PRETRAIN, RECONSTRUCT, CHECKPOINT = "mae_core.pretrain", "mae_core.reconstruct", "mae_core.checkpoint"


def calls(world: World) -> dict[str, list[object]]:
    """{what is wrong: what follows `python`}."""
    run_all = [RUN_ALL, "--ckpt", world.ckpt, "--data", world.data, *SUITE]
    one = ["-m", "transfer.classification", "--ckpt", world.ckpt, "--data", world.data, *SUITE]
    train = pretraining(world, epochs=2)
    picture = ["-m", RECONSTRUCT, "--ckpt", world.ckpt, "--images", world.images, "--limit", "2"]
    made = ["-m", "transfer.miniature"]
    ablations = [ABLATIONS, "--recipe", "mini", "--data", world.data, "--out", "out"]
    knob = [*one, "--task", "imagenet_finetune", "--set"]
    return {
        "run_all: an unknown task": [*run_all, "--tasks", "imagenet_finetun"],
        "run_all: an unknown knob": [*run_all, "--set", "imagenet_finetune.layer_deca=1"],
        "run_all: a knob without its task": [*run_all, "--set", "epochs=1"],
        "run_all: a data folder that is absent": [*run_all, "--data", "nowhere"],
        "run_all: an --out that is a file": [*run_all, "--out", world.ckpt],
        "run_all: an --out below a file": [*run_all, "--out", f"{world.ckpt}/out", "--tasks", "imagenet_knn"],
        "run_all: an --out in /proc": [*run_all, "--out", "/proc/out", "--tasks", "imagenet_knn"],
        "run_all: no GPU": [*run_all, "--gpus", "0"],
        "run_all: a seed below 0": [*run_all, "--seeds", "-1"],
        "run_all: a seed of 100 digits": [*run_all, "--seeds", "9" * 100, "--tasks", "imagenet_knn"],
        "run_all: --save-minutes nan": [*run_all, "--save-minutes", "nan", "--tasks", "imagenet_knn"],
        "run_all: --micro-batch -1": [*run_all, "--micro-batch", "-1"],
        "run_all: two folders of one name": [*run_all, "--tasks", "folder:a/x", "folder:b/x"],
        "run_all: a checkpoint that is absent": [*run_all, "--ckpt", "absent.pth"],
        "run_all: random weights of no arch": [*run_all, "--ckpt", "random:vit_tiny"],
        "a script: no such classifier": [*one, "--task", "imagenet_a", "--classifier", "absent.safetensors"],
        "a script: a classifier that is none": [*one, "--task", "imagenet_a", "--classifier", world.ckpt],
        "a script: epochs=ten": [*knob, "epochs=ten"],
        "a script: epochs=-1": [*knob, "epochs=-1"],
        "a script: epochs=inf": [*knob, "epochs=inf"],
        "a script: batch=0": [*knob, "batch=0"],
        "a script: a batch larger than the data": [*knob, "batch=100000"],
        "a script: image_size=50": [*knob, "image_size=50"],
        "a script: image_size=10000000": [*knob, "image_size=10000000"],
        "a script: base_lr=nan": [*knob, "base_lr=nan"],
        "a script: drop_path=2": [*knob, "drop_path=2"],
        "a script: an unknown pool": [*knob, "pool=mean"],
        "a script: an unknown RandAugment": [*knob, "rand_augment=strong"],
        "a script: betas=1": [*knob, "betas=1"],
        "a script: no knob": [*knob, "epochs"],
        "pretrain: an unknown arch": [*train, "--arch", "vit_mini"],
        "pretrain: no such data": [*train, "--data", "nowhere"],
        "pretrain: mask_ratio=1": [*train, "mask_ratio=1"],
        "pretrain: decoder_heads=7": [*train, "decoder_heads=7"],
        "pretrain: image_size=10000000": [*train, "image_size=10000000"],
        "pretrain: an unknown masking": [*train, "masking=rows"],
        "pretrain: an --out that is a file": [*train[:-1], train[-1], "--out", world.ckpt],
        "pretrain: --eval-data without --eval-every": [*train, "--eval-data", world.data / "imagenet"],
        "pretrain: an --eval-data that is none": [*train, "--eval-every", "1", "--eval-data", world.images],
        "pretrain: a tokenizer that is absent": [
            *train,
            "--tokenizer",
            "absent.pkl",
            "--set",
            "target=tokens",
            "tokenizer=dall-e",
        ],
        "reconstruct: no images": [*picture, "--images", world.work, "--out", "a.png"],
        "reconstruct: a seed of 30 digits": [*picture, "--seed", "9" * 30, "--out", "a.png"],
        "reconstruct: an --out in /proc": [*picture, "--out", "/proc/x.png"],
        "reconstruct: an --out below a file": [*picture, "--out", f"{world.ckpt}/x.png"],
        "reconstruct: a kind of picture that is none": [*picture, "--out", "a.xyz"],
        "reconstruct: --mask-ratio 2": [*picture, "--mask-ratio", "2", "--out", "a.png"],
        "reconstruct: --limit 0": [*picture, "--limit", "0", "--out", "a.png"],
        "checkpoint: a key that is absent": ["-m", CHECKPOINT, world.ckpt, "--key", "teacher"],
        "checkpoint: a target that is the source": ["-m", CHECKPOINT, world.ckpt, "--convert", world.ckpt],
        "checkpoint: a target in no folder": ["-m", CHECKPOINT, world.ckpt, "--convert", "absent/a.safetensors"],
        "miniature: --unlabelled -1": [*made, "--out", "m", "--unlabelled", "-1"],
        "miniature: an empty --out": [*made, "--out", ""],
        "miniature: an --out that is a file": [*made, "--out", world.ckpt],
        "ablations: an unknown table": [*ablations, "--table", "9z"],
        "ablations: an unknown knob": [*ablations, "--table", "1c", "--set", "decoder_dimm=1"],
        "ablations: a tokenizer that is not used": [*ablations, "--table", "1c", "--tokenizer", world.ckpt],
        "report: no such folder": ["-m", "benchmarks.report", "--out", "nowhere"],
        "verify: no such record": ["-m", "benchmarks.verify", "nowhere"],
        "verify: a checkpoint": ["-m", "benchmarks.verify", world.ckpt],
        "verify: a folder without records": ["-m", "benchmarks.verify", world.images],
        "compare: no such folder": ["-m", "benchmarks.compare", "a", "b", "--out", "nowhere"],
        "export: no such folder": ["-m", "benchmarks.export", "--to", "json", "--out", "nowhere"],
        "speed: an unknown arch": ["benchmarks/speed.py", "pretrain", "--arch", "vit_giga", "--device", "cpu"],
        "ViT-H on 48 px: a patch that does not fit": [
            "-m",
            "transfer.frozen",
            *one[2:],
            "--task",
            "imagenet_knn",
            "--ckpt",
            f"random:{ARCH}",
            "--set",
            "image_size=9",
        ],
    }


def try_call(arguments: list[object], work: Path) -> None:
    if arguments[0] == "benchmarks/speed.py":
        arguments = [RUN_ALL.with_name("speed.py"), *arguments[1:]]
    refused(call(arguments, work, 60), work)


@cache
def finished(world: World) -> Path:
    """A results folder with a few records, some of whose tasks read what others left."""
    folder = world.work / "finished"
    folder.mkdir()
    done = call(suite(world, ["imagenet_knn", "imagenet_finetune", "imagenet_a"], TRAINING), folder, 300)
    succeeded(done, folder)
    return folder


def parquet(columns: dict[str, list]) -> bytes:
    file = io.BytesIO()
    pd.DataFrame(columns).to_parquet(file)
    return file.getvalue()


def replaced(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Every record of imagenet_knn with changed content."""

    def apply(out: Path) -> None:
        for path in out.glob("runs/**/record.json"):
            record = json.loads(path.read_text())
            if record["task"] == "imagenet_knn":
                change(record)
                path.write_text(json.dumps(record))

    return apply


def every(name: str, content: str | bytes) -> Callable[[Path], None]:
    def apply(out: Path) -> None:
        for path in out.glob(f"runs/**/{name}"):
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return apply


RECORDS: dict[str, Callable[[Path], None]] = {
    "a record of no bytes": every("record.json", ""),
    "a record cut": every("record.json", '{"task": "imagenet_knn", "sta'),
    "a record that is a list": every("record.json", "[]"),
    "a record of bytes": every("record.json", b"\xff\xfe\x00"),
    "a nested record": every("record.json", DEEP),
    "a record of an unknown field": replaced(lambda r: r.update(colour="red")),
    "a record whose metrics are a list": replaced(lambda r: r.update(metrics=[1])),
    "a record whose metrics are text": replaced(lambda r: r.update(metrics={"top1": "high"})),
    "a record of NaN": replaced(lambda r: r.update(metrics={"top1": float("nan")})),
    "a record without its metric": replaced(lambda r: r.update(metrics={})),
    "a record whose checkpoint is a number": replaced(lambda r: r.update(checkpoint=3)),
    "a record of an unknown status": replaced(lambda r: r.update(status="great")),
    "a record whose recipe is null": replaced(lambda r: r.update(recipe=None)),
}


def try_record(world: World, change: Callable[[Path], None], work: Path) -> None:
    """The tables are refused in a sentence, or leave the record out and say so; the plan stands, or says so."""
    shutil.copytree(finished(world) / "out", work / "out")
    change(work / "out")
    for reader in (["report", "--out", "out"], ["verify", "out"], ["export", "--to", "json", "--out", "out"]):
        refused(call(["-m", f"benchmarks.{reader[0]}", *reader[1:]], work, 60), work)
    compared = call(["-m", "benchmarks.compare", "out", "out"], work, 60)
    no_traceback(compared, work)
    plan = call([*suite(world, ["imagenet_knn", "imagenet_finetune", "imagenet_a"], TRAINING), "--plan"], work, 60)
    require("Traceback" not in plan.text and plan.code in (0, 1, 2), "the plan does not stand", plan)


PREDICTIONS: dict[str, str | bytes] = {
    "no bytes": "",
    "text": "top1",
    "cut": b"PAR1\x15\x04",
    "nested": DEEP,
    "a table of something else": parquet({"x": [1, 2]}),
    "no images": parquet({"set": [], "image": [], "label": [], "top1": []}),
    "labels that are text": parquet({"set": [""], "image": ["a"], "label": ["b"], "top1": [1.0], "loss": ["c"]}),
    "only NaN": parquet({"set": [""], "image": ["a"], "label": [float("nan")], "top1": [float("nan")]}),
}


def try_predictions(world: World, content: str | bytes, work: Path) -> None:
    """Files of predictions that their records were made to fit: refused by name, and compared with nothing."""
    shutil.copytree(finished(world) / "out", work / "out")
    every("predictions.parquet", content)(work / "out")
    done = call(["-m", "benchmarks.verify", "out"], work, 60)
    refused(done, work)
    require("predictions.parquet" in done.text, "the file is not named", done)
    for path in (work / "out").glob("runs/**/predictions.parquet"):
        record = read_record(path.parent / "record.json")
        kept = record.predictions | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        with contextlib.suppress(UserError):  # what holds none
            kept["images"] = digest_of(read_predictions(path))
        write_record(replace(record, predictions=kept), path.parent)
    done = call(["-m", "benchmarks.verify", "out"], work, 60)
    refused(done, work)
    no_traceback(call(["-m", "benchmarks.compare", "out", "out"], work, 60), work)


JOBS: dict[str, str | bytes] = {
    "no bytes": "",
    "a list": "[1]",
    "cut": '{"task": "im',
    "bytes": b"\xff\x00",
    "a number": "3",
    "nested": DEEP,
}


def try_job(world: World, content: str | bytes, work: Path) -> None:
    """A damaged job.json, with the record gone: a sentence, or a run that makes it anew."""
    shutil.copytree(finished(world) / "out", work / "out")
    every("job.json", content)(work / "out")
    for path in (work / "out").glob("runs/**/record.json"):
        path.unlink()
    done = call(suite(world, ["imagenet_knn"], TRAINING), work, 100)
    refused(done, work) if done.code else succeeded(done, work)


def cases(world: World) -> list[Case]:
    found = [
        Case("bad input: calls", name, partial(try_call, arguments), small=number % 10 == 0)
        for number, (name, arguments) in enumerate(calls(world).items())
    ]
    found += [Case("bad input: records", name, partial(try_record, world, change)) for name, change in RECORDS.items()]
    found += [
        Case("bad input: records", f"predictions: {name}", partial(try_predictions, world, content))
        for name, content in PREDICTIONS.items()
    ]
    return found + [
        Case("bad input: records", f"a job.json: {name}", partial(try_job, world, content))
        for name, content in JOBS.items()
    ]
