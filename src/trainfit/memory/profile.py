"""What the memory of a traced step is made of: at its peak, and over its last window."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainfit.memory.allocator import Replay
from trainfit.memory.columns import Columns, Integers
from trainfit.memory.quick_replay import History
from trainfit.tracing.events import CATEGORIES, Category, Trace

SAMPLES = 240
"""Points of a timeline, at most."""


@dataclass(frozen=True, kw_only=True)
class ProfileSample:
    """Memory at one moment."""

    event: int
    """Index into the trace's events."""
    phase: str
    """The phase of the step."""
    category_bytes: tuple[int, ...]
    """Bytes asked for, one number for each of `CATEGORIES`."""
    allocated_bytes: int
    """What their blocks hold; more than the sum by the allocator's rounding."""
    reserved_bytes: int
    """What the allocator holds from the driver."""


@dataclass(frozen=True, kw_only=True)
class ModuleRow:
    """What is alive at the peak and was allocated while one module ran."""

    module: str
    """Qualified name without the leading "model."; in parentheses where no module ran: "(parameters)"."""
    bytes: int
    """Bytes asked for."""


@dataclass(frozen=True, kw_only=True)
class PhaseRow:
    """One phase of the last window."""

    phase: str
    """Name of the phase."""
    peak_allocated_bytes: int
    """Largest bytes in tensors during the phase."""
    peak_reserved_bytes: int
    """Largest bytes held from the driver during the phase."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The memory of a step in figures. Bytes; what the allocator's statistics call them."""

    peak_allocated_bytes: int
    """Largest bytes in tensors."""
    peak_requested_bytes: int
    """Sum of the categories at the peak of allocated memory."""
    peak_reserved_bytes: int
    """The most that was taken from the driver, in any window."""
    peak: ProfileSample
    """The moment of most allocated memory."""
    peak_op: str
    """Operator whose output reached it."""
    peak_module: str
    """Module that ran then, named as in `modules`."""
    modules: tuple[ModuleRow, ...]
    """Rows by the first part of the module's name, most bytes first."""
    deep_modules: tuple[ModuleRow, ...]
    """Rows by the module's whole name."""
    phases: tuple[PhaseRow, ...]
    """Phases in the order of their first event."""
    timeline: tuple[ProfileSample, ...]
    """The last window, thinned to its local maxima of allocated memory."""


def last_window(trace: Trace | Columns) -> int:
    """Index of the event at which the last window begins."""
    return max((index for index, name in trace.marks if name.startswith("window ")), default=0)


def make_profile(trace: Trace | Columns, replay: Replay | History, *, since: int = 0) -> Profile:
    """Break a replayed trace down; the peak is sought from event `since` on.

    `replay` was made with `timeline=True` and did not run out of memory; the trace allocates something from `since` on.
    """
    columns = trace if isinstance(trace, Columns) else Columns.of(trace)
    allocated = np.array(replay.allocated_timeline, dtype=np.int64)
    at = since + int(allocated[since:].argmax())
    start = last_window(columns)
    shown = sorted({at, *_local_maxima(allocated, start)})
    samples = dict(zip(shown, _samples(columns, replay, shown), strict=True))
    tensor = columns.tensor(int(abs(columns.events[at])) - 1)
    alive = _alive(columns, at)
    return Profile(
        peak_allocated_bytes=int(allocated[at]),
        peak_requested_bytes=sum(samples[at].category_bytes),
        peak_reserved_bytes=replay.peak_reserved_bytes,
        peak=samples[at],
        peak_op=tensor.op,
        peak_module=_name(tensor.module, tensor.category),
        modules=_by_module(columns, alive, deep=False),
        deep_modules=_by_module(columns, alive, deep=True),
        phases=_phase_rows(columns, replay, start),
        timeline=tuple(sample for index, sample in samples.items() if index >= start),
    )


def _samples(trace: Columns, replay: Replay | History, shown: Sequence[int]) -> Iterator[ProfileSample]:
    """Memory after each of some events."""
    tensors = np.abs(trace.events) - 1
    changes = np.sign(trace.events) * trace.nbytes[tensors]
    of_category = [
        np.cumsum(np.where(trace.of_category(category)[tensors], changes, 0))[shown].tolist() for category in CATEGORIES
    ]
    phases = _phases(trace)
    names = [phases[number][1] for number in (bisect_right([begin for begin, _ in phases], at) - 1 for at in shown)]
    for index, phase, *totals in zip(shown, names, *of_category, strict=True):
        yield ProfileSample(
            event=index,
            phase=phase,
            category_bytes=tuple(totals),
            allocated_bytes=int(replay.allocated_timeline[index]),
            reserved_bytes=int(replay.reserved_timeline[index]),
        )


def _local_maxima(allocated: Integers, start: int) -> set[int]:
    """The event of most memory in each of `SAMPLES` stretches from `start` on, and the first and last event."""
    end = len(allocated)
    width = -(-(end - start) // SAMPLES) or 1
    firsts = range(start, end, width)
    return {first + int(allocated[first : first + width].argmax()) for first in firsts} | {start, end - 1}


def _phases(trace: Columns) -> list[tuple[int, str]]:
    """(first event, name) of each phase."""
    return [(0, "build"), *((index, name) for index, name in trace.marks if not name.startswith("window "))]


def _phase_rows(trace: Columns, replay: Replay | History, start: int) -> tuple[PhaseRow, ...]:
    """The phases from an event on, in the order of their first event."""
    peaks: dict[str, tuple[int, int]] = {}
    phases = _phases(trace)
    ends = [begin for begin, _ in phases[1:]] + [len(trace.events)]
    timelines = [np.array(each) for each in (replay.allocated_timeline, replay.reserved_timeline)]
    for (begin, name), end in zip(phases, ends, strict=True):
        if (first := max(begin, start)) < end:
            allocated, reserved = (int(timeline[first:end].max()) for timeline in timelines)
            before = peaks.get(name, (0, 0))
            peaks[name] = max(before[0], allocated), max(before[1], reserved)
    return tuple(
        PhaseRow(phase=name, peak_allocated_bytes=allocated, peak_reserved_bytes=reserved)
        for name, (allocated, reserved) in peaks.items()
    )


def _alive(trace: Columns, at: int) -> Integers:
    """The tensors that are there after an event."""
    events = trace.events[: at + 1]
    alive = np.zeros(len(trace.nbytes), dtype=bool)
    alive[events[events > 0] - 1] = True
    alive[-events[events < 0] - 1] = False
    return np.flatnonzero(alive)


def _name(module: str, category: Category) -> str:
    if not module:
        return f"({category})"
    return "(model)" if module == "model" else module.removeprefix("model.")


def _by_module(trace: Columns, tensors: Integers, *, deep: bool) -> tuple[ModuleRow, ...]:
    sums: dict[str, int] = defaultdict(int)
    rows = zip(*(each[tensors].tolist() for each in (trace.module, trace.category, trace.nbytes)), strict=True)
    for module, category, nbytes in rows:
        name = _name(trace.names[module], CATEGORIES[category])
        sums[name if deep else name.partition(".")[0]] += nbytes
    modules = [ModuleRow(module=module, bytes=nbytes) for module, nbytes in sums.items() if nbytes]
    return tuple(sorted(modules, key=lambda row: (-row.bytes, row.module)))
