"""Loss terms of a model family, and the counts that normalise them over a window."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

CountKind = Literal["images", "targets", "sampled", "mean"]
"""The count that normalises a term: `images` and `targets` are known from the samples, before any forward; `sampled` is known
only after one (Mask R-CNN's mask positives); `mean` is a plain scalar loss, weighted by images: a mean of means."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossTerm:
    """One loss of one micro-batch, not yet normalised."""

    total: torch.Tensor
    """Scalar: weight x the SUM over the micro-batch. For kind `mean`: the micro-batch's mean."""
    kind: CountKind
    """What normalises it: the window's images, its targets, or what was sampled; mean: it is one already."""
    count: torch.Tensor | None = None
    """Scalar: the micro-batch's count, for kind `sampled` only; the others come from `Objective.counts`."""
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    """Figures of the micro-batch that a run shows besides its losses, by name: they are summed over the window."""


def largest_image(window: Sequence[Any]) -> tuple[int, int]:
    """(height, width) that holds every `image` (3, height, width) of the window."""
    return max(s.image.shape[1] for s in window), max(s.image.shape[2] for s in window)


TermsFunction = Callable[[torch.nn.Module, Sequence[Any], tuple[int, int]], Mapping[str, LossTerm]]
CountFunction = Callable[[torch.nn.Module, Sequence[Any], tuple[int, int]], tuple[Mapping[str, float], TermsFunction]]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How a model's losses are computed: the part of a workload that the step needs. Samples are of the family's own type.

    A loss over all pairs of samples is a `step.contrastive.Contrastive` instead.
    """

    terms: TermsFunction
    """(model, micro-batch, window's canvas (height, width)) -> loss terms by name; moves the samples to the device."""
    counts: Callable[[Sequence[Any]], Mapping[str, float]]
    """Samples -> the count of every term except the `sampled` ones, by the term's name; for kind `mean` the number of
    images. It is additive over samples, and names every term even if there are no samples."""
    samples_counts: tuple[str, ...] = ()
    """Names of the terms of kind `sampled`; if there are any, every micro-batch is counted before the first backward: the last
    by its `terms`, whose graph is kept, the others in a pass without gradients."""
    count: CountFunction | None = None
    """Returns the counts of the `sampled` terms of a micro-batch, drawing the same random numbers as `terms`, and a function to
    call instead of `terms` later, which reuses the samples; called without gradients. None: `terms` is called instead."""
    canvas: Callable[[Sequence[Any]], tuple[int, int]] = largest_image
    """Window -> (height, width) that each of its micro-batches is padded to, however the window is cut. With `sampled` terms,
    which may depend on the canvas, it is the largest over all ranks."""
    constrain: Callable[[torch.nn.Module], None] | None = None
    """Brings parameters back into their bounds after the optimizer's step; it must be idempotent."""
