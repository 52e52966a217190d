"""A window (the samples of one effective batch on one rank) and its gradient, exact for any cut into micro-batches."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from trainfit.step import ranks
from trainfit.step.names import Precision
from trainfit.step.precision import autocast
from trainfit.step.terms import LossTerm, Objective


def cut(window: Sequence[Any], micro_batch: int) -> list[Sequence[Any]]:
    """Cut a window into micro-batches of at most `micro_batch` samples; the last may be smaller."""
    return [window[i : i + micro_batch] for i in range(0, len(window), micro_batch)]


def accumulate(
    model: torch.nn.Module,
    objective: Objective,
    micro_batches: Sequence[Sequence[Any]],
    *,
    device: torch.device,
    precision: Precision = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    after_micro_batch: Callable[[int], None] | None = None,
    last_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, torch.Tensor]:
    """Add the window's gradient to `.grad`, equal to that of one big batch (reference R1) on all ranks together.

    Every term is a sum S over the window divided by a count N of the window: backward of S_j / N for each micro-batch j
    adds up to the gradient of S / N exactly, as long as N is final before the first backward. Counts that targets give
    are; `sampled` ones are made so by a pass without gradients whose random numbers the real pass draws again.
    Gradients are to be summed over the ranks, not averaged: `exchange.sum_gradients` does it afterwards, a
    `GradientExchange` whose `last_backward` is given here does it meanwhile.

    Returns:
        The window's loss by term (scalars on `device`, this rank's share: they sum over ranks to the window's loss).
    """
    window = [sample for micro_batch in micro_batches for sample in micro_batch]
    size = objective.canvas(window) if window else (0, 0)
    counts = dict(objective.counts(window))  # what normalises each term, over the whole window and all ranks
    if objective.samples_counts:
        count = partial(_count_sampled, model, objective, micro_batches, size, device=device, precision=precision)
        sampled = ranks.together(count)
        counts |= {name: sampled.get(name, 0.0) for name in objective.samples_counts}
    counts = ranks.sum_over_ranks(counts)
    losses: dict[str, torch.Tensor] = {name: torch.zeros((), device=device) for name in counts}
    for number, micro_batch in enumerate(micro_batches, 1):
        with autocast(precision, device.type):
            terms = objective.terms(model, micro_batch, size)
        shares = {name: share(name, term, counts, len(micro_batch)) for name, term in terms.items()}
        loss = torch.stack(list(shares.values())).sum()
        with last_backward() if number == len(micro_batches) else nullcontext():
            (scaler.scale(loss) if scaler is not None else loss).backward()
        for name, value in shares.items():
            losses[name] = losses[name] + value.detach()
        if after_micro_batch is not None:
            after_micro_batch(len(micro_batch))
    return losses


def share(name: str, term: LossTerm, counts: Mapping[str, float], images: int) -> torch.Tensor:
    """One micro-batch's part of the window's normalised loss term.

    A count of zero (a window without a single target) divides by one, as one big batch does.
    """
    if term.kind == "mean":
        return term.total * (images / counts[name])
    return term.total / max(counts[name], 1.0)


@torch.no_grad()
def _count_sampled(
    model: torch.nn.Module,
    objective: Objective,
    micro_batches: Sequence[Sequence[Any]],
    size: tuple[int, int],
    *,
    device: torch.device,
    precision: Precision,
) -> dict[str, float]:
    """Counts that only a forward knows. Random numbers and buffers (BatchNorm's running statistics) are put back, so
    that the pass with gradients draws the same numbers and the statistics move once.
    """
    totals: dict[str, float] = defaultdict(float)
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for micro_batch in micro_batches:
            with autocast(precision, device.type):
                terms = objective.terms(model, micro_batch, size)
            for name, term in terms.items():
                if term.count is not None:
                    totals[name] += float(term.count)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return totals
