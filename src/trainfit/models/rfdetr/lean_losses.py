"""RF-DETR's mask losses in pieces of bounded size: the same values as upstream's, in a fraction of the memory.

Upstream (rfdetr 1.11.2 models/criterion.py `loss_masks`) holds the logits of every matched query at full size until
backward, and a float copy of each target mask for each query group. Here a piece of the logits exists at a time; for
backward the points are kept, and the logits and the labels there. The gradient of bilinear sampling needs the points alone,
so nothing is recomputed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from rfdetr.models.criterion import SetCriterion
from rfdetr.models.heads.segmentation import point_sample
from torch.nn.functional import binary_cross_entropy_with_logits

from trainfit.models.rfdetr.packed_masks import PackedMasks

PIECE = 2**21
"""Mask logits in one piece for each image of the micro-batch: 8 MiB in float32. A micro-batch of any size has as many pieces."""
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
    """Some matched pairs, which are numbered over the micro-batch, image after image."""

    pairs: slice
    """The pairs."""
    images: Sequence[tuple[int, slice]]
    """Each image that has some of them, and which: counted from the first pair of the piece."""


def pieces_of(counts: Sequence[int], pixels: int) -> Iterator[Piece]:
    """Yield pieces that have at most `PIECE` logits (but at least one mask) for each image of the micro-batch.

    Args:
        counts: Number of matched pairs of each image.
        pixels: Logits of one mask.
    """
    ends = list(accumulate(counts))
    most = len(counts) * max(1, PIECE // pixels)
    for first in range(0, ends[-1], most):
        last = min(first + most, ends[-1])
        parts = [
            (image, slice(max(end - count, first) - first, min(end, last) - first))
            for image, (count, end) in enumerate(zip(counts, ends, strict=True))
        ]
        yield Piece(pairs=slice(first, last), images=[(image, part) for image, part in parts if part.start < part.stop])


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
        masks = [target["masks"] for target in targets]
        number = head["query_features"].shape[1]
        sides = [
            torch.cat([queries + image * number for image, (queries, _) in enumerate(indices)]),
            torch.cat([own + part.first for part, (_, own) in zip(masks, indices, strict=True)]),
        ]
        pairs = torch.stack(sides).to(device)
        entropy, dice = PairLosses.apply(  # pyright: ignore[reportGeneralTypeIssues]
            spatial, head["query_features"], head["bias"], pairs, candidates, others, masks[0].all(), counts
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
        masks: PackedMasks,
        counts: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of all pairs, image after image: cross-entropy (pairs,) and Dice (pairs,).

        Args:
            ctx: Autograd's.
            spatial: (images, channels, height, width).
            queries: (images, queries, channels). A mask's logits are the products of its query with `spatial`, plus `bias`.
            bias: (1,).
            pairs: (2, pairs): query and target of each, both counted over the micro-batch.
            candidates: (pairs, 3 points, 2) in 0..1: the most uncertain of these are used.
            others: (pairs, points, 2): points that are always used.
            masks: The targets of all images.
            counts: Pairs of each image.
        """
        saved = SavedForBackward.empty(spatial, candidates, others)
        dtype = product_dtype(spatial, queries)
        flat = spatial.flatten(2).to(dtype)
        for piece in pieces_of(counts, flat.shape[2]):
            own = piece.pairs
            chosen = queries.flatten(0, 1)[pairs[0, own]].to(dtype)
            product = flat.new_empty(len(chosen), flat.shape[2])
            for image, part in piece.images:
                torch.mm(chosen[part], flat[image], out=product[part])
            logits = product.add_(bias) if dtype == bias.dtype else product + bias
            del product
            logits = logits.view(-1, 1, *spatial.shape[2:])
            saved.points[own] = choose_points(logits, candidates[own], others[own])
            saved.values[own] = at_points(logits, saved.points[own])
            del logits
            saved.labels[own] = masks.at(pairs[1, own], saved.points[own])
            saved.entropy[own], saved.dice[own] = losses_of(saved.values[own], saved.labels[own])
        ctx.save_for_backward(spatial, queries, bias, pairs, saved.points, saved.values, saved.labels)
        ctx.counts, ctx.dtype = counts, dtype
        return saved.entropy, saved.dice

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of `spatial`, `queries` and `bias`."""
        spatial, queries, bias, pairs, points, values, labels = ctx.saved_tensors
        flat = spatial.flatten(2).to(ctx.dtype)
        of_spatial = SpatialGradient(spatial, values.dtype, ctx.counts)
        of_queries = torch.zeros_like(queries)
        of_bias = torch.zeros((), dtype=values.dtype, device=values.device)
        for piece in pieces_of(ctx.counts, flat.shape[2]):
            own = piece.pairs
            chosen = queries.flatten(0, 1)[pairs[0, own]].to(ctx.dtype)
            of_values = gradient_of_losses(values[own], labels[own], *(gradient[own] for gradient in gradients))
            of_logits = spread(of_values, points[own], spatial.shape[2:])
            of_bias += of_logits.sum()
            of_product = of_logits.to(ctx.dtype)
            del of_logits
            of_chosen = torch.empty_like(chosen)
            for image, part in piece.images:
                torch.mm(of_product[part], flat[image].T, out=of_chosen[part])
                of_spatial.add(image, chosen[part], of_product[part])
            of_queries.flatten(0, 1)[pairs[0, own]] = of_chosen.to(queries.dtype)
        return of_spatial.result(), of_queries, of_bias.to(bias.dtype).view(bias.shape), None, None, None, None, None


def product_dtype(spatial: torch.Tensor, queries: torch.Tensor) -> torch.dtype:
    """In what autocast, or torch, multiplies the two."""
    kind = spatial.device.type
    dtype = torch.promote_types(spatial.dtype, queries.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


class SpatialGradient:
    """The gradient of the spatial features, whose images get their pairs one after another.

    The products of an image that come in several pieces are added up in `dtype`, one image at a time.
    """

    def __init__(self, spatial: torch.Tensor, dtype: torch.dtype, counts: Sequence[int]) -> None:
        self.gradient = torch.zeros(spatial.shape, dtype=spatial.dtype, device=spatial.device)
        self.counts = counts
        self.dtype = dtype
        self.image = -1
        self.total: torch.Tensor | None = None

    def add(self, image: int, chosen: torch.Tensor, of_product: torch.Tensor) -> None:
        """Add the products of some pairs' queries (pairs, channels) and logits' gradients (pairs, pixels)."""
        own = self.gradient[image].flatten(1)
        if len(chosen) == self.counts[image] and own.dtype == chosen.dtype:
            torch.mm(chosen.T, of_product, out=own)
            return
        if image != self.image:
            self._end()
            self.image, self.total = image, own.to(self.dtype)
        assert self.total is not None
        if self.total.dtype == chosen.dtype:
            self.total.addmm_(chosen.T, of_product)
        else:
            self.total += chosen.T @ of_product  # sums of half-precision products are float32

    def _end(self) -> None:
        if self.total is not None and self.total.dtype != self.gradient.dtype:
            self.gradient[self.image] = self.total.view(self.gradient.shape[1:])
        self.total = None

    def result(self) -> torch.Tensor:
        """The gradient."""
        self._end()
        return self.gradient


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
