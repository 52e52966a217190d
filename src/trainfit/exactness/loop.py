"""The input and the result of the check of exactness."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import default_collate

from trainfit.errors import TrainfitError
from trainfit.user_code import load_named

Cause = Literal[
    "normaliser",
    "ignored labels",
    "canvas padding",
    "BatchNorm",
    "RNG",
    "scale parameter",
    "EMA",
    "scheduler",
    "not synchronised",
    "zero_grad",
    "scaler",
    "short last window",
    "clip",
    "step",
    "coupled loss",
    "unknown",
]
"""Why an accumulated window is not one big batch; `Deviation.explanation` says each in a sentence."""


class Batches(Sequence[Any]):
    """The batches of one run, in order, as a `DataLoader` would give them; `len` is known."""

    def __init__(self, batches: Sequence[Any], *, begin: Callable[[], None] = lambda: None) -> None:
        """Hold collated batches; `begin` is called before the first is taken."""
        self.batches = batches
        self._begin = begin
        self.taken = 0
        """Batches that the loop took."""

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        """A batch; of a slice, a list."""
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        self._take(range(len(self))[index] + 1)
        return self.batches[index]

    def __iter__(self) -> Iterator[Any]:
        """Every batch once."""
        for number, batch in enumerate(self.batches, 1):
            self._take(number)
            yield batch

    def _take(self, number: int) -> None:
        if self.taken == 0:
            self._begin()
        self.taken = max(self.taken, number)


@dataclass(frozen=True, kw_only=True)
class OwnLoop:
    """A training loop of the user's, as `check_exactness` runs it: several times, from the same weights."""

    model: Callable[[], torch.nn.Module]
    """Makes the model, on the CPU, in the mode in which it trains."""
    items: Sequence[Any]
    """Items of the data set, in order: two windows or more, and a short one where short last windows matter. Items that
    differ as those of the data do (sizes, objects, ignored labels) show what equal ones hide."""
    train: Callable[[torch.nn.Module, Batches, int], Any]
    """(model, batches, accumulation): the loop. It makes optimizer, scheduler, scaler and average itself, takes every
    batch once, and steps the optimizer after each `accumulation` batches."""
    collate: Callable[[list[Any]], Any] = default_collate
    """Items -> batch, as the `DataLoader`'s `collate_fn`."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One cause for which the accumulated window is not the big batch."""

    cause: Cause
    """Which of the known causes it is."""
    explanation: str
    """A sentence with the numbers, and the repair."""


@dataclass(frozen=True, kw_only=True)
class GroupError:
    """How far the gradient of one of the optimizer's parameter groups is off, in the worst window."""

    name: str
    """Name of the group, for instance "group 0"."""
    parameters: int
    """Tensors of the group."""
    relative_error: float
    """The largest over its parameters of |accumulated - big batch| / |big batch|."""
    worst: str
    """Name of that parameter."""


@dataclass(frozen=True, kw_only=True)
class Exactness:
    """What a check found. `exact` is whether there is no finding."""

    findings: tuple[Deviation, ...]
    """The causes, in the order in which they were found; none if the gradient is exact."""
    groups: tuple[GroupError, ...]
    """Errors of the optimizer's parameter groups."""
    micro_batch: int
    """Items in a micro-batch."""
    accumulation: int
    """Micro-batches in a window."""
    ranks: int
    """Processes that shared each window."""
    windows: int
    """Optimizer steps of the reference: each window as one batch."""
    tolerance: float
    """Relative errors below it are rounding."""
    notes: tuple[str, ...] = ()
    """What was not tried, and what limits the check."""

    @property
    def exact(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def causes(self) -> tuple[Cause, ...]:
        """The causes that were found, in the order of the findings."""
        return tuple(finding.cause for finding in self.findings)


def resolve(loop: OwnLoop | Callable[[], OwnLoop] | str) -> OwnLoop:
    """The loop that was given, or named, or that a function makes.

    Raises:
        TrainfitError: there is no such loop.
    """
    if isinstance(loop, OwnLoop):
        return loop
    name = loop if isinstance(loop, str) else getattr(loop, "__name__", type(loop).__name__)
    made = (named_function(loop) if isinstance(loop, str) else loop)()
    if not isinstance(made, OwnLoop):
        raise TrainfitError(f"{name} returned {type(made).__name__}; it must return a trainfit.OwnLoop")
    return made


def named_function(name: str) -> Callable[[], Any]:
    """The function of "module:function"; the module may lie in the working directory.

    Raises:
        TrainfitError: the name is none, or there is no such module or function.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise TrainfitError(f"{name!r} names no function: write module:function, for instance train:check")
    module = module.removesuffix(".py").replace("/", ".")
    value = load_named(module, function, name)
    if not callable(value):
        raise TrainfitError(f"{name} is not a function")
    return value
