"""Step time: seconds counted by hand, and laws. How near it is to a real card: `benchmarks/timm_rtx3090.py report`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import Gpu, find_gpu, gpu_with_memory
from trainfit.step.precision import set_matmul_precision
from trainfit.timing import roofline
from trainfit.timing.counts import OpCount
from trainfit.timing.roofline import KINDS, Efficiency, Kind, step_seconds
from trainfit.tracing.counts import Counter

CARD = replace(
    find_gpu("RTX 3090"),
    bandwidth_bytes_per_s=1e9,
    fp32_flops_per_s=1e12,
    tf32_flops_per_s=2e12,
    fp16_flops_per_s=10e12,
    bf16_flops_per_s=None,
)
PEAK = Efficiency(gpu="RTX 3090", flops=1, memory=1, narrow_groups=3, wide_groups=100, kernel_s=1e-3, host_s=0)


def count(op: str = "aten.mm", **values: Any) -> OpCount:
    fields: dict[str, Any] = {"op": op, "phase": "forward", "dtype": "float16", "count": 0, "flops": 0, "bytes": 0}
    return OpCount(**(fields | values))


@pytest.mark.parametrize(
    ("row", "kind", "seconds"),
    [
        (count(flops=20e12, bytes=1e9), "tensor cores", 2),
        (count(flops=20e12, bytes=3e9), "memory", 3),
        (count(flops=20e12, dtype="bfloat16"), "plain arithmetic", 20),
        (count(flops=20e12, dtype="float32"), "tensor cores", 10),
        (count("aten._efficient_attention_forward", flops=20e12, dtype="float32"), "plain arithmetic", 20),
        (count("aten.convolution", flops=20e12, dtype="float32"), "tensor cores", 10),
        (count("aten.convolution.grouped1", flops=1, bytes=1e9), "memory", 3),
        (count("aten.convolution.grouped16", flops=50e12, bytes=1e9), "tensor cores", 5),
        (count("aten.convolution_backward.grouped64", flops=1e12, bytes=1e9), "memory", 100),
        (count("aten.add_", phase="optimizer", bytes=2e9), "optimizer", 2),
        (count("aten.relu", count=5000), "launches", 5),
    ],
)
def test_a_row_takes_as_long_as_what_it_waits_for(row: OpCount, kind: Kind, seconds: float) -> None:
    estimate = step_seconds([row], CARD, efficiency=PEAK)
    assert estimate.seconds == pytest.approx(seconds)
    assert estimate.parts_s == pytest.approx({**dict.fromkeys(KINDS, 0), kind: seconds})
    assert estimate.bound == kind


def test_float32_products_are_priced_as_training_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A100 has 156 TFLOP/s of TF32 and 19.5 of float32 (NVIDIA A100 datasheet); a T4 has no TF32."""
    product = count("aten.addmm", dtype="float32")
    assert roofline.matrix_rate(product, find_gpu("A100")) == (156e12, True)
    assert roofline.matrix_rate(product, find_gpu("T4")) == (pytest.approx(8.1e12, rel=0.01), False)
    monkeypatch.setattr(roofline, "TF32_MATMULS", False)
    assert roofline.matrix_rate(product, find_gpu("A100")) == (19.5e12, False)


def test_one_place_sets_the_precision_of_float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    set_matmul_precision(torch.device("cpu"))
    assert asked == []
    set_matmul_precision(torch.device("cuda"))
    assert (asked == ["high"]) == roofline.TF32_MATMULS
    source = Path(roofline.__file__).parents[1]
    assert [path.name for path in source.rglob("*.py") if "torch.set_float32" in path.read_text()] == [
        "names.py",
        "precision.py",
    ]


def test_rows_add_up_and_python_starts_kernels_meanwhile() -> None:
    rows = [count(flops=20e12, count=1000), count("aten.relu", bytes=1e9, count=1000)]
    assert step_seconds(rows, CARD, efficiency=PEAK).seconds == pytest.approx(2 + 1 + 2 * 1)
    hidden = step_seconds(rows, CARD, efficiency=replace(PEAK, host_s=2e-3))
    assert hidden.seconds == pytest.approx(5)
    waited = step_seconds(rows, CARD, efficiency=replace(PEAK, host_s=4e-3))
    assert waited.seconds == pytest.approx(8)
    assert waited.parts_s["launches"] == pytest.approx(5)


