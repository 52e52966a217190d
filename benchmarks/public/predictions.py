"""What trainfit predicts for a published row: by `memory.predict.assess`, as `trainfit predict` does it."""

from dataclasses import dataclass, replace

from benchmarks.public import traces
from benchmarks.public.rows import Case, Row

from trainfit.gpus.catalogue import MIB, find_gpu
from trainfit.gpus.context import ByteRange, cuda_context_bytes
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.allocator import replay
from trainfit.memory.predict import MemoryPrediction, assess, completed
from trainfit.timing.roofline import step_seconds
from trainfit.tracing.stored_trace import StoredTrace


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """A prediction of one row."""

    low_mib: float
    likely_mib: float
    high_mib: float
    seconds: float
    """Of the step."""
    under: tuple[bool, ...]
    """Whether it runs under each of the row's limits."""


def predict(row: Row) -> Predicted | None:
    """The prediction of a row; None where its step has no trace."""
    gpu = find_gpu(row.card)
    if row.quantity == "context":
        return _of(cuda_context_bytes())
    stored = None if row.case is None else _by_name(row.case)
    if stored is None:
        return None
    stored = replace(stored, trace=traces.at_batch(stored.trace, row.traced_batch, row.batch))
    begin = next((at for at, name in stored.trace.marks if name == f"window {row.after_step}"), 0)
    found = assess(stored, gpu, AllocatorConfig(), since=begin)
    low, likely, high = _quantity(row, found)
    lowest = completed(stored, gpu, upper=False).trace
    under = tuple(replay(lowest, capacity_bytes=int(cap.limit_mib * MIB)).oom is None for cap in row.caps)
    seconds = step_seconds(stored.ops, gpu).seconds
    return Predicted(low_mib=low, likely_mib=likely, high_mib=high, seconds=seconds, under=under)


_stored: dict[str, StoredTrace | None] = {}


def _by_name(case: Case) -> StoredTrace | None:
    if case.name not in _stored:
        _stored[case.name] = traces.load(case)
    return _stored[case.name]


def _of(size: ByteRange) -> Predicted:
    low, high = size.low_bytes / MIB, size.high_bytes / MIB
    return Predicted(low_mib=low, likely_mib=(low + high) / 2, high_mib=high, seconds=0, under=())


def _quantity(row: Row, found: MemoryPrediction) -> tuple[float, float, float]:
    """(low, likely, high) MiB of what the row measured."""
    context = cuda_context_bytes()
    reserved = (
        found.low_bytes - context.low_bytes,
        found.low_bytes - context.low_bytes,
        found.high_bytes - context.high_bytes,
    )
    if row.quantity == "allocated":
        allocated = found.profile.peak_allocated_bytes
        return allocated / MIB, allocated / MIB, allocated / MIB
    if row.quantity == "device_total":
        reserved = (found.low_bytes, found.low_bytes, found.high_bytes)
    low, likely, high = (size / MIB for size in reserved)
    return low, likely, high
