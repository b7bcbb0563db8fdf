"""The training loop by pre-trainings: in this process (quick), and in processes that are killed, stopped and run in
pairs (slow)."""

import fcntl
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from mae_core import loop, pretrain
from mae_core.autoencoder import MaskedAutoencoder
from mae_core.errors import UserError
from mae_core.machine import Machine
from mae_core.training import CHECKPOINT_FILE, LOG_FILE, State, end_epoch, truncate_log
from tests.fixtures import ROOT
from tests.fixtures import pretrain as runs
from tests.fixtures.waiting import PATIENCE, wait_for


def test_log_has_one_line_per_epoch(reference):
    lines = runs.log(reference)
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 4), (1, 8)]
    # base_lr 1.5e-3 at batch 16: 9.375e-5 at the peak. Step 3 is 3/4 of the warm-up, step 7 3/4 of the cosine's way.
    assert [line["lr"] for line in lines] == pytest.approx([0.75 * 9.375e-5, 9.375e-5 * (1 - 2**-0.5) / 2])


def on_forward(monkeypatch, change):
    """Pass each output of the model through change(number of the call, images, output); the batch sizes, call by
    call."""
    original, calls = MaskedAutoencoder.forward, []

    def forward(self, images, noise, mask_ratio):
        calls.append(len(images))
        return change(len(calls), images, original(self, images, noise, mask_ratio))

    monkeypatch.setattr(MaskedAutoencoder, "forward", forward)
    return calls


def test_logged_loss_is_the_mean_over_the_epoch(noise_images, tmp_path, monkeypatch):
    seen = []
    on_forward(monkeypatch, lambda call, images, output: seen.append(output.loss.item()) or output)
    runs.train(noise_images, tmp_path / "a", Machine(micro_batch=8))
    assert len(seen) == 16
    assert runs.losses(tmp_path / "a") == pytest.approx([0, sum(seen[:8]) / 8, 1, sum(seen[8:]) / 8])


def test_the_seed_decides_the_weights(noise_images, reference, tmp_path):
    runs.train(noise_images, tmp_path / "same", Machine(workers=1, save_minutes=60))
    assert runs.differing(reference, tmp_path / "same") == []
    runs.train(noise_images, tmp_path / "other", seed=1)
    assert len(runs.differing(reference, tmp_path / "other")) > 50


@pytest.mark.parametrize("micro_batch", [4, 5])  # 5 does not divide 16: 4 is taken
def test_accumulated_micro_batches_equal_the_whole_batch(noise_images, reference, tmp_path, micro_batch):
    state = runs.train(noise_images, tmp_path / "a", Machine(micro_batch=micro_batch))
    assert state.micro_batch == 4
    runs.assert_equal_to_rounding(reference, tmp_path / "a", rate_sum=5e-4)


# As torch names a library of CUDA for which it has left no memory.
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def out_of_memory_above(monkeypatch, limit, only_call=None, error=None):
    def change(call, images, output):
        if len(images) > limit and only_call in (None, call):
            raise error or torch.OutOfMemoryError("simulated")
        return output

    return on_forward(monkeypatch, change)


@pytest.mark.parametrize("error", [None, CUBLAS])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(
    noise_images, reference, tmp_path, monkeypatch, capsys, error
):
    calls = out_of_memory_above(monkeypatch, limit=4, error=error)
    state = runs.train(noise_images, tmp_path / "a")
    assert calls == [16, 8] + [4] * 4 * 8
    assert state.micro_batch == 4
    assert [note.split(",")[0] for note in state.notes] == [
        "out of GPU memory: micro-batch reduced to 8",
        "out of GPU memory: micro-batch reduced to 4",
    ]
    assert "micro-batch reduced to 4, effective batch kept" in capsys.readouterr().out
    runs.assert_equal_to_rounding(reference, tmp_path / "a", rate_sum=5e-4)
    assert runs.losses(tmp_path / "a") == pytest.approx(runs.losses(reference))


