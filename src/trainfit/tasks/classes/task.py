"""Images of one class each, in folders by class, as a `Task`; `trainfit.tasks.task` says what the functions do."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.tasks.classes.folder import read_folder, recognises
from trainfit.tasks.classes.metric import Accuracy
from trainfit.tasks.classes.pictures import drawn, file_record, row_text, rows
from trainfit.tasks.classes.samples import ClassRecord, ImageFolder
from trainfit.tasks.findings import Finding, note_lines
from trainfit.tasks.images import read_image
from trainfit.tasks.task import DataCheck, Progress, Table

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
FORMAT = "image-folder"


def read(
    data: str,
    *,
    file_format: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    allow_outside: bool = False,
) -> ImageFolder:
    """The folders by class below `data`.

    Raises:
        TrainfitError: there are none, or no image can be used.
    """
    _require_format(file_format)
    return read_folder(data, val_fraction=val_fraction, seed=seed, allow_outside=allow_outside)


def check(
    data: str,
    *,
    file_format: str | None = None,
    decode: bool = True,
    allow_outside: bool = False,
    progress: Progress | None = None,
) -> DataCheck:
    """Images by split and class, and every image that cannot be used."""
    _require_format(file_format)
    dataset = read_folder(data, allow_outside=allow_outside)
    findings = [*dataset.findings]
    splits = dict(dataset.splits)
    if decode:
        done = 0
        total = sum(map(len, splits.values()))
        for split, records in dataset.splits.items():
            bad: set[int] = set()
            for record in records:
                try:
                    read_image(record)
                except TrainfitError as error:
                    bad.add(record.id)
                    where = str(record.path.relative_to(dataset.root))
                    findings.append(Finding(severity="skipped", kind="damaged image", where=where, message=str(error)))
                done += 1
                if progress is not None:
                    progress(done, total)
            splits[split] = tuple(record for record in records if record.id not in bad)
    kept = ImageFolder(root=dataset.root, splits=splits, classes=dataset.classes, findings=tuple(findings))
    counts = {
        split: [sum(record.label == row for record in records) for row in range(len(kept.classes))]
        for split, records in splits.items()
    }
    by_class = tuple((name, *(counts[split][row] for split in counts)) for row, name in enumerate(kept.classes))
    images = ("images", *map(sum, counts.values()))
    return DataCheck(
        dataset=kept,
        title=f"{kept.root}: {kept.format}, {len(kept.classes)} classes",
        sections=(Table(title="", columns=("", *counts), rows=(images, *by_class)),),
        record={
            "root": str(kept.root),
            "format": kept.format,
            "classes": list(kept.classes),
            "splits": {split: {"images": sum(each), "by_class": each} for split, each in counts.items()},
        },
        findings=kept.findings,
    )


def _require_format(file_format: str | None) -> None:
    if file_format not in (None, FORMAT):
        raise TrainfitError(f"--format {file_format}: data of classes are only read as {FORMAT}")


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
    images = {split: len(records) for split, records in dataset.splits.items()}
    return f"data: {images}, {len(dataset.classes)} classes ({dataset.format})"


def notes(dataset: ImageFolder) -> Sequence[str]:
    """What was left out or held out, one line each."""
    return note_lines(dataset.findings)


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
