"""Mask R-CNN of torchvision, and its step on a fixed window."""

from typing import Any

import torch
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from trainfit.models.fixed_step import FixedStep, fixed_evaluation, fixed_step
from trainfit.models.images import crowded_sample
from trainfit.models.maskrcnn.caps import cap_detections, cap_training_samples
from trainfit.models.maskrcnn.family import MaskRcnnSetting
from trainfit.models.maskrcnn.losses import detect, make_objective
from trainfit.step.checkpointing import repeated_blocks
from trainfit.tasks.detection.samples import Sample

TRAINED_LAYERS = ("layer2", "layer3", "layer4")
"""Of the ResNet; torchvision trains these when it starts from pretrained weights."""


def build_model(name: str, *, classes: int, min_size: int, max_size: int) -> MaskRCNN:
    """`maskrcnn_resnet50_fpn` (v1: frozen BatchNorm) or `_v2` (live BatchNorm) as fine-tuned, with random weights."""
    sizes: dict[str, Any] = {"min_size": min_size, "max_size": max_size}
    if name == "maskrcnn-r50-v1":
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=len(TRAINED_LAYERS))
        model = MaskRCNN(backbone, num_classes=classes + 1, **sizes)
    else:
        model = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=classes + 1, **sizes)
        body: Any = model.backbone.body
        for parameter_name, parameter in body.named_parameters():
            parameter.requires_grad_(parameter_name.startswith(TRAINED_LAYERS))
    return model.train()


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The backbone's ResNet blocks that train: what activation checkpointing computes again."""
    return repeated_blocks(model.get_submodule("backbone.body"))


def build_step(setting: MaskRcnnSetting, device: torch.device) -> FixedStep:
    """Training on images of the longest allowed side, upright and lying by turns, all samplers full (`caps`)."""
    min_size, max_size = setting.sides
    model = build_model(setting.model, classes=setting.classes, min_size=min_size, max_size=max_size)
    cap_training_samples(model.roi_heads)  # pyright: ignore[reportArgumentType]
    cap_detections(model.roi_heads)  # pyright: ignore[reportArgumentType]
    lying = _sample(setting, min_size, max_size)
    upright = _sample(setting, max_size, min_size)
    images = setting.micro_batch * setting.accumulation
    window = [lying, upright] * (images // 2) + [lying] * (images % 2)
    objective = make_objective(min_size, max_size, setting.canvas)
    return fixed_step(setting, device, model=model, objective=objective, window=window, blocks=blocks)


def build_eval_step(setting: MaskRcnnSetting, device: torch.device) -> FixedStep:
    """Detection on images of the longest allowed side, with as many objects as it may return (`caps`)."""
    training = build_step(setting, device)
    return fixed_evaluation(setting, training, detect, training.window[0])


def _sample(setting: MaskRcnnSetting, height: int, width: int) -> Sample:
    if setting.canvas is not None:
        height, width = setting.canvas
    return crowded_sample(height, width, objects=setting.objects_per_image, classes=setting.classes, masks=True)
