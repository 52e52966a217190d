"""What a task is: how the data of some families are read, checked and measured."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from trainfit.errors import TrainfitError
from trainfit.tasks.findings import Finding
from trainfit.tasks.graphics import Graphic

Cell = str | int | float | None
Progress = Callable[[int, int], None]
"""(records done, records in all)."""
DEFAULT_TASK = "detection"
"""What reads a data set where no model with a task is named and no task recognises it."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Figures in rows, for a person."""

    title: str
    """Title of the table; empty for none."""
    columns: tuple[str, ...]
    """Heads of the columns."""
    rows: tuple[tuple[Cell, ...], ...]
    """A cell a column; the first says what the row is about. None: there is no such figure."""


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Numbers by bin, for a person."""

    title: str
    """Title of the histogram."""
    bins: tuple[tuple[str, int], ...]
    """(label, number) of each bin."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """Sentences or figures that need no columns."""

    title: str
    """Title of the lines."""
    lines: tuple[str, ...]
    """The sentences."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DataCheck:
    """What a data set holds, and all that is wrong with it."""

    dataset: Any
    """The data set as `Task.read` gives it, without the records that cannot be decoded."""
    title: str
    """Where it is and what it is, in a line."""
    sections: tuple[Table | Histogram | Lines, ...]
    """Its statistics, in the order in which a person reads them. Cells of tables are counts."""
    record: Mapping[str, Any]
    """The same as JSON values by name."""
    findings: tuple[Finding, ...]
    """Every defect, and every choice made while reading."""

    @property
    def splits(self) -> Mapping[str, Sequence[Any]]:
        """The records by split."""
        return self.dataset.splits

    @property
    def usable(self) -> bool:
        """Whether training takes the data set."""
        return not any(finding.severity == "error" for finding in self.findings)


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
    """Figures in rows."""
    details: Mapping[str, Any]
    """The task's own results by name: dataclasses, or JSON values."""
    notes: tuple[str, ...] = ()
    """Sentences about how the figures were computed."""
    graphics: tuple[Graphic, ...] = ()
    """Pictures of samples, curves and matrices; pictures are drawn when they are written."""


def split_sizes(splits: Mapping[str, Sequence[Any]]) -> str:
    """48 train, 16 val images."""
    return ", ".join(f"{len(records)} {split}" for split, records in splits.items()) + " images"


def percent(value: float | None) -> str:
    """A figure as a percentage with one decimal; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"


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
        """Names of the classes; empty for data without classes."""
        ...


class Task(Protocol):
    """A module of functions: `trainfit.tasks.NAME.task`, or a module outside the package.

    `records` are those of one split, `workload` is a `models.workload.TrainableWorkload` of a family with this task.
    """

    def recognises(self, data: str) -> bool:
        """Whether a path holds a data set of this task, by names of files alone; for commands that are given no model."""
        ...

    def read(
        self,
        data: str,
        *,
        file_format: str | None = None,
        val_fraction: float = 0.1,
        seed: int = 0,
        allow_outside: bool = False,
    ) -> Any:
        """The data set in a folder or file, as a `Dataset`.

        Args:
            data: What the user named.
            file_format: One of the task's formats; detected unless given.
            val_fraction: Share of the training records held out where the data set has no validation split.
            seed: Which records are held out follows from it.
            allow_outside: Read files that the data set names but does not hold.

        Raises:
            TrainfitError: there is none, it has an error that training cannot pass over, or an unknown format.
        """
        ...

    def check(
        self,
        data: str,
        *,
        file_format: str | None = None,
        decode: bool = True,
        allow_outside: bool = False,
        progress: Progress | None = None,
    ) -> DataCheck:
        """Read the data set and list its defects, errors included, instead of raising.

        Args:
            data: What the user named.
            file_format: One of the task's formats; detected unless given.
            decode: Decode every record.
            allow_outside: Read files that the data set names but does not hold.
            progress: Called while records are decoded.

        Raises:
            TrainfitError: there is no data set.
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

    def compare(self, dataset: Any, workload: Any, *, data: str, weights: str) -> Sequence[str]:
        """Remarks on data that a trained model is evaluated on, for instance on classes that it does not know.

        `data` and `weights` are the names of both in messages.

        Raises:
            TrainfitError: the model cannot be evaluated on this data.
        """
        ...

    def statistics(self, records: Sequence[Any]) -> Any:
        """What the family's knobs may follow from (`Family.for_data`)."""
        ...

    def worst_first(self, records: Sequence[Any]) -> Sequence[Any]:
        """Records in the order of the memory that they need, the most first."""
        ...

    def metric(self, records: Sequence[Any], workload: Any, *, dataset: Any = None, **options: Any) -> Metric:
        """A new metric for these records.

        `dataset` is given where the records are of another data set than the workload was trained on; `options` are the
        task's own, declared as parameters of its function.
        """
        ...


@runtime_checkable
class Inference(Protocol):
    """What a task's module has besides where `trainfit detect` works with its models."""

    def file_record(self, number: int, path: Path) -> Any:
        """The record of a file without truth; `number` is its place among the files.

        Raises:
            TrainfitError: the file cannot be read.
        """
        ...

    def rows(self, path: Path, output: Any, classes: Sequence[str], threshold: float) -> list[dict[str, Any]]:
        """JSON values of what a model gives for a file, best first: all with a score of at least `threshold`."""
        ...

    def row_text(self, row: Mapping[str, Any]) -> str:
        """One of these as a line of text."""
        ...

    def drawn(self, path: Path, rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Any:
        """The image file with its rows drawn in, as a PIL image; `classes` are those of `rows`.

        Raises:
            TrainfitError: the file cannot be read.
        """
        ...


@runtime_checkable
class CocoForm(Protocol):
    """What a task's module has besides where its results have a form in COCO's files."""

    def coco_annotation(self, row: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
        """A row of `Inference.rows` as an annotation without `id` and `image_id`; categories count from 1."""
        ...


@runtime_checkable
class Extents(Protocol):
    """What a task's module has besides where samples of different extent need different memory."""

    def extent(self, sample: Any) -> Mapping[str, float]:
        """What a sample's memory follows from, by name in the plural ("pixels", "objects")."""
        ...


def task_names() -> tuple[str, ...]:
    """The tasks of this package, `DEFAULT_TASK` first."""
    folder = importlib.import_module("trainfit.tasks")
    names = [module.name for module in pkgutil.iter_modules(folder.__path__) if module.ispkg]
    return tuple(sorted(names, key=lambda name: (name != DEFAULT_TASK, name)))


def task_of(name: str) -> Task:
    """The task of `Family.task`: a room of this package by its name, any other module by its path.

    Raises:
        TrainfitError: there is no such module.
    """
    room = "." not in name and find_spec(f"trainfit.tasks.{name}") is not None
    try:
        module: Any = importlib.import_module(f"trainfit.tasks.{name}.task" if room else name)
    except ModuleNotFoundError as error:
        raise TrainfitError(
            f"the task {name!r} cannot be imported ({error}): one of {', '.join(task_names())}"
        ) from error
    return module


def recognised_task(data: str) -> str:
    """The first task of this package that recognises a data set; `DEFAULT_TASK`, whose error says more, where none does."""
    return next((name for name in task_names() if task_of(name).recognises(data)), DEFAULT_TASK)


def inference_of(name: str) -> Inference:
    """The functions of the task `name` for inference on files.

    Raises:
        TrainfitError: the task has none.
    """
    task: object = task_of(name)
    if not isinstance(task, Inference):
        raise TrainfitError(f"trainfit detect does not work with models of the task {name!r}: use trainfit evaluate")
    return task
