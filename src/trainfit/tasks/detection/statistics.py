"""Statistics of a data set that determine a training step: objects and canvas sizes, as values and as tables."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainfit.tasks.detection.samples import ImageRecord
from trainfit.tasks.task import Cell, Histogram, Lines, Table

PERCENTILES = (50, 90, 95, 99)
HISTOGRAM_EDGES = (0, 1, 2, 3, 5, 9, 17, 33, 65, 129, 257, 513)
SIZES_SHOWN = 8
"""Canvas sizes that are listed one by one."""


@dataclass(frozen=True, kw_only=True)
class DatasetStatistics:
    """Counts of a list of records. "Per image" counts what is trained on, so without crowds."""

    images: int
    """Number of images."""
    empty_images: int
    """Images without any object, crowds included."""
    objects: int
    """All objects, crowds included."""
    crowds: int
    """Number of crowds."""
    objects_per_image_max: int
    """Objects of the fullest image."""
    objects_per_image_mean: float
    """Mean over all images, empty ones included."""
    objects_per_image_percentiles: Mapping[int, float]
    """Percentile (50, 90, 95, 99) -> objects per image."""
    objects_per_image_histogram: tuple[tuple[int, int, int], ...]
    """(fewest, most, images) of each bin; bins double in width, up to the one of the maximum."""
    objects_per_class: Mapping[int, int]
    """Class index -> its objects; classes without objects are missing."""
    width_max: int
    """Pixels."""
    height_max: int
    """Pixels."""
    largest_canvas: tuple[int, int]
    """(width, height) of the image with the most pixels; (0, 0) without images."""
    canvas_sizes: tuple[tuple[tuple[int, int], int], ...]
    """((width, height), images) of every size, the most frequent first."""


def statistics(records: Sequence[ImageRecord]) -> DatasetStatistics:
    """Counts objects, crowds, classes and canvas sizes; no file is read."""
    counts = np.array([int((~record.crowd).sum()) for record in records] or [0])
    objects = sum(len(record.classes) for record in records)
    classes = Counter(int(index) for record in records for index in record.classes)
    sizes = Counter((record.width, record.height) for record in records)
    return DatasetStatistics(
        images=len(records),
        empty_images=sum(len(record.classes) == 0 for record in records),
        objects=objects,
        crowds=sum(int(record.crowd.sum()) for record in records),
        objects_per_image_max=int(counts.max()),
        objects_per_image_mean=float(counts.mean()),
        objects_per_image_percentiles={p: float(np.percentile(counts, p)) for p in PERCENTILES},
        objects_per_image_histogram=_histogram(counts.tolist() if records else []),
        objects_per_class=dict(sorted(classes.items())),
        width_max=max((width for width, _ in sizes), default=0),
        height_max=max((height for _, height in sizes), default=0),
        largest_canvas=max(sizes, key=lambda size: (size[0] * size[1], size), default=(0, 0)),
        canvas_sizes=tuple(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))),
    )


def _histogram(counts: Sequence[int]) -> tuple[tuple[int, int, int], ...]:
    edges: list[int] = list(HISTOGRAM_EDGES)
    while edges[-1] <= max(counts, default=0):
        edges.append(2 * edges[-1] - 1)
    bins = [(low, high - 1, sum(low <= n < high for n in counts)) for low, high in pairwise(edges)]
    return tuple(entry for entry in bins if entry[0] <= max(counts, default=-1))


def sections_of(
    by_split: Mapping[str, DatasetStatistics], everything: DatasetStatistics, classes: Sequence[str]
) -> tuple[Table | Histogram | Lines, ...]:
    """Counts by split, objects per image and canvas sizes of all splits together, for a person."""
    return _counts(by_split, classes), _objects(everything), _canvases(everything)


def _counts(by_split: Mapping[str, DatasetStatistics], classes: Sequence[str]) -> Table:
    splits = by_split.values()
    rows: list[tuple[Cell, ...]] = [
        ("images", *(s.images for s in splits)),
        ("  without objects", *(s.empty_images for s in splits)),
        ("objects", *(s.objects for s in splits)),
        ("  crowds", *(s.crowds for s in splits)),
        ("objects per image, mean", *(round(s.objects_per_image_mean, 1) for s in splits)),
        ("  99th percentile", *(round(s.objects_per_image_percentiles[99], 1) for s in splits)),
        ("  most", *(s.objects_per_image_max for s in splits)),
    ]
    rows += [
        (f"class {name}", *(s.objects_per_class.get(index, 0) for s in splits)) for index, name in enumerate(classes)
    ]
    return Table(title="", columns=("", *by_split), rows=tuple(rows))


def _objects(everything: DatasetStatistics) -> Histogram:
    bins = everything.objects_per_image_histogram
    return Histogram(
        title="Objects per image (crowds apart), images",
        bins=tuple((str(low) if low == high else f"{low}-{high}", number) for low, high, number in bins),
    )


def _canvases(everything: DatasetStatistics) -> Lines:
    sizes = everything.canvas_sizes
    lines = [f"{width} x {height}: {count} images" for (width, height), count in sizes[:SIZES_SHOWN]]
    rest = sizes[SIZES_SHOWN:]
    if rest:
        lines.append(f"{len(rest)} more sizes: {sum(count for _, count in rest)} images")
    width, height = everything.largest_canvas
    lines.append(f"largest {width} x {height}; widest {everything.width_max}, highest {everything.height_max}")
    return Lines(title="Canvas sizes, width x height in pixels", lines=tuple(lines))
