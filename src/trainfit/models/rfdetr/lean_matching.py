"""RF-DETR's Hungarian matching with mask costs of bounded size: upstream's costs, at its random points."""

from collections.abc import Sequence
from typing import Any

import torch
from rfdetr.models import _assignment  # pyright: ignore[reportPrivateUsage]
from rfdetr.models.heads.segmentation import point_sample
from rfdetr.models.matcher import HungarianMatcher
from rfdetr.utilities.box_ops import batch_dice_loss, batch_sigmoid_ce_loss

from trainfit.models.rfdetr.packed_masks import PackedMasks

PIECE = 2**20
"""Logits of queries at points in one piece: 4 MiB in float32, and as much for each of the five tensors made of them."""

Matches = list[tuple[torch.Tensor, torch.Tensor]]


class LeanMatcher(HungarianMatcher):
    """Upstream's matcher for targets whose `masks` are `PackedMasks`.

    Costs of a query with an object of another image, which upstream computes and drops, are left out. Where a cost is not
    finite, all are computed as upstream does, because what it puts in their place depends on them all.
    """

    _points: torch.Tensor

    @torch.no_grad()
    def forward(
        self,
        outputs: dict[str, Any],
        targets: list[dict[str, Any]],
        group_detr: int = 1,
        target_side_safety: Any = None,
    ) -> Matches:
        """The matches of each image: queries and targets, both (matches,), as upstream's method of this name."""
        if "masks" not in targets[0]:
            return super().forward(outputs, targets, group_detr, target_side_safety)
        spatial = outputs["pred_masks"]["spatial_features"]
        points = spatial.shape[-2] * spatial.shape[-1] // self.mask_point_sample_ratio
        self._points = torch.rand(1, points, 2, device=spatial.device)
        if self._detection_inputs_are_safe(outputs, targets, target_side_safety):
            costs = self._compute_compact_detection_cost_matrix(outputs, targets)
            entropy, dice = self._own_mask_costs(outputs, targets)
            costs = (costs + self.cost_mask_ce * entropy + self.cost_mask_dice * dice).float()
            if torch.isfinite(costs).all():
                return self._solve(costs, outputs, targets, group_detr)
        return super().forward(outputs, targets, group_detr, target_side_safety)

    def _solve(
        self, costs: torch.Tensor, outputs: dict[str, Any], targets: list[dict[str, Any]], groups: int
    ) -> Matches:
        """Solve `costs` (queries, targets of all images) on the device where upstream would, else on the host."""
        sizes = [len(target["boxes"]) for target in targets]
        if costs.is_cuda and len(sizes) > 1 and self._mask_compact_worth_it(outputs, targets):
            return _assignment.assign_many_bucketed([costs], sizes, groups)[0]
        return self._assign_compact_cost_matrix(costs.cpu(), sizes, groups)

    def _own_mask_costs(
        self, outputs: dict[str, Any], targets: list[dict[str, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and Dice cost of each query with the objects of its image: (queries, targets of all images)."""
        return _joined(
            [self._mask_costs(outputs, image, target["masks"]) for image, target in enumerate(targets)], axis=1
        )

    def _mask_costs(self, outputs: dict[str, Any], image: int, masks: PackedMasks) -> tuple[torch.Tensor, torch.Tensor]:
        """The costs of an image's queries with some masks, each (queries, masks)."""
        head = outputs["pred_masks"]
        spatial = head["spatial_features"][image, None]
        queries = head["query_features"][image, None]
        points = self._points.to(torch.promote_types(spatial.dtype, self._points.dtype))
        features = point_sample(spatial, points, align_corners=False)
        numbers = torch.arange(len(masks), device=spatial.device)
        labels = masks.at(numbers, self._points).to(features.dtype)
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for some in queries.split(max(1, PIECE // points.shape[1]), 1):
            logits = (torch.einsum("bcp,bnc->bnp", features, some) + head["bias"])[0]
            rows.append((batch_sigmoid_ce_loss(logits, labels), batch_dice_loss(logits, labels)))
        return _joined(rows, axis=0)

    def _compute_mask_costs(
        self, outputs: dict[str, Any], targets: list[dict[str, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The costs of all queries with all objects, for what upstream does where one is not finite."""
        size = targets[0]["masks"].size
        masks = PackedMasks(bits=torch.cat([target["masks"].bits for target in targets]), size=size)
        return _joined([self._mask_costs(outputs, image, masks) for image in range(len(targets))], axis=0)


def _joined(costs: Sequence[tuple[torch.Tensor, torch.Tensor]], *, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of (cross-entropy, Dice) as two matrices."""
    entropy, dice = zip(*costs, strict=True)
    return torch.cat(entropy, axis), torch.cat(dice, axis)
