"""The training steps of the dense tasks that speed.py times: ours on each engine, and the originals'.

COCO: ViTDet's recipe on both engines, beside the model of detectron2's own ViTDet, whose config comes with it. ADE20K:
our UperNet beside the one of mmsegmentation's config for MAE. One step is forward, backward and update of one batch in
memory; all arms get the same images, objects and labels, and have random weights.
"""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from benchmarks.originals.upernet import CONFIG as UPERNET
from benchmarks.speed_workloads import Workload, training_step
from mae_core.checkpoint import read_checkpoint
from mae_core.errors import UserError
from mae_core.machine import Machine, suit_attention
from mae_core.optim import adamw
from mae_core.vit import PLAIN, get_arch
from transfer.data.ade20k import CLASSES
from transfer.data.coco import CATEGORIES
from transfer.detection.engine_torchvision import MaskRCNN
from transfer.detection.recipe import DetectionRecipe
from transfer.detection.recipe import recipe as detection_recipe
from transfer.detection.shared import groups_of, new_pyramid
from transfer.pyramid import ViTPyramid, quarters
from transfer.segmentation.mmseg_config import model_of
from transfer.segmentation.mmseg_plugin import layer_groups, register
from transfer.segmentation.recipe import SegmentationRecipe
from transfer.segmentation.recipe import recipe as segmentation_recipe

OBJECTS = 8  # in an image; COCO's have seven on average
VITDET_ARM, MMSEG_ARM = "detectron2's ViTDet", "mmsegmentation's MAE"


def dense_workloads(what: str, arch: str, size: int, batch: int, machine: Machine) -> dict[str, Workload]:
    """{arm: one training step}, ours first; those of detectron2 where it is installed. size: side of the images in px;
    0: the recipe's. UserError for "ade20k" without mmsegmentation."""
    torch.manual_seed(0)
    return {"coco": detection, "ade20k": segmentation}[what](arch, size, batch, machine)


LossOf = Callable[[nn.Module], Tensor]


def our_step(model: nn.Module, groups: list[dict], machine: Machine, loss_of: LossOf) -> Workload:
    suit_attention(model, machine)
    return training_step(partial(loss_of, model.train()), adamw(groups, (0.9, 0.999)), machine.autocast)


def their_step(model: nn.Module, machine: Machine, loss_of: LossOf) -> Workload:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    return training_step(partial(loss_of, model.train()), optimizer, machine.autocast, read_loss=True)


def detection(arch: str, size: int, batch: int, machine: Machine) -> dict[str, Workload]:
    r = detection_recipe(arch, "vitdet")
    r = replace(r, image_size=size or r.image_size)
    images = torch.randint(256, (batch, 3, r.image_size, r.image_size), dtype=torch.uint8)
    boxes = [random_boxes(r.image_size) for _ in range(batch)]
    labels = [torch.randint(len(CATEGORIES), (OBJECTS,)) for _ in range(batch)]

    def pyramid() -> ViTPyramid:
        found = new_pyramid(arch, PLAIN, r, machine.activation_checkpointing)
        if machine.compile:
            found.compile()
        return found

    placed = images.to(machine.device)
    targets: list[dict[str, Any]] = [
        {
            "boxes": box.to(machine.device),
            "labels": (classes + 1).to(machine.device),
            "masks": rectangles(box, r.image_size).to(machine.device),
            "size": (r.image_size, r.image_size),
        }
        for box, classes in zip(boxes, labels)
    ]
    ours = MaskRCNN(pyramid(), r, LayerNorm2d).to(machine.device)
    arms = {
        "ours, torchvision": our_step(
            ours, groups_of(ours, r), machine, lambda model: sum(model(placed, targets).values())
        )
    }
    if importlib.util.find_spec("detectron2") is None:
        return arms
    from detectron2.utils.events import EventStorage

    from transfer.detection.engine_detectron2 import build_model

    inputs = detectron2_inputs(images, boxes, labels)

    def loss_of(model: nn.Module) -> Tensor:
        with EventStorage():  # which detectron2's heads write their figures to
            return sum(model(inputs).values())

    again = build_model(pyramid(), r, LayerNorm2d).to(machine.device)
    arms["ours, detectron2"] = our_step(again, groups_of(again, r), machine, loss_of)
    if get_arch(arch).patch == 16:  # as its strides are written
        arms[VITDET_ARM] = their_step(vitdet(arch, r).to(machine.device), machine, loss_of)
    return arms


