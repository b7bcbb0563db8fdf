"""What a job costs, against counts and divisions by hand and against the committed records of the miniature."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import cost
from benchmarks.cost import (
    CPU_SHARE,
    FORKED,
    GPU_SHARE,
    STARTUP,
    Estimate,
    Rates,
    estimate,
    key_of,
    recorded_rates,
    startup_key,
)
from benchmarks.suite import TASKS
from mae_core.checkpoint import read_checkpoint
from mae_core.errors import UserError
from mae_core.machine import Machine
from tests.fixtures import ROOT
from transfer.data.findings import Data
from transfer.jobs import find_tasks, make_job
from transfer.run import describe, read_record
from transfer.task import Job, Record

CPU, H100 = "x86_64 CPU, 2 cores", "8x NVIDIA H100 80GB HBM3"
COUNTS = {"classes": 1000, "train": 1281167, "val": 50000, "images": 7500}
FOUND = Data("/data", "found", "", counts=COUNTS)
MINI = read_checkpoint("random:vit_mini_patch8", 0)


def job_of(task: str, arch: str = "vit_mini_patch8", recipe: str = "paper", *settings: str, **machine) -> Job:
    [found] = find_tasks([task], TASKS)
    checkpoint = replace(MINI, arch=arch)  # no weights are needed
    return make_job(found, checkpoint, recipe, settings, FOUND, Path("/out"), 0, Machine(**machine))


def block(tokens: int, dim: int) -> int:
    """Multiply-adds of a block: twelve weights for each pair of channels, and both products of attention."""
    return 12 * tokens * dim**2 + 2 * tokens**2 * dim


@pytest.mark.parametrize(("arch", "depth", "dim"), [("vit_base_patch16", 12, 768), ("vit_large_patch16", 24, 1024)])
def test_flops_of_a_classifier_are_those_counted_by_hand(arch, depth, dim):
    by_hand = 2 * (depth * block(197, dim) + 196 * 768 * dim + 1000 * dim)
    job = job_of("imagenet_finetune", arch)
    assert job.task.flops(job) == pytest.approx(by_hand, rel=0.01)


@pytest.mark.slow
def test_flops_of_dense_tasks_are_those_counted_by_hand():
    """Of ViT-B. On COCO 8 blocks have windows of 14 x 14, for which 64 x 64 patches are padded to 70 x 70."""
    dim, positions = 768, (256**2, 128**2, 64**2, 32**2)
    upsampling = (64**2 + 128**2) * 4 * dim**2 + 64**2 * 4 * dim**2
    coco = 12 * 12 * 64**2 * dim**2 + 4 * 2 * 64**4 * dim + 8 * 25 * 2 * 196**2 * dim
    coco += 8 * (70**2 - 64**2) * 4 * dim**2 + 64**2 * 768 * dim + upsampling
    coco += sum(positions) * 256 * (dim + 9 * 256) + (sum(positions) + 16**2) * 2 * 9 * 256**2  # FPN, RPN
    coco += 512 * (4 * 49 * 9 * 256**2 + 12544 * 1024) + 128 * 196 * (4 * 9 * 256**2 + 4 * 256**2)
    job = job_of("coco", "vit_base_patch16")
    assert job.task.flops(job) == pytest.approx(2 * coco, rel=0.01)
    job = job_of("ade20k", "vit_base_patch16")
    heads = 128**2 * (9 * 4 * dim**2 + 150 * dim) + (128**2 + 64**2 + 32**2) * (dim**2 + 9 * dim**2)
    heads += 16**2 * 9 * 5 * dim**2 + 50 * dim**2 + 32**2 * (9 * dim * 256 + 150 * 256)
    body = 12 * block(1025, dim) + 32**2 * 768 * dim + (32**2 + 64**2) * 4 * dim**2 + 32**2 * 4 * dim**2
    assert job.task.flops(job) == pytest.approx(2 * (heads + body), rel=0.01)


@pytest.mark.parametrize(
    ("task", "settings", "parts"),
    [  # ...: whatever it is
        (
            "imagenet_finetune",
            (),
            [("training, 224 px, paper", 100 * 1251 * 1024, 3), ("evaluation, 224 px", 50000, 1)],
        ),
        ("imagenet_linprobe", (), [("probe, 224 px, paper", 90 * 78 * 16384, 1), ("evaluation, 224 px", 50000, 1)]),
        ("imagenet_finetune", ("train_fraction=0.5", "epochs=5"), [(..., 5 * 625 * 1024, 3), (..., 50000, 1)]),
        ("imagenet_scratch", (), [(..., 300 * 312 * 4096, 3), (..., 2 * 50000, 1)]),
        ("imagenet_knn", (), [("evaluation, 224 px", 1281167 + 50000, 1)]),
        ("imagenet_sketch", (), [("evaluation, 224 px", 7500, 1)]),
        (
            "coco",
            ("epochs=2",),
            [("training, 1024 px, paper", 2 * 20018 * 64, 3), ("detection, 1024 px, paper", 50000, 1)],
        ),
        ("ade20k", (), [("training, 512 px, paper", 160_000 * 16, 3), ("windows, 512 px, paper", 100_000, 1)]),
        # The half block, one, and all twelve.
        (
            "imagenet_partial",
            ("blocks=0.5,1,12",),
            [(..., 3 * 100 * 1251 * 1024, 1 + 2 * (0.5 / 12 + 1 / 12 + 1) / 3), (..., 150000, 1)],
        ),
    ],
)
def test_a_family_says_how_many_images_a_job_computes(task, settings, parts):
    job = job_of(task, "vit_base_patch16", "paper", *settings)
    found = job.task.parts(job)
    for part, (kind, images, passes) in zip(found, parts, strict=True):
        assert kind in (part.kind, ...)
        assert (part.images, part.passes) == (images, pytest.approx(passes))


def test_the_fit_of_a_logistic_regression_is_counted_as_if_it_took_all_its_iterations():
    """Two products of the features with the weights for an image and iteration, each twice as dear in float64."""
    job = job_of("imagenet_logreg_10pct", "vit_base_patch16", "paper", "iterations=200")
    (whole,) = job.task.parts(job)
    assert whole.images == 1281167 + 50000
    encoder = 2 * (12 * block(197, 768) + 196 * 768 * 768)
    fit = 200 * 1281167 * 2 * 2 * 2 * 768 * 1000 / encoder
    assert whole.images * whole.passes == pytest.approx(whole.images + fit, rel=0.01)


def test_depth_counts_its_head_and_its_windows():
    """A patch of 416 px by hand: DPT's convolutions of 256 channels at 4, 2, 1 and half the patches' resolution."""
    job = job_of("nyu_dpt", "vit_base_patch16")
    training, windows = job.task.parts(job)
    n, c, d = 26, 256, 768
    widths, sides = (96, 192, 384, 768), (4 * n, 2 * n, n, n // 2)
    tokens = 4 * n * n * (2 * d * d) + n * n * d * sum(widths)
    scaled = n * n * (96 * 96 * 16 + 192 * 192 * 4) + (n // 2) ** 2 * 9 * 768 * 768
    joined = sum(9 * w * c * side**2 for w, side in zip(widths, sides))
    fused = sum((2 * 9 * c * c * side**2) * (1 if side == n // 2 else 2) for side in sides)
    fused += sum(c * c * (2 * side) ** 2 for side in sides)
    last = 9 * c * c * (8 * n) ** 2 + 9 * c * 128 * (8 * n) ** 2 + 9 * 128 * 32 * (16 * n) ** 2 + 32 * (16 * n) ** 2
    encoder = 12 * block(1 + n * n, d) + n * n * d * d
    head = (tokens + scaled + joined + fused + last) / encoder
    assert training.passes == pytest.approx(1 + 3 * head, rel=0.01)
    assert (windows.images, windows.passes) == (8 * 50000, pytest.approx(1 + head, rel=0.01))
    linear = job_of("nyu_linear", "vit_huge_patch14")
    assert linear.task.parts(linear)[1].images == 12 * 50000  # 406 px: three columns
    assert not {part.kind for part in linear.task.parts(linear)} & {training.kind, windows.kind}


def test_a_classifier_is_evaluated_at_the_size_that_it_is_or_will_be_fine_tuned_at():
    job = job_of("imagenet_sketch", "vit_large_patch16", "mini")
    assert [part.kind for part in job.task.parts(job)] == ["evaluation, 48 px"]
    made = replace(job.checkpoint, meta={})  # what with_classifier knows of an encoder of another format
    assert job.task.parts(replace(job, checkpoint=made, parent=made)) == job.task.parts(job)
    classifier = {"head.weight": torch.zeros(1000, 1024)}
    released = replace(job.checkpoint, format="mae-finetuned", meta={"image_size": 448}, classifier=classifier)
    assert [part.kind for part in job.task.parts(replace(job, checkpoint=released))] == ["evaluation, 448 px"]


def test_windows_of_all_views_are_counted():
    """At 512 px two windows of 512 cover 4:3. Of the six sizes three have short sides of 512, the others 640, 768 and
    896, with 2 x 2, 2 x 3 and 3 x 3 windows; each is flipped too."""
    job = job_of("ade20k", "vit_base_patch16", "paper", "multi_scale=True")
    assert job.task.parts(job)[1].images == 50000 * (2 + 2 * (3 * 2 + 2 * 2 + 2 * 3 + 3 * 3))


@pytest.fixture(autouse=True)
def on_linux(monkeypatch):
    """Where one process is a fork."""
    monkeypatch.setattr(cost.sys, "platform", "linux")


def test_a_fork_starts_sooner_than_a_process_that_imports_everything(monkeypatch):
    job = job_of("imagenet_knn")
    forked = estimate(job, Rates()).seconds
    monkeypatch.setattr(cost.sys, "platform", "darwin")
    assert estimate(job, Rates()).seconds - forked == pytest.approx(STARTUP - FORKED)


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(cost, "hardware", lambda machine: H100)
    return {"device": "cuda", "precision": "bf16", "processes": 8}


def test_measured_rates_come_before_records_and_those_before_flops(on_h100):
    job = job_of("imagenet_finetune", "vit_base_patch16", **on_h100)
    training, evaluation = job.task.parts(job)
    trained, evaluated = (key_of(job, part.kind, H100) for part in (training, evaluation))
    passes = GPU_SHARE * 989e12 / job.task.flops(job)
    by_flops = STARTUP + (3 * training.images + evaluation.images) / (8 * passes)
    assert estimate(job, Rates()) == Estimate(pytest.approx(by_flops), "FLOPs")
    # Evaluation, of which no rate is known, is three times as fast as training.
    by_record = STARTUP + training.images / (8 * 1000) + 50000 / (8 * 3000)
    assert estimate(job, Rates(recorded={trained: 1000})) == Estimate(pytest.approx(by_record), "records")
    by_measure = STARTUP + training.images / (8 * 1100) + 50000 / (8 * 2000)
    rates = Rates({trained: 1100}, {trained: 1000, evaluated: 2000})
    assert estimate(job, rates) == Estimate(pytest.approx(by_measure), "measured rates")
    slow = Rates({trained: 1100, startup_key(trained): 300.0}, {evaluated: 2000})
    assert estimate(job, slow) == Estimate(pytest.approx(by_measure - STARTUP + 300), "measured rates")
    # The evaluation's rate alone serves the training too.
    by_evaluation = STARTUP + training.images / (8 * 700) + 50000 / (8 * 2100)
    assert estimate(job, Rates(recorded={evaluated: 2100})) == Estimate(pytest.approx(by_evaluation), "records")


def test_a_rate_counts_once_for_each_gpu_and_once_for_all_processes_of_a_cpu(on_h100):
    job = job_of("imagenet_knn", "vit_base_patch16", **on_h100)
    kind = job.task.parts(job)[0].kind
    one = job_of("imagenet_knn", "vit_base_patch16", **on_h100 | {"processes": 1})
    assert key_of(job, kind, H100) == key_of(one, kind, "1x NVIDIA H100 80GB HBM3")
    rates = Rates({key_of(job, kind, H100): 100})
    assert estimate(one, rates).seconds - FORKED == pytest.approx(8 * (estimate(job, rates).seconds - STARTUP))
    assert cost.hours_in_words([replace(job, estimated_seconds=1800)] * 3) == "12.00 GPU hours"
    two, four = (job_of("imagenet_knn", processes=2, threads=threads) for threads in (1, 2))
    assert key_of(two, kind, CPU) != key_of(four, kind, CPU)
    jobs = [replace(job, estimated_seconds=3600) for job in (two, four)]
    assert [cost.hours_of(job) for job in (*jobs, two)] == [2, 4, 0]
    assert cost.hours_in_words(jobs) == "6.00 core hours"


def test_the_peak_is_the_data_sheets_or_measured(monkeypatch):
    assert cost.peak(H100, "cuda", "bf16") == 989e12
    assert cost.peak("1x NVIDIA A100-SXM4-80GB", "cuda", "fp32") == 19.5e12
    assert cost.peak("1x NVIDIA H100 PCIe", "cuda", "bf16") == 756e12
    monkeypatch.setattr(cost, "matmul_rate", lambda device, precision, sides=(): 1e11)
    job = job_of("imagenet_knn")
    assert cost.peak("1x Unheard Of", "cuda", "bf16") == 1e11
    assert cost.peak(CPU, "cpu-of-this-test", "fp32") == 1e11
    images = 1281167 + 50000
    monkeypatch.setattr(cost, "peak", lambda *of: 1e11)
    wanted = FORKED + images * job.task.flops(job) / (CPU_SHARE * 1e11)
    assert estimate(job, Rates()) == Estimate(pytest.approx(wanted), "FLOPs")


def test_no_estimate_without_data_or_by_a_task_that_does_not_say():
    job = job_of("imagenet_knn")
    assert estimate(replace(job, data=Data("/data", "missing", "")), Rates()) is None
    assert estimate(replace(job, task=replace(job.task, parts=lambda job: ())), Rates()) is None


def record_of(job: Job, seconds: float, images: int, **changes) -> Record:
    changes = {"hardware": CPU} | changes
    record = describe(job, status="ok", seconds=seconds, images_seen=images)
    return replace(record, machine=asdict(job.machine), recipe=asdict(job.recipe), **changes)


def test_a_record_lends_its_rate_to_all_that_its_rate_depends_on():
    job = job_of("imagenet_finetune", "vit_mini_patch8", "mini")
    key = key_of(job, job.task.parts(job)[0].kind, CPU)
    short = job_of("imagenet_finetune", "vit_mini_patch8", "mini", "epochs=3")
    jobs = [job, job_of("imagenet_knn", "vit_mini_patch8", "mini")]
    # 300 images in 3 seconds and 100 in 5: long records weigh more.
    records = [record_of(job, 3, 300), record_of(short, 5, 100)]
    assert recorded_rates(records, jobs) == {key: 400 / 8}
    others = [
        record_of(job_of("imagenet_finetune", "vit_mini_patch8", "mini", "image_size=96"), 5, 100),
        record_of(job_of("imagenet_finetune", "vit_mini_patch8", "mini", precision="bf16"), 5, 100),
        record_of(job, 5, 100, hardware="x86_64 CPU, 64 cores"),
    ]
    assert set(recorded_rates([*records, *others], jobs)) > {key}
    assert recorded_rates([*records, *others], jobs)[key] == 400 / 8
    none = [
        replace(records[0], status="failed"),
        replace(records[0], images_seen=0),
        replace(records[0], recipe={"of": "another version"}),
        replace(records[0], machine={"device": "cpu", "precision": "fp32", "of_another_version": 1}, images_seen=0),
        record_of(job_of("imagenet_finetune", "vit_base_patch16"), 5, 100),
    ]
    assert recorded_rates(none, jobs) == {}


@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_a_record_of_several_gpus_foretells_its_own_job(on_h100, gpus):
    """Its seconds are those of all GPUs at work side by side."""
    job = job_of("imagenet_linprobe", "vit_base_patch16", **on_h100 | {"processes": gpus})
    training, evaluation = job.task.parts(job)
    on_cpu = job_of("imagenet_linprobe", "vit_base_patch16")
    record = record_of(on_cpu, 36_000, training.images, hardware=H100)
    record = replace(record, machine=asdict(job.machine))
    found = estimate(job, Rates(recorded=recorded_rates([record], [job])))
    start = FORKED if gpus == 1 else STARTUP
    tested = 36_000 * evaluation.images * evaluation.passes / (training.images * training.passes)
    assert found == Estimate(pytest.approx(start + 36_000 + tested), "records")


def test_measured_rates_are_kept_beside_older_ones_and_a_damaged_file_is_named(tmp_path):
    assert cost.read_measured(tmp_path) == {}
    cost.keep_measured(tmp_path, {"a": 1.5, "b": 2})
    cost.keep_measured(tmp_path, {"b": 3.5})
    assert cost.read_measured(tmp_path) == {"a": 1.5, "b": 3.5}
    for text in ("[]", '{"a": 0}', '{"a": "fast"}', '{"a": true}', '{"a": NaN}', "{"):
        (tmp_path / "rates.json").write_text(text)
        with pytest.raises(UserError, match=r"rates\.json is damaged .*: delete it"):
            cost.read_measured(tmp_path)


MINIATURE = [read_record(path) for path in sorted((ROOT / "results" / "miniature").glob("runs/**/record.json"))]


def as_job(record: Record) -> Job:
    """The job that a record of the miniature is of, with the recipe that it had."""
    [task] = find_tasks([record.task], TASKS)
    known = {name: tuple(value) if isinstance(value, list) else value for name, value in record.data.items()}
    checkpoint = replace(MINI, name=record.checkpoint["name"])
    machine = Machine(threads=record.machine["threads"])
    job = make_job(task, checkpoint, "mini", (), Data(**known), Path("/out"), record.seed, machine)
    of_the_record = cost.as_recorded(job, record)
    assert of_the_record is not None
    return of_the_record


def test_the_miniatures_records_foretell_each_other_within_a_quarter(monkeypatch):
    """Those of random weights from those of mae_mini, seed 0: all that took over a minute. Trainings of the same size
    share a rate, and ran one after the other beside other work: their sum counts."""
    monkeypatch.setattr(cost, "hardware", lambda machine: CPU)
    first = [record for record in MINIATURE if record.seed == 0]
    known = [record for record in first if record.checkpoint["name"] == "mae_mini"]
    long = {record.task: record for record in first if record not in known and record.seconds > 60}
    alike = (("imagenet_finetune",), ("imagenet_linprobe",), ("coco",), ("ade20k",))
    alike += (("places205", "places365"), ("inat2017", "inat2018", "inat2019"))
    assert long.keys() == {task for tasks in alike for task in tasks}
    rates = Rates(recorded=recorded_rates(known, [as_job(record) for record in known]))
    for tasks in alike:
        records = [long[task] for task in tasks]
        found = [estimate(as_job(record), rates) for record in records]
        assert {each.source for each in found} == {"records"}
        seconds = sum(each.seconds - FORKED for each in found)
        assert seconds == pytest.approx(sum(record.seconds for record in records), rel=0.25), tasks
