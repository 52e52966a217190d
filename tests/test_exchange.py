"""The gradient's sum over ranks during backward: exact for any shares, sent early, and void where one rank failed."""

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from trainfit.step import exchange, ranks
from trainfit.step.optimizer import make_adamw
from trainfit.step.terms import LossTerm, Objective
from trainfit.step.training_step import TrainingStep
from trainfit.training import oom
from trainfit.training.oom import Survivor
from trainfit.training.rehearsal import keep

WORLD = 3
WIDTH = 6
EVERY = 3
"""Memory ends at one in so many operators; all of them were tried once."""
SHARES = ((2, 1, 1), (3, 0, 2), (1, 1, 1), (0, 0, 4), (2, 2, 0))
"""Images of each rank in each window; one window starts with ranks that have none."""
OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free. "
    "Of the allocated memory 4.00 GiB is allocated by PyTorch, and 2.50 GiB is reserved by PyTorch but unallocated."
)
"""Fragmented: the same cut is tried once more, so that the undisturbed run is the same bit for bit."""


class Layers(torch.nn.Module):
    """Layers with dropout and running statistics, a big one, one that some windows use, and one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        double: dict[str, Any] = {"dtype": torch.float64}
        self.never = torch.nn.Linear(3, 3, **double)
        self.register_buffer("mean", torch.zeros(WIDTH, **double))
        self.first = torch.nn.Linear(WIDTH, WIDTH, **double)
        self.big = torch.nn.Linear(WIDTH, 40 * WIDTH, **double)
        self.sometimes = torch.nn.Linear(40 * WIDTH, 1, **double)
        self.last = torch.nn.Linear(40 * WIDTH, 1, **double)
        self.drop = torch.nn.Dropout(0.3)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.get_buffer("mean").lerp_(rows.mean(0), 0.1)
        hidden = torch.tanh(self.big(torch.tanh(self.first(self.drop(rows)))))
        used = self.last(hidden)
        return used + self.sometimes(hidden) if uses_all(rows) else used


def uses_all(rows: torch.Tensor) -> bool:
    return bool((rows[:, 0] > 0).any())


def terms(model: torch.nn.Module, samples: Sequence[torch.Tensor], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    return {"loss": LossTerm(total=model(torch.stack(list(samples))).square().sum(), kind="images")}


def make_step() -> TrainingStep:
    model = Layers()
    return TrainingStep(
        model=model,
        objective=Objective(
            terms=terms, counts=lambda window: {"loss": float(len(window))}, canvas=lambda _window: (0, 0)
        ),
        optimizer=make_adamw([{"params": list(model.parameters()), "lr": 1e-2}]),
        device=torch.device("cpu"),
        ema=copy.deepcopy(model).requires_grad_(False),
    )


def images(window: int) -> list[torch.Tensor]:
    drawn = torch.Generator().manual_seed(window)
    return list(torch.randn(sum(SHARES[window]), WIDTH, dtype=torch.float64, generator=drawn))


def share(window: int, rank: int) -> list[torch.Tensor]:
    start = sum(SHARES[window][:rank])
    return images(window)[start : start + SHARES[window][rank]]


def everything(step: TrainingStep) -> list[torch.Tensor]:
    assert step.ema is not None
    slots = [value for own in step.optimizer.state.values() for value in own.values()]
    return [*step.model.state_dict().values(), *step.ema.state_dict().values(), *slots]


def join(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    exchange.BUCKET_BYTES = 2048  # a big layer travels in pieces, small ones together


@contextmanager
def counted(step: TrainingStep, sent: list[int]) -> Generator[None]:
    """Note how many buckets were on their way when each backward of the last micro-batch ended."""
    inner = step._exchange  # pyright: ignore[reportPrivateUsage]
    assert inner is not None
    real = inner.last_backward

    @contextmanager
    def last_backward() -> Generator[None]:
        with real():
            yield
        sent.append(inner._sent)  # pyright: ignore[reportPrivateUsage]

    inner.last_backward = last_backward  # type: ignore[method-assign]
    yield
    del inner.last_backward


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `rank_sums` and `rank_fails` wrote: the ranks are started once for both."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(rank_runs, (str(folder),), nprocs=WORLD, start_method="spawn")
    return folder


def rank_runs(rank: int, folder: str) -> None:
    join(rank, f"{folder}/rendezvous")
    rank_sums(rank, folder)
    rank_fails(rank, folder)
    dist.destroy_process_group()


def rank_sums(rank: int, folder: str) -> None:
    step = make_step()
    step.model.get_submodule("drop").p = 0.0  # type: ignore[assignment]  # the big batch draws other numbers
    early = 0
    for window in range(len(SHARES)):
        sent: list[int] = []
        step.requests = lambda window=window: {"stop": float(rank == window), "save": 1.0}
        with counted(step, sent):
            step.gradient(share(window, rank), micro_batch=2)
        assert step.agreed == {"stop": float(window < WORLD), "save": float(WORLD)}
        inner = step._exchange  # pyright: ignore[reportPrivateUsage]
        assert inner is not None
        buckets = len(inner.buckets)
        own = share(window, rank)
        if window and own and uses_all(torch.stack(own[(len(own) - 1) // 2 * 2 :])):
            assert sent == [buckets - 1]  # all but the one with the layer that is never used
            early += 1
        torch.save([p.grad for p in step.model.parameters()], f"{folder}/{window}-{rank}")
        step.optimizer.zero_grad(set_to_none=True)
    assert early


def test_three_ranks_with_unequal_and_empty_shares_give_the_big_batch(ran: Path) -> None:
    model = Layers()
    model.drop.p = 0.0
    for window in range(len(SHARES)):
        model.zero_grad(set_to_none=True)
        # Plain PyTorch on the whole window; micro-batches as the ranks cut them, because they decide which layers are used.
        shares = [torch.stack(own) for rank in range(WORLD) if (own := share(window, rank))]
        losses = [model(part).square().sum() for own in shares for part in own.split(2)]
        (torch.stack(losses).sum() / sum(SHARES[window])).backward()
        for rank in range(WORLD):
            summed = torch.load(ran / f"{window}-{rank}", weights_only=True)
            for (name, parameter), gradient in zip(model.named_parameters(), summed, strict=True):
                assert (parameter.grad is None) == (gradient is None), (window, rank, name)
                if gradient is not None:
                    torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-15)
    assert model.never.weight.grad is None


class FailAt(TorchDispatchMode):
    """Runs out of memory at operator `number`, once."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.seen, self.failed = number, 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func.namespace != "c10d"  # what fails within a collective ends the run
        if self.seen == self.number and not self.failed and func.namespace != "c10d":
            self.failed = True
            raise torch.OutOfMemoryError(OOM)
        return func(*args, **(kwargs or {}))


