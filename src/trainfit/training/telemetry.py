"""Figures of a run in progress, for the screen and for telemetry.jsonl."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from trainfit.gpus.usage import GpuUsage, usage_meter
from trainfit.training.loader import Loaded


@dataclass(frozen=True, kw_only=True)
class StepUpdate:
    """The progress of training."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    """Optimizer steps in all."""
    epoch: int
    """Epoch of the last window, from 0."""
    epochs: int
    """Epochs in all."""
    loss: float
    """Loss of the last window."""
    images_per_s: float
    """Over all ranks, since the last update, evaluation left out."""
    remaining_s: float
    """Estimated seconds to the end."""
    memory_bytes: int
    """Peak reserved by torch on the GPU; resident memory of this process on the CPU."""
    wait_share: float
    """Share of the time since the last update spent waiting for the loader (0..1)."""


class Progress(Protocol):
    """Shows progress, for instance in a terminal."""

    def note(self, text: str) -> None:
        """Show a line that stays."""

    def step(self, update: StepUpdate) -> None:
        """Show the progress of training."""

    def evaluated(self, done: int, total: int) -> None:
        """Show the progress of an evaluation: images done, and images in all."""


class Silent(Progress):
    """A `Progress` that shows nothing."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """How the training time of some windows was spent, evaluation and saving left out."""

    windows: int = 0
    """Number of windows."""
    images: int = 0
    """This rank's."""
    elapsed_s: float = 0.0
    """Seconds in all."""
    waited_s: float = 0.0
    """Time waited for the loader; on a GPU only as far as the GPU had nothing to do."""
    compute_s: float = 0.0
    """Time from each window's arrival to the end of its work on the device."""
    load_s: float = 0.0
    """Reading and decoding, summed over the loader's processes."""

    def __add__(self, other: "Spent") -> "Spent":
        """The sum of both."""
        return Spent(**{key: value + getattr(other, key) for key, value in asdict(self).items()})


class Clock:
    """Time since the last reading, and where it went. Nothing is computed twice and the GPU is not waited for.

    A window's compute time is what the same step would take on cached data. On a GPU two events enclose it: the first
    happens when the window has arrived and the GPU is done with the one before.
    """

    def __init__(self, device: torch.device, began: float) -> None:
        """Start at `began` (time.perf_counter)."""
        self.device = device
        self.total = Spent()
        """Sum of all readings."""
        self.start_s: float | None = None
        """Time from the clock's start to the first window's arrival."""
        self._arrived = 0.0
        self._first: torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._since = began
        self._now = Spent()

    def fetch(self, items: Iterable[Loaded]) -> Iterator[Loaded]:
        """Pass windows on; the time until each arrives is waiting for data, but for the first: that is the start."""
        asked = time.perf_counter()
        for item in items:
            self._arrived = time.perf_counter()
            if self.start_s is None:
                self.start_s = self.pause()
            else:
                self._now += Spent(waited_s=self._arrived - asked)
            self._now += Spent(load_s=item.load_s)
            self._first = self._event() if self.device.type == "cuda" else None
            yield item
            asked = time.perf_counter()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def window_done(self, images: int) -> None:
        """Note that the last window was trained (on a GPU: that its work is queued)."""
        self._now += Spent(windows=1, images=images)
        if self._first is None:
            self._now += Spent(compute_s=time.perf_counter() - self._arrived)
        else:
            self._spans.append((self._first, self._event()))

    def read(self) -> Spent:
        """How the time since the last reading was spent; starts a new reading. Waits for the GPU."""
        if self._spans:
            self._spans[-1][1].synchronize()
            compute_s = sum(first.elapsed_time(last) for first, last in self._spans) / 1000
            self._spans.clear()
            self._now += Spent(compute_s=compute_s)
        spent = self._now + Spent(elapsed_s=time.perf_counter() - self._since)
        if self.device.type == "cuda":  # the host runs ahead: it may wait while the GPU works
            spent = replace(spent, waited_s=min(spent.waited_s, max(0.0, spent.elapsed_s - spent.compute_s)))
        self.total += spent
        self.pause()
        return spent

    def pause(self) -> float:
        """Forget the time since the last reading (an evaluation, a save); returns it, in seconds."""
        seconds = time.perf_counter() - self._since
        self._since = time.perf_counter()
        self._now = Spent()
        return seconds


def memory_bytes(device: torch.device) -> int:
    """Peak reserved GPU memory of this process; on the CPU its resident memory now (0 where the system cannot tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def meter(device: torch.device) -> Callable[[], dict[str, Any]]:
    """A function that reads the GPU's use and torch's allocator; every value is None on the CPU."""
    on_gpu = device.type == "cuda"
    usage = usage_meter(f"GPU-{torch.cuda.get_device_properties(device).uuid}") if on_gpu else GpuUsage

    def read() -> dict[str, Any]:
        stats = torch.cuda.memory_stats(device) if on_gpu else {}
        return asdict(usage()) | {
            "allocated_bytes": stats.get("allocated_bytes.all.peak"),
            "reserved_bytes": stats.get("reserved_bytes.all.peak"),
            "alloc_retries": stats.get("num_alloc_retries"),
        }

    return read
