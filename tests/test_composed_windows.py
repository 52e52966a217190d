"""Traces of CLIP's coupled window, composed from those of two windows, against traces of the window itself."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clip_cases import COCA, SIGLIP, TEACHER, TINY, register
from trainfit.gpus.catalogue import find_gpu
from trainfit.memory import composed, shipped
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.archive import write_archive
from trainfit.memory.columns import Columns, ColumnTrace
from trainfit.memory.predict import needed
from trainfit.memory.priced import Pricer
from trainfit.memory.window_alignment import align
from trainfit.memory.window_ops import ops_at
from trainfit.memory.window_trace import WindowTrace
from trainfit.memory.windows import ANY_RATIO, Window, traced_windows
from trainfit.models import coupled_step
from trainfit.models.clip.family import CHUNK_ROWS
from trainfit.models.setting import Setting, make_setting
from trainfit.timing.roofline import step_seconds
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step
from trainfit.tracing.trace_cache import TraceRequest, packages_of

GPU = find_gpu("A100")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model, its setting, and windows that are not traced for the composition."""

    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of the architecture."""
    knobs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    held_out: tuple[tuple[int, int], ...]
    """(pairs, micro-batch)."""
    ratio: float | None = None
    """Of the held-out windows; the traced ones have `ANY_RATIO`."""
    has_teacher: bool = False

    def window(self, pairs: int, micro_batch: int) -> Window:
        return Window.of(pairs, micro_batch, chunk_rows=CHUNK_ROWS, ratio=self.ratio)

    @property
    def traced(self) -> tuple[Window, Window]:
        return traced_windows(CHUNK_ROWS, has_ratio=self.ratio is not None)


EVALUATION = "evaluation"
"""The kind whose traces have an evaluation after a window of training."""
KINDS = {
    "training": Kind(held_out=((300, 300), (485, 97), (300, 61))),
    EVALUATION: Kind(changes=SIGLIP, knobs={"checkpointing": "all"}, held_out=((123, 41),)),
    "locked text, same texts": Kind(knobs={"freeze": "text", "positives": "texts"}, held_out=((300, 80),)),
    "CoCa": Kind(changes=COCA, held_out=((300, 80),)),
    "ratio 4": Kind(knobs={"text_ratio": 4.0}, ratio=4.0, held_out=((400, 80),)),
    "distillation": Kind(has_teacher=True, held_out=((300, 80),)),
}
SCALAR_BYTES = 4
"""Of CoCa, whose sum of the caption loss lives a little longer in a composed window; all others are equal to the byte."""
EVALUATED = 23
"""Micro-batch of the evaluation after a held-out window."""


def make(folder: Path, kind: str, window: Window) -> Setting:
    """A setting of a small model, whose file is in the folder."""
    of_kind = KINDS[kind]
    own = window.cuts[0]
    is_traced = window in of_kind.traced
    knobs = dict(of_kind.knobs)
    if of_kind.has_teacher:
        knobs["distill_model"] = register(folder, "teacher", TEACHER)
    if of_kind.ratio is not None and is_traced:
        knobs["text_ratio"] = ANY_RATIO
    return make_setting(
        model=register(folder, kind.replace(" ", "-"), of_kind.changes, dropout=0.4),
        precision="bf16",
        micro_batch=own.size,
        accumulation=own.parts,
        eval_micro_batch=EVALUATED if kind == EVALUATION and not is_traced else None,
        **knobs,
    )


def built(factory: Callable[..., Any], setting: Setting, pairs: int, device: torch.device) -> Any:
    return factory(setting=setting.to_json(), samples=pairs, device=device)


def main() -> None:
    """Trace every kind at every window."""
    folder = Path(sys.argv[1])
    traces: dict[str, str] = {}
    for kind, of_kind in KINDS.items():
        factory = coupled_step.build_eval_step if kind == EVALUATION else coupled_step.build_step
        for window in (*of_kind.traced, *(of_kind.window(*each) for each in of_kind.held_out)):
            build = partial(built, factory, make(folder, kind, window), window.pairs)
            traced = trace_step(build, target=Target(capability=(8, 0)))
            traces[f"{kind} {window.pairs} {window.cuts[0].size}"] = traced.to_json()
    json.dump(traces, sys.stdout)


@dataclass(frozen=True, kw_only=True)
class Made:
    """Composed and traced windows of a kind."""

    composed: WindowTrace
    traced: dict[tuple[int, int], StoredTrace]
    """By pairs and micro-batch."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("clip")
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = json.loads(done.stdout)
    made: dict[str, Made] = {}
    for name, kind in KINDS.items():
        traced_at = [(window.pairs, window.cuts[0].size) for window in kind.traced]
        windows = (*traced_at, *kind.held_out)
        traced = {(n, m): StoredTrace.from_json(texts[f"{name} {n} {m}"]) for n, m in windows}
        window = align(traced[traced_at[0]], traced[traced_at[1]], kind.traced)
        assert window is not None, name
        made[name] = Made(composed=window, traced=traced)
    return made


