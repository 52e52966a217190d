"""RF-DETR's mask losses in pieces of bounded size: the same values as upstream's, in a fraction of the memory.

Upstream (rfdetr 1.11.2 models/criterion.py `loss_masks`) holds the logits of every matched query at full size until
backward, and a float copy of each target mask for each query group. Here a piece of the logits exists at a time; for
backward the points are kept, and the logits and the labels there. The gradient of bilinear sampling needs the points alone,
so nothing is recomputed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rfdetr.models.criterion import SetCriterion
from rfdetr.models.heads.segmentation import point_sample
from torch.nn.functional import binary_cross_entropy_with_logits

from trainfit.models.rfdetr.packed_masks import PackedMasks

PIECE = 2**21
"""Mask logits in one piece: 8 MiB in float32."""
OVERSAMPLING = 3
"""Upstream's candidates per point (`loss_masks`)."""
UNCERTAIN = 0.75
"""Share of the points that are the most uncertain candidates (`loss_masks`)."""
BILINEAR = 0
"""`interpolation_mode` of torch's grid sampler."""
BORDER = 1
"""`padding_mode` of torch's grid sampler."""

Indices = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""The matched queries and their targets, for each image."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Matched pairs of one image, numbered over the micro-batch."""

    image: int
    pairs: slice


