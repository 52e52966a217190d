"""Two ranks, one of which runs out of memory between collectives: neither waits for ever, and both go on alike.

Imports little, because each rank is a process that imports it again.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainfit.step.contrastive import Contrastive
from trainfit.step.optimizer import make_adamw
from trainfit.step.training_step import TrainingStep
from trainfit.training.oom import Survivor

OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free. "
    "Of the allocated memory 4.00 GiB is allocated by PyTorch, and 2.50 GiB is reserved by PyTorch but unallocated."
)
"""Fragmented: the same cut is tried once more, so that the undisturbed run is the same bit for bit."""
PLACES = ("cached", "last", "rows", "replay", "sum", "sum in backward", "none")


class Towers(torch.nn.Module):
    """Two linear towers with dropout, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.other = (torch.nn.Linear(5, 4, dtype=torch.float64) for _ in range(2))
        self.drop = torch.nn.Dropout(0.3)
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))


class Fails:
    """Runs out of memory once, at one place."""

    def __init__(self, place: str) -> None:
        self.place, self.left, self.rows_done, self.window = place, int(place != "none"), False, 0

    def at(self, place: str) -> None:
        if self.left and place == self.place:
            self.left = 0
            raise torch.OutOfMemoryError(OOM)


def make_step(fails: Fails) -> TrainingStep:
    def features(model: Any, pairs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        fails.at("cached" if not torch.is_grad_enabled() else "replay" if fails.rows_done else "last")
        stacked = model.drop(torch.stack(list(pairs)))
        return model.one(stacked), model.other(stacked)

    def rows_loss(model: Any, one: torch.Tensor, other: torch.Tensor, rows: slice) -> torch.Tensor:
        fails.at("rows")
        fails.rows_done = True
        labels = torch.arange(rows.start, rows.stop)
        return torch.nn.functional.cross_entropy(model.scale * one[rows] @ other.T, labels, reduction="sum") / len(one)

    model = Towers()
    return TrainingStep(
        model=model,
        objective=Contrastive(features=features, rows_loss=rows_loss),
        optimizer=make_adamw([{"params": list(model.parameters()), "lr": 1e-2}]),
        device=torch.device("cpu"),
        ema=copy.deepcopy(model).requires_grad_(False),
    )


def everything(step: TrainingStep) -> list[torch.Tensor]:
    assert step.ema is not None
    slots = [value for own in step.optimizer.state.values() for value in own.values()]
    return [*step.model.state_dict().values(), *step.ema.state_dict().values(), *slots]


def rank_trains(rank: int, rendezvous: str, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    window = list(torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[rank::2]
    empty = torch.empty
    for place in PLACES:
        fails = Fails(place if rank == 1 else "none")

        def tight_empty(*size: Any, fails: Fails = fails, **options: Any) -> torch.Tensor:
            if options.get("dtype") == torch.float64:  # a bucket: within backward from the second window on
                fails.at("sum in backward" if fails.window else "sum")
            return empty(*size, **options)

        step, survivor = make_step(fails), Survivor(1)
        torch.empty = tight_empty  # type: ignore[assignment]
        torch.manual_seed(7 + rank)
        for number in range(2):
            fails.rows_done, fails.window = False, number
            survivor.run(step, window, number=number)
        torch.empty = empty
        assert not fails.left, place  # it did fail
        told = [(s.where, s.cause) for s in survivor.survived]
        here = "fragmented" if rank == 1 else "other rank"
        assert told == ([] if place == "none" else [("window", here)]), (place, told)
        torch.save(everything(step), f"{result}-{place}-{rank}")
    dist.destroy_process_group()


def test_one_of_two_ranks_runs_out_between_collectives(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "rendezvous"), str(tmp_path / "m"))
    mp.start_processes(rank_trains, arguments, nprocs=2, start_method="spawn")
    known = torch.load(tmp_path / "m-none-0", weights_only=True)
    assert not torch.equal(known[0], Towers().state_dict()["scale"])
    for place in PLACES:
        for rank in range(2):
            found = torch.load(tmp_path / f"m-{place}-{rank}", weights_only=True)
            assert all(torch.equal(a, b) for a, b in zip(found, known, strict=True)), (place, rank)
