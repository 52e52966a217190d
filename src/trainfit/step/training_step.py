"""The training step: one window's gradient, clip, optimizer step, EMA. Prediction, measurement and training all use it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from trainfit.step import ranks
from trainfit.step.attempt import attempt
from trainfit.step.contrastive import Contrastive, accumulate_contrastive
from trainfit.step.ema import ema_decay, update_ema
from trainfit.step.exchange import GradientExchange
from trainfit.step.names import Precision
from trainfit.step.precision import grad_scaler, start_scaler
from trainfit.step.terms import Objective
from trainfit.step.units import Unit, by_device_and_dtype, step_unit, units_of
from trainfit.step.window import accumulate, cut


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one window. Tensors stay on the device, so that nothing waits for the GPU until they are read."""

    losses: dict[str, torch.Tensor]
    """This rank's share of the window's loss, by term: the sum over the ranks is the window's loss."""
    gradient_norm: torch.Tensor
    """Norm of the whole gradient before clipping; infinite or NaN if the step was skipped (fp16 overflow)."""
    images: int
    """Images of this rank's share."""
    micro_batches: int
    """Micro-batches that this rank's share was cut into."""
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])
    """This rank's sums of `LossTerm.numbers`."""


@dataclass(kw_only=True, eq=False)
class _Scaled:
    """Parameters of one device and dtype, in the form of the optimizer that `GradScaler.unscale_` takes.

    The scaler keeps a state for each, so that gradients already unscaled are not unscaled again with the others.
    """

    param_groups: list[dict[str, Any]]
    """One group, with the parameters alone."""


