"""RF-DETR's Hungarian matching with mask costs of bounded size: upstream's costs, at its random points."""

from typing import Any

import torch
from rfdetr.models import _assignment  # pyright: ignore[reportPrivateUsage]
from rfdetr.models.heads.segmentation import point_sample
from rfdetr.models.matcher import HungarianMatcher, _TargetSideSafety  # pyright: ignore[reportPrivateUsage]
from torch.nn.functional import binary_cross_entropy_with_logits

from trainfit.models.rfdetr.packed_masks import PackedMasks

PIECE = 2**21
"""Logits of an image's queries at points in one piece: 8 MiB in float32, and as much for each of the three tensors made of
them. A piece has the same queries of all images, so that there are as many pieces at every micro-batch."""

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

    @torch.no_grad()
    def _precompute_target_side_safety(self, outputs: dict[str, Any], targets: list[dict[str, Any]]) -> Any:
        """What `forward` needs to know of the targets, once for all layers; upstream does so where it needs it."""
        if "masks" not in targets[0]:
            return super()._precompute_target_side_safety(outputs, targets)
        boxes, classes = outputs["pred_boxes"], outputs["pred_logits"].shape[-1]
        safe = self._target_side_precheck(boxes.dtype, boxes.device, classes, targets)
        return _TargetSideSafety(safe, targets, boxes.dtype, boxes.device, classes)

    def _own_mask_costs(
        self, outputs: dict[str, Any], targets: list[dict[str, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy and Dice cost of each query with the objects of its image: (queries, targets of all images)."""
        masks = [target["masks"] for target in targets]
        most = max(map(len, masks))
        # Where an image has fewer masks than another, a mask stands in for those that it does not have.
        numbers = [[min(each.first + n, len(each.bits) - 1) for n in range(most)] for each in masks]
        costs = self._mask_costs(outputs, masks[0].all(), numbers)
        own = [[cost[image, :, : len(each)] for image, each in enumerate(masks)] for cost in costs]
        return torch.cat(own[0], 1), torch.cat(own[1], 1)

    def _mask_costs(
        self, outputs: dict[str, Any], masks: PackedMasks, numbers: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The costs of each image's queries with the masks of its `numbers`, each (images, queries, masks)."""
        head = outputs["pred_masks"]
        spatial, queries = head["spatial_features"], head["query_features"]
        points = self._points.to(torch.promote_types(spatial.dtype, self._points.dtype))
        features = point_sample(spatial, points.expand(len(spatial), -1, -1), align_corners=False)
        shape = len(numbers), len(numbers[0]), points.shape[1]
        chosen = torch.tensor(numbers, dtype=torch.int64, device=spatial.device).flatten()
        labels = masks.at(chosen, self._points).view(shape).to(features.dtype)
        rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        for some in queries.split(max(1, PIECE // points.shape[1]), 1):
            logits = torch.einsum("bcp,bnc->bnp", features, some) + head["bias"]
            rows.append((entropy_costs(logits, labels), dice_costs(logits, labels)))
        if len(rows) == 1:
            return rows[0]
        entropy, dice = zip(*rows, strict=True)
        return torch.cat(entropy, 1), torch.cat(dice, 1)

    def _compute_mask_costs(
        self, outputs: dict[str, Any], targets: list[dict[str, Any]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The costs of all queries with all objects, for what upstream does where one is not finite."""
        masks = targets[0]["masks"].all()
        entropy, dice = self._mask_costs(outputs, masks, [[*range(len(masks))]] * len(targets))
        return entropy.flatten(0, 1), dice.flatten(0, 1)


def entropy_costs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Upstream's `batch_sigmoid_ce_loss` of each image: (images, n, points), (images, m, points) -> (images, n, m)."""
    one, zero = (logits.new_full((), value).expand_as(logits) for value in (1, 0))
    positive = binary_cross_entropy_with_logits(logits, one, reduction="none")
    negative = binary_cross_entropy_with_logits(logits, zero, reduction="none")
    costs = torch.einsum("bnp,bmp->bnm", positive, labels) + torch.einsum("bnp,bmp->bnm", negative, 1 - labels)
    return costs / logits.shape[-1]


def dice_costs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Upstream's `batch_dice_loss` of each image, with shapes as `entropy_costs` has them."""
    shares = logits.sigmoid()
    numerator = 2 * torch.einsum("bnp,bmp->bnm", shares, labels)
    denominator = shares.sum(-1)[:, :, None] + labels.sum(-1)[:, None]
    return 1 - (numerator + 1) / (denominator + 1)
