"""AdamW's moments in the CPU's memory (`--optimizer adamw-host`), priced from a trace that has them on the GPU."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from trainfit.memory.columns import Columns
from trainfit.models.setting import Setting
from trainfit.step.names import UNIT_BYTES
from trainfit.tracing.events import TensorInfo

COUNT_BYTES = 8
"""Larger optimizer state is moments; what stays on the GPU is a step count for each parameter."""


def moments_bytes(trace: Columns) -> int:
    """What the moments hold, wherever they are."""
    return int(trace.nbytes[are_moments(trace)].sum())


def with_state_on_host(trace: Columns) -> Columns:
    """The step with the moments on the host.

    While the optimizer runs, the GPU holds a copy of one part's parameters (`step.units`) and a buffer for its moments
    (`step.host_adamw`); a bound for all parts stands for each.
    """
    moments = are_moments(trace)
    # Each parameter has two; `UNIT_BYTES` bounds a part that has more than one.
    part_bytes = int(trace.nbytes[moments].max(initial=0))
    part_bytes = max(part_bytes, min(UNIT_BYTES, moments_bytes(trace) // 2))
    rows: list[TensorInfo] = []
    events: list[int] = []
    places: list[int] = []
    for place in sorted({index for index, name in trace.marks if name == "optimizer"}):
        for nbytes in (part_bytes, 2 * part_bytes):
            rows.append(TensorInfo(id=0, nbytes=nbytes, category="temporary", op="aten.empty", phase="optimizer"))
        last = len(trace.nbytes) + len(rows)
        events += [last - 1, last, 1 - last, -last]
        places += [place] * 4
    on_host = replace(trace, nbytes=np.where(moments, 0, trace.nbytes))
    return on_host.with_rows(rows).with_events(places, events)


def are_moments(trace: Columns) -> NDArray[np.bool_]:
    """For each tensor, whether it is a moment of the optimizer."""
    return trace.of_category("optimizer state") & (trace.nbytes > COUNT_BYTES)


def state_on_host(setting: Setting) -> bool:
    """Whether the optimizer's state is moved to the host in a trace. A model of the user's own may have an optimizer of its own,
    which stays where it is: such a setting is traced as it is.
    """
    return setting.optimizer == "adamw-host" and setting.family.cacheable
