import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mae_core import distributed
from mae_core.checkpoint import read_checkpoint
from mae_core.data import IMAGENET_NORMALIZATION, pretraining_transform, seed_all
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.training import CHECKPOINT_FILE, LOG_FILE
from mae_core.vit import build_vit
from tests.fixtures import ROOT
from tests.fixtures.transfer import ARCH, TableModel, kill_when, make_job, one_hot_logits, write_code, write_imagenet
from transfer.classification import tasks as classification
from transfer.classification.evaluate import Scores, evaluate, score
from transfer.classification.job import start_model
from transfer.classification.train import erased, train_classifier
from transfer.classification.transforms import eval_transform
from transfer.data.imagenet import read_split
from transfer.data.split import Split
from transfer.run import read_record, run_job
from transfer.task import CLASSIFIER_FILE

FINETUNE, LINPROBE, *_ = classification.TASKS


def coded_split(folder: Path, labels: list[int]) -> Split:
    """Image i says i; its label is labels[i]."""
    files = [folder / f"{i}.png" for i in range(len(labels))]
    for i, file in enumerate(files):
        write_code(file, i)
    return Split(tuple(files), tuple(labels))


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


def assert_same_training(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float = 2e-3) -> None:
    """Equal to rounding. A key's bias has no effect on attention: its gradient is rounding noise that Adam blows up."""
    assert a.keys() == b.keys()
    for name in a:
        x, y = a[name].double(), b[name].double()
        if name.endswith("attn.qkv.bias"):
            x, y = (torch.cat([t[: len(t) // 3], t[-len(t) // 3 :]]) for t in (x, y))
        assert (x - y).norm() <= rtol * y.norm() + 1e-7, name


# What scores are


def test_scores_count_and_err_as_computed_by_hand():
    loss = np.array([1.0, 2.0, 3.0, 6.0])
    scores = Scores(loss, np.array([True, False, True, True]), np.array([True, True, True, True]))
    metrics, stderr = scores.metrics()
    assert metrics == {"top1": 75.0, "top5": 100.0, "loss": 3.0}
    # sqrt(0.75 * 0.25 / 4) = 0.2165; the losses' variance is (4 + 1 + 0 + 9) / 3, over 4 images.
    assert stderr["top1"] == pytest.approx(21.6506, abs=1e-4)
    assert stderr["top5"] == 0.0
    assert stderr["loss"] == pytest.approx((14 / 3 / 4) ** 0.5)


def test_score_ranks_as_computed_by_hand():
    logits = torch.zeros(4, 10)
    logits[:, :7] = torch.tensor([7.0, 6, 5, 4, 3, 2, 1])
    rows = score(logits, torch.tensor([0, 4, 5, 1]))
    assert rows[:, 1].tolist() == [1, 0, 0, 0]
    assert rows[:, 2].tolist() == [1, 1, 0, 1]
    total = sum(np.exp([7, 6, 5, 4, 3, 2, 1])) + 3
    np.testing.assert_allclose(rows[:, 0], [np.log(total) - v for v in (7, 3, 2, 6)], rtol=1e-6)


def test_every_image_is_counted_once_whatever_the_batch(tmp_path):
    """Images 0, 2 and 5 are answered wrongly; 7 images in batches of 3."""
    labels = [3, 14, 15, 92, 65, 35, 89]
    split = coded_split(tmp_path, labels)
    model = TableModel(one_hot_logits([4, 14, 16, 92, 65, 36, 89]))
    for micro_batch, batches in ((3, [3, 3, 1]), (7, [7]), (0, [7])):
        model.batches = []
        machine = Machine(micro_batch=micro_batch)
        scores = evaluate(model, split, eval_transform(16, "center_crop"), IMAGENET_NORMALIZATION, machine, "x")
        assert scores.top1.tolist() == [False, True, False, True, True, False, True]
        assert model.batches == batches


def test_kept_columns_alone_compete(tmp_path):
    """Of 200 columns: image 0 is right though logit 999 outside is larger, image 1 is wrong inside, image 2 is right
    both ways. The loss is over the kept ones, too."""
    kept = list(range(100, 300))
    table = torch.zeros(3, 1000)
    table[0, 999], table[0, 120] = 9.0, 5.0
    table[1, 250], table[1, 101] = 5.0, 4.0
    table[2, 299] = 5.0
    split = coded_split(tmp_path, [120, 101, 299])
    at = (TableModel(table), split, eval_transform(16, "center_crop"), IMAGENET_NORMALIZATION, Machine(), "x")
    assert evaluate(*at, kept).top1.tolist() == [True, False, True]
    assert evaluate(*at).top1.tolist() == [False, False, True]
    # 199 other logits of 0 in image 2.
    assert evaluate(*at, kept).loss[2] == pytest.approx(np.log(np.exp(5) + 199) - 5, rel=1e-5)


def test_an_unreadable_image_ends_the_evaluation_by_name(tmp_path):
    split = coded_split(tmp_path, [1, 2, 3])
    split.files[1].write_bytes(b"no image")
    model = TableModel(one_hot_logits([1, 2, 3]))
    with pytest.raises(UserError, match=r"1\.png"):
        evaluate(model, split, eval_transform(16), IMAGENET_NORMALIZATION, Machine(), "x")


def test_logits_that_are_no_numbers_give_no_accuracy(tmp_path):
    table = one_hot_logits([0, 1, 2])
    table[1] = float("nan")
    split = coded_split(tmp_path, [0, 1, 2])
    with pytest.raises(UserError, match="not finite"):
        evaluate(TableModel(table), split, eval_transform(16), IMAGENET_NORMALIZATION, Machine(), "x")


class Small(TableModel):
    """Lacks memory for more than `room` images."""

    room = 2

    def forward(self, images):
        if len(images) > self.room:
            raise torch.OutOfMemoryError("too many")
        return super().forward(images)


def test_lack_of_memory_halves_what_is_evaluated_at_once(tmp_path):
    labels = [3, 14, 15, 92, 65, 35, 89]
    split, model = coded_split(tmp_path, labels), Small(one_hot_logits([3, 0, 15, 0, 65, 35, 89]))
    scores = evaluate(model, split, eval_transform(16), IMAGENET_NORMALIZATION, Machine(), "x")
    assert scores.top1.tolist() == [True, False, True, False, True, True, True]
    assert sum(model.batches) == 7
    model.room = 0
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, split, eval_transform(16), IMAGENET_NORMALIZATION, Machine(), "x")


# What follows the augmentation


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


CHILD = """
import multiprocessing, os, sys
from pathlib import Path
import torch
sys.path.insert(0, CHECKOUT)
from tests.transfer.classification.test_train import in_two_processes, second_fails_alone
from mae_core import distributed

def child(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=PORT)
    with distributed.process_group("cpu"):
        torch.save(in_two_processes(Path(ROOT), Path(OUT)), f"{OUT}/rank{rank}.pt")
        second_fails_alone(Path(ROOT), Path(OUT))

if __name__ == "__main__":
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=child, args=(rank,)) for rank in (0, 1)]
    for c in children: c.start()
    for c in children: c.join()
    print("exit codes", [c.exitcode for c in children])
"""


def scores_of_eleven(split: Split) -> dict[str, torch.Tensor]:
    """Eleven images in batches of two: six batches, the last of one image."""
    torch.manual_seed(0)
    model = build_vit(ARCH, num_classes=1000)
    scores = evaluate(model, split, eval_transform(48), IMAGENET_NORMALIZATION, Machine(micro_batch=2), "x")
    return {name: torch.from_numpy(values) for name, values in vars(scores).items()}


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


def second_fails_alone(root: Path, out: Path) -> None:
    """A job that raises in the second process while the first waits for it."""

    def run(job):
        if distributed.rank() == 1:
            raise ValueError("only here")
        return distributed.gather_to_all("first")

    run_job(make_job(replace(FINETUNE, run=run), root, out / "alone", Machine(processes=2)))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The data, what each of two gloo processes found, and the folder in which they worked."""
    root, out = write_imagenet(tmp_path_factory.mktemp("data"), train=4, val=3), tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        values = {"CHECKOUT": str(ROOT), "ROOT": str(root), "OUT": str(out), "PORT": str(s.getsockname()[1])}
    script = out / "child.py"
    script.write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()) + CHILD)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert "exit codes [1, 1]" in done.stdout, done.stdout + done.stderr
    return root, [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)], out


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


def test_a_process_that_fails_alone_ends_all_and_its_reason_is_recorded(two):
    """Both ended with exit code 1 (the fixture says so), and the record does not blame the lost connection."""
    record = read_record(two[2] / "alone" / "record.json")
    assert record.status == "failed"
    assert record.reason.startswith("ValueError: only here")


@pytest.mark.parametrize("task", [FINETUNE, LINPROBE], ids=lambda task: task.name)
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


@pytest.mark.parametrize("task", [FINETUNE, LINPROBE], ids=lambda task: task.name)
def test_accumulation_keeps_the_effective_batch(tmp_path, task):
    """LARS on the bias and on the log's loss would show a wrong scale, which Adam forgives."""
    root, found = write_imagenet(tmp_path, train=4), []
    for micro_batch in (16, 4):
        machine = Machine(micro_batch=micro_batch)
        job = without_chance(make_job(task, root, tmp_path / str(micro_batch), machine, batch=16, epochs=3))
        state, model = train(job, bare_head=True)
        assert (state.step, state.micro_batch) == (3, micro_batch)
        found.append((model.state_dict(), losses(job.work)))
    (whole, whole_losses), (parts, parts_losses) = found
    assert_same_training(parts, whole)
    assert parts_losses == pytest.approx(whole_losses, rel=1e-4)


def test_the_moving_average_is_its_recursion_and_is_what_is_evaluated(tmp_path):
    root = write_imagenet(tmp_path, train=4)
    job = without_chance(make_job(FINETUNE, root, tmp_path / "ema", ema=0.7))
    model, steps = start_model(job), []
    by_hand = {name: p.detach().double() for name, p in model.named_parameters()}

    def after_step(*_):
        steps.append({name: p.detach().double() for name, p in model.named_parameters()})

    hook = register_optimizer_step_post_hook(after_step)
    try:
        _, average = train(job, model=model)
    finally:
        hook.remove()
    assert len(steps) == 4
    for weights in steps:
        by_hand = {name: 0.7 * value + 0.3 * weights[name] for name, value in by_hand.items()}
    for name, p in average.named_parameters():
        torch.testing.assert_close(p.detach().double(), by_hand[name], rtol=1e-5, atol=1e-8)
    assert not torch.equal(average.head.weight, model.head.weight)


@pytest.mark.slow
def test_both_accuracies_are_kept_with_a_moving_average(tmp_path):
    """The average of nearly 1 stays where it started, so that the two differ."""
    root = write_imagenet(tmp_path, train=8)
    job = make_job(FINETUNE, root, tmp_path / "work", ema=0.999999, epochs=8, base_lr=0.03)
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert record.metrics["top1_without_ema"] > record.metrics["top1"] + 20
    left = read_checkpoint(job.work / CLASSIFIER_FILE)
    start = start_model(job).state_dict()
    torch.testing.assert_close(
        left.encoder["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"], atol=1e-4, rtol=0
    )


def test_a_probe_says_when_its_batchnorm_saw_another_batch(tmp_path):
    root = write_imagenet(tmp_path, train=2, val=1)
    whole = run_job(make_job(LINPROBE, root, tmp_path / "whole"))
    assert whole.resolved["batchnorm_batch"] == 8
    assert not whole.notes
    split = run_job(make_job(LINPROBE, root, tmp_path / "split", Machine(micro_batch=4)))
    assert split.resolved["batchnorm_batch"] == 4
    assert any("BatchNorm" in note and "4" in note and "8" in note for note in split.notes)


@pytest.mark.parametrize(("batch", "micro_batch"), [(150, 0), (12, 4), (10, 5)])
def test_mixup_gets_an_even_micro_batch_wherever_the_batch_is_even(tmp_path, batch, micro_batch):
    root = write_imagenet(tmp_path, train=40)
    machine = Machine(micro_batch=micro_batch)
    job = make_job(FINETUNE, root, tmp_path / "work", machine, batch=batch, mixup=0.8, epochs=1, warmup_epochs=0)
    state, _ = train(job)
    assert state.micro_batch % 2 == 0
    assert batch % state.micro_batch == 0
    assert state.micro_batch <= (micro_batch or 128)


def test_mixup_refuses_an_odd_batch(tmp_path):
    root = write_imagenet(tmp_path, train=4)
    with pytest.raises(UserError, match="even"):
        train(make_job(FINETUNE, root, tmp_path / "work", batch=9, mixup=0.8))


# The real command


def command(root: Path, out: Path, *more: str) -> list[str]:
    arguments = ["--task", "imagenet_finetune", "--ckpt", f"random:{ARCH}", "--recipe", "mini", "--data", str(root)]
    knobs = ["batch=16", "epochs=5", "ema=0.9", "drop_path=0.1", "mixup=0.8", "cutmix=1.0"]
    return ["-m", "transfer.classification", *arguments, "--out", str(out), "--device", "cpu", *more, "--set", *knobs]


@pytest.mark.slow
def test_a_killed_fine_tuning_goes_on_and_ends_with_the_same_weights(tmp_path):
    root = write_imagenet(tmp_path, train=32, val=8)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, *command(root, whole)], cwd=ROOT, env=env, check=True, timeout=300)

    arguments = [sys.executable, *command(root, killed, "--save-minutes", "0")]
    kill_when(lambda: any(killed.rglob(LOG_FILE)), arguments, ROOT, env)
    assert not any(killed.rglob("record.json"))
    (checkpoint,) = killed.rglob(CHECKPOINT_FILE)
    assert 0 < torch.load(checkpoint, weights_only=True)["state"]["step"] < 40

    again = subprocess.run(arguments, cwd=ROOT, env=env, check=True, timeout=300, capture_output=True, text=True)
    assert "resuming imagenet_finetune" in again.stdout
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
    root = write_imagenet(tmp_path, train=16, val=5)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    records = []
    for name, launcher in (("one", []), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        arguments = command(root, tmp_path / name)
        arguments = arguments[: arguments.index("--set")] + ["--set", "batch=16", "epochs=3", "rand_augment="]
        subprocess.run([sys.executable, *launcher, *arguments], cwd=ROOT, env=env, check=True, timeout=300)
        (path,) = (tmp_path / name).rglob("record.json")
        records.append(read_record(path))
    one, two = records
    assert (one.machine["processes"], two.machine["processes"]) == (1, 2)
    assert one.identity == two.identity
    assert two.n_eval == one.n_eval == 20
    assert two.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-3)
