"""`plan` and `predict`: what fits a card that need not be there."""

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import Gpu, chosen_gpu
from trainfit.gpus.detect import card_of
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.predict import Prediction
from trainfit.models.family import family_of
from trainfit.models.setting import Setting, make_setting, setting_from_json
from trainfit.planning.dataset import decode_seconds, setting_on_data
from trainfit.planning.make import make_plan
from trainfit.planning.plan import Plan
from trainfit.planning.predict import predict_with_trace
from trainfit.step.names import Checkpointing
from trainfit.training.recipe import batch_of


def plan(
    model: str | Setting,
    *,
    gpu: str | Gpu | None = None,
    memory: str | None = None,
    gpus: int = 1,
    data: str | Path | None = None,
    allow_outside: bool = False,
    only_classes: str = "",
    effective_batch: int | None = None,
    micro_batch: int | None = None,
    checkpointing: Checkpointing | None = None,
    allow: tuple[str, ...] = (),
    alloc_conf: str = "",
    cache: bool = True,
    note: Callable[[str], None] = lambda _: None,
    **knobs: Any,
) -> Plan:
    """Plan the fastest training that fits a GPU, which need not be there: `trainfit plan`; `chosen` is None where nothing fits.

    Args:
        model: Name of a model, or a setting, whose micro-batch, accumulation and checkpointing do not count.
        gpu: The card, by name or as a value; without it and `memory`, the card of this machine, and of several the one with the
            least free memory.
        memory: Memory of the card, for instance "8GiB": instead of `gpu`, or of what that card has.
        gpus: Cards that train together, one process and an equal share of the effective batch each.
        data: Data set; its classes, its fullest image, its largest image and its decoding time are used.
        allow_outside: Read files that the data set names but does not hold.
        only_classes: Names of the data set's classes that are trained on, with commas between; all unless given.
        effective_batch: Images per optimizer step over all GPUs; held exactly. 16 unless given; CLIP has no default.
        micro_batch: Plan with this one alone.
        checkpointing: Plan with this alone.
        allow: Knobs that change what is learned and may be turned where nothing fits otherwise.
        alloc_conf: As PYTORCH_ALLOC_CONF, for instance "expandable_segments:True".
        cache: Store the traces, and use stored ones.
        note: Called with one line before anything that takes seconds.
        knobs: Other knobs of the model's family (`Setting`).

    Raises:
        TrainfitError: no such model, knob, card or data set, or a step that cannot be traced.
    """
    wanted = setting_of(model, knobs)
    batch_of(wanted.family, effective_batch)  # refused before anything is read
    card = card_of(gpu, memory, note, gpus=gpus)
    setting, dataset = setting_on_data(wanted, data, allow_outside=allow_outside, only_classes=only_classes)
    result = make_plan(
        setting,
        card,
        effective_batch=effective_batch,
        gpus=gpus,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        allow=allow,
        config=AllocatorConfig.from_env_string(alloc_conf),
        cache=cache,
        decode_s=None if dataset is None else decode_seconds(setting, dataset),
        cores=os.cpu_count() if gpu is None and memory is None else None,
        note=note,
    )
    return replace(result, data="" if data is None else str(data), only_classes=only_classes)


def predict(
    model: str | Setting,
    *,
    gpu: str | Gpu | None = None,
    memory: str | None = None,
    gpus: int = 1,
    data: str | Path | None = None,
    allow_outside: bool = False,
    only_classes: str = "",
    alloc_conf: str = "",
    cudnn_benchmark: bool = False,
    cache: bool = True,
    trace_on: Literal["cuda", "cpu"] = "cuda",
    snapshot: str | Path | None = None,
    note: Callable[[str], None] = lambda _: None,
    **knobs: Any,
) -> Prediction:
    """Predict memory and time of one setting on a GPU, which need not be there: `trainfit predict`.

    Args:
        model: Name of a model, or a setting.
        gpu: The card, by name or as a value.
        memory: Memory of the card, for instance "8GiB": instead of `gpu`, or of what that card has.
        gpus: Cards of this kind that train together.
        data: Data set that determines the number of classes, the fullest image and the largest image.
        allow_outside: Read files that the data set names but does not hold.
        only_classes: Names of the data set's classes that are trained on, with commas between; all unless given.
        alloc_conf: As PYTORCH_ALLOC_CONF.
        cudnn_benchmark: Whether torch.backends.cudnn.benchmark is on: each convolution's first run empties the cache.
        cache: Store the traces, and use stored ones.
        trace_on: "cuda": fake tensors of the card; "cpu": the step really runs here, with the CPU's kernels.
        snapshot: File to write the step to for PyTorch's memory viewer.
        note: Called with one line before anything that takes seconds.
        knobs: Knobs of the model's family, for instance `micro_batch=4`.

    Raises:
        TrainfitError: no such model, knob, card or data set, or a step that cannot be traced.
    """
    if gpus < 1:
        raise TrainfitError(f"--gpus must be at least 1, not {gpus}")
    card = gpu if isinstance(gpu, Gpu) else chosen_gpu(gpu, memory)
    config = replace(AllocatorConfig.from_env_string(alloc_conf), cudnn_benchmark=cudnn_benchmark)
    wanted = setting_of(model, knobs)
    setting, _ = setting_on_data(wanted, data, allow_outside=allow_outside, only_classes=only_classes)
    prediction, training = predict_with_trace(
        setting, card, config=config, gpus=gpus, cache=cache, device=trace_on, note=note
    )
    if snapshot is not None:
        from trainfit.reports.memory_viewer import snapshot as memory_snapshot

        Path(snapshot).write_bytes(pickle.dumps(memory_snapshot(training, card, config)))
    return prediction


def setting_of(model: str | Setting, knobs: dict[str, Any]) -> Setting:
    """The setting of a model's name with these knobs, or a setting with these changes and the model's canonical name.

    Raises:
        TrainfitError: no such model, its family has no such knob, or the setting is that of another family.
    """
    if isinstance(model, str):
        return make_setting(model, **knobs)
    setting = replace(model, **knobs)
    if type(setting) is Setting:  # without the knobs of a family
        name = family_of(setting.model)[1]
        return setting_from_json({**setting.to_json(), "model": name})
    name = setting.family.match(setting.model.strip())
    if name is None:
        raise TrainfitError(f"{setting.model} is not a model of the family {setting.family.name}: use make_setting")
    return replace(setting, model=name)
