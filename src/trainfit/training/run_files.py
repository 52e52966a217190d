"""A run folder's files that need no torch to be read: their names, and the lines of those that grow."""

import json
from pathlib import Path
from typing import Any

RECIPE = "recipe.json"
PLAN = "plan.json"
"""The plan that the run was started with, if it was."""
METRICS = "metrics.jsonl"
"""Losses, rates, AP: the same bit for bit in a resumed run."""
TELEMETRY = "telemetry.jsonl"
"""Times, memory, waiting for data, events: never the same twice."""


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a JSON-lines file, each an object with a whole number `step`, and the number of lines that are none.

    A line may be cut short by a kill, blank, or no UTF-8. Without the file there are no rows.
    """
    rows: list[dict[str, Any]] = []
    bad = 0
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        else:
            bad += 1
    return rows, bad
