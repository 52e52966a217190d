"""Whether a setting fits a card, and what it will need. Nothing is measured and no torch is imported here."""

from dataclasses import dataclass, replace
from typing import Literal

from trainfit.gpus.capability import kernel_class
from trainfit.gpus.catalogue import Gpu
from trainfit.gpus.context import ByteRange, cuda_context_bytes
from trainfit.memory.allocator import AllocatorConfig, OutOfMemoryAt, Replay, replay
from trainfit.memory.columns import ColumnTrace
from trainfit.memory.errors import ALLOCATED_ERROR, NEEDS_ERROR, ErrorClass, class_of
from trainfit.memory.hidden import KERNEL_TEMPORARIES, Bound, Completed, HiddenRow, complete, hidden_rows, reserved_rows
from trainfit.memory.least import least_capacity_bytes
from trainfit.memory.profile import Profile, last_window, make_profile
from trainfit.memory.quick_replay import QuickReplay, history
from trainfit.models.setting import Setting
from trainfit.timing.roofline import TimeEstimate, step_seconds, window_seconds, with_host_work
from trainfit.tracing.events import Trace
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest

Traced = StoredTrace | ColumnTrace
Verdict = Literal["fits", "tight", "does not fit"]
BENCHMARK_OFF = "torch.backends.cudnn.benchmark is off, as torch leaves it."
RESERVE = 0.03
"""Share of what a process may have that a plan keeps free."""
_VERDICTS: tuple[Verdict, ...] = ("fits", "tight", "does not fit")


