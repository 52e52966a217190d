"""PyTorch's recorded memory snapshots: read without running code from them, and judged. Imports no torch."""

import io
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainfit.errors import TrainfitError
from trainfit.explaining.places import place_of

MOST_BYTES = 4 * 2**30
"""Largest file that is read: a history of a million events takes about 1 GiB."""
BURSTS = 4
"""Parts of a history; tensors of one place that stay alive from as many parts are a leak."""
FALL = 0.1
"""Share of the range of allocated memory: a rise and then a fall by this much end a step."""
LEAST_STEPS = 3
"""A single forward keeps tensors of every layer, which is not a leak: a history of fewer steps tells of none."""


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, texts, lists and dicts alone: a snapshot has nothing else, and a class could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no snapshot does")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it asks for the stored object {pid!r}, which no snapshot does")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Tensors that one place of the code made and that are alive at the moment in question."""

    place: str
    """Innermost frame that is not a library's, as "file.py:12 in forward"; else what `places.place_of` finds."""
    category: str
    """Category of the tensors, for instance activations."""
    nbytes: int
    """Bytes of the tensors."""
    tensors: int
    """Number of tensors."""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """Tensors made at one place that stay alive over the history."""

    place: str
    """Where in the code the tensors were made."""
    tensors: int
    """Number of tensors."""
    nbytes: int
    """Bytes of the tensors."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a snapshot says of one device at its out-of-memory error, or at its peak where it has none."""

    device: int
    """Index of the device."""
    at: Literal["out of memory", "peak", "end"]
    """The moment that the other fields describe; end: of a snapshot without a history."""
    events: int
    """Allocations and frees of the history; 0 for a snapshot without one."""
    request_bytes: int
    """Bytes of the request that failed; else 0."""
    request_place: str
    """Place in the code that asked for it; else empty."""
    device_free_bytes: int
    """Free memory of the device at the error; 0 if the snapshot does not say."""
    allocated_bytes: int
    """Bytes in tensors at that moment."""
    reserved_bytes: int
    """Bytes held from the driver at that moment."""
    largest_free_bytes: int
    """The largest free piece of a reserved segment at the end of the history."""
    free_pieces_bytes: int
    """Bytes of all free pieces."""
    holders: tuple[Holder, ...]
    """Holders of memory, largest first."""
    steps: int
    """Times that allocated memory rose and fell again in the history."""
    leaks: tuple[Leak, ...]
    """Tensors that accumulate; None if the history has fewer than `LEAST_STEPS` steps."""

    @property
    def judges_leaks(self) -> bool:
        """Whether the history is long enough to tell of leaks."""
        return self.steps >= LEAST_STEPS

    @property
    def fragmented(self) -> bool:
        """Whether free pieces would have held the request, had they been one."""
        return bool(self.request_bytes) and self.largest_free_bytes < self.request_bytes <= self.free_pieces_bytes


def read_snapshot(data: bytes, source: str) -> list[Snapshot]:
    """The devices of a pickled snapshot (`torch.cuda.memory._dump_snapshot`) that hold or held anything.

    Raises:
        TrainfitError: it is not a snapshot, is damaged, or asks for anything but plain values.
    """
    if len(data) > MOST_BYTES:
        raise TrainfitError(
            f"{source}: {len(data) / 2**30:.1f} GiB is more than a snapshot of {MOST_BYTES >> 30} GiB can be"
        )
    try:
        value = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise TrainfitError(f"{source} is not a memory snapshot: {type(error).__name__}: {error!s:.150}") from error
    try:
        segments = value["segments"] if isinstance(value, Mapping) else value
        traces = value.get("device_traces", []) if isinstance(value, Mapping) else []
        devices = sorted(
            {int(s.get("device", 0)) for s in segments} | {d for d, entries in enumerate(traces) if len(entries) > 1}
        )
        return [
            _judge(d, traces[d] if d < len(traces) else [], [s for s in segments if s.get("device", 0) == d])
            for d in devices
        ]
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise TrainfitError(f"{source} is not a memory snapshot: {type(error).__name__}: {error!s:.150}") from error


