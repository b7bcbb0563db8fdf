"""Where the time of a dense task's training step goes, by parts of the model, forward and backward."""

import contextlib
import importlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.markdown import markdown_table

PREFIX, OTHER, UPDATE = "part: ", "other", "update"
BLOCKS, WINDOWS = "blocks: norms, sums", "blocks: norms, windows, sums"
TARGETS, ALIGN, LOSSES = "targets: matching, sampling", "RoIAlign", "RoI heads: proposals, losses"
# (module, function or method, what it is part of). A part inside another one counts by itself.
PARTS = (
    ("timm.layers.patch_embed", "PatchEmbed.forward", "patch embedding"),
    ("timm.models.vision_transformer", "Block.forward", BLOCKS),
    ("timm.layers.attention", "Attention.forward", "blocks: attention"),
    ("timm.layers.mlp", "Mlp.forward", "blocks: MLP"),
    ("transfer.pyramid.model", "in_windows", WINDOWS),
    ("transfer.pyramid.vitdet", "in_windows", WINDOWS),
    ("transfer.pyramid.vitdet", "attend", "blocks: attention"),
    ("transfer.pyramid.vitdet", "decomposed", "blocks: relative positions"),
    ("transfer.pyramid.model", "ViTPyramid.attention_bias", "blocks: relative positions"),
    ("transfer.pyramid.model", "ViTPyramid.at_strides", "maps of four strides"),
    ("transfer.pyramid.vitdet", "ViTDetPyramid.at_strides", "maps of four strides"),
    ("torchvision.ops.feature_pyramid_network", "FeaturePyramidNetwork.forward", "FPN"),
    ("torchvision.models.detection.rpn", "RegionProposalNetwork.forward", "RPN"),
    ("torchvision.models.detection.rpn", "RegionProposalNetwork.assign_targets_to_anchors", TARGETS),
    ("torchvision.models.detection.roi_heads", "RoIHeads.forward", LOSSES),
    ("torchvision.models.detection.roi_heads", "RoIHeads.select_training_samples", TARGETS),
    ("torchvision.models.detection.roi_heads", "project_masks_on_boxes", TARGETS),
    ("torchvision.ops.poolers", "MultiScaleRoIAlign.forward", ALIGN),
    ("torchvision.models.detection.faster_rcnn", "FastRCNNConvFCHead.forward", "box head"),
    ("torchvision.models.detection.mask_rcnn", "MaskRCNNHeads.forward", "mask head"),
    ("torchvision.models.detection.mask_rcnn", "MaskRCNNPredictor.forward", "mask head"),
    ("detectron2.modeling.proposal_generator.rpn", "RPN.forward", "RPN"),
    ("detectron2.modeling.proposal_generator.rpn", "RPN.label_and_sample_anchors", TARGETS),
    ("detectron2.modeling.roi_heads.roi_heads", "StandardROIHeads.forward", LOSSES),
    ("detectron2.modeling.roi_heads.roi_heads", "ROIHeads.label_and_sample_proposals", TARGETS),
    ("detectron2.modeling.poolers", "ROIPooler.forward", ALIGN),
    ("detectron2.modeling.roi_heads.box_head", "FastRCNNConvFCHead.forward", "box head"),
    ("detectron2.modeling.roi_heads.mask_head", "MaskRCNNConvUpsampleHead.layers", "mask head"),
    ("mmseg.models.decode_heads.uper_head", "UPerHead.forward", "UperNet"),
    ("mmseg.models.decode_heads.fcn_head", "FCNHead.forward", "auxiliary head"),
    ("mmseg.models.decode_heads.decode_head", "BaseDecodeHead.loss_by_feat", "losses"),
)


@contextlib.contextmanager
def named_parts() -> Iterator[None]:
    """Calls of PARTS, of the libraries that are imported, appear by their names in a profile."""
    with contextlib.ExitStack() as undo:
        for module, path, part in PARTS:
            if module not in sys.modules:
                continue
            owner: Any = importlib.import_module(module)
            *classes, name = path.split(".")
            for each in classes:
                owner = getattr(owner, each)
            own = name in vars(owner)  # else it is inherited
            original = getattr(owner, name)
            setattr(owner, name, under_name(original, part))
            undo.callback(setattr, owner, name, original) if own else undo.callback(delattr, owner, name)
        yield


def under_name(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @wraps(function)
    def named(*inputs: Any, **more: Any) -> Any:
        with record_function(PREFIX + part):
            return function(*inputs, **more)

    return named


def seconds_of_parts(work: Callable[[], object], device: str, steps: int = 3) -> dict[str, tuple[float, float]]:
    """{part: seconds of its forward and of its backward pass in a step}, the mean over some; together they are all that
    the profiler saw. Of a GPU its own time."""
    gpu = device.startswith("cuda")
    with named_parts():
        work()
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]) as found:
            for _ in range(steps):
                work()
    return by_parts(found.events() or [], gpu, steps)


def by_parts(events: Iterable[FunctionEvent], gpu: bool, steps: int) -> dict[str, tuple[float, float]]:
    """`seconds_of_parts` of a profile's events. Those of a GPU itself are left out: the operations that launched its
    kernels have their times."""
    events = [event for event in events if event.device_type == DeviceType.CPU]
    # A backward node has the number of the forward operation that it belongs to.
    made_in = {e.sequence_nr: part_above(e) for e in events if e.sequence_nr >= 0 and backward_node(e) is None}
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        node = backward_node(event)
        part = part_above(event) if node is None else made_in.get(node.sequence_nr, OTHER)
        spent[part][node is not None] += own / 1e6 / steps
    return {part: (forward, backward) for part, (forward, backward) in spent.items()}


def part_above(event: FunctionEvent | None) -> str:
    """The innermost part that the event lies in."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith("Optimizer."):
            return UPDATE
        event = event.cpu_parent
    return OTHER


def backward_node(event: FunctionEvent | None) -> FunctionEvent | None:
    """The node of the backward pass that the event lies in, None in the forward pass."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event
        event = event.cpu_parent
    return None


def parts_table(parts: dict[str, tuple[float, float]]) -> str:
    """A Markdown table, the most expensive part first."""
    whole = sum(map(sum, parts.values()))
    rows = [
        [part, f"{forward:.3f}", f"{backward:.3f}", f"{100 * (forward + backward) / whole:.0f} %"]
        for part, (forward, backward) in sorted(parts.items(), key=lambda item: -sum(item[1]))
    ]
    return markdown_table([["part", "forward (s)", "backward (s)", "share"], *rows])
