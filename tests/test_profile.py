"""Profiles, hidden memory and reports, from traces written by hand; bytes counted by hand."""

import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainfit.gpus.catalogue import MIB, find_gpu
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.allocator import replay
from trainfit.memory.columns import Columns
from trainfit.memory.hidden import Bound, complete
from trainfit.memory.predict import Prediction, predict_traced
from trainfit.memory.profile import SAMPLES, make_profile
from trainfit.models.setting import make_setting
from trainfit.reports.profile import profile_json, profile_text
from trainfit.reports.profile_html import profile_html
from trainfit.timing.counts import OpCount
from trainfit.timing.roofline import KINDS, Kind, TimeEstimate
from trainfit.tracing.events import CATEGORIES, EMPTY_CACHE, Category, TensorInfo, Trace
from trainfit.tracing.stored_trace import StoredTrace

Row = tuple[int, Category, str, str, str]
ROWS: tuple[Row, ...] = (
    (64, "parameters", "", "", "build"),
    (128, "optimizer state", "", "", "build"),
    (32, "inputs", "aten._to_copy", "", "inputs"),
    (400, "activations", "aten.convolution", "model.body.conv", "forward"),
    (200, "activations", "aten.mm", "model.head<0>", "forward"),
    (64, "gradients", "aten.mm", "model.head<0>", "backward"),
    (100, "temporary", "aten.convolution_backward", "model.body.conv", "backward"),
)
EVENTS = (1, 2, 3, 4, 5, 6, 7, -7, -5, -4, -3, -6)
MARKS = ((2, "window 0"), (2, "inputs"), (3, "forward"), (5, "backward"), (10, "update"))


OPS = (OpCount(op="aten.mm", phase="forward", dtype="bfloat16", count=10, flops=7.1e12, bytes=1e9),)


def make_trace(rows: Sequence[Row] = ROWS, events: tuple[int, ...] = EVENTS) -> Trace:
    """Sizes in MiB."""
    tensors = (
        TensorInfo(id=i, nbytes=mib * MIB, category=category, op=op, module=module, phase=phase)
        for i, (mib, category, op, module, phase) in enumerate(rows)
    )
    return Trace(tensors=tuple(tensors), events=events, marks=MARKS if events is EVENTS else ())


def make_prediction(memory_mib: int = 2000, config: AllocatorConfig | None = None) -> Prediction:
    gpu = replace(find_gpu("RTX 3090"), memory_bytes=memory_mib * MIB)
    stored = StoredTrace(
        trace=make_trace(), ops=OPS, made_up=("aten.item", "aten.nonzero"), upper_bounds=("aten.nonzero",)
    )
    setting = make_setting(model="rfdetr-nano", micro_batch=4, objects_per_image=7)
    made = predict_traced(setting, gpu, training=stored, evaluation=stored, config=config or AllocatorConfig())
    # A time of its own: the fitted efficiencies may change, and this text is about the text.
    parts: dict[Kind, float] = {**dict.fromkeys(KINDS, 0.0), "tensor cores": 0.06, "memory": 0.035}
    time = TimeEstimate(seconds=0.095, parts_s=parts, bound="tensor cores", calibrated=True)
    assert made.training.time
    return replace(made, training=replace(made.training, time=time))