def random_boxes(size: int) -> Tensor:
    """x1, y1, x2, y2 [OBJECTS, 4] in px, with sides of a sixteenth to a half of the image's."""
    sides = size * (1 / 16 + 7 / 16 * torch.rand(OBJECTS, 2))
    corner = (size - sides) * torch.rand(OBJECTS, 2)
    return torch.cat([corner, corner + sides], dim=1).round()


def rectangles(boxes: Tensor, size: int) -> Tensor:
    """The boxes as masks, uint8 [n, size, size]."""
    masks = torch.zeros(len(boxes), size, size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    return masks


def detectron2_inputs(images: Tensor, boxes: list[Tensor], labels: list[Tensor]) -> list[dict[str, Any]]:
    """As detectron2's mapper leaves them: in the host's memory, masks as polygons."""
    from detectron2.structures import Boxes, Instances, PolygonMasks

    inputs = []
    for image, of_image, classes in zip(images, boxes, labels):
        found = Instances(tuple(image.shape[-2:]))
        found.gt_boxes, found.gt_classes = Boxes(of_image), classes
        corners = [[[a, b, c, b, c, d, a, d]] for a, b, c, d in of_image.tolist()]
        found.gt_masks = PolygonMasks(corners)
        inputs.append({"image": image, "height": image.shape[1], "width": image.shape[2], "instances": found})
    return inputs


def vitdet(arch: str, r: DetectionRecipe) -> nn.Module:
    """The model of detectron2's ViTDet config, in that size."""
    from detectron2 import model_zoo
    from detectron2.config import instantiate

    cfg, a = model_zoo.get_config("common/models/mask_rcnn_vitdet.py"), get_arch(arch)
    net = cfg.model.backbone.net
    net.img_size = cfg.model.backbone.square_pad = r.image_size
    net.patch_size, net.embed_dim, net.depth, net.num_heads = a.patch, a.dim, a.depth, a.heads
    net.window_block_indexes = [number for number in range(a.depth) if number not in quarters(a.depth)]
    net.window_size, net.drop_path_rate = r.window, r.drop_path
    return instantiate(cfg.model)


def segmentation(arch: str, size: int, batch: int, machine: Machine) -> dict[str, Workload]:
    if importlib.util.find_spec("mmseg") is None:
        raise UserError("mmsegmentation is not installed: pip install 'mae-transfer[segmentation]'")
    from mmengine.registry import DefaultScope
    from mmengine.structures import PixelData
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    register()
    if not DefaultScope.check_instance_created("speed"):
        DefaultScope.get_instance("speed", scope_name="mmseg")
    r = segmentation_recipe(arch, "paper")
    r = replace(r, image_size=size or r.image_size, stride=min(r.stride, size or r.stride))
    images = torch.randn(batch, 3, r.image_size, r.image_size, device=machine.device)
    labels = torch.randint(CLASSES, (batch, 1, r.image_size, r.image_size), device=machine.device)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]

    def loss_of(model: nn.Module) -> Tensor:
        return sum(value for name, value in model(images, samples, mode="loss").items() if "loss" in name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about mmseg's own defaults
        ours = MODELS.build(model_of(read_checkpoint(f"random:{arch}"), r, machine)).to(machine.device)
        theirs = MODELS.build(their_model(arch, r)).to(machine.device)
    groups = layer_groups(ours, get_arch(arch).depth, r.layer_decay, r.weight_decay)
    if machine.compile:
        ours.backbone.compile()
    return {"ours": our_step(ours, groups, machine, loss_of), MMSEG_ARM: their_step(theirs, machine, loss_of)}


def their_model(arch: str, r: SegmentationRecipe) -> Any:
    """The model of mmsegmentation's config for MAE, in that size, with BatchNorm not synchronised."""
    import mmseg
    from mmengine.config import Config

    a, norm, size = get_arch(arch), {"type": "BN"}, (r.image_size,) * 2
    config = Config.fromfile(Path(mmseg.__file__).parent / ".mim" / UPERNET)
    backbone = {"img_size": size, "patch_size": a.patch, "embed_dims": a.dim, "num_layers": a.depth}
    backbone |= {"num_heads": a.heads, "out_indices": list(r.taps), "drop_path_rate": r.drop_path}
    head = {"in_channels": [a.dim] * 4, "channels": r.head_channels, "norm_cfg": norm}
    auxiliary = {"in_channels": a.dim, "channels": r.auxiliary_channels, "norm_cfg": norm}
    model = {"pretrained": None, "data_preprocessor": {"size": size}, "backbone": backbone}
    model |= {"neck": {"embed_dim": a.dim, "norm_cfg": norm}, "decode_head": head, "auxiliary_head": auxiliary}
    config.merge_from_dict({"model": model})
    return config.model