def test_other_errors_of_cuda_are_not_taken_for_lack_of_memory(noise_images, tmp_path, monkeypatch):
    error = RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`")
    out_of_memory_above(monkeypatch, limit=4, error=error)
    with pytest.raises(RuntimeError, match="EXECUTION_FAILED"):
        runs.train(noise_images, tmp_path / "a")


def test_out_of_memory_after_part_of_a_step_counts_nothing_twice(noise_images, tmp_path, monkeypatch):
    runs.train(noise_images, tmp_path / "whole", Machine(micro_batch=8))
    # The second half of the third step fails once: its first half has left gradients by then.
    calls = out_of_memory_above(monkeypatch, limit=4, only_call=6)
    runs.train(noise_images, tmp_path / "a", Machine(micro_batch=8))
    assert calls == [8] * 6 + [4] * 4 * 6
    runs.assert_equal_to_rounding(tmp_path / "whole", tmp_path / "a", rate_sum=5e-4)


def test_out_of_memory_in_the_backward_pass_frees_its_graph_first(noise_images, reference, tmp_path, monkeypatch):
    graphs = []

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise torch.OutOfMemoryError("simulated")

    def change(call, images, output):
        assert all(graph() is None for graph in graphs)
        if len(images) <= 4:
            return output
        graphs.append(weakref.ref(output.prediction))
        return output._replace(loss=Full.apply(output.loss))

    on_forward(monkeypatch, change)
    assert runs.train(noise_images, tmp_path / "a").micro_batch == 4
    assert len(graphs) == 2
    runs.assert_equal_to_rounding(reference, tmp_path / "a", rate_sum=5e-4)


@pytest.mark.parametrize("moved", [False, True])
def test_out_of_memory_in_the_optimizer_s_step_is_repeated_only_if_nothing_has_moved(
    noise_images, reference, tmp_path, monkeypatch, moved
):
    step, calls = torch.optim.AdamW.step, []

    def failing(self, closure=None):
        calls.append(self)
        if len(calls) == 2:
            if moved:
                with torch.no_grad():
                    self.param_groups[-1]["params"][0].mul_(1)
            raise torch.OutOfMemoryError("simulated")
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    if moved:
        said = "step 1 with a micro-batch of 16, in the update of the weights: .*; no checkpoint was written yet"
        with pytest.raises(UserError, match=said):
            runs.train(noise_images, tmp_path / "a", Machine(save_minutes=60))
    else:
        assert runs.train(noise_images, tmp_path / "a").micro_batch == 8
        runs.assert_equal_to_rounding(reference, tmp_path / "a", rate_sum=5e-4)


def test_out_of_memory_with_a_single_image_is_an_error(noise_images, tmp_path, monkeypatch):
    calls = out_of_memory_above(monkeypatch, limit=0)
    with pytest.raises(UserError, match=r"out of GPU memory at step 0 with a micro-batch of 1: .*--activation-check"):
        runs.train(noise_images, tmp_path / "a")
    assert calls == [16, 8, 4, 2, 1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_after_the_current_step_and_the_rest_is_the_same(noise_images, reference, tmp_path, number):
    out, handlers = tmp_path / "a", [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    runs.train_until(5, noise_images, out, Machine(save_minutes=60), number=number)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    assert torch.load(out / CHECKPOINT_FILE)["state"]["step"] == 6
    assert not (out / pretrain.WEIGHTS_FILE).exists()
    assert runs.train(noise_images, out).step == 8
    assert runs.differing(reference, out) == []
    assert runs.losses(out) == runs.losses(reference)


def test_a_finished_run_is_not_run_again(noise_images, reference, tmp_path, monkeypatch):
    out = shutil.copytree(reference, tmp_path / "a")
    (out / pretrain.WEIGHTS_FILE).unlink()  # as if killed between the last checkpoint and this file
    calls = out_of_memory_above(monkeypatch, limit=0)
    runs.train(noise_images, out)
    assert calls == []
    assert runs.differing(reference, out) == []


def test_log_lines_after_the_checkpoint_are_written_again(noise_images, reference, tmp_path):
    out = tmp_path / "a"
    runs.train_until(2, noise_images, out)
    # Killed after the first epoch was logged and while the second was, but before the next checkpoint.
    (out / LOG_FILE).write_text('{"epoch": 0, "loss": -1}\n{"epoch": 1, "lo')
    runs.train(noise_images, out)
    assert runs.losses(out) == runs.losses(reference)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 3, "weight_decay": 0.1}, r"recipe.epochs: 2 -> 3; recipe.weight_decay: 0.05 -> 0.1"),
        ({"seed": 1}, r"seed: 0 -> 1"),
        ({"images": "fewer"}, r"data: [0-9a-f]{64} -> [0-9a-f]{64}"),
    ],
)
def test_a_work_folder_of_another_run_is_refused(noise_images, reference, tmp_path, change, named):
    images, out = noise_images, shutil.copytree(reference, tmp_path / "a")
    before = (out / CHECKPOINT_FILE).read_bytes()
    if "images" in change:
        images = shutil.copytree(noise_images, tmp_path / "images")
        (images / "00.png").unlink()
        change = {}
    with pytest.raises(UserError, match=rf"is of another run \({named}\): choose another --out"):
        runs.train(images, out, **change)
    assert (out / CHECKPOINT_FILE).read_bytes() == before


def test_a_changed_machine_is_named(noise_images, reference, tmp_path, capsys):
    out, change = tmp_path / "a", "micro_batch: 8 -> 4; threads: 1 -> 2"
    runs.train(noise_images, out, Machine(threads=1, micro_batch=8))
    capsys.readouterr()
    state = runs.train(noise_images, out, Machine(threads=2, micro_batch=4))
    assert f"resuming pre-train vit_mini_patch8 at step 8/8; {change}" in capsys.readouterr().out
    assert state.micro_batch == 4
    but = "equal but for rounding and the draws of drop path"
    assert state.notes == (f"resumed at step 8 on a changed machine ({change}): {but}",)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_not_our_checkpoint_is_refused(noise_images, tmp_path, content):
    out = tmp_path / "a"
    out.mkdir()
    if content is None:
        torch.save({"model": {}, "epoch": 3}, out / CHECKPOINT_FILE)
    else:
        (out / CHECKPOINT_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint.pth is damaged or no training checkpoint of ours: delete it"):
        runs.train(noise_images, out)


def test_a_checkpoint_from_before_unreadable_images_were_counted_is_resumed(noise_images, reference, tmp_path):
    out = tmp_path / "a"
    runs.train_until(5, noise_images, out)
    earlier = torch.load(out / CHECKPOINT_FILE)
    del earlier["state"]["unreadable"]
    torch.save(earlier, out / CHECKPOINT_FILE)
    assert runs.train(noise_images, out).unreadable == ()
    assert runs.differing(reference, out) == []


def test_a_checkpoint_with_a_missing_or_wrong_part_is_refused(noise_images, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "a")
    whole = torch.load(tmp_path / "a" / CHECKPOINT_FILE)
    parts = [{key: whole[key] for key in whole if key != lacks} for lacks in whole if lacks not in ("format", "ema")]
    parts += [{**whole, "state": {**whole["state"], "step": "many"}}, {**whole, "optimizer": {"state": {}}}]
    for content in (
        *parts,
        {**whole, "machine": 3},
        {**whole, "fixed": [1]},
        {**whole, "state": {**whole["state"], "unreadable": 7}},
        {**whole, "state": {key: value for key, value in whole["state"].items() if key != "seconds"}},
    ):
        torch.save(content, tmp_path / "a" / CHECKPOINT_FILE)
        with pytest.raises(UserError, match=r"checkpoint.pth does not fit this model \(\w+Error: .*delete it"):
            runs.train(noise_images, tmp_path / "a")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "no memory on the device for .*free some",
        ),
        (RuntimeError("CUDA error: an illegal memory access"), "the device failed while .* the file is untouched"),
    ],
)
def test_a_device_that_fails_is_not_taken_for_a_bad_checkpoint(
    noise_images, reference, tmp_path, monkeypatch, error, says
):
    def failing(*_: object, **__: object) -> None:
        raise error

    shutil.copytree(reference, tmp_path / "a")
    monkeypatch.setattr(MaskedAutoencoder, "load_state_dict", failing)
    with pytest.raises(UserError, match=says) as found:
        runs.train(noise_images, tmp_path / "a")
    assert "delete" not in str(found.value)


def test_a_checkpoint_with_zeros_inside_a_weight_is_refused(noise_images, reference, tmp_path):
    shutil.copytree(reference, tmp_path / "a")
    path = tmp_path / "a" / CHECKPOINT_FILE
    content = bytearray(path.read_bytes())
    at = content.find(torch.load(path)["model"]["blocks.2.mlp.fc1.weight"].numpy().tobytes())
    content[at : at + 4096] = bytes(4096)
    path.write_bytes(content)
    torch.load(path)  # which does not look at checksums
    with pytest.raises(UserError, match=r"checkpoint.pth is damaged or no training checkpoint of ours: delete it"):
        runs.train(noise_images, tmp_path / "a")


def test_a_resumed_optimizer_runs_as_asked_not_as_saved(noise_images, reference, tmp_path, monkeypatch):
    runs.train_until(2, noise_images, tmp_path / "a", Machine(fused_adamw=True))
    step, flags = torch.optim.AdamW.step, []
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (flags.append(self.param_groups[0]["fused"]), step(self))
    )
    state = runs.train(noise_images, tmp_path / "a", Machine(fused_adamw=False))
    assert flags == [None] * 5
    assert "fused_adamw: True -> False" in state.notes[0]
    runs.assert_equal_to_rounding(reference, tmp_path / "a", rate_sum=5e-4)


def assert_good(out, step):
    content = torch.load(out / CHECKPOINT_FILE)
    assert content["state"]["step"] == step
    assert all(tensor.isfinite().all() for tensor in content["model"].values())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(noise_images, tmp_path, monkeypatch):
    infinite, said = float("inf"), r"the loss is inf at step 5 \(epoch 1, lr .*checkpoint.pth holds the last good"
    on_forward(monkeypatch, lambda call, _, out: out._replace(loss=out.loss * infinite) if call == 6 else out)
    with pytest.raises(UserError, match=said):
        runs.train(noise_images, tmp_path / "a")
    assert_good(tmp_path / "a", 5)
    monkeypatch.undo()
    assert runs.train(noise_images, tmp_path / "a").step == 8


def test_weights_that_are_not_finite_are_not_saved(noise_images, tmp_path, monkeypatch):
    # A finite loss with a gradient that is not: only the next loss would show it.
    original, steps = loop.train_step, iter(range(8))

    def train_step(model, *args, **options):
        loss = original(model, *args, **options)
        if next(steps) == 2:
            model.cls_token.data[0, 0, 5] = float("nan")
        return loss

    monkeypatch.setattr(loop, "train_step", train_step)
    with pytest.raises(UserError, match=r"a weight became infinite or NaN at step 2 .*holds the last good state"):
        runs.train(noise_images, tmp_path / "a")
    assert_good(tmp_path / "a", 2)


def test_divergence_at_an_absurd_rate_is_explained_in_a_sentence(noise_images, tmp_path):
    with pytest.raises(UserError, match=r"at step [1-7] \(epoch [01], lr .*a lower base_lr, a longer warm-up"):
        runs.train(noise_images, tmp_path / "a", Machine(save_minutes=60), base_lr=1e30)
    assert not (tmp_path / "a" / pretrain.WEIGHTS_FILE).exists()


def test_unreadable_images_are_named_and_too_many_stop_the_run(noise_images, tmp_path, capsys):
    images = shutil.copytree(noise_images, tmp_path / "images")
    files = [images / f"{number:02}.png" for number in range(20)]
    for file in files[:3]:
        file.write_bytes(b"broken")
    runs.train_until(5, images, tmp_path / "a")  # the first epoch meets all three
    state = runs.train(images, tmp_path / "a")
    out = capsys.readouterr().out
    assert [out.count(f"unreadable image, replaced by black: {file}") for file in files[:3]] == [1, 1, 1]
    names = [str(file) for file in files[:3]]
    note = f"3 training images could not be read and were replaced by black: {', '.join(names)}"
    assert (state.step, state.notes, state.unreadable) == (8, (note,), tuple(names))
    with safe_open(tmp_path / "a" / pretrain.WEIGHTS_FILE, "pt") as file:
        assert json.loads(file.metadata()["unreadable"]) == names
    assert runs.train(images, tmp_path / "a").notes == (note,)  # a run that has ended already
    for file in files[3:]:
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match="images cannot be read"):
        runs.train(images, tmp_path / "b")


def wait_for_lines(path, count, process):
    deadline = time.monotonic() + 600
    while not (path.exists() and path.read_text().count("\n") >= count):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_weights(noise_images, tmp_path):
    runs.train(noise_images, tmp_path / "whole", epochs=12)
    out = tmp_path / "killed"
    for nth, workers, step in ((10, 0, 9), (20, 2, 28)):  # the second begins where the first was
        assert runs.killed(runs.command(noise_images, out, "--workers", workers, epochs=12), out, nth) == step
    process = runs.start(runs.command(noise_images, out, epochs=12))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "resuming pre-train vit_mini_patch8 at step 28/48\n" in output
    assert runs.differing(tmp_path / "whole", out) == []
    assert runs.losses(out) == runs.losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_a_closed_terminal_save_and_exit_with_130(noise_images, tmp_path, number):
    process = runs.start(runs.command(noise_images, tmp_path, epochs=500))
    wait_for_lines(tmp_path / LOG_FILE, 1, process)
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == 130, output
    assert f"stopped; the same command goes on from {tmp_path / CHECKPOINT_FILE}" in output
    assert "Traceback" not in output
    step = torch.load(tmp_path / CHECKPOINT_FILE)["state"]["step"]
    assert 4 <= step < 2000
    assert len(runs.log(tmp_path)) == step // 4


@pytest.mark.slow
def test_a_terminal_that_is_gone_does_not_cost_the_save(noise_images, tmp_path):
    """Its kernel sends SIGHUP, and refuses from then on what is printed there."""
    terminal, ours = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, *map(str, runs.command(noise_images, tmp_path, epochs=500)), "--save-minutes", "600"]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), ours)
    process = subprocess.Popen(command, **streams, cwd=ROOT, preexec_fn=take_terminal)
    os.close(ours)
    try:
        wait_for(lambda: (tmp_path / LOG_FILE).exists() or process.poll() is not None)
        assert not (tmp_path / CHECKPOINT_FILE).exists()
        os.close(terminal)
        process.wait(PATIENCE)
    finally:
        process.kill()
    assert torch.load(tmp_path / CHECKPOINT_FILE)["state"]["step"] >= 4


# Run by torchrun: pre-train, with only the second of two processes out of memory in its first forward passes, or from
# its second step on, when Adam's state is there, or in its first update; or told to stop in the sixth step; or with an
# --out of its own, as on a node that does not see the shared one.
MISHAP = """
import os, signal, sys, torch
from mae_core import pretrain
from mae_core.autoencoder import MaskedAutoencoder

mishap, second = sys.argv.pop(1), os.environ["RANK"] == "1"
forward, step_noise = MaskedAutoencoder.forward, pretrain.step_noise

def small_forward(self, images, noise, mask_ratio):
    if second and len(images) > 2 and (mishap == "memory" or optimizer.state):
        raise torch.OutOfMemoryError("simulated")
    return forward(self, images, noise, mask_ratio)

def stopping_noise(seed, step, *rest):
    if second and step == 5:
        os.kill(os.getpid(), signal.SIGINT)
    return step_noise(seed, step, *rest)

def adamw(*arguments):
    global optimizer
    optimizer = real_adamw(*arguments)
    if second and mishap == "update":
        optimizer.step = raising
    return optimizer

def raising():
    raise torch.OutOfMemoryError("simulated")

real_adamw, pretrain.adamw = pretrain.adamw, adamw
if mishap in ("memory", "state"):
    MaskedAutoencoder.forward = small_forward
if mishap == "elsewhere" and second:
    sys.argv[sys.argv.index("--out") + 1] += "-of-this-node"
if mishap == "stop":
    pretrain.step_noise = stopping_noise
sys.exit(pretrain.main())
"""


def torchrun(folder, mishap, arguments):
    (folder / "mishap.py").write_text(MISHAP)
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = runs.start([*two, folder / "mishap.py", mishap, *arguments[2:]])
    try:
        return process.communicate(timeout=900)[0], process.returncode
    finally:
        process.terminate()  # processes that wait for each other; torchrun ends its children


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ["none", "memory", "state", "stop"])
def test_two_processes_equal_one_to_rounding(noise_images, reference, tmp_path, mishap):
    out = tmp_path / "two"
    output, code = torchrun(tmp_path, mishap, runs.command(noise_images, out))
    if mishap == "stop":
        # One process was told to stop: both did, after the same step, and rank 0 has saved it.
        assert code != 0
        assert "Gloo" not in output
        assert torch.load(out / CHECKPOINT_FILE)["state"]["step"] == 6
        output, code = torchrun(tmp_path, "elsewhere", runs.command(noise_images, out))
        assert code != 0
        assert "error: processes 0 and 1 do not go on from the same place (step: 6 -> 0): --out" in output
        output, code = torchrun(tmp_path, "none", runs.command(noise_images, out))
        assert "resuming pre-train vit_mini_patch8 at step 6/8" in output
        assert "at step 6/8;" not in output  # on an unchanged machine; a warning of the other process may follow
    assert code == 0, output
    assert output.count("micro-batch reduced to 4") == 2 * (
        mishap in ("memory", "state")
    )  # as it happens, and at the end
    content = torch.load(out / CHECKPOINT_FILE)
    assert content["machine"]["processes"] == 2
    assert content["state"]["micro_batch"] == (2 if mishap in ("memory", "state") else 8)
    runs.assert_equal_to_rounding(reference, out, rate_sum=5e-4)
    assert runs.losses(out) == pytest.approx(runs.losses(reference), rel=1e-5)


@pytest.mark.slow
def test_an_update_that_only_one_process_has_taken_ends_both(noise_images, tmp_path):
    output, code = torchrun(tmp_path, "update", runs.command(noise_images, tmp_path / "two"))
    assert code == 1
    assert "error: out of GPU memory at step 0 with a micro-batch of 8, in another process's update" in output


@pytest.mark.slow
def test_two_processes_share_a_fitted_target_and_the_following(noise_images, tmp_path):
    data = runs.labelled(noise_images, tmp_path / "labelled", val=24, classes=2)
    flags = ["--eval-every", 2, "--eval-data", data, "--keep-every", 1]
    knobs = {"target": "pca", "pca_components": 5, "fit_images": 8, "repeated_augmentation": 2, "masking": "block"}
    output, code = torchrun(tmp_path, "none", runs.command(noise_images, tmp_path / "two", *flags, **knobs))
    assert code == 0, output
    process = runs.start(runs.command(noise_images, tmp_path / "one", *flags, **knobs))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "epoch 2/2: k-NN top-1 " in output
    runs.assert_equal_to_rounding(tmp_path / "one", tmp_path / "two", rate_sum=5e-4)
    one, two = (runs.log(tmp_path / name)[1]["knn_top1"] for name in ("one", "two"))
    assert abs(one - two) < 100 * 2 / 24  # a vote may turn by rounding
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def test_the_logged_loss_is_the_same_whenever_a_state_was_saved(tmp_path, monkeypatch):
    """A save gives both processes the mean of their sums."""
    training, logged = SimpleNamespace(work=tmp_path, steps_per_epoch=6), []
    for one, other in torch.rand(50, 2, 6, generator=torch.Generator().manual_seed(0)).double().sum(dim=2).tolist():
        for sums in ([one, other], [(one + other) / 2] * 2):
            monkeypatch.setattr("mae_core.distributed.gather_to_all", lambda value, sums=sums: [value, sums[1]])
            end_epoch(training, State(step=6, loss_sum=sums[0]), 0.1, 9.0, {})
            logged.append(json.loads((tmp_path / LOG_FILE).read_text().splitlines()[-1])["loss"])
        assert logged[-1] == pytest.approx((one + other) / 12)
    assert logged[::2] == logged[1::2]


def test_a_log_that_is_no_text_or_a_link_is_a_sentence(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"log\.jsonl is no log of a training: move it away or delete it"):
        truncate_log(log, 1)
    log.unlink()
    (tmp_path / "victim").write_text("1\n2\n")
    log.symlink_to(tmp_path / "victim")
    truncate_log(log, 1)
    assert (tmp_path / "victim").read_text() == "1\n2\n"
    assert (log.is_symlink(), log.read_text()) == (False, "1\n")
