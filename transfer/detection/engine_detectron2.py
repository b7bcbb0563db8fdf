"""Engine: detectron2's Mask R-CNN on the ViT pyramid. Imported only where detectron2 is installed.

In a LazyConfig of your own: `model.backbone = L(build_backbone)(checkpoint="mae.pth", image_size=1024, ...)`. In a yacs
config: `add_mae_vit_config(cfg)`, then MODEL.BACKBONE.NAME = "build_mae_vit_fpn_backbone".
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.layers import NaiveSyncBatchNorm, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from mae_core.checkpoint import read_checkpoint
from mae_core.data import IMAGENET_NORMALIZATION, Normalization
from mae_core.loop import check_batch, micro_batch_for
from mae_core.machine import Machine, suit_attention
from transfer.data.coco import CATEGORIES, training_examples
from transfer.detection import shared
from transfer.detection.recipe import DetectionRecipe, ViTDetRecipe
from transfer.detection.shared import Predictions, RoIBatchNorm
from transfer.detection.train_detectron2 import train
from transfer.pyramid import ViTDetPyramid, ViTPyramid, load_pyramid, pretraining_grid, pyramid_class
from transfer.task import Job


class PyramidBackbone(Backbone):
    """A ViTPyramid with detectron2's backbone interface: normalised images -> {"s4": map, "s8": ..., ...} by stride."""

    def __init__(self, pyramid: ViTPyramid) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.names = [f"s{stride}" for stride in pyramid.strides]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.pyramid(images)))

    def output_shape(self) -> dict[str, ShapeSpec]:
        channels, strides = self.pyramid.channels, self.pyramid.strides
        return {name: ShapeSpec(channels=channels, stride=stride) for name, stride in zip(self.names, strides)}

    @property
    def size_divisibility(self) -> int:
        return self.pyramid.strides[-1]


class EmptySafeSyncBatchNorm(NaiveSyncBatchNorm):
    """Synchronised and weighted by each process's count, so that a process without a single RoI does no harm.
    detectron2's convolutions refuse torch's SyncBatchNorm on an empty batch."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, stats_mode="N", **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """In float32, and of the type of x in training and test alike: detectron2's takes the mean of the squares in
        bf16, of which little is left after the squared mean is taken off."""
        return super().forward(x.float()).to(x.dtype)


def head_norm(machine: Machine) -> type[nn.Module]:
    return EmptySafeSyncBatchNorm if machine.processes > 1 else RoIBatchNorm


def fpn(pyramid: ViTPyramid, image_size: int, dim: int, norm: str | Callable[[int], nn.Module]) -> FPN:
    """detectron2's FPN over the pyramid, with images padded to a square of side image_size."""
    bottom_up, top = PyramidBackbone(pyramid), LastLevelMaxPool()
    top.in_feature = f"p{int(math.log2(pyramid.strides[-1]))}"  # the default is p5, of stride 32
    return FPN(bottom_up, bottom_up.names, dim, norm=norm, top_block=top, square_pad=image_size)


class ViTDetBackbone(Backbone):
    """A ViTDetPyramid with detectron2's interface: normalised images -> {"p2": map, ..., "p6": map}."""

    def __init__(self, pyramid: ViTDetPyramid, image_size: int) -> None:
        super().__init__()
        self.pyramid, self.image_size = pyramid, image_size
        self.strides = (*pyramid.strides, 2 * pyramid.strides[-1])
        self.names = [f"p{int(math.log2(stride))}" for stride in self.strides]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.pyramid(images)
        return dict(zip(self.names, (*maps, nn.functional.max_pool2d(maps[-1], kernel_size=1, stride=2))))

    def output_shape(self) -> dict[str, ShapeSpec]:
        channels = self.pyramid.channels
        return {n: ShapeSpec(channels=channels, stride=stride) for n, stride in zip(self.names, self.strides)}

    @property
    def size_divisibility(self) -> int:
        return self.pyramid.strides[-1]

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"square_size": self.image_size}


