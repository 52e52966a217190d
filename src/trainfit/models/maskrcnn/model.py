"""torchvision's Mask R-CNN and Faster R-CNN as a setting wants them."""

from typing import Any, cast

import torch
from torchvision.models.detection import (
    FasterRCNN,
    MaskRCNN,
    fasterrcnn_resnet50_fpn_v2,
    maskrcnn_resnet50_fpn_v2,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.poolers import LevelMapper

from trainfit.models.maskrcnn.family import TRAINABLE_STAGES, MaskRcnnSetting

STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")
"""Of the ResNet, in the order in which torchvision's `trainable_layers` counts them."""
GROUPS = 32
"""Of GroupNorm, as Detectron2's configurations with GN have them."""


def build_model(setting: MaskRcnnSetting, classes: int) -> FasterRCNN:
    """A model in train mode with random weights and `classes` classes besides the background.

    v1 is torchvision's `maskrcnn_resnet50_fpn` as it is fine-tuned, with frozen BatchNorm; v2 has live BatchNorm. Images
    come resized: the transform within the model is not called.
    """
    short, longest = setting.sides
    sizes: dict[str, Any] = {"min_size": short, "max_size": longest, "num_classes": classes + 1}
    if setting.rois_per_image is not None:
        sizes["box_batch_size_per_image"] = setting.rois_per_image
    if setting.proposals is not None:
        sizes["rpn_pre_nms_top_n_train"], sizes["rpn_post_nms_top_n_train"] = setting.proposals
    if setting.model.endswith("-v2"):
        make = maskrcnn_resnet50_fpn_v2 if setting.has_masks else fasterrcnn_resnet50_fpn_v2
        model = make(weights=None, weights_backbone=None, **sizes)
    else:
        depth = "resnet101" if "-r101-" in setting.model else "resnet50"
        backbone = resnet_fpn_backbone(backbone_name=depth, weights=None, trainable_layers=len(STAGES))
        model = (MaskRCNN if setting.has_masks else FasterRCNN)(backbone, **sizes)
    _train_stages(model, TRAINABLE_STAGES if setting.trainable_stages is None else setting.trainable_stages)
    if setting.norm != "published":
        _replace_norms(model, setting.norm)
    set_scales(model.roi_heads)
    return cast(FasterRCNN, model.train())


def set_scales(heads: Any) -> None:
    """Tell the pools of regions the strides of the FPN's levels.

    `MultiScaleRoIAlign` (torchvision 0.29 ops/poolers.py) infers them from its first micro-batch, and keeps them: from its
    largest image over its features, whose canvas is the window's. Of a landscape image padded to a square it makes twice
    the scale, for the rest of the run.
    """
    for pool in (heads.box_roi_pool, heads.mask_roi_pool):
        if pool is None:
            continue
        levels = [int(name) + 2 for name in pool.featmap_names]  # "0" is the level of stride 4
        pool.scales = [2.0**-level for level in levels]
        pool.map_levels = LevelMapper(
            min(levels), max(levels), canonical_scale=pool.canonical_scale, canonical_level=pool.canonical_level
        )


def _train_stages(model: torch.nn.Module, count: int) -> None:
    """Let the last `count` stages of the ResNet train, and no others, as torchvision's `_resnet_fpn_extractor`."""
    trained = STAGES[:count] + (("bn1",) if count == len(STAGES) else ())
    for name, parameter in model.get_submodule("backbone.body").named_parameters():
        parameter.requires_grad_(name.startswith(trained) if trained else False)


def _replace_norms(module: torch.nn.Module, norm: str) -> None:
    """Put frozen BatchNorm or GroupNorm in the place of every BatchNorm below a module."""
    for name, child in module.named_children():
        if not isinstance(child, torch.nn.BatchNorm2d | FrozenBatchNorm2d):
            _replace_norms(child, norm)
            continue
        channels = child.get_buffer("running_mean").shape[0]
        if norm == "frozen":
            setattr(module, name, FrozenBatchNorm2d(channels))
            continue
        grouped = torch.nn.GroupNorm(GROUPS, channels)
        setattr(module, name, grouped.requires_grad_(_trains(module)))


def _trains(module: torch.nn.Module) -> bool:
    """Whether the convolutions beside a norm train."""
    weights = [p for child in module.children() if isinstance(child, torch.nn.Conv2d) for p in child.parameters()]
    return all(weight.requires_grad for weight in weights)
