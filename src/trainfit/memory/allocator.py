"""PyTorch's CUDA caching allocator in plain Python: how much memory a traced step takes from the driver, and if it fits.

Names in quotes are functions of c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.11 to 2.15), which the code follows step by
step; it was compared with PyTorch 2.15's own compiled allocator, event by event (see tests/test_allocator.py).

Not modelled: private pools (CUDA graphs), blocks used on a second stream (`record_stream`), switching expandable segments
while running, and the addresses that the driver gives. Here they grow and are never given twice, so of two equal free
blocks the older segment's is taken, while a real driver may reuse a low address.
"""

import math
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainfit.errors import TrainfitError
from trainfit.memory.events import Trace

MIB = 2**20
BLOCK_BYTES = 512
"""kMinBlockSize: every request is rounded up to a multiple of this."""
SMALL_BYTES = MIB
"""kSmallSize: requests up to this live in the small pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""kSmallBuffer: a segment (or page, when expandable) of the small pool; large segments are multiples of it (kRoundLarge)."""
MIN_LARGE_BYTES = 10 * MIB
"""kMinLargeAlloc: smaller large requests share a segment of `large_segment_size_bytes`."""

_UNLIMITED = 2**62
# A free block is one integer, size above address, so that a sorted list of them is searched as fast as C compares.
_ADDRESS_BITS = 48
_ADDRESS = (1 << _ADDRESS_BITS) - 1
_SEGMENTS_BASE = 1 << 40
_RANGES_BASE = 1 << 45
_RANGE_GAP = 1 << 32

_IGNORED_KEYS = (
    "release_lock_on_cudamalloc",
    "graph_capture_record_stream_reuse",
    "throw_on_cudamalloc_oom",
    "expandable_segments_reserve",
    "expandable_segments_reserve_by_class",
    "pinned_use_cuda_host_register",
    "pinned_num_register_threads",
    "pinned_use_background_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_free_catch_all",
    "pinned_max_round_threshold_mb",
    "pinned_max_cached_size_mb",
)
"""Settings of PyTorch's that change no device byte."""


