"""Mask R-CNN's matching and mask targets in pieces of bounded size: torchvision's values, without its large temporaries."""

from typing import Any

import torch
from torch.nn import functional
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou, roi_align

from trainfit.models.images import to_device

IOU_PIECE = 2**21
"""Overlaps of boxes with anchors that exist at a time: 8 MiB in float32, and about six times as much to compute them."""
MASK_PIECE = 2**23
"""Pixels of target masks that are on the device at a time: 32 MiB in float32, at least one mask."""


def match(matcher: Matcher, boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """The result of `matcher` for the overlaps of `boxes` (n, 4) with `anchors` (m, 4): (m,).

    Overlaps are computed twice if low-quality matches are allowed: the best anchors of a box are known only at the end
    (torchvision 0.29 models/detection/_utils.py `Matcher`).
    """
    pieces = anchors.split(max(1, IOU_PIECE // max(1, len(boxes))))
    values: list[torch.Tensor] = []
    nearest: list[torch.Tensor] = []
    best = boxes.new_full((len(boxes),), -1.0)
    for piece in pieces:
        overlaps = box_iou(boxes, piece)
        value, index = overlaps.max(0)
        values.append(value)
        nearest.append(index)
        best = torch.maximum(best, overlaps.amax(1))
    value = torch.cat(values)
    index = torch.cat(nearest)
    matches = index.clone()
    matches[value < matcher.low_threshold] = matcher.BELOW_LOW_THRESHOLD
    matches[(value >= matcher.low_threshold) & (value < matcher.high_threshold)] = matcher.BETWEEN_THRESHOLDS
    if not matcher.allow_low_quality_matches:
        return matches
    is_best = torch.cat([(box_iou(boxes, piece) == best[:, None]).any(0) for piece in pieces])
    return torch.where(is_best, index, matches)


def assign_to_anchors(
    rpn: Any, anchors: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Label (1, 0, or -1 for neither) and box of each anchor: `RegionProposalNetwork.assign_targets_to_anchors`."""
    labels: list[torch.Tensor] = []
    matched: list[torch.Tensor] = []
    for own, target in zip(anchors, targets, strict=True):
        boxes = target["boxes"]
        if not len(boxes):
            matched.append(torch.zeros_like(own, dtype=torch.float32))
            labels.append(own.new_zeros(len(own), dtype=torch.float32))
            continue
        matches = match(rpn.proposal_matcher, boxes, own)
        label = (matches >= 0).to(torch.float32)
        label[matches == rpn.proposal_matcher.BETWEEN_THRESHOLDS] = -1.0
        labels.append(label)
        matched.append(boxes[matches.clamp(min=0)])
    return labels, matched


def mask_targets(
    masks: torch.Tensor, size: tuple[int, int], regions: torch.Tensor, matched: torch.Tensor, side: int
) -> torch.Tensor:
    """The result of torchvision's `project_masks_on_boxes` for masks that were resized with their image: (n, side, side).

    Args:
        masks: bool (m, height, width) on the CPU, of the image before the resize; some are copied to the device at a time.
        size: Height and width of the resized image.
        regions: (n, 4) in pixels of the resized image.
        matched: (n,), which mask belongs to a region.
        side: Pixels of a target.
    """
    targets = regions.new_zeros((len(regions), side, side))
    pixels = max(masks.shape[1] * masks.shape[2], size[0] * size[1])
    count = max(1, MASK_PIECE // pixels)
    for first in range(0, len(masks), count):
        rows = torch.where((matched >= first) & (matched < first + count))[0]
        if not len(rows):
            continue
        piece = to_device([masks[first : first + count]], regions)[:, None].to(regions.dtype)
        if size != tuple(masks.shape[1:]):
            piece = functional.interpolate(piece, size=size)
        rois = torch.cat(((matched[rows] - first).to(regions.dtype)[:, None], regions[rows]), 1)
        targets[rows] = roi_align(piece, rois, (side, side), 1.0)[:, 0]
    return targets
