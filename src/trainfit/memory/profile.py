"""What the memory of a traced step is made of: at its peak, and over its last window."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainfit.memory.allocator import Replay
from trainfit.memory.columns import Columns
from trainfit.tracing.events import CATEGORIES, TensorInfo, Trace

SAMPLES = 240
"""Points of a timeline, at most."""


@dataclass(frozen=True, kw_only=True)
class ProfileSample:
    """Memory at one moment."""

    event: int
    """Index into the trace's events."""
    phase: str
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


def make_profile(trace: Trace, replay: Replay, *, since: int = 0) -> Profile:
    """Break a replayed trace down; the peak is sought from event `since` on.

    `replay` was made with `timeline=True` and did not run out of memory; the trace allocates something from `since` on.
    """
    allocated = replay.allocated_timeline
    reserved = replay.reserved_timeline
    at = max(range(since, len(allocated)), key=allocated.__getitem__)
    start = last_window(trace)
    chosen = _local_maxima(allocated, start)
    phase_of = _phases(trace)
    totals = dict.fromkeys(CATEGORIES, 0)
    live: dict[int, TensorInfo] = {}
    alive: tuple[TensorInfo, ...] = ()
    samples: dict[int, ProfileSample] = {}
    for index, (is_allocation, tensor) in enumerate(trace):
        if is_allocation:
            live[tensor.id] = tensor
            totals[tensor.category] += tensor.nbytes
        else:
            del live[tensor.id]
            totals[tensor.category] -= tensor.nbytes
        if index == at:
            alive = tuple(live.values())
        if index == at or index in chosen:
            samples[index] = ProfileSample(
                event=index,
                phase=phase_of[index],
                category_bytes=tuple(totals.values()),
                allocated_bytes=allocated[index],
                reserved_bytes=reserved[index],
            )
    tensor = trace.tensors[abs(trace.events[at]) - 1]
    return Profile(
        peak_allocated_bytes=allocated[at],
        peak_requested_bytes=sum(samples[at].category_bytes),
        peak_reserved_bytes=replay.peak_reserved_bytes,
        peak=samples[at],
        peak_op=tensor.op,
        peak_module=_name(tensor),
        modules=_by_module(alive, deep=False),
        deep_modules=_by_module(alive, deep=True),
        phases=_phase_rows(phase_of, replay, start),
        timeline=tuple(sample for index, sample in samples.items() if index >= start),
    )


def _local_maxima(allocated: Sequence[int], start: int) -> set[int]:
    """The event of most memory in each of `SAMPLES` stretches from `start` on, and the first and last event."""
    end = len(allocated)
    width = -(-(end - start) // SAMPLES) or 1
    stretches = (range(first, min(first + width, end)) for first in range(start, end, width))
    return {max(stretch, key=allocated.__getitem__) for stretch in stretches} | {start, end - 1}


def _phases(trace: Trace) -> list[str]:
    """The phase of each event."""
    marks = [(index, name) for index, name in trace.marks if not name.startswith("window ")]
    names: list[str] = []
    current = "build"
    for index, name in [*marks, (len(trace.events), "")]:
        names += [current] * (index - len(names))
        current = name
    return names


def _phase_rows(phase_of: Sequence[str], replay: Replay, start: int) -> tuple[PhaseRow, ...]:
    events: dict[str, list[int]] = defaultdict(list)
    for index in range(start, len(phase_of)):
        events[phase_of[index]].append(index)
    return tuple(
        PhaseRow(
            phase=phase,
            peak_allocated_bytes=max(replay.allocated_timeline[i] for i in indices),
            peak_reserved_bytes=max(replay.reserved_timeline[i] for i in indices),
        )
        for phase, indices in events.items()
    )


def _name(tensor: TensorInfo) -> str:
    if not tensor.module:
        return f"({tensor.category})"
    return "(model)" if tensor.module == "model" else tensor.module.removeprefix("model.")


def _by_module(tensors: Iterable[TensorInfo], *, deep: bool) -> tuple[ModuleRow, ...]:
    sums: dict[str, int] = defaultdict(int)
    for tensor in tensors:
        name = _name(tensor)
        sums[name if deep else name.partition(".")[0]] += tensor.nbytes
    rows = [ModuleRow(module=module, bytes=nbytes) for module, nbytes in sums.items() if nbytes]
    return tuple(sorted(rows, key=lambda row: (-row.bytes, row.module)))
