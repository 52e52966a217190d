"""What sizes of an RF-DETR's traces follow besides knobs: the image, in cells, tokens, and points of masks. Imports no torch.

A training is traced at the largest size that it draws, and its evaluation at the resolution.
"""

from collections.abc import Mapping

from trainfit.errors import TrainfitError
from trainfit.models.rfdetr.family import PUBLISHED, RfDetrSetting
from trainfit.models.rfdetr.sizes import STEPS

PATCHES = {12: 12, 24: 12, 32: 16, 56: 14}
"""Block of legal resolutions -> side in pixels of the encoder's patches; a block is a patch for each window of a row (rfdetr
1.11.2 config.py; a test compares)."""
MASK_STRIDE = 4
"""Pixels of the image for each of a mask, in a row."""
PIXELS_OF_A_POINT = 16
"""Pixels of a mask for each point that a loss samples (rfdetr 1.11.2 config.py `mask_point_sample_ratio`)."""
UNCERTAIN_SHARE = 0.75
"""Of these points, the most uncertain (rfdetr 1.11.2 models/heads/segmentation.py `get_uncertain_point_coords_with_randomness`)."""
LOGITS_AT_ONCE = 2**21
"""Of masks of one image in a piece of the mask losses (`lean_losses.PIECE`; a test compares)."""


def traced_sizes(setting: RfDetrSetting) -> Mapping[str, int]:
    """The numbers by name; a size is a product of two of them, at most.

    Raises:
        TrainfitError: a resolution that is not legal, with snapping off.
    """
    published = PUBLISHED[setting.model]
    patch = PATCHES[published.block]
    side = published.resolution
    if setting.resolution is not None:
        side = legal(setting.resolution, published.block, snap=setting.snap)
    largest = side + max(STEPS) * published.block if setting.multi_scale else side
    sizes: dict[str, int] = {}
    for part, pixels in (("training", largest), ("evaluation", side)):
        cells = pixels // patch
        tokens = cells**2 + (published.block // patch) ** 2  # a class token for each window
        mask = (pixels // MASK_STRIDE) ** 2
        points = max(pixels // MASK_STRIDE, mask // PIXELS_OF_A_POINT)
        uncertain = int(UNCERTAIN_SHARE * points)
        sizes |= {
            f"{part} tokens": tokens,
            f"{part} cells": cells**2,
            f"{part} cells and one": cells**2 + 1,  # position embeddings have one class token
            f"{part} row": cells,
            f"{part} points": points,
            f"{part} uncertain points": uncertain,
            f"{part} random points": points - uncertain,
            f"{part} masks at once": max(1, LOGITS_AT_ONCE // mask),
            f"{part} token pairs": tokens**2,
        }
    return sizes


def legal(resolution: int, block: int, *, snap: bool) -> int:
    """The resolution that the model is built with (`workload.legal_resolution`, which imports torch; a test compares)."""
    nearest = max(block, (resolution + block // 2) // block * block)
    if nearest != resolution and not snap:
        raise TrainfitError(
            f"--resolution {resolution} is not a multiple of {block} (patch size x windows): "
            f"use {nearest}, or leave --no-snap out"
        )
    return nearest
