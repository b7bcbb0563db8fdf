"""On a GPU that computes nothing: a stand-in for CUDA's runtime, cuBLAS and NCCL, on which torch's CUDA build runs
whole programs. Not the numbers of a step are seen, but where the host waits for the GPU, what memory it takes, and how
several processes end."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mae_core.machine import Machine
from tests.fixtures import ROOT, SHARED
from tests.fixtures import pretrain as runs
from tests.fixtures.coco import write_coco
from tests.fixtures.segmentation import LITTLE, write_ade20k
from tests.fixtures.transfer import ARCH, TORCHRUN, write_imagenet

SOURCE, SITE = SHARED.parent / "fakegpu", Path(sysconfig.get_path("purelib"))
ABSENT = (
    "the stand-in's source is not here" * (not SOURCE.is_dir())
    or "there is no gcc" * (not shutil.which("gcc"))
    or "torch is not its build for CUDA 13" * (not (SITE / "nvidia/cu13/include").is_dir())
)
pytestmark = [pytest.mark.fakegpu, pytest.mark.slow, pytest.mark.skipif(bool(ABSENT), reason=ABSENT)]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """The folder in which it is built."""
    folder = tmp_path_factory.mktemp("stand_in")
    shutil.copytree(SOURCE, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    environment = {**os.environ, "SITE": str(SITE)}
    subprocess.run(["bash", folder / "build.sh"], env=environment, stdout=subprocess.DEVNULL, check=True, timeout=600)
    return folder


@pytest.fixture(scope="module")
def on_gpu(stand_in, tmp_path_factory):
    """Run a module on it: (its exit code, what it printed, its steps)."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    compiled = os.environ.get("PYTHONPYCACHEPREFIX") or tmp_path_factory.mktemp(
        "pycache"
    )  # torch takes long to compile
    kept |= {"PYTHONPYCACHEPREFIX": str(compiled), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments: object, launcher=(), **variables: object) -> tuple[int, str, list[dict]]:
        program = [sys.executable, *launcher, "-m", "tests.fixtures.on_fake_gpu", *map(str, arguments)]
        done = subprocess.run(
            ["bash", stand_in / "run.sh", *program],
            cwd=ROOT,
            env=kept | {name: str(value) for name, value in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        lines = done.stdout.splitlines()
        return done.returncode, done.stdout, [json.loads(line) for line in lines if line.startswith('{"rank"')]

    return run


def pretraining(images, out, gpus=1):
    """Four steps, of 16 images on each GPU."""
    what = ["mae_core.pretrain", "--arch", "vit_small_patch16", "--recipe", "paper", "--no-compile"]
    knobs = [f"batch={16 * gpus}", f"epochs={gpus}", f"warmup_epochs={gpus - 1}"]
    return [*what, "--data", images, "--out", out, "--set", *knobs]


def between(steps: list[dict]) -> float:
    """GiB that suffice for the first step and not for the second, which finds Adam's state there."""
    first, second = steps[0]["reserved"], steps[1]["allocated"]
    assert second - first > 50 * 2**20
    return (first + second) / 2 / 2**30


def assert_no_waits(steps: list[dict]) -> None:
    """Mean and std are copied in the first step, and stay."""
    for step in steps[1:]:
        assert step["kernels"] > 100
        assert (step["places"], step["waits"], step["pageable_copies"]) == ([], 0, 0)


@pytest.fixture(scope="module")
def one(noise_images, on_gpu, tmp_path_factory):
    """The steps of a pre-training on one GPU."""
    code, printed, steps = on_gpu(*pretraining(noise_images, tmp_path_factory.mktemp("one")))
    assert code == 0, printed
    assert "1x NVIDIA FAKE" in printed
    return steps


@pytest.fixture(scope="module")
def alone(noise_images, on_gpu, tmp_path_factory):
    """A pre-training on two GPUs, of which the second fails in the third step."""
    arguments = pretraining(noise_images, tmp_path_factory.mktemp("alone"), gpus=2)
    return on_gpu(*arguments, launcher=TORCHRUN, FAKE_GPUS=2, FAKE_NCCL_HANG=1, FAILS_AT=2)


def test_pre_training_never_waits_for_the_gpu(one):
    assert [step["step"] for step in one] == [0, 1, 2, 3]
    assert_no_waits(one)


def test_training_a_classifier_never_waits_for_the_gpu(tmp_path, on_gpu):
    data = write_imagenet(tmp_path, train=8, val=2)
    what = ["--task", "imagenet_finetune", "imagenet_linprobe", "--ckpt", f"random:{ARCH}", "--recipe", "mini"]
    flags = ["--data", data, "--out", tmp_path, "--set", "batch=8", "epochs=1", "warmup_epochs=0"]
    _, printed, steps = on_gpu("transfer.classification", *what, *flags)
    assert [step["step"] for step in steps] == [0, 1, 2, 3] * 2, printed
    assert_no_waits(steps[:4])
    assert_no_waits(steps[3:])


def test_segmentation_never_waits_for_the_gpu(tmp_path, on_gpu):
    pytest.importorskip("mmseg")
    knobs = [f"{name}={value}" for name, value in LITTLE.items()]
    what = ["--task", "ade20k", "--ckpt", f"random:{ARCH}", "--recipe", "mini", "--data", write_ade20k(tmp_path)]
    _, printed, steps = on_gpu("transfer.segmentation", *what, "--out", tmp_path, "--set", *knobs, FAKE_GPU_NUMBER=0)
    assert len(steps) == LITTLE["iterations"], printed
    assert_no_waits(steps)


def test_in_detection_only_torchvision_waits_for_the_gpu(tmp_path, on_gpu):
    """For the numbers of proposals, of positives and of objects, by which it cuts its tensors."""
    what = ["--task", "coco", "--engine", "torchvision", "--ckpt", f"random:{ARCH}", "--recipe", "mini"]
    flags = ["--data", write_coco(tmp_path), "--out", tmp_path, "--set", "image_size=48", "batch=4", "epochs=1"]
    _, printed, steps = on_gpu("transfer.detection", *what, *flags, "warmup_epochs=0", FAKE_GPU_NUMBER=1)
    assert len(steps) == 2, printed
    assert steps[1]["places"]
    assert [place for place in steps[1]["places"] if "/torchvision/" not in place] == []


def test_lack_of_memory_in_the_second_step_halves_the_micro_batch(noise_images, tmp_path, on_gpu, one):
    code, printed, steps = on_gpu(*pretraining(noise_images, tmp_path), FAKE_GPU_GIB=between(one))
    assert code == 0, printed
    assert steps[0]["micro_batch"] == 16
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert [step["micro_batch"] < 16 for step in steps] == [False, True, True, True]
    assert "out of GPU memory: micro-batch reduced to 8, effective batch kept" in printed


def test_a_process_that_fails_alone_ends_those_that_wait_in_nccl(alone):
    code, printed, steps = alone
    assert code == 1
    assert "error: this process alone fails" in printed
    assert {(step["rank"], step["step"]) for step in steps} >= {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert "waits for its peers" not in printed


def test_two_processes_agree_on_a_micro_batch_if_one_lacks_memory_in_the_second_step(
    noise_images, tmp_path, on_gpu, alone
):
    limit = between([step for step in alone[2] if step["rank"] == 1])
    arguments = pretraining(noise_images, tmp_path, gpus=2)
    code, printed, steps = on_gpu(*arguments, launcher=TORCHRUN, FAKE_GPUS=2, FAKE_GPU_GIB_1=limit)
    assert code == 0, printed
    first, second = ([step["micro_batch"] for step in steps if step["rank"] == rank] for rank in (0, 1))
    assert first == second
    assert [size < 16 for size in first] == [False, True, True, True]


def test_a_training_begun_on_the_cpu_goes_on_on_a_gpu(noise_images, tmp_path, on_gpu):
    runs.train_until(5, noise_images, tmp_path, Machine(save_minutes=60))
    arguments = [part for part in runs.command(noise_images, tmp_path)[1:] if part not in ("--device", "cpu")]
    code, printed, steps = on_gpu(*arguments, "--no-compile")
    assert code == 0, printed
    assert "resuming pre-train vit_mini_patch8 at step 6/8; device: cpu -> cuda; precision: fp32 -> bf16" in printed
    assert [step["step"] for step in steps] == [6, 7]
    assert_no_waits(steps)
