"""Images and objects as Mask R-CNN trains on them: resized by the loader, so that the canvas of a window is known."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import torch
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList

from trainfit.models.images import IMAGENET_MEAN, IMAGENET_STD, normalise_, to_device
from trainfit.models.maskrcnn.family import resized
from trainfit.tasks.detection.masks import draw_masks
from trainfit.tasks.detection.samples import ImageRecord, Sample
from trainfit.tasks.images import read_image

STRIDE = 32
"""Canvases are multiples of it (torchvision's `size_divisible`)."""


def make_sample(
    record: ImageRecord,
    *,
    size: int,
    augment: AbstractSet[str],
    generator: torch.Generator,
    max_size: int,
    masks: bool,
) -> Sample:
    """Decode, resize so that the short side is `size` and the long one at most `max_size`, and flip half of the time where
    `augment` has `flip`.

    The resize is torchvision's (bilinear, without antialiasing), rounded to whole numbers. Objects without area and
    crowds are left out. Masks are drawn at the size after the resize, and only where `masks` wants them.
    """
    pixels = torch.from_numpy(np.asarray(read_image(record)).copy()).permute(2, 0, 1)
    height, width = resized(record.height, record.width, min_size=size, max_size=max_size)
    if (height, width) != (record.height, record.width):
        grown = functional.interpolate(pixels[None].float(), size=(height, width), mode="bilinear", align_corners=False)
        pixels = grown[0].round_().clamp_(0, 255).to(torch.uint8)
    scale = np.array([width / record.width, height / record.height] * 2)
    boxes = (record.boxes * scale).clip(0, [width, height] * 2)
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & ~record.crowd
    boxes = boxes[keep]
    drawn = None
    if masks:
        kept = [segmentation for segmentation, k in zip(record.segmentations, keep, strict=True) if k]
        whole = (0.0, 0.0, float(record.width), float(record.height))
        drawn = draw_masks(kept, boxes, region=whole, size=(height, width), image=(record.height, record.width))
    if "flip" in augment and torch.rand((), generator=generator).item() < 0.5:
        pixels = pixels.flip(2)
        boxes = boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [width, 0, width, 0]
        drawn = drawn[:, :, ::-1] if drawn is not None else None
    return Sample(
        image=pixels.contiguous(),
        boxes=torch.from_numpy(boxes.astype(np.float32)),
        classes=torch.from_numpy(record.classes[keep]),
        masks=torch.from_numpy(drawn.copy()) if drawn is not None else None,
        image_id=record.id,
        original_size=(record.height, record.width),
    )


def to_images(samples: Sequence[Sample], canvas: tuple[int, int], like: torch.Tensor) -> ImageList:
    """Images as torchvision's transform gives them: normalised, then padded with zeros to the canvas, by one copy."""
    height, width = (-(-side // STRIDE) * STRIDE for side in canvas)
    sizes = [(sample.image.shape[1], sample.image.shape[2]) for sample in samples]
    pixels = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8, pin_memory=like.is_cuda)
    for i, (sample, (h, w)) in enumerate(zip(samples, sizes, strict=True)):
        pixels[i, :, :h, :w] = sample.image
    images = normalise_(pixels.to(like.device, non_blocking=True).to(like.dtype), IMAGENET_MEAN, IMAGENET_STD)
    for i, (h, w) in enumerate(sizes):
        if h < height:
            images[i, :, h:].zero_()
        if w < width:
            images[i, :, :, w:].zero_()
    return ImageList(images, sizes)


def to_targets(samples: Sequence[Sample], like: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Torchvision's targets without masks, which stay on the CPU until the mask loss takes them, some at a time."""
    counts = [len(sample.classes) for sample in samples]
    boxes = to_device([sample.boxes.to(like.dtype) for sample in samples], like).split(counts)
    labels = to_device([sample.classes + 1 for sample in samples], like).split(counts)  # 0 is the background
    return [{"boxes": own, "labels": names} for own, names in zip(boxes, labels, strict=True)]
