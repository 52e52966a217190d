"""A task of the user's own: any model, loss and optimizer, predicted, planned and accumulated."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional

from trainfit.models.build import build_training_step
from trainfit.models.custom.workload import Custom, CustomTask
from trainfit.models.setting import make_setting
from trainfit.step.optimizer import with_state

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD without momentum": torch.optim.SGD,
    "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": partial(torch.optim.Adam, amsgrad=True, weight_decay=0.1),
    "Adam, fused": partial(torch.optim.Adam, fused=True),
    "AdamW": torch.optim.AdamW,
    "Adagrad": partial(torch.optim.Adagrad, initial_accumulator_value=0.1),
    "RMSprop": partial(torch.optim.RMSprop, momentum=0.9, centered=True),
    "Adadelta": torch.optim.Adadelta,
    "RAdam": torch.optim.RAdam,
}


def trajectory(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The parameters after three steps with known gradients."""
    g = torch.Generator().manual_seed(1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_made_beforehand_changes_no_step(name: str) -> None:
    """Three steps are those of an optimizer that makes its state in its first step, and no state is made in them."""
    make = OPTIMIZERS[name]

    def parameters() -> list[torch.nn.Parameter]:
        g = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,))]

    prepared = with_state(make([{"params": parameters(), "lr": 0.1}]))
    held = {(id(p), key) for p, state in prepared.state.items() for key in state}
    found = trajectory(prepared)
    assert {(id(p), key) for p, state in prepared.state.items() for key in state} == held
    assert all(map(torch.equal, found, trajectory(make(parameters(), lr=0.1))))


def squares(model: torch.nn.Module, batch: Any) -> torch.Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images), labels, ignore_index=255)


def own_task(**more: Any) -> CustomTask:
    g = torch.Generator().manual_seed(0)

    def sample(number: int) -> Any:
        labels = torch.randint(3, (6, 6), generator=g)
        labels[: number % 4] = 255
        return torch.randn(3, 6, 6, generator=g, dtype=torch.float64), labels

    items = [sample(number) for number in range(7)]
    model = torch.nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
    return CustomTask(build_model=lambda: model, make_sample=items.__getitem__, loss=squares, **more)


def test_a_mean_over_what_the_task_counts_is_exact() -> None:
    def valid(batch: Any) -> torch.Tensor:
        return (batch[1] != 255).sum()

    task = own_task(counts=valid, optimizer=partial(torch.optim.RMSprop, lr=0.1))
    workload = Custom(make_setting("x:y", micro_batch=3), (), task)
    step = build_training_step(workload, torch.device("cpu"), clip_norm=0)
    assert isinstance(step.optimizer, torch.optim.RMSprop)
    window = workload.worst_window(step.model, 7)
    losses = step.gradient(window, micro_batch=3)
    found = [p.grad.clone() for p in step.model.parameters() if p.grad is not None]
    step.model.zero_grad()
    loss = squares(step.model, torch.utils.data.default_collate(list(window)))
    loss.backward()
    assert list(losses) == ["loss"]
    assert float(losses["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    for one, p in zip(found, step.model.parameters(), strict=True):
        assert p.grad is not None
        assert float((one - p.grad).norm() / p.grad.norm()) <= 1e-12
