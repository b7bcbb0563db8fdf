"""What --precision bf16 computes in bf16 (docs/speed.md): matrix products, convolutions and what lies between two of
them. Every operation of whole trainings is looked at, forward, backward and in the optimizer."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mae_core.machine import Machine
from tests.fixtures import pretrain as runs
from tests.fixtures.transfer import make_job, write_imagenet
from transfer.classification.tasks import FINETUNE, LINPROBE
from transfer.run import run_job

BF16 = Machine(precision="bf16")
PRODUCTS = {"mm", "bmm", "addmm", "convolution", "convolution_backward"}
# On a CPU timm's attention is written out in bf16, with its softmax over patches; on a GPU it is one fused product.
BETWEEN = {"gelu", "gelu_backward", "_softmax", "_softmax_backward_data", "mul", "softmax"}
# Behind the last product of a branch: the draws of drop path and the factor 1 / keep.
BEHIND = {"new_empty", "bernoulli_", "div_"}
# Values are moved, not computed. "sum" is a gradient of a bias, "add" that of a tensor that is used twice.
MOVING = {"view", "_to_copy", "to", "t", "transpose", "_unsafe_view", "clone", "expand", "permute", "detach", "unbind"}
MOVING |= {"stack", "slice", "slice_backward", "alias", "cat", "reshape", "flatten"}
COMPOSITE = {"linear", "matmul", "conv2d", "dropout"}  # of the above; dropout at a rate of 0
GRADIENTS = {"sum", "add"}


class Rounded(TorchDispatchMode):
    """The names of all operations whose result is bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(one, torch.Tensor) and one.dtype == torch.bfloat16 for one in tree_leaves(result)):
            self.names.add(func.overloadpacket.__name__)
        return result


@pytest.mark.parametrize("what", ["pre-training", FINETUNE, LINPROBE], ids=lambda what: getattr(what, "name", what))
def test_only_products_and_what_lies_between_them_are_bf16(noise_images, tmp_path, what):
    """No loss, no softmax over classes, no norm layer, no position, no statistic of BatchNorm, no moment or norm of an
    optimizer, no moving average."""
    with Rounded() as rounded:
        if what == "pre-training":
            runs.train(noise_images, tmp_path / "a", BF16, epochs=1, warmup_epochs=0)
        else:
            changes = {"drop_path": 0.2} if what is FINETUNE else {}
            record = run_job(make_job(what, write_imagenet(tmp_path / "data"), tmp_path / "work", BF16, **changes))
            assert record.status == "ok", record.reason
    assert {"addmm", "gelu"} <= rounded.names
    assert rounded.names <= PRODUCTS | BETWEEN | BEHIND | MOVING | COMPOSITE | GRADIENTS
