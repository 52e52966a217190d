"""Traces of CLIP's coupled window, composed from those of two windows, against traces of the window itself."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_cases import SIGLIP, register
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory import composed
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.columns import ColumnTrace
from trainfit.memory.predict import needed
from trainfit.memory.priced import Pricer
from trainfit.memory.window_alignment import align
from trainfit.memory.window_trace import WindowTrace, traced_windows
from trainfit.models.build import build_eval_step, build_step
from trainfit.models.clip.family import CHUNK_ROWS
from trainfit.models.setting import Setting, make_setting
from trainfit.timing.roofline import step_seconds
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step
from trainfit.tracing.trace_cache import TraceRequest

GPU = find_gpu("A100")
WINDOWS = traced_windows(CHUNK_ROWS)
TRACED = [(window.micro_batch, window.accumulation) for window in WINDOWS]
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "training": ({}, {}),
    "evaluation": (SIGLIP, {"checkpointing": "all"}),
}
"""Changes of the architecture and of the setting. A trace of evaluation has a window of training before it."""
HELD_OUT = {"training": [(300, 1), (64, 2), (97, 5)], "evaluation": [(41, 3)]}
EVALUATED = 23
"""Micro-batch of the evaluation after a held-out window."""


def make(folder: Path, kind: str, micro_batch: int, accumulation: int) -> Setting:
    """A setting of a small model, whose file is in the folder."""
    changes, knobs = KINDS[kind]
    model = register(folder, kind, changes, dropout=0.4)
    evaluated = EVALUATED if kind == "evaluation" and (micro_batch, accumulation) not in TRACED else None
    return make_setting(
        model=model,
        precision="bf16",
        micro_batch=micro_batch,
        accumulation=accumulation,
        eval_micro_batch=evaluated,
        **knobs,
    )


def built(factory: Callable[..., Any], setting: Setting, device: torch.device) -> Any:
    return factory(setting=setting.to_json(), device=device)


def main() -> None:
    """Trace every kind at every window."""
    folder = Path(sys.argv[1])
    traces: dict[str, str] = {}
    for kind, held_out in HELD_OUT.items():
        factory = build_eval_step if kind == "evaluation" else build_step
        for micro_batch, accumulation in (*TRACED, *held_out):
            setting = make(folder, kind, micro_batch, accumulation)
            traced = trace_step(partial(built, factory, setting), target=Target(capability=(8, 0)))
            traces[f"{kind} {micro_batch} {accumulation}"] = traced.to_json()
    json.dump(traces, sys.stdout)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Composed and traced windows."""

    window: WindowTrace
    traced: dict[tuple[int, int], StoredTrace]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    folder = tmp_path_factory.mktemp("clip")
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = json.loads(done.stdout)
    made: dict[str, Kind] = {}
    for kind, held_out in HELD_OUT.items():
        traced = {(b, a): StoredTrace.from_json(texts[f"{kind} {b} {a}"]) for b, a in (*TRACED, *held_out)}
        window = align(traced[TRACED[0]], traced[TRACED[1]], WINDOWS)
        assert window is not None
        made[kind] = Kind(window=window, traced=traced)
    return made


def compositions(kinds: dict[str, Kind], *, replayed: int | None) -> Iterator[tuple[ColumnTrace, ColumnTrace]]:
    """Held-out windows: composed, traced."""
    for name, held_out in HELD_OUT.items():
        kind = kinds[name]
        for micro_batch, accumulation in held_out:
            evaluated = EVALUATED if name == "evaluation" else None
            columns = kind.window.at(micro_batch, accumulation, eval_micro_batch=evaluated, replayed=replayed)
            traced = ColumnTrace.of(kind.traced[micro_batch, accumulation])
            ops = kind.window.ops_at(evaluated or micro_batch, accumulation)
            yield replace(traced, columns=columns, ops=ops), traced


def test_a_composed_window_allocates_and_frees_what_its_own_trace_does(kinds: dict[str, Kind]) -> None:
    for made, traced in compositions(kinds, replayed=None):
        assert made.columns.peak_bytes() == traced.columns.peak_bytes()
        assert sorted(made.columns.nbytes) == sorted(traced.columns.nbytes)
        assert len(made.columns.events) == len(traced.columns.events)


def test_the_peak_is_exact_and_the_need_within_one_percent_where_not_every_repetition_is_replayed(
    kinds: dict[str, Kind],
) -> None:
    for made, traced in compositions(kinds, replayed=1):
        assert made.columns.peak_bytes() == traced.columns.peak_bytes()
        composed_need, traced_need = (needed(each, GPU, AllocatorConfig()) for each in (made, traced))
        assert composed_need.high_bytes == pytest.approx(traced_need.high_bytes, rel=0.01)
        assert composed_need.low_bytes == pytest.approx(traced_need.low_bytes, rel=0.01)


def test_the_time_of_a_composed_window(kinds: dict[str, Kind]) -> None:
    for made, traced in compositions(kinds, replayed=1):
        assert step_seconds(made.ops, GPU).seconds == pytest.approx(step_seconds(traced.ops, GPU).seconds, rel=0.1)


def test_a_stored_composition_reads_back(kinds: dict[str, Kind]) -> None:
    window = kinds["training"].window
    again = WindowTrace.from_record(json.loads(json.dumps(window.to_record())))
    assert np.array_equal(again.at(7, 9).nbytes, window.at(7, 9).nbytes)
    assert again.ops_at(7, 9) == window.ops_at(7, 9)


def test_windows_that_differ_in_more_than_repetitions_are_not_composed(kinds: dict[str, Kind]) -> None:
    clip, siglip = (kinds[name].traced for name in KINDS)
    assert align(clip[TRACED[0]], siglip[TRACED[1]], WINDOWS) is None
    small = clip[TRACED[0]]
    largest = max(small.trace.tensors, key=lambda tensor: tensor.nbytes)
    odd = replace(largest, nbytes=largest.nbytes + 512)
    tensors = (*small.trace.tensors[: odd.id], odd, *small.trace.tensors[odd.id + 1 :])
    other = replace(small, trace=replace(small.trace, tensors=tensors))
    assert align(other, clip[TRACED[1]], WINDOWS) is None


def test_a_window_that_cannot_be_composed_is_traced_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make(tmp_path, "training", 64, 4)
    pricer = Pricer(gpu=GPU, cache=False)

    def make_window_trace(_request: object, **_options: object) -> None:
        return None

    monkeypatch.setattr(composed, "make_window_trace", make_window_trace)
    asked: list[Setting] = []

    def get_trace(request: TraceRequest, **_options: object) -> StoredTrace:
        asked.append(request.setting)
        raise LookupError

    monkeypatch.setattr("trainfit.memory.priced.get_trace", get_trace)
    with pytest.raises(LookupError):
        pricer.reserved(setting)
    assert asked == [setting]


if __name__ == "__main__":
    main()
