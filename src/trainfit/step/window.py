"""A window (the samples of one effective batch on one rank) and its gradient, exact for any cut into micro-batches."""

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
    adds up to the gradient of S / N exactly, as long as N is final before the first backward. Counts that targets give
    are. `sampled` ones are made so by a pass without gradients over all micro-batches but the last, whose random numbers
    the pass with gradients draws again; the last one keeps its graph, so that it runs once. Gradients are to be summed
    over the ranks, not averaged: `exchange.sum_gradients` does it afterwards, a `GradientExchange` whose
    `last_backward` is given here does it meanwhile. The window's sums of `LossTerm.numbers` go into `numbers`.

    Returns:
        The window's loss by term (scalars on `device`, this rank's share: they sum over ranks to the window's loss).
    """
    window = [sample for micro_batch in micro_batches for sample in micro_batch]
    size = objective.canvas(window) if window else (0, 0)
    counts = dict(objective.counts(window))  # what normalises each term, over the whole window and all ranks
    turns = [_Turn(micro_batch=micro_batch, terms=objective.terms) for micro_batch in micro_batches]
    if objective.samples_counts:
        size = ranks.largest(size)
        count = partial(_count_sampled, model, objective, micro_batches, size, device=device, precision=precision)
        sampled, turns = ranks.together(count)
        counts |= {name: sampled.get(name, 0.0) for name in objective.samples_counts}
    counts = ranks.sum_over_ranks(counts)
    losses: dict[str, torch.Tensor] = {name: torch.zeros((), device=device) for name in counts}
    end = RandomState.now(device) if objective.samples_counts else None
    for number, turn in enumerate(turns, 1):
        terms = turn.take(model, size, device=device, precision=precision)
        shares = {name: share(name, term, counts, len(turn.micro_batch)) for name, term in terms.items()}
        if numbers is not None:
            _add_numbers(numbers, terms)
        del terms
        loss = torch.stack(list(shares.values())).sum()
        with last_backward() if number == len(turns) else nullcontext():
            (scaler.scale(loss) if scaler is not None else loss).backward()
        for name, value in shares.items():
            losses[name] = losses[name] + value.detach()
        if after_micro_batch is not None:
            after_micro_batch(len(turn.micro_batch))
    if end is not None:
        end.restore(device)
    return losses


@dataclass(kw_only=True, eq=False)
class _Turn:
    """A micro-batch before its backward."""

    micro_batch: Sequence[Any]
    terms: TermsFunction
    before: RandomState | None = None
    """The random numbers that its terms draw; None: those that come next."""
    made: Mapping[str, LossTerm] | None = None
    """Its terms with their graph, where they are there already."""

    def take(
        self, model: torch.nn.Module, size: tuple[int, int], *, device: torch.device, precision: Precision
    ) -> Mapping[str, LossTerm]:
        """The terms, which are the caller's alone from then on: nothing else holds their graph."""
        made, self.made = self.made, None
        if made is not None:
            return made
        if self.before is not None:
            self.before.restore(device)
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
) -> tuple[dict[str, float], list[_Turn]]:
    """Counts that only a forward knows, of this rank, and the micro-batches as they are to be trained on.

    All but the last run without gradients first, and later draw the random numbers again that they drew here. The last
    then runs with gradients, once, while nothing else is there: its turn is the first. Buffers (running statistics)
    move once a micro-batch.
    """
    totals: dict[str, float] = {}
    turns: list[_Turn] = []
    with torch.no_grad(), buffers_kept(model):
        for micro_batch in micro_batches[:-1]:
            before = RandomState.now(device)
            with autocast(precision, device.type):
                found, terms = (objective.count or partial(_counts_of_terms, objective))(model, micro_batch, size)
            _add(totals, found)
            turns.append(_Turn(micro_batch=micro_batch, terms=terms, before=before))
    for micro_batch in micro_batches[-1:]:
        with autocast(precision, device.type):
            made = objective.terms(model, micro_batch, size)
        _add(totals, _counts(made))
        turns.insert(0, _Turn(micro_batch=micro_batch, terms=objective.terms, made=made))
    return totals, turns


def _counts_of_terms(
    objective: Objective, model: torch.nn.Module, micro_batch: Sequence[Any], size: tuple[int, int]
) -> tuple[Mapping[str, float], TermsFunction]:
    return _counts(objective.terms(model, micro_batch, size)), objective.terms


def _counts(terms: Mapping[str, LossTerm]) -> dict[str, float]:
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
