"""EMA weights in the CPU's memory, priced from a trace that has them on the GPU."""

from dataclasses import replace

from trainfit.memory.profile import last_window
from trainfit.tracing.events import Trace


def without_ema(trace: Trace) -> Trace:
    """Training with the EMA weights on the host: they take nothing on the GPU."""
    tensors = tuple(replace(t, nbytes=0) if t.category == "EMA" else t for t in trace.tensors)
    return replace(trace, tensors=tensors)


def ema_for_evaluation(trace: Trace) -> Trace:
    """Evaluation with the EMA weights on the host: they come to the GPU when the last window, the evaluation, begins.

    So the training before it does without them (`models.build._evaluate` and `training.evaluation.evaluating` move
    them).
    """
    start = last_window(trace)
    ema = [index + 1 for index, tensor in enumerate(trace.tensors) if tensor.category == "EMA"]
    left_out = {*ema, *(-number for number in ema)}
    events: list[int] = []
    begins: list[int] = []  # index of each old event in the new list
    for index, event in enumerate(trace.events):
        begins.append(len(events))
        if index == start:
            events += ema
        if event not in left_out:
            events.append(event)
    begins.append(len(events))
    marks = tuple((begins[index], name) for index, name in trace.marks)
    return replace(trace, events=tuple(events), marks=marks)
