"""The update happens as a whole or not at all: errors at its operators, for every optimizer, with fp16's loss scaler."""

import gc
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import pytest
import torch

from test_oom import FailAt, make_step
from trainfit.errors import HalfUpdated
from trainfit.step import units
from trainfit.step.names import Optimizer
from trainfit.step.optimizer import make_optimizer
from trainfit.step.terms import LossTerm, Objective
from trainfit.step.training_step import TrainingStep
from trainfit.training.oom import Survivor

OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
OVERFLOWS = 1e30
"""A sample of this value has an infinite loss."""


class TwoTypes(torch.nn.Module):
    """Parameters of two dtypes, one of them large enough for 8-bit state (4096 values)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(48, 96, dtype=torch.float64)
        self.drop = torch.nn.Dropout(0.3)
        self.second = torch.nn.Linear(96, 2)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return self.second(self.drop(torch.tanh(self.first(samples))).float())


def terms(model: torch.nn.Module, samples: Sequence[Any], _canvas: tuple[int, int]) -> Mapping[str, LossTerm]:
    inputs = torch.stack(list(samples))
    factor = torch.where(inputs.amax() == OVERFLOWS, float("inf"), 1.0)
    return {"loss": LossTerm(total=model(inputs).square().sum() * factor, kind="images")}


def two_types_step(optimizer: Optimizer, *, scaler: bool = True) -> TrainingStep:
    model = TwoTypes()
    objective = Objective(terms=terms, counts=lambda window: {"loss": float(len(window))}, canvas=lambda _: (1, 1))
    groups = [
        {"params": list(model.first.parameters()), "lr": 1e-2},
        {"params": list(model.second.parameters()), "lr": 1e-3, "weight_decay": 0.1},
    ]
    return make_step(model, objective, groups, optimizer=optimizer, scaler=scaler)


def windows(*, overflow: bool) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    drawn = [[torch.randn(48, dtype=torch.float64, generator=generator) for _ in range(3)] for _ in range(3)]
    if overflow:
        drawn[0][1].fill_(OVERFLOWS)
    return drawn


def state(step: TrainingStep) -> dict[str, Any]:
    """All that a later window depends on, as bytes or numbers."""
    assert step.ema is not None
    values: dict[str, Any] = {**step.model.state_dict(), **{f"ema.{k}": v for k, v in step.ema.state_dict().items()}}
    for number, slots in enumerate(step.optimizer.state[p] for p in step.parameters):
        values |= {f"{number}.{name}": value for name, value in slots.items()}
    values |= step.scaler.state_dict() | {"skipped": step.skipped_windows}
    return {k: v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def train(step: TrainingStep, *numbers: int, overflow: bool = False) -> tuple[dict[str, Any], Survivor, int]:
    """Train on three windows with errors at these operators of the first two; the state, the survivor, the operators."""
    survivor, mode = Survivor(2), FailAt(*numbers)
    first, second, third = windows(overflow=overflow)
    torch.manual_seed(5)
    with mode:
        survivor.run(step, first, number=0)
        survivor.run(step, second, number=1)
    assert mode.failed == len(numbers)
    survivor.run(step, third, number=2)
    return state(step), survivor, mode.seen


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 100)


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_error_at_any_operator_of_a_scaled_step_changes_no_bit(optimizer: Optimizer, overflow: bool) -> None:
    """Every fourth operator here, each by benchmarks/oom_injection.py --every."""
    undisturbed, _, operators = train(two_types_step(optimizer), overflow=overflow)
    assert undisturbed["skipped"] == 0
    gc.freeze()  # bitsandbytes imports much, and each survival collects garbage
    for number in range(1 + 2 * overflow, operators + 1, 4):
        ours, survivor, _ = train(two_types_step(optimizer), number, overflow=overflow)
        assert ours == undisturbed, number
        assert [event.next_micro_batch for event in survivor.survived] == [2], number


def test_the_overflow_is_one() -> None:
    """The case above is what it says: the first window is skipped, halves the scale, and moves no parameter."""
    step = two_types_step("sgd")
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step.run(windows(overflow=True)[0], micro_batch=2, step=0)
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
    assert step.scaler.get_scale() == 2.0**9
    assert step.skipped_windows == 1
    step.run(windows(overflow=True)[1], micro_batch=2, step=1)
    assert step.skipped_windows == 0


@pytest.mark.parametrize("optimizer", ["adamw-foreach", "sgd", "adamw-8bit", "adagrad", "rmsprop"])
def test_units_step_as_torch_does(optimizer: Optimizer) -> None:
    """The oracle is the optimizer's own step on everything at once, with state that it makes itself."""
    ours = two_types_step(optimizer, scaler=False)
    theirs = two_types_step(optimizer, scaler=False)
    if optimizer == "sgd":
        theirs.optimizer = torch.optim.SGD(theirs.optimizer.param_groups, momentum=0.9, foreach=True)
    theirs.optimizer.state.clear()
    if optimizer == "adagrad":  # the one that makes its state with itself
        theirs.optimizer = torch.optim.Adagrad(theirs.optimizer.param_groups, foreach=True)
    for number, window in enumerate(windows(overflow=False)):
        torch.manual_seed(number)
        ours.run(window, micro_batch=3, step=number)
        torch.manual_seed(number)
        theirs.gradient(window, micro_batch=3)
        torch.nn.utils.clip_grad_norm_(theirs.parameters, theirs.clip_norm)
        theirs.optimizer.step()
        theirs.optimizer.zero_grad()
    for a, b in zip(ours.parameters, theirs.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if optimizer == "sgd" else 0, atol=0)  # fused SGD rounds once less


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_first_step_allocates_no_state(optimizer: Optimizer) -> None:
    step = two_types_step(optimizer)
    before = {id(value) for own in step.optimizer.state.values() for value in own.values() if torch.is_tensor(value)}
    step.run(windows(overflow=False)[0], micro_batch=3, step=0)
    after = {id(value) for own in step.optimizer.state.values() for value in own.values() if torch.is_tensor(value)}
    assert before == after
    assert before or optimizer == "sgd-plain"  # which has none


