"""Masks as COCO compresses them (run-length encoding), in and out."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import mask as mask_api
from numpy.typing import NDArray

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.samples import ImageRecord

Rle = dict[str, Any]
"""One mask as COCO compresses it: `size` [height, width] and `counts` (bytes)."""


def encode_masks(masks: torch.Tensor) -> list[Rle]:
    """COCO's compressed form of bool (n, height, width) masks on any device; the host holds one mask at a time."""
    # The mask API reads columns first: a transposed, contiguous mask is that without another copy.
    return [mask_api.encode(mask.T.contiguous().cpu().numpy().view(np.uint8).T) for mask in masks]


def decode_rle(segmentation: Rle, height: int, width: int) -> NDArray[np.bool_]:
    """Bool (height, width) of a COCO RLE, compressed or not."""
    compressed = isinstance(segmentation["counts"], (str, bytes))
    encoded = segmentation if compressed else mask_api.frPyObjects(segmentation, height, width)
    return mask_api.decode(encoded).astype(np.bool_)


def require_masks(records: Sequence[ImageRecord]) -> None:
    """What training with masks calls first.

    Raises:
        TrainfitError: an object that is no crowd has no mask.
    """
    bare = [r for r in records if any(s is None and not c for s, c in zip(r.segmentations, r.crowd, strict=True))]
    if bare:
        raise TrainfitError(
            f"{len(bare)} of {len(records)} images have objects without a mask, the first {bare[0].path.name}: add their "
            "masks, or train without masks (--recipe detector, or a model without `seg` in its name)"
        )
