"""Collectives between the ranks of a data parallel run. Every function is the identity in a run of one process."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # pyright: ignore[reportUnusedImport]

from trainfit.errors import TrainfitError
from trainfit.step.attempt import Result, attempt, is_out_of_memory

# `torch.distributed.nn.functional` keeps the process group that exists when it is first imported (default arguments):
# imported later (AdamW's step does, through dynamo) it would keep gloo's threads alive beyond
# `destroy_process_group`, and one of them that frees a tensor while Python exits aborts the process.

ANOTHER_RANK = "another rank ran out of memory"


class LostRankError(TrainfitError):
    """Another process of the run has ended or does not respond, so that no collective is possible any more."""


@contextmanager
def collective() -> Generator[None]:
    """Context of collective calls: turns the errors of gloo and NCCL about a lost rank into a `LostRankError`.

    Both raise plain RuntimeErrors, whose messages change from release to release. Running out of memory within a collective
    ends the run too, because the other ranks are waiting in it.
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise LostRankError(f"memory ran out within a collective ({str(error).splitlines()[0]})") from error
        reason = "it does not respond" if "timed out" in str(error).lower() else "its connection is closed"
        raise LostRankError(f"another process of this run was lost ({reason})") from error


def rank() -> int:
    """The rank of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_numbers(values: Sequence[float]) -> list[float]:
    """Sum numbers over the ranks, in float64, by one collective on the CPU (gloo), so that nothing waits for a GPU.

    Every rank must pass equally many.
    """
    if world_size() == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64)
    with collective():
        dist.all_reduce(total)
    return total.tolist()


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Sum named numbers over the ranks by one collective, as `sum_numbers` does; every rank must give the same keys."""
    names = sorted(values)
    return dict(zip(names, sum_numbers([values[name] for name in names]), strict=True))


def largest(size: tuple[int, int]) -> tuple[int, int]:
    """The largest height and the largest width of all ranks, by one collective on the CPU."""
    if world_size() == 1:
        return size
    height_and_width = torch.tensor(size)
    with collective():
        dist.all_reduce(height_and_width, op=dist.ReduceOp.MAX)
    return int(height_and_width[0]), int(height_and_width[1])


def gather(value: Result) -> list[Result]:
    """The values of all ranks, in the order of the ranks; values are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with collective():
        dist.all_gather_object(values, value)
    return values


def any_rank(condition: bool) -> bool:
    """Whether a condition holds on at least one rank."""
    return sum_over_ranks({"true": float(condition)})["true"] > 0


def together(action: Callable[[], Result]) -> Result:
    """Run an action that comes before a collective, on all ranks or on none; takes one small collective on the CPU.

    Raises:
        torch.OutOfMemoryError: the action ran out of memory, here or on another rank; all ranks raise, so that none
            waits for another in the next collective.
    """
    result, failure = attempt(action)
    if any_rank(failure is not None):
        del result
        raise torch.OutOfMemoryError(failure or ANOTHER_RANK)
    return result  # pyright: ignore[reportReturnType]


def from_first_rank(make: Callable[[], str]) -> str:
    """Call `make` on rank 0 only, and return its result on every rank.

    Raises:
        TrainfitError: `make` raised it; every rank raises, so that none waits for rank 0 after it has ended.
    """
    result: list[str | TrainfitError] = [""]
    if rank() == 0:
        try:
            result[0] = make()
        except TrainfitError as error:
            result[0] = error
    if world_size() > 1:
        with collective():
            dist.broadcast_object_list(result)
    if isinstance(result[0], TrainfitError):
        raise result[0]
    return result[0]


def on_first_rank(action: Callable[[], None]) -> None:
    """Run an action on rank 0 only; the other ranks do not wait for it."""
    if rank() == 0:
        action()
