"""Measures micro-batch gradients of some windows, for the gradient noise scale."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from trainfit.step import ranks
from trainfit.step.contrastive import Contrastive
from trainfit.step.training_step import StepResult, TrainingStep
from trainfit.training.noise_scale import NoiseSample, sample

EVERY = 32
"""One window in so many is watched: watching one costs some percent of it (benchmarks/watch_overhead.py)."""


def refusal(step: TrainingStep) -> str | None:
    """Why micro-batch gradients of this step say nothing about the noise; None where they do."""
    if isinstance(step.objective, Contrastive):
        return "a contrastive loss couples all images of a window"
    norms = torch.nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]
    if any(isinstance(module, norms) and module.training for module in step.model.modules()):
        return "BatchNorm in training couples the images of a micro-batch"
    return None


class NoiseWatch:
    """Sums the squared norms of a window's micro-batch gradients while backward makes them: no second backward, no copy.

    Blocks that are checkpointed by torch's reentrant way would be seen in parts; trainfit uses the other.
    """

    def __init__(self, step: TrainingStep) -> None:
        """Watch this step; `reason` says why nothing is seen, where that is so."""
        self.step = step
        self.reason = refusal(step)
        self._refused = self.reason is not None
        self._due = False

    @contextmanager
    def window(self, number: int) -> Generator[None]:
        """Around the gradient of window `number`, counted from 0; watches it if it is one to be watched."""
        self._due = not self._refused and number % EVERY == EVERY - 1
        self._images = 0
        self._parts = 0
        self._sum: torch.Tensor | None = None  # made within the gradient, where running out of memory is survived
        if not self._due:
            yield
            return
        self._scale = self.step.scaler.get_scale()
        norms: list[torch.Tensor] = []
        before = self.step.after_micro_batch

        def note(gradient: torch.Tensor) -> None:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=dtype))

        def after_micro_batch(images: int) -> None:
            share = torch.stack(norms).square().sum() / images
            self._sum = share if self._sum is None else self._sum + share
            self._images += images
            self._parts += 1
            norms.clear()
            if before is not None:
                before(images)

        hooks = [p.register_hook(note) for p in self.step.parameters if p.requires_grad]
        self.step.after_micro_batch = after_micro_batch
        try:
            yield
        finally:
            self.step.after_micro_batch = before
            for hook in hooks:
                hook.remove()

    def sample(self, result: StepResult, *, disturbed: bool) -> NoiseSample | None:
        """The noise sample of the window that was just trained; a collective call if it was watched.

        Args:
            result: The window's.
            disturbed: It was started again on this rank (memory ran out), so that parts of it were seen twice.
        """
        if not self._due:
            return None
        # Micro-batch j's share of the window's gradient is g_j b_j / B.
        shares = 0.0 if self._sum is None else float(self._sum)
        values = {"shares": shares / self._scale**2, "images": float(self._images)}
        values |= {"parts": float(self._parts), "bad": float(disturbed or self._images != result.images)}
        total = ranks.sum_over_ranks(values)
        gradient_square = float(result.gradient_norm) ** 2
        if total["bad"] or not torch.isfinite(torch.tensor(gradient_square + total["shares"])):
            return None
        if total["parts"] < 2:
            self.reason = "a window is one micro-batch: there is nothing to compare"
            return None
        return sample(
            shares_square=total["images"] ** 2 * total["shares"],
            gradient_square=gradient_square,
            images=int(total["images"]),
            micro_batches=int(total["parts"]),
        )
