"""Chooses the micro-batches to measure, as few as possible to find the knee. Pure functions over predictions and trials."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainfit.memory.predict import Verdict

WITHIN = 0.03
"""The knee is the smallest micro-batch whose speed is at most this below the best."""
AGREES = 0.05
"""Relative difference from which a measured peak below the prediction means that a larger micro-batch may fit."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The prediction for a trial."""

    verdict: Verdict
    """Whether the training step fits, without evaluation."""
    allocated_bytes: int
    """Peak of the allocated memory, with every unknown at its smallest."""
    reserved_low_bytes: int
    """Peak of the reserved memory, with every unknown at its smallest."""
    reserved_high_bytes: int
    """Peak of the reserved memory, with every unknown at its largest."""
    images_per_s: float | None
    """Speed; None for a card without known rates."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The result of one trial: a setting that ran at one micro-batch in a clean process."""

    micro_batch: int
    """The micro-batch that was tried."""
    outcome: Literal["ran", "out of memory", "died"]
    """Whether it ran; died: the process ended without a result."""
    message: str | None = None
    """Reason why it did not run."""
    images_per_s: float | None = None
    """Images per second, the median of the timed windows; None if it did not run."""
    slowest: float | None = None
    """Images per second of the slowest timed window."""
    fastest: float | None = None
    """Images per second of the fastest timed window."""
    windows: int = 0
    """Number of timed windows."""
    allocated_bytes: int | None = None
    """Peak of the memory that tensors hold, up to the failure if there was one; None on the CPU."""
    requested_bytes: int | None = None
    """Peak of the allocated memory before the allocator's rounding; None on the CPU."""
    reserved_bytes: int | None = None
    """Peak of the memory that the caching allocator took from the driver; None on the CPU."""
    context_bytes: int | None = None
    """Memory of the process on the card besides the reserved memory; None on the CPU."""
    retries: int | None = None
    """Number of times that the allocator had to empty its cache; None on the CPU."""
    predicted: Predicted | None = None
    """The prediction for this trial; None on the CPU, and for a step that cannot be predicted."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Measured":
        """Read what `dataclasses.asdict` returned."""
        predicted = record["predicted"]
        values: dict[str, Any] = {**record, "predicted": Predicted(**predicted) if predicted else None}
        return cls(**values)


def speeds(rows: Sequence[Measured]) -> dict[int, float]:
    """Micro-batch -> images per second, for the trials that ran."""
    return {row.micro_batch: row.images_per_s for row in rows if row.images_per_s is not None}


def knee(images_per_s: Mapping[int, float]) -> int | None:
    """The smallest micro-batch within 3 % of the best speed: beyond it, more memory brings almost no speed. None without
    speeds.
    """
    best = max(images_per_s.values(), default=0.0)
    return min((size for size, speed in images_per_s.items() if speed >= (1 - WITHIN) * best), default=None)


def forecast(predict: Callable[[int], Predicted | None], most: int) -> tuple[int | None, int | None]:
    """The predicted largest micro-batch that may fit, of the powers of two up to `most`, and the predicted knee."""
    speed_of: dict[int, float | None] = {}
    size = 1
    while size <= most and (each := predict(size)) is not None and each.verdict != "does not fit":
        speed_of[size] = each.images_per_s
        size *= 2
    return max(speed_of, default=None), knee({size: speed for size, speed in speed_of.items() if speed is not None})


def next_micro_batch(rows: Sequence[Measured], *, first: int, predicted_knee: int | None, most: int) -> int | None:
    """The micro-batch to try next, or None if more trials would not change the knee.

    The first is the largest that is predicted to fit: it is halved until one fits, and doubled while it needs less than
    predicted. Then the predicted knee is tried, then the neighbours of the measured one, until both agree.
    """
    tried = {row.micro_batch: row for row in rows}
    ran = speeds(rows)
    best = knee(ran)
    if not tried:
        return first
    if best is None:
        return min(tried) // 2 or None
    row = tried[max(ran)]
    needs_less = (
        row.predicted is not None and (row.reserved_bytes or 0) < (1 - AGREES) * row.predicted.reserved_low_bytes
    )
    is_limit = max(ran) < max(tried) or (row.predicted is not None and not needs_less)
    top = max(ran) if is_limit else min(2 * max(ran), most)
    candidates = [*([top] if needs_less else []), predicted_knee or 0, best // 2, 2 * best]
    return next((size for size in candidates if 1 <= size <= top and size not in tried), None)


def search(
    trial: Callable[[int], Measured], predict: Callable[[int], Predicted | None], *, start: int, most: int
) -> Iterator[Measured]:
    """Yield each trial as it ends. `start` is the first micro-batch if nothing can be predicted."""
    largest, predicted_knee = forecast(predict, most)
    rows: list[Measured] = []
    first = largest or start
    while (size := next_micro_batch(rows, first=first, predicted_knee=predicted_knee, most=most)) is not None:
        rows.append(trial(size))
        yield rows[-1]
