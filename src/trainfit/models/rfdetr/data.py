"""Samples and targets of RF-DETR: square resize, crop and flip, normalised boxes."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from rfdetr.utilities.tensors import NestedTensor

from trainfit.models.images import IMAGENET_MEAN, IMAGENET_STD, normalise_, to_device
from trainfit.models.rfdetr.packed_masks import PackedMasks, pack
from trainfit.tasks.detection.masks import Region, draw_masks
from trainfit.tasks.detection.samples import ImageRecord, Sample
from trainfit.tasks.images import read_image

SHORT_SIDES = (400, 500, 600)
"""The DETR recipe's intermediate sizes; crops are 384 px to the short side of it (rfdetr 1.11.2 datasets/coco.py)."""
SMALLEST_CROP = 384


def make_sample(
    record: ImageRecord, *, size: int, augment: AbstractSet[str], masks: bool, generator: torch.Generator
) -> Sample:
    """Decode, crop (half of the time), resize to `size` x `size` and flip (half of the time).

    The crop's distribution is upstream's (short side to 400, 500 or 600, a square of 384 px or more out of it, then the
    target size); the pixels are resampled once, not twice. `augment` says whether it may `crop` and `flip`: with nothing in
    it there is the resize alone, as for evaluation.
    Boxes are clipped to the crop; objects whose clipped box has no area are dropped, as upstream does; crowds are left out.
    Masks are drawn only if `masks` is set.
    """
    image = read_image(record)
    region = (0.0, 0.0, float(record.width), float(record.height))
    flip = False
    if "crop" in augment and torch.rand((), generator=generator).item() < 0.5:
        region = _random_crop(record.width, record.height, generator)
    if "flip" in augment:
        flip = torch.rand((), generator=generator).item() < 0.5
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box=region)
    scale = np.array([size / (region[2] - region[0]), size / (region[3] - region[1])] * 2)
    boxes = ((record.boxes - np.array([region[0], region[1]] * 2)) * scale).clip(0, size)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & ~record.crowd
    boxes = boxes[keep]
    drawn = None
    if masks:
        segmentations = [each for each, is_kept in zip(record.segmentations, keep, strict=True) if is_kept]
        drawn = draw_masks(segmentations, boxes, region=region, size=(size, size), image=(record.height, record.width))
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).contiguous()
    if flip:
        pixels = pixels.flip(2)
        boxes = boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [size, 0, size, 0]
        drawn = drawn[:, :, ::-1] if drawn is not None else None
    return Sample(
        image=pixels,
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        classes=torch.from_numpy(record.classes[keep]),
        masks=torch.from_numpy(drawn.copy()) if drawn is not None else None,
        image_id=record.id,
        original_size=(record.height, record.width),
    )


def _random_crop(width: int, height: int, generator: torch.Generator) -> Region:
    """A square of upstream's random size and place, in pixels of the original image."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator).item())

    short = SHORT_SIDES[draw(0, len(SHORT_SIDES) - 1)]
    zoom = short / min(width, height)
    side = draw(min(SMALLEST_CROP, short), short)
    left = draw(0, max(0, round(width * zoom) - side)) / zoom
    top = draw(0, max(0, round(height * zoom) - side)) / zoom
    side = min(side / zoom, width, height)
    left = min(left, width - side)
    top = min(top, height - side)
    return left, top, left + side, top + side


def to_batch(samples: Sequence[Sample], canvas: tuple[int, int], like: torch.Tensor) -> NestedTensor:
    """Stack, move and normalise: NestedTensor of (n, 3, height, width) in the device and dtype of `like`.

    Images smaller than the window's canvas are padded at the right and bottom and masked there.
    """
    height, width = canvas
    sizes = [(sample.image.shape[1], sample.image.shape[2]) for sample in samples]
    full = all(size == canvas for size in sizes)
    pixels = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8, pin_memory=like.is_cuda)
    padding = torch.full((len(samples), height, width), not full, dtype=torch.bool, device=like.device)
    for i, (sample, (h, w)) in enumerate(zip(samples, sizes, strict=True)):
        pixels[i, :, :h, :w] = sample.image
        padding[i, :h, :w].fill_(False)
    images = pixels.to(like.device, non_blocking=True).to(like.dtype)
    return NestedTensor(normalise_(images, IMAGENET_MEAN, IMAGENET_STD), padding, no_padding=full)


def to_targets(samples: Sequence[Sample], like: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Upstream's targets: `labels`, `boxes` as cx, cy, w, h over the image's own size, `masks` where there are any.

    Each kind is copied to the device once for all samples; what is returned are views of it.
    """
    packed = {
        "labels": to_device([sample.classes for sample in samples], like),
        "boxes": to_device([_relative_boxes(sample, like.dtype) for sample in samples], like),
    }
    masks = [sample.masks for sample in samples if sample.masks is not None]
    if masks:
        packed["masks"] = to_device(masks, like)
    counts = [len(sample.classes) for sample in samples]
    kinds = [values.split(counts) for values in packed.values()]
    return [dict(zip(packed, of_sample, strict=True)) for of_sample in zip(*kinds, strict=True)]


def to_lean_targets(samples: Sequence[Sample], like: torch.Tensor) -> list[dict[str, Any]]:
    """Targets as `to_targets` gives them with `masks` as `PackedMasks`, packed before they are copied to the device."""
    targets: list[dict[str, Any]] = [*to_targets([replace(sample, masks=None) for sample in samples], like)]
    masks = [sample.masks for sample in samples if sample.masks is not None]
    if masks:
        _, height, width = masks[0].shape
        packed = PackedMasks(bits=to_device([pack(each) for each in masks], like), size=(height, width))
        for target, own in zip(targets, packed.split([len(each) for each in masks]), strict=True):
            target["masks"] = own
    return targets


def _relative_boxes(sample: Sample, dtype: torch.dtype) -> torch.Tensor:
    """(n, 4): cx, cy, w, h as fractions of the image's size."""
    _, height, width = sample.image.shape
    x0, y0, x1, y1 = sample.boxes.to(dtype).unbind(1)
    return torch.stack(((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height), 1)
