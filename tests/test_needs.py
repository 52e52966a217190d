"""What a step needs and what it takes, on traces whose answers can be computed by hand."""

from dataclasses import replace

import hypothesis
from hypothesis import strategies as st

from test_profile import make_trace
from trainfit.gpus.catalogue import MIB, find_gpu
from trainfit.gpus.context import ByteRange
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.allocator import replay
from trainfit.memory.columns import Columns
from trainfit.memory.errors import (
    DENSE,
    DEPTHWISE,
    FLOAT32_DEPTHWISE,
    FLOAT32_HYBRID,
    HYBRID,
    MATRIX_PRODUCTS,
    NEEDS_ERROR,
    ErrorClass,
    class_of,
)
from trainfit.memory.least import least_capacity_bytes
from trainfit.memory.predict import assess, is_likelier_to_fit, needed
from trainfit.memory.quick_replay import QuickReplay
from trainfit.timing.counts import OpCount
from trainfit.tracing.events import Category
from trainfit.tracing.stored_trace import StoredTrace

CONFIG = AllocatorConfig()
GPU = find_gpu("RTX 3090")


def count(op: str, flops: float, dtype: str = "bfloat16") -> OpCount:
    return OpCount(op=op, phase="forward", dtype=dtype, count=1, flops=flops, bytes=1)


def stored(sizes_mib: list[int], events: tuple[int, ...]) -> StoredTrace:
    rows: list[tuple[int, Category, str, str, str]] = [(n, "temporary", "op", "", "forward") for n in sizes_mib]
    return StoredTrace(trace=make_trace(rows, events), ops=())


def test_cached_blocks_are_taken_and_not_needed() -> None:
    """100 MiB, freed, then 300: the cache keeps the 100 where there is room, and gives them back where there is not."""
    step = stored([100, 300], (1, -1, 2, -2))
    found = assess(step, GPU, CONFIG)
    context = (found.takes_bytes - found.profile.peak_reserved_bytes) / MIB
    assert found.takes_bytes / MIB == 400 + context
    reserved = needed(step, GPU, CONFIG)
    assert reserved.low_bytes == 300 * MIB
    assert reserved.high_bytes / MIB <= 300 * (1 + NEEDS_ERROR) * 1.01
    assert replay(step.trace, capacity_bytes=reserved.high_bytes).retries == 1
    enough = replace(GPU, memory_bytes=found.needs.high_bytes)
    assert assess(step, enough, CONFIG).verdict == "fits"


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=25), life=st.integers(1, 6))
def test_the_least_capacity_survives(sizes: list[int], life: int) -> None:
    """And is between the peak of the tensors and what is reserved with memory enough."""
    n = len(sizes)
    events = [
        e
        for at in range(n + life)
        for e in ([at + 1] if at < n else []) + ([-(at - life + 1)] if 0 <= at - life < n else [])
    ]
    trace = stored(sizes, tuple(events)).trace
    free = replay(trace, capacity_bytes=None)
    low, high = free.peak_requested_bytes, free.peak_reserved_bytes
    least = least_capacity_bytes(QuickReplay(Columns.of(trace), CONFIG), low_bytes=low, high_bytes=high)
    assert low <= least <= high
    assert replay(trace, capacity_bytes=least).oom is None


def test_a_later_part_needs_no_less() -> None:
    step, larger = stored([100], (1,)), stored([400], (1,))
    before = needed(step, GPU, CONFIG)
    assert needed(step, GPU, CONFIG, at_least=needed(larger, GPU, CONFIG)) == needed(larger, GPU, CONFIG)
    assert needed(larger, GPU, CONFIG, at_least=before).low_bytes == 400 * MIB


def test_classes_follow_the_work() -> None:
    convolution, depthwise = count("aten.convolution", 90), count("aten.convolution.grouped1", 5)
    assert class_of((convolution,)) == DENSE
    assert class_of((convolution, depthwise)) == DEPTHWISE
    assert class_of((count("aten.mm", 900), convolution, depthwise)) == MATRIX_PRODUCTS  # ConvNeXt
    assert class_of((count("aten.mm", 100), convolution)) == HYBRID
    assert DENSE.above > HYBRID.above > DEPTHWISE.above > MATRIX_PRODUCTS.above


def test_float32_convolutions_may_ask_for_large_workspaces() -> None:
    """More upwards than downwards; products in float32 ask for none."""
    convolution, depthwise = count("aten.convolution", 90, "float32"), count("aten.convolution.grouped1", 5, "float32")
    assert class_of((convolution, depthwise)) == FLOAT32_DEPTHWISE
    assert class_of((count("aten.mm", 100, "float32"), convolution)) == FLOAT32_HYBRID
    assert class_of((count("aten.mm", 900, "float32"), convolution)) == MATRIX_PRODUCTS
    assert FLOAT32_DEPTHWISE.above > 3 * FLOAT32_DEPTHWISE.below


def test_an_error_of_a_prediction_bounds_the_measurement() -> None:
    """A prediction that is too low by 20 % of the measurement stands for 1.25 of it."""
    kind = ErrorClass(name="any", too_high=0.25, too_low=0.2)
    assert kind.below == 0.2
    assert kind.above == 0.25


def test_where_both_overlap_the_middles_say_which_is_likelier() -> None:
    budget = ByteRange(low_bytes=90, high_bytes=110)
    assert is_likelier_to_fit(ByteRange(low_bytes=80, high_bytes=100), budget)
    assert not is_likelier_to_fit(ByteRange(low_bytes=100, high_bytes=120), budget)


def test_what_is_taken_is_no_less_than_what_is_needed() -> None:
    """A kernel that may hold twice its 1,000 MiB output: what is needed may be more than the error of what is taken allows for."""
    rows: list[tuple[int, Category, str, str, str]] = [(1000, "temporary", "aten.sort", "", "forward")]
    found = assess(StoredTrace(trace=make_trace(rows, (1, -1)), ops=()), GPU, CONFIG)
    assert found.takes.high_bytes >= found.needs.high_bytes > 3000 * MIB


def test_what_is_taken_is_never_more_than_there_is() -> None:
    step = stored([1000, 2000], (1, -1, 2, -2))
    small = replace(GPU, memory_bytes=3000 * MIB)
    found = assess(step, small, CONFIG)
    assert found.oom is None
    assert found.takes.high_bytes <= small.memory_bytes + 200 * MIB  # the context's own range


def test_a_search_for_the_fastest_algorithm_empties_the_cache() -> None:
    """100 MiB freed, a convolution's 200, 200 more: the search gives the 100 back before the last are asked for."""
    rows: list[tuple[int, Category, str, str, str]] = [
        (100, "temporary", "op", "", "forward"),
        (200, "activations", "aten.convolution", "model.conv", "forward"),
        (200, "temporary", "op", "", "forward"),
    ]
    step = StoredTrace(trace=make_trace(rows, (1, -1, 2, 3, -3)), ops=())
    plain = assess(step, GPU, CONFIG).profile.peak_reserved_bytes
    searched = assess(step, GPU, AllocatorConfig(cudnn_benchmark=True)).profile.peak_reserved_bytes
    assert (plain, searched) == (500 * MIB, 400 * MIB)
