"""Losses of Mask R-CNN and Faster R-CNN as sums with counts, on torchvision's own parts."""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, cast

import torch
from torch.nn import functional
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers

from trainfit.models.maskrcnn.data import to_images, to_targets
from trainfit.models.maskrcnn.family import Reference
from trainfit.models.maskrcnn.lean import assign_to_anchors, mask_targets
from trainfit.step.random_state import RandomState
from trainfit.step.terms import LossTerm, Objective
from trainfit.step.window import buffers_kept
from trainfit.tasks.detection.samples import Sample

TERMS = ("objectness", "rpn_box", "class", "box", "mask")
Features = Mapping[str, torch.Tensor]


def make_objective(reference: Reference = "R1", *, masks: bool = True) -> Objective:
    """Terms of torchvision's Mask R-CNN, or without masks of its Faster R-CNN.

    All are normalised by what the two samplers picked, so in R1 all are `sampled`: RPN terms are divided by sampled
    anchors (256 an image, fewer in small ones), class and box by sampled regions, masks by positive regions. Upstream
    draws the picks from one stream of random numbers, image after image and stage after stage; here each image has a
    stream of its own (`own_stream`), so another cut of the window picks the same, and has the same gradient. In R2 each
    micro-batch is a batch of its own, of which the mean is taken, weighed by images, and which is padded to its own
    canvas.
    """
    names = TERMS if masks else TERMS[:-1]
    if reference == "R1":
        return Objective(terms=terms, counts=lambda _: {}, samples_counts=names, count=sampled_counts)
    return Objective(terms=mean_terms, counts=partial(_images, names))


