"""The training of a classifier: several processes, accumulation, moving average; killed and resumed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mae_core import distributed
from mae_core.data import IMAGENET_NORMALIZATION, pretraining_transform, seed_all
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.training import LOG_FILE
from mae_core.vit import build_vit
from tests.fixtures import ROOT
from tests.fixtures.classification import Command, assert_same_training
from tests.fixtures.curves import curves
from tests.fixtures.ports import free_ports
from tests.fixtures.transfer import ARCH, PROCESS, make_job, write_imagenet
from transfer.classification.job import start_model
from transfer.classification.tasks import FINETUNE, LINPROBE
from transfer.classification.train import erased, train_classifier
from transfer.data.imagenet import read_split
from transfer.data.scores import evaluate
from transfer.data.split import Split
from transfer.data.transforms import eval_transform
from transfer.run import read_record, run_job
from transfer.task import CLASSIFIER_FILE

BOTH = pytest.mark.parametrize("task", [FINETUNE, LINPROBE], ids=lambda task: task.name)


def without_chance(job, **changes):
    """The job with everything off that draws random numbers while training."""
    return replace(job, recipe=replace(job.recipe, drop_path=0.0, mixup=0.0, cutmix=0.0, rand_augment="", **changes))


def train(job, bare_head: bool = True, model: nn.Module | None = None):
    """Train the job's model on its images, not augmented. bare_head: the probe's head has no BatchNorm."""
    model = model or start_model(job)
    if job.recipe.optimizer == "lars":
        head = nn.Sequential(nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6), model.head)
        model.head = model.head if bare_head else head
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
    split, _ = read_split(Path(job.data.root) / "imagenet" / "train")
    job.work.mkdir(parents=True, exist_ok=True)
    return train_classifier(job, model, split, pretraining_transform(job.recipe.image_size, augmentation="none"))


def test_random_erasing_fills_a_quarter_of_the_images_with_noise():
    """Zeros in: what is not zero was erased. 0.25 of 400, give or take five standard errors; 2 % to a third of each."""
    seed_all(0)
    images = erased(torch.zeros(400, 3, 32, 32), 0.25)
    hit = (images != 0).any(dim=1).flatten(1).float().mean(dim=1)
    assert abs((hit > 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 400) ** 0.5
    assert 0.015 < hit[hit > 0].min() < 0.1
    assert 0.25 < hit.max() < 0.36
    noise = images[images != 0]
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5
    assert abs(noise.std() - 1) < 0.02
    assert not erased(torch.zeros(400, 3, 32, 32), 0.0).any()


# Two processes equal one


def scores_of_eleven(split: Split) -> dict[str, torch.Tensor]:
    """Eleven images in batches of two: six batches, the last of one image."""
    torch.manual_seed(0)
    model = build_vit(ARCH, num_classes=1000)
    scores = evaluate(model, split, eval_transform(48), IMAGENET_NORMALIZATION, Machine(micro_batch=2), "x")
    return {name: torch.from_numpy(values) for name, values in scores.columns().items() if name != "image"}


def eleven_images(root: Path) -> Split:
    split, _ = read_split(root / "imagenet" / "val")
    return Split(split.files[:11], split.labels[:11])


def trained_by(processes: int, root: Path, work: Path) -> dict[str, dict]:
    """One training by AdamW and one by LARS without BatchNorm, two micro-batches a step; weights and epoch losses."""
    found = {}
    for task in (FINETUNE, LINPROBE):
        machine = Machine(processes=processes, micro_batch=4 // processes)
        job = without_chance(make_job(task, root, work / task.name, machine))
        _, model = train(job, bare_head=True)
        found[task.name] = {"weights": model.state_dict(), "losses": losses(job.work)}
    return found


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    """Sixteen training and twelve validation images of four classes. Nothing is to be written there."""
    return write_imagenet(tmp_path_factory.mktemp("sixteen"), train=4, val=3)


def losses(work: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (work / LOG_FILE).read_text().splitlines()]


def in_two_processes(root: Path, out: Path) -> dict:
    """What each of the two processes does."""
    split = eleven_images(root)
    found = {"scores": scores_of_eleven(split), **trained_by(2, root, out)}
    broken = out / "broken.JPEG"
    broken.write_bytes(b"no image")
    try:
        # Image 3 is in the second batch, which is the second process's.
        scores_of_eleven(Split((*split.files[:3], broken, *split.files[4:]), split.labels))
    except Exception as e:
        found["broken"] = f"{type(e).__name__}: {e}"
    job = without_chance(make_job(LINPROBE, root, out / "batchnorm", Machine(processes=2)))
    found["batchnorm"] = train(job, bare_head=False)[1].state_dict()
    return found


def only_second_fails(root: Path, out: Path) -> None:
    """A job that raises in the second process while the first waits for it."""

    def run(job):
        if distributed.rank() == 1:
            raise ValueError("only here")
        return distributed.gather_to_all("first")

    run_job(make_job(replace(FINETUNE, run=run), root, out / "failing", Machine(processes=2)))


@pytest.fixture(scope="module")
def two(sixteen, tmp_path_factory):
    """The data, what each of two gloo processes found, and the folder in which they worked."""
    out = tmp_path_factory.mktemp("two")
    (port,) = free_ports(1)
    env = {**PROCESS["env"], "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    line = [sys.executable, "-m", __name__, str(sixteen), str(out)]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    processes = [subprocess.Popen(line, cwd=ROOT, env=env | rank) for rank in ranks]
    assert [process.wait(timeout=900) for process in processes] == [1, 1]
    return sixteen, [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)], out


def test_evaluation_by_two_processes_equals_one_exactly(two):
    root, ranks, _ = two
    one = scores_of_eleven(eleven_images(root))
    assert len(one["loss"].unique()) == 11
    for rank in ranks:
        for name, values in one.items():
            assert torch.equal(rank["scores"][name], values)


def test_an_image_that_one_process_cannot_read_ends_the_evaluation_of_both(two):
    _, ranks, _ = two
    for rank in ranks:
        assert rank["broken"].startswith("UserError")
        assert "broken.JPEG" in rank["broken"]


def test_one_process_that_fails_ends_all_and_its_reason_is_recorded(two):
    """Both ended with exit code 1 (the fixture says so), and the record does not blame the lost connection."""
    record = read_record(two[2] / "failing" / "record.json")
    assert record.status == "failed"
    assert record.reason.startswith("ValueError: only here")


@BOTH
def test_training_by_two_processes_equals_one_to_rounding(two, task, tmp_path):
    root, ranks, _ = two
    one = trained_by(1, root, tmp_path)[task.name]
    start = start_model(make_job(task, root, tmp_path)).state_dict()
    assert any(not torch.equal(one["weights"][name], start[name]) for name in start)
    for rank in ranks:
        assert_same_training(rank[task.name]["weights"], one["weights"])
        assert rank[task.name]["losses"] == pytest.approx(one["losses"], rel=1e-4)


def test_all_processes_end_with_the_same_batchnorm(two):
    """Each has its own running statistics while training, one set must be evaluated and left."""
    _, (first, second), _ = two
    for name, values in first["batchnorm"].items():
        assert torch.equal(values, second["batchnorm"][name]), name


# Accumulation, moving average, BatchNorm


@BOTH
def test_accumulation_keeps_the_effective_batch(sixteen, tmp_path, task):
    """LARS on the bias and on the log's loss would show a wrong scale, which Adam forgives."""
    found = []
    for micro_batch in (16, 4):
        machine = Machine(micro_batch=micro_batch)
        job = without_chance(make_job(task, sixteen, tmp_path / str(micro_batch), machine, batch=16, epochs=3))
        state, model = train(job, bare_head=True)
        assert (state.step, state.micro_batch) == (3, micro_batch)
        found.append((model.state_dict(), losses(job.work)))
    (whole, whole_losses), (parts, parts_losses) = found
    assert_same_training(parts, whole)
    assert parts_losses == pytest.approx(whole_losses, rel=1e-4)
    drawn = curves(job.work)
    assert drawn["train/loss"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in enumerate(parts_losses)]
    assert drawn.keys() == {"train/loss", "train/lr", "train/images_per_second"}


