"""Mask R-CNN of torchvision as a family. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

from trainfit.models.family import Capability, Family, dashed, register
from trainfit.models.setting import DetectionSetting

MODELS = ("maskrcnn-r50-v1", "maskrcnn-r50-v2")
MIN_SIZE, MAX_SIZE = 800, 1333
"""Short side after the resize, and the longest side allowed, in pixels (torchvision's defaults)."""
PIXELS_OF_A_SAMPLE = 640**2
"""Of an image of COCO before the resize, which happens on the device."""


@dataclass(frozen=True, kw_only=True)
class MaskRcnnSetting(DetectionSetting):
    """A setting of a Mask R-CNN."""

    resolution: int | None = None
    """Short side after the resize, in pixels; 800 unless given."""
    canvas: tuple[int, int] | None = None
    """(height, width) in pixels that micro-batches are padded to. The largest there is unless given: a window of images with
    the longest allowed side, portrait and landscape alternating."""

    @property
    def sides(self) -> tuple[int, int]:
        """Short side after the resize, and the longest side allowed, in pixels."""
        short = self.resolution or MIN_SIZE
        return short, round(short * MAX_SIZE / MIN_SIZE)


def match(typed: str) -> str | None:
    """The canonical name of a model: "Mask R-CNN" is spelt "maskrcnn" here."""
    name = dashed(typed).replace("mask-r-cnn", "maskrcnn").replace("mask-rcnn", "maskrcnn")
    return name if name in MODELS else None


def kernels(capability: Capability) -> Capability:
    """The capability whose traces serve this one: the model has no attention, so convolutions alone tell them apart."""
    alike = {(8, 6): (8, 0), (9, 0): (8, 0), (10, 0): (8, 0), (6, 1): (7, 5)}
    return alike.get(capability, capability)


def assumptions(setting: MaskRcnnSetting) -> Sequence[str]:
    """What a prediction takes for granted."""
    longest = max(setting.sides)
    largest = f"{longest} x {longest} pixels, which portrait and landscape images together are padded to"
    canvas = f"{setting.canvas[0]} x {setting.canvas[1]} pixels" if setting.canvas else largest
    return (
        f"The fullest image has {setting.objects_per_image} objects (--objects-per-image, or --data).",
        f"All region samplers are full; the canvas is {canvas} (--data narrows it).",
    )


def resized(height: int, width: int, *, min_size: int, max_size: int) -> tuple[int, int]:
    """What `GeneralizedRCNNTransform` makes of an image (torchvision 0.29 transform.py `_resize_image_and_masks`)."""
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return floor(height * scale), floor(width * scale)


def for_data(setting: MaskRcnnSetting, statistics: Any) -> MaskRcnnSetting:
    """The objects of the fullest image, and a canvas as high and as wide as any image after the resize."""
    low, high = setting.sides
    sizes = [resized(h, w, min_size=low, max_size=high) for (w, h), _ in statistics.canvas_sizes]
    return replace(
        setting,
        objects_per_image=max(1, statistics.objects_per_image_max),
        canvas=(max(h for h, _ in sizes), max(w for _, w in sizes)),
    )


def sample_bytes(setting: MaskRcnnSetting) -> int:
    """An image, and a mask of a byte a pixel for each object."""
    pixels = setting.resolution**2 if setting.resolution else PIXELS_OF_A_SAMPLE
    return pixels * (3 + setting.objects_per_image)


@register
def family() -> Family:
    """The family of `MODELS`."""
    return Family(
        name="maskrcnn",
        setting=MaskRcnnSetting,
        models=MODELS,
        match=match,
        workload="trainfit.models.maskrcnn.workload",
        packages=("torchvision",),
        kernels=kernels,
        learns=("optimizer",),
        assumptions=assumptions,
        for_data=for_data,
        sample_bytes=sample_bytes,
    )
