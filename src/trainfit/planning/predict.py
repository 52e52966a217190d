"""Predict one setting on one card: the library's side of `trainfit predict`. Imports no torch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from trainfit.gpus.catalogue import Gpu
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.predict import Prediction, Traced, predict_traced, trace_requests
from trainfit.memory.priced import TRACED_ACCUMULATION, Pricer
from trainfit.memory.scaled_traces import scalable
from trainfit.memory.shipped import why_unused
from trainfit.models.setting import Setting
from trainfit.planning.make import precision_for
from trainfit.planning.nearest import nearest, needs_text
from trainfit.planning.objects import objects_lines
from trainfit.tracing.trace_cache import get_both, is_stored, prepare_tracing

_DEFAULTS = AllocatorConfig()


def predict(
    setting: Setting, gpu: Gpu, *, config: AllocatorConfig = _DEFAULTS, gpus: int = 1, cache: bool = True
) -> Prediction:
    """Memory and time of training and evaluation on a card; see `predict_with_trace`.

    Raises:
        TrainfitError: the step cannot be built or traced; the message says why.
    """
    return predict_with_trace(setting, gpu, config=config, gpus=gpus, cache=cache)[0]


def predict_with_trace(
    setting: Setting,
    gpu: Gpu,
    *,
    config: AllocatorConfig = _DEFAULTS,
    gpus: int = 1,
    cache: bool = True,
    device: Literal["cuda", "cpu"] = "cuda",
    note: Callable[[str], None] = lambda _: None,
) -> tuple[Prediction, Traced]:
    """The prediction of a setting, and the trace of training that it is made from.

    A setting that the package has traces for is answered from them, with the numbers that `make_plan` gives for it. Any
    other is traced at its micro-batch where that is not stored (seconds), with two micro-batches a window at most: the
    later ones are like the second. Of a contrastive window, which is one loss, all are traced.

    Args:
        setting: What is predicted.
        gpu: The card.
        config: The allocator's; by default torch's.
        gpus: Cards of this kind, one process each; the prediction is of one.
        cache: Use traces of the package and of the disk, and store new ones; else trace.
        device: cuda: fake tensors of the card; cpu: the step really runs here.
        note: Called with a line before anything that takes seconds; one that ends with "..." is over with the next.

    Raises:
        TrainfitError: the step cannot be built or traced; the message says why.
    """
    most = min(setting.accumulation, TRACED_ACCUMULATION) if scalable(setting) else setting.accumulation
    requests = trace_requests(replace(setting, accumulation=most), gpu, device=device)
    is_traced = not (cache and all(map(is_stored, requests)))
    if cache and device == "cuda":
        resolved = replace(setting, precision=precision_for(setting, gpu))
        pricer = Pricer(gpu=gpu, config=config, gpus=gpus, note=note)
        cuts = (setting.micro_batch,) * setting.accumulation
        if pricer.answers(resolved):
            prediction = pricer.predict(resolved, cuts)
            assumptions = (*prediction.assumptions, *objects_lines(pricer, resolved))
            return replace(prediction, setting=setting, assumptions=assumptions), pricer.columns(resolved, "training")
        if is_traced:
            prepare_tracing(setting)
        if reason := why_unused(setting):
            note(reason)
        if near := nearest(resolved, pricer):
            needs = needs_text(pricer.predict(near[0], cuts).needs)
            note(f"provisional, from stored traces without {near[1]}: {needs}; the setting itself is being traced")
    if is_traced:
        note(f"tracing {setting.model}, about 10 s; the next time it is stored...")
    training, evaluation = get_both(*requests, cache=cache)
    prediction = predict_traced(
        setting,
        gpu,
        training=training,
        evaluation=evaluation,
        config=config,
        gpus=gpus,
        traced_accumulation=most,
    )
    return prediction, training
