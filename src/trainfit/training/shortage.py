"""What an out-of-memory error says: how much was needed, how much there is, and why it was not enough."""

import re
from dataclasses import dataclass
from typing import Literal

Cause = Literal["memory", "fragmented", "taken", "unknown", "other rank", "quiet"]
"""memory: more than there is; fragmented: enough, in pieces; taken: enough, had not another process grown; unknown: the
error has no numbers (cuBLAS, the CPU); quiet: no error, the larger micro-batch is tried again."""


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """What torch's message says of the allocator when a request failed. Free segments had been given back before."""

    request_bytes: int
    allocated_bytes: int
    cached_bytes: int
    """Reserved, but in no tensor: free pieces of segments that are in use."""
    free_bytes: int
    """Free memory of the device."""
    total_bytes: int
    allowed_bytes: int
    """Memory that `set_per_process_memory_fraction` allows; without it, `total_bytes`."""

    @property
    def needs_bytes(self) -> int:
        """Reserved memory with the request; the step may have wanted more afterwards."""
        return self.allocated_bytes + self.cached_bytes + self.request_bytes

    @property
    def usable_bytes(self) -> int:
        """What the allocator can reserve: the card's memory less other processes and the CUDA context."""
        return min(self.allowed_bytes, self.allocated_bytes + self.cached_bytes + self.free_bytes)

    @property
    def outside_bytes(self) -> int:
        """Other processes and the context."""
        return self.total_bytes - self.free_bytes - self.allocated_bytes - self.cached_bytes


_NUMBERS = {
    "request_bytes": "Tried to allocate {}",
    "allocated_bytes": "allocated memory {} is allocated",
    "cached_bytes": "and {} is reserved by PyTorch but unallocated",
    "free_bytes": "of which {} is free",
    "total_bytes": "capacity of {}",
    "allowed_bytes": "{} allowed;",
}
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def shortage(message: str) -> Shortage | None:
    """The numbers of an error's first line, or None where it is not by torch's CUDA allocator.

    Source: torch 2.15 c10/cuda/CUDACachingAllocator.cpp, "CUDA out of memory. Tried to allocate ...".
    """
    numbers: dict[str, int] = {}
    for name, words in _NUMBERS.items():
        if match := re.search(words.replace("{}", r"([\d.]+) (bytes|[KMG]iB)"), message):
            numbers[name] = int(float(match[1]) * _UNITS[match[2]])
    numbers.setdefault("allowed_bytes", numbers.get("total_bytes", 0))
    return Shortage(**numbers) if len(numbers) == len(_NUMBERS) else None


def cause_of(short: Shortage | None, *, outside_bytes: int | None) -> Cause:
    """Why a request failed; `outside_bytes` is what other processes and the context held when the run began."""
    if short is None:
        return "unknown"
    if short.cached_bytes >= short.request_bytes:
        return "fragmented"
    grown = 0 if outside_bytes is None else short.outside_bytes - outside_bytes
    taken = short.free_bytes < short.request_bytes <= short.free_bytes + grown
    return "taken" if taken else "memory"
