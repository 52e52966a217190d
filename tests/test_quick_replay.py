"""The quick replay, in C and in Python, against the allocator's: what it reserves, and at which capacities a trace survives, to
the byte.
"""

import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.allocator import replay
from trainfit.memory.archive import read_archive
from trainfit.memory.columns import Columns
from trainfit.memory.least import least_capacity_bytes
from trainfit.memory.native_loop import COMPILERS, NativeLoop, native_function
from trainfit.memory.python_loop import UNLIMITED, Ended, Events, PythonLoop
from trainfit.memory.quick_replay import QuickReplay, history
from trainfit.memory.scaling import ScaledTrace
from trainfit.memory.shipped import archive_path
from trainfit.tracing.events import TensorInfo, Trace

MIB = 2**20
CONFIGS = [
    AllocatorConfig(),
    AllocatorConfig(roundup_power2_divisions=4),
    AllocatorConfig(expandable_segments=True),
    AllocatorConfig(large_segment_size_bytes=30 * MIB),
    AllocatorConfig(per_process_memory_fraction=0.7),
]


needs_compiler = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C compiler")


@pytest.fixture(autouse=True, scope="module", params=[pytest.param(NativeLoop, marks=needs_compiler), PythonLoop])
def loop(request: pytest.FixtureRequest) -> Iterator[type[NativeLoop] | type[PythonLoop]]:
    """What the replays of a test run in."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param is PythonLoop:
            patch.setattr("trainfit.memory.quick_replay.native_function", lambda: None)
        else:
            assert native_function() is not None
        yield request.param


def random_trace(seed: int) -> Trace:
    """Small and large tensors on one or two streams, empty ones too; some freed at once, some never."""
    draw = random.Random(seed)
    sizes = [draw.choice([1, 700, 512 * 900, MIB, MIB + 1, 3 * MIB, 10 * MIB, 33 * MIB]) for _ in range(12)]
    tensors: list[TensorInfo] = []
    events: list[int] = []
    live: list[int] = []
    streams = draw.choice([1, 2])
    for _ in range(draw.randint(1, 300)):
        if live and draw.random() < 0.45:
            events.append(-live.pop(draw.randrange(len(live))))
            continue
        nbytes = 0 if draw.random() < 0.05 else draw.choice(sizes) + draw.choice([0, 0, 512, 5000])
        tensors.append(TensorInfo(id=len(tensors), nbytes=nbytes, stream=draw.randrange(streams)))
        events.append(len(tensors))
        if draw.random() < 0.1:
            events.append(-len(tensors))
        else:
            live.append(len(tensors))
    return Trace(tensors=tuple(tensors), events=tuple(events))


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(seed=st.integers(0, 10**9), config=st.sampled_from(CONFIGS), shares=st.lists(st.floats(0.3, 1.1)))
def test_it_survives_what_the_allocator_survives(seed: int, config: AllocatorConfig, shares: list[float]) -> None:
    trace = random_trace(seed)
    free, quick = replay(trace, capacity_bytes=None, config=config), QuickReplay(Columns.of(trace), config)
    assert quick.peak_requested_bytes == free.peak_requested_bytes
    assert quick.peak_reserved_bytes == free.peak_reserved_bytes
    for share in shares:
        capacity = int(share * free.peak_reserved_bytes) + 1
        survives = replay(trace, capacity_bytes=capacity, config=config).oom is None
        assert quick.survives(capacity) == survives
        assert (
            QuickReplay(Columns.of(trace), config).survives(capacity) == survives
        )  # without what the free replay left


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(seed=st.integers(0, 10**9), config=st.sampled_from(CONFIGS), share=st.none() | st.floats(0.3, 1.1))
def test_the_history_is_the_allocators(seed: int, config: AllocatorConfig, share: float | None) -> None:
    """Event by event, with the retries and where memory runs out."""
    trace = random_trace(seed)
    peak = replay(trace, capacity_bytes=None, config=config).peak_reserved_bytes
    capacity = None if share is None else int(share * peak) + 1
    true = replay(trace, capacity_bytes=capacity, config=config, device_bytes=2 * peak + 1, timeline=True)
    made = history(Columns.of(trace), config, capacity_bytes=capacity, device_bytes=2 * peak + 1)
    assert made.allocated_timeline.tolist() == list(true.allocated_timeline)
    assert made.reserved_timeline.tolist() == list(true.reserved_timeline)
    for name in ("peak_allocated_bytes", "retries", "oom"):
        assert getattr(made, name) == getattr(true, name), name
    assert true.oom or made.peak_reserved_bytes == true.peak_reserved_bytes


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(seed=st.integers(0, 10**9), shares=st.lists(st.floats(0.3, 1.1), min_size=1), data=st.data())
def test_one_replay_answers_for_temporaries_of_two_sizes(seed: int, shares: list[float], data: st.DataObject) -> None:
    """Tensors that are freed at once, with more bytes: as the allocator replays the trace that has these."""
    trace = random_trace(seed)
    most = list(trace.tensors)
    for event, after in pairwise(trace.events):
        if event == -after and event > 0:
            more = data.draw(st.sampled_from([0, 512, MIB, 9 * MIB, 40 * MIB]))
            most[event - 1] = replace(most[event - 1], nbytes=most[event - 1].nbytes + more)
    larger = replace(trace, tensors=tuple(most))
    quick = QuickReplay(Columns.of(trace), AllocatorConfig(), most_bytes=Columns.of(larger).nbytes)
    peak = quick.peak_reserved_bytes
    assert peak == replay(trace, capacity_bytes=None).peak_reserved_bytes
    for share in shares:
        capacity = int(share * peak) + 1
        assert quick.survives(capacity) == (replay(trace, capacity_bytes=capacity).oom is None)
        assert quick.survives_with_most(capacity) == (replay(larger, capacity_bytes=capacity).oom is None)


def test_a_models_training_survives_where_the_allocator_does() -> None:
    """25,000 tensors, from the archive whatever its validity; capacities between what is asked for and what is reserved."""
    archive = read_archive(archive_path("rfdetr-nano"))
    name = next(name for name in archive.names if "training" in name and "any" in name and "laws" not in name)
    columns = ScaledTrace.from_record(archive.record(name)).at(3)
    trace = columns.trace()
    free, quick = replay(trace, capacity_bytes=None), QuickReplay(columns, AllocatorConfig())
    low, high = free.peak_requested_bytes, free.peak_reserved_bytes
    assert (quick.peak_requested_bytes, quick.peak_reserved_bytes) == (low, high)
    draw = random.Random(0)
    for capacity in (draw.randint(low, high) for _ in range(12)):
        assert quick.survives(capacity) == (replay(trace, capacity_bytes=capacity).oom is None)
    least = least_capacity_bytes(quick, low_bytes=low, high_bytes=high)
    assert replay(trace, capacity_bytes=least).oom is None


def test_capacities_that_no_segment_tells_apart_share_a_replay(
    loop: type[NativeLoop] | type[PythonLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four large tensors of 40 MiB, one after another: from 80 to 120 MiB, the third is the first that does not fit."""
    tensors = tuple(TensorInfo(id=number, nbytes=40 * MIB) for number in range(4))
    quick = QuickReplay(Columns.of(Trace(tensors=tensors, events=(1, 2, 3, 4))), AllocatorConfig())
    replayed: list[int] = []
    run = loop.run

    def counted(self: NativeLoop | PythonLoop, limit: int) -> Ended:
        replayed.append(limit)
        return run(self, limit)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(loop, "run", counted)
    capacities = [80, 119, 100, 160, 200, 81]
    assert [quick.survives(each * MIB) for each in capacities] == [False, False, False, True, True, False]
    assert len(replayed) == 2


