"""`train`, `evaluate`, `detect` and `check_data`: calls that work on data. torch is imported when one of them is called."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainfit.api import notebook
from trainfit.errors import TrainfitError
from trainfit.measuring.card import Device
from trainfit.values import flag

if TYPE_CHECKING:
    from trainfit.tasks.task import DataCheck, Evaluation
    from trainfit.training.summary import RunSummary
    from trainfit.training.telemetry import Progress


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
        progress: Shows what happens; without it a notebook shows a bar, and a program nothing.
        stop: Called after every window; when it returns True, the state is saved and training ends.
        values: Fields of `training.recipe.Recipe`, for instance `data="DIR"`, `epochs=10`, `micro_batch=4`.

    Raises:
        TrainfitError: no such model, value or data set, before the first step wherever possible.
        OutOfMemory: the smallest cut does not fit; the state is saved, and the message says how to go on.
    """
    from trainfit.planning.here import planned_here
    from trainfit.planning.plan import with_plan
    from trainfit.training.fit import fit

    progress = progress or notebook.progress()
    return fit(with_plan(_recipe(model, values)), progress=progress, stop=stop, choose=planned_here)


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
    only_classes: str = "",
    note: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> "Evaluation":
    """Evaluate a trained run, or a published checkpoint, on a data set: `trainfit evaluate`.

    Args:
        source: Run folder, or a weights file: of trainfit, of the upstream project, or "pretrained" (downloads it).
        data: Data set, as the model's task reads it.
        model: Name of the model, for weights of the upstream project; a run names its own.
        split: Which records: "train", "val" or "test".
        micro_batch: Images per forward.
        device: Where to run.
        allow_outside: Read files that the data set names but does not hold.
        only_classes: Names of the data set's classes that count, with commas between; all unless given.
        note: Called with a line on weights or classes that do not match, and where data is waited for long.
        options: Of the task's metric, for instance `max_detections=100` of detection.

    Raises:
        TrainfitError: no such run, weights, data set or split, or none of its classes is known to the model.
    """
    from trainfit.tasks.class_filter import with_classes
    from trainfit.tasks.task import task_of
    from trainfit.training.distributed import choose_device
    from trainfit.training.evaluation import evaluate_model
    from trainfit.training.inference import load_model

    loaded = load_model(Path(source), choose_device(device, 0), model=model)
    name = str(loaded.workload.setting.family.task)
    task = task_of(name)
    require_options(task.metric, options, name)
    dataset = with_classes(task, task.read(str(data), allow_outside=allow_outside), only_classes)
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
            raise TrainfitError(f"{flag(option)} is not an option of the metric of the task {task!r}: leave it out")


def detect(
    source: str | Path,
    images: Sequence[str | Path | int],
    *,
    every: int = 1,
    frames: int | None = None,
    model: str | None = None,
    device: Device = "auto",
    note: Callable[[str], None] = lambda _: None,
) -> "list[Any]":
    """Detect objects in images, videos and streams with a trained run: `trainfit detect`.

    Args:
        source: Run folder, or a weights file: of trainfit, of the upstream project, or "pretrained" (downloads it).
        images: Images, videos, folders of them, or patterns (`shots/*.jpg`); the number of a camera; "-" for a video on standard
            input.
        every: Of a video every so many frames are taken.
        frames: Frames that are taken of each video at most; a camera needs it, because it has no end.
        model: Name of the model, for weights of the upstream project; a run names its own.
        device: Where to run.
        note: Called with a line on weights that do not match, on files of folders that cannot be read, and on a stream that
            broke off.

    Returns:
        What the model gives for each image or frame, in order. Of detection: all boxes (n, 4) as x0, y0, x1, y1 in pixels, scores
        (n,), classes (n,), and masks where the model has them (`tasks.detection.samples.ImageDetections`).

    Raises:
        TrainfitError: no such run or weights, an image that cannot be read, or a task without inference on files.
    """
    from trainfit.tasks.media import find_media
    from trainfit.training import inference
    from trainfit.training.detecting import detect_in
    from trainfit.training.distributed import choose_device

    media = find_media(images, note)
    for medium in media:
        if medium.stream is not None and medium.stream.is_camera and frames is None:
            raise TrainfitError(f"{medium.path} is a camera, which has no end: say how many `frames` to take")
    loaded = inference.load_model(Path(source), choose_device(device, 0), model=model)
    for remark in loaded.remarks:
        note(remark)
    outputs = [detected.output for detected in detect_in(loaded, media, every=every, frames=frames)]
    for medium in media:
        if medium.stream is not None and medium.stream.fault:
            note(f"{medium.path}: {medium.stream.fault}")
    return outputs


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

    chosen = task_of(recognised_task(str(data)) if task is None else task)
    return chosen.check(str(data), file_format=format, decode=decode, allow_outside=allow_outside, progress=progress)
