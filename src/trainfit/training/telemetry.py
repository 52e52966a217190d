"""What a run tells while it goes on: numbers for the screen and for telemetry.jsonl."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class StepUpdate:
    """Where training is."""

    step: int
    """Optimizer steps done."""
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    """Of the last window."""
    images_per_s: float
    """Over all ranks, since the last update, evaluation left out."""
    remaining_s: float
    memory_bytes: int
    """Peak reserved by torch on the GPU; resident memory of this process on the CPU."""
    wait_share: float
    """Share of the time since the last update spent waiting for the loader (0..1)."""


class Progress(Protocol):
    """Whoever shows progress: the terminal, or nobody."""

    def note(self, text: str) -> None:
        """Say one line that stays."""
        ...

    def step(self, update: StepUpdate) -> None:
        """Training went on."""
        ...

    def evaluated(self, done: int, total: int) -> None:
        """Evaluation went on: images done, of all."""
        ...


class Silent:
    """A `Progress` that shows nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def step(self, update: StepUpdate) -> None:
        """Show nothing."""

    def evaluated(self, done: int, total: int) -> None:
        """Show nothing."""


@dataclass
class Clock:
    """Time since the last reading, and how much of it went into waiting for data."""

    started: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0
    images: int = 0
    """This rank's images in all."""
    total_s: float = 0.0
    """Training time of all readings."""
    total_waited_s: float = 0.0

    def fetch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on; the time until each arrives is waiting for data."""
        source = iter(items)
        while True:
            asked = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            self.waited_s += time.perf_counter() - asked
            yield item

    def read(self) -> tuple[float, float]:
        """Seconds, and seconds waited, since the last reading; then start anew."""
        elapsed_s, waited_s = time.perf_counter() - self.started, self.waited_s
        self.total_s += elapsed_s
        self.total_waited_s += waited_s
        self.restart()
        return elapsed_s, waited_s

    def restart(self) -> None:
        """Forget the time since the last reading (an evaluation, a save)."""
        self.started, self.waited_s = time.perf_counter(), 0.0


def memory_bytes(device: torch.device) -> int:
    """Peak reserved GPU memory of this process; on the CPU its resident memory now (0 where the system cannot tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
