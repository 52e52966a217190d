"""Scaled traces (`scaling`): of a request, from the package, from the disk, or traced now. Imports no torch."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from trainfit.memory.packaged import packaged
from trainfit.memory.scaling import ScaledTrace, scale
from trainfit.memory.shipped import source
from trainfit.models.setting import Setting
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import (
    TraceRequest,
    cache_path,
    content_if_valid,
    get_traces,
    read_stored,
    store,
    trace_both,
    with_provenance,
)

PAIRS = ((2, 4), (4, 8))
"""Micro-batches that are traced; the second pair where a step does other things at 2 than at 4."""
SCALING_CODE = "trainfit.memory.scaling"
"""The module that makes scaled traces of traces."""
PARTS = ("training", "evaluation")


def scalable(setting: Setting) -> bool:
    """Whether micro-batches of its window do not know of each other: a contrastive window is one loss."""
    return not setting.family.coupled(setting)


def scaled_traces_of(
    request: TraceRequest, *, cache: bool, note: Callable[[str], None]
) -> Mapping[TraceRequest, ScaledTrace | None]:
    """The scaled trace of a request, and of the other part where that was made with it; None where traces cannot be scaled."""
    packaged_trace = packaged(request)
    if packaged_trace is not None:
        return {request: packaged_trace}
    known = read_stored(scaled_path(request), partial(_stored, request)) if cache else None
    if known is not None:
        return {request: known[0]}
    note(f"tracing {request.part} at two micro-batches, which no stored trace covers...")
    made = make_scaled(request, cache=cache)
    for each, scaled in made.items() if cache and request.setting.family.cacheable else ():
        record = {"scaled": scaled.to_record() if scaled else None}
        store(scaled_path(each), with_provenance(each, record, SCALING_CODE))
    return made


def _stored(request: TraceRequest, text: str) -> tuple[ScaledTrace | None] | None:
    """(None,) where it is known that the step's traces cannot be scaled; None: not valid."""
    record = content_if_valid(request, text)
    if record is None:
        return None
    return (None if record["scaled"] is None else ScaledTrace.from_record(record["scaled"]),)


def make_scaled(request: TraceRequest, *, cache: bool) -> Mapping[TraceRequest, ScaledTrace | None]:
    """Trace a request at two micro-batches and align; None where that cannot be. Training and evaluation of a window share the
    building of the model and a window of training: where a process can be forked, and neither is known, both are made.
    """
    others = [replace(request, part=part) for part in PARTS if part != request.part]
    shares = sys.platform == "linux" and scalable(request.setting)
    made: dict[TraceRequest, ScaledTrace | None] = {request: None}
    if shares and not any(source(each) or (cache and scaled_path(each).exists()) for each in others):
        made |= dict.fromkeys(others)
    for pair in PAIRS:
        missing = [each for each, scaled in made.items() if scaled is None]
        for each, (small, large) in _traces_of(missing, pair, cache=cache).items():
            made[each] = scale(small, large, pair)
    return made


def _traces_of(
    requests: list[TraceRequest], pair: tuple[int, int], *, cache: bool
) -> dict[TraceRequest, tuple[StoredTrace, StoredTrace]]:
    """The traces of each request at two micro-batches; of both parts together they are not stored."""
    if len(requests) == len(PARTS):
        evaluation = replace(requests[0], part="evaluation")
        small, large = trace_both([at_number(evaluation, number) for number in pair])
        of_part = dict(zip(PARTS, zip(small, large, strict=True), strict=True))
        return {each: of_part[each.part] for each in requests}
    made: dict[TraceRequest, tuple[StoredTrace, StoredTrace]] = {}
    for each in requests:
        small, large = get_traces([at_number(each, number) for number in pair], cache=cache)
        made[each] = (small, large)
    return made


def at_number(request: TraceRequest, number: int) -> TraceRequest:
    """The request at a micro-batch, or for a contrastive window at an accumulation."""
    knob = "micro_batch" if scalable(request.setting) else "accumulation"
    return replace(request, setting=replace(request.setting, **{knob: number}))


def scaled_path(request: TraceRequest) -> Path:
    """Where the scaled trace of a request is stored."""
    return cache_path(request).with_suffix(".scaled.gz")
