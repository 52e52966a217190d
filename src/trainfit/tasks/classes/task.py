"""Images of one class each, in folders by class, as a `Task`; `trainfit.tasks.task` says what the functions do."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.tasks.classes.check import check
from trainfit.tasks.classes.metric import Accuracy
from trainfit.tasks.classes.pictures import drawn, file_record, row_text, rows
from trainfit.tasks.classes.read import read, recognises
from trainfit.tasks.classes.samples import ClassRecord, ImageFolder
from trainfit.tasks.task import split_sizes

__all__ = [
    "check",
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
"""The functions of `tasks.task.Task` and of `tasks.task.Inference`."""


def only_classes(dataset: ImageFolder, rows: Sequence[int]) -> ImageFolder:
    """Images of other classes are left out."""
    place = {row: number for number, row in enumerate(rows)}
    splits = {
        split: tuple(replace(record, label=place[record.label]) for record in records if record.label in place)
        for split, records in dataset.splits.items()
    }
    return replace(dataset, classes=tuple(dataset.classes[row] for row in rows), splits=splits)


def summary(dataset: ImageFolder) -> str:
    """Images of each split, and classes."""
    return f"data: {split_sizes(dataset.splits)}, {len(dataset.classes)} classes ({dataset.format})"


def notes(dataset: ImageFolder) -> Sequence[str]:
    """What was left out or held out, one line each."""
    return [
        finding.message if finding.kind == "val held out" else f"{finding.severity}: {finding.where}: {finding.message}"
        for finding in dataset.findings
    ]


def require(dataset: ImageFolder, workload: Any) -> None:
    """Any classifier trains on any folders by class."""


def compare(dataset: ImageFolder, workload: Any, *, data: str, weights: str) -> Sequence[str]:
    """A remark on classes that the model does not have.

    Raises:
        TrainfitError: it has none of them.
    """
    unknown = [name for name in dataset.classes if name not in workload.classes]
    if len(unknown) == len(dataset.classes):
        raise TrainfitError(
            f"{data} has the classes {', '.join(unknown[:10])}, {weights} was trained on others: {', '.join(workload.classes[:10])}"
        )
    return [f"{weights} does not know {', '.join(unknown)}: it never predicts them"] if unknown else []


def statistics(records: Sequence[ClassRecord]) -> int:
    """The number of images: nothing else of them determines a knob."""
    return len(records)


def worst_first(records: Sequence[ClassRecord]) -> Sequence[ClassRecord]:
    """The largest image first: on the GPU all have one size."""
    return sorted(records, key=lambda record: -record.width * record.height)


def metric(records: Sequence[ClassRecord], workload: Any, *, dataset: ImageFolder | None = None) -> Accuracy:
    """Top-1 and top-5 accuracy; classes of another data set are compared by name."""
    known: Sequence[str] = workload.classes
    classes = known if dataset is None else dataset.classes
    place = {name: row for row, name in enumerate(classes)}
    return Accuracy(records, classes, [place.get(name) for name in known])