def test_a_unit_is_bounded_and_of_one_kind() -> None:
    parameters = [torch.zeros(n, dtype=dtype) for n in (10, 20, 5, 300) for dtype in (torch.float32, torch.float64)]
    optimizer = torch.optim.SGD([{"params": parameters[:6]}, {"params": parameters[6:]}], foreach=True)
    parts = [[tensor.nbytes for tensor in unit.parameters] for unit in units.units_of(optimizer)]
    assert parts == [[40], [80, 20], [80], [160], [40], [1200], [2400]]
    fused = torch.optim.SGD([{"params": parameters[:6]}, {"params": parameters[6:]}], fused=True)
    assert [len(unit.parameters) for unit in units.units_of(fused)] == [3, 3, 1, 1]


def test_a_step_that_cannot_be_undone_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    step = two_types_step("adamw-foreach")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "_foreach_sqrt", full)
    monkeypatch.setattr(torch, "_foreach_copy_", full)
    with pytest.raises(HalfUpdated, match="a failed optimizer step could not be undone: full"):
        Survivor(2).run(step, windows(overflow=False)[0], number=0)


def test_a_failing_update_stops_after_three_tries_between_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done is done, what failed is undone; the message names the step."""
    step = two_types_step("adamw-foreach")
    before = state(step)
    calls: list[int] = []

    def fails_from_the_second(tensors: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("full")
        return [tensor.sqrt() for tensor in tensors]

    monkeypatch.setattr(torch, "_foreach_sqrt", fails_from_the_second)
    with pytest.raises(HalfUpdated, match=r"no memory for the optimizer's update at step 8 \(full\)"):
        Survivor(2).run(step, windows(overflow=False)[0], number=7)
    after = state(step)
    assert len(calls) == 4
    assert {key for key in after if before[key] != after[key]} == {
        "first.weight",
        "0.step",
        "0.exp_avg",
        "0.exp_avg_sq",
    }


@pytest.mark.parametrize(
    ("optimizer", "theirs"),
    [
        ("sgd-plain", torch.optim.SGD),
        ("adam", torch.optim.Adam),
        ("adagrad", torch.optim.Adagrad),
        ("rmsprop", torch.optim.RMSprop),
    ],
)
def test_further_optimizers_are_torchs_at_its_defaults(
    optimizer: Optimizer, theirs: type[torch.optim.Optimizer]
) -> None:
    """Against torch's class with only a rate given: equal parameters after three steps, and state of the same bytes."""
    ours, other = (torch.nn.Linear(5, 3, dtype=torch.float64) for _ in range(2))
    other.load_state_dict(ours.state_dict())
    steppers = (make_optimizer(optimizer, [{"params": list(ours.parameters()), "lr": 0.01}]),)
    steppers += (theirs(other.parameters(), lr=0.01),)  # pyright: ignore[reportCallIssue]
    for number in range(3):
        torch.manual_seed(number)
        images = torch.randn(4, 5, dtype=torch.float64)
        for model, stepper in zip((ours, other), steppers, strict=True):
            stepper.zero_grad()
            model(images).pow(2).sum().backward()
            stepper.step()
    for a, b in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    held = [
        sorted(v.numel() for own in s.state.values() for v in own.values() if torch.is_tensor(v) and v.dim())
        for s in steppers
    ]
    assert held[0] == held[1]
