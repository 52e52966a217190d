"""A trace through the allocator at a capacity, event by event. `replay_loop.c` does the same where a compiler is at hand.

Blocks in use are not kept at all: a free block is found by its start and by its end, and segments have gaps between them so that
blocks of two never touch. What a capacity leaves as it is without one, up to the first segment beyond it, is replayed once: later
replays go on from a copy of the state just before.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np

from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.caching_allocator import BLOCK_BYTES, MIN_LARGE_BYTES, SMALL_BYTES, SMALL_SEGMENT_BYTES
from trainfit.memory.columns import Integers

STEP = 1.01
"""States are kept for capacities so far apart."""
# Sizes and addresses are multiples of BLOCK_BYTES and counted in these. A free block is one integer, as in `caching_allocator`.
_ADDRESS_BITS = 36
_ADDRESS = (1 << _ADDRESS_BITS) - 1
UNLIMITED = 1 << 60
SMALL = SMALL_BYTES // BLOCK_BYTES
SEGMENT = SMALL_SEGMENT_BYTES // BLOCK_BYTES
LARGE = AllocatorConfig().large_segment_size_bytes // BLOCK_BYTES
LARGEST_SHARED = MIN_LARGE_BYTES // BLOCK_BYTES


@dataclass(frozen=True, kw_only=True, eq=False)
class Events:
    """A trace as a loop takes it, in blocks. No tensor of no bytes is in it."""

    ops: Integers
    """i: tensor i is allocated, ~i: freed, tensors + i: both at once; 2 * tensors + i, before that: is there a free block for its
    most bytes?
    """
    tensors: int
    sizes: Integers
    """Of each tensor, and then each with its most bytes."""
    pools: Integers
    """Of the same: index of the pool."""
    pool_count: int
    has_missed: bool
    """Whether a tensor is of another pool with its most bytes: a block for them says nothing of one for its own."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ended:
    """Of a replay. It is the same at every capacity that accepts and rejects the same segments."""

    survives: bool
    accepted: int
    """The most that was reserved after a new segment."""
    rejected: int
    """The least that would have been reserved after a segment for which the capacity was too small."""
    has_missed: bool
    """Whether a tensor would have found no free block at its most bytes."""
    reserved: int
    """At the end."""
    retries: int
    exchanges: Integers
    """(event, reserved after it) of each segment that the driver gave, and each time the cache was emptied: (..., 2)."""
    lengths: Integers
    """Of each tensor's block."""


@dataclass(kw_only=True, slots=True)
class _State:
    """State of the allocator between two events."""

    starts: list[int]
    """Start of each tensor's block."""
    ends: list[int]
    free: list[list[int]]
    """For each pool its free blocks, sorted by size and address."""
    end_of: dict[int, int] = field(default_factory=dict[int, int])
    """Start -> end of each free block."""
    start_of: dict[int, int] = field(default_factory=dict[int, int])
    """End -> start of each free block."""
    segments: dict[int, int] = field(default_factory=dict[int, int])
    """Start -> end."""
    reserved: int = 0
    next_segment: int = SEGMENT
    accepted: int = 0
    rejected: int = UNLIMITED
    has_missed: bool = False
    exchanges: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    retries: int = 0

    def copy(self) -> "_State":
        return _State(
            starts=self.starts.copy(),
            ends=self.ends.copy(),
            free=[pool.copy() for pool in self.free],
            end_of=self.end_of.copy(),
            start_of=self.start_of.copy(),
            segments=self.segments.copy(),
            reserved=self.reserved,
            next_segment=self.next_segment,
            accepted=self.accepted,
            rejected=self.rejected,
            has_missed=self.has_missed,
            exchanges=self.exchanges.copy(),
            retries=self.retries,
        )

    def empty_cache(self, index: int) -> None:
        """Give every segment that is free as a whole back to the driver, which has no memory left."""
        for number, pool in enumerate(self.free):
            kept: list[int] = []
            for key in pool:
                start = key & _ADDRESS
                end = start + (key >> _ADDRESS_BITS)
                if self.segments.get(start) == end:
                    del self.end_of[start], self.start_of[end], self.segments[start]
                    self.reserved -= end - start
                else:
                    kept.append(key)
            self.free[number] = kept
        self.exchanges.append((index, self.reserved))
        self.retries += 1

    def new_segment(self, index: int, length: int) -> int:
        """Start of a segment that the driver gives."""
        start = self.next_segment
        self.next_segment += length + 1
        self.segments[start] = start + length
        self.reserved += length
        self.accepted = max(self.accepted, self.reserved)
        self.exchanges.append((index, self.reserved))
        return start

    def exceeds(self, limit: int, length: int) -> bool:
        """Whether a new segment would go beyond a capacity."""
        if self.reserved + length <= limit:
            return False
        self.rejected = min(self.rejected, self.reserved + length)
        return True


