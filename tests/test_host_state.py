"""AdamW's moments in host memory: the device's values bit for bit, resumed both ways, and priced as traced."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from trainfit.gpus.catalogue import find_gpu
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.columns import ColumnTrace
from trainfit.memory.host_state import moments_bytes, with_state_on_host
from trainfit.memory.predict import assess, trace_requests
from trainfit.memory.priced import Pricer
from trainfit.models.setting import make_setting
from trainfit.step import units
from trainfit.step.host_adamw import HostAdamW
from trainfit.step.optimizer import make_optimizer
from trainfit.step.units import step_unit, units_of
from trainfit.timing.counts import FROM_HOST, TO_HOST
from trainfit.tracing.trace_cache import get_traces

GPU = find_gpu("RTX 3060")
SMALL = make_setting(model="timm:resnet10t", resolution=32, precision="fp32", ema=False, micro_batch=2)
ON_HOST = replace(SMALL, optimizer="adamw-host")


def parameters() -> list[torch.nn.Parameter]:
    """Of two dtypes, one not contiguous, one larger than a part, one that gets no gradient."""
    generator = torch.Generator().manual_seed(1)
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((40,), torch.float32), ((3, 5), torch.float64), ((2, 3, 4, 4), torch.float32), ((), torch.float32),
        ((6, 7), torch.float32), ((9,), torch.float64),
    ]  # fmt: skip
    made = [torch.randn(shape, dtype=dtype, generator=generator) for shape, dtype in shapes]
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    return [torch.nn.Parameter(each) for each in made]


def optimizer_of(kind: Any) -> torch.optim.Optimizer:
    own = parameters()
    return make_optimizer(kind, [{"params": own[:3], "lr": 1e-2}, {"params": own[3:], "lr": 1e-3, "weight_decay": 0.1}])


def train(optimizer: torch.optim.Optimizer, steps: int, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    own = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for number, parameter in enumerate(own):
            gradient = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
            parameter.grad = None if number == 4 else torch.empty_like(parameter).copy_(gradient)
        for unit in units_of(optimizer):
            step_unit(optimizer, unit)


def values(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    own = [p for group in optimizer.param_groups for p in group["params"]]
    state = [optimizer.state[p][name] for p in own for name in ("step", "exp_avg", "exp_avg_sq")]
    return [value.detach().clone() for value in (*own, *state)]


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 200)


def test_values_are_those_of_fused_adamw_bit_for_bit() -> None:
    ours, theirs = optimizer_of("adamw-host"), optimizer_of("adamw-fused")
    assert len(units_of(ours)) > len(units_of(theirs)) == 4
    for each in (ours, theirs):
        train(each, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(values(ours), values(theirs), strict=True))
    assert any(bool(each.any()) for each in values(ours)[-2:])


def test_a_step_on_all_parameters_at_once_is_the_same() -> None:
    ours, theirs = optimizer_of("adamw-host"), optimizer_of("adamw-fused")
    for each in (ours, theirs):
        train(each, 1, seed=2)
        each.step()
    assert all(torch.equal(a, b) for a, b in zip(values(ours), values(theirs), strict=True))


@pytest.mark.parametrize("kinds", [("adamw-fused", "adamw-host"), ("adamw-host", "adamw-fused"), ("adamw-host",) * 2])
def test_a_run_goes_on_with_the_other(kinds: tuple[str, str]) -> None:
    """State that one saved is what the other goes on with; the moments stay where they are."""
    before, after, whole = optimizer_of(kinds[0]), optimizer_of(kinds[1]), optimizer_of("adamw-fused")
    train(before, 2, seed=3)
    own = [p for group in after.param_groups for p in group["params"]]
    places = [after.state[p]["exp_avg"].data_ptr() for p in own]
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for old, new in zip(before.param_groups, after.param_groups, strict=True):
        for source, target in zip(old["params"], new["params"], strict=True):
            target.data.copy_(source.data)
    train(after, 1, seed=4)
    train(whole, 2, seed=3)
    train(whole, 1, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(values(after), values(whole), strict=True))
    if isinstance(after, HostAdamW):
        assert places == [after.state[p]["exp_avg"].data_ptr() for p in own]


def test_the_price_is_that_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace with the moments on the GPU, moved to the host, against the trace of the setting itself."""
    monkeypatch.undo()
    here, there = get_traces([trace_requests(each, GPU)[0] for each in (SMALL, ON_HOST)])
    columns = ColumnTrace.of(here)
    moved = replace(columns, columns=with_state_on_host(columns.columns))
    ours, theirs = (assess(each, GPU, AllocatorConfig()) for each in (moved, there))
    assert ours.profile.peak_allocated_bytes == pytest.approx(theirs.profile.peak_allocated_bytes, rel=0.002)
    assert ours.needs.high_bytes == pytest.approx(theirs.needs.high_bytes, rel=0.01)
    assert ours.profile.peak.phase in ("optimizer", "update")  # so its buffers are in the figure
    moments = moments_bytes(columns.columns)
    parameters = sum(t.nbytes for t in here.trace.tensors if t.category == "parameters")
    assert moments == pytest.approx(2 * parameters, rel=0.002)
    for end in (TO_HOST, FROM_HOST):
        copied = [row.bytes for row in there.ops if row.op.endswith(end) and row.phase in ("optimizer", "update")]
        assert sum(copied) == pytest.approx(moments, rel=0.002)


def test_the_optimizer_of_a_users_own_model_is_traced_as_it_is() -> None:
    for setting, traced in (
        (ON_HOST, "adamw-fused"),
        (make_setting("mine:task", optimizer="adamw-host"), "adamw-host"),
    ):
        assert Pricer(gpu=GPU).request(setting, "training").setting.optimizer == traced
