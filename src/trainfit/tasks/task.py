"""What a task is: how the data of some families are read, checked and measured."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from trainfit.errors import TrainfitError

Cell = str | int | float | None
DEFAULT_TASK = "detection"
"""What reads a data set where no model with a task is named: of families that are predicted alone, and `check-data`."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures in rows, for a person."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    """A cell a column; the first says what the row is about. None: there is no such figure."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """How good a model is on some data."""

    score: float | None
    """What ranks checkpoints, higher is better; None where the data do not define it."""
    score_name: str
    """For a person, for instance "mask AP"."""
    figures: Mapping[str, float | None]
    """The few that a line has room for, by the name that a person reads; shares between 0 and 1."""
    record: Mapping[str, Any]
    """JSON values by name: what a run keeps of every evaluation."""
    tables: tuple[Table, ...]
    details: Mapping[str, Any]
    """The task's own results by name: dataclasses, or JSON values."""
    notes: tuple[str, ...] = ()
    """Sentences about how the figures were computed."""


class Metric(Protocol):
    """Compares outputs with the truth, in bounded memory."""

    def add(self, outputs: Sequence[Any]) -> None:
        """Take what a micro-batch gave in evaluation (`Workload.outputs`); every sample once."""
        ...

    def result(self) -> Evaluation:
        """The evaluation of everything that was added, on all ranks together: a collective call."""
        ...


class Record(Protocol):
    """One item of a data set before anything is decoded."""

    @property
    def path(self) -> Path:
        """The file that takes longest to read, for messages."""
        ...

    def without_truth(self) -> "Record":
        """The record with its inputs alone: what evaluation decodes."""
        ...


class Dataset(Protocol):
    """A data set as a reader gives it."""

    @property
    def splits(self) -> Mapping[str, Sequence[Any]]:
        """Records by "train", "val" and perhaps "test"; a family's decoder makes samples of them."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...


class Task(Protocol):
    """A module of functions: `trainfit.tasks.NAME.task`, or a module outside the package."""

    def read(
        self,
        data: str,
        *,
        file_format: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        allow_outside: bool = False,
    ) -> Any:
        """The data set in a folder or file.

        Raises:
            TrainfitError: there is none, or it has an error that training cannot pass over.
        """
        ...

    def summary(self, dataset: Any) -> str:
        """What the data set holds, in a line."""
        ...

    def notes(self, dataset: Any) -> Sequence[str]:
        """What was left out, mended or held out, a line each."""
        ...

    def require(self, dataset: Any, workload: Any) -> None:
        """Refuse data that the workload cannot train on.

        Raises:
            TrainfitError: what is missing.
        """
        ...

    def statistics(self, records: Sequence[Any]) -> Any:
        """What the family's knobs may follow from (`Family.for_data`)."""
        ...

    def worst_first(self, records: Sequence[Any]) -> Sequence[Any]:
        """Records in the order of the memory that they need, the most first."""
        ...

    def metric(self, records: Sequence[Any], workload: Any, **options: Any) -> Metric:
        """A new metric for these records.

        Options are the task's own, but for `classes`: names of the records' classes where they are not the workload's.
        """
        ...


def task_of(name: str) -> Task:
    """The task of `Family.task`: a room of this package by its name, any other module by its path.

    Raises:
        TrainfitError: there is no such module.
    """
    room = "." not in name and find_spec(f"trainfit.tasks.{name}") is not None
    try:
        module: Any = importlib.import_module(f"trainfit.tasks.{name}.task" if room else name)
    except ModuleNotFoundError as error:
        raise TrainfitError(f"the task {name!r} of a family cannot be imported ({error})") from error
    return module


Progress = Callable[[int, int], None]
"""(records done, records in all)."""