def rank_fails(rank: int, folder: str) -> None:
    real = ranks.sum_numbers

    def sum_numbers(values: Sequence[float]) -> list[float]:
        with _disable_current_modes():  # some bytes of host memory
            return real(values)

    ranks.sum_numbers = sum_numbers

    step, gradient = make_step(), TrainingStep.gradient
    torch.manual_seed(7 + rank)
    Survivor(1).run(step, share(0, rank), number=0)  # afterwards buckets are sent during backward
    restore = keep(step)
    oom.free_cached = lambda _device: None  # collecting garbage takes most of the time here

    def trained(fail_at: int) -> tuple[list[torch.Tensor], int, list[str]]:
        """One window from the same state: what it makes of the step, its operators, and what rank 1 ran out of."""
        restore()
        survivor, mode = Survivor(1), FailAt(fail_at if rank == 1 else 0)

        def watched(*arguments: Any, **options: Any) -> Any:
            with mode:
                return gradient(step, *arguments, **options)

        step.gradient = watched  # type: ignore[method-assign]
        survivor.run(step, share(4, rank), number=1)
        return [tensor.clone() for tensor in everything(step)], mode.seen, [s.cause for s in survivor.survived]

    known, seen, _ = trained(0)
    operators = int(ranks.gather(seen)[1])
    for number in range(1, operators + 1, EVERY):
        found, _, causes = trained(number)
        assert causes == ["fragmented" if rank == 1 else "other rank"], number
        assert all(torch.equal(a, b) for a, b in zip(found, known, strict=True)), number
    Path(folder, f"{rank}").write_text(str(operators))


def test_memory_that_ends_anywhere_in_one_rank_voids_the_window_on_all(ran: Path) -> None:
    """The ranks themselves compare each disturbed window with the undisturbed one."""
    assert int((ran / "1").read_text()) > 100  # operators at which memory ended, one after the other
