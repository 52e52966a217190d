"""What a setting needs and how long it takes at any micro-batch: for searching. Imports no torch.

A window is traced with two micro-batches: the second finds the gradients of the first, and all later ones are like it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from trainfit.gpus.capability import has_bf16, kernel_class
from trainfit.gpus.catalogue import Gpu
from trainfit.gpus.context import ByteRange, cuda_context_bytes, widened
from trainfit.gpus.rated import rated
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.columns import Columns, ColumnTrace
from trainfit.memory.composed import any_window, is_composed, is_known, trace_at, window_traces_of
from trainfit.memory.coupled import between, coupled_ends
from trainfit.memory.derived import Part, derived_columns, derived_ops, traced_as
from trainfit.memory.errors import NEEDS_ERROR, RESIZED_ERROR
from trainfit.memory.host_state import moments_bytes, state_on_host
from trainfit.memory.overwritten import overwriting
from trainfit.memory.packaged import packaged
from trainfit.memory.predict import Prediction, needed, predict_traced, with_context
from trainfit.memory.profile import last_window
from trainfit.memory.scaled_traces import KEPT, PAIRS, at_number, scalable, scaled_traces_of
from trainfit.memory.scaling import ScaledTrace
from trainfit.memory.shipped import is_resized, source
from trainfit.memory.window_ops import ops_at
from trainfit.memory.window_trace import WindowTrace
from trainfit.memory.windows import Window, ratio_of, window_of
from trainfit.models.setting import Setting
from trainfit.timing.counts import TO_HOST, OpCount
from trainfit.timing.roofline import (
    HOST_BYTES_PER_S,
    PINNED_BYTES_PER_S,
    TimeEstimate,
    line_seconds,
    step_seconds,
    window_seconds,
    with_host_work,
    with_optimizer_work,
)
from trainfit.tracing.events import Category
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import (
    TraceRequest,
    get_trace,
    is_stored,
)

TRACED_ACCUMULATION = 2
PRICED_LIKE_TWO = "One micro-batch a window is priced like two, whose gradients stay: a little too much."
RESIZED = "The stored trace is of another resolution: what the step needs is given 2 % more room, to both sides."
HALVES = "The stored trace is in bf16; fp16 frees in another order: what the step needs is given 2 % more room, to both sides."
_Key = tuple[TraceRequest, Window | tuple[int, int], bool, bool, str, str]
"""What memory depends on: the traces, the cut of the window (of others micro-batch and accumulation, 0 where it does not count),
whether there are EMA weights and whether they are on the host, the optimizer, and the precision."""


@dataclass(frozen=True, kw_only=True)
class Pricer:
    """Prices settings on one card. Traces come with the package, from the disk, or are made (seconds).

    It keeps what it has read, made and computed: a pricer is of the code of a user's own model as it was when it was made.
    """

    gpu: Gpu
    config: AllocatorConfig = field(default_factory=AllocatorConfig)
    cache: bool = True
    gpus: int = 1
    """Cards that train together, one process each."""
    share: int | None = None
    """Samples of a window on one GPU, where all settings cut the same window; the last micro-batch may be smaller."""
    note: Callable[[str], None] = field(default=lambda _: None, repr=False, compare=False)
    """Called with a line before anything is traced."""
    _scaled_of: dict[TraceRequest, ScaledTrace | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _windows_of: dict[TraceRequest, WindowTrace | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _reserved_of: dict[_Key, ByteRange] = field(default_factory=dict, init=False, repr=False, compare=False)
    _peak_of: dict[_Key, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def reserved(self, setting: Setting) -> ByteRange:
        """What the allocator of one process needs to reserve for training; see `predict.needed`."""
        key = self._key(setting)
        if key not in self._reserved_of:
            found = needed(self.columns(setting, "training"), self.gpu, self.config)
            self._reserved_of[key] = widened(found, RESIZED_ERROR) if self._moved(setting) else found
        return self._reserved_of[key]

    def _moved(self, setting: Setting) -> tuple[str, ...]:
        """Why the trace of training is taken from another's, a line each; what is read from it is less exact."""
        request = self.request(setting, "training")
        resized = (RESIZED,) if is_resized(request) else ()
        return resized if request.setting.precision == setting.precision else (*resized, HALVES)

    def _key(self, setting: Setting) -> _Key:
        self._window(setting, "training")  # the request depends on whether there is one
        request = self.request(setting, "training")
        accumulation = 0 if scalable(setting) else setting.accumulation
        cut = self._cut(setting) if is_composed(setting) else (setting.micro_batch, accumulation)
        return request, cut, setting.keeps_ema, setting.ema_on_host, setting.optimizer, setting.precision

    def needs(self, setting: Setting) -> ByteRange:
        """The least that one process trains in, its CUDA context included."""
        return with_context(self.reserved(setting), self.gpu)

    def least(self, setting: Setting) -> int:
        """What the top of `needs` is not below: the peak of the tensors alone. 0 where that would take another trace."""
        if self._window(setting, "training") is None:
            scaled = self._scaled(setting, "training") if scalable(setting) else None
            if scaled is None or setting.micro_batch < scaled.micro_batches[0]:
                return 0
        key = self._key(setting)
        if key not in self._peak_of:
            self._peak_of[key] = overwriting(self.columns(setting, "training").columns).peak_bytes()
        return int((1 + NEEDS_ERROR) * self._peak_of[key]) + cuda_context_bytes(self.gpu).high_bytes

    def seconds(self, setting: Setting, cuts: Sequence[int], part: Part = "training") -> TimeEstimate:
        """Time of a window cut into micro-batches of `cuts` images, or of an evaluation micro-batch."""
        gpu = rated(self.gpu)
        window = self._window(setting, part)
        if part == "training" and window is None and not scalable(setting) and (ends := coupled_ends(setting)):
            few, many = (self.seconds(end, ()) for end in ends)
            return between(setting, ends, few, many)
        scaled = None if window is not None else self._scaled(setting, part)
        if window is not None:
            cut = self._cut(setting)
            ops = ops_at(window, cut if part == "training" else cut.evaluated(max(cuts)))
            estimate = step_seconds(derived_ops(ops, setting), gpu)
        elif not scalable(setting) and scaled is not None:
            few_ops, many_ops = (derived_ops(ops, setting) for ops in scaled.ops)
            estimate = line_seconds((few_ops, many_ops), scaled.micro_batches, setting.accumulation, gpu)
        elif not scalable(setting):
            estimate = step_seconds(derived_ops(self.columns(setting, part).ops, setting), gpu)
        else:
            traced = TRACED_ACCUMULATION if part == "training" else 1
            most = max(cuts)
            if scaled is not None and (part == "evaluation" or most >= scaled.micro_batches[0]):
                points = scaled.micro_batches
                few_ops, many_ops = (derived_ops(ops, setting) for ops in scaled.ops)
            else:
                knob = "micro_batch" if part == "training" else "eval_micro_batch"
                few_ops = many_ops = derived_ops(self.columns(replace(setting, **{knob: most}), part).ops, setting)
                points = (most, most + 1)
            drawn = setting.family.drawn_sizes(setting) if part == "training" else None
            estimate = window_seconds(
                (few_ops, many_ops), points, gpu, cuts=cuts, traced_accumulation=traced, drawn=drawn
            )
        if part == "training":
            waits = (setting.family.host_seconds(setting, images, self.gpu.capability) for images in cuts)
            estimate = with_host_work(estimate, sum(waits))
        if setting.ema_on_host and setting.keeps_ema and part == "training":
            base = scaled.columns if scaled else self.columns(replace(setting, ema_on_host=False), part).columns
            estimate = with_optimizer_work(estimate, _bytes_of(base, "EMA") / HOST_BYTES_PER_S)
        if state_on_host(setting) and part == "training":
            estimate = with_optimizer_work(estimate, 2 * self._moments_bytes(setting) / PINNED_BYTES_PER_S)
        return estimate

    def predict(self, setting: Setting, cuts: Sequence[int]) -> Prediction:
        """Training and evaluation, with the time of a window."""
        training = self.columns(setting, "training")
        evaluation = self.columns(setting, "evaluation")
        prediction = predict_traced(
            setting,
            self.gpu,
            training=training,
            evaluation=evaluation,
            config=self.config,
            gpus=self.gpus,
            reserved=self.reserved(setting),
        )
        if scalable(setting) and setting.accumulation < TRACED_ACCUMULATION:
            prediction = replace(prediction, assumptions=(*prediction.assumptions, PRICED_LIKE_TWO))
        prediction = replace(prediction, assumptions=(*prediction.assumptions, *self._moved(setting)))
        return replace(prediction, training=replace(prediction.training, time=self.seconds(setting, cuts)))

    def answers(self, setting: Setting) -> bool:
        """Whether `predict` needs no tracing, because the package has the traces that it is made from; of a coupled window, the
        package or the disk.
        """
        if is_composed(setting):
            windows = [any_window(self.request(setting, part)) for part in ("training", "evaluation")]
            return all(is_known(window, cache=self.cache) for window in windows)
        return scalable(setting) and all(self._answers(setting, part) for part in ("training", "evaluation"))

    def _answers(self, setting: Setting, part: Part) -> bool:
        request = self.request(setting, part)
        if source(request) is None:
            return False
        scaled = self._scaled(setting, part)
        if scaled is not None and _serves(scaled, setting, part):
            return True
        evaluated = 1 if part == "training" else setting.eval_micro_batch or 1
        return setting.micro_batch == evaluated == 1 and source(request, alone=True) is not None

    def blocks(self, setting: Setting) -> int:
        """Blocks of the model that activation checkpointing may recompute."""
        source_trace = self._window(setting, "training") or self._scaled(setting, "training")
        return self.columns(setting, "training").blocks if source_trace is None else source_trace.blocks

    def _moments_bytes(self, setting: Setting) -> int:
        source_trace = self._window(setting, "training") or self._scaled(setting, "training")
        base = (
            source_trace.columns if source_trace is not None else self.columns(traced_as(setting), "training").columns
        )
        return moments_bytes(base)

    def offloaded_bytes(self, setting: Setting) -> int:
        """Page-locked host memory: of a micro-batch's saved activations with --checkpointing offload, of an optimizer's state.

        torch's allocator of such memory rounds up to powers of two: twice the bytes at most.
        """
        state_bytes = 2 * self._moments_bytes(setting) if state_on_host(setting) else 0
        if setting.checkpointing != "offload":
            return state_bytes
        window = self._window(setting, "training")
        scaled = self._scaled(setting, "training") if window is None else None
        if window is not None:
            copied = _copied_bytes(ops_at(window, self._cut(setting))) / setting.accumulation
        elif scaled is None:
            copied = _copied_bytes(self.columns(setting, "training").ops)
        else:
            small, large = scaled.micro_batches
            low, high = (_copied_bytes(ops) for ops in scaled.ops)
            at = setting.micro_batch if scalable(setting) else setting.accumulation
            copied = low + (high - low) * (at - small) / (large - small)
        parts = TRACED_ACCUMULATION if scalable(setting) else 1
        return int(2 * copied / parts) + state_bytes

    def known(self, setting: Setting) -> bool:
        """Whether the need of training is known without tracing."""
        request = self.request(setting, "training")
        if not scalable(setting):
            return is_composed(setting) and (request in self._windows_of or is_known(request, cache=self.cache))
        if setting.micro_batch < PAIRS[0][0]:  # it is a trace of its own
            return source(request, alone=True) is not None
        if self._scaled_of.get(request) is not None or source(request) is not None:
            return True
        return self.cache and setting.family.cacheable and KEPT.path(request).exists()

    def gradient_bytes(self, setting: Setting) -> int:
        """What the GPUs exchange once a window."""
        trace = self.columns(setting, "training").columns
        events = trace.events[last_window(trace) :]
        made = events[events > 0] - 1
        return int(trace.nbytes[made[trace.of_category("gradients")[made]]].sum())

    def request(self, setting: Setting, part: Part) -> TraceRequest:
        """The setting without what a scaled trace serves all values of."""
        setting = traced_as(setting)
        capability = setting.family.kernels(kernel_class(self.gpu.capability))
        capability = setting.family.alike(setting).get(capability, capability)
        if setting.family.halves_alike and setting.precision == "fp16" and has_bf16(capability):
            setting = replace(setting, precision="bf16")
        if is_composed(setting):
            of_any = any_window(TraceRequest(setting=setting, part=part, capability=capability))
            if self._windows_of.get(of_any, of_any) is not None and not self._is_alone(setting):
                return of_any
        if part == "evaluation":
            setting = replace(setting, accumulation=min(TRACED_ACCUMULATION, setting.accumulation))
        if scalable(setting):
            setting = replace(setting, micro_batch=1, accumulation=TRACED_ACCUMULATION, eval_micro_batch=None)
        return TraceRequest(setting=setting, part=part, capability=capability)

    def _window(self, setting: Setting, part: Part) -> WindowTrace | None:
        """Of a coupled window; None of others, and where its traces cannot be composed."""
        return None if self._is_alone(setting) else self._any_window(setting, part)

    def _any_window(self, setting: Setting, part: Part) -> WindowTrace | None:
        if not is_composed(setting):
            return None
        request = any_window(self.request(setting, part))
        if request not in self._windows_of:
            self._windows_of.update(window_traces_of(request, cache=self.cache, note=self.note))
        return self._windows_of[request]

    def _cut(self, setting: Setting) -> Window:
        """The window of a setting: of `share` where that takes as many micro-batches."""
        is_share = self.share is not None and -(-self.share // setting.micro_batch) == setting.accumulation
        return window_of(setting, self.share if is_share else None)

    def _is_alone(self, setting: Setting) -> bool:
        """Whether towers that run by themselves have one micro-batch each: then all keep their graphs, as in no other window."""
        return is_composed(setting) and ratio_of(setting) is not None and self._cut(setting).is_plain

    def traces_each(self, setting: Setting) -> bool:
        """Whether every micro-batch of a setting takes a trace of its own: of a coupled window that cannot be composed."""
        return not scalable(setting) and self._any_window(setting, "training") is None

    def _scaled(self, setting: Setting, part: Part) -> ScaledTrace | None:
        """Over micro-batches; of a contrastive window over accumulation, and None where that is small."""
        request = self.request(setting, part)
        if not scalable(setting):
            if request.setting.accumulation <= PAIRS[0][1]:
                return None
            request = replace(request, setting=replace(request.setting, accumulation=1))
        if request not in self._scaled_of:
            found = scaled_traces_of(request, cache=self.cache, note=self.note)
            self._scaled_of.update({each: found[each] for each in found if each not in self._scaled_of})
        return self._scaled_of[request]

    def trace(self, setting: Setting, part: Part) -> StoredTrace:
        """The setting's trace: scaled, or by itself below the micro-batches that are traced for scaling."""
        return self.columns(setting, part).stored()

    def columns(self, setting: Setting, part: Part) -> ColumnTrace:
        """`trace` in columns, which takes less time."""
        window = self._window(setting, part)
        if window is not None:
            evaluated = (setting.eval_micro_batch or setting.micro_batch) if part == "evaluation" else None
            composed = trace_at(window, self._cut(setting), evaluated)
            return replace(composed, columns=derived_columns(composed.columns, setting, part))
        base, columns = self._unmoved(setting, part)
        return base.priced(derived_columns(columns, setting, part))

    def _unmoved(self, setting: Setting, part: Part) -> tuple[ScaledTrace, Columns]:
        """The traces that the setting is priced from, and that of the setting with everything on the GPU."""
        request = self.request(setting, part)
        scaled = self._scaled(setting, part)
        evaluated = setting.eval_micro_batch or setting.micro_batch
        if scaled is not None and not scalable(setting):
            return scaled, scaled.at(setting.accumulation)
        if scaled is None or not _serves(scaled, setting, part):
            exact = request.setting if not scalable(setting) else at_number(request, setting.micro_batch).setting
            exact = replace(exact, eval_micro_batch=setting.eval_micro_batch if part == "evaluation" else None)
            alone = self._alone(replace(request, setting=exact))
            return alone, alone.columns
        since = last_window(scaled.columns) if part == "evaluation" else None
        return scaled, scaled.at(setting.micro_batch, eval_micro_batch=evaluated, evaluated_from=since)

    def _alone(self, request: TraceRequest) -> ScaledTrace:
        """The request's own trace: the package has those of micro-batch 1."""
        of_one = request.setting.micro_batch == 1 and request.setting.eval_micro_batch in (None, 1)
        packaged_trace = packaged(at_number(request, 1), alone=True) if of_one else None
        if packaged_trace is None and not (self.cache and is_stored(request)):
            self.note(
                f"tracing {request.part} at micro-batch {request.setting.micro_batch}, which no stored trace covers..."
            )
        return packaged_trace or ScaledTrace.of_one(get_trace(request, cache=self.cache), request.setting.micro_batch)


def _serves(scaled: ScaledTrace, setting: Setting, part: Part) -> bool:
    """Whether a scaled trace tells of a setting: of one image not, whose step may do other things, but of evaluation with more
    images after training with one, or the reverse.
    """
    least = scaled.micro_batches[0]
    if part == "training":
        return setting.micro_batch >= least
    sizes = (setting.micro_batch, setting.eval_micro_batch or setting.micro_batch)
    return min(sizes) >= least or (max(sizes) >= least == PAIRS[0][0])


def _bytes_of(trace: Columns, category: Category) -> int:
    return int(trace.nbytes[trace.of_category(category)].sum())


def _copied_bytes(ops: Sequence[OpCount]) -> float:
    return sum(row.bytes for row in ops if row.op.endswith(TO_HOST))
