"""Engine: torchvision's Mask R-CNN on the ViT pyramid, for machines without detectron2.

Its losses and pooling are torchvision's, not detectron2's: every record lists these DEPARTURES.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from mae_core import distributed
from mae_core.data import IMAGENET_NORMALIZATION, Normalization, Sample, seed_all
from mae_core.loop import check_batch, fit, micro_batch_for
from mae_core.machine import Machine
from mae_core.optim import adamw
from mae_core.training import Training
from transfer.data.coco import CATEGORIES, Example, training_examples
from transfer.detection import shared
from transfer.detection.jitter import draw_view
from transfer.detection.recipe import DetectionRecipe, ViTDetRecipe
from transfer.detection.shared import Predictions, RoIBatchNorm
from transfer.pyramid import ViTDetPyramid, ViTPyramid
from transfer.task import Job

DEPARTURES = (
    "torchvision engine: smooth L1 box losses with beta 1/9 (detectron2: L1)",
    "torchvision engine: mask targets interpolated from bitmaps, 0 to 1 (detectron2: polygons, 0 or 1)",
    "torchvision engine: masks pasted into boxes of whole pixels (detectron2: exact)",
    "torchvision engine: RoIAlign without the half-pixel shift, two samples a bin (detectron2: aligned, adaptive)",
    "torchvision engine: proposals may reach into the padding (detectron2 cuts them to the image)",
    "torchvision engine: sides of anchors in whole pixels (detectron2: exact)",
)


class Jittered(Dataset):
    """Sample -> (uint8 [3, S, S], {boxes, labels 1..80, masks, size}, ""): one augmented training image, its random
    draws seeded by its position in the stream."""

    def __init__(self, examples: Sequence[Example], r: DetectionRecipe, seed: int) -> None:
        self.examples, self.r, self.seed = examples, r, seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, sample: Sample) -> tuple[Tensor, dict[str, Any], str]:
        example, size = self.examples[sample.index], self.r.image_size
        image = shared.open_image(example)
        seed_all(self.seed, sample.position)
        view = draw_view(image.size, size, (self.r.min_scale, self.r.max_scale))
        # As in detectron2's ViTDet: objects cropped away are dropped, and boxes fit what the crop left of the outlines.
        seen = [(label + 1, *found) for label, o in zip(example.labels, example.outlines) if (found := view.object(o))]
        masks = torch.zeros(len(seen), size, size, dtype=torch.uint8)
        for whole, (*_, mask) in zip(masks, seen):
            whole[: view.height, : view.width] = torch.from_numpy(mask)
        target = {
            "boxes": torch.tensor(np.array([box for _, box, _ in seen], np.float32).reshape(-1, 4)),
            "labels": torch.tensor([label for label, *_ in seen], dtype=torch.int64),
            "masks": masks,
            "size": (view.height, view.width),
        }
        return shared.pad_to_square(view.of(image), size), target, ""


class OneMore(nn.Module):
    """Maps by name -> the same and a coarser one, "pool", as torchvision's LastLevelMaxPool adds to an FPN's."""

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**maps, "pool": F.max_pool2d(maps["3"], kernel_size=1, stride=2)}


class MaskRCNN(nn.Module):
    """torchvision's RPN and RoI heads on an FPN over the pyramid.

    (images uint8 [B, 3, S, S], targets) -> losses by name when training; else per image boxes [n, 4], labels 1..80,
    scores and masks [n, 1, 28, 28]. Evaluation needs only `size` of the targets: (height, width) without padding.
    normalization: of the checkpoint's images.
    """

    def __init__(
        self,
        body: ViTPyramid,
        r: DetectionRecipe,
        norm: type[nn.Module],
        normalization: Normalization = IMAGENET_NORMALIZATION,
    ) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        classes, levels = len(CATEGORIES) + 1, ["0", "1", "2", "3"]
        self.body = body
        own = isinstance(body, ViTDetPyramid)
        self.fpn = OneMore() if own else FeaturePyramidNetwork([body.channels] * 4, r.fpn_dim, LastLevelMaxPool(), norm)
        strides = (*body.strides, 2 * body.strides[-1])
        sizes = tuple((shared.ANCHOR_STRIDES * stride,) for stride in strides)
        self.rpn = RegionProposalNetwork(
            AnchorGenerator(sizes, (shared.ANCHOR_RATIOS,) * len(sizes)),
            RPNHead(r.fpn_dim, len(shared.ANCHOR_RATIOS), conv_depth=r.rpn_convs),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=r.rpn_batch,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * r.proposals, "testing": r.proposals},
            post_nms_top_n={"training": r.proposals, "testing": r.proposals},
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
            FastRCNNConvFCHead((r.fpn_dim, 7, 7), [r.head_dim] * 4, [r.fc_dim], norm),
            FastRCNNPredictor(r.fc_dim, classes),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=r.roi_batch,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=shared.SCORE_THRESHOLD,
            nms_thresh=shared.NMS_THRESHOLD,
            detections_per_img=shared.DETECTIONS,
            mask_roi_pool=MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
            mask_head=MaskRCNNHeads(r.fpn_dim, [r.head_dim] * 4, 1, norm),
            mask_predictor=MaskRCNNPredictor(r.head_dim, r.head_dim, classes),
        )
        self.init_as_detectron2()
        for part in (self.fpn, self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            part.register_forward_hook(lambda module, inputs, output: shared.in_float32(output))
        mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in normalization)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def init_as_detectron2(self) -> None:
        """Re-initialise the heads' last layers, whose torchvision defaults are larger, and the fully connected one of
        the box head, whose default is smaller."""
        for layer in self.roi_heads.box_head:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, a=1)
                nn.init.zeros_(layer.bias)
        box, mask = self.roi_heads.box_predictor, self.roi_heads.mask_predictor.mask_fcn_logits
        for layer, std in ((box.cls_score, 0.01), (box.bbox_pred, 0.001), (mask, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor, targets: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        features = self.features(images, [target["size"] for target in targets])
        # The whole square counts as the image: torchvision infers the strides of the maps from its size.
        sizes = [tuple(images.shape[-2:])] * len(images)
        known = targets if self.training else None
        proposals, rpn_losses = self.rpn(ImageList(images, sizes), features, known)
        found, roi_losses = self.roi_heads(features, proposals, sizes, known)
        return rpn_losses | roi_losses if self.training else found

    def features(self, images: Tensor, sizes: list[tuple[int, int]]) -> dict[str, Tensor]:
        normalised = (images - self.mean) / self.std
        for image, (height, width) in zip(normalised, sizes):  # padding is zero after the normalisation
            image[:, height:] = 0
            image[:, :, width:] = 0
        return self.fpn({str(level): m for level, m in enumerate(self.body(normalised))})


def head_norm(machine: Machine) -> type[nn.Module]:
    """Synchronised over GPUs, where torch's takes empty batches; torch has none for the CPU."""
    return nn.SyncBatchNorm if machine.processes > 1 and machine.device.startswith("cuda") else RoIBatchNorm


