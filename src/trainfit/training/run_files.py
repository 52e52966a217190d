"""Files of a run folder that can be read without torch: their names, and the rows of JSON-lines files."""

from pathlib import Path
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.files import read_json_lines

RECIPE = "recipe.json"
PLAN = "plan.json"
"""The plan that the run was started with, if any."""
METRICS = "metrics.jsonl"
"""Losses, learning rates and scores, which are bit for bit the same in a resumed run."""
PICTURES = "pictures"
"""The folder of the best evaluation's pictures and curves."""
TELEMETRY = "telemetry.jsonl"
"""Times, memory, waiting for data and events, which differ from run to run."""


def read_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a JSON-lines file, each an object with a whole number `step`, and the number of lines that are none.

    A line may be cut short by a kill, blank, or no UTF-8. Without the file there are no rows.

    Raises:
        TrainfitError: the file cannot be read.
    """
    try:
        objects, bad = read_json_lines(path)
    except OSError as error:
        raise TrainfitError(f"{path} cannot be read ({error.strerror}): remove it") from error
    rows = [row for row in objects if type(row.get("step")) is int]
    return rows, bad + len(objects) - len(rows)
