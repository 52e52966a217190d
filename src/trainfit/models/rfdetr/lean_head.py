"""RF-DETR's mask head in evaluation: the last decoder layer's masks alone, of the chosen queries, some at a time.

Upstream (rfdetr 1.11.2 models/lwdetr.py `LWDETR.forward`) makes the mask logits of every query for every decoder layer and for
the encoder's proposals, of all images at once; its post-processing reads the last layer's.
"""

from collections.abc import Mapping

import torch
from rfdetr.models.heads.segmentation import SegmentationHead

from trainfit.tasks.detection.masks import Rle, encode_masks

MASK_PIXELS_AT_ONCE = 2**24
"""Pixels of masks that are upsampled in one go: 64 MiB in float32 and 16 MiB as bool, at any number of queries."""

Masks = torch.Tensor | Mapping[str, torch.Tensor]
"""Mask logits (images, queries, height / 4, width / 4), or what they are products of: `LeanHead.forward`'s."""


class LeanHead(SegmentationHead):
    """Upstream's mask head, which outside of training gives what the last layer's masks are made of."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        spatial_features: torch.Tensor,
        query_features: list[torch.Tensor],
        image_size: tuple[int, int],
        skip_blocks: bool = False,
    ) -> list[dict[str, torch.Tensor]]:
        """`spatial_features` (images, channels, height / 4, width / 4), `query_features` (images, queries, channels) and `bias`.

        For the encoder's proposals (`skip_blocks`) nothing, because no evaluation reads their masks.
        """
        if skip_blocks:
            return [{}]
        height, width = (side // self.downsample_ratio for side in image_size)
        spatial = torch.nn.functional.interpolate(
            spatial_features, size=(height, width), mode="bilinear", align_corners=False
        )
        for block in self.blocks[: len(query_features)]:
            spatial = block(spatial)
        return [
            {
                "spatial_features": self.spatial_features_proj(spatial),
                "query_features": self.query_features_proj(self.query_features_block(query_features[-1])),
                "bias": self.bias,
            }
        ]


def masks_of(masks: Masks, image: int, queries: torch.Tensor, size: tuple[int, int]) -> list[Rle]:
    """The masks of the chosen `queries` of one image, (height, width) `size`, some at a time and run-length encoded at once.

    The same masks as upstream's (rfdetr 1.11.2 models/postprocess.py `_postprocess_masks`): bilinear, then positive.
    """
    encoded: list[Rle] = []
    for some in queries.split(max(1, MASK_PIXELS_AT_ONCE // (size[0] * size[1]))):
        logits = _logits(masks, image, some)
        grown = torch.nn.functional.interpolate(logits[:, None], size=size, mode="bilinear", align_corners=False)
        encoded += encode_masks(grown[:, 0] > 0)
    return encoded


def _logits(masks: Masks, image: int, queries: torch.Tensor) -> torch.Tensor:
    """(queries, height / 4, width / 4)."""
    if isinstance(masks, torch.Tensor):
        return masks[image][queries]
    spatial = masks["spatial_features"][image]
    product = masks["query_features"][image][queries] @ spatial.flatten(1)
    return product.view(-1, *spatial.shape[1:]) + masks["bias"]
