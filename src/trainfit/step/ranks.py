"""What the ranks of a data parallel run agree on. Every function is the identity in a run of one process."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # pyright: ignore[reportUnusedImport]

from trainfit.errors import TrainfitError
from trainfit.step.attempt import Result, attempt

# `torch.distributed.nn.functional` holds the process group that is there when it is first imported (default arguments):
# imported later (AdamW's step does, through dynamo) it would keep gloo's threads alive beyond
# `destroy_process_group`, and one of them that drops a tensor while Python ends aborts the process.

ANOTHER_RANK = "another rank ran out of memory"
BUCKET_BYTES = 25 * 2**20
"""Gradients travel in buckets of this size, as DistributedDataParallel's do (torch/nn/parallel/distributed.py)."""


class LostRankError(TrainfitError):
    """Another process of the run is gone or does not answer, so no collective is possible any more."""


@contextmanager
def collective() -> Generator[None]:
    """Around collective calls: what gloo and NCCL raise where another rank is gone becomes a `LostRankError`.

    Both raise plain RuntimeErrors, whose texts change from release to release; a collective has no other reason to fail.
    """
    try:
        yield
    except RuntimeError as error:
        reason = "it does not answer" if "timed out" in str(error).lower() else "its connection is closed"
        raise LostRankError(f"another process of this run was lost ({reason})") from error


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Sum numbers over the ranks, in float64, by one collective on the CPU (gloo), so that no GPU is waited for.

    Every rank must give the same keys.
    """
    if world_size() == 1:
        return dict(values)
    total = torch.tensor([values[key] for key in sorted(values)], dtype=torch.float64)
    with collective():
        dist.all_reduce(total)
    return dict(zip(sorted(values), total.tolist(), strict=True))


def gather(value: Result) -> list[Result]:
    """The values of all ranks, in their order; values are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with collective():
        dist.all_gather_object(values, value)
    return values


def any_rank(condition: bool) -> bool:
    """Whether a condition holds on one of the ranks at least."""
    return sum_over_ranks({"true": float(condition)})["true"] > 0


def together(action: Callable[[], Result]) -> Result:
    """The result of an action that comes before a collective: one small collective more, on the CPU.

    Raises:
        torch.OutOfMemoryError: the action ran out of memory, here or on another rank; all ranks raise, so that none
            waits for another in the collective.
    """
    result, failure = attempt(action)
    if any_rank(failure is not None):
        del result
        raise torch.OutOfMemoryError(failure or ANOTHER_RANK)
    return result  # pyright: ignore[reportReturnType]


def from_first_rank(make: Callable[[], str]) -> str:
    """What `make` gives on rank 0, on every rank; the others do not call it."""
    value = [make() if rank() == 0 else ""]
    if world_size() > 1:
        with collective():
            dist.broadcast_object_list(value)
    return value[0]


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum every parameter's gradient over the ranks, in place, once a window.

    A parameter without a gradient on this rank (a rank whose share of the last window is empty) counts as zero; one
    without a gradient on any rank keeps None, so that the optimizer skips it as it would in a run of one process.
    """
    if world_size() == 1:
        return
    parameters = list(parameters)
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)

    def allocate() -> tuple[list[list[torch.Tensor]], torch.Tensor]:
        for p, is_used in zip(parameters, used.tolist(), strict=True):
            if is_used and p.grad is None:
                p.grad = torch.zeros_like(p)
        buckets = _buckets([p.grad for p in parameters if p.grad is not None])
        largest = max((sum(g.nbytes for g in bucket) for bucket in buckets), default=0)
        return buckets, torch.empty(largest, dtype=torch.uint8, device=used.device)

    buckets, room = together(allocate)  # after this nothing can fail with the sum half done
    for bucket in buckets:
        flat = room[: sum(g.nbytes for g in bucket)].view(bucket[0].dtype)
        parts = [part.view(g.shape) for part, g in zip(flat.split([g.numel() for g in bucket]), bucket, strict=True)]
        torch._foreach_copy_(parts, bucket)  # pyright: ignore[reportPrivateUsage]
        dist.all_reduce(flat)
        torch._foreach_copy_(bucket, parts)  # pyright: ignore[reportPrivateUsage]


def _buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Cut a list into runs of one dtype and at most `BUCKET_BYTES` each."""
    buckets: list[list[torch.Tensor]] = []
    size_bytes = 0
    for tensor in tensors:
        fits = size_bytes + tensor.nbytes <= BUCKET_BYTES
        if not buckets or not fits or buckets[-1][0].dtype != tensor.dtype:
            buckets.append([])
            size_bytes = 0
        buckets[-1].append(tensor)
        size_bytes += tensor.nbytes
    return buckets
