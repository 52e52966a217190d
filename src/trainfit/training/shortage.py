"""Out-of-memory errors: what torch's message says, what was done about them, and both in words. Imports no torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainfit.errors import TrainfitError
from trainfit.values import require_valid

Cause = Literal["memory", "fragmented", "taken", "unknown", "other rank", "quiet"]
"""memory: more than there is; fragmented: enough, in pieces; taken: enough, had not another process grown; unknown: the
error has no numbers (cuBLAS, the CPU); quiet: no error, the larger micro-batch is tried again."""


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """The state of the allocator when a request failed, from torch's message. Free segments were returned before."""

    request_bytes: int
    """Bytes of the request that failed."""
    allocated_bytes: int
    """Bytes in tensors."""
    cached_bytes: int
    """Reserved, but in no tensor: free pieces of segments that are in use."""
    free_bytes: int
    """Free memory of the device."""
    total_bytes: int
    """Memory of the device."""
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
        """Memory of other processes and of the CUDA context."""
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
    """The numbers in an error's first line, or None if the error is not from torch's CUDA allocator.

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


@dataclass(frozen=True, kw_only=True)
class Survival:
    """One out-of-memory error and what was done."""

    step: int
    """Optimizer steps done before the window."""
    where: str
    """`worst window` (before training), `window` (forward or backward), `update` or `evaluation`."""
    micro_batch: int
    """Micro-batch at the error."""
    next_micro_batch: int
    """Micro-batch afterwards; the same if cached memory was freed first, 0 if nothing was left to try."""
    cause: Cause
    """Why memory ran out."""
    checkpointing: bool = False
    """Whether activation checkpointing was switched on."""
    needs_bytes: int = 0
    """Reserved memory that the failing rank needed, see `Shortage`; 0 if unknown."""
    usable_bytes: int = 0
    """What the allocator could reserve."""
    hint: str = ""
    """Who took the memory, or what avoids the fragmentation."""
    message: str = ""
    """The first line of the error; empty where another rank had it."""


def survivals(rows: Iterable[Mapping[str, Any]], source: Path) -> list[Survival]:
    """The events of a run's earlier stretches, from the lines of its telemetry file `source`.

    Raises:
        TrainfitError: a line has a value that trainfit does not write.
    """
    try:
        events = [Survival(**row) for row in rows]
        for event in events:
            require_valid(event)
    except (TypeError, TrainfitError) as error:
        raise TrainfitError(
            f"{source}: an out-of-memory event has a value that trainfit does not write ({error!s:.150}): "
            "remove that line"
        ) from error
    return events


@dataclass(frozen=True, kw_only=True)
class Ran:
    """The largest window that fitted."""

    canvas: tuple[int, int]
    """(height, width) in pixels; (0, 0) where the family has none."""
    micro_batch: int
    """Its micro-batch."""
    reserved_bytes: int
    """Memory reserved after it."""


def survival_line(event: Survival) -> str:
    """One line for the user."""
    if event.cause == "quiet":
        return f"a quiet stretch before step {event.step + 1}: micro-batch {event.next_micro_batch} tried again, once"
    return f"out of memory at {survival_words(event)}"


def survival_words(event: Survival) -> str:
    """Step, what was done, numbers and cause."""
    where = f"step {event.step + 1} ({event.where}, micro-batch {event.micro_batch})"
    done = f"micro-batch now {event.next_micro_batch}"
    if event.cause == "quiet":
        return f"{where}: {done}, tried again after a quiet stretch"
    if event.checkpointing:
        done = "activation checkpointing switched on"
    elif event.next_micro_batch in (0, event.micro_batch):
        done = "tried again" if event.next_micro_batch else "nothing left to try"
    causes = {"fragmented": "fragmented", "taken": "another process took memory", "other rank": "on another rank"}
    why = [_numbers(event) or event.message, causes.get(event.cause, ""), event.hint]
    return f"{where}: {done}; {', '.join(filter(None, why))}"


def stop_message(event: Survival, ran: Ran | None, flags: Sequence[str] = ()) -> str:
    """Cause, numbers and what fits, at the end of the ladder; `flags` are those of the model that free memory."""
    fits = "" if ran is None else f"; micro-batch {ran.micro_batch} fits at {gib(ran.reserved_bytes)}"
    if ran is not None and ran.canvas[0]:
        fits += f" with {ran.canvas[1]} x {ran.canvas[0]} px"
    others = f" (other processes: {event.hint})" if event.cause == "taken" else ""
    numbers = _numbers(event) or event.message or "on another rank"
    repair = f"try {', '.join(flags)}" if flags else "lower the resolution"
    return (
        f"one image does not fit the memory at step {event.step + 1} ({event.where}): {numbers}{others}{fits}: "
        f"{repair}, or free the memory of other programs"
    )


def _numbers(event: Survival) -> str:
    if not event.needs_bytes:
        return ""
    return f"needs {gib(event.needs_bytes)} GiB, {gib(event.usable_bytes)} usable"


def gib(size_bytes: int) -> str:
    """GiB with two decimals."""
    return f"{size_bytes / 2**30:.2f}"
