"""Estimates the time of a traced step on a card. The estimates rank settings; they are not accurate to milliseconds.

Every row of the counts is bound by its arithmetic or by its memory traffic, whichever takes longer at the card's published
rates times an efficiency; every kernel has a small overhead; and no step is faster than Python can launch it.

Known limits: one device, without communication; the data loader is assumed to keep up; the efficiencies were measured on two
cards with large micro-batches, and are scaled to other cards only by their rates (`STATED_ERRORS` has the known errors).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal, get_args

from trainfit.errors import TrainfitError
from trainfit.gpus.capability import Capability
from trainfit.gpus.catalogue import Gpu
from trainfit.models.family import DrawnSizes
from trainfit.step.names import MATMUL_PRECISION
from trainfit.timing.counts import FROM_HOST, MATMULS, TO_HOST, OpCount

Kind = Literal["tensor cores", "plain arithmetic", "memory", "launches", "optimizer", "host work"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ONCE = ("update", "optimizer")
"""Phases that run once per window."""
WIDE_GROUP = 33
"""Input channels per group from which a grouped convolution is slow. On an RTX 3090 (cuDNN 8.3, float16, channels_last)
swsl_resnext101_32x4d (4 to 32) runs at the speed of its bytes, regnetv_040 (64) at a hundredth of it."""


TF32_MATMULS = MATMUL_PRECISION == "high"
HOST_BYTES_PER_S = 3e9
"""Rate of copying tensors to host memory and computing on them there (EMA weights). Not measured: half of the rate of
pageable copies over PCIe 3.0 x16."""

PINNED_BYTES_PER_S = 10e9
"""Rate of copies to and from page-locked host memory. Not measured: the usual practical rate of PCIe 3.0 x16 or 4.0 x8, of
nominally 15.75 GB/s; a laptop's link may be half as wide."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Ratio of the measured time to the time at a card's published rates, for each class of work."""

    gpu: str
    """Catalogue name of the card it was measured on."""
    flops: float
    """Matrix products and convolutions: relative to their FLOPs at the rate of their data type."""
    memory: float
    """All operators: relative to their bytes at the card's bandwidth."""
    narrow_groups: float
    """Grouped convolutions with groups narrower than `WIDE_GROUP`, including depthwise ones: relative to their bytes."""
    wide_groups: float
    """Other grouped convolutions: relative to their bytes."""
    kernel_s: float
    """Seconds that the GPU is idle between two kernels."""
    host_s: float
    """Seconds that the CPU takes to launch a kernel; they overlap with the GPU's work."""


RTX_3090 = Efficiency(
    gpu="RTX 3090", flops=0.936, memory=1.65, narrow_groups=2.17, wide_groups=106, kernel_s=2.64e-6, host_s=8e-6
)
"""All but `host_s`: fitted by `benchmarks/timm_fit.py` to 109 timm models (torch 1.12, float16, channels_last; flops is
below 1 because the card runs above the clock that its rate is stated at). `host_s`: not measured; the middle of the usual
5 to 10 microseconds an operator of eager PyTorch."""


VOLTA = replace(RTX_3090, gpu="", flops=1.45)
"""float32 without TF32: fitted to 5 of 16 rows of Detectron2's zoo on V100s (those whose names' SHA-256 begins with 0 to 7), at
the mean of the sizes that its training draws; the others are judged by `benchmarks/public`."""
EFFICIENCIES: Mapping[Capability, Efficiency] = {(7, 0): VOLTA}
"""Efficiencies by CUDA capability; all other cards use that of the RTX 3090."""


@dataclass(frozen=True, kw_only=True)
class StatedError:
    """The error of predicted seconds against published ones."""

    median: float
    """Median of the absolute relative errors."""
    rows: int
    """Number of published measurements."""
    source: str
    """The published measurements, in words."""


STATED_ERRORS: Mapping[Capability, StatedError] = {
    (8, 6): StatedError(
        median=0.060, rows=119, source="timm models that were not used for fitting, RTX 3090, float16, torch 1.12"
    ),
    (7, 0): StatedError(
        median=0.133, rows=11, source="detectors of Detectron2's zoo that were not used for fitting, V100, float32"
    ),
}
"""Errors by CUDA capability, as `python -m benchmarks.public` prints them."""


def efficiency_of(gpu: Gpu) -> Efficiency:
    """The efficiencies that a card's times are predicted with."""
    return RTX_3090 if gpu.capability is None else EFFICIENCIES.get(gpu.capability, RTX_3090)