def test_peak_by_hand() -> None:
    trace = make_trace()
    profile = make_profile(trace, replay(trace, capacity_bytes=None, timeline=True))
    assert profile.peak_allocated_bytes == profile.peak_requested_bytes == (64 + 128 + 32 + 400 + 200 + 64 + 100) * MIB
    assert dict(zip(CATEGORIES, profile.peak.category_bytes, strict=True))["activations"] == 600 * MIB
    assert (profile.peak_op, profile.peak_module, profile.peak.phase, profile.peak.event) == (
        "aten.convolution_backward",
        "body.conv",
        "backward",
        6,
    )
    assert [(row.module, row.bytes // MIB) for row in profile.modules] == [
        ("body", 500),
        ("head<0>", 264),
        ("(optimizer state)", 128),
        ("(parameters)", 64),
        ("(inputs)", 32),
    ]
    assert profile.deep_modules[0].module == "body.conv"
    assert [(row.phase, row.peak_allocated_bytes // MIB) for row in profile.phases] == [
        ("inputs", 224),
        ("forward", 824),
        ("backward", 988),
        ("update", 256),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from(CATEGORIES), st.integers(0, 30)), min_size=1, max_size=700)
)
@settings(max_examples=15, deadline=None)
def test_timeline_keeps_the_peak(requests: list[tuple[int, Category, int]]) -> None:
    """Tensors of random life times: no sample lacks a byte, the highest one is the replay's peak."""
    lives = [(i, i + life) for i, (_, _, life) in enumerate(requests)]
    events = [event for at in range(len(lives)) for event in (at + 1, *(-i - 1 for i, end in lives if end == at))]
    trace = make_trace([(mib, category, "op", "", "forward") for mib, category, _ in requests], tuple(events))
    replayed = replay(trace, capacity_bytes=None, timeline=True)
    profile = make_profile(trace, replayed)
    assert max(s.allocated_bytes for s in profile.timeline) == replayed.peak_allocated_bytes
    assert len(profile.timeline) <= SAMPLES + 2
    for sample in profile.timeline:
        alive = {e for e in events[: sample.event + 1] if e > 0} - {-e for e in events[: sample.event + 1] if e < 0}
        assert sum(sample.category_bytes) == sum(trace.tensors[e - 1].nbytes for e in alive)
        assert sum(sample.category_bytes) <= sample.allocated_bytes <= sample.reserved_bytes


@pytest.mark.parametrize(("card", "workspace"), [("RTX 3090", 8_519_680), ("H100 SXM", 32 * MIB)])
def test_cublas_workspaces(card: str, workspace: int) -> None:
    """One for forward, one for backward, right after the first matrix product; nothing else at the lowest."""
    completed = complete(Columns.of(make_trace()), find_gpu(card), bound="least", half_precision=True)
    made = completed.columns.trace()
    assert completed.cublas_bytes == 2 * workspace
    ops = [made.tensors[abs(e) - 1].op for e in made.events]
    assert [op for op in ops if op != EMPTY_CACHE][4:8] == [
        "aten.mm",
        "cuBLAS workspace",
        "aten.mm",
        "cuBLAS workspace",
    ]
    assert [e for e in made.events if abs(e) <= len(ROWS)] == list(EVENTS)
    assert [made.events[index] for index, _ in made.marks] == [EVENTS[index] for index, _ in MARKS]


def test_temporaries_at_the_highest() -> None:
    """A convolution's input and output in another layout; flash attention's float32 gradient of the query."""
    flash: Row = (10, "temporary", "aten._scaled_dot_product_flash_attention_backward", "model.attn", "backward")
    trace = make_trace([*ROWS, flash], (*EVENTS, 8))
    gpu = find_gpu("RTX 3090")
    sizes: list[dict[str, float]] = []
    bounds: tuple[tuple[Bound, bool], ...] = (("least", True), ("most", True), ("most", False), ("needed", False))
    for bound, half in bounds:
        made = complete(Columns.of(trace), gpu, bound=bound, half_precision=half).columns.trace()
        sizes.append({t.op.rpartition(".")[2]: t.nbytes / MIB for t in made.tensors if t.op.startswith("within")})
    name = "_scaled_dot_product_flash_attention_backward"
    assert sizes[0] == {name: 20}
    assert sizes[1] == {name: 40, "convolution": 500, "convolution_backward": 500}
    assert sizes[2] == {name: 40, "convolution": 1125, "convolution_backward": 1125}
    assert sizes[3] == {name: 40}  # where memory is short, convolutions run without workspaces


def test_text() -> None:
    """A card where the low end of the need fits and its top does not."""
    assert [line.rstrip() for line in profile_text(make_prediction(1400)).splitlines()] == TEXT.splitlines()


def test_out_of_memory_is_told() -> None:
    """700 MiB for the allocator: the fifth tensor, of 200 MiB, meets the 624 that are there."""
    text = profile_text(make_prediction(memory_mib=1000))
    assert text.startswith("rfdetr-nano, micro-batch 4, on RTX 3090: does not fit. It needs 1.23 to 1.39 GiB,")
    assert " At best training dies asking for 200.0 MiB while 0.61 GiB are reserved. A step takes" in text


