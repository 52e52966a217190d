"""Saved activations in host memory: the same gradient, each tensor copied once, and a trace that shows it."""

from typing import Any

import pytest
import torch
from torch import nn

from test_mask_head_memory import window_gradient
from test_segmentation import build, move_heads
from trainfit.gpus.catalogue import gpu_with_memory
from trainfit.memory.predict import trace_requests
from trainfit.memory.priced import Pricer
from trainfit.memory.profile import last_window
from trainfit.models.setting import make_setting
from trainfit.step.checkpointing import checkpoint_first
from trainfit.step.offload import _Host, _View, offloaded  # pyright: ignore[reportPrivateUsage]
from trainfit.step.terms import LossTerm, Objective
from trainfit.step.window import accumulate
from trainfit.timing.counts import FROM_HOST, TO_HOST
from trainfit.tracing.trace_cache import get_trace

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Drops(nn.Module):
    """Dropout, an in-place operator, a transposed and an expanded tensor, and one that two layers save."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.first(x), 0.3).relu_()
        both = self.second(x) * self.third(x).T.contiguous().T
        return (both * both[:1].expand(len(both), -1)).square()


def dropped_loss(model: nn.Module, micro_batch: Any, _canvas: Any) -> dict[str, LossTerm]:
    return {"loss": LossTerm(total=model(torch.stack(list(micro_batch))).sum(), kind="images")}


def gradients(model: nn.Module, objective: Any) -> list[torch.Tensor]:
    window = list(torch.randn((32, 64), generator=torch.Generator().manual_seed(1)))
    model.zero_grad()
    torch.manual_seed(2)
    accumulate(model, objective, [window[:16], window[16:]], device=CPU)
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_gradient_is_bit_equal_with_dropout(recomputed: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Drops(), Drops())
    objective = Objective(terms=dropped_loss, counts=lambda window: {"loss": len(window)}, canvas=lambda _: (0, 0))
    before = gradients(model, objective)
    if recomputed:
        checkpoint_first(list(model), "all")
    after = gradients(model, offloaded(objective))
    assert len(before) == 12
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in before)


def test_the_gradient_of_a_segmenter_is_bit_equal() -> None:
    workload, model = build("single")
    blocks = workload.blocks(move_heads(model))
    before = window_gradient(workload, model)
    checkpoint_first(blocks, "offload")
    objective: Any = offloaded(workload.objective)
    workload.objective = objective
    assert torch.equal(window_gradient(workload, model), before)


def test_each_tensor_is_copied_once_and_parameters_never() -> None:
    layer = nn.Linear(64, 64)
    host = _Host(device=CPU, stays={p.untyped_storage()._cdata for p in layer.parameters()})  # pyright: ignore[reportPrivateUsage]
    assert host.pack(layer.weight.detach().T) is not None
    assert isinstance(host.pack(layer.weight.detach().T), torch.Tensor)
    assert isinstance(host.pack(torch.ones(3)), torch.Tensor)
    x = torch.randn(64, 64)
    views = [host.pack(view) for view in (x, x.T, x[3:5], x[:1].expand(9, -1))]
    assert all(isinstance(view, _View) for view in views)
    assert len({id(view.stored) for view in views if isinstance(view, _View)}) == 1
    expected = [each.clone() for each in (x, x.T, x[3:5], x[:1].expand(9, -1))]
    x.add_(1)
    again = host.pack(x)
    assert isinstance(again, _View)
    assert isinstance(views[0], _View)
    assert again.stored is not views[0].stored  # it was written to in between
    for view, each in zip(views, expected, strict=True):
        assert torch.equal(host.unpack(view), each)
    assert torch.equal(host.unpack(again), x)
    assert host.unpack(views[1]).stride() == x.T.stride()


def test_a_trace_shows_that_memory_is_free_and_what_the_copies_take() -> None:
    gpu = gpu_with_memory("4GiB")
    settings = [
        make_setting("timm:resnet10t", resolution=64, micro_batch=8, checkpointing=each, precision="bf16")
        for each in ("none", "offload")
    ]
    kept: list[int] = []
    traces = [get_trace(trace_requests(setting, gpu)[0], cache=False) for setting in settings]
    for stored in traces:
        alive = most = 0
        for is_allocation, tensor in list(stored.trace)[last_window(stored.trace) :]:
            if tensor.category == "activations":
                alive += tensor.nbytes if is_allocation else -tensor.nbytes
                most = max(most, alive)
        kept.append(most)
    assert kept[1] < 0.5 * kept[0]
    there = sum(row.bytes for row in traces[1].ops if row.op.endswith(TO_HOST))
    back = sum(row.bytes for row in traces[1].ops if row.op.endswith(FROM_HOST))
    assert 0 < there <= back <= 2 * there
    assert {row.phase for row in traces[1].ops if row.op.endswith(FROM_HOST)} == {"backward"}


def test_host_memory_is_priced_from_the_trace() -> None:
    pricer = Pricer(gpu=gpu_with_memory("4GiB"))
    assert pricer.offloaded_bytes(make_setting("rfdetr-nano")) == 0
