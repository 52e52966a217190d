"""What a data set says about a setting: its classes, its fullest image, its largest canvas."""

import contextlib
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from trainfit.errors import TrainfitError
from trainfit.models.registry import family
from trainfit.models.setting import Setting

if TYPE_CHECKING:
    from trainfit.tasks.detection.samples import Dataset

SAMPLED = 8
"""Images that are decoded for a time."""


def for_data(setting: Setting, dataset: "Dataset") -> Setting:
    """Classes, most objects in an image, and Mask R-CNN's canvas: as high and as wide as any image after the resize."""
    from trainfit.tasks.detection import statistics as of_data

    found = of_data.statistics(dataset.splits["train"])
    canvas = setting.canvas
    if family(setting.model) == "maskrcnn":
        from trainfit.models.maskrcnn.losses import resized
        from trainfit.models.maskrcnn.step import MAX_SIZE, MIN_SIZE

        low = setting.resolution or MIN_SIZE
        high = round(low * MAX_SIZE / MIN_SIZE)
        sizes = [resized(h, w, min_size=low, max_size=high) for (w, h), _ in found.canvas_sizes]
        canvas = max(h for h, _ in sizes), max(w for _, w in sizes)
    objects = max(1, found.objects_per_image_max)
    return replace(setting, classes=len(dataset.classes), objects_per_image=objects, canvas=canvas)


def decode_seconds(setting: Setting, dataset: "Dataset") -> float | None:
    """Seconds that one loader process takes for an image here; None for families without a loader of their own."""
    if family(setting.model) != "rfdetr":
        return None
    import torch

    from trainfit.models.registry import make_workload

    workload = make_workload(setting.model, dataset.classes, {"resolution": setting.resolution, "stage": setting.stage})
    decode, size = workload.decoder(), max(workload.sizes(multi_scale=setting.multi_scale))
    torch.set_num_threads(1)  # as in a loader process
    times: list[float] = []
    for record in dataset.splits["train"][:SAMPLED]:
        started = time.perf_counter()
        with contextlib.suppress(TrainfitError):  # an image that cannot be decoded: training leaves it out
            decode(record, size=size, augment=True, generator=torch.Generator().manual_seed(0))
            times.append(time.perf_counter() - started)
    return statistics.median(times) if times else None
