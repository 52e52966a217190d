"""RF-DETR's criterion as sums with counts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rfdetr.models.criterion import SetCriterion

from trainfit.models.rfdetr.data import to_batch, to_lean_targets, to_targets
from trainfit.models.rfdetr.lean_losses import LeanCriterion
from trainfit.models.rfdetr.lean_matching import LeanMatcher
from trainfit.step.terms import LossTerm, Objective
from trainfit.tasks.detection.samples import Sample

TERMS = {
    "loss_ce": "class",
    "loss_bbox": "box",
    "loss_giou": "giou",
    "loss_mask_ce": "mask_ce",
    "loss_mask_dice": "dice",
}
"""Upstream's loss names, and ours; those of auxiliary layers (`_0`, `_enc`) are added to their base's."""


def make_lean(criterion: SetCriterion) -> None:
    """Let upstream's criterion, and its matcher, work in pieces on packed target masks; its settings stay.

    Upstream builds both by itself, so that their class is changed after that.
    """
    criterion.__class__ = LeanCriterion
    criterion.matcher.__class__ = LeanMatcher


def make_objective(criterion: SetCriterion, *, groups: int, masks: bool, masks_only: bool) -> Objective:
    """Terms and counts of RF-DETR.

    Every loss of upstream is a sum over all layers and groups, divided by the number of boxes x groups
    (rfdetr 1.11.2 models/criterion.py `num_boxes_for_targets`). `num_boxes=1` gives the sums.
    `masks_only` drops the terms that are constants when everything but the mask head is frozen.
    """
    names = [name for upstream, name in TERMS.items() if "mask" in upstream or not masks_only]
    make_targets = to_lean_targets if isinstance(criterion, LeanCriterion) else to_targets
    names = names if masks else [name for name in names if name in ("class", "box", "giou")]

    def terms(model: torch.nn.Module, samples: Sequence[Sample], canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
        like = next(model.parameters())
        targets = make_targets(samples, like)
        outputs: dict[str, Any] = model(to_batch(samples, canvas, like), targets)
        losses = criterion(outputs, targets, num_boxes=torch.ones((), device=like.device, dtype=like.dtype))
        totals: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for key, weight in criterion.weight_dict.items():
            name = TERMS[_base(key)]
            if name in totals and key in losses:
                totals[name].append(losses[key] * weight)
        return {name: LossTerm(total=torch.stack(parts).sum(), kind="targets") for name, parts in totals.items()}

    def counts(samples: Sequence[Sample]) -> Mapping[str, float]:
        boxes = float(sum(len(s.classes) for s in samples) * groups)
        return dict.fromkeys(names, boxes)

    return Objective(terms=terms, counts=counts)


def _base(key: str) -> str:
    """loss_bbox_1, loss_bbox_enc -> loss_bbox."""
    head, _, tail = key.rpartition("_")
    return head if tail.isdigit() or tail == "enc" else key