def stated_error(gpu: Gpu) -> StatedError | None:
    """The known error of predicted seconds on such a card; None if unknown: the seconds then only rank settings."""
    return None if gpu.capability is None else STATED_ERRORS.get(gpu.capability)


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """The time of a step and its parts, which add up to `seconds`."""

    seconds: float
    """Seconds of the whole step."""
    parts_s: dict[Kind, float]
    """Seconds by kind: "tensor cores": matrix products at a matrix unit's rate; "plain arithmetic": those without one;
    "memory": operators bound by memory bandwidth; "launches": between kernels, or waiting for Python; "optimizer": everything
    after backward; "host work": work on the host that the GPU waits for (`with_host_work`)."""
    bound: Kind
    """The largest part."""
    calibrated: bool
    """Whether the efficiencies were measured on this card, and not on another."""


@dataclass(frozen=True, kw_only=True)
class _Work:
    """The GPU's work in a part of a step."""

    parts_s: dict[Kind, float]
    """Seconds by kind of work."""
    kernels: float
    """Number of kernels."""

    def plus(self, other: "_Work", times: float = 1.0) -> "_Work":
        parts: dict[Kind, float] = {kind: self.parts_s[kind] + times * other.parts_s[kind] for kind in KINDS}
        return _Work(parts_s=parts, kernels=self.kernels + times * other.kernels)


_NOTHING = _Work(parts_s=dict.fromkeys(KINDS, 0.0), kernels=0)


def _work(ops: Iterable[OpCount], gpu: Gpu, efficiency: Efficiency) -> _Work:
    parts: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
    kernels = 0
    for row in ops:
        kind, seconds = _row_seconds(row, gpu, efficiency)
        parts[kind] += seconds
        kernels += row.count
    return _Work(parts_s=parts, kernels=kernels)


def _estimate(work: _Work, gpu: Gpu, efficiency: Efficiency) -> TimeEstimate:
    parts = dict(work.parts_s)
    parts["launches"] += work.kernels * efficiency.kernel_s
    parts["launches"] += max(0.0, work.kernels * efficiency.host_s - sum(parts.values()))
    return TimeEstimate(
        seconds=sum(parts.values()),
        parts_s=parts,
        bound=max(parts, key=lambda kind: parts[kind]),
        calibrated=gpu.name == efficiency.gpu,
    )


def _over_sizes(
    micro_batches: _Work, once: _Work, gpu: Gpu, efficiency: Efficiency, drawn: DrawnSizes | None
) -> TimeEstimate:
    """Mean time of a window over the image sizes; `once` is the work after backward, which is the same at every size."""
    if drawn is None:
        return _estimate(once.plus(micro_batches), gpu, efficiency)
    every = [_estimate(once.plus(_resized(micro_batches, pixels, drawn)), gpu, efficiency) for pixels in drawn.pixels]
    parts: dict[Kind, float] = {kind: fmean(each.parts_s[kind] for each in every) for kind in KINDS}
    bound = max(parts, key=lambda kind: parts[kind])
    return replace(every[0], seconds=sum(parts.values()), parts_s=parts, bound=bound)


def _resized(work: _Work, pixels: float, drawn: DrawnSizes) -> _Work:
    """The work at `pixels` times the pixels of the traced size, with the same number of kernels."""
    shares: dict[Kind, float] = {
        "tensor cores": drawn.flops_share,
        "plain arithmetic": drawn.flops_share,
        "memory": drawn.bytes_share,
    }
    parts: dict[Kind, float] = {kind: s * (1 - shares.get(kind, 0) * (1 - pixels)) for kind, s in work.parts_s.items()}
    return replace(work, parts_s=parts)


def step_seconds(
    ops: Iterable[OpCount], gpu: Gpu, *, drawn: DrawnSizes | None = None, efficiency: Efficiency | None = None
) -> TimeEstimate:
    """Estimate the time of a step from the counts of its trace; with `drawn`, the mean over the sizes of training.

    Raises:
        TrainfitError: for a card without rates.
    """
    if gpu.bandwidth_bytes_per_s is None or gpu.fp32_flops_per_s is None:
        raise TrainfitError(f"the rates of {gpu.name} are unknown, so time cannot be predicted; name a card with --gpu")
    ops = tuple(ops)
    efficiency = efficiency or efficiency_of(gpu)
    micro_batches = _work([row for row in ops if row.phase not in ONCE], gpu, efficiency)
    once = _work([row for row in ops if row.phase in ONCE], gpu, efficiency)
    return _over_sizes(micro_batches, once, gpu, efficiency, drawn)