@dataclass(kw_only=True)
class TrainingStep:
    """One optimizer step of one rank: model, losses, optimizer and EMA weights."""

    model: torch.nn.Module
    """The model, on the device."""
    objective: Objective | Contrastive
    """Its losses."""
    optimizer: torch.optim.Optimizer
    """Steps once a window, on the window's gradient."""
    device: torch.device
    """Device of the model, and of each micro-batch while it runs."""
    precision: Precision = "fp32"
    """What the forward computes in (autocast); fp16 comes with its loss scaler."""
    clip_norm: float = 0.1
    """Largest norm of the window's gradient; 0 turns clipping off."""
    ema: torch.nn.Module | None = None
    """A copy of the model for the EMA weights; None: none are kept."""
    ema_settings: tuple[float, float] = (0.993, 100.0)
    """(decay, tau) of `ema_decay`."""
    after_micro_batch: Callable[[int], None] | None = None
    """Called with the number of images after each backward; for a `Contrastive` objective also with 0 after each forward of
    the pass without gradients."""
    requests: Callable[[], Mapping[str, float]] = dict
    """Numbers that the collective at a window's end sums over the ranks (for instance whether a rank has to stop); called once
    per window."""

    def __post_init__(self) -> None:
        """Make the loss scaler, which only fp16 needs."""
        self.scaler = grad_scaler(self.precision, self.device.type)
        self.parameters: list[torch.nn.Parameter] = []
        for group in self.optimizer.param_groups:
            self.parameters += group["params"]
        self.skipped_windows = 0
        """Consecutive windows, up to the last, whose step was skipped because the gradient overflowed (fp16 only)."""
        self._norm = torch.zeros(())
        self._overflow = False
        self._phases: list[Callable[[], None]] = []
        self._exchange: GradientExchange | None = None
        if ranks.world_size() > 1:
            start_scaler(self.scaler, self.device)  # allocates now, not in a window before the ranks' first collective
            self._exchange = GradientExchange(self._in_model_order())
            self._exchange.watch_backward()
        self.agreed: dict[str, float] = {}
        self.numbers: dict[str, float] = {}

    def run(self, window: Sequence[Any], *, micro_batch: int, step: int) -> StepResult:
        """Train on one window: exact gradient, one unscale, one clip, one optimizer step, one EMA update.

        Args:
            window: This rank's samples of the effective batch; may be empty on a rank in the last window of an epoch.
            micro_batch: Images in one forward and backward; the cut does not change the gradient.
            step: Optimizer steps done so far; the EMA's decay depends on it.
        """
        losses = self.gradient(window, micro_batch=micro_batch)
        gradient_norm = self.update(step)
        return self.result(losses, gradient_norm, images=len(window), micro_batch=micro_batch)

    def result(
        self, losses: dict[str, torch.Tensor], gradient_norm: torch.Tensor, *, images: int, micro_batch: int
    ) -> StepResult:
        """The result of a window of `images`, from what `gradient` and `update` returned for it."""
        return StepResult(
            losses=losses,
            gradient_norm=gradient_norm,
            images=images,
            micro_batches=-(-images // micro_batch),
            numbers=self.numbers,
        )

    def gradient(self, window: Sequence[Any], *, micro_batch: int) -> dict[str, torch.Tensor]:
        """The window's gradient over all ranks, in `.grad`; returns this rank's share of the losses.

        Changes no parameter. The ranks agree once, at the end: `agreed` then has the sums of `requests`.

        Raises:
            torch.OutOfMemoryError: memory ran out, here or on another rank. All ranks raise.
        """
        if ranks.world_size() == 1:
            losses = self._own_gradient(window, micro_batch, nullcontext)
            self.agreed = dict(self.requests())
            return losses
        exchange = self._exchange
        assert exchange is not None, "make the step after the process group"
        losses, failure = attempt(lambda: self._own_gradient(window, micro_batch, exchange.last_backward))
        self.agreed = exchange.finish(failure, self.requests())
        assert losses is not None
        return losses

    def _own_gradient(
        self, window: Sequence[Any], micro_batch: int, last_backward: Callable[[], AbstractContextManager[None]]
    ) -> dict[str, torch.Tensor]:
        """The gradient of this rank's share."""
        if isinstance(self.objective, Contrastive):
            window_gradient = partial(accumulate_contrastive, self.model, self.objective)
        else:
            self.numbers = {}
            window_gradient = partial(accumulate, self.model, self.objective, numbers=self.numbers)
        start_scaler(self.scaler, self.device)
        return window_gradient(
            cut(window, micro_batch),
            device=self.device,
            precision=self.precision,
            scaler=self.scaler,
            after_micro_batch=self.after_micro_batch,
            last_backward=last_backward,
        )

    def _in_model_order(self) -> list[torch.nn.Parameter]:
        """The optimizer's parameters in the order of the model: the gradients of neighbours are complete together."""
        position = {id(p): number for number, p in enumerate(self.model.parameters())}
        return sorted(self.parameters, key=lambda p: position.get(id(p), len(position)))

    def update(self, step: int) -> torch.Tensor:
        """Unscale and clip the gradient, step, update EMA, clear the gradient; returns its norm before clipping.

        Each phase happens completely or not at all, so that after a failure `update` may be called again: it continues with
        the remaining phases, and the parameters end up as if nothing had failed.

        Raises:
            HalfUpdated: a phase failed and could not be undone.
        """
        if not self._phases:
            self._phases = self._make_phases(step)
        while self._phases:
            self._phases[0]()
            del self._phases[0]
        return self._norm

    def _make_phases(self, step: int) -> list[Callable[[], None]]:
        """The phases of the update. Each changes tensors by one operator, or undoes what it changed.

        An operator may fail before it changes anything, when it allocates; those that end a phase (`_foreach_mul_` and
        others, on tensors of one device and dtype) allocate nothing.
        """
        kinds = by_device_and_dtype(self.parameters)
        phases: list[Callable[[], None]] = []
        if self.scaler.is_enabled():
            phases += [partial(self._unscale, _Scaled(param_groups=[{"params": kind}])) for kind in kinds]
        phases.append(self._compute_norm)
        if self.clip_norm > 0:
            phases += [partial(self._clip, kind) for kind in kinds]
        phases += [partial(self._step_unit, unit) for unit in units_of(self.optimizer)]
        if self.objective.constrain is not None:
            phases.append(partial(self.objective.constrain, self.model))
        return [*phases, partial(self._update_ema, step), self._update_scale, self._clear]

    def _unscale(self, part: _Scaled) -> None:
        if any(p.grad is not None for p in part.param_groups[0]["params"]):
            self.scaler.unscale_(part)  # pyright: ignore[reportArgumentType]

    def _compute_norm(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]  # empty if no image could be read
        self._norm = torch.nn.utils.get_total_norm(gradients)
        self._overflow = self.scaler.is_enabled() and not bool(torch.isfinite(self._norm))

    def _clip(self, parameters: Sequence[torch.Tensor]) -> None:
        if not self._overflow:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, self._norm)

    def _step_unit(self, unit: Unit) -> None:
        """Step one unit; an overflow in fp16 (a norm that is not finite) skips it, as `GradScaler.step` would."""
        if not self._overflow:
            step_unit(self.optimizer, unit)

    def _update_ema(self, step: int) -> None:
        if self.ema is not None:
            decay, tau = self.ema_settings
            update_ema(self.ema, self.model, ema_decay(step, decay=decay, tau=tau))

    def _update_scale(self) -> None:
        if self.scaler.is_enabled() and any(p.grad is not None for p in self.parameters):
            self.scaler.update()

    def _clear(self) -> None:
        self.skipped_windows = self.skipped_windows + 1 if self._overflow else 0
        self.optimizer.zero_grad(set_to_none=True)
