"""Losses of Mask R-CNN and Faster R-CNN as sums with counts, on torchvision's own parts."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch.nn import functional
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import fastrcnn_loss

from trainfit.models.maskrcnn.family import Reference
from trainfit.models.maskrcnn.lean import mask_targets
from trainfit.models.maskrcnn.picks import Forwarded, Picks, forward, pick
from trainfit.step.terms import LossTerm, Objective, TermsFunction
from trainfit.step.window import buffers_restored
from trainfit.tasks.detection.samples import Sample

TERMS = ("objectness", "rpn_box", "class", "box", "mask")


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


def terms(
    model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int], *, picks: Picks | None = None
) -> Mapping[str, LossTerm]:
    """The losses of one micro-batch, padded to the window's canvas, as sums with their counts.

    With `picks` the anchors and regions are those that were picked before.
    """
    rcnn = cast(FasterRCNN, model)
    outputs = forward(rcnn, samples, canvas)
    if picks is None:
        picks = pick(rcnn, samples, outputs)
    box = functional.smooth_l1_loss(
        outputs.deltas[picks.positive_anchors], picks.target_deltas, beta=1 / 9, reduction="sum"
    )
    scores = outputs.objectness.flatten()[picks.anchors]
    truth = picks.anchor_labels.to(scores.dtype)
    entropy = functional.binary_cross_entropy_with_logits(scores, truth, reduction="sum")
    counts = picks.counts()
    numbers = picks.numbers()
    totals = {"objectness": entropy, "rpn_box": box} | _region_totals(rcnn.roi_heads, outputs, picks, samples)
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


def sampled_counts(
    model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int]
) -> tuple[Mapping[str, float], TermsFunction]:
    """The counts of `terms`, without heads and losses of the regions, and `terms` of what was picked here.

    So the samplers, NMS and matching run once, and what was counted is what is trained on, also where a GPU adds in
    another order the second time.
    """
    rcnn = cast(FasterRCNN, model)
    picks = pick(rcnn, samples, forward(rcnn, samples, canvas))
    counts = picks.counts()
    own = counts if _has_masks(rcnn.roi_heads) else {name: counts[name] for name in TERMS[:-1]}
    return own, partial(terms, picks=picks)


def _has_masks(heads: Any) -> bool:
    return heads.has_mask()


def _region_totals(heads: Any, outputs: Forwarded, picks: Picks, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
    """`RoIHeads.forward` in training (torchvision 0.29 roi_heads.py), with its means multiplied by their counts."""
    pooled = heads.box_head(heads.box_roi_pool(outputs.features, picks.regions, outputs.sizes))
    class_logits, deltas = heads.box_predictor(pooled)
    of_class, of_box = fastrcnn_loss(class_logits, deltas, picks.labels, picks.region_deltas)
    count = len(class_logits)
    totals = {"class": of_class * count, "box": of_box * count}
    if not _has_masks(heads):
        return totals
    regions = _pick(picks.regions, picks.positive)
    if any(map(len, regions)):
        return totals | {"mask": _mask_total(heads, outputs, picks, regions, samples)}
    with buffers_restored(heads):  # the statistics of no region are not a number
        return totals | {"mask": _mask_total(heads, outputs, picks, regions, samples)}


def _mask_total(
    heads: Any, outputs: Forwarded, picks: Picks, regions: list[torch.Tensor], samples: Sequence[Sample]
) -> torch.Tensor:
    """Torchvision's `maskrcnn_loss` times the number of positive regions."""
    logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(outputs.features, regions, outputs.sizes)))
    side = logits.shape[-1]
    labels = _pick(picks.labels, picks.positive)
    matched = _pick(picks.matched, picks.positive)
    targets: list[torch.Tensor] = []
    for sample, size, region, match in zip(samples, outputs.sizes, regions, matched, strict=True):
        assert sample.masks is not None
        targets.append(mask_targets(sample.masks, size, region.detach(), match, side))
    own = logits[torch.arange(len(logits), device=logits.device), torch.cat(labels)]
    return functional.binary_cross_entropy_with_logits(own, torch.cat(targets), reduction="sum") / side**2


def _pick(rows: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [row[index] for row, index in zip(rows, indices, strict=True)]
