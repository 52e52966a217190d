"""Judges whether the loader or the model sets the pace, and how many loader processes are enough. Imports no torch."""

import multiprocessing
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Literal

IN_MEMORY_BYTES = 64 * 2**20
"""A window that takes more waits in a file of the run folder, so that host memory does not follow the effective batch."""
LOADER_BOUND = 0.10
"""Share of waiting above which more workers are worthwhile."""
FEWEST_WINDOWS = 10
"""Windows without a verdict: until then the loader's head start decides what is measured."""
WORKER_BYTES = 440 * 2**20
"""Assumed host memory of one more loader process if none can be measured (a small detector's, on the CPU, had 433 MiB)."""

Bound = Literal["loader", "compute", "unknown"]
Limit = Literal["", "cores", "host memory"]


@dataclass(frozen=True, kw_only=True)
class LoaderFacts:
    """Measurements that a verdict is made from. Seconds are those of this rank."""

    windows: int
    """Number of windows measured."""
    compute_s: float
    """Mean time from a window's arrival to the end of its optimizer step: a window's time on cached data."""
    waited_s: float
    """Time blocked in the loader, over all windows."""
    load_s: float
    """Mean time to read and decode one window in one process."""
    workers: int
    """Loader processes; 0: the training process loads."""
    cores: int
    """Cores that this rank may use."""
    available_bytes: int | None
    """Available host memory; None if the system does not report it, and then it limits nothing."""
    worker_bytes: int
    """Host memory that one more worker takes."""


@dataclass(frozen=True, kw_only=True)
class LoaderVerdict:
    """Whether the loader or the model sets the pace, and what to do about it."""

    bound: Bound
    """`unknown`: fewer than `FEWEST_WINDOWS` windows."""
    wait_share: float
    """Share of the training time that was spent waiting for the loader (0..1)."""
    headroom: float
    """Factor by which the run would be faster if data were always available."""
    needed_workers: int
    """Workers that load a window in the time that one is computed."""
    suggested_workers: int
    """`needed_workers` within the machine's limits; the present number if more would not help."""
    limit: Limit
    """What keeps `suggested_workers` below `needed_workers`."""
    expected_wait_share: float
    """Expected `wait_share` with the suggested workers."""


def judge(facts: LoaderFacts) -> LoaderVerdict:
    """Judge the loader. Training waits for a window if `load_s / workers` exceeds its `compute_s`."""
    total_s = facts.windows * facts.compute_s + facts.waited_s
    share = facts.waited_s / total_s if total_s else 0.0
    needed = max(1, ceil(facts.load_s / facts.compute_s)) if facts.compute_s else 1
    free = needed if facts.available_bytes is None else facts.workers + facts.available_bytes // facts.worker_bytes
    slow = share > LOADER_BOUND
    suggested = max(facts.workers, min(needed, facts.cores, free)) if slow else facts.workers
    expected_s = max(facts.load_s / suggested, facts.compute_s) if suggested > facts.workers else 0.0
    bound: Bound = "loader" if slow else "compute"
    if facts.windows < FEWEST_WINDOWS:
        bound = "unknown"
    limit: Limit = ""
    if slow and suggested < needed:
        limit = "cores" if facts.cores <= free else "host memory"
    return LoaderVerdict(
        bound=bound,
        wait_share=share,
        headroom=total_s / (facts.windows * facts.compute_s) if facts.windows else 1.0,
        needed_workers=needed,
        suggested_workers=suggested,
        limit=limit,
        expected_wait_share=1 - facts.compute_s / expected_s if expected_s else share,
    )


def verdict_line(verdict: LoaderVerdict, facts: LoaderFacts) -> str:
    """One line for the user."""
    waiting = f"{100 * verdict.wait_share:.0f} % waiting"
    if verdict.bound == "unknown":
        windows = "1 window is" if facts.windows == 1 else f"{facts.windows} windows are"
        return f"{waiting}; {windows} too few for a verdict on the loader"
    if verdict.bound == "compute":
        return f"compute bound: {waiting}"
    bound = f"loader bound: {waiting}"
    faster = "images stored at the training size load faster"
    enough = f"{verdict.needed_workers} worker{'' if verdict.needed_workers == 1 else 's'} would do"
    suggested = verdict.suggested_workers
    if suggested > facts.workers:
        then = (
            f", limited by {verdict.limit} to {suggested}: about {100 * verdict.expected_wait_share:.0f} % waiting then"
        )
        return f"{bound}; {enough} (now {facts.workers}){then if verdict.limit else ''}"
    if verdict.limit:
        return f"{bound}; {enough}, limited by {verdict.limit} to the {facts.workers} there are; {faster}"
    return f"{bound}, though {facts.workers} decode fast enough: it is the handing over; {faster}"


def available_host_bytes() -> int | None:
    """Memory that new processes can take: the system's, and the container's where it has a limit; None: not available."""
    try:
        meminfo = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux
        return None
    system = next(int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no control group of its own
        return system
    return system if limit == "max" else min(system, max(0, int(limit) - int(used)))


def worker_host_bytes() -> int:
    """Memory that a loader process holds for itself: the largest of those there are, else `WORKER_BYTES`.

    Private pages only: what a forked process shares with its parent costs nothing. Windows on their way to the trainer
    (two a worker, in anonymous files) are not counted.
    """
    sizes = [_private_bytes(child.pid) for child in multiprocessing.active_children() if child.pid is not None]
    return max((size for size in sizes if size), default=WORKER_BYTES)


def _private_bytes(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # not Linux, or the process has just ended
        return None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))