def _images(names: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    return dict.fromkeys(names, float(len(samples)))


def terms(model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    """The losses of one micro-batch, padded to the window's canvas, as sums with their counts."""
    rcnn = cast(FasterRCNN, model)
    found = _sample(rcnn, samples, canvas)
    box = functional.smooth_l1_loss(
        found.deltas[found.positive_anchors], found.wanted_deltas, beta=1 / 9, reduction="sum"
    )
    scores = found.objectness.flatten()[found.anchors]
    truth = found.anchor_labels.to(scores.dtype)
    entropy = functional.binary_cross_entropy_with_logits(scores, truth, reduction="sum")
    counts, numbers = found.counts(), found.numbers()
    totals = {"objectness": entropy, "rpn_box": box} | _region_totals(rcnn.roi_heads, found, samples)
    return {
        name: LossTerm(
            total=total,
            kind="sampled",
            count=torch.tensor(counts[name]),
            numbers=numbers if name == "objectness" else {},
        )
        for name, total in totals.items()
    }


def mean_terms(model: torch.nn.Module, samples: Sequence[Sample], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    """The losses of one micro-batch as torchvision has them: means over what was sampled, on the micro-batch's own canvas."""
    canvas = (max(s.image.shape[1] for s in samples), max(s.image.shape[2] for s in samples))
    return {
        name: LossTerm(
            total=term.total / max(1.0, float(cast(torch.Tensor, term.count))), kind="mean", numbers=term.numbers
        )
        for name, term in terms(model, samples, canvas).items()
    }


def sampled_counts(model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int]) -> Mapping[str, float]:
    """The counts of `terms`: of the same random numbers, without heads and losses of the regions."""
    rcnn = cast(FasterRCNN, model)
    counts = _sample(rcnn, samples, canvas).counts()
    return counts if _has_masks(rcnn.roi_heads) else {name: counts[name] for name in TERMS[:-1]}


def _has_masks(heads: Any) -> bool:
    return heads.has_mask()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sampled:
    """What a micro-batch trains on, once both samplers have picked."""

    features: Features
    sizes: list[tuple[int, int]]
    """(height, width) of each image."""
    objectness: torch.Tensor
    """(anchors of all images, 1)."""
    deltas: torch.Tensor
    """(anchors of all images, 4)."""
    anchors: torch.Tensor
    """Numbers of the sampled anchors, positive ones first."""
    anchor_labels: torch.Tensor
    """1 or 0 for each of them."""
    positive_anchors: torch.Tensor
    wanted_deltas: torch.Tensor
    """(positive anchors, 4)."""
    proposed: int
    """Proposals of all images, as NMS left them."""
    regions: list[torch.Tensor]
    """(n, 4) of each image: the sampled regions in pixels."""
    matched: list[torch.Tensor]
    """(n,) of each image: the object that belongs to each region."""
    labels: list[torch.Tensor]
    """(n,) of each image: classes, 0 for the background."""
    wanted: Sequence[torch.Tensor]
    """(n, 4) of each image: the deltas that the box head should give."""
    positive: list[torch.Tensor]
    """Of each image, the numbers of its regions that show an object."""

    def counts(self) -> dict[str, float]:
        """What normalises each term."""
        anchors, regions = float(len(self.anchors)), float(sum(map(len, self.regions)))
        masks = float(sum(map(len, self.positive)))
        return {"objectness": anchors, "rpn_box": anchors, "class": regions, "box": regions, "mask": masks}

    def numbers(self) -> dict[str, float]:
        """What memory follows from."""
        counts = self.counts()
        return {"proposals": float(self.proposed), "rois": counts["class"], "positives": counts["mask"]}


def _sample(rcnn: FasterRCNN, samples: Sequence[Sample], canvas: tuple[int, int]) -> _Sampled:
    """Trunk, RPN and both samplers: `RegionProposalNetwork.forward` and `compute_loss` (torchvision 0.29 rpn.py) up to the
    losses, and `RoIHeads.select_training_samples` (roi_heads.py).
    """
    like = next(rcnn.parameters())
    images, targets = to_images(samples, canvas, like), to_targets(samples, like)
    features: Features = rcnn.backbone(images.tensors)
    rpn: Any = rcnn.rpn
    objectness, deltas, anchors, proposals = _propose(rpn, images, features)
    labels, matched = assign_to_anchors(rpn, anchors, targets)
    wanted = torch.cat(list(rpn.box_coder.encode(matched, anchors)))
    picked, chosen = _pick_of_each(rcnn, samples, labels, proposals, targets)
    positive, negative = (torch.where(torch.cat(side))[0] for side in picked)
    sampled = torch.cat((positive, negative))
    regions, objects, classes, wanted_boxes = chosen
    return _Sampled(
        features=features,
        sizes=images.image_sizes,
        objectness=objectness,
        deltas=deltas,
        anchors=sampled,
        anchor_labels=torch.cat(labels)[sampled],
        positive_anchors=positive,
        wanted_deltas=wanted[positive],
        proposed=sum(map(len, proposals)),
        regions=regions,
        matched=objects,
        labels=classes,
        wanted=wanted_boxes,
        positive=[torch.where(label > 0)[0] for label in classes],
    )


def _pick_of_each(
    rcnn: FasterRCNN,
    samples: Sequence[Sample],
    labels: Sequence[torch.Tensor],
    proposals: Sequence[torch.Tensor],
    targets: Sequence[dict[str, torch.Tensor]],
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """What both samplers pick, image by image, each with its own stream of random numbers.

    Returns:
        Positive and negative anchors, as the RPN's sampler gives them; regions, objects, classes and wanted deltas, as
        `RoIHeads.select_training_samples` does.
    """
    rpn: Any = rcnn.rpn
    heads: Any = rcnn.roi_heads
    anchors: list[list[torch.Tensor]] = [[], []]
    chosen: list[list[torch.Tensor]] = [[], [], [], []]
    for sample, label, proposal, target in zip(samples, labels, proposals, targets, strict=True):
        asked_for = {**target, "masks": target["labels"]}  # it checks that there is such a key
        with own_stream(sample.image_id, label.device):
            for column, own in zip(anchors, rpn.fg_bg_sampler([label]), strict=True):
                column += own
            for column, own in zip(chosen, heads.select_training_samples([proposal], [asked_for]), strict=True):
                column += own
    return anchors, chosen


@contextmanager
def own_stream(image_id: int, device: torch.device) -> Generator[None]:
    """Draw random numbers that follow from the seed of the window (`torch.manual_seed`) and the image alone."""
    state = RandomState.now(device)
    digest = blake2b(f"{torch.initial_seed()} {image_id}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest) >> 1)
    try:
        yield
    finally:
        state.restore(device)


def _propose(
    rpn: Any, images: ImageList, features: Features
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Objectness and deltas of all anchors, the anchors of each image, and its proposals."""
    objectness, deltas = rpn.head(list(features.values()))
    anchors = rpn.anchor_generator(images, list(features.values()))
    per_level = [level[0].numel() for level in objectness]
    objectness, deltas = concat_box_prediction_layers(objectness, deltas)
    proposals = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(proposals, objectness, images.image_sizes, per_level)
    return objectness, deltas, anchors, proposals


def _region_totals(heads: Any, found: _Sampled, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """`RoIHeads.forward` in training (torchvision 0.29 roi_heads.py), its means times their counts."""
    pooled = heads.box_head(heads.box_roi_pool(found.features, found.regions, found.sizes))
    class_logits, deltas = heads.box_predictor(pooled)
    of_class, of_box = fastrcnn_loss(class_logits, deltas, found.labels, list(found.wanted))
    count = len(class_logits)
    totals = {"class": of_class * count, "box": of_box * count}
    if not _has_masks(heads):
        return totals
    regions = _pick(found.regions, found.positive)
    if any(map(len, regions)):
        return totals | {"mask": _mask_total(heads, found, regions, samples)}
    with buffers_kept(heads):  # the statistics of no region are not a number
        return totals | {"mask": _mask_total(heads, found, regions, samples)}


def _mask_total(heads: Any, found: _Sampled, regions: list[torch.Tensor], samples: Sequence[Sample]) -> torch.Tensor:
    """Torchvision's `maskrcnn_loss` times the number of positive regions."""
    logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(found.features, regions, found.sizes)))
    side = logits.shape[-1]
    labels, matched = _pick(found.labels, found.positive), _pick(found.matched, found.positive)
    wanted: list[torch.Tensor] = []
    for sample, size, region, match in zip(samples, found.sizes, regions, matched, strict=True):
        assert sample.masks is not None
        wanted.append(mask_targets(sample.masks, size, region.detach(), match, side))
    own = logits[torch.arange(len(logits), device=logits.device), torch.cat(labels)]
    return functional.binary_cross_entropy_with_logits(own, torch.cat(wanted), reduction="sum") / side**2


def _pick(rows: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [row[index] for row, index in zip(rows, indices, strict=True)]