def test_the_moving_average_is_its_recursion_and_is_what_is_evaluated(sixteen, tmp_path):
    job = without_chance(make_job(FINETUNE, sixteen, tmp_path, ema=0.7))
    model, steps = start_model(job), []
    by_hand = {name: p.detach().double() for name, p in model.named_parameters()}

    def after_step(*_):
        steps.append({name: p.detach().double() for name, p in model.named_parameters()})

    with register_optimizer_step_post_hook(after_step):
        _, average = train(job, model=model)
    assert len(steps) == 4
    for weights in steps:
        by_hand = {name: 0.7 * value + 0.3 * weights[name] for name, value in by_hand.items()}
    for name, p in average.named_parameters():
        torch.testing.assert_close(p.detach().double(), by_hand[name], rtol=1e-5, atol=1e-8)
    assert not torch.equal(average.head.weight, model.head.weight)


def shown(root: Path, work: Path, machine: Machine, **knobs) -> list[torch.Tensor]:
    """The images of each forward pass of one step, mixed and erased, as the model gets them."""
    job = make_job(FINETUNE, root, work, machine, epochs=1, warmup_epochs=0, batch=96, **knobs)
    model, seen = start_model(job), []
    model.register_forward_pre_hook(lambda module, images: seen.append(images[0].clone()))
    train(job, model=model)
    return seen


