"""Whether a trace survives a capacity, and nothing else: `allocator.replay` for searches, several times as fast.

It follows `caching_allocator` for torch's default settings, to which other settings are left. Blocks in use are not
kept at all: a free block is found by its start and by its end, and segments have gaps between them so that blocks of two
never touch. What a capacity leaves as it is without one, up to the first segment beyond it, is replayed once: later replays
go on from a copy of the state just before.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice

from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.allocator import replay
from trainfit.memory.caching_allocator import (
    BLOCK_BYTES,
    MIN_LARGE_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    round_size,
)
from trainfit.tracing.events import Trace

STEP = 1.01
"""States are kept for capacities so far apart."""
# Sizes and addresses are multiples of BLOCK_BYTES and counted in these. A free block is one integer, as in `caching_allocator`.
_ADDRESS_BITS = 36
_ADDRESS = (1 << _ADDRESS_BITS) - 1
_SMALL, _SEGMENT = SMALL_BYTES // BLOCK_BYTES, SMALL_SEGMENT_BYTES // BLOCK_BYTES
_LARGE, _LARGEST_SHARED = AllocatorConfig().large_segment_size_bytes // BLOCK_BYTES, MIN_LARGE_BYTES // BLOCK_BYTES


@dataclass(kw_only=True, slots=True)
class _State:
    """Of the allocator, between two events."""

    starts: list[int]
    """Of each tensor's block."""
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
        )

    def empty_cache(self) -> None:
        """Give every segment that is free as a whole back to the driver."""
        for number, pool in enumerate(self.free):
            kept: list[int] = []
            for key in pool:
                start, end = key & _ADDRESS, (key & _ADDRESS) + (key >> _ADDRESS_BITS)
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
        return start


class QuickReplay:
    """A trace that is replayed at many capacities."""

    def __init__(self, trace: Trace, config: AllocatorConfig) -> None:
        """Do what does not depend on the capacity."""
        self.trace, self.config = trace, config
        self._is_fast = config == AllocatorConfig(roundup_power2_divisions=config.roundup_power2_divisions)
        self._requests = [tensor.nbytes for tensor in trace.tensors]
        self._states: list[tuple[int, int, _State]] = []
        if self._is_fast:
            self._compile()

    @cached_property
    def peak_requested_bytes(self) -> int:
        """Of tensors at one time: nothing less is survived."""
        requests = self._requests
        signed = (requests[event - 1] if event > 0 else -requests[-event - 1] for event in self.trace.events)
        return max(accumulate(signed), default=0)

    @cached_property
    def peak_reserved_bytes(self) -> int:
        """Without a limit."""
        if not self._is_fast:
            return replay(self.trace, capacity_bytes=None, config=self.config).peak_reserved_bytes
        state = self._begin()
        self._run(state, 0, self.peak_requested_bytes // BLOCK_BYTES, keep=True)
        return state.reserved * BLOCK_BYTES

    def survives(self, capacity_bytes: int) -> bool:
        """Whether `replay` runs out of no memory at a capacity."""
        if not self._is_fast:
            return replay(self.trace, capacity_bytes=capacity_bytes, config=self.config).oom is None
        capacity = capacity_bytes // BLOCK_BYTES
        begin, state = 0, None
        for reserved, event, kept in self._states:
            if reserved <= capacity:
                begin, state = event, kept
        return self._run(state.copy() if state else self._begin(), begin, capacity, keep=False)

    def _compile(self) -> None:
        """Events without tensors of no bytes, as numbers: i: tensor i is allocated, ~i: freed, tensors + i: both at once."""
        divisions, requests, count = self.config.roundup_power2_divisions, self._requests, len(self._requests)
        rounded = {nbytes: round_size(nbytes, divisions) // BLOCK_BYTES for nbytes in set(requests)}
        self._sizes = [rounded[nbytes] for nbytes in requests]
        pools: dict[tuple[int, bool], int] = {}
        self._pools = [
            pools.setdefault((tensor.stream, size <= _SMALL), len(pools))
            for tensor, size in zip(self.trace.tensors, self._sizes, strict=True)
        ]
        self._pool_count = len(pools)
        self._ops: list[int] = []
        last = -1
        for event in self.trace.events:
            if event > 0:
                if requests[event - 1]:
                    self._ops.append(event - 1)
            elif last == -event:
                if requests[last - 1]:
                    self._ops[-1] += count
            elif requests[-event - 1]:
                self._ops.append(event)  # -(i + 1) is ~i
            last = event

    def _begin(self) -> _State:
        count = len(self._sizes)
        return _State(starts=[0] * count, ends=[0] * count, free=[[] for _ in range(self._pool_count)])

    def _run(self, state: _State, begin: int, limit: int, *, keep: bool) -> bool:
        """From an event to the end, or to where memory runs out: False. Where there is no limit, a state is kept (`keep`)
        before each segment that goes beyond `limit`, which then rises.
        """
        sizes, pools, count = self._sizes, self._pools, len(self._sizes)
        starts, ends, end_of, start_of = state.starts, state.ends, state.end_of, state.start_of
        for index, op in enumerate(islice(self._ops, begin, None), begin):
            if op < 0:
                start, end, free = starts[~op], ends[~op], state.free[pools[~op]]
            else:
                tensor = op if op < count else op - count
                size, free = sizes[tensor], state.free[pools[tensor]]
                at = bisect_left(free, size << _ADDRESS_BITS)
                if at < len(free):
                    if op >= count:
                        continue
                    start = free.pop(at) & _ADDRESS
                    end = end_of.pop(start)
                else:
                    length = _segment(size)
                    if state.reserved + length > limit:
                        if keep:
                            self._states.append((state.reserved, index, state.copy()))
                            limit = int(STEP * (state.reserved + length))
                        else:
                            state.empty_cache()
                            if state.reserved + length > limit:
                                return False
                            free = state.free[pools[tensor]]
                    start = state.new_segment(length)
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


def _segment(size: int) -> int:
    """Of a request, in blocks ("get_allocation_size")."""
    if size <= _SMALL:
        return _SEGMENT
    return _LARGE if size < _LARGEST_SHARED else -(-size // _SEGMENT) * _SEGMENT
