"""Makes a plan from a setting and a card: the library's side of `trainfit plan`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, Literal

from trainfit.errors import TrainfitError
from trainfit.gpus.capability import auto_precision, has_bf16
from trainfit.gpus.catalogue import GIB, MIB, Gpu
from trainfit.gpus.context import ByteRange
from trainfit.gpus.rated import RATES_LIKE, rated
from trainfit.measuring.calibration import Calibration, load
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.predict import Prediction, process_budget
from trainfit.memory.priced import Pricer
from trainfit.memory.shipped import why_unused
from trainfit.models.setting import Setting
from trainfit.planning.candidates import describe, frontier, least_of
from trainfit.planning.nearest import nearest, needs_text
from trainfit.planning.objects import objects_lines
from trainfit.planning.plan import Loading, Plan, SearchRequest, SearchResult
from trainfit.planning.rates import learning_rate
from trainfit.planning.search import search
from trainfit.step.names import Checkpointing
from trainfit.timing.roofline import TimeEstimate, with_optimizer_work
from trainfit.tracing.trace_cache import prepare_tracing
from trainfit.training.headroom import IN_MEMORY_BYTES
from trainfit.training.recipe import batch_of

LINK_BYTES_PER_S = 10e9
"""Rate between GPUs in each direction: the usual practical rate of PCIe 4.0 x8 to x16. Not measured; NVLink is faster."""
TRAINER_BYTES = 3 * GIB
"""Host memory of the trainer with CUDA's libraries."""
WORKER_BYTES = 150 * MIB
"""Host memory of a loader process, without what it shares with the trainer (23 MiB measured on Linux before it decodes
anything; the rest is for decoding)."""
PREFETCH = 2
"""Windows that are being made or wait, for each worker, as in the loader (`training.workers`)."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A `prices.Prices` corrected by what was measured on the card."""

    pricer: Pricer
    """Predicts without the measurements."""
    calibration: Calibration | None
    """Ratios of measured to predicted figures; None if nothing was measured on the card."""

    def needs(self, setting: Setting) -> ByteRange:
        """The predicted need, its high end raised by the ratio with which measured runs exceeded their predictions."""
        needs = self.pricer.needs(setting)
        factor = self.calibration.reserved_factors[1] if self.calibration else 1.0
        return replace(needs, high_bytes=max(needs.high_bytes, ceil(factor * needs.low_bytes)))

    def least(self, setting: Setting) -> int:
        """The lower bound of the predicted need; measurements do not change it."""
        return self.pricer.least(setting)

    def seconds(
        self, setting: Setting, cuts: Sequence[int], part: Literal["training", "evaluation"] = "training"
    ) -> TimeEstimate:
        """The predicted time, times the measured factor."""
        estimate = self.pricer.seconds(setting, cuts, part)
        factor = (self.calibration.time_factor if self.calibration else None) or 1.0
        return (
            estimate
            if factor == 1
            else replace(with_optimizer_work(estimate, (factor - 1) * estimate.seconds), calibrated=True)
        )

    def predict(self, setting: Setting, cuts: Sequence[int]) -> Prediction:
        """The prediction, with the corrected time."""
        prediction = self.pricer.predict(setting, cuts)
        return replace(prediction, training=replace(prediction.training, time=self.seconds(setting, cuts)))

    def blocks(self, setting: Setting) -> int:
        """Number of blocks that activation checkpointing may recompute."""
        return self.pricer.blocks(setting)

    def traces_each(self, setting: Setting) -> bool:
        """As the pricer."""
        return self.pricer.traces_each(setting)

    def known(self, setting: Setting) -> bool:
        """Whether `needs` returns without tracing."""
        return self.pricer.known(setting)


