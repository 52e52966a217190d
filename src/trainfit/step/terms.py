"""Loss terms: what a model family gives the step, and what normalises them over a window."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from trainfit.data.samples import Sample

CountKind = Literal["images", "targets", "sampled", "mean"]
"""What normalises a term: `images` and `targets` are known from the samples, before any forward; `sampled` is known only
after one (Mask R-CNN's mask positives); `mean` is a plain scalar loss, weighted by images: a mean of means."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LossTerm:
    """One loss of one micro-batch, not yet normalised."""

    total: torch.Tensor
    """Scalar: weight x the SUM over the micro-batch. For kind `mean`: the micro-batch's mean."""
    kind: CountKind
    count: torch.Tensor | None = None
    """Scalar: the micro-batch's count, for kind `sampled` alone; the others come from `Objective.counts`."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """How a model's losses are computed: the part of a workload that the step needs."""

    terms: Callable[[torch.nn.Module, Sequence[Sample], tuple[int, int]], Mapping[str, LossTerm]]
    """(model, micro-batch, window's canvas (height, width)) -> loss terms by name; moves the samples to the device."""
    counts: Callable[[Sequence[Sample]], Mapping[str, float]]
    """Samples -> the count of every term but the `sampled` ones, by the term's name; for kind `mean` the number of
    images. Additive over samples, and it names every term even for no samples."""
    samples_counts: tuple[str, ...] = ()
    """Names of the terms of kind `sampled`; where there are any, a window costs one forward without gradients more."""
