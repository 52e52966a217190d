"""Findings: what is wrong with a data set, in a list that a file with millions of defects does not blow up."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from trainfit.errors import TrainfitError

MOST_LISTED = 10_000
"""Findings of one kind that are listed one by one; a finding takes about a KiB, with its line of the report."""


Severity = Literal["error", "skipped", "mended", "note"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One defect of a data set, or one choice made while reading it."""

    severity: Severity
    """`error`: training refuses; `skipped`: left out; `mended`: repaired in memory; `note`: nothing was changed."""
    kind: str
    """What it is, in a few words that are the same for all of a kind: "zero-size box"."""
    where: str
    """File and id: "BloodImage_00338.xml object 7"."""
    message: str
    """What is wrong, with the values, and what was done."""


class Findings:
    """Collects findings; of each kind the first `MOST_LISTED` are kept and the others are counted."""

    def __init__(self, where: str) -> None:
        """`where` names the file or split in the finding that counts."""
        self._where = where
        self._listed: list[Finding] = []
        self._counts: Counter[tuple[Severity, str]] = Counter()

    def append(self, finding: Finding) -> None:
        """Keep or count a finding."""
        key = (finding.severity, finding.kind)
        self._counts[key] += 1
        if self._counts[key] <= MOST_LISTED:
            self._listed.append(finding)

    def extend(self, findings: Iterable[Finding]) -> None:
        """Keep or count each."""
        for finding in findings:
            self.append(finding)

    def all(self) -> list[Finding]:
        """What was kept, and one finding for each kind of which there were more."""
        more = [
            Finding(severity=severity, kind=kind, where=self._where, message=f"{count - MOST_LISTED} more, not listed")
            for (severity, kind), count in self._counts.items()
            if count > MOST_LISTED
        ]
        return self._listed + more


def require_none(findings: Sequence[Finding], check: str) -> None:
    """Refuse a data set with an error; `check` is the command that lists everything.

    Raises:
        TrainfitError: with the first `error` finding, and how many more there are.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        first = errors[0]
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise TrainfitError(f"{first.where}: {first.kind}: {first.message}{more}; `{check}` lists everything")


def note_lines(findings: Iterable[Finding]) -> list[str]:
    """What was left out, mended or held out, a line each."""
    lines: list[str] = []
    for finding in findings:
        if finding.severity in ("skipped", "mended"):
            lines.append(f"{finding.severity}: {finding.where}: {finding.kind}: {finding.message}")
        elif finding.kind == "val held out":
            lines.append(finding.message)
    return lines