def test_only_the_card_that_was_measured_is_calibrated() -> None:
    rows = [count(flops=1e12)]
    assert step_seconds(rows, find_gpu("RTX 3090")).calibrated
    assert not step_seconds(rows, find_gpu("RTX 4090")).calibrated


def test_a_card_without_rates_is_refused() -> None:
    with pytest.raises(TrainfitError, match=r"8 GiB card.*--gpu"):
        step_seconds([], gpu_with_memory("8GiB"))


rows = st.lists(
    st.builds(
        OpCount,
        op=st.sampled_from(["aten.mm", "aten.relu", "aten.convolution.grouped1", "aten.convolution.grouped64"]),
        phase=st.sampled_from(["forward", "backward", "optimizer"]),
        dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
        count=st.integers(0, 1000),
        flops=st.floats(0, 1e15),
        bytes=st.floats(0, 1e12),
    ),
    min_size=1,
    max_size=5,
)
cards = st.sampled_from(["RTX 3090", "H200", "T4", "GTX 1650"]).map(find_gpu)


def doubled(gpu: Gpu) -> Gpu:
    rates = [name for name in vars(gpu) if name.endswith("_per_s")]
    return replace(gpu, **{name: 2 * (getattr(gpu, name) or 0) or None for name in rates})


@given(rows, cards, st.sampled_from(["flops", "bytes", "count"]))
def test_more_work_is_never_faster(ops: list[OpCount], gpu: Gpu, what: str) -> None:
    more = replace(ops[0], **{what: 2 * getattr(ops[0], what) + 1})
    before, after = step_seconds(ops, gpu).seconds, step_seconds([more, *ops[1:]], gpu).seconds
    assert after >= before * (1 - 1e-12)


@given(rows, cards)
def test_twice_the_rates_take_half_the_time_but_for_launches(ops: list[OpCount], gpu: Gpu) -> None:
    one, two = step_seconds(ops, gpu), step_seconds(ops, doubled(gpu))
    for kind in get_args(Kind):
        if kind != "launches":
            assert two.parts_s[kind] == pytest.approx(one.parts_s[kind] / 2)
    assert one.seconds >= two.seconds * (1 - 1e-12)
    assert one.seconds == pytest.approx(sum(one.parts_s.values()))


aten = torch.ops.aten


@pytest.mark.parametrize(
    ("groups", "transposed", "forward_flops"),
    # 2 x images x pixels of the output (of the input, if transposed) x weights, 2 images of 16 channels, 3 x 3 kernels
    [
        (1, False, 2 * 2 * 36 * 16 * 16 * 9),
        (4, False, 2 * 2 * 36 * 16 * 4 * 9),
        (16, False, 2 * 2 * 36 * 16 * 9),
        (4, True, 2 * 2 * 64 * 16 * 4 * 9),
    ],
)
def test_backward_of_a_convolution_is_twice_its_forward(groups: int, transposed: bool, forward_flops: int) -> None:
    images, weight = torch.ones(2, 16, 8, 8), torch.ones(16, 16 // groups, 3, 3)
    tail = ([1, 1], [0, 0], [1, 1], transposed, [0, 0], groups)
    counter = Counter()
    out = aten.convolution(images, weight, None, *tail)
    counter.add(aten.convolution.default, (images, weight, None, *tail), {}, out, [images, weight], [out], "forward")
    for wanted in ([True, True, False], [False, True, False]):
        args = (out, images, weight, None, *tail, wanted)
        gradients = aten.convolution_backward(*args)
        made = [gradient for gradient in gradients if gradient is not None]
        counter.add(aten.convolution_backward.default, args, {}, gradients, [out, images, weight], made, "backward")
    found = {(row.phase, row.flops) for row in counter.counts()}
    assert sum(flops for _, flops in found) == forward_flops * (1 + 2 + 1)
    assert ("forward", forward_flops) in found
    width = f".grouped{16 // groups}" if groups > 1 else ""
    assert {row.op for row in counter.counts()} == {f"aten.convolution{width}", f"aten.convolution_backward{width}"}
