"""A checked data set as text or JSON, whatever its task."""

from dataclasses import asdict
from typing import Any

from trainfit.reports.words import printable
from trainfit.tasks.findings import Finding
from trainfit.tasks.task import DataCheck, Histogram, Lines, Table
from trainfit.training.lines import counted

SCHEMA = 1
_BAR_WIDTH = 40
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEADINGS = {
    "error": "Errors (training refuses)",
    "skipped": "Skipped (left out)",
    "mended": "Mended (in memory; the files are as they were)",
    "note": "Notes",
}


def check_data_text(check: DataCheck, *, ascii_only: bool = False) -> str:
    """The statistics, then every finding, grouped by kind, in full length.

    `ascii_only` draws the bars of `#`, for an output that has no block characters.
    """
    sections = [
        [check.title],
        *(_section(section, ascii_only=ascii_only) for section in check.sections),
        *_groups(check.findings),
        [_verdict(check.findings)],
    ]
    return "\n\n".join("\n".join(map(printable, lines)) for lines in sections)


def check_data_json(check: DataCheck) -> dict[str, Any]:
    """The check as JSON values: `schema` 1, the task's statistics and all findings."""
    return {"schema": SCHEMA, **check.record, "findings": [asdict(finding) for finding in check.findings]}


def _section(section: Table | Histogram | Lines, *, ascii_only: bool) -> list[str]:
    if isinstance(section, Table):
        return _table(section)
    if isinstance(section, Histogram):
        return _histogram(section, ascii_only=ascii_only)
    return [section.title, *(f"  {line}" for line in section.lines)]


def _table(table: Table) -> list[str]:
    labels = [printable(str(row[0])) for row in table.rows]
    width = max(len(label) for label in (table.columns[0], *labels))
    header = f"{table.columns[0]:<{width}}" + "".join(f"{column:>10}" for column in table.columns[1:])
    rows = [
        f"{label:<{width}}" + "".join(f"{'-' if cell is None else cell:>10}" for cell in row[1:])
        for label, row in zip(labels, table.rows, strict=True)
    ]
    title = [table.title] if table.title else []
    return [*title, header, *rows]


def _histogram(histogram: Histogram, *, ascii_only: bool) -> list[str]:
    most = max((number for _, number in histogram.bins), default=1)
    lines = [
        f"  {label:>7} {_bar(number / max(1, most), ascii_only=ascii_only)} {number}"
        for label, number in histogram.bins
    ]
    return [histogram.title, *lines]


def _bar(share: float, *, ascii_only: bool) -> str:
    """A bar of block characters, an eighth of a character exact."""
    if ascii_only:
        return "#" * round(share * _BAR_WIDTH)
    eighths = round(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


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
    errors = counted(counts["error"], "error")
    notes = counted(counts["note"], "note")
    what = f"{errors}, {counts['skipped']} skipped, {counts['mended']} mended, {notes}"
    return f"{what}: " + ("training refuses this data set" if counts["error"] else "training can use this data set")
