"""The contract of a model family."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from trainfit.step.terms import Objective
from trainfit.tasks.detection.masks import Rle
from trainfit.tasks.detection.samples import ImageRecord, Sample


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What the parameter groups are made from. Defaults: the family's upstream."""

    lr: float = 1e-4
    lr_encoder: float = 1.5e-4
    weight_decay: float = 1e-4
    layer_decay: float = 0.8
    """Each encoder layer's rate is this times the next layer's."""
    component_decay: float = 0.7
    """Decoder: lr x this; encoder: lr_encoder x this squared."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDetections:
    """What a detector found in one image."""

    image_id: int
    boxes: torch.Tensor
    """float32 (n, 4) on the CPU: x0, y0, x1, y1 in pixels of the original image."""
    scores: torch.Tensor
    """float32 (n,)."""
    classes: torch.Tensor
    """int64 (n,): index into the data set's classes."""
    masks: Sequence[Rle] | None = None
    """n masks at the original image's size, run-length encoded: all of them as arrays would be gigabytes."""


class Decoder(Protocol):
    """Decodes one image and its objects at `size` x `size`."""

    def __call__(self, record: ImageRecord, *, size: int, augment: bool, generator: torch.Generator) -> Sample:
        """Random choices come from `generator` alone."""
        ...


class Workload(Protocol):
    """One model of a family, at one resolution, for one set of classes. Holds no weights: `build` makes them."""

    name: str
    """As the user writes it: "rfdetr-nano"."""
    classes: tuple[str, ...]
    resolution: int
    """Side of the square input in pixels."""
    masks: bool
    """Whether it trains on masks and finds them."""
    max_detections: int
    """Detections for each image and class that the family's own evaluation counts (COCO's is 100)."""
    objective: Objective

    def build(self) -> torch.nn.Module:
        """Make the model on the CPU in train mode, with random weights from torch's current seed."""
        ...

    def load(self, model: torch.nn.Module, weights: str) -> list[str]:
        """Fill the model from a file of ours, one of upstream's, or `pretrained`; returns remarks for the user."""
        ...

    def parameter_groups(self, model: torch.nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
        """Optimizer groups; the trainable parameters, each once."""
        ...

    def blocks(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        """What activation checkpointing may compute again, in order; of a model as `build` made it."""
        ...

    def sizes(self) -> tuple[int, ...]:
        """Side lengths that training draws from, one a window."""
        ...

    def decoder(self) -> "Decoder":
        """The function that makes samples in loader processes; it can be pickled and holds no model."""
        ...

    def detect(self, model: torch.nn.Module, samples: Sequence[Sample]) -> list[ImageDetections]:
        """Detections of a micro-batch, model in eval mode."""
        ...

    def metadata(self) -> dict[str, str]:
        """What a weights file must say so that `models.registry.from_metadata` makes this workload again."""
        ...

    def export(self, weights: Mapping[str, torch.Tensor], path: Path) -> None:
        """Write the weights as the upstream project loads them."""
        ...
