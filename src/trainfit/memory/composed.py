"""Composed traces of coupled windows (`window_trace`): of a request, from the package, from the disk, or traced now."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace

from trainfit.memory.aligned_cache import AlignedCache
from trainfit.memory.columns import ColumnTrace
from trainfit.memory.shipped import is_shipped, shipped
from trainfit.memory.window_alignment import align
from trainfit.memory.window_ops import ops_at
from trainfit.memory.window_trace import WindowTrace
from trainfit.memory.windows import ANY_RATIO, Window, ratio_of, traced_windows
from trainfit.models.setting import Setting
from trainfit.tracing.trace_cache import TraceRequest, get_traces, trace_both

KEPT = AlignedCache(name="window", code="trainfit.memory.window_alignment", from_record=WindowTrace.from_record)


def is_composed(setting: Setting) -> bool:
    """Whether windows of the setting are composed: a coupled loss in chunks of rows, and equal micro-batches."""
    return setting.family.coupled(setting) and setting.family.coupled_rows(setting) > 0


def any_window(request: TraceRequest) -> TraceRequest:
    """The request without what a composed trace answers for all values of."""
    ratio = {} if ratio_of(request.setting) is None else {str(request.setting.family.ratio_knob): ANY_RATIO}
    setting = replace(request.setting, micro_batch=1, accumulation=1, eval_micro_batch=None, **ratio)
    return replace(request, setting=setting)


def is_known(request: TraceRequest, *, cache: bool) -> bool:
    """Whether `window_traces_of` answers without tracing."""
    stores = cache and request.setting.family.cacheable
    return is_shipped(request) or (stores and KEPT.path(request).exists())


def window_traces_of(
    request: TraceRequest, *, cache: bool, note: Callable[[str], None]
) -> Mapping[TraceRequest, WindowTrace | None]:
    """The composed trace of a request of `any_window`, and of the other part where that was made with it; None where the step's
    windows cannot be aligned.
    """
    packaged = shipped(request, WindowTrace.from_record)
    if packaged is not None:
        return {request: packaged}
    stores = cache and request.setting.family.cacheable
    known = KEPT.read(request) if stores else None
    if known is not None:
        return {request: known[0]}
    note("tracing training and evaluation of two windows, which no stored trace covers...")
    made = make_window_traces(request)
    if stores:
        KEPT.store(made)
    return made


def make_window_traces(request: TraceRequest) -> Mapping[TraceRequest, WindowTrace | None]:
    """Trace two windows and align them; where a process can be forked, of training and of evaluation at once."""
    setting = request.setting
    windows = traced_windows(setting.family.coupled_rows(setting), has_ratio=ratio_of(setting) is not None)
    if sys.platform != "linux":
        small, large = get_traces([_at(request, window) for window in windows], cache=False)
        return {request: align(small, large, windows)}
    of_evaluation = replace(request, part="evaluation")
    both = trace_both([_at(of_evaluation, window) for window in windows])
    training, evaluation = zip(*both, strict=True)
    return {
        replace(request, part="training"): align(training[0], training[1], windows),
        of_evaluation: align(evaluation[0], evaluation[1], windows),
    }


def _at(request: TraceRequest, window: Window) -> TraceRequest:
    """A request at one window."""
    own = window.cuts[0]
    setting = replace(request.setting, micro_batch=own.size, accumulation=own.parts)
    return replace(request, setting=setting, samples=window.pairs)


def trace_at(trace: WindowTrace, window: Window, eval_micro_batch: int | None = None) -> ColumnTrace:
    """The trace of a window, or of an evaluation micro-batch after it, with what goes with it."""
    evaluated = window if eval_micro_batch is None else window.evaluated(eval_micro_batch)
    return ColumnTrace(
        columns=trace.at(window, eval_micro_batch=eval_micro_batch),
        ops=ops_at(trace, evaluated),
        made_up=trace.made_up,
        upper_bounds=trace.upper_bounds,
        blocks=trace.blocks,
    )
