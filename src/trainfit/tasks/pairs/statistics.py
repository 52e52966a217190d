"""What a data set of pairs holds, in numbers; no file is read."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from trainfit.tasks.pairs.samples import PairRecord
from trainfit.tasks.task import Histogram, Table

EDGES = (0, 20, 40, 80, 160, 320, 640)


@dataclass(frozen=True, kw_only=True)
class PairStatistics:
    """Counts of a list of records."""

    images: int
    """Number of images."""
    texts: int
    """Number of texts."""
    texts_per_image_max: int
    """Texts of the image that has most."""
    several_texts: int
    """Images with more than one text."""
    shared_texts: int
    """Different texts that more than one image has."""
    characters_max: int
    """Characters of the longest text."""


def statistics(records: Sequence[PairRecord]) -> PairStatistics:
    """Counts images and texts."""
    images = [record for record in records if not record.text_only]
    owners = Counter(text for record in images for text in record.texts)
    counts = [len(record.texts) for record in images]
    return PairStatistics(
        images=len(images),
        texts=sum(counts),
        texts_per_image_max=max(counts, default=0),
        several_texts=sum(count > 1 for count in counts),
        shared_texts=sum(count > 1 for count in owners.values()),
        characters_max=max(map(len, owners), default=0),
    )


def table_of(splits: Mapping[str, Sequence[PairRecord]]) -> Table:
    """The counts of each split as a table for a person."""
    by_split = {split: asdict(statistics(records)) for split, records in splits.items()}
    words = {
        "images": "images",
        "texts": "texts",
        "texts_per_image_max": "most texts of an image",
        "several_texts": "images with several texts",
        "shared_texts": "texts of several images",
        "characters_max": "characters of the longest text",
    }
    rows = tuple((label, *(of_split[key] for of_split in by_split.values())) for key, label in words.items())
    return Table(title="", columns=("", *by_split), rows=rows)


def lengths_of(splits: Mapping[str, Sequence[PairRecord]]) -> Histogram:
    """Texts by their length in characters."""
    lengths = [len(text) for records in splits.values() for record in records for text in record.texts]
    limits: list[tuple[int, float]] = [*pairwise(EDGES), (EDGES[-1], float("inf"))]
    bins = tuple(
        (f"{low}-{high - 1:g}" if high < float("inf") else f"{low}-", sum(low <= n < high for n in lengths))
        for low, high in limits
    )
    return Histogram(title="Characters of a text, texts", bins=bins)


def record_of(splits: Mapping[str, Sequence[PairRecord]]) -> dict[str, Any]:
    """The counts of each split as JSON values."""
    return {split: asdict(statistics(records)) for split, records in splits.items()}
