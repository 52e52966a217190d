"""Composed traces of coupled windows (`window_trace`): of a request, from the package, from the disk, or traced now."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from trainfit.memory.columns import ColumnTrace
from trainfit.memory.shipped import is_shipped, shipped
from trainfit.memory.window_alignment import align
from trainfit.memory.window_trace import WindowTrace, traced_windows
from trainfit.models.setting import Setting
from trainfit.tracing.trace_cache import (
    TraceRequest,
    cache_path,
    content_if_valid,
    get_traces,
    read_stored,
    store,
    with_provenance,
)

WINDOW_CODE = "trainfit.memory.window_alignment"
"""What makes traces of any window from those of two."""


def is_composed(setting: Setting) -> bool:
    """Whether windows of the setting are composed: a coupled loss in chunks of rows, and equal micro-batches."""
    return setting.family.coupled(setting) and setting.family.coupled_rows(setting) > 0


def is_traced_alone(setting: Setting) -> bool:
    """Whether a coupled window is traced by itself, because it cannot be composed."""
    return setting.family.coupled(setting) and not is_composed(setting)


def any_window(request: TraceRequest) -> TraceRequest:
    """The request without what a composed trace answers for all values of."""
    setting = replace(request.setting, micro_batch=1, accumulation=1, eval_micro_batch=None)
    return replace(request, setting=setting)


def is_known(request: TraceRequest, *, cache: bool) -> bool:
    """Whether `window_trace_of` answers without tracing."""
    stores = cache and request.setting.family.cacheable
    return is_shipped(request) or (stores and cache_path(request).with_suffix(".window.gz").exists())


def window_trace_of(request: TraceRequest, *, cache: bool, note: Callable[[str], None]) -> WindowTrace | None:
    """The composed trace of a request of `any_window`; None where the step's windows cannot be aligned."""
    packaged = shipped(request, WindowTrace.from_record)
    if packaged is not None:
        return packaged
    stores = cache and request.setting.family.cacheable
    path = cache_path(request).with_suffix(".window.gz")
    known = read_stored(path, partial(_stored, request)) if stores else None
    if known is not None:
        return known[0]
    note(f"tracing {request.part} of two windows, which no stored trace covers...")
    made = make_window_trace(request, cache=cache)
    if stores:
        record = {"window": made.to_record() if made else None}
        store(path, with_provenance(request, record, WINDOW_CODE))
    return made


def make_window_trace(request: TraceRequest, *, cache: bool) -> WindowTrace | None:
    """Trace two windows and align them; None where that cannot be."""
    windows = traced_windows(request.setting.family.coupled_rows(request.setting))
    requests = [at(request, window.micro_batch, window.accumulation) for window in windows]
    small, large = get_traces(requests, cache=cache)
    return align(small, large, windows)


def at(request: TraceRequest, micro_batch: int, accumulation: int) -> TraceRequest:
    """A request at one window."""
    return replace(request, setting=replace(request.setting, micro_batch=micro_batch, accumulation=accumulation))


def trace_at(window: WindowTrace, setting: Setting, part: str) -> ColumnTrace:
    """The trace of a setting's window, with what goes with it."""
    evaluated = (setting.eval_micro_batch or setting.micro_batch) if part == "evaluation" else None
    return ColumnTrace(
        columns=window.at(setting.micro_batch, setting.accumulation, eval_micro_batch=evaluated),
        ops=window.ops_at(evaluated or setting.micro_batch, setting.accumulation),
        made_up=window.made_up,
        upper_bounds=window.upper_bounds,
        blocks=window.blocks,
    )


def _stored(request: TraceRequest, text: str) -> tuple[WindowTrace | None] | None:
    """(None,) where it is known that the windows cannot be aligned; None: not valid."""
    record = content_if_valid(request, text)
    if record is None:
        return None
    return (None if record["window"] is None else WindowTrace.from_record(record["window"]),)
