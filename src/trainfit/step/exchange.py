"""The window's gradient summed over the ranks while the last micro-batch's backward still runs."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from trainfit.errors import TrainfitError
from trainfit.step import ranks
from trainfit.step.attempt import attempt

BUCKET_BYTES = 25 * 2**20
"""Gradients travel in buckets of this size, as DistributedDataParallel's do (torch/nn/parallel/distributed.py)."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Parameters of one dtype whose gradients travel together."""

    numbers: tuple[int, ...]
    """Positions in `GradientExchange.parameters`."""
    elements: int
    """Elements of all its gradients together."""
    dtype: torch.dtype
    """Their dtype."""
    device: torch.device
    """Device that they are on."""

    def pieces(self) -> list[int]:
        """Elements of each collective: a parameter larger than a bucket travels in several."""
        most = BUCKET_BYTES // self.dtype.itemsize
        return [min(most, self.elements - start) for start in range(0, self.elements, most)]


class GradientExchange:
    """Sums the gradient over the ranks, bucket by bucket, as soon as a bucket is complete on this rank.

    Every rank issues the same collectives in the same order in each window, even after a failure: a rank without samples
    sends zeros, and one that ran out of memory sends the contents of `spare` for the buckets that it did not reach.
    One collective on the CPUs follows, so that all ranks discard a window in which one rank failed before a parameter
    changes. It also tells which parameters a rank has used: one that no rank has used keeps None as its gradient.

    The contents of a bucket depend only on the order of the parameters, so the sum is rounded alike in every run. The order
    in which buckets are sent is that of rank 0 in the first window: the buckets that backward completes first go first.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Divide the trainable ones of `parameters` into buckets.

        Allocates one bucket on the device (`spare`), which a rank needs after it has run out of memory.
        """
        self.parameters = [p for p in parameters if p.requires_grad]
        self.buckets = _buckets(self.parameters)
        self.order = list(reversed(range(len(self.buckets))))
        self.overlaps = False
        """Whether buckets are sent during backward; true from the second window on."""
        self._watching = False
        self._bucket_of: dict[int, int] = {}
        for index, bucket in enumerate(self.buckets):
            self._bucket_of |= dict.fromkeys(bucket.numbers, index)
        spare_bytes = max((min(BUCKET_BYTES, b.elements * b.dtype.itemsize) for b in self.buckets), default=0)
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        self.spare = torch.empty(spare_bytes, dtype=torch.uint8, device=device)
        self._armed = False
        self._reset()

    def watch_backward(self) -> None:
        """Send buckets during backward, after the first window has shown the order in which they complete."""
        self._watching = True
        for number, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._accumulated, number))

    def _reset(self) -> None:
        self._missing = [len(bucket.numbers) for bucket in self.buckets]
        self._seen: set[int] = set()
        self._completed: list[int] = []
        self._repeated = False
        self._used = [False] * len(self.parameters)
        self._sent = 0
        self._works: list[dist.Work] = []

    @contextmanager
    def last_backward(self) -> Generator[None]:
        """Around the backward of the window's last micro-batch, after which no gradient changes."""
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _accumulated(self, number: int, _parameter: torch.Tensor) -> None:
        """One parameter's gradient is final; autograd calls this."""
        if not self._armed:
            return
        if number in self._seen:
            self._repeat()
            return
        self._seen.add(number)
        bucket = self._bucket_of[number]
        self._missing[bucket] -= 1
        if not self._missing[bucket]:
            self._completed.append(bucket)
        while self.overlaps and self._sent < len(self.order) and not self._missing[self.order[self._sent]]:
            self._send(self.order[self._sent])

    def _repeat(self) -> None:
        """Note that one backward accumulated a gradient twice, which reentrant checkpointing of shared weights does.

        If it happens in the first window, nothing is sent during backward.
        """
        self._repeated = True
        if self.overlaps:
            raise TrainfitError(
                "a parameter's gradient came in two parts, which several ranks cannot sum while backward runs: "
                "use activation checkpointing with use_reentrant=False"
            )

    def _send(self, index: int) -> None:
        """Start the sum of one bucket. Everything that may fail comes before the first collective."""
        bucket = self.buckets[index]
        members = [self.parameters[number] for number in bucket.numbers]
        used = [p.grad is not None for p in members]
        pieces = _flat_gradient(members, bucket).split(bucket.pieces())
        for number, is_used in zip(bucket.numbers, used, strict=True):
            self._used[number] = is_used
        self._sent += 1
        with ranks.collective():
            for piece in pieces:
                self._works.append(dist.all_reduce(piece, async_op=True))  # pyright: ignore[reportArgumentType]

    def _send_rest(self) -> None:
        while self._sent < len(self.order):
            self._send(self.order[self._sent])

    def _send_nothing(self) -> None:
        """Take part in the remaining collectives with `spare`; all ranks discard these sums."""
        for index in self.order[self._sent :]:
            bucket = self.buckets[index]
            for elements in bucket.pieces():
                part = self.spare[: elements * bucket.dtype.itemsize].view(bucket.dtype)
                with ranks.collective():
                    dist.all_reduce(part)
        self._sent = len(self.order)

    def finish(self, failure: str | None, requests: Mapping[str, float]) -> dict[str, float]:
        """Send the remaining buckets, agree, and wait: afterwards every `.grad` is the sum over the ranks.

        Args:
            failure: The first line of this rank's out-of-memory error in the window, if there was one.
            requests: Numbers that travel with the agreement; every rank must give the same keys.

        Returns:
            The requests, summed over the ranks.

        Raises:
            torch.OutOfMemoryError: memory ran out, here or on another rank. All ranks raise; gradients are to be dropped.
        """
        if failure is None:
            _, failure = attempt(self._send_rest)
        if failure is not None:
            self._send_nothing()
        failed, *numbers = ranks.sum_numbers([float(failure is not None), *requests.values(), *self._used])
        agreed = numbers[: len(requests)]
        users = numbers[len(requests) :]
        with ranks.collective():
            for work in self._works:
                work.wait()
        completed = self._completed
        repeated = self._repeated
        self._reset()
        if failed:
            raise torch.OutOfMemoryError(failure or ranks.ANOTHER_RANK)
        for used, parameter in zip(users, self.parameters, strict=True):
            if not used:
                parameter.grad = None
        if self._watching:
            self._adopt_order(completed, repeated)
        return dict(zip(requests, agreed, strict=True))

    def _adopt_order(self, completed: list[int], repeated: bool) -> None:
        """Adopt rank 0's order after the first window; buckets that its backward did not complete come last."""
        incomplete = [index for index in self.order if index not in completed]
        orders = ranks.gather(([*completed, *incomplete], repeated))
        self.order = orders[0][0]
        self.overlaps = not any(repeated for _, repeated in orders)
        self._watching = False


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum every gradient over the ranks, in place: for a training step of your own.

    A parameter without a gradient on this rank counts as zero; one without a gradient on any rank keeps None.

    Raises:
        torch.OutOfMemoryError: memory ran out, here or on another rank; all ranks raise.
    """
    if ranks.world_size() > 1:
        ranks.together(lambda: GradientExchange(parameters)).finish(None, {})


def _buckets(parameters: list[torch.nn.Parameter]) -> list[Bucket]:
    """Divide the parameters into buckets of one dtype and at most `BUCKET_BYTES`; a larger parameter is its own bucket."""
    runs: list[list[int]] = []
    size_bytes = 0
    for number, parameter in enumerate(parameters):
        last = parameters[runs[-1][-1]] if runs else None
        alike = last is not None and (last.dtype, last.device) == (parameter.dtype, parameter.device)
        if not alike or size_bytes + parameter.nbytes > BUCKET_BYTES:
            runs.append([])
            size_bytes = 0
        runs[-1].append(number)
        size_bytes += parameter.nbytes
    return [
        Bucket(
            numbers=tuple(run),
            elements=sum(parameters[number].numel() for number in run),
            dtype=parameters[run[0]].dtype,
            device=parameters[run[0]].device,
        )
        for run in runs
    ]


def _flat_gradient(members: list[torch.nn.Parameter], bucket: Bucket) -> torch.Tensor:
    """The members' gradients as one flat tensor; afterwards they are views of it. A failure leaves them unchanged."""
    if len(members) == 1 and members[0].grad is not None and members[0].grad.stride() == _strides(members[0]):
        return members[0].grad.as_strided((bucket.elements,), (1,))
    flat = torch.empty(bucket.elements, dtype=bucket.dtype, device=bucket.device)
    pieces = flat.split([p.numel() for p in members])
    parts = [piece.as_strided(p.shape, _strides(p)) for piece, p in zip(pieces, members, strict=True)]
    filled = [(part, p.grad) for part, p in zip(parts, members, strict=True) if p.grad is not None]
    for part, parameter in zip(parts, members, strict=True):
        if parameter.grad is None:
            part.zero_()
    if filled:
        torch._foreach_copy_([part for part, _ in filled], [gradient for _, gradient in filled])  # pyright: ignore[reportPrivateUsage]
    for part, parameter in zip(parts, members, strict=True):
        parameter.grad = part
    return flat


def _strides(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    """The parameter's strides, or contiguous ones if it has gaps: fused optimizers need gradients laid out like parameters."""
    return torch.empty_like(parameter, device="meta").stride()