@needs_compiler
@pytest.mark.parametrize("ops", [[~0], [0, ~0, ~0], [0, ~1]])
def test_a_trace_that_frees_what_is_not_there_is_refused(ops: list[int]) -> None:
    """In C, where it would read and write memory that is not the replay's."""
    ones = np.ones(4, dtype=np.int64)
    events = Events(ops=np.array(ops), tensors=2, sizes=ones, pools=0 * ones, pool_count=1, has_missed=False)
    with pytest.raises(ValueError, match="not allocated"):
        NativeLoop(events, native_function()).run(UNLIMITED)


@pytest.mark.parametrize("compiler", ["missing", "failing", "writing no library"])
def test_without_a_compiler_that_works_replays_run_in_python(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    if compiler != "missing":
        program = programs / "cc"
        program.write_text("#!/bin/sh\n" + ("exit 1" if compiler == "failing" else 'echo no library > "$5"') + "\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native_function.cache_clear()
    try:
        assert native_function() is None
    finally:
        native_function.cache_clear()


@needs_compiler
def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_function.cache_clear()
    assert native_function() is not None
    (library,) = (tmp_path / "trainfit" / "native").iterdir()
    native_function.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert native_function() is not None, f"{library} is loaded without a compiler"
    native_function.cache_clear()
