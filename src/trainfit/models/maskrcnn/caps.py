"""Declared region counts: what Mask R-CNN samples from its proposals changes while it learns, memory with it.

At the start of a training few proposals are positive; later the sampler fills its configured share. A trace (or one real
step) at the full share is the most that any step needs.
"""

import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import RoIHeads

Samples = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def cap_training_samples(heads: RoIHeads) -> None:
    """Let `heads` train on exactly its configured regions an image (by default 512, of them 25 % positive).

    Proposals and targets are matched as ever; only what the sampler picks of them is fixed. For traces and memory
    measurements: the model no longer learns. Every image needs at least one target box.
    """
    sampler = heads.fg_bg_sampler
    regions = sampler.batch_size_per_image
    positive = int(regions * sampler.positive_fraction)

    def select(proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> Samples:
        boxes = [target["boxes"].to(proposals[0].dtype) for target in targets]
        classes = [target["labels"] for target in targets]
        proposals = heads.add_gt_proposals(proposals, boxes)
        matched, labels = heads.assign_targets_to_proposals(proposals, boxes, classes)
        for image, candidates in enumerate(proposals):
            # Repeated where an image has fewer proposals than regions.
            chosen = torch.arange(regions, device=candidates.device) % len(candidates)
            proposals[image] = candidates[chosen]
            labels[image] = (torch.arange(regions, device=candidates.device) < positive).to(labels[image].dtype)
            matched[image] = torch.zeros_like(labels[image])
        matched_boxes = [boxes[image][matched[image]] for image in range(len(proposals))]
        return proposals, matched, labels, list(heads.box_coder.encode(matched_boxes, proposals))

    vars(heads)["select_training_samples"] = select  # before the class's own


def cap_detections(heads: RoIHeads) -> None:
    """Let `heads` in eval mode find its configured number of objects in every image (100), each over the whole image.

    So as many masks are pasted, and as large, as there can be. For traces and memory measurements.
    """
    postprocess = heads.postprocess_detections
    limit = heads.detections_per_img

    def select(
        class_logits: Tensor, box_regression: Tensor, proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        boxes, scores, labels = postprocess(class_logits, box_regression, proposals, image_shapes)
        for image, (height, width) in enumerate(image_shapes):
            whole = torch.tensor([[0.0, 0.0, width, height]], device=class_logits.device, dtype=boxes[image].dtype)
            boxes[image] = whole.repeat(limit, 1)
            scores[image] = torch.ones(limit, device=class_logits.device, dtype=scores[image].dtype)
            labels[image] = torch.ones(limit, device=class_logits.device, dtype=torch.int64)
        return boxes, scores, labels

    heads.postprocess_detections = select
