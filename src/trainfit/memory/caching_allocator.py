"""The state machine of PyTorch's CUDA caching allocator in plain Python; `allocator.replay` runs a trace through it.

Names in quotes are functions of c10/cuda/CUDACachingAllocator.cpp (PyTorch 2.11 to 2.15), followed step by step.

Not modelled: private pools (CUDA graphs), blocks used on a second stream (`record_stream`), switching expandable
segments while running, and the addresses that the driver gives. Here they grow and are never given twice; of two free
blocks of one size the one in the older segment is taken, where a driver may have put the newer segment lower.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal

from trainfit.memory.alloc_conf import MIB, AllocatorConfig

BLOCK_BYTES = 512
"""kMinBlockSize: every request is rounded up to a multiple of this."""
SMALL_BYTES = MIB
"""kSmallSize: requests up to this live in the small pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""kSmallBuffer, kRoundLarge: a segment (or page) of the small pool; large segments are multiples of it."""
MIN_LARGE_BYTES = 10 * MIB
"""kMinLargeAlloc: smaller large requests share a segment of `large_segment_size_bytes`."""

_UNLIMITED = 2**62
# A free block is one integer, size above address, so that a sorted list of them is searched as fast as C compares.
_ADDRESS_BITS = 48
_ADDRESS = (1 << _ADDRESS_BITS) - 1
_SEGMENTS_BASE = 1 << 40
_RANGES_BASE = 1 << 45
_RANGE_GAP = 1 << 32


def round_size(nbytes: int, divisions: int | tuple[int, ...] = 0) -> int:
    """Return the bytes that a request of `nbytes` occupies ("round_size", "roundup_power2_next_division")."""
    power = nbytes.bit_length() - 1
    steps = divisions[min(max(power - 20, 0), 15)] if isinstance(divisions, tuple) else divisions
    if steps > 1 and nbytes > BLOCK_BYTES * steps:
        unit = 2**power // steps
        return -(-nbytes // unit) * unit
    return max(-(-nbytes // BLOCK_BYTES), 1) * BLOCK_BYTES


class Pool:
    """The free blocks of one stream, small or large ("BlockPool")."""

    __slots__ = ("free", "page_bytes", "small", "split_finely", "stream", "unmapped")

    def __init__(self, stream: int, small: bool, config: AllocatorConfig) -> None:
        self.stream = stream
        self.small = small
        self.page_bytes = SMALL_SEGMENT_BYTES if small else config.large_segment_size_bytes
        self.split_finely = small or config.expandable_segments
        self.free: list[int] = []
        self.unmapped: list[Block] = []


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment, in use, free, or (in an expandable range) without memory behind it."""

    address: int
    size: int
    pool: Pool
    range_start: int = 0
    mapped: bool = True
    allocated: bool = False
    requested: int = 0
    searches: int = 0
    previous: "Block | None" = None
    next: "Block | None" = None


SegmentAction = Literal["segment_alloc", "segment_free", "segment_map", "segment_unmap"]


class CachingAllocator:
    """The allocator's state. `malloc` and `free` are the replay's inner loop; use `replay` for a whole trace."""

    def __init__(
        self,
        *,
        capacity_bytes: int | None = None,
        config: AllocatorConfig | None = None,
        device_bytes: int | None = None,
    ) -> None:
        """Start empty; see `replay` for the arguments."""
        self.config = config = config or AllocatorConfig()
        self.capacity_bytes = _UNLIMITED if capacity_bytes is None else capacity_bytes
        total = device_bytes or capacity_bytes
        fraction = config.per_process_memory_fraction
        self.allowed_bytes = _UNLIMITED if fraction is None or total is None else int(fraction * total)
        self.range_bytes = MIB * MIB if total is None else total + total // 8
        self.collects = config.garbage_collection_threshold > 0
        self.max_split_bytes = config.max_split_size_bytes or _UNLIMITED

        self.allocated_bytes = self.requested_bytes = self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = self.device_allocs = self.device_frees = self.event = 0
        self.segment_events: list[tuple[int, SegmentAction, int, int, int]] = []

        self._pools: dict[tuple[int, bool], Pool] = {}
        self._free_at: dict[int, Block] = {}
        self._large_searches = 0
        self._next_segment = _SEGMENTS_BASE
        self._next_range = _RANGES_BASE

    def pool_for(self, size: int, stream: int) -> Pool:
        """Return the pool that serves a rounded size on a stream ("get_pool")."""
        key = (stream, size <= SMALL_BYTES)
        if key not in self._pools:
            self._pools[key] = Pool(*key, self.config)
        return self._pools[key]

    def malloc_rounded(self, nbytes: int, size: int, pool: Pool) -> Block | None:
        """Allocate ("malloc") `size` bytes of a pool, both as `round_size` and `pool_for` give them for `nbytes`.

        None means out of memory, after everything that could be given back was.
        """
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

    def free_blocks(self) -> list[Block]:
        """Return every free block that has memory behind it."""
        return [self._free_at[key & _ADDRESS] for pool in self._pools.values() for key in pool.free]

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
        rest = Block(
            block.address + size, block.size - size, block.pool, range_start=block.range_start, mapped=block.mapped
        )
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

    def _take_free(self, pool: Pool, size: int) -> Block | None:
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

    def _take_new(self, pool: Pool, size: int) -> Block | None:
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

    def _alloc_block(self, pool: Pool, size: int) -> Block | None:
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

    def _reserve(self, action: SegmentAction, address: int, nbytes: int, pool: Pool) -> None:
        """Count memory taken from the driver; `nbytes` below 0: given back."""
        self.segment_events.append((self.event, action, address, abs(nbytes), pool.stream))
        self.reserved_bytes += nbytes
        if nbytes < 0:
            self.device_frees += 1
            return
        self.device_allocs += 1
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _release(self, block: Block) -> None:
        self._remove_free(block)
        self._reserve("segment_free", block.address, -block.size, block.pool)

    def _release_available(self, pool: Pool, size: int) -> bool:
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
        reclaimed = 0
        total_age = sum(ages.values())
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

    def _expand(self, pool: Pool, size: int) -> Block | None:
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

    def _find_room(self, pool: Pool, size: int) -> Block:
        """Return the lowest free or unmapped block from which `size` can be had ("find_expandable_block")."""
        for block in pool.unmapped:
            if block.previous is not None and not block.previous.allocated:
                block = block.previous
            room = 0
            piece = block
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
        page = block.pool.page_bytes
        origin = block.range_start
        start = origin - (origin - block.address) // page * page
        end = origin + (block.address + block.size - origin) // page * page
        if start >= end:
            return
        self._remove_free(block)
        if end < block.address + block.size:
            self._put_free(self._split(block, end - block.address))
        if start > block.address:
            before = block
            block = self._split(block, start - block.address)
            self._put_free(before)
        block.mapped = False
        self._reserve("segment_unmap", start, start - end, block.pool)
        self._merge(block, block.previous)
        self._merge(block, block.next)
        if block.previous is not None or block.next is not None:
            insort(block.pool.unmapped, block, key=lambda b: b.address)
