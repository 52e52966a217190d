"""The training step: one window's gradient, clip, optimizer step, EMA. Predicted, measured and trained with alike."""

from collections.abc import Sequence
from dataclasses import dataclass
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

    def __post_init__(self) -> None:
        """Make the loss scaler; fp16 alone needs it."""
        self.scaler = grad_scaler(self.precision, self.device.type)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def run(self, window: Sequence[Any], *, micro_batch: int, step: int) -> StepResult:
        """Train on one window: exact gradient, one unscale, one clip, one optimizer step, one EMA update.

        Args:
            window: This rank's samples of the effective batch; may be empty on a rank in the last window of an epoch.
            micro_batch: Images in one forward and backward; the cut does not change the gradient.
            step: Optimizer steps done so far; the EMA's decay depends on it.
        """
        micro_batches = cut(window, micro_batch)
        losses = self._accumulate(micro_batches)
        ranks.sum_gradients(self.parameters)
        if all(p.grad is None for p in self.parameters):  # not one image of the window could be read
            return StepResult(losses=losses, gradient_norm=torch.zeros(()), images=0, micro_batches=0)
        self.scaler.unscale_(self.optimizer)
        limit = self.clip_norm if self.clip_norm > 0 else float("inf")
        gradient_norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            decay, tau = self.ema_settings
            update_ema(self.ema, self.model, ema_decay(step, decay=decay, tau=tau))
        return StepResult(
            losses=losses, gradient_norm=gradient_norm, images=len(window), micro_batches=len(micro_batches)
        )

    def _accumulate(self, micro_batches: Sequence[Sequence[Any]]) -> dict[str, torch.Tensor]:
        if isinstance(self.objective, Contrastive):
            return accumulate_contrastive(
                self.model,
                self.objective,
                micro_batches,
                device=self.device,
                precision=self.precision,
                scaler=self.scaler,
            )
        return accumulate(
            self.model,
            self.objective,
            micro_batches,
            device=self.device,
            precision=self.precision,
            scaler=self.scaler,
        )
