"""What trainfit predicts for a published row: by `memory.predict.assess`, as `trainfit predict` does it."""

from dataclasses import dataclass, replace

from benchmarks.public import traces
from benchmarks.public.rows import Case, Row

from trainfit.gpus.catalogue import MIB, Gpu, find_gpu
from trainfit.gpus.context import ByteRange, cuda_context_bytes
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.predict import MemoryPrediction, assess, needed
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
    needs_mib: tuple[float, float]
    """What the allocator needs to reserve, at least and at most: what a limit on it is compared with."""
    cause: str
    """Class of the step's errors (`memory.errors`), which is known before it runs."""


def predict(row: Row) -> Predicted | None:
    """The prediction of a row; None where its step has no trace."""
    gpu = find_gpu(row.card)
    if row.card_mib is not None:
        gpu = replace(gpu, memory_bytes=int(row.card_mib * MIB))
    # A context without a step is the source of its card's row in `gpus.context`, and no judge of it.
    stored = None if row.case is None else _by_name(row.case)
    if stored is None:
        return None
    stored = replace(stored, trace=traces.at_batch(stored.trace, row.traced_batch, row.batch))
    begin = next((at for at, name in stored.trace.marks if name == f"window {row.after_step}"), 0)
    config = AllocatorConfig()
    reserved = needed(stored, gpu, config)
    found = assess(stored, gpu, config, since=begin, reserved=reserved)
    size, likely_bytes = quantity_of(row, found, gpu)
    made = _of(size, likely_bytes, found.error.name)
    needs_mib = (reserved.low_bytes / MIB, reserved.high_bytes / MIB)
    seconds = step_seconds(stored.ops, gpu, drawn=row.drawn).seconds
    others = [predict(replace(row, case=case, bounds=())) for case in row.bounds]
    spanned = [made, *(other for other in others if other is not None)]
    return replace(
        made,
        low_mib=min(one.low_mib for one in spanned),
        high_mib=max(one.high_mib for one in spanned),
        seconds=seconds,
        needs_mib=needs_mib,
    )


_stored: dict[str, StoredTrace | None] = {}


def _by_name(case: Case) -> StoredTrace | None:
    if case.name not in _stored:
        _stored[case.name] = traces.load(case)
    return _stored[case.name]


def _of(size: ByteRange, likely_bytes: int, cause: str) -> Predicted:
    low, likely, high = (nbytes / MIB for nbytes in (size.low_bytes, likely_bytes, size.high_bytes))
    return Predicted(low_mib=low, likely_mib=likely, high_mib=high, seconds=0, needs_mib=(0, 0), cause=cause)


def quantity_of(row: Row, found: MemoryPrediction, gpu: Gpu) -> tuple[ByteRange, int]:
    """(interval, likeliest bytes) of what the row measured."""
    context, takes = cuda_context_bytes(gpu), found.takes
    if row.quantity == "allocated":
        return found.allocated, found.profile.peak_allocated_bytes
    if row.quantity == "device_total":
        return takes, found.takes_bytes
    # reserved, or the card's growth from a first sample that has the bare context
    low, high = takes.low_bytes - context.low_bytes, takes.high_bytes - context.high_bytes
    return ByteRange(low_bytes=low, high_bytes=high), found.takes_bytes - context.likely_bytes