def train_and_predict(job: Job) -> Predictions:
    """Train by job.recipe, resuming from job.work; detect on the validation images; save detections and weights."""
    r, machine = job.recipe, job.machine
    examples = training_examples(Path(job.data.root)).few(job.data.limit)
    check_batch(len(examples), r.batch, f"the training images of {job.data.root}/coco")
    pyramid, loaded = shared.build_pyramid(job)
    norm = LayerNorm2d if isinstance(r, ViTDetRecipe) else head_norm(machine)
    model = MaskRCNN(pyramid, r, norm, job.checkpoint.normalization).to(machine.device)
    if machine.compile:
        model.body.compile()  # not the heads, whose shapes change with every image
    micro_batch = micro_batch_for(r.batch // machine.processes, machine.micro_batch or 8)
    _, rate = shared.schedule(r, len(examples))
    state = fit(
        model,
        adamw(shared.groups_of(model, r), r.betas),
        Training(
            label=f"{job.task.name} {job.checkpoint.name}",
            work=job.work,
            dataset=Jittered(examples, r, job.seed),
            epochs=r.epochs,
            batch=r.batch,
            micro_batch=micro_batch,
            seed=job.seed,
            machine=replace(machine, compile=False),
            fixed=job.identity(),
            tracker=job.tracker,
            lr_at=rate,
            prepare=lambda images, targets, step, first: (images, targets),
            loss_of=lambda m, images, targets: sum(m(images, targets).values()),
            synchronised=norm is nn.SyncBatchNorm,
        ),
    )
    distributed.broadcast_buffers(model)
    results, artifacts = shared.save_artifacts(job, model, predict(model, job))
    facts, notes = shared.batchnorm_facts(r, machine, state.micro_batch, synchronised=norm is nn.SyncBatchNorm)
    notes = (*DEPARTURES, *notes, *state.notes)
    return Predictions(results, state.step, state.seconds, notes, {"loaded": loaded, **facts}, artifacts)


@torch.inference_mode()
def predict(model: MaskRCNN, job: Job) -> list[dict]:
    """COCO results of this process's validation images, in float32 as in detectron2."""
    machine, size = job.machine, job.recipe.image_size
    model.eval()

    def detect(batch: shared.Tested) -> list[dict]:
        images = [shared.fit_long_side(image, size) for _, image in batch]
        sizes = [{"size": image.size[::-1]} for image in images]
        squares = torch.stack([shared.pad_to_square(image, size) for image in images])
        outputs, found = model(squares.to(machine.device), sizes), []
        for (example, _), image, output in zip(batch, images, outputs):
            found += results_of(example, image.size, output)
        return found

    return shared.detections(job, detect, machine.micro_batch or 8)


def results_of(example: Example, seen: tuple[int, int], output: dict[str, Tensor]) -> list[dict]:
    """COCO results of one image. seen: the width and height to which it was resized; output: the model's, whose masks
    are pasted where it computed them, since a CPU takes 2 ms for each."""
    device = output["boxes"].device
    scale = torch.tensor([example.width / seen[0], example.height / seen[1]], device=device).repeat(2)
    limit = torch.tensor([example.width, example.height], device=device).repeat(2)
    whole = output["boxes"].float() * scale
    boxes = whole.clamp(min=torch.zeros_like(scale), max=limit)
    kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)  # some lie wholly in the padding
    # A mask belongs to the whole box, which may reach into the padding: pasting cuts at the image.
    soft = output["masks"].float()[kept]
    masks = paste_masks_in_image(soft, whole[kept], (example.height, example.width))[:, 0] > 0.5
    labels, scores = (output[key][kept].cpu().numpy() for key in ("labels", "scores"))
    arrays = boxes[kept].cpu().numpy(), scores, labels.astype(int) - 1, masks.byte().cpu().numpy()
    return shared.to_results(example, *arrays)
