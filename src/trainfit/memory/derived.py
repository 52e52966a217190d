"""Settings that are priced from the trace of another, because they differ from it in what is left out or moved: EMA weights that
are off or on the host, and optimizers whose state follows from AdamW's. Imports no torch.

`tests/test_derived.py` compares them with traces of their own, to the byte.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from trainfit.memory.columns import Columns
from trainfit.memory.host_ema import ema_for_evaluation, without_ema
from trainfit.memory.host_state import COUNT_BYTES, are_moments, state_on_host, with_state_on_host
from trainfit.models.setting import Setting
from trainfit.step.names import Optimizer
from trainfit.timing.counts import OpCount

Part = Literal["training", "evaluation"]
TRACED: Optimizer = "adamw-fused"
TRAFFIC: dict[Optimizer, float] = {"adam": 1.0, "sgd": 3 / 4, "sgd-plain": 2 / 4}
"""Bytes that an optimizer moves, as a multiple of fused AdamW's, which reads weights, gradients and two moments. Others make
temporaries, or are copied before their update so that it can be undone: they are traced."""


def traced_as(setting: Setting) -> Setting:
    """The setting whose trace another is priced from; itself where that is a trace of its own.

    A model of the user's own may have an optimizer of its own: such a setting is traced as it is.
    """
    if not setting.family.cacheable:
        return replace(setting, ema_on_host=False)
    optimizer = TRACED if state_on_host(setting) or setting.optimizer in TRAFFIC else setting.optimizer
    ema = None if _leaves_ema_out(setting) else setting.ema
    return replace(setting, ema_on_host=False, optimizer=optimizer, ema=ema)


def _leaves_ema_out(setting: Setting) -> bool:
    return setting.family.ema and not setting.keeps_ema


def derived_columns(trace: Columns, setting: Setting, part: Part) -> Columns:
    """The columns of a setting, from those of `traced_as`."""
    if not setting.family.cacheable:
        return _ema_on_host(trace, part) if setting.ema_on_host else trace
    if state_on_host(setting):
        trace = with_state_on_host(trace)
    elif setting.optimizer in ("sgd", "sgd-plain"):
        trace = _with_buffers(trace, 1 if setting.optimizer == "sgd" else 0)
    if _leaves_ema_out(setting):
        return without_ema(trace)
    return _ema_on_host(trace, part) if setting.ema_on_host else trace


def _ema_on_host(trace: Columns, part: Part) -> Columns:
    return without_ema(trace) if part == "training" else ema_for_evaluation(trace)


def _with_buffers(trace: Columns, number: int) -> Columns:
    """With `number` of the two moments of every parameter, and without step counts."""
    nbytes = trace.nbytes.copy()
    moments = np.flatnonzero(are_moments(trace))
    for index in range(number, 2):
        nbytes[moments[index::2]] = 0
    nbytes[trace.of_category("optimizer state") & (trace.nbytes <= COUNT_BYTES)] = 0
    return replace(trace, nbytes=nbytes)


def derived_ops(ops: Sequence[OpCount], setting: Setting) -> tuple[OpCount, ...]:
    """The operators of a setting, from those of `traced_as`: no update of EMA weights, or another of the weights."""
    if not setting.family.cacheable:
        return tuple(ops)
    traffic = TRAFFIC.get(setting.optimizer, 1.0)
    kept = (row for row in ops if not (_leaves_ema_out(setting) and row.op == "aten._foreach_lerp_"))
    return tuple(replace(row, bytes=row.bytes * traffic) if row.op == "aten._fused_adamw_" else row for row in kept)
