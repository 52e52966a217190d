"""Which micro-batches to try, the fewest that tell the knee. Pure functions over what was predicted and measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainfit.memory.predict import Verdict

WITHIN = 0.03
"""The knee is the smallest micro-batch whose speed is at most this below the best."""
AGREES = 0.05
"""A measured peak that is lower than predicted by more leaves room that the prediction did not see."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What the prediction says of a trial."""

    verdict: Verdict
    """Of the training step alone."""
    allocated_bytes: int
    """Peak, with every unknown at its smallest."""
    reserved_low_bytes: int
    """Peak of the caching allocator, with every unknown at its smallest."""
    reserved_high_bytes: int
    """With every unknown at its largest."""
    images_per_s: float | None
    """None for a card whose rates are not known."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One trial."""

    micro_batch: int
    outcome: Literal["ran", "out of memory", "died"]
    """died: the process ended without an answer."""
    message: str | None = None
    """Why it did not run."""
    images_per_s: float | None = None
    """Median of the timed windows; None if it did not run."""
    slowest: float | None = None
    """Images/s of the slowest timed window."""
    fastest: float | None = None
    windows: int = 0
    """That were timed."""
    allocated_bytes: int | None = None
    """Peak of the process, up to the failure if there was one; None on the CPU."""
    requested_bytes: int | None = None
    """The same before the allocator's rounding."""
    reserved_bytes: int | None = None
    """The same of what the caching allocator held."""
    context_bytes: int | None = None
    """What the process held of the card beside that."""
    retries: int | None = None
    """How often the allocator had to empty its cache."""
    predicted: Predicted | None = None
    """None on the CPU, and for a step that cannot be predicted."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Measured":
        """What `dataclasses.asdict` gave."""
        said = record["predicted"]
        known: dict[str, Any] = {**record, "predicted": Predicted(**said) if said else None}
        return cls(**known)


def speeds(rows: Sequence[Measured]) -> dict[int, float]:
    """Micro-batch -> images/s of those that ran."""
    return {row.micro_batch: row.images_per_s for row in rows if row.images_per_s is not None}


def knee(images_per_s: Mapping[int, float]) -> int | None:
    """The smallest micro-batch within 3 % of the best speed: beyond it memory buys next to nothing. None of none."""
    best = max(images_per_s.values(), default=0.0)
    return min((size for size, speed in images_per_s.items() if speed >= (1 - WITHIN) * best), default=None)


def forecast(predict: Callable[[int], Predicted | None], most: int) -> tuple[int | None, int | None]:
    """The largest micro-batch that may fit, of the powers of two up to `most`, and the knee among them; as predicted."""
    found: dict[int, float | None] = {}
    size = 1
    while size <= most and (each := predict(size)) is not None and each.verdict != "does not fit":
        found[size] = each.images_per_s
        size *= 2
    return max(found, default=None), knee({size: speed for size, speed in found.items() if speed is not None})


def next_micro_batch(rows: Sequence[Measured], *, first: int, predicted_knee: int | None, most: int) -> int | None:
    """What to try next, or None when more would tell nothing new.

    `first` is the largest that is predicted to fit: halved until it does, and doubled while it needs less than predicted.
    Then the predicted knee, then the neighbours of the measured one: agreement ends the search, disagreement prolongs it.
    """
    tried = {row.micro_batch: row for row in rows}
    ran = speeds(rows)
    best = knee(ran)
    if not tried:
        return first
    if best is None:
        return min(tried) // 2 or None
    row = tried[max(ran)]
    spare = row.predicted is not None and (row.reserved_bytes or 0) < (1 - AGREES) * row.predicted.reserved_low_bytes
    bound = max(ran) < max(tried) or (row.predicted is not None and not spare)
    top = max(ran) if bound else min(2 * max(ran), most)
    wanted = [*([top] if spare else []), predicted_knee or 0, best // 2, 2 * best]
    return next((size for size in wanted if 1 <= size <= top and size not in tried), None)


def search(
    trial: Callable[[int], Measured], predict: Callable[[int], Predicted | None], *, start: int, most: int
) -> Iterator[Measured]:
    """Each trial as it ends. `start`: where to begin if nothing can be predicted."""
    largest, predicted_knee = forecast(predict, most)
    rows: list[Measured] = []
    first = largest or start
    while (size := next_micro_batch(rows, first=first, predicted_knee=predicted_knee, most=most)) is not None:
        rows.append(trial(size))
        yield rows[-1]
