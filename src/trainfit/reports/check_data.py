"""A checked data set as text or JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trainfit.reports.words import printable
from trainfit.tasks.detection.samples import Dataset, Finding
from trainfit.tasks.detection.statistics import DatasetStatistics, statistics

SCHEMA = 1
_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_SIZES_SHOWN = 8
_HEADINGS = {
    "error": "Errors (training refuses)",
    "skipped": "Skipped (left out)",
    "mended": "Mended (in memory; the files are as they were)",
    "note": "Notes",
}


def check_data_text(dataset: Dataset, *, ascii_only: bool = False) -> str:
    """Counts, objects per image, canvas sizes, then every finding, grouped by kind; nothing is cut short.

    `ascii_only` draws the bars of `#`, for an output that has no block characters.
    """
    by_split = {split: statistics(records) for split, records in dataset.splits.items()}
    everything = statistics([record for records in dataset.splits.values() for record in records])
    sections = [
        [f"{dataset.root}: {dataset.format}, {len(dataset.classes)} classes"],
        _counts(dataset, by_split),
        _histogram(everything, ascii_only=ascii_only),
        _canvases(everything),
        *_groups(dataset.findings),
        [_verdict(dataset.findings)],
    ]
    return "\n\n".join("\n".join(map(printable, lines)) for lines in sections)


def check_data_json(dataset: Dataset) -> dict[str, Any]:
    """The same as values: `schema` 1, statistics by split, all findings."""
    return {
        "schema": SCHEMA,
        "root": str(dataset.root),
        "format": dataset.format,
        "classes": [
            {"id": category, "name": name} for category, name in zip(dataset.category_ids, dataset.classes, strict=True)
        ],
        "splits": {split: asdict(statistics(records)) for split, records in dataset.splits.items()},
        "findings": [asdict(finding) for finding in dataset.findings],
    }


def _counts(dataset: Dataset, by_split: Mapping[str, DatasetStatistics]) -> list[str]:
    rows: list[tuple[str, Sequence[float]]] = [
        ("images", [s.images for s in by_split.values()]),
        ("  without objects", [s.empty_images for s in by_split.values()]),
        ("objects", [s.objects for s in by_split.values()]),
        ("  crowds", [s.crowds for s in by_split.values()]),
        ("objects per image, mean", [round(s.objects_per_image_mean, 1) for s in by_split.values()]),
        ("  99th percentile", [round(s.objects_per_image_percentiles[99], 1) for s in by_split.values()]),
        ("  most", [s.objects_per_image_max for s in by_split.values()]),
    ]
    rows += [
        (printable(f"class {name}"), [s.objects_per_class.get(index, 0) for s in by_split.values()])
        for index, name in enumerate(dataset.classes)
    ]
    width = max(len(label) for label, _ in rows)
    header = " " * width + "".join(f"{split:>10}" for split in by_split)
    return [header, *(f"{label:<{width}}" + "".join(f"{value:>10}" for value in values) for label, values in rows)]


def _histogram(everything: DatasetStatistics, *, ascii_only: bool) -> list[str]:
    bins = everything.objects_per_image_histogram
    most = max((count for _, _, count in bins), default=1)
    labels = [str(low) if low == high else f"{low}-{high}" for low, high, _ in bins]
    lines = [
        f"  {label:>7} {_bar(n / most, ascii_only=ascii_only)} {n}"
        for label, (_, _, n) in zip(labels, bins, strict=True)
    ]
    return ["Objects per image (crowds apart), images", *lines]


def _bar(share: float, *, ascii_only: bool) -> str:
    """A bar of block characters, an eighth of a character exact."""
    if ascii_only:
        return "#" * round(share * _BAR_WIDTH)
    eighths = round(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _canvases(everything: DatasetStatistics) -> list[str]:
    sizes = everything.canvas_sizes
    lines = [f"  {width} x {height}: {count} images" for (width, height), count in sizes[:_SIZES_SHOWN]]
    if rest := sizes[_SIZES_SHOWN:]:
        lines.append(f"  {len(rest)} more sizes: {sum(count for _, count in rest)} images")
    width, height = everything.largest_canvas
    lines.append(f"  largest {width} x {height}; widest {everything.width_max}, highest {everything.height_max}")
    return ["Canvas sizes, width x height in pixels", *lines]


def _groups(findings: tuple[Finding, ...]) -> list[list[str]]:
    sections: list[list[str]] = []
    for severity, heading in _HEADINGS.items():
        kinds: dict[str, list[Finding]] = {}
        for finding in findings:
            if finding.severity == severity:
                kinds.setdefault(finding.kind, []).append(finding)
        if kinds:
            lines = [heading]
            for kind, group in kinds.items():
                lines.append(f"  {kind}: {len(group)}")
                lines += [f"    {finding.where}: {finding.message}" for finding in group]
            sections.append(lines)
    return sections


def _verdict(findings: tuple[Finding, ...]) -> str:
    counts = {severity: sum(finding.severity == severity for finding in findings) for severity in _HEADINGS}
    what = f"{counts['error']} errors, {counts['skipped']} skipped, {counts['mended']} mended, {counts['note']} notes"
    return f"{what}: " + ("training refuses this data set" if counts["error"] else "training can use this data set")
