"""Judges from the memory figures of a log whether growing memory is a leak or a larger input. Imports no torch."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

Verdict = Literal["leak", "larger input", "steady", "too short"]
LEAST = 6
"""Least number of figures for a verdict."""
_PATTERNS = (
    (re.compile(r"max_mem: (\d+)M\b"), 2**20),  # Detectron2, detrex
    (re.compile(r"max mem: (\d+)\b"), 2**20),  # torchvision's references, DETR
    (re.compile(r"\bmemory: (\d+)\b"), 2**20),  # mmdetection, mmengine
    (re.compile(r"^\s*\d+/\d+\s+([\d.]+)G\b"), 2**30),  # Ultralytics
    (re.compile(r"reserved[ =:]+([\d.]+) ?MiB"), 2**20),
    (re.compile(r"reserved[ =:]+([\d.]+) ?GiB"), 2**30),
    (re.compile(r"allocated[ =:]+([\d.]+) ?MiB"), 2**20),
    (re.compile(r"allocated[ =:]+([\d.]+) ?GiB"), 2**30),
)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """How memory changed over a log."""

    verdict: Verdict
    """What the figures show."""
    figures: int
    """Number of figures in the log."""
    first_bytes: int
    """The first figure."""
    last_bytes: int
    """The last figure."""
    steps_up: int
    """Number of figures that are higher than all before."""
    reason: str
    """A sentence that explains the verdict."""


def find_growth(text: str) -> Growth | None:
    """The verdict on a log's memory figures; None where it has none."""
    series = _from_json(text.splitlines()) or _from_lines(text.splitlines())
    return judge(series) if series else None


def judge(series: Sequence[int]) -> Growth:
    """Whether a series of figures climbs at a steady rate (a leak) or in a few steps (a larger input).

    Peaks never fall (`max_memory_*`), so what tells is how the rise is spread: a leak adds about as much in each third of the
    run, also in the last, by many small steps; larger inputs come as few steps, which get rarer.
    """
    known: dict[str, Any] = {"figures": len(series), "first_bytes": series[0], "last_bytes": series[-1]}
    rise = max(series) - series[0]
    ups = [b - a for a, b in pairwise(_running(series)) if b > a]
    known["steps_up"] = len(ups)
    if len(series) < LEAST:
        return Growth(verdict="too short", reason=f"{len(series)} figures are too few to tell", **known)
    if rise < max(0.02 * series[0], 1):
        return Growth(verdict="steady", reason="memory does not grow", **known)
    top = _running(series)
    thirds = [top[0], top[len(top) // 3], top[2 * len(top) // 3], top[-1]]
    parts = [(b - a) / rise for a, b in pairwise(thirds)]
    smooth = len(ups) >= len(series) / 4 and max(ups) <= 6 * median(ups)
    if smooth and min(parts) >= 0.15:
        reason = f"it rises in {len(ups)} of {len(series)} figures, about as fast at the end as at the beginning"
        return Growth(verdict="leak", reason=reason, **known)
    reason = f"it rises in {len(ups)} steps, {parts[2]:.0%} of the rise in the last third: inputs that are larger than those before"
    return Growth(verdict="larger input", reason=reason, **known)


def _running(series: Sequence[int]) -> list[int]:
    """The highest figure so far."""
    result: list[int] = []
    for value in series:
        result.append(max(value, result[-1]) if result else value)
    return result


def _from_json(lines: Iterable[str]) -> list[int]:
    """`reserved_bytes`, `memory_bytes` or `memory` (MiB, mmengine) of JSON lines."""
    readings: list[int] = []
    for line in lines:
        if not line.startswith("{"):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for key, unit in (("reserved_bytes", 1), ("memory_bytes", 1), ("memory", 2**20)):
            value = row.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                readings.append(int(value * unit))
                break
    return readings


def _from_lines(lines: Sequence[str]) -> list[int]:
    for pattern, unit in _PATTERNS:
        readings = [int(float(match[1]) * unit) for line in lines if (match := pattern.search(line))]
        if len(readings) > 1:
            return readings
    return []
