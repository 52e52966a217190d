"""Snapshots: what PyTorch's own reader makes of a predicted one, and what our reader makes of it and of a recorded one."""

import base64
import json
import pickle
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.cuda import _memory_viz

from snapshot_reader import load_snapshot
from trainfit.memory.allocator import AllocatorConfig, Replay, replay
from trainfit.reports.memory_viewer import to_snapshot
from trainfit.tracing.events import TensorInfo, Trace

MIB = 2**20


def a_step() -> Trace:
    """Weights, two activations, a workspace on another stream, the backward pass frees."""
    tensors = (
        TensorInfo(id=0, nbytes=3000, category="parameters", op="init", module="head", phase="build"),
        TensorInfo(id=1, nbytes=12 * MIB, category="activations", op="conv", module="backbone.0", phase="forward"),
        TensorInfo(id=2, nbytes=8 * MIB, category="workspace", op="conv", module="backbone.0", stream=3),
        TensorInfo(id=3, nbytes=5 * MIB, category="activations", op="relu", module="backbone.1", phase="forward"),
        TensorInfo(id=4, nbytes=3000, category="gradients", op="mm", module="head", phase="backward"),
    )
    return Trace(tensors=tensors, events=(1, 2, 3, -3, 4, 5, -4, -2))


def viewed(trace: Trace, result: Replay) -> dict[str, Any]:
    """Return the snapshot as the memory viewer's page carries it."""
    page = _memory_viz.trace_plot(to_snapshot(trace, result))
    (carried,) = re.findall(r"const local_files = (.*)", page)
    return pickle.loads(base64.b64decode(json.loads(carried)[0]["base64"]))


@pytest.mark.parametrize("expandable", [False, True])
def test_pytorchs_reader_understands_a_predicted_step(expandable: bool) -> None:
    trace = a_step()
    result = replay(trace, capacity_bytes=None, config=AllocatorConfig(expandable_segments=expandable))
    snapshot = viewed(trace, result)
    events = snapshot["device_traces"][0]
    allocs = [event for event in events if event["action"] == "alloc"]
    assert [event["size"] for event in allocs] == [3000, 12 * MIB, 8 * MIB, 5 * MIB, 3000]
    assert allocs[1]["category"] == "activations"
    assert allocs[1]["frames"][0] == {"name": "conv", "filename": "backbone.0", "line": 0}
    # without a category "unknown" the viewer stops at a misspelt name, MemoryViz.js annotate_snapshot
    assert any(event.get("category") == "unknown" for event in events)

    text = _memory_viz.trace(snapshot)
    assert text.count("= cudaMalloc(") == (0 if expandable else 4)
    assert len(re.findall(r"^del ", text, re.MULTILINE)) == 3
    assert "TOTAL MEM" in text
    in_use = _memory_viz.memory(snapshot, format_flamegraph=str)
    assert "backbone.0:0:conv" not in in_use  # freed again
    assert "head:0:init" in in_use
    # segsum checks that blocks, slack and free space add up to each segment
    assert f"total_reserved: {_memory_viz.Bytes(result.reserved_bytes)}" in _memory_viz.segsum(snapshot)
    assert sum(s["total_size"] for s in snapshot["segments"]) == result.reserved_bytes
    assert sum(s["allocated_size"] for s in snapshot["segments"]) == result.allocated_bytes


def test_an_oom_ends_the_history() -> None:
    trace = a_step()
    result = replay(trace, capacity_bytes=30 * MIB)
    events = to_snapshot(trace, result)["device_traces"][0]
    assert events[-1] == {"action": "oom", "size": 8 * MIB, "device_free": 16 * MIB, "time_us": 2}
    assert "OutOfMemoryError # 8.0MiB requested, 16.0MiB free" in _memory_viz.trace(to_snapshot(trace, result))


STEPS = st.lists(
    st.tuples(st.booleans(), st.integers(1, 40 * MIB), st.integers(0, 1), st.integers(0, 999)), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, expandable=st.booleans(), capacity=st.one_of(st.none(), st.integers(60 * MIB, 300 * MIB)))
def test_a_step_written_and_read_again_is_the_same_step(
    steps: list[tuple[bool, int, int, int]], expandable: bool, capacity: int | None
) -> None:
    tensors: list[TensorInfo] = []
    events: list[int] = []
    live: list[int] = []
    for allocate, nbytes, stream, pick in steps:
        if allocate or not live:
            tensors.append(
                TensorInfo(id=len(tensors), nbytes=nbytes, stream=stream, category="EMA", op="o", module="m")
            )
            live.append(len(tensors))
            events.append(len(tensors))
        else:
            events.append(-live.pop(pick % len(live)))
    config = AllocatorConfig(expandable_segments=expandable)
    trace = Trace(tensors=tuple(tensors), events=tuple(events))
    result = replay(trace, capacity_bytes=capacity, config=config, timeline=True)
    if not events or (result.oom is not None and result.oom.event == 0):
        return
    recording = load_snapshot(to_snapshot(trace, result))
    done = len(trace.events) if result.oom is None else result.oom.event
    assert recording.trace.events == trace.events[:done]
    assert recording.trace.tensors == trace.tensors[: len(recording.trace.tensors)]
    assert recording.preexisting == 0
    again = replay(recording.trace, capacity_bytes=capacity, config=config, timeline=True)
    assert again.peak_allocated_bytes == result.peak_allocated_bytes
    assert again.reserved_timeline == result.reserved_timeline == recording.reserved_timeline


def recorded(entries: list[tuple[str, int, int]], segments: list[dict[str, Any]]) -> dict[str, Any]:
    events = [{"action": action, "addr": addr, "size": size, "stream": 0} for action, addr, size in entries]
    return {"device_traces": [[], events], "segments": segments}


def test_what_lived_before_the_recording_is_allocated_first() -> None:
    blocks = [
        {"size": 4 * MIB, "requested_size": 4 * MIB - 100, "state": "active_allocated"},
        {"size": 16 * MIB, "requested_size": 0, "state": "inactive"},
    ]
    segments: list[dict[str, Any]] = [
        {"device": 1, "address": 20 * MIB, "total_size": 20 * MIB, "stream": 0, "blocks": blocks}
    ]
    entries = [
        ("segment_alloc", 64 * MIB, 30 * MIB),
        ("alloc", 64 * MIB, 29 * MIB),
        ("free_requested", 24 * MIB, 5 * MIB),  # never seen allocated
        ("free_completed", 24 * MIB, 5 * MIB),
        ("free_requested", 64 * MIB, 29 * MIB),
        ("free_completed", 64 * MIB, 29 * MIB),
        ("segment_free", 64 * MIB, 30 * MIB),
        ("alloc", 24 * MIB, 6 * MIB),
        ("free_requested", 24 * MIB, 6 * MIB),  # not yet reusable when the snapshot was taken
    ]
    recording = load_snapshot(recorded(entries, segments), device=1)
    assert recording.preexisting == 2
    assert [t.nbytes for t in recording.trace.tensors] == [4 * MIB - 100, 5 * MIB, 29 * MIB, 6 * MIB]
    assert recording.trace.events == (1, 2, 3, -2, -3, 4)
    assert recording.trace.tensors[0].op == "before the recording"
    assert [n // MIB for n in recording.reserved_timeline] == [20, 20, 50, 50, 50, 20]
    result = replay(recording.trace, capacity_bytes=None, timeline=True)
    assert result.reserved_timeline[:3] == recording.reserved_timeline[:3]
