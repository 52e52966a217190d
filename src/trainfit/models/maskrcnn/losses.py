"""Mask R-CNN's losses as sums with counts, on torchvision's own parts."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch.nn import functional
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers

from trainfit.models.images import to_device
from trainfit.models.maskrcnn.family import resized
from trainfit.models.maskrcnn.lean import assign_to_anchors, mask_targets
from trainfit.step.terms import LossTerm, Objective
from trainfit.tasks.detection.samples import Sample

STRIDE = 32
"""Canvases are multiples of it (torchvision's `size_divisible`)."""
TERMS = ("objectness", "rpn_box", "class", "box", "mask")
Features = Mapping[str, torch.Tensor]
Targets = list[dict[str, torch.Tensor]]


def make_objective(min_size: int, max_size: int, canvas: tuple[int, int] | None = None) -> Objective:
    """Terms of torchvision's Mask R-CNN: all are normalised by what the two samplers picked, so all are `sampled`.

    RPN terms are divided by sampled anchors (256 an image, fewer in small ones), class and box by sampled regions, masks
    by positive regions. The gradient is the big batch's given the same picks: torchvision draws them from one stream of
    random numbers, image after image and stage after stage, so another cut picks other anchors from the same
    distribution. `canvas` fixes the window's; by default it holds every resized image of the window.
    """

    def window_canvas(window: Sequence[Sample]) -> tuple[int, int]:
        sizes = [resized(*s.image.shape[1:], min_size=min_size, max_size=max_size) for s in window]
        return canvas or (max(h for h, _ in sizes), max(w for _, w in sizes))

    return Objective(terms=terms, counts=lambda _: {}, samples_counts=TERMS, canvas=window_canvas)


def terms(model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    """The five losses of one micro-batch, padded to the window's canvas."""
    rcnn = cast(MaskRCNN, model)
    like = next(model.parameters())
    images: ImageList
    targets: Targets
    images, targets = rcnn.transform([to_image(s, like) for s in samples], [_target(s, like) for s in samples])
    images.tensors = _pad(images.tensors, canvas)
    features = rcnn.backbone(images.tensors)
    proposals, found = _rpn_terms(rcnn.rpn, images, features, targets)
    masks = [s.masks for s in samples]
    return found | _region_terms(rcnn.roi_heads, features, proposals, images.image_sizes, targets, masks)


def to_image(sample: Sample, like: torch.Tensor) -> torch.Tensor:
    """(3, height, width) in 0..1, in the device and dtype of `like`."""
    return to_device([sample.image], like).to(like.dtype).div_(255)


def _target(sample: Sample, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Boxes and labels on the device. Masks stay on the CPU until the mask loss takes them, some at a time."""
    target = {"boxes": sample.boxes.to(like.dtype), "labels": sample.classes + 1}  # 0 is the background
    return {name: to_device([value], like) for name, value in target.items()}


def _pad(images: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    height, width = (-(-side // STRIDE) * STRIDE for side in canvas)
    missing = (0, width - images.shape[3], 0, height - images.shape[2])
    return functional.pad(images, missing) if any(missing) else images


def _term(total: torch.Tensor, count: int) -> LossTerm:
    return LossTerm(total=total, kind="sampled", count=torch.tensor(float(count)))


def _rpn_terms(
    rpn: Any, images: ImageList, features: Features, targets: Targets
) -> tuple[list[torch.Tensor], dict[str, LossTerm]]:
    """`RegionProposalNetwork.forward` and `compute_loss` (torchvision 0.29 rpn.py), with sums for means."""
    objectness, deltas = rpn.head(list(features.values()))
    anchors = rpn.anchor_generator(images, list(features.values()))
    per_level = [level[0].numel() for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    proposals = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(proposals, objectness, images.image_sizes, per_level)
    labels, matched = assign_to_anchors(rpn, anchors, targets)
    wanted = torch.cat(list(rpn.box_coder.encode(matched, anchors)))
    positive, negative = (torch.where(torch.cat(picked))[0] for picked in rpn.fg_bg_sampler(labels))
    sampled = torch.cat((positive, negative))
    box = functional.smooth_l1_loss(deltas[positive], wanted[positive], beta=1 / 9, reduction="sum")
    scores = objectness.flatten()[sampled]
    truth = torch.cat(labels)[sampled].to(scores.dtype)
    entropy = functional.binary_cross_entropy_with_logits(scores, truth, reduction="sum")
    return proposals, {"objectness": _term(entropy, len(sampled)), "rpn_box": _term(box, len(sampled))}


def _region_terms(
    heads: Any,
    features: Features,
    proposals: list[torch.Tensor],
    sizes: list[tuple[int, int]],
    targets: Targets,
    masks: Sequence[torch.Tensor | None],
) -> dict[str, LossTerm]:
    """`RoIHeads.forward` in training (torchvision 0.29 roi_heads.py), its means times their counts."""
    asked_for = [{**target, "masks": target["labels"]} for target in targets]  # it checks that there is such a key
    proposals, matched, labels, wanted = heads.select_training_samples(proposals, asked_for)
    pooled = heads.box_head(heads.box_roi_pool(features, proposals, sizes))
    class_logits, deltas = heads.box_predictor(pooled)
    of_class, of_box = fastrcnn_loss(class_logits, deltas, labels, wanted)
    positive = [torch.where(label > 0)[0] for label in labels]
    regions = _pick(proposals, positive)
    logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, regions, sizes)))
    of_mask = _mask_loss(logits, regions, masks, sizes, _pick(labels, positive), _pick(matched, positive))
    count = len(class_logits)
    return {
        "class": _term(of_class * count, count),
        "box": _term(of_box * count, count),
        "mask": _term(of_mask, len(logits)),
    }


def _mask_loss(
    logits: torch.Tensor,
    regions: list[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    sizes: list[tuple[int, int]],
    labels: list[torch.Tensor],
    matched: list[torch.Tensor],
) -> torch.Tensor:
    """Torchvision's `maskrcnn_loss` times the number of positive regions."""
    side = logits.shape[-1]
    wanted: list[torch.Tensor] = []
    for of_image, size, region, match in zip(masks, sizes, regions, matched, strict=True):
        assert of_image is not None
        wanted.append(mask_targets(of_image, size, region.detach(), match, side))
    own = logits[torch.arange(len(logits), device=logits.device), torch.cat(labels)]
    return functional.binary_cross_entropy_with_logits(own, torch.cat(wanted), reduction="sum") / side**2


def _pick(rows: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [row[index] for row, index in zip(rows, indices, strict=True)]
