"""Finds what repeats in a coupled window, and what sizes follow, from the traces of two windows (`window_trace`)."""

from collections.abc import Sequence, Set
from itertools import accumulate

import numpy as np

from trainfit.memory.columns import Columns
from trainfit.memory.window_trace import OF_LOSS, Block, WindowTrace
from trainfit.memory.windows import LOGITS, OF_CUTS, ROWS, Window, full
from trainfit.tracing.events import Trace
from trainfit.tracing.stored_trace import StoredTrace

AGREEING = 150
"""Events after an insertion that are enough to know its end. Fewer follow where another insertion is near; one recomputed block may
run the same hundred events with and without saved activations."""
LONGEST_INSERTION = 100_000
"""Events of the longest insertion that is looked for."""


def align(small: StoredTrace, large: StoredTrace, windows: tuple[Window, Window]) -> WindowTrace | None:
    """Align the traces of one setting over two windows; None where the smaller one cannot be made of the larger one: they
    differ in more than repetitions, or a size follows neither window nor micro-batch.
    """
    keys = _Keys(small.trace, large.trace)
    insertions = _insertions(keys)
    if insertions is None:
        return None
    live = list(accumulate(1 if event > 0 else -1 for event in large.trace.events))
    inserted = [_moved_left(keys.large, live, begin, end) for begin, end in insertions]
    follows = _follows(small.trace, large.trace, inserted, windows)
    if follows is None:
        return None
    repeats: list[Block] = []
    for begin, end in inserted:
        laws = {follows[event - 1] for event in large.trace.events[begin:end] if event > 0}
        if laws:  # else they are the frees of what an inserted micro-batch keeps
            repeats.append(Block(begin=begin, end=end, of=_repeated(laws)))
    aligned = WindowTrace(
        windows=windows,
        columns=Columns.of(large.trace),
        follows=np.array(follows, dtype=np.int64),
        repeats=tuple(repeats),
        ops=(small.ops, large.ops),
        made_up=large.made_up,
        upper_bounds=large.upper_bounds,
        blocks=large.blocks,
    )
    composed = aligned.at(windows[0])
    traced = Columns.of(small.trace)
    is_same = np.array_equal(composed.events, traced.events) and np.array_equal(composed.nbytes, traced.nbytes)
    return aligned if is_same else None


def _repeated(laws: Set[int]) -> int:
    """What a block with tensors of these laws is a repetition of, as `Block.of`."""
    if not laws.isdisjoint((ROWS, LOGITS)):
        return OF_LOSS
    return next(((law - OF_CUTS) // 2 for law in sorted(laws) if law >= OF_CUTS), 0)


def _moved_left(keys: Sequence[int], live: Sequence[int], begin: int, end: int) -> tuple[int, int]:
    """The events do not show which of equal repetitions an insertion is, nor where one begins: the first of those that begin
    where the fewest tensors are alive is taken.
    """
    if all(key < 0 for key in keys[begin:end]):
        return begin, end
    most = 0
    while most < begin and keys[begin - 1 - most] == keys[end - 1 - most]:
        most += 1
    by = min(range(most + 1), key=lambda by: (live[end - by - 1], -by))
    return begin - by, end - by


def _follows(
    small: Trace, large: Trace, inserted: Sequence[tuple[int, int]], windows: tuple[Window, Window]
) -> list[int] | None:
    """What each tensor of the larger trace follows; None where the traces do not match."""
    follows: list[int | None] = [None] * len(large.tensors)
    begins = dict(inserted)
    j = 0
    for event in small.events:
        while j in begins:
            j = begins[j]
        other = large.events[j]
        j += 1
        if event > 0:
            follows[other - 1] = _law(small.tensors[event - 1].nbytes, large.tensors[other - 1].nbytes, windows)
            if follows[other - 1] is None:
                return None
    for begin, end in inserted:
        for index in range(begin, end):
            event = large.events[index]
            twin = large.events[index + end - begin]
            if event > 0:
                law = follows[twin - 1]
                follows[event - 1] = full(law) if law is not None else None
    for begin, end in inserted:  # the first chunk, which is a full one in both traces, is like those that follow
        own = [event - 1 for event in large.events[begin:end] if event > 0]
        if any(follows[tensor] in (ROWS, LOGITS) for tensor in own):
            for tensor in own:
                follows[tensor - len(own)] = follows[tensor]
    return None if None in follows else [law for law in follows if law is not None]


def _law(small: int, large: int, windows: tuple[Window, Window]) -> int | None:
    for law, (before, after) in enumerate(zip(*(window.values() for window in windows), strict=True)):
        if small * after == large * before:
            return law
    return None


class _Keys:
    """The events of two traces as numbers that are equal for like events."""

    def __init__(self, small: Trace, large: Trace) -> None:
        numbers: dict[tuple[str, str], int] = {}
        self.small, self.large = (_keys(trace, numbers) for trace in (small, large))


def _keys(trace: Trace, numbers: dict[tuple[str, str], int]) -> list[int]:
    of_tensor = [1 + numbers.setdefault((t.op, t.module), len(numbers)) for t in trace.tensors]
    return [of_tensor[event - 1] if event > 0 else -of_tensor[-event - 1] for event in trace.events]


def _insertions(keys: _Keys) -> list[tuple[int, int]] | None:
    """(begin, end) of the larger trace's events that the smaller one does not have; None where it has others."""
    small = keys.small
    large = keys.large
    insertions: list[tuple[int, int]] = []
    i = j = 0
    while i < len(small):
        if j < len(large) and small[i] == large[j]:
            i += 1
            j += 1
            continue
        end = _end_of_insertion(small[i : i + AGREEING], large, j)
        if end is None:
            return None
        insertions.append((j, end))
        j = end
    if j < len(large):
        insertions.append((j, len(large)))
    return insertions


def _end_of_insertion(expected: Sequence[int], large: Sequence[int], begin: int) -> int | None:
    """Where most of the expected events follow, of several such places the first; None where not even one does."""
    best: int | None = None
    most = 0
    for end in range(begin + 1, min(begin + LONGEST_INSERTION, len(large))):
        if large[end] != expected[0]:
            continue
        agreeing = next(
            (n for n, event in enumerate(expected) if large[end + n : end + n + 1] != [event]), len(expected)
        )
        if agreeing > most:
            best = end
            most = agreeing
        if most == len(expected):
            break
    return best