class PythonLoop:
    """Replays of one trace."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self._states: list[tuple[int, int, _State]] = []

    @cached_property
    def _lists(self) -> tuple[list[int], list[int], list[int]]:
        return self.events.ops.tolist(), self.events.sizes.tolist(), self.events.pools.tolist()

    def run(self, limit: int) -> Ended:
        """Replay with a capacity in blocks."""
        begin = 0
        state = None
        for reserved, event, kept in self._states:
            if reserved <= limit:
                begin = event
                state = kept
        state = state.copy() if state else self._begin()
        return _ended(state, survives=self._run(state, begin, limit, keep=False))

    def run_free(self, keep_from: int) -> Ended:
        """Replay without a capacity, and keep states for replays with one of `keep_from` blocks or more."""
        state = self._begin()
        return _ended(state, survives=self._run(state, 0, keep_from, keep=True))

    def _begin(self) -> _State:
        count = self.events.tensors
        free: list[list[int]] = [[] for _ in range(self.events.pool_count)]
        return _State(starts=[0] * count, ends=[0] * count, free=free, has_missed=self.events.has_missed)

    def _kept(self, state: _State, index: int, length: int) -> int:
        """Keep a state before a segment that goes beyond a capacity; the capacity from which on the next one is kept."""
        self._states.append((state.reserved, index, state.copy()))
        return int(STEP * (state.reserved + length))

    def _run(self, state: _State, begin: int, limit: int, *, keep: bool) -> bool:
        """Replay from an event to the end; False if memory runs out. `keep`: without a limit; see `_kept`."""
        ops, sizes, pools = self._lists
        count = self.events.tensors
        starts, ends, end_of, start_of = state.starts, state.ends, state.end_of, state.start_of
        for index, op in enumerate(islice(ops, begin, None), begin):
            if op < 0:
                start, end = starts[~op], ends[~op]
                free = state.free[pools[~op]]
            else:
                tensor = op if op < count else op - count
                size = sizes[tensor]
                free = state.free[pools[tensor]]
                at = bisect_left(free, size << _ADDRESS_BITS)
                if at < len(free):
                    if op >= count:
                        continue
                    start = free.pop(at) & _ADDRESS
                    end = end_of.pop(start)
                elif op >= 2 * count:
                    state.has_missed = True
                    continue
                else:
                    length = _segment(size)
                    if keep:
                        if state.reserved + length > limit:
                            limit = self._kept(state, index, length)
                    elif state.exceeds(limit, length):
                        state.empty_cache(index)
                        if state.exceeds(limit, length):
                            return False
                        free = state.free[pools[tensor]]
                    start = state.new_segment(index, length)
                    end = start + length
                if op < count:
                    cut = start + size
                    if end - cut > (0 if size <= SMALL else SMALL):
                        end_of[cut] = end
                        start_of[end] = cut
                        insort(free, (end - cut) << _ADDRESS_BITS | cut)
                        end = cut
                    else:
                        start_of.pop(end, None)
                    starts[tensor], ends[tensor] = start, end
                    continue
            after = end_of.pop(end, 0)
            if after:
                del free[bisect_left(free, (after - end) << _ADDRESS_BITS | end)]
                end = after
            before = start_of.pop(start, 0)
            if before:
                del free[bisect_left(free, (start - before) << _ADDRESS_BITS | before)]
                start = before
            end_of[start] = end
            start_of[end] = start
            insort(free, (end - start) << _ADDRESS_BITS | start)
        return True


def _ended(state: _State, *, survives: bool) -> Ended:
    return Ended(
        survives=survives,
        accepted=state.accepted,
        rejected=state.rejected,
        has_missed=state.has_missed,
        reserved=state.reserved,
        retries=state.retries,
        exchanges=np.array(state.exchanges, dtype=np.int64).reshape(-1, 2),
        lengths=np.array(state.ends, dtype=np.int64) - np.array(state.starts, dtype=np.int64),
    )


def _segment(size: int) -> int:
    """Size of a request's segment, in blocks ("get_allocation_size")."""
    if size <= SMALL:
        return SEGMENT
    return LARGE if size < LARGEST_SHARED else -(-size // SEGMENT) * SEGMENT
