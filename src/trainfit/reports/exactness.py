"""The result of an exactness check as text and as JSON."""

from dataclasses import asdict
from typing import Any

from trainfit.exactness.loop import Exactness


def exactness_text(result: Exactness) -> str:
    """A verdict, a line for each cause, and a line for each parameter group."""
    ranks = f" x {result.ranks} ranks" if result.ranks > 1 else ""
    cut = f"micro-batch {result.micro_batch} x {result.accumulation}{ranks}, {result.windows} windows"
    lines = [f"exact: every window has the gradient of one big batch ({cut})"]
    if result.findings:
        lines = [f"not exact ({cut})"]
        lines += [f"  {finding.cause}: {finding.explanation}" for finding in result.findings]
    lines += ["", "relative error of the gradient"]
    lines += [
        f"  {group.name}, {group.parameters} parameters: {group.relative_error:.1e} (largest in {group.worst})"
        for group in result.groups
    ]
    lines += [f"note: {note}" for note in (*result.notes, f"errors up to {result.tolerance:.0e} count as rounding")]
    return "\n".join(lines)


def exactness_json(result: Exactness) -> dict[str, Any]:
    """Schema 1."""
    return {"schema": 1, "exact": result.exact, **asdict(result)}
