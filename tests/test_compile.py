"""torch.compile: one graph for a whole training, no break in it, the same numbers. Dynamo traces as for a GPU; the
graphs run as they are (backend "eager"), since a compiler's kernels are not what is asked."""

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from mae_core import loop, pretrain
from mae_core.machine import Machine
from tests.fixtures import pretrain as runs
from tests.fixtures.transfer import make_job, write_imagenet
from transfer.classification.tasks import FINETUNE, LINPROBE
from transfer.run import run_job


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that torch.compile makes; a break in one is an error."""
    torch._dynamo.reset()
    counter, original = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: original(model, backend=counter, fullgraph=True, **how))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("masking", ["random", "block", "grid"])
def test_pre_training_is_one_graph(noise_images, tmp_path, graphs, masking, capsys):
    knobs = {"masking": masking} | ({"mask_ratio": 0.75} if masking == "grid" else {})
    runs.train(noise_images, tmp_path / "a", Machine(compile=True), **knobs)
    assert graphs.frame_count == 1
    assert capsys.readouterr().out.startswith("compiling: ")
    runs.train(noise_images, tmp_path / "b", **knobs)
    assert "compiling" not in capsys.readouterr().out
    a, b = (load_file(tmp_path / name / pretrain.WEIGHTS_FILE) for name in "ab")
    assert a.keys() == b.keys()  # no name begins with _orig_mod
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


def test_a_reduced_micro_batch_is_one_graph_more(noise_images, tmp_path, graphs, monkeypatch):
    accumulate, calls = loop.accumulate, []

    def limited(model, chunks, step, t, micro_batch, sync):
        if micro_batch > 8:
            calls.append(micro_batch)
            accumulate(model, chunks, step, t, micro_batch, sync)  # compiles, then memory runs out
            raise torch.OutOfMemoryError
        return accumulate(model, chunks, step, t, micro_batch, sync)

    monkeypatch.setattr(loop, "accumulate", limited)
    state = runs.train(noise_images, tmp_path / "a", Machine(compile=True))
    assert (calls, state.micro_batch, graphs.frame_count) == ([16], 8, 2)


@pytest.mark.parametrize("task", [FINETUNE, LINPROBE], ids=lambda task: task.name)
def test_training_a_classifier_is_one_graph(tmp_path, graphs, task):
    root = write_imagenet(tmp_path / "data")
    job = make_job(task, root, tmp_path / "work", Machine(compile=True))
    record = run_job(job)
    assert record.status == "ok", record.reason
    assert graphs.frame_count == 1
