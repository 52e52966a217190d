"""The gradient of a window (the samples of one effective batch on one rank), exact for any cut into micro-batches."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trainfit.step import ranks
from trainfit.step.names import Precision
from trainfit.step.precision import autocast
from trainfit.step.random_state import RandomState
from trainfit.step.terms import LossTerm, Objective, TermsFunction


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
    adds up to the gradient of S / N exactly, if N is known before the first backward. Counts of targets are. `sampled`
    counts are computed by a pass without gradients over all micro-batches but the last, and the pass with gradients draws
    the same random numbers again; the last one keeps its graph, so that it runs once. Gradients must be summed over the
    ranks, not averaged: `exchange.sum_gradients` does it afterwards, or a `GradientExchange` does it during backward if its
    `last_backward` is passed here. The window's sums of `LossTerm.numbers` are added to `numbers`.

    Returns:
        The window's loss by term (scalars on `device`, this rank's share: the sum over the ranks is the window's loss).
    """
    window = [sample for micro_batch in micro_batches for sample in micro_batch]
    size = objective.canvas(window) if window else (0, 0)
    counts = dict(objective.counts(window))  # what normalises each term, over the whole window and all ranks
    parts = [_Part(micro_batch=micro_batch, terms=objective.terms) for micro_batch in micro_batches]
    if objective.samples_counts:
        size = ranks.largest(size)
        count = partial(_count_sampled, model, objective, micro_batches, size, device=device, precision=precision)
        sampled, parts = ranks.together(count)
        counts |= {name: sampled.get(name, 0.0) for name in objective.samples_counts}
    counts = ranks.sum_over_ranks(counts)
    losses: dict[str, torch.Tensor] = {name: torch.zeros((), device=device) for name in counts}
    end = RandomState.now(device) if objective.samples_counts else None
    for number, part in enumerate(parts, 1):
        terms = part.take(model, size, device=device, precision=precision)
        shares = {name: share(name, term, counts, len(part.micro_batch)) for name, term in terms.items()}
        if numbers is not None:
            _add_numbers(numbers, terms)
        del terms
        loss = torch.stack(list(shares.values())).sum()
        with last_backward() if number == len(parts) else nullcontext():
            (scaler.scale(loss) if scaler is not None else loss).backward()
        for name, value in shares.items():
            losses[name] = losses[name] + value.detach()
        if after_micro_batch is not None:
            after_micro_batch(len(part.micro_batch))
    if end is not None:
        end.restore(device)
    return losses


@dataclass(kw_only=True, eq=False)
class _Part:
    """A micro-batch and the function that computes its loss terms."""

    micro_batch: Sequence[Any]
    """Samples on the CPU."""
    terms: TermsFunction
    """Computes the loss terms."""
    random_state: RandomState | None = None
    """Random state to restore before computing the terms; None: the current state."""
    computed: Mapping[str, LossTerm] | None = None
    """The terms with their graph, if they were computed already."""

    def take(
        self, model: torch.nn.Module, size: tuple[int, int], *, device: torch.device, precision: Precision
    ) -> Mapping[str, LossTerm]:
        """Return the terms, and drop the reference to them, so that the caller controls how long their graph lives."""
        computed = self.computed
        self.computed = None
        if computed is not None:
            return computed
        if self.random_state is not None:
            self.random_state.restore(device)
        with autocast(precision, device.type):
            return self.terms(model, self.micro_batch, size)


def _add_numbers(numbers: dict[str, float], terms: Mapping[str, LossTerm]) -> None:
    for term in terms.values():
        _add(numbers, term.numbers)


def _add(totals: dict[str, float], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value


def share(name: str, term: LossTerm, counts: Mapping[str, float], images: int) -> torch.Tensor:
    """One micro-batch's part of the window's normalised loss term.

    A count of zero (a window without targets) divides by one, as one big batch does.
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
) -> tuple[dict[str, float], list[_Part]]:
    """This rank's counts that are known only after a forward, and the micro-batches in the order of their backward.

    All but the last run without gradients first, and draw the same random numbers again later. The last then runs with
    gradients, once, before anything else is allocated: its backward is the first. Buffers (running statistics) are
    updated once per micro-batch.
    """
    totals: dict[str, float] = {}
    parts: list[_Part] = []
    count = objective.count or partial(_counts_of_terms, objective)
    with torch.no_grad(), buffers_restored(model):
        for micro_batch in micro_batches[:-1]:
            random_state = RandomState.now(device)
            with autocast(precision, device.type):
                counts, terms = count(model, micro_batch, size)
            _add(totals, counts)
            parts.append(_Part(micro_batch=micro_batch, terms=terms, random_state=random_state))
    for micro_batch in micro_batches[-1:]:
        with autocast(precision, device.type):
            computed = objective.terms(model, micro_batch, size)
        _add(totals, _counts(computed))
        parts.insert(0, _Part(micro_batch=micro_batch, terms=objective.terms, computed=computed))
    return totals, parts


def _counts_of_terms(
    objective: Objective, model: torch.nn.Module, micro_batch: Sequence[Any], size: tuple[int, int]
) -> tuple[Mapping[str, float], TermsFunction]:
    return _counts(objective.terms(model, micro_batch, size)), objective.terms


def _counts(terms: Mapping[str, LossTerm]) -> dict[str, float]:
    return {name: float(term.count) for name, term in terms.items() if term.count is not None}


@contextmanager
def buffers_restored(model: torch.nn.Module) -> Generator[None]:
    """Context that restores the buffers (BatchNorm's running statistics) on exit."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
