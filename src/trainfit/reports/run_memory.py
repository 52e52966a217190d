"""Judges whether a run's memory grew with its data or without a reason: "is it a leak?". Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainfit.gpus.catalogue import GIB
from trainfit.reports.words import printable

Row = Mapping[str, Any]
WARM_WINDOWS = 10
"""Windows at the start in which memory rises in any run: the optimizer's state, caches, the allocator's first blocks."""
GROWTH = {"reserved_bytes": (0.01, 2**24), "memory_bytes": (0.05, 2**26)}
"""Key of a reading -> growth that counts, as a share and at least in bytes. The host's allocator moves more by itself."""
WORDS = {"rois": "regions", "positives": "regions with an object"}


@dataclass(frozen=True, kw_only=True)
class MemoryIncrease:
    """A rise of memory above its previous maximum."""

    step: int
    """The optimizer step."""
    before_bytes: int
    """Largest memory before it."""
    after_bytes: int
    """Memory after it."""
    because: tuple[str, ...]
    """The inputs that were larger than ever before, in words; empty if none was."""


def growths(readings: Sequence[Row], pauses: Sequence[Row] = ()) -> list[MemoryIncrease]:
    """Each time that memory rose after the first windows, in the order of the steps.

    Args:
        readings: Lines of telemetry.jsonl, one for each reading.
        pauses: Its lines of evaluations and saves, whose memory the next reading has.
    """
    key = "reserved_bytes" if any(row.get("reserved_bytes") for row in readings) else "memory_bytes"
    share, least = GROWTH[key]
    paused = {row["step"] for row in pauses}
    most: dict[str, float] = {}
    increases: list[MemoryIncrease] = []
    peak = 0
    windows = 0
    last_step = 0
    for row in readings:
        larger = _larger(row, most)
        size = row.get(key) or 0
        if windows >= WARM_WINDOWS and size - peak > max(least, share * peak):
            evaluated = (
                ["the evaluation or save before it"] if any(last_step <= s < row["step"] for s in paused) else []
            )
            increases.append(
                MemoryIncrease(step=row["step"], before_bytes=peak, after_bytes=size, because=(*larger, *evaluated))
            )
        peak = max(peak, size)
        windows += row.get("windows") or 1
        last_step = row["step"]
    return increases


def _larger(row: Row, most: dict[str, float]) -> list[str]:
    """The inputs of a reading that are larger than all before, in words; updates `most`."""
    words: list[str] = []
    for name, entry in (row.get("largest") or {}).items():
        if entry["value"] > most.get(name, 0.0):
            words.append(
                f"{printable(Path(entry['item']).name)} with {entry['value']:,.0f} {name} at step {entry['step']}"
            )
            most[name] = entry["value"]
    for name, value in (row.get("window_numbers") or {}).items():
        if value > most.get(f"window {name}", 0.0):
            words.append(f"{value:,.0f} {WORDS.get(name, name)} in a window")
            most[f"window {name}"] = value
    return words


def growth_words(readings: Sequence[Row], pauses: Sequence[Row] = ()) -> str | None:
    """A sentence about the growth; None for a run that is too short to say, or that noted no extents."""
    windows = sum(row.get("windows") or 1 for row in readings)
    if windows <= WARM_WINDOWS or not any(row.get("largest") for row in readings):
        return None
    increases = growths(readings, pauses)
    if not increases:
        return f"no growth after the first {WARM_WINDOWS} windows: no leak"
    total = f"grew {increases[0].before_bytes / GIB:.2f} -> {increases[-1].after_bytes / GIB:.2f} GiB"
    unexplained = [each for each in increases if not each.because]
    if unexplained:
        steps = ", ".join(str(each.step) for each in unexplained[:5])
        more = f" and {len(unexplained) - 5} more" if len(unexplained) > 5 else ""
        return (
            f"{total}; at step {steps}{more} nothing explains it: no larger image, and no more objects or regions than "
            "before. Perhaps a leak: trainfit explain SNAPSHOT names what keeps tensors"
        )
    largest = max(increases, key=lambda each: each.after_bytes - each.before_bytes)
    return f"{total} with its input, no leak; most at step {largest.step}: {', '.join(largest.because[:3])}"