def compositions(kinds: dict[str, Made], *, replayed: int | None) -> Iterator[tuple[str, ColumnTrace, ColumnTrace]]:
    """Held-out windows: name, composed, traced."""
    for name, kind in KINDS.items():
        made = kinds[name]
        for pairs, micro_batch in kind.held_out:
            evaluated = EVALUATED if name == EVALUATION else None
            window = kind.window(pairs, micro_batch)
            columns = made.composed.at(window, eval_micro_batch=evaluated, replayed=replayed)
            traced = ColumnTrace.of(made.traced[pairs, micro_batch])
            ops = ops_at(made.composed, window if evaluated is None else window.evaluated(evaluated))
            yield f"{name} {pairs} {micro_batch}", replace(traced, columns=columns, ops=ops), traced


def test_a_composed_window_allocates_and_frees_what_its_own_trace_does(kinds: dict[str, Made]) -> None:
    for name, made, traced in compositions(kinds, replayed=None):
        assert made.columns.peak_bytes() == pytest.approx(traced.columns.peak_bytes(), rel=0, abs=SCALAR_BYTES), name
        assert sorted(made.columns.nbytes) == sorted(traced.columns.nbytes)
        assert len(made.columns.events) == len(traced.columns.events)


def test_the_peak_is_exact_and_the_need_within_one_percent_where_not_every_repetition_is_replayed(
    kinds: dict[str, Made],
) -> None:
    for name, made, traced in compositions(kinds, replayed=1):
        assert made.columns.peak_bytes() == pytest.approx(traced.columns.peak_bytes(), rel=0, abs=SCALAR_BYTES), name
        composed_need, traced_need = (needed(each, GPU, AllocatorConfig()) for each in (made, traced))
        assert composed_need.high_bytes == pytest.approx(traced_need.high_bytes, rel=0.01)
        assert composed_need.low_bytes == pytest.approx(traced_need.low_bytes, rel=0.01)


def test_the_time_of_a_composed_window(kinds: dict[str, Made]) -> None:
    for name, made, traced in compositions(kinds, replayed=1):
        seconds = step_seconds(traced.ops, GPU).seconds
        tolerance = 0.3 if name.startswith("ratio") else 0.1  # of a model so small the kernels' starts are the time
        assert step_seconds(made.ops, GPU).seconds == pytest.approx(seconds, rel=tolerance), name


def test_a_stored_composition_reads_back(kinds: dict[str, Made]) -> None:
    made = kinds["ratio 4"].composed
    again = WindowTrace.from_record(json.loads(json.dumps(made.to_record())))
    window = KINDS["ratio 4"].window(700, 13)
    assert np.array_equal(again.at(window).nbytes, made.at(window).nbytes)
    assert ops_at(again, window) == ops_at(made, window)


def test_windows_that_differ_in_more_than_repetitions_are_not_composed(kinds: dict[str, Made]) -> None:
    windows = KINDS["training"].traced
    small_at, large_at = ((window.pairs, window.cuts[0].size) for window in windows)
    clip, siglip = (kinds[name].traced for name in ("training", EVALUATION))
    assert align(clip[small_at], siglip[large_at], windows) is None
    small = clip[small_at]
    largest = max(small.trace.tensors, key=lambda tensor: tensor.nbytes)
    odd = replace(largest, nbytes=largest.nbytes + 512)
    tensors = (*small.trace.tensors[: odd.id], odd, *small.trace.tensors[odd.id + 1 :])
    other = replace(small, trace=replace(small.trace, tensors=tensors))
    assert align(other, clip[large_at], windows) is None