@pytest.fixture(scope="module")
def ninety_six(tmp_path_factory):
    """96 training images of four classes. Nothing is to be written there."""
    return write_imagenet(tmp_path_factory.mktemp("ninety-six"), train=24, val=1)


@pytest.mark.parametrize(("micro_batch", "size"), [(1, 1), (8, 8), (20, 16), (64, 32), (0, 96)])
def test_the_images_are_mixed_and_erased_alike_whatever_the_micro_batch(ninety_six, tmp_path, micro_batch, size):
    knobs = {"mixup": 0.8, "cutmix": 1.0, "random_erasing": 0.5}
    parts = shown(ninety_six, tmp_path / "parts", Machine(micro_batch=micro_batch), **knobs)
    whole = shown(ninety_six, tmp_path / "whole", Machine(micro_batch=32), **knobs)
    assert {len(part) for part in parts} == {size}
    assert torch.equal(torch.cat(parts), torch.cat(whole))


def test_mixup_draws_once_for_each_32_images(ninety_six, tmp_path):
    """A GPU's batch in facebookresearch/mae FINETUNE.md: within it all are mixed alike, with their mirror image."""
    (plain,), (mixed,) = (shown(ninety_six, tmp_path / str(mixup), Machine(), mixup=mixup) for mixup in (0.0, 0.8))
    shares = []
    for first in (0, 32, 64):
        x, y = plain[first : first + 32], mixed[first : first + 32]
        other = x.flip(0)
        share = ((y - other) * (x - other)).sum() / (x - other).square().sum()
        torch.testing.assert_close(y, share * x + (1 - share) * other, atol=1e-4, rtol=1e-4)
        shares.append(round(share.item(), 4))
    assert len(set(shares)) == 3


def test_mixup_refuses_an_odd_batch(sixteen, tmp_path):
    with pytest.raises(UserError, match="even"):
        train(make_job(FINETUNE, sixteen, tmp_path, batch=9, mixup=0.8))


@pytest.mark.slow
def test_a_killed_fine_tuning_goes_on_and_ends_with_the_same_weights(tmp_path):
    data, whole, killed = write_imagenet(tmp_path, train=32, val=8), tmp_path / "whole", tmp_path / "killed"
    knobs = ["batch=16", "epochs=5", "ema=0.9", "drop_path=0.1", "mixup=0.8", "cutmix=1.0"]
    command = Command("imagenet_finetune", data, knobs)
    command.run(whole)
    checkpoint = command.kill(killed, 12)
    assert not any(killed.rglob("record.json"))
    assert "resuming imagenet_finetune" in command.run(killed, "--save-minutes", "0")
    (one,), (other,) = whole.rglob("record.json"), killed.rglob("record.json")
    a, b = read_record(one), read_record(other)
    assert (a.metrics, a.stderr, a.images_seen) == (b.metrics, b.stderr, b.images_seen)
    whole_weights, killed_weights = (load_file(path.parent / CLASSIFIER_FILE) for path in (one, other))
    assert whole_weights.keys() == killed_weights.keys()
    for name, tensor in whole_weights.items():
        assert torch.equal(tensor, killed_weights[name]), name
    assert not checkpoint.exists()


@pytest.mark.slow
def test_torchrun_of_the_real_command_gives_the_number_of_one_process(tmp_path):
    """Without mixup, drop path and augmentation; the learning rate is small enough that rounding stays rounding."""
    data = write_imagenet(tmp_path, train=16, val=5)
    command = Command("imagenet_finetune", data, ["batch=16", "epochs=3", "rand_augment="])
    one, two = command.by_one_and_two_processes(tmp_path)
    assert one.identity == two.identity
    assert two.n_eval == one.n_eval == 20
    assert two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-3)


if __name__ == "__main__":  # one of the fixture's two processes
    data, work = map(Path, sys.argv[1:])
    with distributed.process_group("cpu"):
        torch.save(in_two_processes(data, work), work / f"rank{distributed.rank()}.pt")
        only_second_fails(data, work)
