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
Region = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of an image."""
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


def draw_masks(
    segmentations: Sequence[Polygons | Rle | None],
    boxes: NDArray[np.float64],
    *,
    region: Region,
    size: tuple[int, int],
    image: tuple[int, int],
) -> NDArray[np.bool_]:
    """Bool (n, height, width) of a region that was resized. Polygons are scaled, then drawn; an RLE is decoded, cut and
    resized by nearest pixel. An object without a segmentation gets its box.

    Args:
        segmentations: In pixels of the whole image.
        boxes: (n, 4) in pixels of the resized region.
        region: The part of the image that was resized.
        size: Height and width of the resized region.
        image: Height and width of the whole image.
    """
    height, width = size
    drawn = np.zeros((len(segmentations), height, width), dtype=np.bool_)
    x0, y0, x1, y1 = region
    scale = np.array([width / (x1 - x0), height / (y1 - y0)])
    for i, segmentation in enumerate(segmentations):
        if isinstance(segmentation, tuple):
            polygons = [((polygon.reshape(-1, 2) - [x0, y0]) * scale).ravel().tolist() for polygon in segmentation]
            encoded = mask_api.merge(cast(list[Rle], mask_api.frPyObjects(polygons, height, width)))
            drawn[i] = mask_api.decode(encoded).astype(np.bool_)
        elif isinstance(segmentation, dict):
            whole = decode_rle(segmentation, *image)
            rows = np.clip((y0 + (np.arange(height) + 0.5) / scale[1]).astype(int), 0, image[0] - 1)
            columns = np.clip((x0 + (np.arange(width) + 0.5) / scale[0]).astype(int), 0, image[1] - 1)
            drawn[i] = whole[np.ix_(rows, columns)]
        else:
            left, top, right, bottom = boxes[i].round().astype(int)
            drawn[i, top : max(bottom, top + 1), left : max(right, left + 1)] = True
    return drawn


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
            "masks, or train a model without masks (--stage detector, or another model of `trainfit models`)"
        )
