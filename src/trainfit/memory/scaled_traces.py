"""Scaled traces (`scaling`): of a request, from the package, from the disk, or traced now. Imports no torch."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

from trainfit.memory.aligned_cache import AlignedCache
from trainfit.memory.packaged import packaged
from trainfit.memory.scaling import ScaledTrace, scale
from trainfit.memory.shipped import source
from trainfit.models.setting import Setting
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest, get_traces, trace_both

PAIRS = ((2, 4), (4, 8))
"""Micro-batches that are traced; the second pair where a step does other things at 2 than at 4."""
KEPT = AlignedCache(name="scaled", code="trainfit.memory.scaling", from_record=ScaledTrace.from_record)
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
    stores = cache and request.setting.family.cacheable
    known = KEPT.read(request) if stores else None
    if known is not None:
        return {request: known[0]}
    note(f"tracing {request.part} at two micro-batches, which no stored trace covers...")
    made = make_scaled(request, cache=cache)
    if stores:
        KEPT.store(made)
    return made


def make_scaled(request: TraceRequest, *, cache: bool) -> Mapping[TraceRequest, ScaledTrace | None]:
    """Trace a request at two micro-batches and align; None where that cannot be. Training and evaluation of a window share the
    building of the model and a window of training: where a process can be forked, and neither is known, both are made.
    """
    others = [replace(request, part=part) for part in PARTS if part != request.part]
    shares = sys.platform == "linux" and scalable(request.setting)
    made: dict[TraceRequest, ScaledTrace | None] = {request: None}
    if shares and not any(source(each) or (cache and KEPT.path(each).exists()) for each in others):
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
