"""Samples of a data set as training makes them, for users to look at."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.workload import TrainableWorkload
from trainfit.tasks.augment import Augmentation
from trainfit.training.loader import SAMPLE, Making, Part, SampleKey, Unreadable
from trainfit.training.schedule import mix

EPOCHS = 3
"""Random draws that are shown for each record."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """A sample, of any task."""

    image: torch.Tensor
    """uint8 (3, height, width)."""
    boxes: Sequence[tuple[float, float, float, float]] = ()
    """x0, y0, x1, y1 in pixels of `image`."""
    masks: torch.Tensor | None = None
    """bool (n, height, width)."""
    names: Sequence[str] = ()
    """The class of each box, or the image's."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Preview:
    """A record without augmentation, and as the first epochs draw it."""

    path: str
    """Path of the file."""
    caption: str
    """Its texts; empty where it has none."""
    plain: Shown
    """The sample without augmentation."""
    drawn: Sequence[Shown]
    """The sample of each of the first epochs."""


def previews(
    records: Sequence[Any],
    classes: tuple[str, ...],
    workload: TrainableWorkload,
    augmentation: Augmentation,
    *,
    count: int,
    seed: int = 0,
) -> list[Preview]:
    """Records spread over the split, at the size of evaluation; records that cannot be decoded are passed over.

    Raises:
        TrainfitError: none can be decoded.
    """
    plain = Making(decode=workload.decoder(), augment=Augmentation())
    drawing = Making(decode=workload.decoder(), augment=augmentation)
    step = max(1, len(records) // count)
    size = workload.eval_size
    made: list[Preview] = []
    for number in range(0, len(records), step):
        record = records[number]
        keys = [SampleKey(record=record, size=size, seed=mix(seed, SAMPLE, epoch, number)) for epoch in range(EPOCHS)]
        samples = [*plain(Part(keys=keys[:1])), *drawing(Part(keys=keys))]
        if any(isinstance(sample, Unreadable) or sample.image.dim() != 3 for sample in samples):
            continue
        first, *others = (_shown(sample, classes) for sample in samples)
        texts = record.texts if "texts" in _names(record) else ()
        made.append(Preview(path=str(record.path), caption=" / ".join(texts), plain=first, drawn=others))
        if len(made) == count:
            break
    if not made:
        raise TrainfitError("no sample can be shown: none of the images can be decoded")
    return made


def _names(values: Any) -> set[str]:
    return {field.name for field in fields(values)}


def _shown(sample: Any, classes: tuple[str, ...]) -> Shown:
    names = _names(sample)
    if "boxes" in names:
        boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in sample.boxes.tolist()]
        labels = [classes[row] for row in sample.classes.tolist()]
        return Shown(image=sample.image, boxes=boxes, masks=sample.masks, names=labels)
    return Shown(image=sample.image, names=[classes[sample.label]] if "label" in names and classes else [])