def _judge(device: int, entries: Sequence[Mapping[str, Any]], segments: Sequence[Mapping[str, Any]]) -> Snapshot:
    pieces = [b["size"] for s in segments for b in s["blocks"] if b["state"] == "inactive"]
    ooms = [number for number, entry in enumerate(entries) if entry["action"] == "oom"]
    at: Literal["out of memory", "peak", "end"] = "peak" if entries else "end"
    if ooms:
        at = "out of memory"
    live = _before(entries, segments)
    total = sum(size for size, _, _ in live.values())
    reserved_end = sum(s["total_size"] for s in segments)
    reserved = reserved_end - sum(_RESERVING.get(e["action"], 0) * e["size"] for e in entries)
    best: tuple[int, int, dict[int, Any], int] = (-1, -1, {}, 0)
    totals = [total]
    for number, entry in enumerate(entries):
        action = entry["action"]
        reserved += _RESERVING.get(action, 0) * entry.get("size", 0)
        if action == "alloc":
            live[entry["addr"]] = (entry["size"], entry, number)
            total += entry["size"]
        elif action == "free_completed" and entry["addr"] in live:
            total -= live.pop(entry["addr"])[0]
        totals.append(total)
        if number == ooms[-1] if ooms else total > best[0]:
            best = (total, number, dict(live) if ooms else {}, reserved)
    if not ooms:
        best = _live_at(entries, segments, best)
    oom = entries[ooms[-1]] if ooms else {}
    steps = _steps(totals)
    return Snapshot(
        device=device,
        at=at,
        events=sum(entry["action"] in ("alloc", "free_completed") for entry in entries),
        request_bytes=int(oom.get("size", 0)),
        request_place=place_of(oom.get("frames", ())),
        device_free_bytes=int(oom.get("device_free", 0)),
        allocated_bytes=best[0],
        reserved_bytes=best[3] or reserved_end,
        largest_free_bytes=max(pieces, default=0),
        free_pieces_bytes=sum(pieces),
        holders=_holders(best[2].values()),
        steps=steps,
        leaks=_leaks(live.values(), len(entries)) if steps >= LEAST_STEPS else (),
    )


def _steps(totals: Sequence[int]) -> int:
    """How often a curve rises and falls again by `FALL` of its range."""
    least = FALL * (max(totals) - min(totals))
    if not least:
        return 0
    steps = 0
    low = totals[0]
    high = totals[0]
    rising = False
    for total in totals:
        if rising and total <= high - least:
            steps += 1
            rising = False
            low = total
        elif not rising and total >= low + least:
            rising = True
            high = total
        low = min(low, total)
        high = max(high, total)
    return steps


_RESERVING = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


def _before(
    entries: Sequence[Mapping[str, Any]], segments: Sequence[Mapping[str, Any]]
) -> dict[int, tuple[int, Any, int]]:
    """Blocks that were alive when the history began: address -> (bytes, entry, -1)."""
    live: dict[int, tuple[int, Any, int]] = {}
    seen: set[int] = set()
    for entry in entries:
        if entry["action"] == "free_completed" and entry["addr"] not in seen:
            live[entry["addr"]] = (entry["size"], entry, -1)
        if entry["action"] in ("alloc", "free_completed"):
            seen.add(entry["addr"])
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated" and address not in seen:
                live[address] = (block.get("requested_size", block["size"]), block, -1)
            address += block["size"]
    return live


def _live_at(
    entries: Sequence[Mapping[str, Any]],
    segments: Sequence[Mapping[str, Any]],
    best: tuple[int, int, dict[int, Any], int],
) -> tuple[int, int, dict[int, Any], int]:
    """What was alive at the peak. This is a second pass, because a copy at every new peak would be quadratic."""
    live = _before(entries, segments)
    for number, entry in enumerate(entries[: best[1] + 1]):
        if entry["action"] == "alloc":
            live[entry["addr"]] = (entry["size"], entry, number)
        elif entry["action"] == "free_completed":
            live.pop(entry["addr"], None)
    total = sum(size for size, _, _ in live.values())
    return (total, best[1], live, best[3])


def _holders(live: Iterable[tuple[int, Mapping[str, Any], int]]) -> tuple[Holder, ...]:
    nbytes: Counter[tuple[str, str]] = Counter()
    tensors: Counter[tuple[str, str]] = Counter()
    for size, entry, number in live:
        category = str(entry.get("category", "") or "")
        frames = entry.get("frames", ())
        place = place_of(frames) or (
            "before the recording" if number < 0 else "unknown place (recorded without stacks)"
        )
        nbytes[place, category] += size
        tensors[place, category] += 1
    return tuple(
        Holder(place=place, category=category, nbytes=size, tensors=tensors[place, category])
        for (place, category), size in nbytes.most_common(10)
    )


def _leaks(live: Iterable[tuple[int, Mapping[str, Any], int]], events: int) -> tuple[Leak, ...]:
    """Places whose tensors are alive at the end from every part of the history: what a step needs is freed with it."""
    parts: dict[str, Counter[int]] = defaultdict(Counter)
    nbytes: Counter[str] = Counter()
    for size, entry, number in live:
        place = place_of(entry.get("frames", ()))
        if place and number >= 0 and entry.get("category", "") not in ("parameters", "optimizer"):
            parts[place][number * BURSTS // max(events, 1)] += 1
            nbytes[place] += size
    leaks = [
        Leak(place=place, tensors=sum(counts.values()), nbytes=nbytes[place])
        for place, counts in parts.items()
        if len(counts) == BURSTS and min(counts.values()) >= 2
    ]
    return tuple(sorted(leaks, key=lambda leak: -leak.nbytes))
