"""Intervals by cause, each source judged by what others say: the bounds of the package, and those of the other sources' rows.

The package's bounds (`trainfit.memory.errors`) are of a sheet that is none of these sources, so with them every source is left out.
Beside them stands the largest error, taken to both sides, that rows of the same cause have in the other sources here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from benchmarks.public.judge import Pair

HEAD = (
    "| source | quantity | cause | rows | measured over predicted, less 1 | inside | width "
    "| largest error in the other sources | inside | width |"
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows of one source, one cause and one kind of quantity."""

    source: str
    is_allocated: bool
    """Peaks of tensors, which no cache makes larger."""
    cause: str
    pairs: Sequence[Pair]

    @property
    def errors(self) -> list[float]:
        """Above 0: predicted too low."""
        return [row.measured_mib / predicted.likely_mib - 1 for row, predicted in self.pairs]


def groups(pairs: Sequence[Pair]) -> list[Group]:
    """All of them, of runs that succeeded. A device total is the reserved peak of the same run with its context: left out."""
    done = [(row, predicted) for row, predicted in pairs if not row.oom and row.quantity != "device_total"]

    def key(pair: Pair) -> tuple[str, bool, str]:
        row, predicted = pair
        return row.source, row.quantity == "allocated", predicted.cause

    return [
        Group(
            source=source,
            is_allocated=is_allocated,
            cause=cause,
            pairs=[pair for pair in done if key(pair) == (source, is_allocated, cause)],
        )
        for source, is_allocated, cause in sorted({key(pair) for pair in done})
    ]


def largest_elsewhere(group: Group, among: Sequence[Group]) -> float | None:
    """The largest size of an error of the same cause and quantity in other sources; None: no other source has such rows."""
    sizes = [
        abs(error)
        for other in among
        if other.source != group.source and (other.is_allocated, other.cause) == (group.is_allocated, group.cause)
        for error in other.errors
    ]
    return max(sizes, default=None)


def lines(pairs: Sequence[Pair]) -> list[str]:
    """The table as Markdown."""
    found = groups(pairs)
    table = [HEAD, "|" + "---|" * HEAD.count("| ")]
    for group in found:
        errors = group.errors
        cells = [
            group.source,
            "allocated" if group.is_allocated else "reserved",
            group.cause,
            str(len(errors)),
            f"{min(errors):+.1%} to {max(errors):+.1%}",
            *_judged(group.pairs, lambda pair: (pair[1].low_mib, pair[1].high_mib)),
        ]
        largest = largest_elsewhere(group, found)
        if largest is None:
            cells += ["no such rows", "", ""]
        else:
            cells += [f"{largest:.1%}", *_judged(group.pairs, _around(largest))]
        table.append(f"| {' | '.join(cells)} |")
    everything = [pair for group in found for pair in group.pairs]
    inside, width = _judged(everything, lambda pair: (pair[1].low_mib, pair[1].high_mib))
    table.append(f"| **all** |  |  | {len(everything)} |  | {inside} | {width} |  |  |  |")
    return table


def _around(size: float) -> Callable[[Pair], tuple[float, float]]:
    def interval(pair: Pair) -> tuple[float, float]:
        return (1 - size) * pair[1].likely_mib, (1 + size) * pair[1].likely_mib

    return interval


def _judged(pairs: Sequence[Pair], interval: Callable[[Pair], tuple[float, float]]) -> tuple[str, str]:
    """Share inside and median width over the measurement."""
    both = [(row.measured_mib, *interval((row, predicted))) for row, predicted in pairs]
    inside = fmean(low <= measured <= high for measured, low, high in both)
    width = median((high - low) / measured for measured, low, high in both)
    return f"{inside:.1%}", f"{width:.1%}"
