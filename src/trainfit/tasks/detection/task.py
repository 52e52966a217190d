"""Detection of objects, with boxes and masks, as a `Task`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.check import check
from trainfit.tasks.detection.class_names import positions
from trainfit.tasks.detection.masks import require_masks
from trainfit.tasks.detection.metric import DetectionMetric
from trainfit.tasks.detection.pictures import coco_annotation, drawn, file_record, row_text, rows
from trainfit.tasks.detection.read import read_dataset, recognises, require_no_errors
from trainfit.tasks.detection.samples import DetectionDataset, ImageRecord, Sample
from trainfit.tasks.detection.statistics import DatasetStatistics
from trainfit.tasks.detection.statistics import statistics as statistics_of
from trainfit.tasks.findings import note_lines
from trainfit.tasks.task import split_sizes

__all__ = [
    "check",
    "coco_annotation",
    "compare",
    "drawn",
    "file_record",
    "metric",
    "notes",
    "only_classes",
    "read",
    "recognises",
    "require",
    "row_text",
    "rows",
    "statistics",
    "summary",
    "worst_first",
]
"""The functions of `tasks.task.Task`, `tasks.task.Inference` and `tasks.task.CocoForm`."""


def read(
    data: str,
    *,
    file_format: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    allow_outside: bool = False,
) -> DetectionDataset:
    """The data set in a folder, a COCO JSON file or a YOLO data file, or the built-in `sample`.

    Raises:
        TrainfitError: there is no data set, or it has an error that training cannot ignore.
    """
    dataset = read_dataset(data, format=file_format, val_fraction=val_fraction, seed=seed, allow_outside=allow_outside)
    require_no_errors(dataset)
    return dataset


def only_classes(dataset: DetectionDataset, rows: Sequence[int]) -> DetectionDataset:
    """Objects of other classes are left out; images without any of these stay as background."""
    place = np.full(len(dataset.classes), -1, np.int64)
    place[list(rows)] = np.arange(len(rows))

    def cut(record: ImageRecord) -> ImageRecord:
        new = place[record.classes]
        keep = new >= 0
        segmentations = tuple(each for each, stays in zip(record.segmentations, keep, strict=True) if stays)
        arrays = {name: getattr(record, name)[keep] for name in ("boxes", "crowd", "areas", "object_ids")}
        return replace(record, classes=new[keep], segmentations=segmentations, **arrays)

    return replace(
        dataset,
        classes=tuple(dataset.classes[row] for row in rows),
        category_ids=tuple(dataset.category_ids[row] for row in rows),
        splits={split: tuple(map(cut, records)) for split, records in dataset.splits.items()},
    )


def summary(dataset: DetectionDataset) -> str:
    """Images of each split, classes, and the format."""
    return f"data: {split_sizes(dataset.splits)}, {len(dataset.classes)} classes ({dataset.format})"


def notes(dataset: DetectionDataset) -> Sequence[str]:
    """What was left out, mended or held out, a line each."""
    return note_lines(dataset.findings)


def require(dataset: DetectionDataset, workload: Any) -> None:
    """Refuse data without masks for a model that trains on masks.

    Raises:
        TrainfitError: an object has no mask.
    """
    if workload.masks:
        require_masks([record for split in ("train", "val") for record in dataset.splits[split]])


def compare(dataset: DetectionDataset, workload: Any, *, data: str, weights: str) -> Sequence[str]:
    """A remark on classes of the data set that the model does not have.

    Raises:
        TrainfitError: it has none of them.
    """
    known: Sequence[str] = workload.classes
    wanted = dataset.classes
    unknown = [name for name, row in zip(wanted, positions(wanted, known), strict=True) if row is None]
    if len(unknown) == len(wanted):
        trained = ", ".join(name for name in known if name)
        raise TrainfitError(f"{data} has the classes {', '.join(wanted)}, {weights} was trained on others: {trained}")
    if not unknown:
        return []
    return [f"{weights} does not know {', '.join(unknown)}: it never predicts them, so their score is 0"]


def statistics(records: Sequence[ImageRecord]) -> DatasetStatistics:
    """Counts and sizes of images and their objects."""
    return statistics_of(records)


def extent(sample: Sample) -> dict[str, float]:
    """Pixels and objects of a decoded image."""
    height, width = sample.image.shape[1:]
    return {"pixels": float(height * width), "objects": float(len(sample.classes))}


def worst_first(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """The largest image, to whose size its window is padded, then the others by their number of objects."""
    crowded = sorted(records, key=lambda r: (-int((~r.crowd).sum()), -r.width * r.height))
    largest = max(crowded, key=lambda r: r.width * r.height)
    return [largest, *(record for record in crowded if record is not largest)]


def metric(
    records: Sequence[ImageRecord],
    workload: Any,
    *,
    dataset: DetectionDataset | None = None,
    max_detections: int | None = None,
) -> DetectionMetric:
    """AP of boxes, and of masks where the workload has them.

    Args:
        records: The images.
        workload: What detects; `masks`, `classes` and `max_detections` are taken from it.
        dataset: The records' data set, where its classes may not be the workload's: they are compared by name.
        max_detections: Detections that count for each image and class, instead of the workload's.

    Raises:
        TrainfitError: `max_detections` is less than 1.
    """
    if max_detections is not None and max_detections < 1:
        raise TrainfitError(f"--max-detections must be at least 1, not {max_detections}")
    return DetectionMetric(
        records,
        workload.classes if dataset is None else dataset.classes,
        masks=workload.masks,
        max_detections=max_detections or workload.max_detections,
        model_classes=None if dataset is None else workload.classes,
    )
