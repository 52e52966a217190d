"""How much memory a traced step takes from the driver with PyTorch's caching allocator, and whether it fits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.caching_allocator import Block, CachingAllocator, SegmentAction, round_size
from trainfit.memory.columns import Columns
from trainfit.tracing.events import EMPTY_CACHE, Trace

__all__ = ["AllocatorConfig", "OutOfMemoryAt", "Replay", "replay"]


@dataclass(frozen=True, kw_only=True)
class OutOfMemoryAt:
    """The allocation that failed."""

    event: int
    """Index into the trace's events."""
    wanted_bytes: int
    """Bytes that were asked for, unrounded."""
    allocated_bytes: int
    """Bytes in use by tensors at that moment."""
    reserved_bytes: int
    """Bytes held from the driver at that moment, after all that could be was given back."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What the allocator did with a trace. The names are those of `torch.cuda.memory_stats`; an OOM ends the replay."""

    peak_allocated_bytes: int
    """Largest sum of blocks in use (`allocated_bytes.all.peak`), with the slack of blocks that were not split."""
    peak_requested_bytes: int
    """Largest sum of bytes asked for (`requested_bytes.all.peak`)."""
    peak_reserved_bytes: int
    """Most memory held from the driver (`reserved_bytes.all.peak`): what has to fit into the budget."""
    allocated_bytes: int
    """Bytes in use after the last event."""
    requested_bytes: int
    """Bytes requested by what is in use after the last event."""
    reserved_bytes: int
    """Bytes held from the driver after the last event."""
    retries: int
    """How often the cache was emptied to satisfy a request (`num_alloc_retries`); each stalls the GPU."""
    oom: OutOfMemoryAt | None
    """The allocation that ran out of memory, or None."""
    capacity_bytes: int | None
    """The capacity that it was replayed at."""
    addresses: tuple[int, ...]
    """Address of each tensor of the trace, 0 if it was never allocated."""
    blocks: tuple[tuple[int, int, int, int, bool], ...]
    """(address, bytes, tensor or -1, stream, first of its segment?) of each block after the last event, by address."""
    segment_events: tuple[tuple[int, SegmentAction, int, int, int], ...]
    """(event index, action, address, bytes, stream) of every exchange with the driver."""
    allocated_timeline: tuple[int, ...]
    """`allocated_bytes` after each event; empty unless asked for."""
    reserved_timeline: tuple[int, ...]
    """`reserved_bytes` after each event; empty unless asked for."""


def replay(
    trace: Trace | Columns,
    *,
    capacity_bytes: int | None,
    config: AllocatorConfig | None = None,
    device_bytes: int | None = None,
    timeline: bool = False,
) -> Replay:
    """Replay a trace through the allocator.

    `capacity_bytes` is what the driver can give to this process in all, so without context and other processes; None:
    no end, whatever fraction is set. `device_bytes` is the card's whole memory, of which `per_process_memory_fraction`
    takes its share (default: the capacity). `timeline` keeps allocated and reserved bytes after each event.

    A step that fits need not fit a slightly larger capacity: there the cache is emptied later, and a segment that would
    have been given back may by then be partly in use. So replay at the real capacity; do not interpolate.
    """
    config = config or AllocatorConfig()
    columns = trace if isinstance(trace, Columns) else Columns.of(trace)
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, config=config, device_bytes=device_bytes)
    run = _Run(allocator, columns, config)
    run.through(columns.events.tolist(), timeline=timeline)
    return Replay(
        peak_allocated_bytes=run.peak_allocated_bytes,
        peak_requested_bytes=run.peak_requested_bytes,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        allocated_bytes=allocator.allocated_bytes,
        requested_bytes=allocator.requested_bytes,
        reserved_bytes=allocator.reserved_bytes,
        retries=allocator.retries,
        oom=run.oom,
        capacity_bytes=capacity_bytes,
        addresses=tuple(run.addresses),
        blocks=_blocks(allocator, run.blocks),
        segment_events=tuple(allocator.segment_events),
        allocated_timeline=tuple(run.allocated),
        reserved_timeline=tuple(run.reserved),
    )


class _Run:
    """One pass of a trace's events through an allocator."""

    def __init__(self, allocator: CachingAllocator, trace: Columns, config: AllocatorConfig) -> None:
        self.allocator = allocator
        self.requests: list[int] = trace.nbytes.tolist()
        distinct = np.unique(trace.nbytes).tolist()
        rounded = {nbytes: round_size(nbytes, config.roundup_power2_divisions) for nbytes in distinct}
        self.sizes = [rounded[nbytes] for nbytes in self.requests]
        streams: list[int] = trace.stream.tolist()
        self.pools = [allocator.pool_for(size, stream) for size, stream in zip(self.sizes, streams, strict=True)]
        is_empty = np.array([name == EMPTY_CACHE for name in trace.names], dtype=bool)[trace.op] & (trace.nbytes == 0)
        self.empties: set[int] = set(np.flatnonzero(is_empty).tolist()) if config.cudnn_benchmark else set()
        self.blocks: list[Block | None] = [None] * len(self.sizes)
        self.addresses = [0] * len(self.sizes)
        self.peak_allocated_bytes = 0
        self.peak_requested_bytes = 0
        self.allocated: list[int] = []
        self.reserved: list[int] = []
        self.oom: OutOfMemoryAt | None = None

    def through(self, events: Sequence[int], *, timeline: bool) -> None:
        """Allocate for every positive event and free for every negative one, until memory runs out."""
        allocator = self.allocator
        requests = self.requests
        blocks = self.blocks
        for index, event in enumerate(events):
            allocator.event = index
            if event < 0:
                block = blocks[-event - 1]
                if block is not None:  # None: a request for 0 bytes
                    allocator.free(block)
                    blocks[-event - 1] = None
            elif requests[event - 1]:
                i = event - 1
                blocks[i] = block = allocator.malloc_rounded(requests[i], self.sizes[i], self.pools[i])
                if block is None:
                    self.oom = OutOfMemoryAt(
                        event=index,
                        wanted_bytes=requests[i],
                        allocated_bytes=allocator.allocated_bytes,
                        reserved_bytes=allocator.reserved_bytes,
                    )
                    break
                self.addresses[i] = block.address
                if allocator.allocated_bytes > self.peak_allocated_bytes:
                    self.peak_allocated_bytes = allocator.allocated_bytes
                if allocator.requested_bytes > self.peak_requested_bytes:
                    self.peak_requested_bytes = allocator.requested_bytes
            elif event - 1 in self.empties:
                allocator.empty_cache()
            if timeline:
                self.allocated.append(allocator.allocated_bytes)
                self.reserved.append(allocator.reserved_bytes)


def _blocks(allocator: CachingAllocator, live: list[Block | None]) -> tuple[tuple[int, int, int, int, bool], ...]:
    owners = [(block, i) for i, block in enumerate(live) if block is not None]
    return tuple(
        sorted(
            (block.address, block.size, owner, block.pool.stream, block.previous is None or not block.previous.mapped)
            for block, owner in (*owners, *((block, -1) for block in allocator.free_blocks()))
        )
    )
