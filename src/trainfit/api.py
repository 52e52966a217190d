"""The library's side of the commands: what a command does, one call does. Imports no torch before it is needed.

Progress goes to functions that the caller gives; nothing is printed. What a user can repair raises `TrainfitError`.
"""

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import Gpu
from trainfit.gpus.choice import chosen_gpu, gpu_here
from trainfit.measuring.bench import Bench
from trainfit.measuring.card import cap_bytes, measured_card
from trainfit.measuring.search import Measured
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.predict import Prediction
from trainfit.models.setting import Setting, make_setting, named
from trainfit.planning.dataset import decode_seconds, for_data, read_data
from trainfit.planning.make import DEFAULT_EFFECTIVE_BATCH, make_plan
from trainfit.planning.plan import Plan
from trainfit.planning.predict import predict_with_trace
from trainfit.step.names import Checkpointing
from trainfit.values import flag

if TYPE_CHECKING:
    from trainfit.tasks.task import DataCheck, Evaluation
    from trainfit.training.summary import RunSummary
    from trainfit.training.telemetry import Progress

Device = Literal["auto", "cpu", "cuda"]


def _silent(_line: str) -> None:
    pass


def plan(
    model: str | Setting,
    *,
    gpu: str | Gpu | None = None,
    memory: str | None = None,
    gpus: int = 1,
    data: str | Path | None = None,
    allow_outside: bool = False,
    effective_batch: int = DEFAULT_EFFECTIVE_BATCH,
    micro_batch: int | None = None,
    checkpointing: Checkpointing | None = None,
    allow: tuple[str, ...] = (),
    alloc_conf: str = "",
    cache: bool = True,
    note: Callable[[str], None] = _silent,
    **knobs: Any,
) -> Plan:
    """Plan the fastest training that fits a GPU, which need not be there: `trainfit plan`.

    Args:
        model: Name of a model, or a setting, whose micro-batch, accumulation and checkpointing do not count.
        gpu: The card, by name or as a value; without it and `memory`, the first card of this machine.
        memory: Memory of the card, for instance "8GiB": instead of `gpu`, or of what that card has.
        gpus: Cards of this kind, one process each.
        data: Data set; its classes, its fullest image, its largest image and its decoding time are used.
        allow_outside: Read files that the data set names but does not hold.
        effective_batch: Images per optimizer step over all GPUs; held exactly.
        micro_batch: Plan with this one alone.
        checkpointing: Plan with this alone.
        allow: Knobs that change what is learned and may be turned where nothing fits otherwise.
        alloc_conf: As PYTORCH_ALLOC_CONF, for instance "expandable_segments:True".
        cache: Store the traces, and use stored ones.
        note: Called with one line before anything that takes seconds.
        knobs: Other knobs of the model's family (`Setting`).

    Returns:
        The plan; its `chosen` is None where nothing fits.

    Raises:
        TrainfitError: no such model, knob, card or data set, or a step that cannot be traced.
    """
    card = _card(gpu, memory, note)
    setting, decode_s = _of_data(_setting(model, knobs), data, allow_outside=allow_outside)
    return make_plan(
        setting,
        card,
        effective_batch=effective_batch,
        gpus=gpus,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        allow=allow,
        config=AllocatorConfig.from_env_string(alloc_conf),
        cache=cache,
        decode_s=decode_s,
        cores=os.cpu_count() if decode_s is not None else None,
        note=note,
    )


def _of_data(setting: Setting, data: str | Path | None, *, allow_outside: bool) -> tuple[Setting, float | None]:
    """The setting for a data set, and the seconds that a loader process takes for one of its images."""
    if data is None:
        return setting, None
    dataset = read_data(setting, str(data), allow_outside=allow_outside)
    setting = for_data(setting, dataset)
    return setting, decode_seconds(setting, dataset)