def test_a_window_that_cannot_be_composed_is_traced_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = make(tmp_path, "training", KINDS["training"].window(256, 64))
    pricer = Pricer(gpu=GPU, cache=False)

    def make_window_traces(request: TraceRequest) -> Mapping[TraceRequest, None]:
        return {request: None}

    monkeypatch.setattr(composed, "make_window_traces", make_window_traces)
    asked: list[Setting] = []

    def get_trace(request: TraceRequest, **_options: object) -> StoredTrace:
        asked.append(request.setting)
        raise LookupError

    monkeypatch.setattr("trainfit.memory.priced.get_trace", get_trace)
    assert pricer.traces_each(setting)
    with pytest.raises(LookupError):
        pricer.reserved(setting)
    assert asked == [setting]


def test_a_plan_knows_that_its_last_micro_batch_is_smaller(
    kinds: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make(tmp_path, "training", KINDS["training"].window(300, 61))

    def make_window_traces(request: TraceRequest) -> Mapping[TraceRequest, WindowTrace]:
        return {request: kinds["training"].composed}

    monkeypatch.setattr(composed, "make_window_traces", make_window_traces)
    traced = Columns.of(kinds["training"].traced[300, 61].trace).peak_bytes()
    of_share, of_any = (
        Pricer(gpu=GPU, cache=False, share=share).columns(setting, "training").columns.peak_bytes()
        for share in (300, None)
    )
    assert of_share == traced < of_any


def test_the_package_answers_for_any_window(
    kinds: dict[str, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = make(tmp_path, "training", KINDS["training"].window(300, 300))
    pricer = Pricer(gpu=GPU, cache=False)
    request = pricer.request(setting, "training")
    name = shipped.entry_name(request)
    entries = {name: json.dumps(kinds["training"].composed.to_record())}
    archive = tmp_path / "model.tar.xz"
    write_archive(archive, entries | {shipped.SETTINGS: json.dumps({name: request.setting.to_json()})})

    def archive_path(_model: str) -> Path:
        return archive

    monkeypatch.setattr(shipped, "archive_path", archive_path)
    shipped.forget()
    monkeypatch.setattr(composed, "make_window_traces", None)  # nothing is traced
    for pairs, micro_batch in ((300, 300), (485, 97)):
        at = make(tmp_path, "training", KINDS["training"].window(pairs, micro_batch))
        made = pricer.columns(at, "training").columns
        assert made.peak_bytes() == Columns.of(kinds["training"].traced[pairs, micro_batch].trace).peak_bytes()
    assert pricer.known(setting)
    assert not pricer.known(make_setting(setting.model, precision="bf16", freeze="image"))
    shipped.forget()


def test_kernels_are_alike_where_the_heads_are_of_usual_sizes(tmp_path: Path) -> None:
    odd = {"vision_cfg": TINY["vision_cfg"] | {"head_width": 20}}
    text_tower = {"text_cfg": TINY["text_cfg"] | {"heads": 1, "width": 160}}
    cases = {"even": {}, "odd": odd, "large": text_tower, "caption": COCA}
    rtx_3060 = Pricer(gpu=find_gpu("RTX 3060"))
    found = {
        name: rtx_3060.request(make_setting(model=register(tmp_path, name, changes)), "training").capability
        for name, changes in cases.items()
    }
    assert found == {"even": (8, 0), "odd": (8, 6), "large": (8, 6), "caption": (8, 6)}
    assert packages_of(make_setting("clip:ViT-B-16-SigLIP")).keys() == {"torch", "open_clip_torch", "timm"}
    assert packages_of(make_setting("clip:ViT-B-32")).keys() == {"torch", "open_clip_torch"}


if __name__ == "__main__":
    main()
