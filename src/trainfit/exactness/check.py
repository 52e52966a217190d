"""The check: the user's loop against itself with every window as one batch, and the causes of a difference."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from trainfit.errors import TrainfitError
from trainfit.exactness import processes
from trainfit.exactness.causes import differences, events
from trainfit.exactness.loop import Deviation, Exactness, GroupError, OwnLoop, resolve
from trainfit.exactness.record import Run
from trainfit.exactness.runs import Runner, parameter_errors, whole, windows_of

TOLERANCE = {"float64": 1e-9, "float32": 1e-4}
"""Relative errors below are rounding: of sums over thousands of terms in another order."""


def check_exactness(
    loop: OwnLoop | Callable[[], OwnLoop] | str,
    *,
    micro_batch: int = 2,
    accumulation: int = 4,
    ranks: int = 1,
    precision: Literal["float64", "float32"] = "float64",
    tolerance: float | None = None,
) -> Exactness:
    """Check that a training loop's accumulated gradient is that of one big batch, and name the cause if it is not.

    The loop runs several times from the same weights: with `accumulation` micro-batches a window, and as the reference
    with every window as one batch and an accumulation of 1. It is watched from outside (hooks of optimizers and modules,
    and every operator); weights are put back after each step, so that each window is compared on its own.

    Args:
        loop: The loop, a function that returns it, or "module:function" of such a function.
        micro_batch: Items in one micro-batch.
        accumulation: Micro-batches in one window, at least 2.
        ranks: Processes (gloo, on the CPU) that share each window; above 1 `loop` is a function or its name.
        precision: float64 tells a fault from rounding; float32 for a loop that cannot run in float64.
        tolerance: Relative error that counts as rounding.

    Returns:
        The findings, and the error of each parameter group. The loop's own result is ignored.

    Raises:
        TrainfitError: the loop raised, never stepped an optimizer, or has fewer items than one window.
    """
    own = resolve(loop)
    if accumulation < 2 or micro_batch < 1 or ranks < 1:
        raise TrainfitError(
            f"micro_batch {micro_batch}, accumulation {accumulation} and ranks {ranks}: they must be at least 1, 2 and 1"
        )
    if tolerance is not None and not 0 < tolerance < 1:
        raise TrainfitError(f"tolerance {tolerance}: a relative error is between 0 and 1")
    share = micro_batch * accumulation
    if len(own.items) < share * ranks:
        raise TrainfitError(
            f"the loop has {len(own.items)} items; one window of {micro_batch} x {accumulation} x {ranks} needs "
            f"{share * ranks}: give more items, or lower micro_batch or accumulation"
        )
    double = precision == "float64"
    runner = Runner(own, micro_batch=micro_batch, double=double)
    windows = windows_of(own.items, micro_batch=micro_batch * ranks, accumulation=accumulation)
    if ranks > 1:
        windows = [w for w in windows if all(len(m) == micro_batch * ranks for m in w)]
        micro, alone, findings, limit = _on_ranks(loop, runner, windows, ranks, accumulation, tolerance)
    else:
        micro, alone, findings, limit = _here(runner, windows, accumulation, tolerance)
    return Exactness(
        findings=tuple(findings),
        groups=_groups(micro, alone),
        micro_batch=micro_batch,
        accumulation=accumulation,
        ranks=ranks,
        windows=len(alone.windows),
        tolerance=limit,
        notes=_notes(windows, alone, accumulation, double=double),
    )


def _here(
    runner: Runner, windows: Sequence[Any], accumulation: int, tolerance: float | None
) -> tuple[Run, Run, list[Deviation], float]:
    """The run in one process, the reference, the findings, and the largest error that counts as rounding."""
    alone = _reference(runner, windows)
    micro = runner.run(windows, accumulation=accumulation)
    if not micro.windows:
        raise TrainfitError(
            f"the loop steps its optimizer with accumulation 1, but never with accumulation {accumulation}"
        )
    limit = tolerance or _tolerance((alone, micro), double=runner.double)
    findings = events(micro, alone, windows, accumulation=accumulation)
    findings += differences(runner, micro, alone, windows, findings, accumulation=accumulation, limit=limit)
    return micro, alone, findings, limit


def _on_ranks(
    loop: Any, runner: Runner, windows: Sequence[Any], ranks: int, accumulation: int, tolerance: float | None
) -> tuple[Run, Run, list[Deviation], float]:
    """Return what `_here` does, for the first rank's run."""
    many = processes.run_ranks(loop, windows, ranks=ranks, accumulation=accumulation, double=runner.double)
    with processes.alone():
        alone = _reference(runner, windows)
    limit = tolerance or _tolerance((alone, *many), double=runner.double)
    findings = processes.synchronised(many, alone, limit)
    known = [finding.cause for finding in findings]
    of_rank = events(many[0], alone, windows, accumulation=accumulation)
    return many[0], alone, [*findings, *(each for each in of_rank if each.cause not in known)], limit


def _reference(runner: Runner, windows: Sequence[Sequence[Sequence[Any]]]) -> Run:
    reference = runner.run(whole(windows), accumulation=1)
    if not reference.windows:
        raise TrainfitError("the loop never stepped a torch optimizer: it must step one after every window")
    return reference


def _tolerance(runs: Sequence[Run], *, double: bool) -> float:
    return TOLERANCE["float64" if double and not any(run.low for run in runs) else "float32"]


def _groups(micro: Run, alone: Run) -> tuple[GroupError, ...]:
    """The worst error of each parameter group over the windows that both runs have."""
    worst: dict[str, GroupError] = {}
    for one, other in zip(micro.windows, alone.windows, strict=False):
        errors = parameter_errors(one.gradients, other.gradients)
        for name, names in other.groups:
            known = [(errors[each], each) for each in names if each in errors]
            if known:
                error, parameter = max(known)
                group = GroupError(name=name, parameters=len(names), relative_error=error, worst=parameter)
                worst[name] = max(worst.get(name, group), group, key=lambda each: each.relative_error)
    return tuple(worst.values())


def _notes(windows: Sequence[Any], alone: Run, accumulation: int, *, double: bool) -> tuple[str, ...]:
    notes: list[str] = []
    if len(windows[-1]) == accumulation:
        notes.append("no short last window was tried: give items that do not fill the last one")
    if len(windows) == 1:
        notes.append("only one window was tried, so that a forgotten zero_grad cannot be seen: give more items")
    if double and alone.low:
        notes.append("parts of the loop compute in less than float64, so that the tolerance is that of float32")
    return tuple(notes)
