"""Operators of a coupled window, from those of the two that were traced. Imports no torch.

What an operator does in a call is a line in the pairs that it works on. So its kernels, FLOPs and bytes in a window are a times
its calls and b times its pairs, and the two traced windows give a and b. Calls are counted by what they allocate in the larger
trace: a micro-batch that a window has more repeats the allocations of its block, and their sizes tell the pairs.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainfit.memory.profile import last_window
from trainfit.memory.window_trace import OF_LOSS, WindowTrace
from trainfit.memory.windows import CONSTANT, OF_CUTS, Window, full
from trainfit.timing.counts import OpCount

LEAST_DIFFERENCE = 1e-6
"""Share of its allocations by which an operator's calls and pairs must differ to be distinguished."""
TRACES = 8
"""Traces whose operators are kept: a plan prices its windows from training and evaluation, with and without recompute."""
_Key = tuple[str, str]
"""Operator and phase."""
_Rows = Mapping[tuple[str, str, str], tuple[float, float, float]]
"""Operator, phase and type -> kernels, FLOPs and bytes."""
_Measures = Mapping[_Key, tuple[float, float]]
"""Operator and phase -> calls and pairs, both in bytes of the larger trace."""


def ops_at(trace: WindowTrace, window: Window) -> tuple[OpCount, ...]:
    """Operators of a window: rows of one operator, phase and type together. Of the evaluation that a trace may end with:
    give `Window.evaluated`.
    """
    few, many, work, small, large = _traced(trace)
    windows = (*trace.windows, window)
    own = work.of(window)
    rows: list[OpCount] = []
    for key, values in many.items():
        op, phase, dtype = key
        if (op, phase) in large:
            measures = [each[op, phase] for each in (small, large, own)]
        else:
            measures = [
                (1.0, float(each.cuts[0].size)) if work.is_evaluation else _without_allocations(op, phase, each)
                for each in windows
            ]
        pairs = zip(few.get(key, values), values, strict=True)
        count, flops, nbytes = (_predicted(low, high, measures) for low, high in pairs)
        rows.append(OpCount(op=op, phase=phase, dtype=dtype, count=max(1, round(count)), flops=flops, bytes=nbytes))
    return tuple(rows)


@lru_cache(maxsize=TRACES)
def _traced(trace: WindowTrace) -> "tuple[_Rows, _Rows, _Work, _Measures, _Measures]":
    """The operators of both traced windows, and what they allocate, in all and in each of the windows."""
    few, many = (_sums(rows) for rows in trace.ops)
    work = _Work(trace)
    small, large = map(work.of, trace.windows)
    return few, many, work, small, large


def _predicted(low: float, high: float, measures: Sequence[tuple[float, float]]) -> float:
    """A count in the third window, from its values in the first and the second; `measures`: calls and pairs in each."""
    (calls_low, pairs_low), (calls_high, pairs_high), (calls, pairs) = measures
    determinant = calls_low * pairs_high - pairs_low * calls_high
    if abs(determinant) <= LEAST_DIFFERENCE * calls_high * pairs_high:
        return high * calls / calls_high
    each = (low * pairs_high - high * pairs_low) / determinant
    slope = (high - each * calls_high) / pairs_high
    return max(0.0, each * calls + slope * pairs)


def _without_allocations(op: str, phase: str, window: Window) -> tuple[float, float]:
    """Calls and pairs of an operator that allocates nothing. It works in a micro-batch of each cut, of which all but the last run
    forward twice, or between two of them; those of the update work on lists of tensors, once.
    """
    if phase == "optimizer" or "_foreach" in op:
        return 1.0, 1.0
    before_last = sum(cut.parts - 1 for cut in window.cuts)
    pairs_before_last = sum(cut.size * (cut.parts - 1) for cut in window.cuts)
    if phase != "forward":
        return float(before_last), float(pairs_before_last)
    last = sum(cut.last for cut in window.cuts)
    return float(2 * before_last + len(window.cuts)), float(2 * pairs_before_last + last)


class _Work:
    """What the operators of the larger trace's last window allocate."""

    def __init__(self, trace: WindowTrace) -> None:
        self.trace = trace
        columns = trace.columns
        begin = last_window(columns)
        self.is_evaluation = all(block.begin < begin for block in trace.repeats)
        """Whether the trace ends with an evaluation, which runs one micro-batch, not with the coupled window."""
        places = np.arange(begin, len(columns.events))
        allocates = columns.events[places] > 0
        places = places[allocates]
        tensors = columns.events[places] - 1
        self.block = np.full(len(places), -1)
        """Index of the repetition whose first occurrence a tensor is in; -1: of none."""
        for number, block in enumerate(trace.repeats):
            self.block[(places >= block.begin) & (places < block.end)] = number
        phases = [_merged(columns.names[number]) for number in columns.phase[tensors]]
        follows = trace.follows[tensors]
        self.laws = _governing(follows.tolist(), phases)
        values = np.array(trace.windows[1].values(), dtype=float)
        self.full: NDArray[np.float64] = values[[full(law) for law in range(len(values))]]
        """What each law's size is in a full micro-batch or chunk of the larger trace."""
        self.nbytes: NDArray[np.float64] = columns.nbytes[tensors] * (self.full / values)[follows]
        """Bytes of each tensor, were all micro-batches and chunks full."""
        numbers: dict[_Key, int] = {}
        names = zip((columns.names[number] for number in columns.op[tensors]), phases, strict=True)
        self.key = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
        self.keys = list(numbers)

    def of(self, window: Window) -> _Measures:
        """Those of a window."""
        traced = self.trace.windows[1]
        more = [
            window.chunks - traced.chunks
            if block.of == OF_LOSS
            else window.cuts[block.of].parts - traced.cuts[block.of].parts
            for block in self.trace.repeats
        ]
        calls = self.nbytes * (1 + np.array([*more, 0])[self.block])
        ratio = np.array(window.values()) / self.full
        sums = (
            np.bincount(self.key, weights=each, minlength=len(self.keys)) for each in (calls, calls * ratio[self.laws])
        )
        return dict(zip(self.keys, zip(*(each.tolist() for each in sums), strict=True), strict=True))


def _governing(laws: Sequence[int], phases: Sequence[str]) -> NDArray[np.int64]:
    """What the work follows that makes each tensor: as its size does; of the constant ones (gradients of parameters) as the sizes
    of the micro-batch that it is in.
    """
    governing: list[int] = []
    current = CONSTANT
    for law, phase in zip(laws, phases, strict=True):
        if law >= OF_CUTS:
            current = law
        governing.append(current if law == CONSTANT and phase in ("forward", "backward") else law)
    return np.array(governing, dtype=np.int64)


def _sums(rows: Sequence[OpCount]) -> _Rows:
    """(kernels, FLOPs, bytes) of the rows of one operator, phase and type."""
    sums: dict[tuple[str, str, str], tuple[float, float, float]] = {}
    for row in rows:
        key = row.op, _merged(row.phase), row.dtype
        count, flops, nbytes = sums.get(key, (0.0, 0.0, 0.0))
        sums[key] = count + row.count, flops + row.flops, nbytes + row.bytes
    return sums


def _merged(phase: str) -> str:
    """Inputs of the first micro-batch are a phase of their own, those of the others are loaded in "forward"."""
    return "forward" if phase == "inputs" else phase
