"""Recorded memory snapshots of PyTorch as traces to replay, to hold the allocator model and our writer against."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainfit.tracing.events import CATEGORIES, TensorInfo, Trace

_RESERVING = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
_BEFORE = "before the recording"


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a snapshot's history says of one device."""

    trace: Trace
    """What was live when the recording began, in order of address, then every allocation and free."""
    preexisting: int
    """How many of the trace's leading events allocate what was already there."""
    reserved_timeline: tuple[int, ...]
    """Bytes that PyTorch held from the driver after each event of the trace: what a replay should find. Exact if the
    recording began with an empty allocator; otherwise a replay packs the preexisting tensors in its own way."""


def load_snapshot(snapshot: Mapping[str, Any], *, device: int = 0) -> Recording:
    """Turn a snapshot of `torch.cuda.memory._snapshot()`, taken with history, into a trace.

    A tensor is freed when its memory could be used again (`free_completed`).
    Its op and module are the name and file of the innermost frame.
    """
    entries: list[dict[str, Any]] = snapshot["device_traces"][device]
    segments = [segment for segment in snapshot["segments"] if segment.get("device", 0) == device]
    streams: dict[int, int] = {0: 0}
    tensors: list[TensorInfo] = []
    live: dict[int, int] = {}

    def add(entry: Mapping[str, Any]) -> int:
        frame = next(iter(entry.get("frames", ())), {})
        category = entry.get("category", "")
        info = TensorInfo(
            id=len(tensors),
            nbytes=entry["size"],
            category=category if category in CATEGORIES else "other",
            op=frame.get("name", ""),
            module=frame.get("filename", ""),
            stream=streams.setdefault(entry["stream"], len(streams)),
        )
        tensors.append(info)
        live[entry["addr"]] = info.id
        return info.id + 1

    before = _live_before(entries, segments)
    events = [add(entry) for entry in before]
    change = sum(_RESERVING.get(entry["action"], 0) * entry["size"] for entry in entries)
    reserved = sum(segment["total_size"] for segment in segments) - change
    timeline = [reserved] * len(events)
    for entry in entries:
        reserved += _RESERVING.get(entry["action"], 0) * entry["size"]
        if entry["action"] == "alloc" and entry["size"]:
            events.append(add(entry))
        elif entry["action"] == "free_completed":
            events.append(-live.pop(entry["addr"]) - 1)
        else:
            continue
        timeline.append(reserved)
    trace = Trace(tensors=tuple(tensors), events=tuple(events))
    return Recording(trace=trace, preexisting=len(before), reserved_timeline=tuple(timeline))


def _live_before(entries: list[dict[str, Any]], segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return an allocation for each tensor that the history frees first, or that lives at the end but not in it."""
    before: list[dict[str, Any]] = []
    seen: set[int] = set()
    for entry in entries:
        if entry["action"] == "free_completed" and entry["addr"] not in seen:
            before.append(entry)
        if entry["action"] in ("alloc", "free_completed"):
            seen.add(entry["addr"])
    for segment in segments:
        address = segment["address"]
        for block in segment["blocks"]:
            if block["state"] == "active_allocated" and address not in seen:
                size = block.get("requested_size", block["size"])
                before.append({"addr": address, "size": size, "stream": segment["stream"]})
            address += block["size"]
    frames = [{"name": _BEFORE, "filename": "", "line": 0}]
    return [{**entry, "frames": frames} for entry in sorted(before, key=lambda entry: entry["addr"])]
