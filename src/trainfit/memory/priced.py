"""What a setting needs and how long it takes at any micro-batch: for searching. Imports no torch.

A window is traced with two micro-batches: the second finds the gradients of the first, and all later ones are like it.
"""

import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import FLOPS_RATES, Gpu, find_gpu
from trainfit.gpus.context import ByteRange, cublas_workspace_bytes
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.host_ema import ema_for_evaluation, without_ema
from trainfit.memory.predict import Prediction, needed, predict_traced
from trainfit.memory.profile import last_window
from trainfit.memory.scaling import ScaledTrace, scale
from trainfit.models.setting import Setting
from trainfit.timing.roofline import (
    HOST_BYTES_PER_S,
    TimeEstimate,
    later,
    line_seconds,
    step_seconds,
    window_seconds,
    with_host_work,
)
from trainfit.tracing.events import Trace
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import (
    DAMAGE,
    TraceRequest,
    cache_path,
    get_trace,
    get_traces,
    kernel_class,
    packages_of,
    store,
    stored,
)

PAIRS = ((2, 4), (4, 8))
"""Micro-batches that are traced; the second pair where a step does other things at 2 than at 4."""
TRACED_ACCUMULATION = 2
SHIPPED = "shipped"
ALONE = "-alone"
"""Traces of one image, beside the scaled ones: below the micro-batches that are traced for scaling."""
RATES_LIKE = "RTX 3060"
"""Whose rates rank settings for a card of which only the memory is known."""
Part = Literal["training", "evaluation"]
T = TypeVar("T")
_scaled: dict[TraceRequest, ScaledTrace | None] = {}
"""Those of this process; a custom model's are nowhere else."""


def scalable(setting: Setting) -> bool:
    """Whether micro-batches of its window do not know of each other: a contrastive window is one loss."""
    return not setting.family.coupled(setting)


