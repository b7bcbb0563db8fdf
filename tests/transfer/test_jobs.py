"""From names to tasks, and what is refused before anything starts."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.suite import TASKS as SUITE
from mae_core.checkpoint import read_checkpoint, save_weights
from mae_core.errors import UserError
from mae_core.flags import add_common_flags
from mae_core.machine import Machine, machine_from
from mae_core.vit import build_vit
from tests.fixtures import segmentation
from tests.fixtures.segmentation import write_ade20k
from tests.fixtures.transfer import ARCH, assert_objection_is_right, make_job, small_checkpoint, write_imagenet
from transfer import jobs
from transfer.classification.robustness import EVAL
from transfer.classification.tasks import FINETUNE, TASKS
from transfer.jobs import find_tasks, obstacle, task_argument
from transfer.run import run_job


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """32 training images of four classes; ADE20K with six."""
    return write_ade20k(write_imagenet(tmp_path_factory.mktemp("jobs"), train=8, val=1), train=6, val=2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "say which folder, as folder:/path/to/images"),
        ("folders:/x", "did you mean folder"),
        ("inat2018:/x", "unknown task 'inat2018:/x'"),
        ("imagenet_a,inat2020", "unknown task 'inat2020'; did you mean"),
        (",", "unknown task ','"),
        ("vtap_*", r"unknown task 'vtap_\*'"),
        ("folder*", r"unknown task 'folder\*'"),  # of which folder?
    ],
)
def test_a_task_that_is_not_known_is_refused(name, said):
    with pytest.raises(UserError, match=said):
        find_tasks([name], TASKS)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["imagenet_a,imagenet_r"], ["imagenet_a", "imagenet_r"]),
        (["imagenet_a, imagenet_r,", "imagenet_a"], ["imagenet_a", "imagenet_r"]),
        (["folder:/x/a,b,inat2018"], ["folder:a,b", "inat2018"]),
        (["inat2018,folder:/x/a,folder:/x/b"], ["inat2018", "folder:a", "folder:b"]),
        (["places*,inat2018", "inat201*"], ["places205", "places365", "inat2018", "inat2017", "inat2019"]),
        (["folder:/x/*"], ["folder:*"]),
    ],
)
def test_names_may_be_separated_by_commas_which_a_path_may_have_too(names, found):
    tasks = find_tasks(names, TASKS)
    assert [task.name for task in tasks] == found
    assert [task.name for task in find_tasks([task_argument(task) for task in tasks], TASKS)] == found


@pytest.mark.parametrize(
    ("knobs", "machine", "knob", "said"),
    [
        ({"taps": (1, 2, 3, 6)}, Machine(), "taps", "taps=1,2,3,6, but the last block of vit_mini_patch8 is 5"),
        ({"batch": 7}, Machine(), "batch", "6 training images are less than one batch=7"),
        pytest.param({"batch": 1}, Machine(), "batch", "BatchNorm cannot learn from one", marks=pytest.mark.slow),
        pytest.param({}, Machine(micro_batch=1), "--micro-batch", "BatchNorm cannot", marks=pytest.mark.slow),
        pytest.param({"iterations": 2}, Machine(micro_batch=2), None, "", marks=pytest.mark.slow),
    ],
)
def test_a_job_of_ade20k_that_is_objected_to_would_fail_and_any_other_runs(root, tmp_path, knobs, machine, knob, said):
    assert_objection_is_right(segmentation.make_job(root, tmp_path, machine, **knobs), knob, said)


def test_a_setting_of_the_call_is_refused_and_one_of_the_recipe_is_a_failure(root, tmp_path):
    """An override is a mistake of the call; a recipe too large for the data is one failed task among others."""
    given = make_job(FINETUNE, root, tmp_path, batch=64)
    with pytest.raises(UserError, match="imagenet_finetune: 32 training images are less than one batch=64"):
        obstacle(given)
    own = replace(given, overrides={})
    assert obstacle(own) == ("failed", "32 training images are less than one batch=64: set a smaller batch")


def test_the_evaluation_that_is_compared_to_three_decimals_is_exact_on_a_gpu_too(root, tmp_path, monkeypatch):
    """Its precision is that of the user's --precision, or fp32; any other task's is the device's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    parser = argparse.ArgumentParser()
    add_common_flags(parser, {})

    def precision(task, *flags):
        machine = machine_from(parser.parse_args([*flags, "--device", "cuda"]))
        job = jobs.make_job(task, small_checkpoint(), "mini", [], task.inspect(root), tmp_path, 0, machine)
        assert job.identity()["precision"] == job.machine.precision
        return job.machine.precision

    found = {task.name: precision(task) for task in TASKS if task.name != "folder"}
    assert {name for name, value in found.items() if value == "fp32"} == {"imagenet_eval"}
    assert set(found.values()) == {"fp32", "bf16"}
    assert (precision(EVAL, "--precision", "bf16"), precision(FINETUNE, "--precision", "fp32")) == ("bf16", "fp32")


def test_a_supervised_encoder_can_be_evaluated_as_the_classifier_it_is(root, tmp_path):
    torch.manual_seed(0)
    torch.save({"model": build_vit(ARCH, num_classes=1000).state_dict()}, tmp_path / "deit.pth")
    checkpoint = read_checkpoint(tmp_path / "deit.pth")
    assert checkpoint.kind == "encoder"
    job = replace(make_job(EVAL, root, tmp_path / "work"), checkpoint=checkpoint)
    assert obstacle(job) == ("", "")
    assert run_job(job).status == "ok"
    save_weights(tmp_path / "e.safetensors", build_vit(ARCH).state_dict(), {})
    assert obstacle(replace(job, checkpoint=read_checkpoint(tmp_path / "e.safetensors")))[0] == "skipped"


def test_what_timm_builds_is_refused_where_the_vit_is_taken_apart_and_where_there_is_no_one_grid(root):
    """The rest of the plan goes on."""
    rotary, staged = "eva02_tiny_patch14_224", "hiera_tiny_224"
    states = {}
    for name in (rotary, staged):
        encoder = read_checkpoint(f"random:timm/{name}")
        for task in find_tasks(["imagenet_knn", "imagenet_finetune", "ade20k", "coco", "imagenet_scratch"], SUITE):
            data, machine = task.inspect(root), Machine("cpu", "fp32", workers=0)
            job = jobs.make_job(task, encoder, "mini", (), data, root / "out", 0, machine)
            states[name, task.name] = obstacle(job)
        assert states[name, "imagenet_knn"] == ("", "")
        assert states[name, "imagenet_scratch"][0] == "skipped"
        assert name in states[name, "imagenet_scratch"][1]
    for task in ("ade20k", "coco"):
        assert "timm" not in states[rotary, task][1]
        why = "takes encoders whose blocks all attend over one grid of tokens, as a ViT's do, not timm's"
        assert states[staged, task] == ("skipped", f"{task} {why} {staged}: see docs/checkpoints.md")