def pieces_of(counts: Sequence[int], pixels: int) -> Iterator[list[Piece]]:
    """Yield the pieces of each image that has matched pairs, of at most `PIECE` logits (but at least one mask) each.

    Args:
        counts: Number of matched pairs of each image.
        pixels: Logits of one mask.
    """
    first = 0
    most = max(1, PIECE // pixels)
    for image, count in enumerate(counts):
        starts = range(first, first + count, most)
        first += count
        if count:
            yield [Piece(image=image, pairs=slice(start, min(start + most, first))) for start in starts]


class LeanCriterion(SetCriterion):
    """Upstream's criterion for targets whose `masks` are `PackedMasks`."""

    def loss_masks(
        self, outputs: dict[str, Any], targets: list[dict[str, Any]], indices: Any, num_boxes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy and Dice sums over the matched pairs, divided by `num_boxes`, as upstream's method of this name."""
        counts = [len(queries) for queries, _ in indices]
        if not sum(counts):
            return super().loss_masks(outputs, targets, indices, num_boxes)
        head = outputs["pred_masks"]
        spatial: torch.Tensor = head["spatial_features"]
        height, width = spatial.shape[-2:]
        points = max(height, height * width // self.mask_point_sample_ratio)
        device = spatial.device
        candidates = torch.rand(sum(counts), points * OVERSAMPLING, 2, device=device)
        others = torch.rand(sum(counts), points - int(UNCERTAIN * points), 2, device=device)
        pairs = torch.stack([torch.cat(side) for side in zip(*indices, strict=True)]).to(device)
        masks = [target["masks"] for target in targets]
        entropy, dice = PairLosses.apply(  # pyright: ignore[reportGeneralTypeIssues]
            spatial, head["query_features"], head["bias"], pairs, candidates, others, masks, counts
        )
        return {"loss_mask_ce": entropy.sum() / num_boxes, "loss_mask_dice": dice.sum() / num_boxes}


@dataclass(frozen=True, kw_only=True, eq=False)
class SavedForBackward:
    """Values of all pairs that backward needs, and the losses; filled piece by piece."""

    points: torch.Tensor
    """float32 (pairs, points, 2) in 0..1."""
    values: torch.Tensor
    """(pairs, points): logits at the points."""
    labels: torch.Tensor
    """bool (pairs, points): the target mask at the points."""
    entropy: torch.Tensor
    """(pairs,)."""
    dice: torch.Tensor
    """(pairs,)."""

    @classmethod
    def empty(cls, spatial: torch.Tensor, candidates: torch.Tensor, others: torch.Tensor) -> "SavedForBackward":
        """Allocate the tensors for the pairs and points of `PairLosses.forward`."""
        pairs = len(candidates)
        points = candidates.shape[1] // OVERSAMPLING
        dtype = torch.promote_types(spatial.dtype, torch.float32)
        return cls(
            points=others.new_empty(pairs, points, 2),
            values=spatial.new_empty(pairs, points, dtype=dtype),
            labels=spatial.new_empty(pairs, points, dtype=torch.bool),
            entropy=spatial.new_empty(pairs, dtype=torch.float32),
            dice=spatial.new_empty(pairs, dtype=dtype),
        )


class PairLosses(torch.autograd.Function):
    """The two losses of each matched pair."""

    @staticmethod
    def forward(
        ctx: Any,
        spatial: torch.Tensor,
        queries: torch.Tensor,
        bias: torch.Tensor,
        pairs: torch.Tensor,
        candidates: torch.Tensor,
        others: torch.Tensor,
        masks: Sequence[PackedMasks],
        counts: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of all pairs, image after image: cross-entropy (pairs,) and Dice (pairs,).

        Args:
            ctx: Autograd's.
            spatial: (images, channels, height, width).
            queries: (images, queries, channels). A mask's logits are the products of its query with `spatial`, plus `bias`.
            bias: (1,).
            pairs: (2, pairs): query and target of each, both counted within their image.
            candidates: (pairs, 3 points, 2) in 0..1: the most uncertain of these are used.
            others: (pairs, points, 2): points that are always used.
            masks: The targets of each image.
            counts: Pairs of each image.
        """
        saved = SavedForBackward.empty(spatial, candidates, others)
        for pieces in pieces_of(counts, spatial[0, 0].numel()):
            for piece in pieces:
                own = piece.pairs
                chosen = pairs[:, own]
                product = queries[piece.image][chosen[0]] @ spatial[piece.image].flatten(1)
                ctx.product_dtype = product.dtype
                logits = product.add_(bias) if product.dtype == bias.dtype else product + bias
                del product
                logits = logits.view(-1, 1, *spatial.shape[2:])
                saved.points[own] = choose_points(logits, candidates[own], others[own])
                saved.values[own] = at_points(logits, saved.points[own])
                del logits
                saved.labels[own] = masks[piece.image].at(chosen[1], saved.points[own])
                saved.entropy[own], saved.dice[own] = losses_of(saved.values[own], saved.labels[own])
        ctx.save_for_backward(spatial, queries, bias, pairs, saved.points, saved.values, saved.labels)
        ctx.counts = counts
        return saved.entropy, saved.dice

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of `spatial`, `queries` and `bias`."""
        spatial, queries, bias, pairs, points, values, labels = ctx.saved_tensors
        dtype = ctx.product_dtype
        of_spatial = torch.zeros(spatial.shape, dtype=spatial.dtype, device=spatial.device)
        of_queries = torch.zeros_like(queries)
        of_bias = torch.zeros((), dtype=values.dtype, device=values.device)
        for pieces in pieces_of(ctx.counts, spatial[0, 0].numel()):
            image = pieces[0].image
            flat = spatial[image].flatten(1).to(dtype)
            total = of_spatial[image].flatten(1).to(values.dtype)  # sums of half-precision products are float32
            for piece in pieces:
                chosen = pairs[0, piece.pairs]
                own = [gradient[piece.pairs] for gradient in gradients]
                of_values = gradient_of_losses(values[piece.pairs], labels[piece.pairs], *own)
                of_logits = spread(of_values, points[piece.pairs], spatial.shape[2:])
                of_bias += of_logits.sum()
                of_product = of_logits.to(dtype)
                del of_logits
                of_queries[image][chosen] = (of_product @ flat.T).to(queries.dtype)
                if total.dtype == dtype:
                    total.addmm_(queries[image][chosen].T, of_product)
                else:
                    total += queries[image][chosen].to(dtype).T @ of_product
            of_spatial[image] = total.view(spatial.shape[1:])
        return of_spatial, of_queries, of_bias.to(bias.dtype).view(bias.shape), None, None, None, None, None


def at_points(logits: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values of `logits` (n, 1, height, width) at `points` (n, p, 2): (n, p)."""
    points = points.to(torch.promote_types(logits.dtype, points.dtype))
    return point_sample(logits, points, align_corners=False).squeeze(1)


def choose_points(logits: torch.Tensor, candidates: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The candidates (n, c, 2) where the logits (n, 1, height, width) are nearest to zero, then `others` (n, p, 2).

    As many as upstream takes (rfdetr 1.11.2 models/heads/segmentation.py `get_uncertain_point_coords_with_randomness`).
    """
    uncertain = int(UNCERTAIN * (candidates.shape[1] // OVERSAMPLING))
    best = torch.topk(-at_points(logits, candidates).abs(), k=uncertain, dim=1)[1]
    return torch.cat([candidates.gather(1, best[:, :, None].expand(-1, -1, 2)), others], 1)


def losses_of(values: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and Dice loss of each pair from logits and labels (pairs, points).

    As upstream's `sigmoid_ce_loss` and `dice_loss`; labels are float32, which makes the cross-entropy of float64 logits float32.
    """
    truth = labels.float()
    entropy = binary_cross_entropy_with_logits(values, truth, reduction="none").mean(1)
    share = values.sigmoid()
    numerator = 2 * (share * truth).sum(-1)
    denominator = share.sum(-1) + truth.sum(-1)
    return entropy, 1 - (numerator + 1) / (denominator + 1)


def gradient_of_losses(
    values: torch.Tensor, labels: torch.Tensor, of_entropy: torch.Tensor, of_dice: torch.Tensor
) -> torch.Tensor:
    """Gradient of `losses_of` by the logits, for the gradients (pairs,) by its two results: (pairs, points)."""
    truth = labels.float()
    share = values.sigmoid()
    numerator = 2 * (share * truth).sum(-1) + 1
    denominator = share.sum(-1) + truth.sum(-1) + 1
    of_ratio = -of_dice / denominator
    of_share = truth * (2 * of_ratio)[:, None] - (of_ratio * numerator / denominator)[:, None]
    of_values = (share - truth) * (of_entropy / values.shape[1])[:, None]
    return of_values.add_(of_share.mul_(share * (1 - share)))


def spread(of_values: torch.Tensor, points: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Gradient of bilinear sampling by what was sampled: (n, points) at `points` (n, points, 2) -> (n, height x width)."""
    grid = 2.0 * points.to(of_values.dtype)[:, :, None] - 1.0
    # The sampled values affect only the gradient by the points, which is not needed: a single zero stands for all.
    sampled = of_values.new_zeros(()).expand(len(points), 1, *size)
    mask = [True, False]
    gradient, _ = torch.ops.aten.grid_sampler_2d_backward(
        of_values[:, None, :, None], sampled, grid, BILINEAR, BORDER, False, mask
    )
    return gradient.flatten(1)
