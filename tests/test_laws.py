"""Traces taken to other numbers of objects and classes by laws, against traces made there."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import trace_cases
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory import shipped
from trainfit.memory.allocator import replay
from trainfit.memory.archive import write_archive
from trainfit.memory.laws import Laws, Variable, find_laws, missing, moved, with_cap
from trainfit.memory.packaged import packaged
from trainfit.memory.priced import Pricer
from trainfit.memory.scaling import ScaledTrace, scale
from trainfit.models.rfdetr.family import RfDetrSetting
from trainfit.timing.roofline import step_seconds
from trainfit.tracing.events import TensorInfo, Trace
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step
from trainfit.tracing.trace_cache import made_with

IMAGES, QUERIES, PIECE = 4, 60, 25
VARIABLES = [
    Variable(knob="objects_per_image", base=100, other=37, least=1, most=300),
    Variable(knob="classes", base=80, other=6, least=1, most=1000),
    Variable(knob="classes", base=80, other=6, least=1, most=1000, plus=1),
]
POINTS = ((100, 80), (37, 6), (61, 19), (7, 1), (150, 300))


class Detector(nn.Module):
    """A class head with a row for none, and costs of queries with objects."""

    def __init__(self, classes: int, checkpointing: str) -> None:
        super().__init__()
        self.body = trace_cases.Blocks(checkpointing=checkpointing)
        self.head = nn.Linear(trace_cases.WIDTH, classes + 1)
        self.boxes = nn.Linear(trace_cases.WIDTH, 4)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(queries)
        return self.head(found), self.boxes(found)


MATCHED = [replace(each, base=50, other=19) if each.knob == "objects_per_image" else each for each in VARIABLES]
MANY = 150
MATCHED_POINTS = ((50, 80), (19, 6), (MANY, 80), (90, 19), (33, 3), (290, 200))
"""Fewer and more than queries; laws are found with the first three."""


def loss(model: nn.Module, device: torch.device, objects: int, *, pieces: bool, matched: bool) -> Tensor:
    logits, boxes = model(torch.ones(IMAGES, QUERIES, trace_cases.WIDTH, device=device))
    targets = torch.ones(IMAGES, objects, 4, device=device)
    labels = torch.zeros(IMAGES, objects, dtype=torch.int64, device=device)
    costs = torch.cdist(boxes, targets) - logits.softmax(-1).gather(2, labels[:, None].expand(-1, QUERIES, -1))
    total = costs.amin(1).sum() + logits.sigmoid().sum()
    if pieces:  # of bounded size, as RF-DETR's mask losses work
        for some in targets.flatten(0, 1).split(PIECE):
            total = total + (some[:, :1] * torch.ones(4096, device=device)).relu().sum() * boxes.sum()
    if matched:  # each object has a query of its own, as long as there are queries
        total = total + (torch.ones(IMAGES, min(objects, QUERIES), 7, device=device) * boxes.sum()).abs().sum()
    return total


def trace(
    objects: int, classes: int, *, checkpointing: str = "none", pieces: bool = False, matched: bool = False
) -> StoredTrace:
    def build(device: torch.device) -> trace_cases.Step:
        return trace_cases.Step(
            device,
            lambda: Detector(classes, checkpointing),
            lambda m, d: loss(m, d, objects, pieces=pieces, matched=matched),
        )

    return trace_step(build, target=trace_cases.TARGET)


def main() -> None:
    """Trace everything that the tests compare."""
    found = {f"{objects} {classes}": trace(objects, classes) for objects, classes in POINTS}
    pieces = (*POINTS[:4], (7, 80))
    found |= {f"pieces {objects} {classes}": trace(objects, classes, pieces=True) for objects, classes in pieces}
    found |= {
        f"again {objects} {classes}": trace(objects, classes, checkpointing="reentrant")
        for objects, classes in POINTS[::2]
    }
    found |= {
        f"matched {objects} {classes}": trace(objects, classes, matched=True) for objects, classes in MATCHED_POINTS
    }
    json.dump({name: each.to_json() for name, each in found.items()}, sys.stdout)


@pytest.fixture(scope="module")
def traced() -> dict[str, StoredTrace]:
    return trace_cases.traces_of(__file__)


@pytest.fixture(scope="module")
def laws(traced: dict[str, StoredTrace]) -> Laws:
    found = find_laws([(traced["100 80"], traced["37 6"])], VARIABLES)
    assert found is not None
    return found[0]


def at(base: StoredTrace, laws: Laws, objects: int, classes: int) -> ScaledTrace:
    return moved(ScaledTrace.of_one(base, 4), [laws], {"objects_per_image": objects, "classes": classes})


def sizes(trace: Trace) -> list[int]:
    return [tensor.nbytes for tensor in trace.tensors]


def peaks(trace: Trace) -> tuple[int, int]:
    found = replay(trace, capacity_bytes=None)
    return found.peak_allocated_bytes, found.peak_reserved_bytes


@pytest.mark.parametrize("point", POINTS)
def test_every_size_is_exact_at_points_that_were_held_out(
    point: tuple[int, int], traced: dict[str, StoredTrace], laws: Laws
) -> None:
    true, made = traced["{} {}".format(*point)], at(traced["100 80"], laws, *point)
    assert made.trace.events == true.trace.events
    assert sizes(made.trace) == sizes(true.trace)
    gpu = find_gpu("RTX 3060")
    assert step_seconds(made.ops[1], gpu).seconds == pytest.approx(step_seconds(true.ops, gpu).seconds, rel=0.05)


def test_laws_of_one_step_hold_for_another_with_its_heads(traced: dict[str, StoredTrace], laws: Laws) -> None:
    base = traced["again 100 80"]
    assert not missing([ScaledTrace.of_one(base, 4)], laws)
    assert sizes(at(base, laws, 61, 19).trace) == sizes(traced["again 61 19"].trace)


def test_laws_of_another_step_are_noticed(laws: Laws) -> None:
    other = StoredTrace(trace=Trace(tensors=(TensorInfo(id=0, nbytes=8, op="aten.add"),), events=(1,)), ops=())
    assert missing([ScaledTrace.of_one(other, 4)], laws) == set(laws.sizes)


def test_fewer_objects_make_fewer_pieces_and_the_same_peak(traced: dict[str, StoredTrace]) -> None:
    base = traced["pieces 100 80"]
    found = find_laws([(base, traced["pieces 37 6"])], VARIABLES)
    assert found is not None
    assert len(base.trace.tensors) > len(traced["pieces 37 6"].trace.tensors)
    for objects, classes in POINTS[1:3]:
        true, made = (
            peaks(each)[0]
            for each in (traced[f"pieces {objects} {classes}"].trace, at(base, found[0], objects, classes).trace)
        )
        assert (
            true * 0.997 <= made <= true * 1.1
        )  # of a piece that is kept for backward there are as many as at the base


def test_the_kernels_and_bytes_of_pieces_follow_the_objects_and_not_the_classes(traced: dict[str, StoredTrace]) -> None:
    base, few = traced["pieces 100 80"], traced["pieces 7 80"]
    found = find_laws([(base, traced["pieces 37 6"])], VARIABLES)
    assert found is not None
    made = at(base, found[0], 7, 80).ops[1]
    kernels, at_base, true = (sum(row.count for row in rows) for rows in (made, base.ops, few.ops))
    assert abs(kernels - true) < 0.1 * (at_base - true)
    traffic, at_base, true = (sum(row.bytes for row in rows) for rows in (made, base.ops, few.ops))
    assert abs(traffic - true) < 0.1 * (at_base - true)


@pytest.mark.parametrize("point", MATCHED_POINTS)
def test_sizes_of_matched_objects_grow_up_to_the_queries(
    point: tuple[int, int], traced: dict[str, StoredTrace]
) -> None:
    base = traced["matched 50 80"]
    found = find_laws([(base, traced["matched 19 6"])], MATCHED)
    assert found is not None
    capped = with_cap(found, [(base, traced[f"matched {MANY} 80"])], cap=QUERIES, many=MANY, most=300)
    assert capped is not None
    assert sizes(at(base, capped[0], *point).trace) == sizes(traced["matched {} {}".format(*point)].trace)
    assert capped[0].hold({"objects_per_image": 300, "classes": 80})
    assert not capped[0].hold({"objects_per_image": 301, "classes": 80})
    assert Laws.from_record(json.loads(json.dumps(capped[0].to_record()))) == capped[0]


def test_a_step_that_does_something_else_with_more_objects_has_no_laws_for_them(
    traced: dict[str, StoredTrace],
) -> None:
    base = traced["matched 50 80"]
    found = find_laws([(base, traced["matched 19 6"])], MATCHED)
    assert found is not None
    assert with_cap(found, [(base, traced["150 300"])], cap=QUERIES, many=MANY, most=300) is None


def test_a_step_that_does_something_else_has_no_laws() -> None:
    def step(nbytes: int) -> StoredTrace:
        tensors = (TensorInfo(id=0, nbytes=1000, op="aten.add"), TensorInfo(id=1, nbytes=nbytes, op="aten.mul"))
        return StoredTrace(trace=Trace(tensors=tensors, events=(1, 2, -1, -2)), ops=())

    assert find_laws([(step(4000), step(4000 * 37 // 100))], VARIABLES) is not None
    assert find_laws([(step(4000), step(3000))], VARIABLES) is None


def test_laws_are_stored(laws: Laws) -> None:
    assert Laws.from_record(json.loads(json.dumps(laws.to_record()))) == laws


def test_the_package_answers_for_other_data(
    traced: dict[str, StoredTrace], laws: Laws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = traced["100 80"]
    scaled = scale(base, base, (2, 4))
    assert scaled is not None
    pricer = Pricer(gpu=find_gpu("A100"))
    setting = RfDetrSetting(model="rfdetr-nano", precision="bf16", accumulation=2)
    request = pricer.request(setting, "training")
    entries = {shipped.entry_name(request): scaled.to_json(), shipped.entry_name(request, alone=True): base.to_json()}
    settings = json.dumps(dict.fromkeys(entries, request.setting.to_json()))
    for alone in (False, True):
        entries[shipped.laws_name(request, alone=alone)] = json.dumps(laws.to_record())
    write_archive(tmp_path / "rfdetr-nano.tar.xz", entries | {shipped.SETTINGS: settings})
    record = {"rfdetr-nano": made_with(request.setting).to_record()}
    (tmp_path / shipped.MADE_WITH).write_text(json.dumps(record))
    monkeypatch.setattr(shipped, "shipped_folder", lambda: tmp_path)
    shipped.forget()

    of_data = replace(request, setting=replace(request.setting, objects_per_image=61, classes=19))
    found, alone = packaged(of_data), packaged(of_data, alone=True)
    assert found is not None
    assert alone is not None
    assert sizes(found.trace) == sizes(alone.trace) == sizes(traced["61 19"].trace)
    assert packaged(replace(of_data, setting=replace(of_data.setting, objects_per_image=301))) is None
    assert packaged(replace(of_data, setting=replace(of_data.setting, freeze_encoder=True))) is None
    shipped.forget()


if __name__ == "__main__":
    main()
