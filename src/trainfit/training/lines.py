"""Lines that training shows to the user. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainfit.tasks.task import Evaluation, percent


def counted(number: int, noun: str) -> str:
    """A number with its noun: 1 step, 2 steps, 2 processes."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}es" if noun.endswith("s") else f"{number} {noun}s"


def opening_lines(data: str, workload: Any, how: str) -> Sequence[str]:
    """The first lines of a training: model, data and how it runs; `data` is the task's summary."""
    sizes = workload.sizes()
    scale = f"{sizes[-1]} px" if len(sizes) == 1 else f"{min(sizes)}-{max(sizes)} px, one size a window"
    return (*workload.remarks, data, f"{workload.setting.model} at {scale}, {how}")


def evaluated_line(evaluation: Evaluation, *, epoch: int, step: int, better: bool) -> str:
    """An evaluation's figures; `epoch` counts from 1."""
    figures = ", ".join(f"{name} {percent(value)}" for name, value in evaluation.figures.items())
    return f"epoch {epoch} step {step}: {figures}{' (best so far)' if better else ''}"


def diverged(step: int, skipped: int, last: Path) -> str:
    """Why training cannot go on where numbers are no longer finite, and how to begin again.

    Args:
        step: Optimizer steps done.
        skipped: Windows in a row that fp16 skipped; 0 where nothing was skipped.
        last: The file of the last saved weights, which may not exist.
    """
    what = f"is no longer finite at step {step}"
    if skipped:
        what = f"was not finite in {skipped} windows in a row, which fp16 skipped, the last of them step {step}"
    weights = f"; --weights {last} starts from the last saved weights" if last.exists() else ""
    return f"the loss or its gradient {what}: start a new run with a lower --lr, or with --precision fp32{weights}"


def other_ranks(now: int, before: int, effective_batch: int) -> str:
    """A line on what changes if a run is resumed with another number of processes."""
    return (
        f"the run goes on with {counted(now, 'process')} after {before}: the effective batch stays {effective_batch}; "
        "dropout draws other random numbers"
    )
