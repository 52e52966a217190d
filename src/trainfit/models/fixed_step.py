"""Steps on one fixed window: what is traced and measured. Training runs the same `TrainingStep` on data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from trainfit.models.setting import Setting
from trainfit.step.checkpointing import checkpoint_first, repeated_blocks
from trainfit.step.contrastive import Contrastive
from trainfit.step.ema import averaged_copy
from trainfit.step.optimizer import make_optimizer
from trainfit.step.precision import autocast, resolve_precision
from trainfit.step.terms import Objective
from trainfit.step.training_step import TrainingStep


@dataclass(kw_only=True)
class FixedStep:
    """A training step with its worst window, or the evaluation that follows it; a `tracing.trace.Step`."""

    training: TrainingStep
    window: Sequence[Any]
    """Samples on the CPU."""
    micro_batch: int
    blocks: int = 0
    """Blocks that activation checkpointing may compute again."""
    evaluate: Callable[[], object] | None = None
    """What every `run` but the first does, if it is not training. So optimizer state and averaged weights are there, and the
    allocator holds what training left to it."""
    model: torch.nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    ema: torch.nn.Module | None = field(init=False)

    def __post_init__(self) -> None:
        """Show what a trace looks at."""
        self.trained = False
        self.model, self.optimizer, self.ema = self.training.model, self.training.optimizer, self.training.ema

    def run(self) -> object:
        """Train one window; or evaluate."""
        if self.evaluate is not None and self.trained:
            return self.evaluate()
        self.trained = True
        return self.training.run(self.window, micro_batch=self.micro_batch, step=0)


def fixed_step(
    setting: Setting,
    device: torch.device,
    *,
    model: torch.nn.Module,
    objective: Objective | Contrastive,
    window: Sequence[Any],
    groups: Callable[[torch.nn.Module], list[dict[str, Any]]] | None = None,
    blocks: Callable[[torch.nn.Module], Sequence[torch.nn.Module]] = repeated_blocks,
) -> FixedStep:
    """Move a model that was built on the CPU, and give it optimizer and EMA copy as training does.

    Args:
        setting: Precision, optimizer, EMA and micro-batch are taken from it.
        device: Where the step runs.
        model: In train mode, on the CPU.
        objective: Its losses.
        window: CPU samples of one effective batch.
        groups: Model on the device -> optimizer groups; by default all trainable parameters in one.
        blocks: Model -> what activation checkpointing computes again, in order.
    """
    parts = blocks(model)
    checkpoint_first(parts, setting.checkpointing)
    model.to(device)
    own = groups(model) if groups else [{"params": [p for p in model.parameters() if p.requires_grad]}]
    training = TrainingStep(
        model=model,
        objective=objective,
        optimizer=make_optimizer(setting.optimizer, [{"lr": 1e-4, **group} for group in own]),
        device=device,
        precision=resolve_precision(setting.precision, device),
        ema=averaged_copy(model, on_host=setting.ema_on_host) if setting.keeps_ema else None,
    )
    return FixedStep(training=training, window=window, micro_batch=setting.micro_batch, blocks=len(parts))


def fixed_evaluation(
    setting: Setting, step: FixedStep, detect: Callable[[torch.nn.Module, Sequence[Any]], object], sample: Any
) -> FixedStep:
    """One window of `step`, then evaluation of `sample`, repeated to the setting's evaluation micro-batch.

    `detect`: (model in eval mode, micro-batch) -> what is found; runs without gradients under the setting's precision.
    """
    samples = [sample] * (setting.eval_micro_batch or setting.micro_batch)
    return replace(step, evaluate=partial(_evaluate, step.training, detect, samples))


@torch.no_grad()
def _evaluate(
    step: TrainingStep, detect: Callable[[torch.nn.Module, Sequence[Any]], object], samples: Sequence[Any]
) -> object:
    """Evaluate one micro-batch with the averaged weights, where there are any."""
    model = step.ema or step.model
    home = next(model.parameters()).device
    model.to(step.device)  # from the host, where the average is there
    was_training = model.training
    model.eval()
    with autocast(step.precision, step.device.type):
        found = detect(model, samples)
    model.train(was_training)
    model.to(home)
    return found
