"""Masks as COCO compresses them (run-length encoding), in and out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from faster_coco_eval import mask as mask_api
from numpy.typing import NDArray

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.samples import ImageRecord, Polygons, Rle

if TYPE_CHECKING:
    import torch

POLYGONS = 5_000
POINTS = 100_000
"""The most polygons and points of one object."""
OUTLINE_PIXELS = 2**20
OUTLINE_SIDES = 2_048
"""The longest outline of one object: in pixels, and in short sides of its image. The mask library allocates some 52 bytes a
pixel of outline (measured with faster-coco-eval 1.8), wherever the points lie: up to here some 100 MiB."""
RUN_CHARACTERS = 7
"""The longest run in a compressed mask: 7 characters of 5 bits are more than any image has pixels."""


def encode_masks(masks: "torch.Tensor") -> list[Rle]:
    """COCO's compressed form of bool (n, height, width) masks on any device; the host holds one mask at a time."""
    # The mask API reads columns first: a transposed, contiguous mask is that without another copy.
    return [mask_api.encode(mask.T.contiguous().cpu().numpy().view(np.uint8).T) for mask in masks]


def decode_rle(segmentation: Rle, height: int, width: int) -> NDArray[np.bool_]:
    """Bool (height, width) of a COCO RLE, compressed or not."""
    compressed = isinstance(segmentation["counts"], (str, bytes))
    encoded = segmentation if compressed else mask_api.frPyObjects(segmentation, height, width)
    return mask_api.decode(encoded).astype(np.bool_)


def mask_area(segmentation: Polygons | Rle, height: int, width: int) -> int:
    """Pixels of a mask in an image of this size: it is drawn as training draws it, without unpacking it."""
    if isinstance(segmentation, dict):
        compressed = isinstance(segmentation["counts"], (str, bytes))
        encoded = segmentation if compressed else mask_api.frPyObjects(segmentation, height, width)
    else:
        polygons = [polygon.tolist() for polygon in segmentation]
        encoded = mask_api.merge(cast(list[Rle], mask_api.frPyObjects(polygons, height, width)))
    return int(mask_api.area(cast(Rle, encoded)))


def rle_fault(segmentation: Rle, height: int, width: int) -> str | None:
    """Why an RLE is no mask of an image of this size, found by arithmetic alone: the library trusts what it is given."""
    counts = segmentation["counts"]
    if isinstance(counts, str):
        runs = _decompressed(counts)
    elif isinstance(counts, list) and {int}.issuperset(map(type, cast(list[object], counts))):
        runs = np.array(counts, np.float64)  # exact up to 2**53, and no number overflows
    else:
        runs = None
    if runs is None:
        return "its counts are neither a compressed text nor whole numbers"
    if (runs < 0).any() or runs.sum() != height * width:
        return f"its counts make {runs.sum():.0f} pixels, the image has {height * width}"
    return None


def _decompressed(text: str) -> NDArray[np.float64] | None:
    """The runs of COCO's compressed counts (maskApi.c, rleFrString), None where the text is no such thing.

    A run is written in characters of 5 bits, the lowest first; bit 5 says that another follows, and the highest bit of
    the last is the sign. From the fourth run on the difference to the run before the last is written.
    """
    if not text or not text.isascii():
        return None
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    last = (codes & 0x20) == 0
    if (codes < 0).any() or (codes > 63).any() or not last[-1]:
        return None
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts >= RUN_CHARACTERS).any():
        return None
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    runs = np.add.reduceat((codes & 0x1F) << 5 * place, starts)
    runs -= np.where(codes[ends] & 0x10, 1 << 5 * (ends - starts + 1), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.astype(np.float64)


def usable_polygons(polygons: list[list[float]], height: int, width: int) -> tuple[list[list[float]], str | None]:
    """The polygons that can be drawn, and why the others cannot, if there are any."""
    good = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0 and np.isfinite(p).all()]
    points = sum(map(len, good)) // 2
    if len(good) > POLYGONS or points > POINTS:
        return [], f"{len(good)} polygons of {points} points, more than {POLYGONS} and {POINTS}; dropped"
    length = sum(map(_outline, good))
    most = min(OUTLINE_PIXELS, OUTLINE_SIDES * min(height, width))
    if length > most:
        return [], f"the outline is {length:.3g} pixels long, more than {most} in an image {width} x {height}; dropped"
    if len(good) < len(polygons):
        return good, f"{len(polygons) - len(good)} of {len(polygons)} polygons have no three points; dropped"
    return good, None


def _outline(polygon: list[float]) -> float:
    """Pixels that are walked to draw a closed polygon: along each edge the longer of its two extents."""
    points = np.reshape(polygon, (-1, 2))
    with np.errstate(over="ignore"):
        return float(np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum())


def require_masks(records: Sequence[ImageRecord]) -> None:
    """What training with masks calls first.

    Raises:
        TrainfitError: an object that is no crowd has no mask.
    """
    bare = [r for r in records if any(s is None and not c for s, c in zip(r.segmentations, r.crowd, strict=True))]
    if bare:
        raise TrainfitError(
            f"{len(bare)} of {len(records)} images have objects without a mask, the first {bare[0].path.name}: add their "
            "masks, or train without masks (--stage detector, or a model without `seg` in its name)"
        )
