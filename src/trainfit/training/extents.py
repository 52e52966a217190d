"""Records the largest samples of windows, so that a run can tell whether its memory grew with its data."""

from collections.abc import Iterable, Mapping
from typing import Any

from trainfit.tasks.task import Extents, Task
from trainfit.training.loader import Loaded, Unreadable

Largest = Mapping[str, Mapping[str, Any]]
"""Name of a number that memory follows from ("pixels") -> its most (`value`), the sample that has it (`item`), `step`."""


def largest_of(task: Task, samples: Loaded, step: int) -> Largest:
    """The largest extent of each kind over the samples of window `step`; empty if the task has no extents."""
    measured: object = task
    if not isinstance(measured, Extents):
        return {}
    largest: dict[str, dict[str, Any]] = {}
    for path, sample in zip(samples.paths, samples, strict=True):
        if isinstance(sample, Unreadable):
            continue
        for name, value in measured.extent(sample).items():
            if name not in largest or value > largest[name]["value"]:
                largest[name] = {"value": value, "item": path, "step": step}
    return largest


def largest_over(windows: Iterable[Largest]) -> Largest:
    """The largest extent of each kind over some windows; of equal ones the first."""
    largest: dict[str, Mapping[str, Any]] = {}
    for window in windows:
        for name, entry in window.items():
            if name not in largest or entry["value"] > largest[name]["value"]:
                largest[name] = entry
    return largest