def build_backbone(
    checkpoint: str,
    image_size: int = 1024,
    window: int | None = None,
    drop_path: float = 0.1,
    fpn_dim: int = 256,
    norm: str | Callable[[int], nn.Module] = "SyncBN",
    activation_checkpointing: bool = False,
) -> FPN:
    """For configs: the FPN over the ViT of a checkpoint, which is loaded here, strictly: leave `train.init_checkpoint`
    (MODEL.WEIGHTS) empty. checkpoint: a file, or "random:ARCH". window: None for the pre-training grid. Images must be
    RGB, normalised with the mean and std that `python -m mae_core.checkpoint` prints. CheckpointError for a file that
    is no ViT encoder."""
    source = read_checkpoint(checkpoint)
    pyramid = pyramid_class(source.arch)(
        source.arch,
        image_size,
        variant=source.variant,
        window=pretraining_grid(source.arch) if window is None else window,
        drop_path=drop_path,
        activation_checkpointing=activation_checkpointing,
    )
    load_pyramid(pyramid, source)
    return fpn(pyramid, image_size, fpn_dim, norm)


def add_mae_vit_config(cfg: CfgNode) -> None:
    """The keys that build_mae_vit_fpn_backbone reads."""
    cfg.MODEL.MAE_VIT = CfgNode({"CHECKPOINT": "", "IMAGE_SIZE": 1024, "WINDOW": 14, "DROP_PATH": 0.1})


@BACKBONE_REGISTRY.register()
def build_mae_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    vit, out = cfg.MODEL.MAE_VIT, cfg.MODEL.FPN
    return build_backbone(vit.CHECKPOINT, vit.IMAGE_SIZE, vit.WINDOW, vit.DROP_PATH, out.OUT_CHANNELS, out.NORM)


def build_model(
    pyramid: ViTPyramid,
    r: DetectionRecipe,
    norm: type[nn.Module],
    normalization: Normalization = IMAGENET_NORMALIZATION,
) -> GeneralizedRCNN:
    """Mask R-CNN by the recipe, from detectron2's own parts: RPN with r.rpn_convs hidden convolutions, box head of four
    convolutions and one fully connected layer, mask head of four convolutions.

    normalization: of the checkpoint's images.
    """
    backbone: Backbone
    if isinstance(pyramid, ViTDetPyramid):
        backbone = ViTDetBackbone(pyramid, r.image_size)
    else:
        backbone = fpn(pyramid, r.image_size, r.fpn_dim, norm)
    classes = len(CATEGORIES)
    levels = list(backbone.output_shape())  # p2 to p6 for strides 4 to 64
    strides = [backbone.output_shape()[level].stride for level in levels]
    ratios = list(shared.ANCHOR_RATIOS)

    def pooler(side: int) -> ROIPooler:
        scales = tuple(1 / stride for stride in pyramid.strides)
        return ROIPooler(output_size=side, scales=scales, sampling_ratio=0, pooler_type="ROIAlignV2")

    model = GeneralizedRCNN(
        backbone=backbone,
        proposal_generator=RPN(
            in_features=levels,
            head=StandardRPNHead(in_channels=r.fpn_dim, num_anchors=len(ratios), conv_dims=[-1] * r.rpn_convs),
            anchor_generator=DefaultAnchorGenerator(
                sizes=[[shared.ANCHOR_STRIDES * stride] for stride in strides],
                aspect_ratios=ratios,
                strides=strides,
                offset=0.0,  # as in all of detectron2's configs; the class has 0.5
            ),
            anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
            box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
            batch_size_per_image=r.rpn_batch,
            positive_fraction=0.5,
            pre_nms_topk=(2 * r.proposals, r.proposals),
            post_nms_topk=(r.proposals, r.proposals),
            nms_thresh=0.7,
        ),
        roi_heads=StandardROIHeads(
            num_classes=classes,
            batch_size_per_image=r.roi_batch,
            positive_fraction=0.25,
            proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
            box_in_features=levels[:4],
            box_pooler=pooler(7),
            box_head=FastRCNNConvFCHead(
                ShapeSpec(channels=r.fpn_dim, height=7, width=7),
                conv_dims=[r.head_dim] * 4,
                fc_dims=[r.fc_dim],
                conv_norm=norm,
            ),
            box_predictor=FastRCNNOutputLayers(
                ShapeSpec(channels=r.fc_dim),
                box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
                num_classes=classes,
                test_score_thresh=shared.SCORE_THRESHOLD,
                test_nms_thresh=shared.NMS_THRESHOLD,
                test_topk_per_image=shared.DETECTIONS,
            ),
            mask_in_features=levels[:4],
            mask_pooler=pooler(14),
            mask_head=MaskRCNNConvUpsampleHead(
                ShapeSpec(channels=r.fpn_dim, height=14, width=14),
                num_classes=classes,
                conv_dims=[r.head_dim] * 5,  # four convolutions and the deconvolution
                conv_norm=norm,
            ),
        ),
        pixel_mean=[255 * v for v in normalization[0]],
        pixel_std=[255 * v for v in normalization[1]],
        input_format="RGB",
    )
    # detectron2's pooling casts the boxes to the type of the maps, its pasting casts the grid to that of the masks.
    heads = model.roi_heads
    for part in (backbone, model.proposal_generator.rpn_head, heads.box_predictor, heads.mask_head.predictor):
        part.register_forward_hook(lambda module, inputs, output: shared.in_float32(output))
    return model


