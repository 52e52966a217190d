"""Traces taken to images of other sizes by laws, against traces made there, and against what was recorded of RF-DETR."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from rfdetr.datasets.coco import compute_multi_scale_scales
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trace_cases
from test_drawn_sizes import TRACED
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory import shipped
from trainfit.memory.errors import RESIZED_ERROR
from trainfit.memory.image_laws import counts_of, find_image_laws, of_one, spread
from trainfit.memory.laws import Laws, Variable, declared_sizes, kind_of, moved
from trainfit.memory.packaged import packaged
from trainfit.memory.predict import needed
from trainfit.memory.priced import RESIZED, Pricer
from trainfit.memory.scaling import ScaledTrace, scale
from trainfit.models.rfdetr.family import PUBLISHED, RfDetrSetting
from trainfit.models.rfdetr.lean_losses import PIECE
from trainfit.models.rfdetr.traced_sizes import LOGITS_AT_ONCE, legal
from trainfit.models.rfdetr.workload import CONFIGS, WITH_MASKS, legal_resolution
from trainfit.models.setting import make_setting
from trainfit.timing.counts import OpCount
from trainfit.tracing.events import Trace
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step

PATCH, WIDTH = 4, 32
BASE, OTHER = 10, 8
SIDES = (BASE, OTHER, 5, 14)
"""Of an image, in cells."""
MICRO_BATCHES = (1, 2, 4)


class Encoder(nn.Module):
    """A patch convolution, class token and position embeddings, and two blocks of attention, recomputed or not."""

    def __init__(self, *, again: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.ModuleList(trace_cases.Blocks(1, WIDTH) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.again = again

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        for block, qkv in zip(self.blocks, self.qkv, strict=True):
            x = checkpoint(layer, x, block, qkv, use_reentrant=False) if self.again else layer(x, block, qkv)
        return x


def layer(x: Tensor, block: nn.Module, qkv: nn.Module) -> Tensor:
    query, key, value = qkv(x).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
    attended = nn.functional.scaled_dot_product_attention(query, key, value)
    return x + block(attended.transpose(1, 2).flatten(2))


def loss(model: nn.Module, device: torch.device, side: int, images: int) -> Tensor:
    pixels = torch.ones(images, 3, PATCH * side, PATCH * side, device=device)
    return model(pixels).square().sum()


def trace(side: int, images: int, *, again: bool = False) -> StoredTrace:
    def build(device: torch.device) -> trace_cases.Step:
        return trace_cases.Step(
            device, lambda: Encoder(again=again), lambda m, d: loss(m, d, side, images), autocast=torch.bfloat16
        )

    return trace_step(build, target=trace_cases.TARGET)


def main() -> None:
    """Trace everything that the tests compare."""
    found = {f"{side} {images}": trace(side, images) for side in SIDES for images in MICRO_BATCHES}
    found |= {f"again {side} 4": trace(side, 4, again=True) for side in SIDES}
    json.dump({name: each.to_json() for name, each in found.items()}, sys.stdout)


def numbers(side: int) -> Mapping[str, int]:
    tokens = side**2 + 1
    return {"training tokens": tokens, "training cells": side**2, "training token pairs": tokens**2}


VARIABLES = [
    Variable(knob=name, base=base, other=numbers(OTHER)[name], least=1, most=10**6, declared=True)
    for name, base in numbers(BASE).items()
]


@pytest.fixture(scope="module")
def traced() -> dict[str, StoredTrace]:
    return trace_cases.traces_of(__file__)


@pytest.fixture(scope="module")
def laws(traced: dict[str, StoredTrace]) -> Laws:
    found = find_image_laws(traced[f"{BASE} 4"], traced[f"{OTHER} 4"], VARIABLES, {}, "training")
    assert found is not None
    return found


def sizes(trace: Trace) -> list[int]:
    return [tensor.nbytes for tensor in trace.tensors]


def work(rows: Sequence[OpCount]) -> tuple[float, float]:
    """FLOPs and bytes."""
    return sum(row.flops for row in rows), sum(row.bytes for row in rows)


@pytest.mark.parametrize("side", SIDES)
def test_sizes_flops_and_bytes_are_exact_at_sides_that_were_held_out(
    side: int, traced: dict[str, StoredTrace], laws: Laws
) -> None:
    true, made = traced[f"{side} 4"], moved(ScaledTrace.of_one(traced[f"{BASE} 4"], 4), [laws], numbers(side))
    assert made.trace.events == true.trace.events
    assert sizes(made.trace) == sizes(true.trace)
    for made_work, true_work in zip(work(made.ops[1]), work(true.ops), strict=True):
        assert made_work == pytest.approx(true_work, rel=1e-3)


@pytest.mark.parametrize("side", SIDES)
def test_laws_are_those_of_blocks_that_are_computed_again(
    side: int, traced: dict[str, StoredTrace], laws: Laws
) -> None:
    plain, base, true = traced[f"{BASE} 4"], traced[f"again {BASE} 4"], traced[f"again {side} 4"]
    assert len(base.trace.tensors) > len(plain.trace.tensors)
    known = {kind_of(tensor) for tensor in plain.trace.tensors}
    found = spread(laws.sizes, known, {kind_of(tensor) for tensor in base.trace.tensors})
    own = {kind: factors for kind, factors in found.items() if factors}
    assert set(own) - set(laws.sizes)
    made = moved(
        ScaledTrace.of_one(base, 4),
        [replace(laws, sizes=own, counts=counts_of(laws.counts, plain.ops, base.ops))],
        numbers(side),
    )
    assert sizes(made.trace) == sizes(true.trace)
    for made_work, true_work in zip(work(made.ops[1]), work(true.ops), strict=True):
        assert made_work == pytest.approx(true_work, rel=0.02)


def test_laws_at_micro_batch_1_come_from_two_micro_batches(traced: dict[str, StoredTrace], laws: Laws) -> None:
    scaled = scale(traced[f"{BASE} 2"], traced[f"{BASE} 4"], (2, 4))
    assert scaled is not None
    of_single, known = of_one(scaled, laws.sizes)
    base, true = traced[f"{BASE} 1"], traced["5 1"]
    assert {kind_of(tensor) for tensor in base.trace.tensors} <= known
    made = moved(ScaledTrace.of_one(base, 1), [replace(laws, sizes=of_single)], numbers(5))
    assert sizes(made.trace) == sizes(true.trace)


def test_a_smaller_trace_has_the_laws_of_a_larger_one(traced: dict[str, StoredTrace], laws: Laws) -> None:
    turned = [replace(each, base=each.other, other=each.base) for each in VARIABLES]
    found = find_image_laws(traced[f"{OTHER} 4"], traced[f"{BASE} 4"], turned, {}, "training")
    assert found is not None
    assert len(found.sizes) == len(laws.sizes)
    made = moved(ScaledTrace.of_one(traced[f"{OTHER} 4"], 4), [found], numbers(14))
    assert sizes(made.trace) == sizes(traced["14 4"].trace)


@pytest.mark.parametrize("name", PUBLISHED)
def test_declared_sizes_are_those_of_upstreams_configuration(name: str) -> None:
    fields = {**CONFIGS, **WITH_MASKS}[name].model_fields
    patch, windows = fields["patch_size"].default, fields["num_windows"].default
    assert LOGITS_AT_ONCE == PIECE
    for wanted in (None, 1, PUBLISHED[name].resolution + 17, 640):
        resolution = wanted and legal_resolution(wanted, patch * windows, snap=True)
        assert wanted is None or legal(wanted, PUBLISHED[name].block, snap=True) == resolution
        side = resolution or PUBLISHED[name].resolution
        drawn = compute_multi_scale_scales(side, True, patch, windows)
        for multi_scale, largest in ((True, max(drawn)), (False, side)):
            found = declared_sizes(RfDetrSetting(model=name, resolution=wanted, multi_scale=multi_scale))
            assert found["training tokens"] == (largest // patch) ** 2 + windows**2
            assert found["evaluation cells"] == (side // patch) ** 2


RECORDED: list[tuple[dict[str, Any], int, float]] = [
    ({"resolution": 448}, 3_114_028_544, 2.859942789e12),
    ({"resolution": 320}, 2_483_286_016, 1.941101199e12),
    ({"multi_scale": False}, 2_110_731_328, 1.457349894e12),
]
"""Knobs -> peak of the tensors, and FLOPs of forward and backward, of live traces (bf16, micro-batch 4, accumulation 2)."""


@pytest.mark.parametrize(("knobs", "peak_bytes", "flops"), RECORDED)
def test_the_package_has_the_peak_of_live_traces(knobs: dict[str, Any], peak_bytes: int, flops: float) -> None:
    pricer = Pricer(gpu=find_gpu("A100"), cache=False)
    setting = make_setting("rfdetr-nano", precision="bf16", micro_batch=4, accumulation=2, **knobs)
    assert pricer.answers(setting)
    made = pricer.columns(setting, "training")
    assert made.columns.peak_bytes() == pytest.approx(peak_bytes, rel=1e-5)
    rows = [row for row in made.ops if row.phase in ("forward", "backward")]
    assert sum(row.flops for row in rows) == pytest.approx(flops, rel=1e-3)


@pytest.mark.parametrize("side", TRACED["rfdetr-nano"])
def test_the_package_has_the_work_of_other_sides(side: int) -> None:
    """FLOPs and bytes of forward and backward, recorded from traces of an earlier step, which read and wrote 3 % less."""
    pricer = Pricer(gpu=find_gpu("A100"), cache=False)
    setting = make_setting("rfdetr-nano", precision="bf16", resolution=side, multi_scale=False, micro_batch=4)
    assert pricer.answers(setting)
    made = work([row for row in pricer.columns(setting, "training").ops if row.phase in ("forward", "backward")])
    for own, recorded, error in zip(made, TRACED["rfdetr-nano"][side], (0.01, 0.06), strict=True):
        assert own / 2 == pytest.approx(recorded, rel=error)  # a window of two micro-batches


@pytest.mark.parametrize(
    ("model", "other"), [("rfdetr-medium", "rfdetr-large"), ("rfdetr-seg-large", "rfdetr-seg-medium")]
)
@pytest.mark.parametrize(
    ("knobs", "card"),
    [({"checkpointing": "all"}, "A100"), ({"micro_batch": 1}, "H100"), ({"precision": "fp16"}, "T4")],
    ids=["again", "single", "turing"],
)
def test_a_model_at_the_resolution_of_its_sibling_has_its_traces(
    model: str, other: str, knobs: dict[str, Any], card: str
) -> None:
    """The two differ in nothing else; the laws were found with the sibling's trace for another card, and nothing recomputed."""
    pricer = Pricer(gpu=find_gpu(card), cache=False)
    common: dict[str, Any] = {"precision": "bf16", "micro_batch": 3, "accumulation": 2} | knobs
    setting = make_setting(model, resolution=PUBLISHED[other].resolution, **common)
    assert pricer.answers(setting)
    for part in ("training", "evaluation"):
        made, true = pricer.columns(setting, part), pricer.columns(make_setting(other, **common), part)
        assert made.columns.peak_bytes() == pytest.approx(true.columns.peak_bytes(), rel=3e-4)
        for made_work, true_work in zip(work(made.ops), work(true.ops), strict=True):
            assert made_work == pytest.approx(true_work, rel=0.04)


def test_the_package_does_not_answer_for_sides_without_laws() -> None:
    pricer = Pricer(gpu=find_gpu("A100"), cache=False)
    for resolution, covered in ((128, False), (224, True), (544, True), (1024, False)):
        setting = make_setting("rfdetr-nano", precision="bf16", resolution=resolution)
        request = pricer.request(setting, "training")
        assert (shipped.source(request) is not None) == covered
        assert (packaged(request) is not None) == covered


if __name__ == "__main__":
    main()


def test_a_need_from_a_trace_of_another_size_has_a_wider_interval() -> None:
    pricer = Pricer(gpu=find_gpu("RTX 3060"), cache=False)
    published = make_setting("rfdetr-nano", micro_batch=4, accumulation=2, precision="bf16")
    for setting, share in ((published, 0.0), (replace(published, resolution=448), RESIZED_ERROR)):
        alone = needed(pricer.columns(setting, "training"), pricer.gpu, pricer.config)
        assert pricer.reserved(setting).low_bytes == int((1 - share) * alone.low_bytes)
        assert pricer.reserved(setting).high_bytes == int((1 + share) * alone.high_bytes)
        assert (RESIZED in pricer.predict(setting, (4, 4)).assumptions) == bool(share)
