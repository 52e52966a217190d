"""Whether a setting fits a card, and what it will need. Nothing is measured and no torch is imported here."""

from dataclasses import dataclass, replace
from typing import Literal

from trainfit.gpus.capability import kernel_class
from trainfit.gpus.catalogue import Gpu
from trainfit.gpus.context import ByteRange, cuda_context_bytes
from trainfit.memory.allocator import AllocatorConfig, OutOfMemoryAt, Replay, replay
from trainfit.memory.hidden import MODEL_ERROR, Completed, HiddenRow, complete, hidden_rows, reserved_rows
from trainfit.memory.profile import Profile, last_window, make_profile
from trainfit.models.setting import Setting
from trainfit.timing.roofline import TimeEstimate, step_seconds, with_host_work
from trainfit.tracing.events import Trace
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest

Verdict = Literal["fits", "tight", "does not fit"]
_VERDICTS: tuple[Verdict, ...] = ("fits", "tight", "does not fit")


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """What one process needs, and whether it gets it."""

    low_bytes: int
    """CUDA context and reserved memory with every unknown at its smallest. If the card has less than the allocator would
    like to keep, this is what it lives with after giving cached blocks back."""
    high_bytes: int
    """The same with every unknown at its largest, and nothing given back."""
    verdict: Verdict
    """fits: `high_bytes` are there; does not fit: out of memory at the lowest; tight: anything between."""
    retries: int
    """How often the cache has to be emptied at `low_bytes`; each stalls the GPU."""
    oom: OutOfMemoryAt | None
    """Where it runs out of memory at the lowest, if it does."""
    profile: Profile
    """At the lowest; of a card with memory enough, if it does not fit."""
    hidden: tuple[HiddenRow, ...]
    time: TimeEstimate | None
    """Of the last window; None for a card whose rates are not known."""
    made_up: tuple[str, ...]
    """Operators that needed a value which no trace knows."""
    upper_bounds: tuple[str, ...]
    """Those of them that got the largest shape: a real step may need less than `low_bytes`."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A setting on a card."""

    setting: Setting
    gpu: Gpu
    config: AllocatorConfig
    verdict: Verdict
    """The worse one of training and evaluation."""
    budget: ByteRange
    """What the process may have: the card's memory less the driver's share, or its set fraction."""
    training: MemoryPrediction
    evaluation: MemoryPrediction
    """Its profile is that of the evaluation; its needs include the training before it, in the same process."""
    assumptions: tuple[str, ...]
    """Sentences for the user."""

    @property
    def needs(self) -> ByteRange:
        """Of training and evaluation."""
        parts = (self.training, self.evaluation)
        return ByteRange(low_bytes=max(p.low_bytes for p in parts), high_bytes=max(p.high_bytes for p in parts))


def trace_requests(
    setting: Setting, gpu: Gpu, *, device: Literal["cuda", "cpu"] = "cuda"
) -> tuple[TraceRequest, TraceRequest]:
    """The traces that a prediction wants: training, evaluation."""
    capability = kernel_class(gpu.capability)
    alone = replace(setting, eval_micro_batch=None)
    return (
        TraceRequest(setting=alone, part="training", capability=capability, device=device),
        TraceRequest(setting=setting, part="evaluation", capability=capability, device=device),
    )


def predict_traced(
    setting: Setting,
    gpu: Gpu,
    *,
    training: StoredTrace,
    evaluation: StoredTrace,
    config: AllocatorConfig,
    gpus: int = 1,
) -> Prediction:
    """Predict from the traces that `trace_requests` names. A pure function."""
    trained = assess(training, gpu, config, gpus=gpus)
    if trained.time is not None:
        mean = step_seconds(training.ops, gpu, drawn=setting.family.drawn_sizes(setting))
        waits = setting.accumulation * setting.family.host_seconds(setting, setting.micro_batch, gpu.capability)
        trained = replace(trained, time=with_host_work(mean, waits))
    evaluated = assess(evaluation, gpu, config, since=last_window(evaluation.trace), gpus=gpus)
    return Prediction(
        setting=setting,
        gpu=gpu,
        config=config,
        verdict=_VERDICTS[max(_VERDICTS.index(part.verdict) for part in (trained, evaluated))],
        budget=process_budget(gpu, config, gpus),
        training=trained,
        evaluation=evaluated,
        assumptions=_assumptions(setting, gpu, gpus),
    )