def train_and_predict(job: Job) -> Predictions:
    """Train by job.recipe, resuming from job.work; detect on the validation images; save detections and weights."""
    r, machine = job.recipe, job.machine
    examples = training_examples(Path(job.data.root)).few(job.data.limit)
    check_batch(len(examples), r.batch, f"the training images of {job.data.root}/coco")
    pyramid, loaded = shared.build_pyramid(job)
    # The layer norm is timm's, one operation. detectron2's "LN" writes it out in eight, each over a whole map.
    norm = LayerNorm2d if isinstance(r, ViTDetRecipe) else head_norm(machine)
    model = build_model(pyramid, r, norm, job.checkpoint.normalization).to(machine.device)
    suit_attention(model, machine)
    if machine.compile:
        pyramid.compile()  # not the heads, whose shapes change with every image
    micro_batch = micro_batch_for(r.batch // machine.processes, machine.micro_batch or 8)
    iterations, seconds = train(model, examples, job, micro_batch)
    results, artifacts = shared.save_artifacts(job, model, predict(model, job))
    facts, notes = shared.batchnorm_facts(r, machine, micro_batch, synchronised=norm is EmptySafeSyncBatchNorm)
    return Predictions(results, iterations, seconds, notes, {"loaded": loaded, **facts}, artifacts)


@torch.inference_mode()
def predict(model: GeneralizedRCNN, job: Job) -> list[dict]:
    """COCO results of this process's validation images, in float32 as detectron2's own."""
    machine, size = job.machine, job.recipe.image_size
    model.eval()

    def detect(batch: shared.Tested) -> list[dict]:
        images = [pil_to_tensor(shared.fit_long_side(image, size)) for _, image in batch]
        inputs = [{"image": image, "height": e.height, "width": e.width} for (e, _), image in zip(batch, images)]
        outputs, found = model(inputs), []
        for (example, _), output in zip(batch, outputs):
            instances = output["instances"].to("cpu")
            boxes, scores = instances.pred_boxes.tensor.float().numpy(), instances.scores.float().numpy()
            masks = instances.pred_masks.numpy().astype("uint8")
            found += shared.to_results(example, boxes, scores, instances.pred_classes.numpy(), masks)
        return found

    return shared.detections(job, detect, machine.micro_batch or 8)