@dataclass(frozen=True, kw_only=True)
class MemoryPrediction:
    """What one process needs, what it takes when there is room, and whether it gets it. Both with the CUDA context."""

    needs: ByteRange
    """The least that it runs in: the allocator gives cached blocks back before it gives up, which stalls the GPU, and
    convolutions make do with smaller workspaces."""
    takes: ByteRange
    """What the driver shows for the process (nvidia-smi), where the card has the memory."""
    takes_bytes: int
    """The likeliest of these."""
    error: ErrorClass
    """How far the prediction may be off."""
    verdict: Verdict
    """fits: the top of `needs` is there; does not fit: not even its low end is; tight: anything between."""
    retries: int
    """How often the cache has to be emptied on the card; each stalls the GPU."""
    oom: OutOfMemoryAt | None
    """The allocation at which the replay on the card runs out of memory, or None."""
    profile: Profile
    """Profile of the replay on the card, or on a card with enough memory if the replay runs out of it."""
    hidden: tuple[HiddenRow, ...]
    """Memory that no trace shows."""
    time: TimeEstimate | None
    """Time of the last window; None for a card whose rates are not known."""
    made_up: tuple[str, ...]
    """Operators that needed a value which no trace knows."""
    upper_bounds: tuple[str, ...]
    """Operators among them that got the largest possible shape: a real step may need less."""

    @property
    def allocated(self) -> ByteRange:
        """Peak of what tensors and kernels' workspaces hold (`torch.cuda.max_memory_allocated`)."""
        peak = self.profile.peak_allocated_bytes
        within = max(r.high_bytes for r in self.hidden if r.name == KERNEL_TEMPORARIES)
        off = int(ALLOCATED_ERROR * peak)
        return ByteRange(low_bytes=peak - off, high_bytes=peak + off + within)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A setting on a card."""

    setting: Setting
    """The setting that the prediction is about."""
    gpu: Gpu
    """The card."""
    config: AllocatorConfig
    """Configuration of the allocator."""
    verdict: Verdict
    """The worse one of training and evaluation."""
    budget: ByteRange
    """What the process may have: the card's memory less the driver's share, or its set fraction."""
    training: MemoryPrediction
    """Memory and time of training."""
    evaluation: MemoryPrediction
    """Its profile is that of the evaluation; its needs include the training before it, in the same process."""
    assumptions: tuple[str, ...]
    """Sentences for the user."""

    @property
    def needs(self) -> ByteRange:
        """The least that training and evaluation run in."""
        return _largest(self.training.needs, self.evaluation.needs)

    @property
    def takes(self) -> ByteRange:
        """What training and evaluation take where the card has it."""
        return _largest(self.training.takes, self.evaluation.takes)


def has_reserve(needs: ByteRange, budget: ByteRange) -> bool:
    """Whether the top of what is needed leaves `RESERVE` of what there is for sure."""
    return needs.high_bytes <= (1 - RESERVE) * budget.low_bytes


def is_likelier_to_fit(needs: ByteRange, budget: ByteRange) -> bool:
    """What the middles say where the two overlap ("tight"); right in 35 of the 40 reruns of xMem that do."""
    return needs.low_bytes + needs.high_bytes <= budget.low_bytes + budget.high_bytes


def _largest(one: ByteRange, other: ByteRange) -> ByteRange:
    return ByteRange(low_bytes=max(one.low_bytes, other.low_bytes), high_bytes=max(one.high_bytes, other.high_bytes))


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
    training: Traced,
    evaluation: Traced,
    config: AllocatorConfig,
    gpus: int = 1,
    reserved: ByteRange | None = None,
    traced_accumulation: int | None = None,
) -> Prediction:
    """Predict from the traces that `trace_requests` names.

    Args:
        setting: What is predicted.
        gpu: The card.
        training: Its trace.
        evaluation: That of evaluation after it.
        config: The allocator's.
        gpus: Cards that train together, one process each.
        reserved: What `needed` says of training, if that is known.
        traced_accumulation: Micro-batches of a traced window, where it has fewer than the setting's.
    """
    training = ColumnTrace.of(training)
    evaluation = ColumnTrace.of(evaluation)
    reserved = reserved or needed(training, gpu, config)
    trained = assess(training, gpu, config, gpus=gpus, reserved=reserved)
    if trained.time is not None:
        size = setting.micro_batch
        mean = window_seconds(
            (training.ops, training.ops),
            (size, size + 1),
            gpu,
            cuts=(size,) * setting.accumulation,
            traced_accumulation=traced_accumulation or setting.accumulation,
            drawn=setting.family.drawn_sizes(setting),
        )
        waits = setting.accumulation * setting.family.host_seconds(setting, setting.micro_batch, gpu.capability)
        trained = replace(trained, time=with_host_work(mean, waits))
    after = needed(evaluation, gpu, config, at_least=reserved)  # training came before it
    since = last_window(evaluation.columns)
    evaluated = assess(evaluation, gpu, config, since=since, gpus=gpus, reserved=after)
    return Prediction(
        setting=setting,
        gpu=gpu,
        config=config,
        verdict=_VERDICTS[max(_VERDICTS.index(part.verdict) for part in (trained, evaluated))],
        budget=process_budget(gpu, config, gpus),
        training=trained,
        evaluation=evaluated,
        assumptions=_assumptions(setting, gpu, config, gpus),
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
    room = allocator_room(gpu, config, gpus)
    context = cuda_context_bytes(gpu)
    return ByteRange(low_bytes=room.low_bytes + context.high_bytes, high_bytes=room.high_bytes + context.low_bytes)


def needed(traced: Traced, gpu: Gpu, config: AllocatorConfig, *, at_least: ByteRange | None = None) -> ByteRange:
    """What the allocator needs to reserve for a trace to run, as `assess` takes it; of the card only its workspaces count.

    `at_least`: what a part of the same process needs; where that is enough for the trace too, it is the answer.
    """
    high = completed(traced, gpu, bound="needed")
    low = replace(high.columns, nbytes=high.least_bytes)
    step = QuickReplay(low, config, most_bytes=high.columns.nbytes)
    if at_least is not None and step.with_most.survives(at_least.high_bytes):
        return at_least
    peak = step.peak_requested_bytes
    least = top = least_capacity_bytes(step, low_bytes=peak, high_bytes=step.peak_reserved_bytes)
    if not step.survives_with_most(least):
        most_bytes = max(least, step.with_most.peak_reserved_bytes)
        top = least_capacity_bytes(step.with_most, low_bytes=least, high_bytes=most_bytes)
    return ByteRange(
        low_bytes=max(peak, int((1 - NEEDS_ERROR) * least)),
        high_bytes=int((1 + NEEDS_ERROR) * top),
    )


def with_context(reserved: ByteRange, gpu: Gpu) -> ByteRange:
    """What the process needs where its allocator reserves so much."""
    context = cuda_context_bytes(gpu)
    return ByteRange(
        low_bytes=reserved.low_bytes + context.low_bytes, high_bytes=reserved.high_bytes + context.high_bytes
    )


def assess(
    stored: Traced,
    gpu: Gpu,
    config: AllocatorConfig,
    *,
    since: int = 0,
    gpus: int = 1,
    reserved: ByteRange | None = None,
) -> MemoryPrediction:
    """Replay a trace at the card's real capacity, and judge by what it needs.

    Args:
        stored: The trace.
        gpu: The card.
        config: The allocator's.
        since: Event of the stored trace from which the profile seeks its peak.
        gpus: Cards that train together, one process each.
        reserved: What `needed` says of the trace, if that is known.
    """
    stored = ColumnTrace.of(stored)
    low, high = (completed(stored, gpu, bound=bound) for bound in ("least", "most"))
    room = allocator_room(gpu, config, gpus)
    tried = history(low.columns, config, capacity_bytes=room.high_bytes, device_bytes=gpu.memory_bytes)
    likely = tried if tried.oom is None else history(low.columns, config, capacity_bytes=None)
    reserved = reserved or needed(stored, gpu, config)
    error = class_of(stored.ops)
    verdict: Verdict = "tight"
    if reserved.high_bytes <= room.low_bytes:
        verdict = "fits"
    elif reserved.low_bytes > room.high_bytes:
        verdict = "does not fit"
    peak = likely.peak_reserved_bytes
    context = cuda_context_bytes(gpu)
    least = max(likely.peak_allocated_bytes, int((1 - error.below) * peak))
    most = max(int((1 + error.above) * peak), reserved.high_bytes)  # it takes no less than it needs
    if tried.oom is None:  # it cannot take more than there is
        most = max(peak, min(most, room.high_bytes))
    return MemoryPrediction(
        needs=with_context(reserved, gpu),
        takes=ByteRange(low_bytes=least + context.low_bytes, high_bytes=most + context.high_bytes),
        takes_bytes=peak + context.likely_bytes,
        error=error,
        verdict=verdict,
        retries=tried.retries,
        oom=tried.oom,
        profile=make_profile(low.columns, likely, since=int(low.begins[since])),
        hidden=(*hidden_rows(gpu, gpus), *reserved_rows(low, high, reserved_bytes=peak, error=error)),
        time=step_seconds(stored.ops, gpu) if gpu.bandwidth_bytes_per_s and gpu.fp32_flops_per_s else None,
        made_up=stored.made_up,
        upper_bounds=stored.upper_bounds,
    )


def completed(traced: Traced, gpu: Gpu, *, bound: Bound) -> Completed:
    """The trace with what kernels and libraries allocate on the card; see `hidden.complete`."""
    traced = ColumnTrace.of(traced)
    dtypes = {row.dtype for row in traced.ops if row.op.startswith("aten.convolution")}
    return complete(traced.columns, gpu, bound=bound, half_precision="float32" not in dtypes)


def replay_on(gpu: Gpu, trace: Trace, config: AllocatorConfig, gpus: int = 1) -> Replay:
    """Replay with all the memory that the process may get."""
    return replay(
        trace,
        capacity_bytes=allocator_room(gpu, config, gpus).high_bytes,
        config=config,
        device_bytes=gpu.memory_bytes,
        timeline=True,
    )


def _assumptions(setting: Setting, gpu: Gpu, config: AllocatorConfig, gpus: int) -> tuple[str, ...]:
    # 1152 MiB: an RTX 5060 Ti on Windows (llama.cpp log: 16,310 MiB in all, 15,158 free before any training).
    lines = ["One process, the card to itself (a desktop may hold 1.1 GiB: --memory); evaluation follows training."]
    lines.append("torch.backends.cudnn.benchmark is on." if config.cudnn_benchmark else BENCHMARK_OFF)
    if gpus > 1:
        lines.append(f"{gpus} GPUs of one machine, a process each: NCCL's buffers are bounds, not measurements.")
    lines += setting.family.assumptions(setting)
    if gpu.capability is None:
        lines.append("Compute capability unknown: kernels are those of capability 8.0.")
    if gpu.memory_is_nominal:
        lines.append("The card's memory is nominal: the driver's share is not known.")
    return tuple(lines)
