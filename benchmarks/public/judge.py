"""Figures of a set of rows: errors, shares, intervals, verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np
from benchmarks.public.predictions import Predicted
from benchmarks.public.rows import Row

Pair = tuple[Row, Predicted]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one source and class. Shares and errors are of 1; runs that failed have no measured need and are left out."""

    rows: int
    median_error: float
    mean_error: float
    p95_error: float
    low_2: float
    """Share predicted more than 2 % too low."""
    low_5: float
    inside: float
    """Share of measurements inside the interval."""
    below: float
    """Share of measurements below it."""
    width: float
    """Median width of the interval over the measurement."""


def figures(pairs: Sequence[Pair]) -> Figures:
    """Judge what was measured of runs that succeeded."""
    done = [(row.measured_mib, p) for row, p in pairs if not row.oom]
    errors = [p.likely_mib / measured - 1 for measured, p in done]
    sizes = [abs(error) for error in errors]
    return Figures(
        rows=len(done),
        median_error=median(sizes),
        mean_error=fmean(sizes),
        p95_error=float(np.quantile(sizes, 0.95)),
        low_2=fmean(error < -0.02 for error in errors),
        low_5=fmean(error < -0.05 for error in errors),
        inside=fmean(p.low_mib <= measured <= p.high_mib for measured, p in done),
        below=fmean(measured < p.low_mib for measured, p in done),
        width=median((p.high_mib - p.low_mib) / measured for measured, p in done),
    )


def others(pairs: Sequence[Pair]) -> Mapping[str, tuple[float, float]]:
    """By name of another predictor: its median and mean error over the same rows."""
    found: dict[str, list[float]] = {}
    for row, _ in pairs:
        for name, value in row.others_mib.items() if not row.oom else ():
            found.setdefault(name, []).append(abs(value / row.measured_mib - 1))
    return {name: (median(errors), fmean(errors)) for name, errors in found.items()}


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """Of runs that were repeated under a limit."""

    number: int
    right: int
    tight: int
    """Neither said to run nor to run out: the limit lies within what the run is said to need."""
    false_nots: int
    """Said to run out, and ran."""
    false_fits: int
    """Said to run, and ran out."""
    middle_right: int
    """Right where the middle of the need decides instead."""
    best_right: int
    """Right at most, whatever factor that middle is multiplied by: the rest is noise of the runs, or of single models."""


def verdicts(pairs: Sequence[Pair]) -> Verdicts:
    """Judge the repetitions under a limit."""
    fits, nots, tight = [], [], 0
    from_middle: list[tuple[float, bool]] = []
    for cap, (low, high) in ((cap, p.needs_mib) for row, p in pairs for cap in row.caps):
        from_middle.append((cap.limit_mib / ((low + high) / 2), cap.oom))
        if cap.limit_mib >= high:
            fits.append(cap.oom)
        elif cap.limit_mib < low:
            nots.append(not cap.oom)
        else:
            tight += 1
    number, wrong = len(fits) + len(nots) + tight, sum(fits) + sum(nots)
    return Verdicts(
        number=number,
        right=number - tight - wrong,
        tight=tight,
        false_nots=sum(nots),
        false_fits=sum(fits),
        middle_right=_right_from(1, from_middle),
        best_right=max((_right_from(factor, from_middle) for factor, _ in from_middle), default=0),
    )


def _right_from(factor: float, limits: Sequence[tuple[float, bool]]) -> int:
    """Of (limit over need, whether it ran out): right if what has this factor, or more, is said to run."""
    return sum((limit >= factor) != oom for limit, oom in limits)


def ordered(predicted: Sequence[float], measured: Sequence[float]) -> tuple[int, float]:
    """Pairs whose measured values are over 2 % apart, and the share of them put in the right order."""
    one, two = np.array(predicted), np.array(measured)
    i, j = np.triu_indices(len(two), 1)
    apart = np.maximum(two[i], two[j]) / np.minimum(two[i], two[j]) > 1.02
    right = ((one[i] > one[j]) == (two[i] > two[j]))[apart]
    return int(apart.sum()), float(right.mean()) if len(right) else float("nan")