def test_json_holds_all() -> None:
    record = json.loads(json.dumps(profile_json(make_prediction())))
    assert record["schema"] == 1
    assert record["training"]["profile"]["peak_allocated_bytes"] == 988 * MIB + 2 * 8_519_680
    assert record["training"]["hidden"][0]["name"] == "CUDA context"
    assert record["setting"]["micro_batch"] == 4


@pytest.mark.parametrize("memory_mib", [2000, 24000])
def test_html_stands_alone(memory_mib: int) -> None:
    """Well-formed, no address of any other file, names escaped, the peak marked."""
    page = profile_html(make_prediction(memory_mib))
    assert "http" not in page
    assert "head&lt;0&gt;" in page
    picture = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    texts = [element.text for element in picture.iter("text")]
    assert "peak 0.98 GiB: backward, body.conv" in texts
    assert any("limit" in (text or "") for text in texts)
    assert len(list(picture.iter("polygon"))) == 1 + 7  # reserved memory, and every category that occurs


TEXT = """\
rfdetr-nano, micro-batch 4, on RTX 3090: tight, likelier to fit than not. It needs 1.23 to 1.39 GiB, an upper bound, of 1.37 GiB usable; where there is room it takes 1.23 to 1.40 GiB. The peak is in backward at body.conv, aten.convolution_backward; 60% of it is activations. A step takes about 0.095 s, 42.1 images/s, bound by tensor cores.

At the peak of training
  activations                        600.0 MiB
  optimizer state                    128.0 MiB
  temporary                          100.0 MiB
  parameters                          64.0 MiB
  gradients                           64.0 MiB
  inputs                              32.0 MiB
  workspace                           16.2 MiB
  allocator: rounding                  0.0 MiB
  allocator: cached, fragmented        3.8 MiB
  reserved, at most                 1008.0 MiB

By module, the largest 8
  body                   500.0 MiB
  head<0>                264.0 MiB
  (optimizer state)      128.0 MiB
  (parameters)            64.0 MiB
  (inputs)                32.0 MiB
  (workspace)             16.2 MiB

Overheads outside the trace
  CUDA context          256.0 to   390.0 MiB  process   RTX 3090, torch 2.7, CUDA 12.8: 256 MiB bare (InvokeAI issue 9413); RTX 3060: at most 390
  cuBLAS workspaces      16.2 to    16.2 MiB  reserved  torch 2.15's default CUBLAS_WORKSPACE_CONFIG: one each for forward and backward
  kernel temporaries      0.0 to   500.0 MiB  reserved  bounds of the largest at one time, of convolution, convolution_backward
  error of the model    -36.7 to    39.6 MiB  reserved  matrix products: -3.6% to +3.9%, from the errors of such models on an A100

One window of training, GiB: █ allocated, ░ reserved
    0.99 ┤───────▇▇░░░░░ limit
    0.90 ┤    ░▅▅██▅░░░░
    0.82 ┤   ▆▇█████░░░░
    0.74 ┤   ███████▂░░░
    0.66 ┤ ▃▃████████░░░
    0.58 ┤ ██████████░░░
    0.49 ┤ ██████████░░░
    0.41 ┤ ██████████░░░
    0.33 ┤ ██████████▄▁░
    0.25 ┤▅████████████▃
    0.16 ┤██████████████
    0.08 ┤██████████████
         └──────────────

Evaluation, micro-batch 4: tight, 1.23 to 1.39 GiB; it allocates 0.98 GiB at most

Assumptions
  One process, the card to itself (a desktop may hold 1.1 GiB: --memory); evaluation follows training.
  torch.backends.cudnn.benchmark is off, as torch leaves it.
  The fullest image has 7 objects (--objects-per-image, or --data).
  Every image is resized to 384 x 384 pixels: no canvas to pad to.
  Multi-scale training: memory at the largest of its sizes, time as the mean over all.
  Largest shape assumed, an upper bound: aten.nonzero.
  Placeholder values for data-dependent operators: aten.item.
"""  # noqa: E501
