"""What is recorded of a run of a user's loop."""

from dataclasses import dataclass, field

import torch

Gradients = dict[str, torch.Tensor]


@dataclass(kw_only=True, eq=False)
class LoopWindow:
    """What happened up to one optimizer step, since the one before."""

    gradients: Gradients = field(default_factory=dict)
    """Parameter -> its unscaled gradient at the first clip after the last backward, or at the step."""
    groups: list[tuple[str, list[str]]] = field(default_factory=list)
    """(name of an optimizer's group, names of its parameters)."""
    backwards: int = 0
    """Backward passes since the last step."""
    taken: int = 0
    """Batches that the loop had taken at the step, from the beginning of the run."""
    left_over: bool = False
    """Whether gradients of the window before were still there when the optimizer stepped again."""
    cleared: bool = False
    """Whether gradients vanished between two backwards."""
    clips: list[tuple[int, bool]] = field(default_factory=list)
    """(backwards before the clip, whether the gradients were still scaled)."""
    scaled_at_step: bool = False
    """Whether the optimizer stepped on gradients that were still scaled."""
    scales: set[float] = field(default_factory=set)
    """Loss scales in use at the backwards; 1 for a loss that was not scaled."""
    averages: set[int] = field(default_factory=set)
    """Backwards before each update of a moving average of the weights."""
    schedules: dict[int, set[int]] = field(default_factory=dict)
    """Scheduler -> backwards before each of its steps."""
    rates: set[tuple[float, ...]] = field(default_factory=set)
    """Learning rates at the backwards."""
    synchronised: list[bool] = field(default_factory=list)
    """Whether the backward exchanges gradients, for each forward of a DistributedDataParallel with gradients."""


@dataclass(kw_only=True, eq=False)
class Run:
    """One run of the loop."""

    windows: list[LoopWindow]
    """The windows, in order."""
    trailing_backwards: int
    """Backward passes after the last step."""
    taken: int
    """Batches that the loop took."""
    batch_norms: list[str]
    """Kinds of normalisation layers that used statistics of the batch."""
    random: set[str]
    """Operators and modules that drew random numbers."""
    low: bool
    """Whether a part of the loop computed in less than float64."""
    pairs: set[int]
    """Sides of square matrix products, which contrastive losses have."""
    labels: list[tuple[int, int]]
    """(labels, ignored labels) of each cross entropy."""
