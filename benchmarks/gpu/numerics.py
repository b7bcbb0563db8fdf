"""Does the GPU compute what the CPU computes?"""

import contextlib
import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.image_list import ImageList

from benchmarks.flops import GIB, build_autoencoder, random_inputs
from benchmarks.gpu.room import Line, Room, line, relative_error
from benchmarks.timing import matmul_rate
from mae_core.knn import knn_predict
from mae_core.machine import Machine, hardware
from mae_core.recipe import recipe
from mae_core.vit import build_vit, get_arch
from transfer.detection.engine_torchvision import MaskRCNN
from transfer.detection.recipe import recipe as detection_recipe
from transfer.detection.shared import RoIBatchNorm
from transfer.pyramid import ViTPyramid

IMAGES = 4
# (loss, gradients): largest relative error beside float32 on the CPU. TF32 rounds to 2^-11 of a number, bf16 to 2^-9,
# and the errors of the blocks add up.
BOUNDS = {"fp32": (1e-5, 1e-4), "tf32": (2e-3, 1e-2), "bf16": (2e-2, 1e-1)}
CARD_GIB = 24  # what k-NN at ImageNet's size must fit into


def device(room: Room) -> Iterator[Line]:
    """The rates of plain matrix products: the yardstick for all others."""
    # In bf16 the products of a CPU without such units take minutes.
    rates = {kind: matmul_rate(room.device, kind) / 1e12 for kind in ("fp32", "bf16")[: room.many(2, 1)]}
    capable = room.rehearsal or torch.cuda.is_bf16_supported()
    measured = ", ".join(f"{kind} {rate:.3g}" for kind, rate in rates.items())
    figure = f"{hardware(Machine(device=room.device))}; matrix products in TFLOP/s: {measured}"
    yield line("device", capable, figure, teraflops=rates, torch=torch.__version__, cuda=torch.version.cuda)


@contextlib.contextmanager
def arithmetic(room: Room, kind: str) -> Iterator[None]:
    """fp32, tf32 or bf16, and afterwards what was set before."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = kind == "tf32"
    try:
        with torch.autocast(room.device, torch.bfloat16, enabled=kind == "bf16"):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def forward(room: Room) -> Iterator[Line]:
    """Loss and gradients of pre-training and of a classifier, beside float32 on the CPU."""
    torch.manual_seed(0)
    r, size = recipe(room.base, room.recipe), get_arch(room.base).image_size
    images, noise = random_inputs(room.base, r, IMAGES, "cpu")
    mae = build_autoencoder(room.base, r, "cpu").train()
    yield from compare(room, "pre-training", mae, lambda m, *inputs: m(*inputs, r.mask_ratio).loss, images, noise)
    vit = build_vit(room.base, size, 1000, "avg").train()
    images, labels = torch.randn(IMAGES, 3, size, size), torch.arange(IMAGES)
    yield from compare(room, "classifier", vit, lambda m, x, y: F.cross_entropy(m(x).float(), y), images, labels)


def compare(room: Room, name: str, model: nn.Module, loss_of: Callable[..., Tensor], *inputs: Tensor) -> Iterator[Line]:
    truth_loss = loss_of(model, *inputs)
    truth_loss.backward()
    truth = gradient(model)
    for kind, (of_loss, of_gradient) in BOUNDS.items():
        ours = copy.deepcopy(model).to(room.device)
        ours.zero_grad(set_to_none=True)
        with arithmetic(room, kind):
            loss = loss_of(ours, *(tensor.to(room.device) for tensor in inputs))
        loss.backward()
        errors = abs(loss.item() / truth_loss.item() - 1), relative_error(gradient(ours), truth)
        figure = (
            f"loss off by {errors[0]:.1e} (allowed {of_loss:.0e}), gradients by {errors[1]:.1e} ({of_gradient:.0e})"
        )
        holds = errors[0] <= of_loss and errors[1] <= of_gradient
        yield line(f"{name}, {kind}", holds, figure, loss=errors[0], gradient=errors[1])


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten().float().cpu() for p in model.parameters() if p.grad is not None])


def boxes(room: Room) -> Iterator[Line]:
    """In training the maps and proposals of the torchvision engine are float32 under bf16, so that coordinates do not
    lie on bf16's grid, which is 2 px wide beyond 256 px and 4 beyond 512. (Tests are in float32 throughout.)"""
    torch.manual_seed(0)
    r, size = detection_recipe(room.base, room.recipe), room.many(1024, 384)
    body = ViTPyramid(room.base, size, window=r.window)
    model = MaskRCNN(body, r, RoIBatchNorm).to(room.device).train()
    images = torch.rand(1, 3, size, size, device=room.device) * 255
    target = {"boxes": torch.tensor([[8.0, 8.0, size / 2, size / 2]], device=room.device)}
    with torch.no_grad(), torch.autocast(room.device, torch.bfloat16):
        maps = model.features(images, [(size, size)])
        found = model.rpn(ImageList(images, [(size, size)]), maps, [target])[0][0]
    inside = found[(found > 256) & (found < size - 1)]
    off_grid = (inside != inside.bfloat16().float()).float().mean().item() if len(inside) else 0.0
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in (*maps.values(), found)}
    figure = (
        f"{', '.join(sorted(kinds))}; {100 * off_grid:.0f} % of {len(inside)} coordinates beyond 256 px off bf16's grid"
    )
    yield line("boxes, bf16", kinds == {"float32"} and off_grid > 0.5, figure, off_grid=off_grid)


def knn(room: Room) -> Iterator[Line]:
    """k-NN at ImageNet's size and ViT-H's width: memory, and the CPU's classes."""
    count, width, tests = room.many(1_281_167, 20_000), room.many(1280, 64), room.many(2048, 256)
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(count, width, generator=generator)
    labels = torch.randint(1000, (count,), generator=generator)
    # Test features near training ones: otherwise the vote is among equals.
    test = train[:: count // tests][:tests] + 0.5 * torch.randn(tests, width, generator=generator)
    if not room.rehearsal:
        torch.cuda.reset_peak_memory_stats()
    found = knn_predict(train.to(room.device), labels.to(room.device), test.to(room.device), 1000).cpu()
    peak = 0.0 if room.rehearsal else torch.cuda.max_memory_allocated() / GIB
    few = tests // 8
    equal = (found[:few] == knn_predict(train, labels, test[:few], 1000)).float().mean().item()
    figure = f"{count:,} x {width}: {peak:.1f} GiB (allowed {CARD_GIB}), {100 * equal:.1f} % the CPU's classes"
    yield line("k-NN", peak <= CARD_GIB and equal >= 0.98, figure, peak_gib=peak, equal=equal)
