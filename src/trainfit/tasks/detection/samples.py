"""What every reader gives and every model family takes: images with their objects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainfit.tasks.findings import Finding

if TYPE_CHECKING:  # a plan reads a data set, and should not wait for torch
    import torch

Segmentation = list[list[float]] | dict[str, Any]
"""One object's mask as COCO writes it: polygons (x0, y0, x1, y1, ... in pixels), or an RLE with `size` and `counts`."""
Rle = dict[str, Any]
"""One mask as COCO compresses it: `size` [height, width] and `counts` (bytes)."""
Polygons = tuple[NDArray[np.float64], ...]
"""One object's outlines, each (2 x points,): x0, y0, x1, y1, ... in pixels. As arrays they take a tenth of the memory of lists."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageRecord:
    """One image of a data set and its objects, before anything is decoded. Arrays have one row an object."""

    id: int
    """Unique in its split; COCO's image id where there is one."""
    path: Path
    """The image file."""
    width: int
    """Pixels, as annotated; `read_image` gives an array of this size."""
    height: int
    """Pixels, as annotated."""
    boxes: NDArray[np.float64]
    """(n, 4): x0, y0, x1, y1 in pixels, positive size."""
    classes: NDArray[np.int64]
    """(n,): index into `DetectionDataset.classes`."""
    crowd: NDArray[np.bool_]
    """(n,): a region of many objects: ignored by training, "don't care" in evaluation."""
    areas: NDArray[np.float64]
    """(n,): pixels; the mask's area where the file states it, else the box's. COCO sorts objects into sizes by it."""
    segmentations: tuple[Polygons | dict[str, Any] | None, ...]
    """n masks: polygons or an RLE as COCO writes it; None where the object has a box alone."""
    object_ids: NDArray[np.int64]
    """(n,): the annotation ids of the file, or a running number."""

    def without_truth(self) -> "ImageRecord":
        """The image alone, as evaluation decodes it."""
        arrays = ("boxes", "classes", "crowd", "areas", "segmentations", "object_ids")
        return replace(self, **{name: getattr(self, name)[:0] for name in arrays})


def packed(segmentation: Segmentation | None) -> Polygons | dict[str, Any] | None:
    """The form that records keep: polygons as arrays, an RLE as it is."""
    if isinstance(segmentation, list):
        return tuple(np.array(polygon, np.float64) for polygon in segmentation)
    return segmentation


@dataclass(frozen=True, kw_only=True)
class DetectionDataset:
    """A data set as read: records by split, classes, and everything that was found wrong."""

    root: Path
    """The folder that the files are named from."""
    format: str
    """`coco`, `yolo`, `voc` or `sample`."""
    classes: tuple[str, ...]
    """Names of the classes."""
    category_ids: tuple[int, ...]
    """The file's own id of each class, in the order of `classes`."""
    splits: Mapping[str, tuple[ImageRecord, ...]]
    """Keys out of `train`, `val`, `test`; `train` is always there."""
    findings: tuple[Finding, ...]
    """Every defect, and every choice that was made while reading."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One decoded and augmented image on the CPU, as the loader gives it."""

    image: "torch.Tensor"
    """uint8 (3, height, width), RGB."""
    boxes: "torch.Tensor"
    """float32 (n, 4): x0, y0, x1, y1 in pixels of `image`."""
    classes: "torch.Tensor"
    """int64 (n,)."""
    masks: "torch.Tensor | None"
    """bool (n, height, width), or None where the workload needs none."""
    image_id: int
    """`ImageRecord.id` of the image."""
    original_size: tuple[int, int]
    """(height, width) of the image on disk."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDetections:
    """What a detector found in one image."""

    image_id: int
    """`ImageRecord.id` of the image."""
    boxes: "torch.Tensor"
    """float32 (n, 4) on the CPU: x0, y0, x1, y1 in pixels of the original image."""
    scores: "torch.Tensor"
    """float32 (n,)."""
    classes: "torch.Tensor"
    """int64 (n,): index into the data set's classes."""
    masks: Sequence[Rle] | None = None
    """n masks at the original image's size, run-length encoded: all of them as arrays would be gigabytes."""
