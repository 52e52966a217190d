"""Mask R-CNN of torchvision."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from trainfit.models.images import crowded_sample
from trainfit.models.maskrcnn.caps import cap_detections, cap_training_samples
from trainfit.models.maskrcnn.detect import detect
from trainfit.models.maskrcnn.family import MaskRcnnSetting
from trainfit.models.maskrcnn.losses import make_objective
from trainfit.models.workload import OptimizerSettings, all_parameters
from trainfit.step.checkpointing import repeated_blocks
from trainfit.tasks.detection.samples import ImageDetections, Sample

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


class MaskRcnn:
    """A `Workload`. See that protocol for what the methods do."""

    def __init__(self, setting: MaskRcnnSetting, classes: tuple[str, ...]) -> None:
        """Note what is to be built; no weights yet."""
        self.setting = setting
        self.classes = classes
        min_size, max_size = setting.sides
        self.objective = make_objective(min_size, max_size, setting.canvas)

    def build(self) -> torch.nn.Module:
        min_size, max_size = self.setting.sides
        return build_model(self.setting.model, classes=len(self.classes), min_size=min_size, max_size=max_size)

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        return all_parameters(model, settings)

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """The backbone's ResNet blocks that train."""
        return repeated_blocks(model.get_submodule("backbone.body"))

    def saturate(self, model: torch.nn.Module) -> None:
        """Fill all samplers, and return as many objects as may be (`caps`)."""
        heads: Any = model.get_submodule("roi_heads")
        cap_training_samples(heads)
        cap_detections(heads)

    def worst_window(self, model: torch.nn.Module, images: int) -> Sequence[Sample]:
        """Images of the longest allowed side, landscape and portrait alternating."""
        landscape, portrait = self.eval_sample(model), self._sample(*reversed(self.setting.sides))
        return [landscape, portrait] * (images // 2) + [landscape] * (images % 2)

    def eval_sample(self, model: torch.nn.Module) -> Sample:
        return self._sample(*self.setting.sides)

    def outputs(self, model: torch.nn.Module, samples: Sequence[Sample]) -> list[ImageDetections]:
        return detect(model, samples)

    def _sample(self, height: int, width: int) -> Sample:
        height, width = self.setting.canvas or (height, width)
        objects = self.setting.objects_per_image
        return crowded_sample(height, width, objects=objects, classes=len(self.classes), masks=True)


make_workload = MaskRcnn
