"""Whether a trace survives a capacity, and nothing else: `allocator.replay` for searches, several times as fast.

It follows `caching_allocator` for torch's default settings, to which other settings are left. Blocks in use are not
kept at all: a free block is found by its start and by its end, and segments have gaps between them so that blocks of two
never touch. What a capacity leaves as it is without one, up to the first segment beyond it, is replayed once: later replays
go on from a copy of the state just before.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import numpy as np

from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.allocator import OutOfMemoryAt, replay
from trainfit.memory.caching_allocator import (
    BLOCK_BYTES,
    MIN_LARGE_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    round_size,
)
from trainfit.memory.columns import Columns, Integers

STEP = 1.01
"""States are kept for capacities so far apart."""
# Sizes and addresses are multiples of BLOCK_BYTES and counted in these. A free block is one integer, as in `caching_allocator`.
_ADDRESS_BITS = 36
_ADDRESS = (1 << _ADDRESS_BITS) - 1
_UNLIMITED = 1 << 60
_SMALL = SMALL_BYTES // BLOCK_BYTES
_SEGMENT = SMALL_SEGMENT_BYTES // BLOCK_BYTES
_LARGE = AllocatorConfig().large_segment_size_bytes // BLOCK_BYTES
_LARGEST_SHARED = MIN_LARGE_BYTES // BLOCK_BYTES


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
    next_segment: int = _SEGMENT
    accepted: int = 0
    """The most that was reserved after a new segment."""
    rejected: int = _UNLIMITED
    """The least that would have been reserved after a segment for which the capacity was too small."""
    has_missed: bool = False
    """Whether a tensor would have found no free block at its most bytes."""

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
        )

    def empty_cache(self) -> None:
        """Give every segment that is free as a whole back to the driver."""
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

    def new_segment(self, length: int) -> int:
        """Start of a segment that the driver gives."""
        start = self.next_segment
        self.next_segment += length + 1
        self.segments[start] = start + length
        self.reserved += length
        self.accepted = max(self.accepted, self.reserved)
        return start

    def exceeds(self, limit: int, length: int) -> bool:
        """Whether a new segment would go beyond a capacity."""
        if self.reserved + length <= limit:
            return False
        self.rejected = min(self.rejected, self.reserved + length)
        return True


@dataclass(frozen=True, kw_only=True, slots=True)
class _Outcome:
    """Of a replay. It is the same at every capacity that accepts and rejects the same segments."""

    accepted: int
    rejected: int
    survives: bool
    is_roomy: bool
    """Whether each tensor with other most bytes finds a free block for them, too."""


class QuickReplay:
    """A trace that is replayed at many capacities."""

    def __init__(
        self, trace: Columns, config: AllocatorConfig, *, most_bytes: Integers | None = None, join: bool = True
    ) -> None:
        """Do what does not depend on the capacity.

        `most_bytes`: bytes that tensors may have instead, for `survives_with_most`; more than in the trace only for tensors
        that are freed at once. `join`: these are one step; a block that is there is not cut for them.
        """
        self.trace = trace
        self.config = config
        self.most_bytes = most_bytes
        self._joins = join
        self.is_fast = config == AllocatorConfig(roundup_power2_divisions=config.roundup_power2_divisions)
        self._states: list[tuple[int, int, _State]] = []
        self._exchanges: list[tuple[int, int]] = []
        self.retries = 0
        self._outcomes: list[_Outcome] = []
        if self.is_fast:
            self._compile()

    @cached_property
    def peak_requested_bytes(self) -> int:
        """The most bytes that tensors request at one time: no smaller capacity is survived."""
        return self.trace.peak_bytes()

    @cached_property
    def peak_reserved_bytes(self) -> int:
        """Without a limit."""
        if not self.is_fast:
            return replay(self.trace, capacity_bytes=None, config=self.config).peak_reserved_bytes
        state = self._begin()
        self._run(state, 0, self.peak_requested_bytes // BLOCK_BYTES, keep=True)
        return state.reserved * BLOCK_BYTES

    def survives(self, capacity_bytes: int) -> bool:
        """Whether `replay` runs out of no memory at a capacity."""
        if not self.is_fast:
            return replay(self.trace, capacity_bytes=capacity_bytes, config=self.config).oom is None
        return self._outcome(capacity_bytes // BLOCK_BYTES).survives

    def survives_with_most(self, capacity_bytes: int) -> bool:
        """`survives` of the trace with `most_bytes`.

        Where the trace itself survives, and each of those tensors finds a free block at its most bytes too, both leave the
        allocator in the same state: then the one replay answers for both.
        """
        assert self.most_bytes is not None
        if self.is_fast and self._outcome(capacity_bytes // BLOCK_BYTES).is_roomy:
            return True
        return self.with_most.survives(capacity_bytes)

    def _outcome(self, capacity: int) -> _Outcome:
        """What a replay at a capacity ends in; those that are known need none."""
        for outcome in self._outcomes:
            if outcome.accepted <= capacity < outcome.rejected:
                return outcome
        begin = 0
        state = None
        for reserved, event, kept in self._states:
            if reserved <= capacity:
                begin = event
                state = kept
        state = state.copy() if state else self._begin()
        survives = self._run(state, begin, capacity, keep=False)
        outcome = _Outcome(
            accepted=state.accepted,
            rejected=state.rejected,
            survives=survives,
            is_roomy=survives and not state.has_missed,
        )
        self._outcomes.append(outcome)
        return outcome

    @cached_property
    def with_most(self) -> "QuickReplay":
        """The trace with `most_bytes`."""
        assert self.most_bytes is not None
        return QuickReplay(replace(self.trace, nbytes=self.most_bytes), self.config)

    def history(self, capacity_bytes: int | None) -> "History":
        """What the allocator does with the trace, event by event. No tensors are joined."""
        assert not self._joins
        trace, state = self.trace, self._begin()
        capacity = _UNLIMITED if capacity_bytes is None else capacity_bytes // BLOCK_BYTES
        survives = self._run(state, 0, capacity, keep=False)
        tensors = np.abs(trace.events) - 1
        at_event = np.flatnonzero(trace.nbytes[tensors] > 0)
        block_bytes = BLOCK_BYTES * (np.array(state.ends, dtype=np.int64) - np.array(state.starts, dtype=np.int64))
        allocated = np.cumsum(np.sign(trace.events) * block_bytes[tensors])
        exchanges = np.array(self._exchanges, dtype=np.int64).reshape(-1, 2)
        after = np.searchsorted(at_event[exchanges[:, 0]], np.arange(len(trace.events)), side="right")
        reserved = BLOCK_BYTES * np.append(0, exchanges[:, 1])[after]
        oom = None
        if not survives:
            event = int(at_event[self._exchanges[-1][0]])
            allocated, reserved = allocated[:event], reserved[:event]
            oom = OutOfMemoryAt(
                event=event,
                wanted_bytes=int(trace.nbytes[tensors[event]]),
                allocated_bytes=int(allocated[-1]) if event else 0,
                reserved_bytes=BLOCK_BYTES * state.reserved,
            )
        return History(
            peak_allocated_bytes=int(allocated.max(initial=0)),
            peak_reserved_bytes=int(reserved.max(initial=0)),
            retries=self.retries,
            oom=oom,
            allocated_timeline=allocated,
            reserved_timeline=reserved,
        )

    def _compile(self) -> None:
        """Events without tensors of no bytes, as numbers: i: tensor i is allocated, ~i: freed, tensors + i: both at once;
        2 * tensors + i, before that: is there a free block for its most bytes, whose size follows those of all tensors?
        """
        trace = self.trace
        events = self.trace.events
        count = len(trace.nbytes)
        most = trace.nbytes if self.most_bytes is None else self.most_bytes
        sizes = self._rounded(np.concatenate([trace.nbytes, most]))
        _, pools = np.unique(2 * np.tile(trace.stream, 2) + (sizes <= _SMALL), return_inverse=True)
        self._sizes: list[int] = sizes.tolist()
        self._pools: list[int] = pools.tolist()
        self._count = count
        self._pool_count = 1 + max(self._pools, default=-1)
        tensors = np.abs(events) - 1
        at_once = np.append(events[1:] == -events[:-1], False)[: len(events)] & (events > 0) & self._joins
        ops = np.where(events > 0, tensors, ~tensors) + count * at_once
        asked = np.flatnonzero(at_once & (most > trace.nbytes)[tensors])
        kept = trace.nbytes[tensors] > 0
        kept[1:] &= ~at_once[:-1]
        ops = np.insert(ops, asked, tensors[asked] + 2 * count)
        self._ops: list[int] = ops[np.insert(kept, asked, True)].tolist()
        # Where its most bytes are of another pool, a block for them says nothing of one for its own.
        elsewhere = (pools[:count] != pools[count:]) & (trace.nbytes > 0)
        self._misses_some = bool(elsewhere[tensors[asked]].any())

    def _rounded(self, nbytes: Integers) -> Integers:
        """Sizes in blocks."""
        if not self.config.roundup_power2_divisions:
            return np.maximum(-(-nbytes // BLOCK_BYTES), 1)
        distinct, which = np.unique(nbytes, return_inverse=True)
        divisions = self.config.roundup_power2_divisions
        rounded = [round_size(each, divisions) // BLOCK_BYTES for each in distinct.tolist()]
        return np.array(rounded, dtype=np.int64)[which]

    def _begin(self) -> _State:
        count = self._count
        free: list[list[int]] = [[] for _ in range(self._pool_count)]
        return _State(starts=[0] * count, ends=[0] * count, free=free, has_missed=self._misses_some)

    def _kept(self, state: _State, index: int, length: int) -> int:
        """Keep a state before a segment that goes beyond a capacity; the capacity from which on the next one is kept."""
        self._states.append((state.reserved, index, state.copy()))
        return int(STEP * (state.reserved + length))

    def _retry(self, state: _State, index: int) -> None:
        """Empty the cache, where the driver has no memory left."""
        state.empty_cache()
        self._exchanges.append((index, state.reserved))
        self.retries += 1

    def _run(self, state: _State, begin: int, limit: int, *, keep: bool) -> bool:
        """Replay from an event to the end; False if memory runs out. `keep`: without a limit; see `_kept`."""
        sizes, pools = self._sizes, self._pools
        count = self._count
        starts, ends, end_of, start_of = state.starts, state.ends, state.end_of, state.start_of
        for index, op in enumerate(islice(self._ops, begin, None), begin):
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
                        self._retry(state, index)
                        if state.exceeds(limit, length):
                            return False
                        free = state.free[pools[tensor]]
                    start = state.new_segment(length)
                    self._exchanges.append((index, state.reserved))
                    end = start + length
                if op < count:
                    cut = start + size
                    if end - cut > (0 if size <= _SMALL else _SMALL):
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


@dataclass(frozen=True, kw_only=True, eq=False)
class History:
    """What the allocator did with a trace: the part of `allocator.Replay` that a profile is made of."""

    peak_allocated_bytes: int
    peak_reserved_bytes: int
    retries: int
    oom: OutOfMemoryAt | None
    allocated_timeline: Integers
    reserved_timeline: Integers


def history(
    trace: Columns, config: AllocatorConfig, *, capacity_bytes: int | None, device_bytes: int | None = None
) -> History:
    """As `allocator.replay` with `timeline` set, in a third of its time."""
    quick = QuickReplay(trace, config, join=False)
    if not quick.is_fast:
        made = replay(trace, capacity_bytes=capacity_bytes, config=config, device_bytes=device_bytes, timeline=True)
        return History(
            peak_allocated_bytes=made.peak_allocated_bytes,
            peak_reserved_bytes=made.peak_reserved_bytes,
            retries=made.retries,
            oom=made.oom,
            allocated_timeline=np.array(made.allocated_timeline, dtype=np.int64),
            reserved_timeline=np.array(made.reserved_timeline, dtype=np.int64),
        )
    return quick.history(capacity_bytes)


def _segment(size: int) -> int:
    """Size of a request's segment, in blocks ("get_allocation_size")."""
    if size <= _SMALL:
        return _SEGMENT
    return _LARGE if size < _LARGEST_SHARED else -(-size // _SEGMENT) * _SEGMENT