@dataclass(frozen=True, kw_only=True)
class Pricer:
    """Prices settings on one card. Traces come with the package, from the disk, or are made (seconds)."""

    gpu: Gpu
    config: AllocatorConfig = field(default_factory=AllocatorConfig)
    cache: bool = True
    gpus: int = 1
    """Cards that train together, one process each."""

    def needs(self, setting: Setting) -> ByteRange:
        """What one process needs for training: CUDA context and reserved memory."""
        request = self.request(setting, "training")
        key = f"{setting.micro_batch}:{setting.ema_on_host}:{cublas_workspace_bytes(self.gpu)}"
        if self.config != AllocatorConfig():
            key += f":{self.config}"
        known = known_needs(request, cache=self.cache) if scalable(setting) else {}
        if key not in known:
            found = needed(self._trace(setting, "training"), self.gpu, self.config)
            known[key] = (found.low_bytes, found.high_bytes)
            if self.cache and scalable(setting) and setting.family.cacheable:
                store(_path(request, "needs"), json.dumps(known))
        low, high = known[key]
        return ByteRange(low_bytes=low, high_bytes=high)

    def seconds(self, setting: Setting, cuts: Sequence[int], part: Part = "training") -> TimeEstimate:
        """Time of a window cut into micro-batches of `cuts` images, or of an evaluation micro-batch."""
        gpu = rated(self.gpu)
        scaled = self._scaled(setting, part)
        if not scalable(setting):
            if scaled is not None:
                found = line_seconds(scaled.ops, scaled.micro_batches, setting.accumulation, gpu)
            else:
                found = step_seconds(self._trace(setting, part).ops, gpu)
        else:
            traced, most = TRACED_ACCUMULATION if part == "training" else 1, max(cuts)
            if scaled is not None and (part == "evaluation" or most >= scaled.micro_batches[0]):
                ops, points = scaled.ops, scaled.micro_batches
            else:
                knob = "micro_batch" if part == "training" else "eval_micro_batch"
                alone = self._trace(replace(setting, **{knob: most}), part).ops
                ops, points = (alone, alone), (most, most + 1)
            found = window_seconds(ops, points, gpu, cuts=cuts, traced_accumulation=traced)
        if part == "training":
            waits = (setting.family.host_seconds(setting, images, self.gpu.capability) for images in cuts)
            found = with_host_work(found, sum(waits))
        if setting.ema_on_host and part == "training":
            base = scaled or self._trace(replace(setting, ema_on_host=False), part)
            nbytes = sum(tensor.nbytes for tensor in base.trace.tensors if tensor.category == "EMA")
            found = later(found, nbytes / HOST_BYTES_PER_S)
        return found

    def predict(self, setting: Setting, cuts: Sequence[int]) -> Prediction:
        """Training and evaluation, with the time of a window."""
        training, evaluation = self._trace(setting, "training"), self._trace(setting, "evaluation")
        found = predict_traced(
            setting, self.gpu, training=training, evaluation=evaluation, config=self.config, gpus=self.gpus
        )
        return replace(found, training=replace(found.training, time=self.seconds(setting, cuts)))

    def blocks(self, setting: Setting) -> int:
        """Blocks of the model that activation checkpointing may compute again."""
        scaled = self._scaled(setting, "training")
        return self._trace(setting, "training").blocks if scaled is None else scaled.blocks

    def gradient_bytes(self, setting: Setting) -> int:
        """What the GPUs exchange once a window."""
        trace = self._trace(setting, "training").trace
        made = (trace.tensors[e - 1] for e in trace.events[last_window(trace) :] if e > 0)
        return sum(tensor.nbytes for tensor in made if tensor.category == "gradients")

    def request(self, setting: Setting, part: Part) -> TraceRequest:
        """The setting without what a scaled trace serves all values of."""
        setting = replace(setting, ema_on_host=False)
        if part == "evaluation":
            setting = replace(setting, accumulation=min(TRACED_ACCUMULATION, setting.accumulation))
        if scalable(setting):
            setting = replace(setting, micro_batch=1, accumulation=TRACED_ACCUMULATION, eval_micro_batch=None)
        capability = setting.family.kernels(kernel_class(self.gpu.capability))
        return TraceRequest(setting=setting, part=part, capability=capability)

    def _scaled(self, setting: Setting, part: Part) -> ScaledTrace | None:
        """Over micro-batches; of a contrastive window over accumulation, and None where that is small."""
        request = self.request(setting, part)
        if not scalable(setting):
            if request.setting.accumulation <= PAIRS[0][1]:
                return None
            request = replace(request, setting=replace(request.setting, accumulation=1))
        if request not in _scaled:
            _scaled[request] = _load(request, cache=self.cache)
        return _scaled[request]

    def _trace(self, setting: Setting, part: Part) -> StoredTrace:
        """The setting's trace: scaled, or by itself below the micro-batches that are traced for scaling."""
        request, scaled = self.request(setting, part), self._scaled(setting, part)
        evaluated = setting.eval_micro_batch or setting.micro_batch
        if scaled is not None and not scalable(setting):
            found = _stored(scaled, scaled.at(setting.accumulation))
        elif scaled is None or min(setting.micro_batch, evaluated) < scaled.micro_batches[0]:
            exact = request.setting if not scalable(setting) else _at(request, setting.micro_batch).setting
            exact = replace(exact, eval_micro_batch=setting.eval_micro_batch if part == "evaluation" else None)
            found = self._alone(replace(request, setting=exact))
        else:
            since = last_window(scaled.trace) if part == "evaluation" else None
            made = scaled.at(setting.micro_batch, eval_micro_batch=evaluated, evaluated_from=since)
            found = _stored(scaled, made)
        if not setting.ema_on_host:
            return found
        moved = without_ema(found.trace) if part == "training" else ema_for_evaluation(found.trace)
        return replace(found, trace=moved)

    def _alone(self, request: TraceRequest) -> StoredTrace:
        """The request's own trace: the package has those of one image."""
        found = shipped(request, StoredTrace.from_json, ALONE) if request.setting.micro_batch == 1 else None
        return found or get_trace(request, cache=self.cache)


def _stored(scaled: ScaledTrace, trace: Trace) -> StoredTrace:
    """`trace`, made from `scaled`, with what goes with it."""
    return StoredTrace(
        trace=trace,
        ops=scaled.ops[1],
        made_up=scaled.made_up,
        upper_bounds=scaled.upper_bounds,
        blocks=scaled.blocks,
    )


def rated(gpu: Gpu) -> Gpu:
    """The card; with the rates of another where its own are not known: settings are ranked, times mean nothing."""
    if gpu.bandwidth_bytes_per_s is not None and gpu.fp32_flops_per_s is not None:
        return gpu
    like = find_gpu(RATES_LIKE)
    return replace(gpu, **{name: getattr(like, name) for name in ("bandwidth_bytes_per_s", *FLOPS_RATES)})


