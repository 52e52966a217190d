"""A window (the samples of one effective batch on one rank) and its gradient, exact for any cut into micro-batches."""

from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
    numbers: dict[str, float] | None = None,
) -> dict[str, torch.Tensor]:
    """Add the window's gradient to `.grad`, equal to that of one big batch (reference R1) on all ranks together.

    Every term is a sum S over the window divided by a count N of the window: backward of S_j / N for each micro-batch j
    adds up to the gradient of S / N exactly, as long as N is final before the first backward. Counts that targets give
    are. `sampled` ones are made so by a pass without gradients, whose random numbers the pass with gradients draws
    again, in the order of the samples. Gradients are to be summed over the ranks, not averaged: `exchange.sum_gradients`
    does it afterwards, a `GradientExchange` whose `last_backward` is given here does it meanwhile. The window's sums of
    `LossTerm.numbers` go into `numbers`.

    Returns:
        The window's loss by term (scalars on `device`, this rank's share: they sum over ranks to the window's loss).
    """
    window = [sample for micro_batch in micro_batches for sample in micro_batch]
    size = objective.canvas(window) if window else (0, 0)
    counts = dict(objective.counts(window))  # what normalises each term, over the whole window and all ranks
    if objective.samples_counts:
        size = ranks.largest(size)
        count = partial(_count_sampled, model, objective, micro_batches, size, device=device, precision=precision)
        sampled = ranks.together(count)
        counts |= {name: sampled.get(name, 0.0) for name in objective.samples_counts}
    counts = ranks.sum_over_ranks(counts)
    losses: dict[str, torch.Tensor] = {name: torch.zeros((), device=device) for name in counts}
    for number, micro_batch in enumerate(micro_batches, 1):
        with autocast(precision, device.type):
            terms = objective.terms(model, micro_batch, size)
        shares = {name: share(name, term, counts, len(micro_batch)) for name, term in terms.items()}
        if numbers is not None:
            _add_numbers(numbers, terms)
        del terms
        loss = torch.stack(list(shares.values())).sum()
        with last_backward() if number == len(micro_batches) else nullcontext():
            (scaler.scale(loss) if scaler is not None else loss).backward()
        for name, value in shares.items():
            losses[name] = losses[name] + value.detach()
        if after_micro_batch is not None:
            after_micro_batch(len(micro_batch))
    return losses


def _add_numbers(numbers: dict[str, float], terms: Mapping[str, LossTerm]) -> None:
    for term in terms.values():
        for name, value in term.numbers.items():
            numbers[name] = numbers.get(name, 0.0) + value


def share(name: str, term: LossTerm, counts: Mapping[str, float], images: int) -> torch.Tensor:
    """One micro-batch's part of the window's normalised loss term.

    A count of zero (a window without a single target) divides by one, as one big batch does.
    """
    if term.kind == "mean":
        return term.total * (images / counts[name])
    return term.total / max(counts[name], 1.0)


def _count_sampled(
    model: torch.nn.Module,
    objective: Objective,
    micro_batches: Sequence[Sequence[Any]],
    size: tuple[int, int],
    *,
    device: torch.device,
    precision: Precision,
) -> dict[str, float]:
    """Counts that only a forward knows, of this rank. Random numbers and buffers are put back, so that the pass with gradients
    draws the same numbers and running statistics move once.
    """
    totals: dict[str, float] = defaultdict(float)
    random = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with torch.no_grad(), buffers_kept(model), random:
        for micro_batch in micro_batches:
            with autocast(precision, device.type):
                found = (objective.count or partial(_counts_of_terms, objective))(model, micro_batch, size)
            for name, value in found.items():
                totals[name] += value
    return totals


def _counts_of_terms(
    objective: Objective, model: torch.nn.Module, micro_batch: Sequence[Any], size: tuple[int, int]
) -> dict[str, float]:
    terms = objective.terms(model, micro_batch, size)
    return {name: float(term.count) for name, term in terms.items() if term.count is not None}


@contextmanager
def buffers_kept(model: torch.nn.Module) -> Generator[None]:
    """Put the buffers (BatchNorm's running statistics) back as they were, whatever happens meanwhile."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
