"""Trains the worst window before the first one: a run that will not fit fails in its first minute, not at step 4000."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.workload import TrainableWorkload
from trainfit.step.training_step import TrainingStep
from trainfit.training.evaluation import evaluating, outputs_of
from trainfit.training.loader import groups_of
from trainfit.training.oom import Halving, Survivor, snapshot

WHERE = "worst window"


def rehearse(
    step: TrainingStep,
    survivor: Survivor,
    in_parts: Halving,
    workload: TrainableWorkload,
    records: Sequence[Any],
    *,
    size: int,
    share: int,
    number: int,
    force: bool = False,
) -> None:
    """Train on the worst window and evaluate one micro-batch, then put everything back as it was, bit for bit.

    The window has the records that need most memory, of the first one's group, all at `size`, and as many as need two
    micro-batches: in the second the gradients are there already. Real losses, backward and update, so the ladder works
    here as it does later. Parameters, buffers, EMA weights and optimizer state wait in host memory meanwhile. It costs
    about one window. Without a GPU nothing is done unless `force`: there is no device memory to run out of.

    Args:
        step: The step that training runs.
        survivor: What it leaves of the micro-batch, training begins with.
        in_parts: The same for evaluation.
        workload: Makes samples, and outputs of them.
        records: Training records, in the order of the memory that they need, the most first (`Task.worst_first`).
        size: The largest size that training draws.
        share: Images of this rank in a window, at most.
        number: Optimizer steps done so far.
        force: On the CPU too.

    Raises:
        OutOfMemory: the ladder is exhausted, here or on another rank; all ranks raise.
    """
    if step.device.type != "cuda" and not force:
        return
    decode = workload.decoder()
    groups = groups_of(workload, records)
    alike = [record for record, group in zip(records, groups, strict=True) if group == groups[0]] if groups else records

    def worst(side: int, count: int) -> list[Any]:
        samples: list[Any] = []
        for record in alike:
            if len(samples) < count:
                with suppress(TrainfitError):  # an image that cannot be decoded is reported when its own window comes
                    samples.append(decode(record, size=side, augment=frozenset(), generator=torch.Generator()))
        return (samples * count)[:count]

    def evaluate() -> None:
        model = step.ema or step.model
        with evaluating(model, step.device):
            action = partial(outputs_of, model, workload, precision=step.precision, device=step.device)
            in_parts(action, worst(workload.eval_size, in_parts.micro_batch), step=number, where=WHERE)

    restore = keep(step)
    try:
        survivor.run(step, worst(size, min(share, 2 * survivor.micro_batch)), number=number, where=WHERE)
        in_parts.on_all_ranks(evaluate, step=number, where=WHERE)
    finally:
        restore()


def keep(step: TrainingStep) -> Callable[[], None]:
    """Copy everything that a window changes to the host; the returned function restores it in place."""
    slots = [(own, dict(own)) for own in step.optimizer.state.values()]
    known = set(step.optimizer.state)
    values: list[Any] = [value for _, before in slots for value in before.values()]
    for module in (step.model, step.ema):
        values += module.state_dict().values() if module else ()
    copies = [(value, value.detach().to("cpu", copy=True)) for value in values if isinstance(value, torch.Tensor)]
    scaler = step.scaler.state_dict()
    skipped_windows = step.skipped_windows
    restore_state = snapshot(step.model, step.device)

    def restore() -> None:
        for own, before in slots:
            own.clear()
            own.update(before)
        for parameter in set(step.optimizer.state) - known:
            del step.optimizer.state[parameter]
        with torch.no_grad():
            for value, before in copies:
                value.copy_(before)
        step.scaler.load_state_dict(scaler)
        step.skipped_windows = skipped_windows
        step.optimizer.zero_grad(set_to_none=True)
        restore_state()

    return restore