def _at(request: TraceRequest, number: int) -> TraceRequest:
    """At a micro-batch, or for a contrastive window at an accumulation."""
    knob = "micro_batch" if scalable(request.setting) else "accumulation"
    return replace(request, setting=replace(request.setting, **{knob: number}))


def _load(request: TraceRequest, *, cache: bool) -> ScaledTrace | None:
    """From the package, from the disk, or traced now; None where the step's traces cannot be scaled."""
    found = shipped(request, ScaledTrace.from_json)
    if found is not None:
        return found
    known = stored(_path(request, "scaled"), _optional_scaled) if cache else None
    if known is not None:
        return known[0]
    made = make_scaled(request, cache=cache)
    if cache and request.setting.family.cacheable:
        store(_path(request, "scaled"), made.to_json() if made else "null")
    return made


def _optional_scaled(text: str) -> tuple[ScaledTrace | None]:
    """The stored scaled trace; (None,) where it is known that the step's traces cannot be scaled."""
    return (None if text == "null" else ScaledTrace.from_json(text),)


def make_scaled(request: TraceRequest, *, cache: bool) -> ScaledTrace | None:
    """Trace a request at two micro-batches and align; None where that cannot be."""
    for pair in PAIRS:
        small, large = get_traces([_at(request, b) for b in pair], cache=cache)
        made = scale(small, large, pair)
        if made is not None:
            return made
    return None


def _path(request: TraceRequest, kind: str) -> Path:
    return cache_path(request).with_suffix(f".{kind}.gz")


@cache
def known_needs(request: TraceRequest, *, cache: bool) -> dict[str, tuple[int, int]]:
    """Needs by micro-batch, EMA, workspace and allocator that were worked out before: (low, high) bytes. It grows."""
    known: dict[str, Any] = _shipped_needs().get(shipped_name(request), {}) if is_shipped(request) else {}
    mine = stored(_path(request, "needs"), _parsed_needs) if cache and request.setting.family.cacheable else None
    return {**known, **(mine or {})}


def _parsed_needs(text: str) -> dict[str, tuple[int, int]]:
    return {key: (int(low), int(high)) for key, (low, high) in json.loads(text).items()}


# ---- traces that come with the package


def shipped_name(request: TraceRequest) -> str:
    """File name of a request's scaled trace."""
    return cache_path(request, versioned=False).name.removesuffix(".json.gz")


def shipped_folder() -> Path:
    """Where the package has them; scripts/traces writes there."""
    return Path(str(resources.files("trainfit.memory").joinpath(SHIPPED)))


@cache
def _shipped_versions() -> dict[str, str]:
    path = shipped_folder() / "versions.json"
    return _read_shipped(path, json.loads) if path.exists() else {}


@cache
def _shipped_needs() -> dict[str, Any]:
    path = shipped_folder() / "needs.json.xz"
    return _read_shipped(path, json.loads) if path.exists() else {}


def is_shipped(request: TraceRequest, kind: str = "") -> bool:
    """Whether the package has a request's scaled (or `ALONE`) trace, made with the packages that are installed."""
    made_with = _shipped_versions()
    same = all(made_with.get(name) == found for name, found in packages_of(request.setting).items())
    return same and (shipped_folder() / f"{shipped_name(request)}{kind}.xz").exists()


def shipped(request: TraceRequest, parse: Callable[[str], T], kind: str = "") -> T | None:
    """The scaled (or `ALONE`) trace that the package has for a request; None: it has none for what is installed."""
    if not is_shipped(request, kind):
        return None
    return _read_shipped(shipped_folder() / f"{shipped_name(request)}{kind}.xz", parse)


def _read_shipped(path: Path, parse: Callable[[str], T]) -> T:
    """Parse a file of the package.

    Raises:
        TrainfitError: it is damaged; only a new installation mends it.
    """
    try:
        data = path.read_bytes()
        return parse((lzma.decompress(data) if path.suffix == ".xz" else data).decode())
    except (OSError, lzma.LZMAError, *DAMAGE) as error:
        raise TrainfitError(
            f"{path}, a file of the installed package, is damaged ({type(error).__name__}): "
            "reinstall it with pip install --force-reinstall --no-deps trainfit"
        ) from error
