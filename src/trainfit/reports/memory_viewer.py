"""A predicted step as PyTorch's memory snapshot, for its memory viewer.

The format is that of `torch.cuda.memory._snapshot()`; `torch/cuda/_memory_viz.py` and the memory viewer
(torch/utils/viz/MemoryViz.js) read it.
"""

from collections import defaultdict
from typing import Any

from trainfit.gpus.catalogue import Gpu
from trainfit.memory.allocator import AllocatorConfig, Replay
from trainfit.memory.predict import Traced, completed, replay_on
from trainfit.tracing.events import TensorInfo, Trace


def snapshot(traced: Traced, gpu: Gpu, config: AllocatorConfig) -> dict[str, Any]:
    """A trace replayed on the card, unknowns at their lowest; see `to_snapshot`."""
    trace = completed(traced, gpu, bound="least").columns.trace()
    return to_snapshot(trace, replay_on(gpu, trace, config))


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
