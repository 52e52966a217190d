"""EMA weights in the CPU's memory, priced from a trace that has them on the GPU."""

from dataclasses import replace

import numpy as np

from trainfit.memory.columns import Columns
from trainfit.memory.profile import last_window


def without_ema(trace: Columns) -> Columns:
    """Training with the EMA weights on the host: they take nothing on the GPU."""
    return replace(trace, nbytes=np.where(trace.of_category("EMA"), 0, trace.nbytes))


def ema_for_evaluation(trace: Columns) -> Columns:
    """Evaluation with the EMA weights on the host: they come to the GPU when the last window, the evaluation, begins.

    So the training before it does without them (`models.build._evaluate` and `training.evaluation.evaluating` move
    them).
    """
    is_ema = trace.of_category("EMA")
    kept = ~is_ema[np.abs(trace.events) - 1]
    begins = np.append(0, np.cumsum(kept))
    marks = tuple((int(begins[index]), name) for index, name in trace.marks)
    ema = (np.flatnonzero(is_ema) + 1).tolist()
    start = int(begins[last_window(trace)])
    return replace(trace, events=trace.events[kept], marks=marks).with_events([start] * len(ema), ema)
