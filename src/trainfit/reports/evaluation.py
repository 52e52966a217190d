"""An evaluation as text or JSON, whatever its task."""

import dataclasses
from typing import Any

from trainfit.reports.tables import table_text
from trainfit.tasks.task import Evaluation

SCHEMA = 1


def evaluation_text(evaluation: Evaluation) -> str:
    """Its tables, and how its figures were computed."""
    return "\n".join((*map(table_text, evaluation.tables), *evaluation.notes))


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """The task's own results as values: `schema` 1."""
    return {"schema": SCHEMA, **{name: _plain(value) for name, value in evaluation.details.items()}}


def _plain(value: Any) -> Any:
    """A JSON value, or a dataclass as one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