def make_plan(
    setting: Setting,
    gpu: Gpu,
    *,
    effective_batch: int | None = None,
    gpus: int = 1,
    micro_batch: int | None = None,
    checkpointing: Checkpointing | None = None,
    allow: tuple[str, ...] = (),
    config: AllocatorConfig | None = None,
    cache: bool = True,
    decode_s: float | None = None,
    cores: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Plan the fastest setting that fits a card.

    Args:
        setting: Knobs as wanted; its micro-batch, accumulation and checkpointing do not count.
        gpu: The card; `memory_bytes` is what may be used of it.
        effective_batch: Images per optimizer step over all GPUs; held exactly. 16 unless given, where the family has a default.
        gpus: Cards of this kind, one process each.
        micro_batch: Plan with this one alone.
        checkpointing: Plan with this alone.
        allow: Of `Family.learns`, what may be turned where nothing fits otherwise.
        config: The allocator's; by default torch's.
        cache: Store traces, and use stored ones.
        decode_s: Seconds that one worker takes for one image; None where no data set was given.
        cores: The machine's, for its loader processes; None: unknown, and workers are then no part of what training takes.
        note: Called with a line before anything that takes seconds; one that ends with "..." is over with the next.

    Raises:
        TrainfitError: what is wanted cannot be, or a step cannot be traced.
    """
    effective_batch = batch_of(setting.family, effective_batch)
    _refuse_impossible(setting, effective_batch, gpus=gpus, micro_batch=micro_batch, allow=allow)
    config = config or AllocatorConfig()
    setting = replace(setting, precision=precision_for(setting, gpu))
    pricer = Pricer(gpu=gpu, config=config, cache=cache, gpus=gpus, share=-(-effective_batch // gpus), note=note)
    calibration = load(gpu.name)
    prices = Calibrated(pricer=pricer, calibration=calibration)
    if reason := why_unused(setting):
        note(reason)
    budget = process_budget(gpu, config, gpus)
    request = SearchRequest(
        setting=setting,
        effective_batch=effective_batch,
        gpus=gpus,
        budget_bytes=budget.low_bytes,
        exchange_s=_exchange_s(pricer, setting, gpus),
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        allow=allow,
    )
    _tell_provisional(request, prices, note)
    result = _with_objects(search(request, prices, note=note), pricer)
    offloaded = pricer.offloaded_bytes(result.chosen.setting) if result.chosen else 0
    host: dict[str, Any] = {"gpus": gpus, "decode_s": decode_s, "cores": cores, "offloaded_bytes": offloaded}
    load_for = partial(loading, setting, request.share, **host)
    return _plan(request, result, gpu, budget, load_for, calibration)


def _with_objects(result: SearchResult, pricer: Pricer) -> SearchResult:
    """The result of the search, with a line on how the number of objects changes the need of the chosen setting."""
    if result.chosen is None or result.prediction is None:
        return result
    lines = (*result.prediction.assumptions, *objects_lines(pricer, result.chosen.setting))
    return replace(result, prediction=replace(result.prediction, assumptions=lines))


def _tell_provisional(request: SearchRequest, prices: Calibrated, note: Callable[[str], None]) -> None:
    """Report the plan of the nearest setting that stored traces cover, if they do not cover this one. Meanwhile the process that
    traces it starts.
    """
    setting = replace(request.setting, micro_batch=2, checkpointing=request.checkpointing or "none")
    if prices.known(setting):
        return
    prepare_tracing(setting)
    near = nearest(setting, prices.pricer)
    if near is None:
        return
    other, flags = near
    chosen = search(replace(request, setting=other), prices).chosen
    plan = "nothing fits" if chosen is None else f"{describe(chosen.setting)}, {needs_text(chosen.needs)}"
    note(f"provisional, from stored traces without {flags}: {plan}; the setting itself is being traced")


def _refuse_impossible(
    setting: Setting, effective_batch: int, *, gpus: int, micro_batch: int | None, allow: tuple[str, ...]
) -> None:
    for knob in allow:
        if knob not in setting.family.learns:
            known = ", ".join(setting.family.learns) or "none"
            raise TrainfitError(f"--allow {knob}: no such knob of {setting.model}; there are: {known}")
    for name, value in (("--gpus", gpus), ("--effective-batch", effective_batch)):
        if value < 1:
            raise TrainfitError(f"{name} must be at least 1, not {value}")
    if effective_batch < gpus:
        raise TrainfitError(f"--effective-batch {effective_batch} is less than the {gpus} GPUs: give at least {gpus}")
    share = -(-effective_batch // gpus)
    if micro_batch is not None and not 0 < micro_batch <= share:
        raise TrainfitError(f"--micro-batch {micro_batch} must lie between 1 and the {share} images of each GPU")


def _exchange_s(pricer: Pricer, setting: Setting, gpus: int) -> float:
    """Seconds that a ring all-reduce of the gradients takes: every GPU sends 2 (n - 1) / n of them."""
    if gpus == 1:
        return 0.0
    return 2 * (gpus - 1) / gpus * pricer.gradient_bytes(replace(setting, micro_batch=2)) / LINK_BYTES_PER_S


def _plan(
    request: SearchRequest,
    result: SearchResult,
    gpu: Gpu,
    budget: ByteRange,
    load_for: Callable[..., Loading],
    calibration: Calibration | None,
) -> Plan:
    """The plan that records what the search chose."""
    setting = request.setting
    speed = result.chosen.images_per_s if result.chosen else None
    return Plan(
        model=setting.model,
        gpu=gpu,
        gpus=request.gpus,
        effective_batch=request.effective_batch,
        budget=budget,
        chosen=result.chosen,
        prediction=result.prediction,
        knee=result.knee,
        frontier=frontier(result.candidates),
        candidates=result.candidates,
        smallest=least_of(result.candidates),
        savings=result.savings,
        loading=load_for(images_per_s=speed),
        learning_rate=learning_rate(setting, request.effective_batch),
        calibrated=calibration is not None and calibration.time_factor is not None,
        assumptions=(*_assumptions(request, gpu, result.prediction, calibration), *result.not_priced),
    )


def precision_for(setting: Setting, gpu: Gpu) -> Literal["fp32", "fp16", "bf16"]:
    """The precision that training on the card uses for `auto`."""
    if setting.precision == "auto":
        return auto_precision(gpu.capability)
    if setting.precision == "bf16" and not has_bf16(gpu.capability):
        raise TrainfitError(f"--precision bf16 needs CUDA capability 8.0, {gpu.name} has {gpu.capability}; use fp16")
    return setting.precision


def loading(
    setting: Setting,
    share: int,
    *,
    images_per_s: float | None,
    gpus: int,
    decode_s: float | None,
    cores: int | None,
    offloaded_bytes: int = 0,
) -> Loading:
    """Loader processes that keep up with each GPU, capped by its share of the cores, and the host memory of all.

    `offloaded_bytes`: what waits for backward in each trainer's host memory.
    """
    most = max(1, min(8, cores // gpus - 1)) if cores else 8
    workers = min(4, most)
    reason = "not measured: give --data, or look at the waiting share of a run"
    if decode_s is not None and images_per_s is not None:
        wanted = max(1, ceil(images_per_s / gpus * decode_s * 1.2))
        workers = min(wanted, most)
        reason = f"an image takes {1000 * decode_s:.0f} ms to load, a GPU trains {images_per_s / gpus:.0f} a second"
        if wanted > most:
            reason += f"; {wanted} would be needed, {most} is what the cores allow: loading will be the limit"
    window = min(share * setting.family.sample_bytes(setting), IN_MEMORY_BYTES)  # a larger one waits in a file
    windows = (PREFETCH * workers + 1) * window
    host_bytes = gpus * (TRAINER_BYTES + workers * WORKER_BYTES + windows + offloaded_bytes)
    return Loading(workers=workers, host_bytes=host_bytes, reason=reason, of_this_machine=cores is not None)


def _assumptions(
    request: SearchRequest, gpu: Gpu, prediction: Prediction | None, calibration: Calibration | None
) -> tuple[str, ...]:
    lines = list(prediction.assumptions) if prediction else []
    if rated(gpu) is not gpu:
        lines.append(f"The card's rates are not known: settings are ranked with those of an {RATES_LIKE}.")
    if request.gpus > 1:
        lines.append(f"GPUs exchange gradients at {LINK_BYTES_PER_S / 1e9:.0f} GB/s, after backward.")
    if calibration is not None:
        lines.append(f"Corrected by {calibration.rows} measurements on this card ({calibration.driver}).")
    return tuple(lines)
