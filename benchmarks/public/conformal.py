"""Intervals calibrated on one half of the models and judged on the other: python -m benchmarks.public.conformal

Split conformal prediction for what a step takes (reserved memory, the rows of xMem and torch-preflight). The score of a row is
measured over predicted less 1; the interval of a class of work runs from the (n + 1) 2.5 % to the (n + 1) 97.5 % smallest
score of the calibrating half, or from its least to its greatest where it has fewer than 39 rows. Models go to a half by the hash of
their name, so that rows of one model are never on both sides. Nothing of this goes into the package: the product's own
interval (`trainfit.memory.errors`) stands beside.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from statistics import fmean, median

from benchmarks.public import preflight_t4, traces, xmem
from benchmarks.public.predictions import Predicted, predict
from benchmarks.public.rows import Row

from trainfit.memory.errors import class_of

MISSED = 0.05
"""Share of rows that may lie outside."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A row, its class and its interval from the product."""

    model: str
    kind: str
    predicted: Predicted
    measured_mib: float

    @property
    def score(self) -> float:
        """Above 0: predicted too low."""
        return self.measured_mib / self.predicted.likely_mib - 1

    @property
    def half(self) -> int:
        """0 or 1, by the name of the model."""
        return int(hashlib.sha256(self.model.encode()).hexdigest()[0] >= "8")


def scored(row: Row) -> Scored | None:
    """None: the run failed, or its step has no trace."""
    if row.oom or row.case is None or row.quantity not in ("reserved", "nvml_minus_start"):
        return None
    stored, predicted = traces.load(row.case), predict(row)
    if stored is None or predicted is None:
        return None
    return Scored(
        model=row.case.arguments["model"],
        kind=class_of(stored.ops).name,
        predicted=predicted,
        measured_mib=row.measured_mib,
    )


def calibrated(rows: Sequence[Scored]) -> tuple[float, float]:
    """The least and greatest score that the interval admits."""
    scores = sorted(row.score for row in rows)
    low = max(1, floor((len(scores) + 1) * MISSED / 2))
    high = min(len(scores), ceil((len(scores) + 1) * (1 - MISSED / 2)))
    return scores[low - 1], scores[high - 1]


def judged(rows: Iterable[Scored], interval: Callable[[Scored], tuple[float, float] | None]) -> str:
    """Rows, share inside, median width."""
    found = [(row, bounds) for row in rows if (bounds := interval(row)) is not None]
    if not found:
        return "no row whose class was calibrated"
    inside = fmean(low <= row.score <= high for row, (low, high) in found)
    return f"{len(found)} rows, {inside:.1%} inside, median width {median(high - low for _, (low, high) in found):.1%}"


def product(row: Scored) -> tuple[float, float]:
    """The package's own interval."""
    likely = row.predicted.likely_mib
    return row.predicted.low_mib / likely - 1, row.predicted.high_mib / likely - 1


def main() -> None:
    """Print both directions, then each model judged by all others."""
    rows = [found for source in (xmem, preflight_t4) for row in source.rows() if (found := scored(row)) is not None]
    for half in (0, 1):
        ours = [row for row in rows if row.half == half]
        print(f"half {half}: {', '.join(sorted({row.model for row in ours}))}")
    print(f"product, all: {judged(rows, product)}")
    for by_class in (True, False):
        for half in (0, 1):
            _print(rows, half, by_class)
    for kind in sorted({row.kind for row in rows}):
        of_kind = [row for row in rows if row.kind == kind]
        bounds = {
            model: calibrated(others)
            for model in {row.model for row in of_kind}
            if (others := [row for row in of_kind if row.model != model])
        }
        print(f"{kind}, each model by the others: {judged(of_kind, lambda row, b=bounds: b.get(row.model))}")


def _print(rows: Sequence[Scored], half: int, by_class: bool) -> None:
    """Calibrate on one half, by class of work or on all rows together, and judge the other."""
    by_kind: dict[str, list[Scored]] = {}
    for row in rows:
        if row.half == half:
            by_kind.setdefault(row.kind * by_class, []).append(row)
    bounds = {kind: calibrated(of_kind) for kind, of_kind in by_kind.items()}
    others = [row for row in rows if row.half != half]
    name = "by class" if by_class else "all classes together"
    print(f"{name}, calibrated on half {half}, judged on the other: ", end="")
    print(judged(others, lambda row: bounds.get(row.kind * by_class)))
    for kind, (low, high) in bounds.items():
        print(f"    {kind or 'all'}: {low:+.1%} to {high:+.1%} from {len(by_kind[kind])} rows")


if __name__ == "__main__":
    main()