def predict(
    model: str | Setting,
    *,
    gpu: str | Gpu | None = None,
    memory: str | None = None,
    gpus: int = 1,
    data: str | Path | None = None,
    allow_outside: bool = False,
    alloc_conf: str = "",
    cache: bool = True,
    trace_on: Literal["cuda", "cpu"] = "cuda",
    note: Callable[[str], None] = _silent,
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
        alloc_conf: As PYTORCH_ALLOC_CONF.
        cache: Store the traces, and use stored ones.
        trace_on: "cuda": fake tensors of the card; "cpu": the step really runs here, with the CPU's kernels.
        note: Called with one line before anything that takes seconds.
        knobs: Knobs of the model's family, for instance `micro_batch=4`.

    Raises:
        TrainfitError: no such model, knob, card or data set, or a step that cannot be traced.
    """
    if gpus < 1:
        raise TrainfitError(f"--gpus must be at least 1, not {gpus}")
    card = gpu if isinstance(gpu, Gpu) else chosen_gpu(gpu, memory)
    config = AllocatorConfig.from_env_string(alloc_conf)
    setting = _setting(model, knobs)
    if data is not None:
        setting = for_data(setting, read_data(setting, str(data), allow_outside=allow_outside))
    prediction, _ = predict_with_trace(setting, card, config=config, gpus=gpus, cache=cache, device=trace_on, note=note)
    return prediction


def measure(
    model: str | Setting,
    *,
    micro_batches: Sequence[int] = (),
    steps: int = 10,
    device: Device = "auto",
    memory: str | None = None,
    show: Callable[[str], None] = _silent,
    **knobs: Any,
) -> tuple[Measured, ...]:
    """Measure speed and memory on this machine, each trial in a clean process: `trainfit measure`.

    Args:
        model: Name of a model, or a setting.
        micro_batches: Those to measure; without them the fewest that show from which one on speed stops to grow.
        steps: Timed windows of each trial at most; after 10 s only three are waited for.
        device: "auto" is the first GPU that CUDA_VISIBLE_DEVICES shows, else the CPU.
        memory: Act as a smaller card, for instance "4GiB".
        show: Called with a line of progress.
        knobs: Knobs of the model's family.

    Raises:
        TrainfitError: no such model or device, or a setting that cannot be built.
    """
    bench = make_bench(_setting(model, knobs), steps=steps, device=device, memory=memory, show=show)
    return tuple(bench.run(micro_batches))


def make_bench(
    setting: Setting, *, steps: int, device: Device, memory: str | None, show: Callable[[str], None]
) -> Bench:
    """The bench that `measure` runs; `Bench.run` gives each trial as it ends.

    Raises:
        TrainfitError: no such device, or `memory` is not a part of its memory.
    """
    if steps < 1:
        raise TrainfitError(f"--steps must be at least 1, not {steps}")
    card = measured_card(device)
    return Bench(
        setting=setting,
        card=card,
        limit_bytes=cap_bytes(memory, card),
        config=AllocatorConfig.from_env_string(
            os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        ),
        windows={"most": steps, "least": min(3, steps)},
        show=show,
    )


def train(
    model: str = "",
    *,
    progress: "Progress | None" = None,
    stop: Callable[[], bool] = lambda: False,
    **values: Any,
) -> "RunSummary":
    """Train on data, with the exact gradient of the effective batch: `trainfit train`.

    Args:
        model: Name of a model; it may be left out with `plan`, `resume` and a run folder as `weights`.
        progress: Shows what happens; nothing is shown without it.
        stop: Called after every window; when it returns True, the state is saved and training ends.
        values: Fields of `training.recipe.Recipe`, for instance `data="DIR"`, `epochs=10`, `micro_batch=4`.

    Raises:
        TrainfitError: no such model, value or data set, before the first step wherever possible.
        OutOfMemory: the smallest cut does not fit; the state is saved, and the message says how to go on.
    """
    from trainfit.planning.plan import with_plan
    from trainfit.training.fit import fit

    return fit(with_plan(_recipe(model, values)), progress=progress, stop=stop)


def _recipe(model: str, values: dict[str, Any]) -> Any:
    """The recipe of these values; paths may be text."""
    from trainfit.training.recipe import Recipe

    known = {field.name for field in dataclasses.fields(Recipe)}
    paths = {name: Path(values[name]) for name in ("plan", "out", "resume") if values.get(name)}
    given: dict[str, Any] = {"model": model, **values, **paths} if model else {**values, **paths}
    try:
        return Recipe(**given)
    except TypeError as error:
        unknown = ", ".join(sorted(values.keys() - known))
        raise TrainfitError(f"training takes no value named {unknown}: {error}") from error


def evaluate(
    source: str | Path,
    *,
    data: str | Path,
    model: str | None = None,
    split: str = "val",
    micro_batch: int = 4,
    device: Device = "auto",
    allow_outside: bool = False,
    note: Callable[[str], None] = _silent,
    **options: Any,
) -> "Evaluation":
    """Evaluate a trained run, or a published checkpoint, on a data set: `trainfit evaluate`.

    Args:
        source: Run folder, or a weights file: of trainfit, of the upstream project, or "pretrained" (downloads it).
        data: Data set, as the model's task reads it.
        model: Model that upstream's weights are of, for instance "rfdetr-nano".
        split: Which records: "train", "val" or "test".
        micro_batch: Images per forward.
        device: Where to run.
        allow_outside: Read files that the data set names but does not hold.
        note: Called with a line on weights or classes that do not match, and where data is waited for long.
        options: Of the task's metric, for instance `max_detections=100` of detection.

    Raises:
        TrainfitError: no such run, weights, data set or split, or none of its classes is known to the model.
    """
    from trainfit.tasks.task import task_of
    from trainfit.training.distributed import choose_device
    from trainfit.training.evaluation import evaluate_model
    from trainfit.training.inference import load_model

    loaded = load_model(Path(source), choose_device(device, 0), model=model)
    name = str(loaded.workload.setting.family.task)
    task = task_of(name)
    require_options(task.metric, options, name)
    dataset = task.read(str(data), allow_outside=allow_outside)
    remarks = task.compare(dataset, loaded.workload, data=str(data), weights=str(source))
    for remark in (*loaded.remarks, *remarks):
        note(remark)
    if split not in dataset.splits:
        raise TrainfitError(f"{data} has no split {split!r}: --split is one of {', '.join(dataset.splits)}")
    records = dataset.splits[split]
    return evaluate_model(
        loaded.model,
        loaded.workload,
        records,
        task.metric(records, loaded.workload, dataset=dataset, **options),
        micro_batch=micro_batch,
        precision=loaded.precision,
        device=loaded.device,
        note=note,
    )


def require_options(metric: Callable[..., Any], options: Mapping[str, Any], task: str) -> None:
    """Refuse options that the metric of a task does not have.

    Raises:
        TrainfitError: with the first of them.
    """
    parameters = inspect.signature(metric).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            raise TrainfitError(f"{flag(option)} is no option of the metric of the task {task!r}: leave it out")


def detect(
    source: str | Path,
    images: Sequence[str | Path],
    *,
    model: str | None = None,
    device: Device = "auto",
    note: Callable[[str], None] = _silent,
) -> "list[Any]":
    """Detect objects in image files with a trained run: `trainfit detect`.

    Args:
        source: Run folder, or a weights file: of trainfit, of the upstream project, or "pretrained" (downloads it).
        images: Image files.
        model: Model that upstream's weights are of, for instance "rfdetr-nano".
        device: Where to run.
        note: Called with a line on weights that do not match.

    Returns:
        What the model gives for each image, in order. Of detection: all boxes (n, 4) as x0, y0, x1, y1 in pixels, scores
        (n,), classes (n,), and masks where the model has them (`tasks.detection.samples.ImageDetections`).

    Raises:
        TrainfitError: no such run or weights, an image that cannot be read, or a task without inference on files.
    """
    from trainfit.training import inference
    from trainfit.training.distributed import choose_device

    loaded = inference.load_model(Path(source), choose_device(device, 0), model=model)
    for remark in loaded.remarks:
        note(remark)
    return list(inference.infer(loaded, [Path(image) for image in images]))


def check_data(
    data: str | Path,
    *,
    task: str | None = None,
    format: str | None = None,  # noqa: A002 - as the flag
    decode: bool = True,
    allow_outside: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> "DataCheck":
    """Read a data set and list all that is wrong with it: `trainfit check-data`.

    Args:
        data: Folder or file of the data set, or "sample".
        task: What the data are for, for instance "detection"; recognised by the files unless given.
        format: One of the task's formats, for instance "coco"; detected unless given.
        decode: Decode every record; without it, only what the files' heads and ends tell.
        allow_outside: Read files that the data set names but does not hold.
        progress: Called with the records that are decoded, and with all.

    Returns:
        The data set, its statistics, and its `findings`, which name each defect. Training refuses it where one has the
        severity "error" (`usable` is False).

    Raises:
        TrainfitError: there is no data set, no such task or no such format.
    """
    from trainfit.tasks.task import recognised_task, task_of

    chosen = recognised_task(str(data)) if task is None else task_of(task)
    return chosen.check(str(data), file_format=format, decode=decode, allow_outside=allow_outside, progress=progress)


def _card(gpu: str | Gpu | None, memory: str | None, note: Callable[[str], None]) -> Gpu:
    if isinstance(gpu, Gpu):
        return gpu
    return gpu_here(note) if gpu is None and memory is None else chosen_gpu(gpu, memory)


def _setting(model: str | Setting, knobs: dict[str, Any]) -> Setting:
    if isinstance(model, str):
        return make_setting(model, **knobs)
    return named(replace(model, **knobs))
