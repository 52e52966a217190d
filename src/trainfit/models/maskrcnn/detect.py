"""Mask R-CNN in evaluation: what torchvision finds, with masks pasted some at a time and run-length encoded at once."""

from collections.abc import Sequence
from typing import cast

import torch
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

from trainfit.models.maskrcnn.data import to_images
from trainfit.step.terms import largest_image
from trainfit.tasks.detection.masks import Rle, encode_masks
from trainfit.tasks.detection.samples import ImageDetections, Sample

PIXELS_AT_ONCE = 2**24
"""Pixels of masks that are pasted in one go: 64 MiB in float32, twice while they are stacked."""
IS_MASK = 0.5
"""Least probability of a pixel of a mask (torchvision's references/detection/coco_eval.py)."""


@torch.no_grad()
def detect(model: torch.nn.Module, samples: Sequence[Sample], is_class: torch.Tensor) -> list[ImageDetections]:
    """The detections of a micro-batch of resized images in pixels of the original ones; the model is in eval mode.

    `is_class` (classes,), on the CPU, says which classes have a name: what is found of others is left out.

    `GeneralizedRCNN.forward` and `GeneralizedRCNNTransform.postprocess` (torchvision 0.29), which paste all masks of an
    image at its size at once: 407 MiB in float32 for 100 masks of 800 x 1333 pixels, and as much again to stack them.
    Portrait and landscape images run one after the other: padded to one canvas they need up to two thirds more memory.
    """
    portrait = [sample.image.shape[1] > sample.image.shape[2] for sample in samples]
    by_row: dict[int, ImageDetections] = {}
    for wanted in sorted(set(portrait)):
        rows = [row for row, is_portrait in enumerate(portrait) if is_portrait == wanted]
        for row, detections in zip(rows, _detect(model, [samples[row] for row in rows], is_class), strict=True):
            by_row[row] = detections
    return [by_row[row] for row in range(len(samples))]


def _detect(model: torch.nn.Module, samples: Sequence[Sample], is_class: torch.Tensor) -> list[ImageDetections]:
    """The detections of images that are padded to one canvas."""
    rcnn = cast(FasterRCNN, model)
    images = to_images(samples, largest_image(samples), next(model.parameters()))
    features = rcnn.backbone(images.tensors)
    proposals, _ = rcnn.rpn(images, features)
    sizes = images.image_sizes
    objects, _ = rcnn.roi_heads(features, proposals, sizes)
    del images, features, proposals
    detections: list[ImageDetections] = []
    for sample, size, own in zip(samples, sizes, objects, strict=True):
        boxes = resize_boxes(own["boxes"], list(size), list(sample.original_size))
        classes = own["labels"].cpu() - 1  # 0 is the background
        known = torch.where(is_class[classes])[0]
        masks = _pasted(own["masks"], boxes, sample.original_size) if "masks" in own else None
        detections.append(
            ImageDetections(
                image_id=sample.image_id,
                boxes=boxes.float().cpu()[known],
                scores=own["scores"].float().cpu()[known],
                classes=classes[known],
                masks=None if masks is None else [masks[row] for row in known.tolist()],
            )
        )
    return detections


def _pasted(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> list[Rle]:
    """Masks (n, 1, side, side) of probabilities, each over its box, as run-length encoded masks of an image."""
    count = max(1, PIXELS_AT_ONCE // (size[0] * size[1]))
    encoded: list[Rle] = []
    for some, own in zip(masks.split(count), boxes.split(count), strict=True):
        encoded += encode_masks(paste_masks_in_image(some, own, size)[:, 0] > IS_MASK)
    return encoded
