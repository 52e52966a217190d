"""Knobs that a data set determines: classes, objects in the fullest image, canvas; and the time to decode an image."""

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.models.setting import Setting
from trainfit.tasks.class_filter import with_classes
from trainfit.tasks.task import DEFAULT_TASK, Dataset, Task, task_of

SAMPLED = 8
"""Number of images that are decoded to measure the time."""
AUGMENTATION = 1.2
"""A loader process's time for an image over reading and resizing it, and its time for a pixel of a mask: a detector's decoder
took 1.17 to 1.22 times as long at 736 px, and 2.7 and 3.4 ns more for a pixel of a polygon's mask at 552 px (one core of an
AMD EPYC; two data sets each)."""
MASK_PIXEL_S = 3e-9


def read_data(setting: Setting, data: str, *, allow_outside: bool = False) -> Dataset:
    """The data set as the task of the setting's family reads it; families that are only predicted take detection's.

    Raises:
        TrainfitError: there is no data set, or it has an error that training cannot ignore.
    """
    return _task(setting).read(data, allow_outside=allow_outside)


def setting_on_data(
    setting: Setting, data: str | Path | None, *, allow_outside: bool, only_classes: str = ""
) -> tuple[Setting, Dataset | None]:
    """The setting with what a data set determines of it, and the data set; without data, the setting as it is and None.

    Raises:
        TrainfitError: as `read_data` and `with_classes`, or classes are chosen without data.
    """
    if data is None:
        if only_classes:
            raise TrainfitError("--only-classes chooses classes of a data set: give --data too")
        return setting, None
    dataset = with_classes(_task(setting), read_data(setting, str(data), allow_outside=allow_outside), only_classes)
    return for_data(setting, dataset), dataset


def for_data(setting: Setting, dataset: Dataset) -> Setting:
    """The setting with the number of classes and the other knobs of the family that the training images determine."""
    statistics_of_data = _task(setting).statistics(dataset.splits["train"])
    classes = len(dataset.classes) or setting.classes  # data of some tasks have no classes
    return setting.family.for_data(replace(setting, classes=classes), statistics_of_data)


def _task(setting: Setting) -> Task:
    return task_of(setting.family.task or DEFAULT_TASK)


def decode_seconds(setting: Setting, dataset: Dataset) -> float | None:
    """Seconds that one loader process takes for an image here; None for families without a loader of their own.

    Without torch where the family says what an image is resized to: planning should not wait for the import.
    """
    if setting.family.task is None:
        return None
    records = dataset.splits["train"][:SAMPLED]
    loads = setting.family.loads
    if loads is not None:
        return _resizing_seconds(records, *loads(setting))
    return _decoder_seconds(setting, dataset, records)


def _resizing_seconds(records: Sequence[Any], side: int, masks: bool) -> float | None:
    from PIL import Image

    from trainfit.tasks.images import read_image

    times: list[float] = []
    for record in records:
        started = time.perf_counter()
        with contextlib.suppress(TrainfitError):  # an image that cannot be decoded: training leaves it out
            read_image(record).resize((side, side), Image.Resampling.BILINEAR)
            seconds = AUGMENTATION * (time.perf_counter() - started)
            times.append(seconds + (MASK_PIXEL_S * len(record.classes) * side**2 if masks else 0))
    return statistics.median(times) if times else None


def _decoder_seconds(setting: Setting, dataset: Dataset, records: Sequence[Any]) -> float | None:
    import torch

    from trainfit.models.build import build_trainable

    workload = build_trainable(setting, dataset.classes)
    decode = workload.decoder()
    size = max(workload.sizes())
    torch.set_num_threads(1)  # as in a loader process
    times: list[float] = []
    for record in records:
        started = time.perf_counter()
        with contextlib.suppress(TrainfitError):
            decode(record, size=size, augment=setting.family.augments, generator=torch.Generator().manual_seed(0))
            times.append(time.perf_counter() - started)
    return statistics.median(times) if times else None
