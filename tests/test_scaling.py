"""Traces made for one micro-batch from those at two others, against traces at that micro-batch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trace_cases
from trainfit.memory.allocator import replay
from trainfit.memory.scaling import ScaledTrace, scale
from trainfit.models.setting import make_setting
from trainfit.tracing.events import TensorInfo, Trace
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step
from trainfit.tracing.trace_cache import TraceRequest, get_trace, get_traces

WIDTH = trace_cases.WIDTH


def batched(model: nn.Module, device: torch.device, images: int) -> Tensor:
    return model(torch.ones(images, WIDTH, device=device)).sum()


def keeping(model: nn.Module, device: torch.device, images: int) -> Tensor:
    """Image by image; every image's activations stay for backward."""
    out = model(torch.ones(images, WIDTH, device=device))
    return torch.stack([(row.repeat(8)[:, None] * row.repeat(8)).relu().sum() for row in out]).sum()


def passing(model: nn.Module, device: torch.device, images: int) -> Tensor:
    """Image by image; what an image needs is gone before the next one."""
    out = model(torch.ones(images, WIDTH, device=device))
    with torch.no_grad():
        best = [torch.cdist(torch.ones(90000, WIDTH, device=device), row[None]).argmax(0) for row in out]
    return out.sum() + torch.cat(best).sum()


LOSSES = {"batched": batched, "keeping": keeping, "passing": passing}
SEEN = (1, 2, 3, 4, 7, 16)


def main() -> None:
    """Trace every loss at every micro-batch."""

    def trace(name: str, images: int) -> StoredTrace:
        def build(device: torch.device) -> trace_cases.Step:
            return trace_cases.Step(device, trace_cases.Blocks, lambda m, d: LOSSES[name](m, d, images))

        return trace_step(build, target=trace_cases.TARGET)

    json.dump({name: {str(b): trace(name, b).to_json() for b in SEEN} for name in LOSSES}, sys.stdout)


@pytest.fixture(scope="module")
def traced() -> dict[str, dict[int, StoredTrace]]:
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return {name: {int(b): stored(text) for b, text in traces.items()} for name, traces in found.items()}


def stored(text: str) -> StoredTrace:
    result = StoredTrace.from_json(text)
    return StoredTrace(trace=result.trace, ops=result.ops)


def peaks(trace: Trace) -> tuple[int, int]:
    found = replay(trace, capacity_bytes=None)
    return found.peak_allocated_bytes, found.peak_reserved_bytes


@pytest.mark.parametrize("name", LOSSES)
def test_peaks_of_scaled_traces(name: str, traced: dict[str, dict[int, StoredTrace]]) -> None:
    real = traced[name]
    scaled = scale(real[2], real[4], (2, 4))
    assert scaled is not None
    for images in SEEN[1:]:
        true, found = peaks(real[images].trace), peaks(scaled.at(images).trace())
        kept = 2**20 if name == "keeping" else 0  # of one image: which image a tensor belongs to is not known
        assert found[0] == pytest.approx(true[0], rel=0.002, abs=kept + 8 * 512)
        if not kept:  # those tensors lie at the border between the allocator's two pools
            assert found[1] == pytest.approx(true[1], rel=0.01)
    for images in (2, 4):
        assert peaks(scaled.at(images).trace()) == peaks(real[images].trace)


def test_every_size_of_a_batched_step_is_exact(traced: dict[str, dict[int, StoredTrace]]) -> None:
    real = traced["batched"]
    scaled = scale(real[2], real[4], (2, 4))
    assert scaled is not None
    for images in SEEN:
        made = scaled.at(images).trace()
        assert made.events == real[images].trace.events
        assert [t.nbytes for t in made.tensors] == [t.nbytes for t in real[images].trace.tensors]
    assert ScaledTrace.from_json(scaled.to_json()).to_record() == scaled.to_record()


def test_evaluation_takes_its_own_micro_batch() -> None:
    def trace(images: int) -> Trace:
        sizes = (100, 512 * images, 1024 * images)  # a parameter, a training activation, one of evaluation
        tensors = tuple(TensorInfo(id=i, nbytes=n, op=f"op{i}") for i, n in enumerate(sizes))
        marks = ((1, "window 0"), (3, "window 1"))
        return Trace(tensors=tensors, events=(1, 2, -2, 3, -3), marks=marks)

    small, large = (StoredTrace(trace=trace(b), ops=()) for b in (2, 4))
    scaled = scale(small, large, (2, 4))
    assert scaled is not None
    made = scaled.at(3, eval_micro_batch=32, evaluated_from=3)
    assert made.nbytes.tolist() == [100, 512 * 3, 1024 * 32]


def test_a_step_that_does_other_things_at_a_larger_micro_batch_is_not_scaled(
    traced: dict[str, dict[int, StoredTrace]],
) -> None:
    assert scale(traced["passing"][2], traced["batched"][4], (2, 4)) is None


def test_rf_detr_at_a_micro_batch_that_was_not_traced() -> None:
    knobs: dict[str, Any] = {"resolution": 64, "groups": 1, "num_queries": 20, "multi_scale": False}
    requests = {
        b: TraceRequest(
            setting=make_setting(model="rfdetr-nano", micro_batch=b, precision="bf16", **knobs),
            part="training",
            capability=(8, 0),
        )
        for b in (2, 4, 7)
    }
    small, large = get_traces([requests[2], requests[4]])
    scaled = scale(small, large, (2, 4))
    assert scaled is not None
    true, found = peaks(get_trace(requests[7]).trace), peaks(scaled.at(7).trace())
    assert found[0] == pytest.approx(true[0], rel=0.002)
    assert found[1] == pytest.approx(true[1], rel=0.01)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
