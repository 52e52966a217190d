"""A task that is no part of trainfit: images in folders by class, SPLIT/CLASS/*.png, measured by their accuracy."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainfit.errors import TrainfitError
from trainfit.step import ranks
from trainfit.tasks.task import DataCheck, Evaluation, Table


@dataclass(frozen=True, kw_only=True)
class ClassRecord:
    """An image file and its class."""

    id: int
    path: Path
    label: int

    def without_truth(self) -> "ClassRecord":
        """The image alone."""
        return replace(self, label=-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImage:
    """A decoded record."""

    image: torch.Tensor
    """uint8 (3, height, width)."""
    label: int
    record_id: int


@dataclass(frozen=True, kw_only=True)
class Label:
    """The class that a model gives an image."""

    record_id: int
    label: int


@dataclass(frozen=True, kw_only=True)
class ClassFolders:
    """A data set."""

    splits: dict[str, list[ClassRecord]]
    classes: tuple[str, ...]


def decode(record: ClassRecord, *, size: int, augment: AbstractSet[str], generator: torch.Generator) -> LabelledImage:
    """The image at `size` x `size`, mirrored at random in training."""
    try:
        with Image.open(record.path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB").resize((size, size)))).permute(2, 0, 1)
    except OSError as error:
        raise TrainfitError(f"{record.path}: {error}") from error
    if "flip" in augment and torch.rand((), generator=generator) < 0.5:
        pixels = pixels.flip(2)
    return LabelledImage(image=pixels.contiguous(), label=record.label, record_id=record.id)


def recognises(data: str) -> bool:
    """Whether there are folders of classes."""
    return any(Path(data).glob("train/*/*.png"))


def read(data: str, **_options: Any) -> ClassFolders:
    """The folders below `data`."""
    folder = Path(data)
    classes = tuple(sorted(each.name for each in (folder / "train").glob("*/")))
    if not classes:
        raise TrainfitError(f"{folder} has no folder train/CLASS")
    splits: dict[str, list[ClassRecord]] = {}
    for split in ("train", "val"):
        files = [(file, row) for row, name in enumerate(classes) for file in sorted((folder / split / name).iterdir())]
        splits[split] = [ClassRecord(id=i, path=file, label=row) for i, (file, row) in enumerate(files)]
    return ClassFolders(splits=splits, classes=classes)


def check(data: str, **_options: Any) -> DataCheck:
    """The number of images of each split; nothing is ever wrong."""
    dataset = read(data)
    counts = {split: len(records) for split, records in dataset.splits.items()}
    table = Table(title="", columns=("", *counts), rows=(("images", *counts.values()),))
    return DataCheck(dataset=dataset, title=data, sections=(table,), record={"splits": counts}, findings=())


def summary(dataset: ClassFolders) -> str:
    """Images and classes, in a line."""
    return f"data: {len(dataset.splits['train'])} images, {len(dataset.classes)} classes"


def notes(_dataset: ClassFolders) -> Sequence[str]:
    """Nothing is left out."""
    return ()


def require(dataset: ClassFolders, workload: Any) -> None:
    """Any model that takes classes takes these."""


def compare(dataset: ClassFolders, workload: Any, *, data: str, weights: str) -> Sequence[str]:
    """Any model of these classes can be evaluated."""
    return () if dataset.classes == workload.classes else (f"{weights} has other classes than {data}",)


def statistics(records: Sequence[ClassRecord]) -> int:
    """The number of images."""
    return len(records)


def worst_first(records: Sequence[ClassRecord]) -> Sequence[ClassRecord]:
    """All need the same memory."""
    return records


class Accuracy:
    """Share of the images whose class is right."""

    def __init__(self, records: Sequence[ClassRecord]) -> None:
        self.truth = {record.id: record.label for record in records}
        self.right = 0

    def add(self, outputs: Sequence[Label]) -> None:
        """Count those that are right."""
        self.right += sum(self.truth[each.record_id] == each.label for each in outputs)

    def result(self) -> Evaluation:
        """The share over all ranks."""
        right = ranks.sum_over_ranks({"right": float(self.right)})["right"]
        accuracy = right / len(self.truth)
        return Evaluation(
            score=accuracy,
            score_name="accuracy",
            figures={"accuracy": accuracy},
            record={"accuracy": accuracy},
            tables=(Table(title="classes", columns=("figure", "value"), rows=(("accuracy", accuracy),)),),
            details={"accuracy": accuracy},
        )


def metric(records: Sequence[ClassRecord], _workload: Any, **_options: Any) -> Accuracy:
    """The accuracy on these records."""
    return Accuracy(records)
