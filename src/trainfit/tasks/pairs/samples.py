"""What every reader of pairs gives and every family that trains on them takes: images with their texts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from trainfit.tasks.findings import Finding


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRecord:
    """One image of a data set and its texts, before anything is decoded; or texts alone."""

    id: int
    """Unique in its split."""
    file: str
    """The image, or the shard that holds it; for texts alone the file that they come from."""
    texts: tuple[str, ...]
    """Its texts."""
    offset: int = -1
    """Where the image begins in a shard, in bytes; -1: the file is the image."""
    length: int = 0
    """Bytes of the image in a shard."""
    label: int = -1
    """Class of the image, or of the texts, in a data set for zero-shot classification."""
    text_only: bool = False
    """Whether it has no image."""
    for_evaluation: bool = False
    """Whether all texts are wanted, instead of one that is drawn."""

    @property
    def path(self) -> Path:
        """The file, for messages."""
        return Path(self.file)

    def without_truth(self) -> "PairRecord":
        """The record with all its texts, which are inputs: evaluation encodes them."""
        return replace(self, for_evaluation=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class PairFeatures:
    """What a model makes of a record: normalised features on the CPU."""

    record_id: int
    """`PairRecord.id`."""
    image: torch.Tensor | None
    """float32 (d,)."""
    texts: torch.Tensor | None
    """float32 (texts, d)."""


@dataclass(frozen=True, kw_only=True)
class PairDataset:
    """A data set as read: records by split, and everything that was found wrong."""

    root: Path
    """The file or folder."""
    format: str
    """`table`, `folder`, `coco`, `webdataset` or `classes`."""
    splits: Mapping[str, tuple[PairRecord, ...]]
    """Keys out of `train`, `val`, `test`."""
    findings: tuple[Finding, ...]
    """Everything that was wrong, and every choice made while reading."""
    classes: tuple[str, ...] = ()
    """Names for zero-shot classification; empty for pairs."""