def window_seconds(
    ops: tuple[Sequence[OpCount], Sequence[OpCount]],
    micro_batches: tuple[int, int],
    gpu: Gpu,
    *,
    cuts: Sequence[int],
    traced_accumulation: int,
    drawn: DrawnSizes | None = None,
    efficiency: Efficiency | None = None,
) -> TimeEstimate:
    """Time of a window that is cut into micro-batches of `cuts` images, from traces at two micro-batches.

    Both windows had `traced_accumulation` micro-batches; `gpu` must have rates. The time of a micro-batch is a line through
    the two, and the work done once per window (clipping, optimizer, EMA) is that of the larger. With `drawn`, the time is the
    mean over the sizes of training.
    """
    efficiency = efficiency or efficiency_of(gpu)
    small, large = micro_batches
    low, high = (_work([row for row in rows if row.phase not in ONCE], gpu, efficiency) for rows in ops)
    once = _work([row for row in ops[1] if row.phase in ONCE], gpu, efficiency)
    total = _NOTHING
    for images in cuts:
        share = (images - small) / (large - small)
        total = total.plus(high, share / traced_accumulation).plus(low, (1 - share) / traced_accumulation)
    return _over_sizes(total, once, gpu, efficiency, drawn)


def line_seconds(
    ops: tuple[Sequence[OpCount], Sequence[OpCount]],
    points: tuple[int, int],
    at: int,
    gpu: Gpu,
    *,
    efficiency: Efficiency | None = None,
) -> TimeEstimate:
    """Time of a step on the line through two steps; `gpu` must have rates. Faster than linear growth (the logits of a large
    window) is not modelled.
    """
    efficiency = efficiency or efficiency_of(gpu)
    low, high = (_work(rows, gpu, efficiency) for rows in ops)
    share = (at - points[0]) / (points[1] - points[0])
    return _estimate(_NOTHING.plus(high, share).plus(low, 1 - share), gpu, efficiency)


def _row_seconds(row: OpCount, gpu: Gpu, efficiency: Efficiency) -> tuple[Kind, float]:
    """The resource that bounds a row, and its seconds."""
    rate, tensor_cores = matrix_rate(row, gpu)
    arithmetic = efficiency.flops * row.flops / rate
    assert gpu.bandwidth_bytes_per_s is not None
    memory = _memory_factor(row, efficiency) * row.bytes / gpu.bandwidth_bytes_per_s
    if row.op.endswith(".to_host"):
        memory = row.bytes / HOST_BYTES_PER_S
    elif row.op.endswith((TO_HOST, FROM_HOST)):
        memory = row.bytes / PINNED_BYTES_PER_S
    kind: Kind = "memory"
    if row.phase in ONCE:
        kind = "optimizer"
    elif arithmetic > memory:
        kind = "tensor cores" if tensor_cores else "plain arithmetic"
    return kind, max(arithmetic, memory)


def _memory_factor(row: OpCount, efficiency: Efficiency) -> float:
    _, grouped, width = row.op.partition(".grouped")
    if not grouped:
        return efficiency.memory
    return efficiency.narrow_groups if int(width) < WIDE_GROUP else efficiency.wide_groups


def matrix_rate(row: OpCount, gpu: Gpu) -> tuple[float, bool]:
    """FLOP/s for a row's data type, and whether matrix units give them.

    float32 convolutions use TF32 (torch's default), and float32 matrix products too if training allows it
    (`step.names.MATMUL_PRECISION`; AMD's need an environment variable that trainfit does not set). Fused attention in float32,
    and types without a matrix unit, run at the float32 rate.
    """
    assert gpu.fp32_flops_per_s is not None
    if row.dtype == "float16":
        rate = gpu.fp16_flops_per_s
    elif row.dtype == "bfloat16":
        rate = gpu.bf16_flops_per_s
    else:
        as_tf32 = row.op.startswith("aten.convolution") or (TF32_MATMULS and gpu.gfx is None and row.op in MATMULS)
        rate = gpu.tf32_flops_per_s if as_tf32 else None
    return (gpu.fp32_flops_per_s, False) if rate is None else (rate, True)


def with_optimizer_work(estimate: TimeEstimate, seconds: float) -> TimeEstimate:
    """The estimate with `seconds` more of work once per window."""
    return _longer(estimate, "optimizer", seconds)


def with_host_work(estimate: TimeEstimate, seconds: float) -> TimeEstimate:
    """The estimate with `seconds` of work on the host that the GPU waits for."""
    return _longer(estimate, "host work", seconds)


def _longer(estimate: TimeEstimate, kind: Kind, seconds: float) -> TimeEstimate:
    parts = dict(estimate.parts_s)
    parts[kind] += seconds
    bound: Kind = max(parts, key=lambda each: parts[each])
    return replace(estimate, seconds=estimate.seconds + seconds, parts_s=parts, bound=bound)