def allocator_room(gpu: Gpu, config: AllocatorConfig, gpus: int = 1) -> ByteRange:
    """What the driver can give to the caching allocator for the step, at worst and at best, on one of `gpus` cards."""
    taken_low = sum(row.low_bytes for row in hidden_rows(gpu, gpus))
    taken_high = sum(row.high_bytes for row in hidden_rows(gpu, gpus))
    share = config.per_process_memory_fraction
    limit = gpu.memory_bytes if share is None else int(gpu.memory_bytes * share)
    return ByteRange(
        low_bytes=max(0, min(limit, gpu.memory_bytes - taken_high)),
        high_bytes=max(0, min(limit, gpu.memory_bytes - taken_low)),
    )


def process_budget(gpu: Gpu, config: AllocatorConfig, gpus: int = 1) -> ByteRange:
    """What one process may have of the card, its CUDA context included, at worst and at best."""
    room, context = allocator_room(gpu, config, gpus), cuda_context_bytes()
    return ByteRange(low_bytes=room.low_bytes + context.high_bytes, high_bytes=room.high_bytes + context.low_bytes)


def needed(stored: StoredTrace, gpu: Gpu, config: AllocatorConfig) -> ByteRange:
    """What `MemoryPrediction` says of a trace on a card with memory enough, by two replays alone."""
    low, high = (
        replay(completed(stored, gpu, upper=upper).trace, capacity_bytes=None, config=config).peak_reserved_bytes
        for upper in (False, True)
    )
    context = cuda_context_bytes()
    return ByteRange(
        low_bytes=low + context.low_bytes, high_bytes=max(low, high) + int(MODEL_ERROR * low) + context.high_bytes
    )


def assess(
    stored: StoredTrace, gpu: Gpu, config: AllocatorConfig, *, since: int = 0, gpus: int = 1
) -> MemoryPrediction:
    """Replay a trace at the card's real capacity, unknowns at their lowest and at their highest.

    `since`: event of the stored trace from which the profile seeks its peak.
    """
    low, high = completed(stored, gpu, upper=False), completed(stored, gpu, upper=True)
    tried = replay_on(gpu, low.trace, config, gpus)
    likely = tried if tried.oom is None else replay(low.trace, capacity_bytes=None, config=config, timeline=True)
    worst = replay(high.trace, capacity_bytes=None, config=config)
    low_reserved = likely.peak_reserved_bytes
    inserted = reserved_rows(low, high, low_bytes=low_reserved, high_bytes=worst.peak_reserved_bytes)
    high_reserved = low_reserved + sum(row.high_bytes - row.low_bytes for row in inserted)
    verdict: Verdict = "tight"
    if high_reserved <= allocator_room(gpu, config, gpus).low_bytes:
        verdict = "fits"
    elif tried.oom is not None:
        verdict = "does not fit"
    context = cuda_context_bytes()
    return MemoryPrediction(
        low_bytes=low_reserved + context.low_bytes,
        high_bytes=high_reserved + context.high_bytes,
        verdict=verdict,
        retries=tried.retries,
        oom=tried.oom,
        profile=make_profile(low.trace, likely, since=low.begins[since]),
        hidden=(*hidden_rows(gpu, gpus), *inserted),
        time=step_seconds(stored.ops, gpu) if gpu.bandwidth_bytes_per_s and gpu.fp32_flops_per_s else None,
        made_up=stored.made_up,
        upper_bounds=stored.upper_bounds,
    )


def completed(stored: StoredTrace, gpu: Gpu, *, upper: bool) -> Completed:
    """The trace with what kernels and libraries allocate on the card; see `hidden.complete`."""
    dtypes = {row.dtype for row in stored.ops if row.op.startswith("aten.convolution")}
    return complete(stored.trace, gpu, upper=upper, half_precision="float32" not in dtypes)


def replay_on(gpu: Gpu, trace: Trace, config: AllocatorConfig, gpus: int = 1) -> Replay:
    """With all the memory that the process may get."""
    return replay(
        trace,
        capacity_bytes=allocator_room(gpu, config, gpus).high_bytes,
        config=config,
        device_bytes=gpu.memory_bytes,
        timeline=True,
    )


def _assumptions(setting: Setting, gpu: Gpu, gpus: int) -> tuple[str, ...]:
    # 1152 MiB: an RTX 5060 Ti on Windows (llama.cpp log: 16,310 MiB in all, 15,158 free before any training).
    lines = ["One process, the card to itself (a desktop may hold 1.1 GiB: --memory); evaluation follows training."]
    if gpus > 1:
        lines.append(f"{gpus} GPUs of one machine, a process each: NCCL's buffers are bounds, not measurements.")
    lines += setting.family.assumptions(setting)
    if gpu.capability is None:
        lines.append("Compute capability unknown: kernels are those of capability 8.0.")
    if gpu.memory_is_nominal:
        lines.append("The card's memory is nominal: the driver's share is not known.")
    return tuple(lines)
