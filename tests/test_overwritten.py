"""Gradients that are written into existing tensors: traces against what PyTorch's profiler saw of the same steps."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from trainfit.memory.columns import Columns
from trainfit.memory.overwritten import overwriting, overwriting_events
from trainfit.tracing.events import TensorInfo, Trace
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.trace import trace_step

ROWS, WIDTH = 1000, 64
ONE_BYTES = 4 * ROWS * WIDTH
"""Of the tensors that count here: what kernels keep for themselves on the CPU is smaller."""


class Residual(nn.Module):
    """Two gradients of one tensor, `depth` times; the loss's own gradient is one number that is expanded."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Sum of input and branch."""
        for layer in self.layers:
            x = x + layer(x).relu()
        return x


class Branches(Residual):
    """Three gradients of one tensor at a time: their sum is overwritten again."""

    def forward(self, x: Tensor) -> Tensor:
        """Sum of input and two branches, multiplied."""
        for one, two in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + one(x).relu() * two(x).sigmoid()
        return x * x


class Indexed(Residual):
    """Rows by a mask and by numbers, and the largest of each row."""

    def forward(self, x: Tensor) -> Tensor:
        """Each way once."""
        x = self.layers[0](x)
        rows = torch.arange(ROWS)
        chosen = x[rows, :].relu()
        gathered = self.layers[1](x).gather(0, rows[:, None].expand(-1, WIDTH))
        return chosen * torch.index_select(gathered.relu(), 0, rows)


class Step:
    """Forward, sum, backward."""

    ema, blocks = None, 0

    def __init__(self, device: torch.device, build: Callable[[], nn.Module]) -> None:
        self.model = build().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.x = torch.ones(ROWS, WIDTH, device=device)

    def run(self) -> None:
        """One step."""
        self.optimizer.zero_grad()
        self.model(self.x).sum().backward()
        self.optimizer.step()


def seen_by_the_profiler(step: Step) -> list[int]:
    """Signed bytes of the allocations and frees of the second step, in order."""
    step.run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.run()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in events if abs(event.nbytes()) == ONE_BYTES]


def of_trace(trace: Trace, events: Sequence[int]) -> list[int]:
    """The same of a trace."""
    begin = next(index for index, name in trace.marks if name == "window 1")
    sizes = [(1 if event > 0 else -1) * trace.tensors[abs(event) - 1].nbytes for event in events[begin:] if event]
    return [size for size in sizes if abs(size) == ONE_BYTES]


def events_of(trace: Trace) -> list[int]:
    """Its events as a real step has them."""
    return overwriting_events(Columns.of(trace)).tolist()


CASES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "residual": (lambda: Residual(3), True),
    "branches": (lambda: Branches(4), True),
    "indexed": (lambda: Indexed(2), True),
    "no branch": (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Sigmoid()), False),
}


@pytest.mark.parametrize(("build", "differs"), CASES.values(), ids=CASES)
def test_a_step_allocates_what_the_profiler_saw(build: Callable[[], nn.Module], differs: bool) -> None:
    """In order, to the byte; and the trace as it was recorded is not that, where gradients meet."""
    cpu = torch.device("cpu")
    real = seen_by_the_profiler(Step(cpu, build))
    trace = trace_step(lambda device: Step(device, build), target=Target(capability=(8, 6)), device="cpu").trace
    assert of_trace(trace, events_of(trace)) == real
    assert (of_trace(trace, trace.events) != real) == differs


def of(*sizes: int, op: str = "aten.add", events: Sequence[int], marks: tuple[tuple[int, str], ...] = ()) -> Trace:
    """A trace whose last tensor is made by `op` in backward."""
    tensors = [TensorInfo(id=i, nbytes=n, op="aten.mm", phase="backward") for i, n in enumerate(sizes)]
    tensors[-1].op = op
    return Trace(tensors=tuple(tensors), events=tuple(events), marks=marks)


def test_a_gradient_that_something_else_holds_is_not_overwritten() -> None:
    """One of the two lives on; which of them came first, a trace does not tell."""
    kept = of(8, 8, 8, events=(1, 2, 3, -2, -3))
    assert events_of(kept) == list(kept.events)
    expanded = of(4, 8, 8, events=(1, 2, 3, -1, -2, -3))
    assert events_of(expanded) == list(expanded.events)


def test_a_forward_sum_is_a_new_tensor() -> None:
    """Autograd sums in backward alone."""
    trace = of(8, 8, 8, events=(1, 2, 3, -1, -2, -3))
    trace.tensors[-1].phase = "forward"
    assert events_of(trace) == list(trace.events)


def test_marks_move_with_the_events() -> None:
    """Two of six events are gone; the sum ends as the first of its parts."""
    trace = of(8, 8, 8, events=(1, 2, 3, -1, -2, -3), marks=((0, "backward"), (5, "update"), (6, "end")))
    real = overwriting(Columns.of(trace)).trace()
    assert real.events == (1, 2, -2, -1)
    assert real.marks == ((0, "backward"), (3, "update"), (4, "end"))
