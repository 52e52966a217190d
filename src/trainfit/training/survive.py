"""Survives out-of-memory errors in a training loop of the user."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from trainfit.errors import TrainfitError
from trainfit.step.names import Precision
from trainfit.step.terms import LossTerm, Objective
from trainfit.step.training_step import StepResult, TrainingStep
from trainfit.training.oom import Survivor
from trainfit.training.parts import items_in, part_of
from trainfit.training.shortage import Survival

Loss = Callable[[torch.nn.Module, Any], torch.Tensor]


class SurvivingStep:
    """One optimizer step on a whole batch, in smaller parts where memory runs out. Made by `trainfit.survive_oom`."""

    def __init__(
        self, loss: Loss, counts: Callable[[Any], float | torch.Tensor], *, mean: bool, survivor: Survivor, **step: Any
    ) -> None:
        """Build the step, without a batch."""
        self._loss = loss
        self._counts = counts
        self._mean = mean
        self._batch: Any = None
        self._items = 0
        self.survivor = survivor
        self.steps = 0
        """Optimizer steps done."""
        objective = Objective(terms=self._terms, counts=self._count, canvas=lambda _: (0, 0))
        self.step = TrainingStep(objective=objective, **step)

    def __call__(self, batch: Any) -> StepResult:
        """Forward, backward, clip, step and zero_grad for a batch on the CPU or the device.

        Raises:
            OutOfMemory: one item alone does not fit; parameters, random numbers and buffers are as before.
        """
        self._batch = batch
        self._items = int(items_in(batch))
        try:
            result = self.survivor.run(self.step, range(self._items), number=self.steps)
        finally:
            self._batch = None
        self.steps += 1
        return result

    @property
    def micro_batch(self) -> int:
        """Present number of items of one part."""
        return self.survivor.micro_batch

    @property
    def survived(self) -> Sequence[Survival]:
        """Every out-of-memory error, and what was done."""
        return self.survivor.survived

    def _part(self, rows: Sequence[int]) -> Any:
        whole = len(rows) == self._items
        return self._batch if whole else part_of(self._batch, slice(rows[0], rows[-1] + 1), self._items)

    def _count(self, rows: Sequence[int]) -> Mapping[str, float]:
        return {"loss": float(self._counts(self._part(rows))) if rows else 0.0}

    def _terms(self, model: torch.nn.Module, rows: Sequence[int], _canvas: Any) -> Mapping[str, LossTerm]:
        part = self._part(rows)
        value = self._loss(model, part)
        if not self._mean:
            return {"loss": LossTerm(total=value, kind="targets")}
        count = float(self._counts(part))
        if not count:
            raise TrainfitError(
                "a part of the batch has a count of 0, and its mean is none: give sums, with reduction='sum'"
            )
        return {"loss": LossTerm(total=value * count, kind="targets")}


def survive_oom(
    loss: Loss,
    *,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batch: int,
    counts: Callable[[Any], float | torch.Tensor] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    clip_norm: float = 0.0,
    precision: Precision = "fp32",
    blocks: Sequence[torch.nn.Module] = (),
) -> SurvivingStep:
    """A step for a loop of your own that survives out-of-memory errors with the same result.

    Each batch of the loader is a whole window. It is cut into parts of `micro_batch` items; where memory runs out, random
    numbers and buffers are put back and the window starts again with half of it, then with activation checkpointing of
    `blocks`. The gradient stays that of the whole batch.

    Args:
        loss: (model, part of the batch) -> scalar; it moves the part to the device.
        model: The model, on its device.
        optimizer: Steps once a batch; a failed step is undone as a whole.
        micro_batch: Items of a part to begin with.
        counts: Part -> what its loss is a mean over; without it, its items.
        reduction: Whether `loss` is a mean over these counts, or a sum.
        clip_norm: Largest norm of the gradient; 0 turns clipping off.
        precision: Autocast of the forward; fp16 comes with its loss scaler.
        blocks: Modules that may be recomputed in backward where nothing else fits.

    Raises:
        TrainfitError: a micro-batch below 1.
    """
    if micro_batch < 1:
        raise TrainfitError(f"micro_batch must be at least 1, not {micro_batch}")
    return SurvivingStep(
        loss,
        counts or items_in,
        mean=reduction == "mean",
        survivor=Survivor(micro_batch, blocks=blocks),
        model=model,
        optimizer=optimizer,
        device=next(model.parameters()).device,
        clip_norm=clip_norm,
        precision=precision,
    )
