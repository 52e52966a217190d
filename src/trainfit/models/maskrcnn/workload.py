"""Mask R-CNN and Faster R-CNN of torchvision."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainfit.models.images import crowded_sample
from trainfit.models.maskrcnn import interop
from trainfit.models.maskrcnn.caps import cap_detections, cap_training_samples
from trainfit.models.maskrcnn.data import make_sample
from trainfit.models.maskrcnn.detect import detect
from trainfit.models.maskrcnn.family import MaskRcnnSetting, remarks
from trainfit.models.maskrcnn.losses import make_objective
from trainfit.models.maskrcnn.model import build_model
from trainfit.models.setting import DetectionSetting
from trainfit.models.workload import Decoder, OptimizerSettings, all_parameters
from trainfit.step.checkpointing import repeated_blocks
from trainfit.tasks.detection.samples import ImageDetections, Sample

MAX_DETECTIONS = 100
"""Of an image: torchvision's `box_detections_per_img`, and what COCO counts."""
HEADS = ("rpn.head", "roi_heads.box_head", "roi_heads.mask_head")
"""Parts behind the backbone that activation checkpointing may recompute."""


class MaskRcnn:
    """A `TrainableWorkload`. See that protocol for what the methods do.

    A class named "" is a row that is no class.
    """

    def __init__(self, setting: MaskRcnnSetting, classes: tuple[str, ...]) -> None:
        """Note what is to be built; no weights yet."""
        self.setting = setting
        self.classes = classes
        self.masks = setting.has_masks
        self.objective = make_objective(setting.reference, masks=self.masks)
        self.eval_size = setting.eval_side
        self.export_name = f"best-{setting.model.partition('-')[0]}.pth"
        self.remarks = remarks(setting)
        self.max_detections = MAX_DETECTIONS
        self.is_class = torch.tensor([name != "" for name in classes], dtype=torch.bool)

    def build(self) -> torch.nn.Module:
        return build_model(self.setting, len(self.classes))

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        return all_parameters(model, settings)

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """The ResNet's blocks that train, stage by stage, then the heads of the RPN, of boxes and of masks."""
        heads = [model.get_submodule(name) for name in HEADS if self.masks or "mask" not in name]
        return repeated_blocks(model.get_submodule("backbone.body")) + heads

    def saturate(self, model: torch.nn.Module) -> None:
        """Fill all samplers, and return as many objects as may be (`caps`)."""
        heads: Any = model.get_submodule("roi_heads")
        cap_training_samples(heads)
        cap_detections(heads)

    def worst_window(self, model: torch.nn.Module, images: int) -> Sequence[Sample]:
        """Images of the longest allowed side: landscape, and portrait in turn where they may meet."""
        landscape = self._sample(*self.setting.sides)
        if self.setting.aspect_grouping:
            return [landscape] * images
        portrait = self._sample(*reversed(self.setting.sides))
        return [landscape, portrait] * (images // 2) + [landscape] * (images % 2)

    def eval_sample(self, model: torch.nn.Module) -> Sample:
        return self._sample(*self.setting.sides)

    def outputs(self, model: torch.nn.Module, samples: Sequence[Sample]) -> list[ImageDetections]:
        return detect(model, samples, self.is_class)

    def load(self, model: torch.nn.Module, weights: str) -> list[str]:
        return interop.load(model, self.setting, self.classes, weights)

    def sizes(self) -> tuple[int, ...]:
        return self.setting.drawn_sides

    def decoder(self) -> Decoder:
        return partial(make_sample, max_size=self.setting.sides[1], masks=self.masks)

    def metadata(self) -> dict[str, str]:
        shared = {field.name for field in dataclasses.fields(DetectionSetting)}
        own = {name: value for name, value in self.setting.to_json().items() if name not in shared and name != "canvas"}
        return {"model": self.setting.model, "classes": json.dumps(self.classes), "knobs": json.dumps(own)}

    def export(self, weights: Mapping[str, torch.Tensor], path: Path) -> None:
        interop.export(weights, path)

    def _sample(self, height: int, width: int) -> Sample:
        height, width = self.setting.canvas or (height, width)
        objects = self.setting.objects_per_image
        return crowded_sample(height, width, objects=objects, classes=len(self.classes), masks=self.masks)


make_workload = MaskRcnn


def from_upstream(name: str, weights: str) -> tuple[MaskRcnn, torch.nn.Module, list[str]]:
    """A model for inference with the weights and classes of a file of torchvision; also returns remarks for the user.

    Raises:
        TrainfitError: no such file, or a checkpoint of another model.
    """
    setting = MaskRcnnSetting(model=name)
    file = interop.read_weights(interop.find_weights(setting, weights))
    names = file.class_names or tuple(f"class {row}" for row in range(file.classes))
    workload = MaskRcnn(setting, names)
    model = workload.build()
    return workload, model, interop.fill(model, setting, file, names)
