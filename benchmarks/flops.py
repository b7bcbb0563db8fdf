"""The FLOPs and the memory of a pre-training step, counted without running it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mae_core.autoencoder import MaskedAutoencoder
from mae_core.flops import count_flops
from mae_core.masking import mask_noise
from mae_core.recipe import PretrainRecipe
from mae_core.stopping import stop_postponed
from mae_core.targets import Target
from mae_core.vit import get_arch

GIB = 2**30


class WidthOnly(Target):
    """A target of a given width whose computation costs nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, prediction: Tensor, images: Tensor, patches: Tensor, index: Tensor) -> Tensor:
        return prediction.square().mean(dim=-1)


def build_autoencoder(arch: str, r: PretrainRecipe, device: str, checkpointing: bool = False) -> MaskedAutoencoder:
    """The recipe's autoencoder. A target of the same width stands in for a fitted target or a tokenizer: those are
    frozen, and their cost is not counted."""
    width = {"pca": r.pca_components, "tokens": r.vocabulary}.get(r.target)
    target = WidthOnly(width) if width else None
    with torch.device(device):
        decoder = (r.decoder_dim, r.decoder_depth, r.decoder_heads)
        return MaskedAutoencoder(
            arch, r.image_size, *decoder, r.norm_pix, checkpointing, target, r.loss_on, r.encoder_mask_tokens
        )


def random_inputs(arch: str, r: PretrainRecipe, images: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images [B, 3, H, W] and the noise of their masks [B, N]."""
    side = r.image_size // get_arch(arch).patch
    generator = torch.Generator().manual_seed(seed)
    noise = mask_noise(r.masking, images, (side, side), r.mask_ratio, generator)
    return torch.randn(images, 3, r.image_size, r.image_size, generator=generator).to(device), noise.to(device)


@cache
def training_flops(arch: str, r: PretrainRecipe, batch: int = 64) -> int:
    """FLOPs of one image's forward and backward pass, two per multiply-add: the matrix products that are computed, as
    torch's FlopCounterMode counts them, of a batch of so many images, which share what is alike in them on a CPU; on
    a GPU it is a little more. Nothing is computed: the model is on the meta device."""
    model = build_autoencoder(arch, r, "meta").train()
    images, noise = random_inputs(arch, r, batch, "meta")
    return count_flops(lambda: model(images, noise, r.mask_ratio).loss.backward(), model) // batch


@dataclass(frozen=True)
class Memory:
    """GiB on one device. weights: parameters, gradients, AdamW's two moments and DDP's buckets, all float32: 20 bytes
    per parameter. activations: what autograd keeps for the backward pass; with checkpointing every block's input, and
    all that one block keeps while it is recomputed."""

    parameters: int
    weights: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.activations


@stop_postponed()  # as for mae_core.flops
def training_memory(arch: str, r: PretrainRecipe, micro_batch: int, checkpointing: bool, bf16: bool = True) -> Memory:
    """Counted on fake tensors, each saved storage once, with fused attention, which keeps no attention matrix. Excludes
    the kernels' own workspace and what the allocator leaves unused."""
    model = build_autoencoder(arch, r, "meta", checkpointing).train()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model = model.to_empty(device="cpu")
        images = torch.empty(micro_batch, 3, r.image_size, r.image_size)
        noise = torch.empty(micro_batch, model.patch_embed.num_patches)
        parameters = sum(p.numel() for p in model.parameters())
        kept = saved_bytes(lambda: model(images, noise, r.mask_ratio).loss, model)
        if checkpointing:
            x = torch.empty(micro_batch, model.patch_embed.num_patches + 1, r.decoder_dim, requires_grad=True)
            y = torch.empty(micro_batch, 1 + noise.shape[1] // 4, model.embed_dim, requires_grad=True)
            kept += max(
                saved_bytes(lambda: model.decoder_blocks[0](x), model), saved_bytes(lambda: model.blocks[0](y), model)
            )
    return Memory(parameters, 20 * parameters / GIB, kept / GIB)


def saved_bytes(work: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the tensors that autograd saves while `work` runs, without the model's parameters."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, so that no later storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(storage.nbytes() for number, storage in saved.items() if number not in own)
