"""Restricts a data set to some of its classes."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Protocol, runtime_checkable

from trainfit.errors import TrainfitError
from trainfit.tasks.task import Task

MOST_NAMED = 20
"""Classes in a message."""


@runtime_checkable
class ClassFilter(Protocol):
    """What a task's module has besides where its data sets can be cut down to some of their classes."""

    def only_classes(self, dataset: Any, rows: Sequence[int]) -> Any:
        """The data set with only these classes, numbered anew in this order."""
        ...


def with_classes(task: Task, dataset: Any, wanted: str) -> Any:
    """The data set cut down to the classes that `--only-classes` names; as it is where it names none.

    Raises:
        TrainfitError: there is no such class, or the task's data have none to choose from.
    """
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        return dataset
    known: tuple[str, ...] = dataset.classes
    filtering: object = task
    if not known or not isinstance(filtering, ClassFilter):
        raise TrainfitError("--only-classes: these data have no classes to choose from: leave it out")
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f" Perhaps you meant {near[0]}." if near else ""
            raise TrainfitError(
                f"--only-classes: the data set has no class {name!r}.{hint} It has {', '.join(known[:MOST_NAMED])}"
                + (" ..." if len(known) > MOST_NAMED else "")
            )
    return filtering.only_classes(dataset, [row for row, name in enumerate(known) if name in names])
