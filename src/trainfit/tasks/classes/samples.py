"""Records, samples and outputs of images that have one class each."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trainfit.tasks.findings import Finding

UNKNOWN = -1
"""The class of a record without truth."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassRecord:
    """An image file and its class."""

    id: int
    """Unique in its split."""
    path: Path
    """The image file."""
    width: int
    """In pixels, after the EXIF rotation."""
    height: int
    """In pixels, after the EXIF rotation."""
    label: int
    """Index of its class."""

    def without_truth(self) -> "ClassRecord":
        """The image alone."""
        return replace(self, label=UNKNOWN)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledImage:
    """One image and its class, on the CPU."""

    image: torch.Tensor
    """uint8 (3, height, width)."""
    label: int
    """Index of its class."""
    record_id: int = 0
    """`ClassRecord.id`."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a model gives for an image."""

    record_id: int
    """`ClassRecord.id`."""
    classes: tuple[int, ...]
    """The most likely, the first first; five at most."""
    scores: tuple[float, ...]
    """Their probabilities."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """A data set of folders by class."""

    root: Path
    """The folder."""
    splits: dict[str, tuple[ClassRecord, ...]]
    """Records by split: train, and val and test where there are some."""
    classes: tuple[str, ...]
    """Names of the folders, in alphabetical order, as torchvision's ImageFolder numbers them."""
    findings: tuple[Finding, ...]
    """Everything that was wrong, and every choice made while reading."""
    format: str = "image folder"
    """Name of the format, for reports."""
