"""PyTorch's memory snapshots: a recorded one becomes a trace to replay, a predicted step one to look at.

The format is that of `torch.cuda.memory._snapshot()`; `torch/cuda/_memory_viz.py` and the memory viewer
(torch/utils/viz/MemoryViz.js) read it.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.memory.allocator import Replay
from trainfit.memory.events import CATEGORIES, TensorInfo, Trace

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

    Raises TrainfitError when the device has no history. A tensor is freed when its memory could be used again
    (`free_completed`). Its op and module are the name and file of the innermost frame.
    """
    traces = snapshot["device_traces"]
    entries: list[dict[str, Any]] = traces[device] if device < len(traces) else []
    if not entries:
        raise TrainfitError(
            f"snapshot has no history of device {device}: call torch.cuda.memory._record_memory_history() first"
        )
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


def to_snapshot(trace: Trace, replay: Replay) -> dict[str, Any]:
    """Write a predicted step as a snapshot: pickle it and drop it on the memory viewer.

    Every tensor, parameters too, is an alloc event with its category; the inner frame names op and module, the outer
    one the phase. Times are event indices. An OOM ends the history as it does in PyTorch.
    """
    # The viewer wants a category "unknown" whenever there are others, and fails to add it itself.
    entries: list[dict[str, Any]] = [
        {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "frames": [], "category": "unknown", "time_us": 0}
    ]
    exchanges: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for index, action, address, nbytes, stream in replay.segment_events:
        exchanges[index].append(
            {"action": action, "addr": address, "size": nbytes, "stream": stream, "frames": [], "time_us": index}
        )
    for index, event in enumerate(trace.events):
        entries += exchanges[index]
        if replay.oom is not None and index == replay.oom.event:
            free = (replay.capacity_bytes or 0) - replay.oom.reserved_bytes
            entries.append({"action": "oom", "size": replay.oom.wanted_bytes, "device_free": free, "time_us": index})
            break
        tensor = trace.tensors[abs(event) - 1]
        if not tensor.nbytes:
            continue
        entry = {
            "addr": replay.addresses[tensor.id],
            "size": tensor.nbytes,
            "stream": tensor.stream,
            "frames": _frames(tensor),
            "category": "unknown" if tensor.category == "other" else tensor.category,
            "time_us": index,
        }
        actions = ("alloc",) if event > 0 else ("free_requested", "free_completed")
        entries += [{**entry, "action": action} for action in actions]
    return {"device_traces": [entries], "segments": _segments(trace, replay), "allocator_settings": {}}


def _frames(tensor: TensorInfo) -> list[dict[str, Any]]:
    return [
        {"name": tensor.op, "filename": tensor.module, "line": 0},
        {"name": tensor.phase, "filename": "", "line": 0},
    ]


def _segments(trace: Trace, replay: Replay) -> list[dict[str, Any]]:
    """Return what is reserved after the last event: contiguous memory and the blocks in it."""
    segments: list[dict[str, Any]] = []
    for address, size, owner, stream, first in replay.blocks:
        if first:
            totals = dict.fromkeys(("total_size", "allocated_size", "active_size", "requested_size"), 0)
            segments.append({"device": 0, "address": address, "stream": stream, "frames": [], "blocks": [], **totals})
        segment = segments[-1]
        block: dict[str, Any] = {
            "address": address,
            "size": size,
            "requested_size": 0,
            "state": "inactive",
            "frames": [],
        }
        segment["total_size"] += size
        if owner >= 0:
            tensor = trace.tensors[owner]
            block |= {"requested_size": tensor.nbytes, "state": "active_allocated", "frames": _frames(tensor)}
            segment["allocated_size"] += size
            segment["active_size"] += size
            segment["requested_size"] += tensor.nbytes
        segment["blocks"].append(block)
    return segments
