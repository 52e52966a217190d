"""The training step: one window's gradient, clip, optimizer step, EMA. Predicted, measured and trained with alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trainfit.step import ranks
from trainfit.step.contrastive import Contrastive, accumulate_contrastive
from trainfit.step.ema import ema_decay, update_ema
from trainfit.step.names import Precision
from trainfit.step.precision import grad_scaler
from trainfit.step.terms import Objective
from trainfit.step.window import accumulate, cut


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one window did. Tensors stay on the device, so that nothing waits for the GPU until they are read."""

    losses: dict[str, torch.Tensor]
    """This rank's share of the window's loss, by term: they sum over ranks to the window's loss."""
    gradient_norm: torch.Tensor
    """Norm of the whole gradient before clipping; infinite or NaN where the step was skipped (fp16 overflow)."""
    images: int
    """Images of this rank's share."""
    micro_batches: int


@dataclass(kw_only=True)
class TrainingStep:
    """Everything that one optimizer step of one rank touches."""

    model: torch.nn.Module
    objective: Objective | Contrastive
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: Precision = "fp32"
    clip_norm: float = 0.1
    """Largest norm of the window's gradient; 0 turns clipping off."""
    ema: torch.nn.Module | None = None
    ema_settings: tuple[float, float] = (0.993, 100.0)
    """(decay, tau) of `ema_decay`."""
    after_micro_batch: Callable[[int], None] | None = None
    """Called with the number of images after each backward; never for a `Contrastive` objective."""

    def __post_init__(self) -> None:
        """Make the loss scaler; fp16 alone needs it."""
        self.scaler = grad_scaler(self.precision, self.device.type)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._norm = torch.zeros(())
        self._overflow = False
        self._phases: list[Callable[[], None]] = []

    def run(self, window: Sequence[Any], *, micro_batch: int, step: int) -> StepResult:
        """Train on one window: exact gradient, one unscale, one clip, one optimizer step, one EMA update.

        Args:
            window: This rank's samples of the effective batch; may be empty on a rank in the last window of an epoch.
            micro_batch: Images in one forward and backward; the cut does not change the gradient.
            step: Optimizer steps done so far; the EMA's decay depends on it.
        """
        losses = self.gradient(window, micro_batch=micro_batch)
        gradient_norm = self.update(step)
        parts = -(-len(window) // micro_batch)
        return StepResult(losses=losses, gradient_norm=gradient_norm, images=len(window), micro_batches=parts)

    def gradient(self, window: Sequence[Any], *, micro_batch: int) -> dict[str, torch.Tensor]:
        """This rank's gradient of the window, in `.grad`; returns its share of the losses. Changes no parameter."""
        if isinstance(self.objective, Contrastive):
            window_gradient = partial(accumulate_contrastive, self.model, self.objective)
        else:
            watch = self.after_micro_batch
            window_gradient = partial(accumulate, self.model, self.objective, after_micro_batch=watch)
        micro_batches = cut(window, micro_batch)
        return window_gradient(micro_batches, device=self.device, precision=self.precision, scaler=self.scaler)

    def update(self, step: int) -> torch.Tensor:
        """Sum the gradient over the ranks, clip it, step, average, clear it; returns its norm before clipping.

        Each phase happens as a whole or not at all, so after a failure `update` may be called again: it goes on with
        the phases that are left, and the parameters end up as if nothing had failed.
        """
        if not self._phases:
            groups = [partial(self._step_group, group) for group in self.optimizer.param_groups]
            summed = partial(ranks.sum_gradients, self.parameters)
            self._phases = [summed, self._clip, *groups, partial(self._average, step), self._clear]
        while self._phases:
            self._phases[0]()
            del self._phases[0]
        return self._norm

    def _clip(self) -> None:
        self._norm = torch.zeros(())
        if any(p.grad is not None for p in self.parameters):  # else not one image of the window could be read
            self.scaler.unscale_(self.optimizer)
            limit = self.clip_norm if self.clip_norm > 0 else float("inf")
            self._norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self._overflow = self.scaler.is_enabled() and not bool(torch.isfinite(self._norm))

    def _step_group(self, group: dict[str, Any]) -> None:
        """Step one parameter group; fp16's overflow (a norm that is no number) skips it, as `GradScaler.step` would."""
        if self._overflow:
            return
        counters = [c for p in group["params"] if isinstance(c := self.optimizer.state[p].get("step"), torch.Tensor)]
        before = torch.stack(counters) if counters else None
        every, self.optimizer.param_groups = self.optimizer.param_groups, [group]
        try:
            self.optimizer.step()
        except BaseException:
            # The fused kernel updates a group (of one device and dtype) or fails, but torch counts the step before.
            if before is not None:
                torch._foreach_copy_(counters, list(before))  # pyright: ignore[reportPrivateUsage]
            raise
        finally:
            self.optimizer.param_groups = every

    def _average(self, step: int) -> None:
        if self.ema is not None:
            decay, tau = self.ema_settings
            update_ema(self.ema, self.model, ema_decay(step, decay=decay, tau=tau))

    def _clear(self) -> None:
        if self.scaler.is_enabled() and any(p.grad is not None for p in self.parameters):
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