@dataclass(frozen=True, kw_only=True)
class AllocatorConfig:
    """The settings of PYTORCH_ALLOC_CONF (older name PYTORCH_CUDA_ALLOC_CONF) that change memory. PyTorch's defaults."""

    expandable_segments: bool = False
    """Grow one address range per stream and pool instead of one cudaMalloc per segment."""
    max_split_size_bytes: int | None = None
    """Blocks of this size and above are never split. None: all may be."""
    roundup_power2_divisions: int | tuple[int, ...] = 0
    """Round sizes up to this many steps between powers of two; or 16 such numbers, for sizes below 2 MiB, 4 MiB, ..., and
    the last for 32 GiB and above. 0 and 1: to 512 bytes only."""
    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old free segments are returned first. Needs a fraction. 0: never."""
    per_process_memory_fraction: float | None = None
    """Share of the device's memory that the process may reserve. None: no limit of PyTorch's own."""
    large_segment_size_bytes: int = 20 * MIB
    """Segment for requests of 1 to 10 MiB, and the page of an expandable large pool."""
    max_non_split_rounding_bytes: int = 20 * MIB
    """A request of at least the maximum split size takes a free block only if less than this larger."""

    @classmethod
    def from_env_string(cls, text: str) -> "AllocatorConfig":
        """Read PYTORCH_ALLOC_CONF's syntax, `key:value,key:value`, as AcceleratorAllocatorConfig::parseArgs does.

        Raises TrainfitError naming the key when it is unknown or its value is refused by PyTorch.
        """
        values: dict[str, bool | int | float | tuple[int, ...] | None] = {}
        for setting in _split_settings("".join(text.split())):
            key, _, value = setting.partition(":")
            if key in _IGNORED_KEYS or setting == "backend:native":
                continue
            if key not in _PARSERS:
                known = ", ".join(sorted({*_PARSERS, *_IGNORED_KEYS, "backend:native"}))
                raise TrainfitError(f"allocator setting {setting!r} cannot be modelled; use one of {known}")
            field, parse = _PARSERS[key]
            try:
                values[field] = parse(value)
            except (ValueError, KeyError) as error:
                raise TrainfitError(f"allocator setting {setting!r}: PyTorch refuses this value") from error
        large = values.get("large_segment_size_bytes", 20 * MIB)
        for field in ("max_split_size_bytes", "max_non_split_rounding_bytes"):
            if values.get(field, large) < large:  # pyright: ignore[reportOperatorIssue]
                raise TrainfitError(f"allocator setting {field[:-6]}_mb must be at least the large segment's {large} bytes")
        values.setdefault("max_non_split_rounding_bytes", large)
        return cls(**values)  # pyright: ignore[reportArgumentType]


def _split_settings(text: str) -> list[str]:
    """Split at the commas that are outside of brackets."""
    settings = [""]
    depth = 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "," and not depth:
            settings.append("")
        else:
            settings[-1] += character
    return [s for s in settings if s]


def _mebibytes(text: str, *, above: int = 0) -> int:
    if int(text) <= above:
        raise ValueError(text)
    return int(text) * MIB


def _share(text: str, *, accept: Callable[[float], bool]) -> float:
    if not accept(float(text)):
        raise ValueError(text)
    return float(text)


def _divisions(text: str) -> int | tuple[int, ...]:
    """Read `4` or `[256:1,512:2,>:8]`, sizes in MiB ("parseRoundUpPower2Divisions")."""

    def power_of_two(number: str) -> int:
        if int(number).bit_count() != 1:
            raise ValueError(number)
        return int(number)

    if not text.startswith("["):
        return power_of_two(text)
    table = [0] * 16
    start = 0
    for i, pair in enumerate(text.strip("[]").split(",")):
        size, divisions = pair.split(":")
        count = int(divisions) and power_of_two(divisions)
        if size == ">":
            table[start + 1 :] = [count] * (15 - start)
            continue
        start = min(power_of_two(size).bit_length() - 1, 15)
        if i == 0:
            table[:start] = [count] * start
        table[start] = count
    return tuple(table)


_PARSERS: dict[str, tuple[str, Callable[[str], bool | int | float | tuple[int, ...] | None]]] = {
    "expandable_segments": ("expandable_segments", lambda text: {"True": True, "False": False}[text]),
    "max_split_size_mb": ("max_split_size_bytes", _mebibytes),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
    "garbage_collection_threshold": (
        "garbage_collection_threshold",
        lambda text: _share(text, accept=lambda share: 0 < share < 1),
    ),
    "per_process_memory_fraction": (
        "per_process_memory_fraction",
        # PyTorch takes 1 in the environment for "no limit of its own", without which it collects no garbage either.
        lambda text: None if (share := _share(text, accept=lambda share: 0 <= share <= 1)) == 1 else share,
    ),
    "large_segment_size_mb": ("large_segment_size_bytes", lambda text: _mebibytes(text, above=10)),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _mebibytes),
}


def round_size(nbytes: int, divisions: int | tuple[int, ...] = 0) -> int:
    """Return the bytes that a request of `nbytes` occupies ("round_size", "roundup_power2_next_division")."""
    power = nbytes.bit_length() - 1
    steps = divisions[min(max(power - 20, 0), 15)] if isinstance(divisions, tuple) else divisions
    if steps > 1 and nbytes > BLOCK_BYTES * steps:
        unit = 2**power // steps
        return -(-nbytes // unit) * unit
    return max(-(-nbytes // BLOCK_BYTES), 1) * BLOCK_BYTES


class _Pool:
    """The free blocks of one stream, small or large ("BlockPool")."""

    __slots__ = ("free", "page_bytes", "small", "split_finely", "stream", "unmapped")

    def __init__(self, stream: int, small: bool, config: AllocatorConfig) -> None:
        self.stream = stream
        self.small = small
        self.page_bytes = SMALL_SEGMENT_BYTES if small else config.large_segment_size_bytes
        self.split_finely = small or config.expandable_segments
        self.free: list[int] = []
        self.unmapped: list[Block] = []


class Block:
    """A piece of a segment, in use, free, or (in an expandable range) without memory behind it."""

    __slots__ = ("address", "allocated", "mapped", "next", "pool", "previous", "range_start", "requested", "searches", "size")

    def __init__(self, address: int, size: int, pool: _Pool, *, range_start: int = 0, mapped: bool = True) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.range_start = range_start
        self.mapped = mapped
        self.allocated = False
        self.requested = 0
        self.searches = 0
        self.previous: Block | None = None
        self.next: Block | None = None


SegmentAction = Literal["segment_alloc", "segment_free", "segment_map", "segment_unmap"]


class CachingAllocator:
    """The allocator's state. `malloc` and `free` are the replay's inner loop; use `replay` for a whole trace."""

    def __init__(
        self, *, capacity_bytes: int | None = None, config: AllocatorConfig | None = None, device_bytes: int | None = None
    ) -> None:
        """Start empty; see `replay` for the arguments."""
        self.config = config = config or AllocatorConfig()
        self.capacity_bytes = _UNLIMITED if capacity_bytes is None else capacity_bytes
        total = device_bytes or capacity_bytes
        fraction = config.per_process_memory_fraction
        self.allowed_bytes = _UNLIMITED if fraction is None or total is None else int(fraction * total)
        self.range_bytes = MIB * MIB if total is None else total + total // 8
        self.collects = self.allowed_bytes < _UNLIMITED and config.garbage_collection_threshold > 0
        self.max_split_bytes = config.max_split_size_bytes or _UNLIMITED

        self.allocated_bytes = self.requested_bytes = self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = self.device_allocs = self.device_frees = self.event = 0
        self.peak_reserved_event = -1
        self.segment_events: list[tuple[int, SegmentAction, int, int, int]] = []

        self._pools: dict[tuple[int, bool], _Pool] = {}
        self._free_at: dict[int, Block] = {}
        self._large_searches = 0
        self._next_segment = _SEGMENTS_BASE
        self._next_range = _RANGES_BASE

    def pool_for(self, size: int, stream: int) -> _Pool:
        """Return the pool that serves a rounded size on a stream ("get_pool")."""
        key = (stream, size <= SMALL_BYTES)
        if key not in self._pools:
            self._pools[key] = _Pool(*key, self.config)
        return self._pools[key]

    def malloc(self, nbytes: int, stream: int = 0) -> Block | None:
        """Allocate; None means out of memory, after everything that could be given back was ("malloc")."""
        size = round_size(nbytes, self.config.roundup_power2_divisions)
        return self._malloc(nbytes, size, self.pool_for(size, stream))

    def _malloc(self, nbytes: int, size: int, pool: _Pool) -> Block | None:
        block = self._take_free(pool, size) or self._take_new(pool, size)
        if block is None:
            return None
        rest = block.size - size
        # "should_split", "alloc_found_block"
        if rest >= BLOCK_BYTES if pool.split_finely else (rest > SMALL_BYTES and size < self.max_split_bytes):
            self._put_free(self._split(block, size))
        block.allocated = True
        block.requested = nbytes
        self.allocated_bytes += block.size
        self.requested_bytes += nbytes
        return block

    def free(self, block: Block) -> None:
        """Give a block back to its pool, merged with free neighbours ("free_block")."""
        self.allocated_bytes -= block.size
        self.requested_bytes -= block.requested
        block.allocated = False
        self._merge(block, block.previous)
        self._merge(block, block.next)
        self._put_free(block)

    def empty_cache(self) -> None:
        """Give every unsplit free segment, and every free page, back to the driver ("release_cached_blocks")."""
        for pool in self._pools.values():
            for key in tuple(pool.free):
                block = self._free_at[key & _ADDRESS]
                if self.config.expandable_segments:
                    self._unmap(block)
                elif block.previous is None and block.next is None:
                    self._release(block)

    # Free lists

    def _put_free(self, block: Block) -> None:
        self._free_at[block.address] = block
        block.searches = self._large_searches
        insort(block.pool.free, block.size << _ADDRESS_BITS | block.address)

    def _remove_free(self, block: Block) -> None:
        free = block.pool.free
        del free[bisect_left(free, block.size << _ADDRESS_BITS | block.address)]

    def _split(self, block: Block, size: int) -> Block:
        """Cut `block` to `size` and return the rest, which is in no list yet."""
        rest = Block(block.address + size, block.size - size, block.pool, range_start=block.range_start, mapped=block.mapped)
        block.size = size
        rest.previous = block
        rest.next = following = block.next
        if following is not None:
            following.previous = rest
        block.next = rest
        return rest

    def _merge(self, block: Block, other: Block | None) -> None:
        """Let `block` absorb a neighbour if that is free ("try_merge_blocks")."""
        if other is None or other.allocated or other.mapped is not block.mapped:
            return
        if other.mapped:
            self._remove_free(other)
        else:
            block.pool.unmapped.remove(other)
        if other is block.previous:
            block.address = other.address
            block.previous = before = other.previous
            if before is not None:
                before.next = block
        else:
            block.next = after = other.next
            if after is not None:
                after.previous = block
        block.size += other.size

    def _take_free(self, pool: _Pool, size: int) -> Block | None:
        """Take the smallest free block that fits, then the lowest address ("get_free_block")."""
        if self.collects and not pool.small:
            self._large_searches += 1
        free = pool.free
        index = bisect_left(free, size << _ADDRESS_BITS)
        if index == len(free):
            return None
        if self.config.expandable_segments:
            index = self._least_expandable(free, index)
        block = self._free_at[free[index] & _ADDRESS]
        if block.size >= self.max_split_bytes and (
            size < self.max_split_bytes or block.size >= size + self.config.max_non_split_rounding_bytes
        ):
            return None
        del free[index]
        return block

    def _least_expandable(self, free: list[int], index: int) -> int:
        """Best fit counts a block that can still grow as large as it can become."""

        def grown(i: int) -> int:
            block = self._free_at[free[i] & _ADDRESS]
            return block.size + (block.next.size if block.next is not None and not block.next.mapped else 0)

        while index + 1 < len(free) and grown(index + 1) < grown(index):
            index += 1
        return index

    # The driver

    def _take_new(self, pool: _Pool, size: int) -> Block | None:
        if self.collects:
            self._collect_garbage()
        block = self._alloc_block(pool, size)
        if block is None and self._release_available(pool, size):
            block = self._alloc_block(pool, size)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._alloc_block(pool, size)
        return block

    def _alloc_block(self, pool: _Pool, size: int) -> Block | None:
        """Take a new segment, or map more of a range, if the driver has the memory ("alloc_block")."""
        if size <= SMALL_BYTES:  # "get_allocation_size"
            segment = SMALL_SEGMENT_BYTES
        elif size < MIN_LARGE_BYTES:
            segment = self.config.large_segment_size_bytes
        else:
            segment = -(-size // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES
        if self.reserved_bytes + segment > self.allowed_bytes:
            return None
        if self.config.expandable_segments:
            return self._expand(pool, size)
        if self.reserved_bytes + segment > self.capacity_bytes:
            return None
        block = Block(self._next_segment, segment, pool)
        self._next_segment += -(-segment // SMALL_SEGMENT_BYTES) * SMALL_SEGMENT_BYTES
        self._reserve("segment_alloc", block.address, segment, pool)
        return block

    def _reserve(self, action: SegmentAction, address: int, nbytes: int, pool: _Pool) -> None:
        """Count memory taken from the driver; `nbytes` below 0: given back."""
        self.segment_events.append((self.event, action, address, abs(nbytes), pool.stream))
        self.reserved_bytes += nbytes
        if nbytes < 0:
            self.device_frees += 1
            return
        self.device_allocs += 1
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
            self.peak_reserved_event = self.event

    def _release(self, block: Block) -> None:
        self._remove_free(block)
        self._reserve("segment_free", block.address, -block.size, block.pool)

    def _release_available(self, pool: _Pool, size: int) -> bool:
        """Free the oversize blocks that make room, largest first ("release_available_cached_blocks")."""
        if self.max_split_bytes == _UNLIMITED or self.config.expandable_segments:
            return False
        size = max(size, self.max_split_bytes)
        index = bisect_left(pool.free, size << _ADDRESS_BITS)
        if index < len(pool.free):
            self._release(self._free_at[pool.free[index] & _ADDRESS])
            return True
        released = 0
        while released < size and pool.free and pool.free[-1] >> _ADDRESS_BITS >= self.max_split_bytes:
            block = self._free_at[pool.free[-1] & _ADDRESS]
            released += block.size
            self._release(block)
        return released >= size

    def _collect_garbage(self) -> None:
        """Free large segments that were passed over for longer than average ("garbage_collect_cached_blocks")."""
        target = self.reserved_bytes - int(self.config.garbage_collection_threshold * self.allowed_bytes)
        blocks = [
            self._free_at[key & _ADDRESS]
            for (_, small), pool in sorted(self._pools.items())
            if not small
            for key in pool.free
        ]
        ages = {b: self._large_searches - b.searches for b in blocks if b.previous is None and b.next is None}
        reclaimed, total_age = 0, sum(ages.values())
        while target > reclaimed and ages:
            threshold = total_age / len(ages)
            old = [block for block, age in ages.items() if age >= threshold]
            if not old:
                return
            for block in old:
                reclaimed += block.size
                total_age -= ages.pop(block)
                self._release(block)

    # Expandable segments: address ranges to which pages of memory are mapped

    def _expand(self, pool: _Pool, size: int) -> Block | None:
        """Map pages until a block of `size` exists ("try_allocate_expandable_block"). Pages of a failed try stay."""
        block = self._find_room(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            following = block.next
            assert following is not None  # _find_room saw enough free or unmapped neighbours
            if not self._map(following, min(size - block.size, following.size)):
                return None
            block = following
        self._remove_free(block)
        return block

    def _find_room(self, pool: _Pool, size: int) -> Block:
        """Return the lowest free or unmapped block from which `size` can be had ("find_expandable_block")."""
        for block in pool.unmapped:
            if block.previous is not None and not block.previous.allocated:
                block = block.previous
            room, piece = 0, block
            while piece is not None and not piece.allocated and room < size:
                room += piece.size
                piece = piece.next
            if room >= size:
                return block
        length = -(-self.range_bytes // pool.page_bytes) * pool.page_bytes
        block = Block(self._next_range, length, pool, range_start=self._next_range, mapped=False)
        self._next_range += length + _RANGE_GAP
        pool.unmapped.append(block)
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Put pages of memory behind the first `size` bytes of an unmapped block ("map_block")."""
        pool = block.pool
        nbytes = -(-size // pool.page_bytes) * pool.page_bytes
        if self.reserved_bytes + nbytes > self.capacity_bytes:
            return False
        pool.unmapped.remove(block)
        if nbytes < block.size:
            insort(pool.unmapped, self._split(block, nbytes), key=lambda b: b.address)
        block.mapped = True
        self._reserve("segment_map", block.address, nbytes, pool)
        self._merge(block, block.previous)
        self._merge(block, block.next)
        self._put_free(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Give the whole pages inside a free block back ("unmap_block", "release_expandable_segment")."""
        page, origin = block.pool.page_bytes, block.range_start
        start = origin - (origin - block.address) // page * page
        end = origin + (block.address + block.size - origin) // page * page
        if start >= end:
            return
        self._remove_free(block)
        if end < block.address + block.size:
            self._put_free(self._split(block, end - block.address))
        if start > block.address:
            before, block = block, self._split(block, start - block.address)
            self._put_free(before)
        block.mapped = False
        self._reserve("segment_unmap", start, start - end, block.pool)
        self._merge(block, block.previous)
        self._merge(block, block.next)
        if block.previous is not None or block.next is not None:
            insort(block.pool.unmapped, block, key=lambda b: b.address)


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
    peak_allocated_event: int
    """Index of the event at which that was first reached; -1 if nothing was allocated."""
    peak_requested_bytes: int
    """Largest sum of bytes asked for (`requested_bytes.all.peak`)."""
    peak_reserved_bytes: int
    """Most memory held from the driver (`reserved_bytes.all.peak`): what has to fit into the budget."""
    peak_reserved_event: int
    """Index of the event at which that was first reached; -1 if nothing was reserved."""
    allocated_bytes: int
    """In use after the last event."""
    requested_bytes: int
    """Asked for by what is in use after the last event."""
    reserved_bytes: int
    """Held from the driver after the last event."""
    device_allocs: int
    """cudaMalloc calls, or pages mapped at once (`num_device_alloc`)."""
    device_frees: int
    """cudaFree calls, or pages unmapped at once (`num_device_free`)."""
    retries: int
    """How often the cache was emptied to satisfy a request (`num_alloc_retries`); each stalls the GPU."""
    oom: OutOfMemoryAt | None
    """Where it ran out of memory, or None."""
    addresses: tuple[int, ...]
    """Address of each tensor of the trace, 0 if it was never allocated."""
    segment_events: tuple[tuple[int, SegmentAction, int, int, int], ...]
    """(event index, action, address, bytes, stream) of every exchange with the driver."""
    allocated_timeline: tuple[int, ...]
    """`allocated_bytes` after each event; empty unless asked for."""
    reserved_timeline: tuple[int, ...]
    """`reserved_bytes` after each event; empty unless asked for."""


def replay(
    trace: Trace,
    *,
    capacity_bytes: int | None,
    config: AllocatorConfig | None = None,
    device_bytes: int | None = None,
    timeline: bool = False,
) -> Replay:
    """Replay a trace through the allocator.

    `capacity_bytes` is what the driver can give to this process in all (None: no end), so without context and other
    processes. `device_bytes` is the card's whole memory, of which `per_process_memory_fraction` takes its share; it is the
    capacity if not given. `timeline` keeps allocated and reserved bytes after each event.
    """
    config = config or AllocatorConfig()
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, config=config, device_bytes=device_bytes)
    sizes = [round_size(tensor.nbytes, config.roundup_power2_divisions) for tensor in trace.tensors]
    pools = [allocator.pool_for(size, tensor.stream) for size, tensor in zip(sizes, trace.tensors, strict=True)]
    requests = [tensor.nbytes for tensor in trace.tensors]
    blocks: list[Block | None] = [None] * len(sizes)
    addresses = [0] * len(sizes)
    peak_allocated, peak_event, peak_requested = 0, -1, 0
    allocated: list[int] = []
    reserved: list[int] = []
    oom = None
    for index, event in enumerate(trace.events):
        allocator.event = index
        if event < 0:
            block = blocks[-event - 1]
            if block is not None:  # None: a request for 0 bytes
                allocator.free(block)
        elif requests[event - 1]:
            i = event - 1
            blocks[i] = block = allocator._malloc(requests[i], sizes[i], pools[i])  # pyright: ignore[reportPrivateUsage]
            if block is None:
                oom = OutOfMemoryAt(
                    event=index,
                    wanted_bytes=requests[i],
                    allocated_bytes=allocator.allocated_bytes,
                    reserved_bytes=allocator.reserved_bytes,
                )
                break
            addresses[i] = block.address
            if allocator.allocated_bytes > peak_allocated:
                peak_allocated, peak_event = allocator.allocated_bytes, index
            if allocator.requested_bytes > peak_requested:
                peak_requested = allocator.requested_bytes
        if timeline:
            allocated.append(allocator.allocated_bytes)
            reserved.append(allocator.reserved_bytes)
    return Replay(
        peak_allocated_bytes=peak_allocated,
        peak_allocated_event=peak_event,
        peak_requested_bytes=peak_requested,
        peak_reserved_bytes=allocator.peak_reserved_bytes,
        peak_reserved_event=allocator.peak_reserved_event,
        allocated_bytes=allocator.allocated_bytes,
        requested_bytes=allocator.requested_bytes,
        reserved_bytes=allocator.reserved_bytes,
        device_allocs=allocator.device_allocs,
        device_frees=allocator.device_frees,
        retries=allocator.retries,
        oom=oom,
        addresses=tuple(addresses),
        segment_events=tuple(allocator.segment_events),
        allocated_timeline=tuple(allocated),
        reserved_timeline=tuple(reserved),
    )
