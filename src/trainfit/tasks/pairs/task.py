"""Pairs of images and texts as a `Task`: retrieval, and zero-shot classification where the data are classes."""

from collections.abc import Sequence
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.tasks.findings import note_lines, require_none
from trainfit.tasks.pairs.check import check_dataset, data_check
from trainfit.tasks.pairs.metric import RetrievalMetric, ZeroShotMetric
from trainfit.tasks.pairs.read import look, read_dataset
from trainfit.tasks.pairs.samples import PairDataset, PairRecord
from trainfit.tasks.pairs.statistics import PairStatistics
from trainfit.tasks.pairs.statistics import statistics as statistics_of
from trainfit.tasks.task import DataCheck, Metric, Progress, split_sizes


def recognises(data: str) -> bool:
    """Whether a path holds pairs, by names of files alone."""
    layout = look(data)
    return layout is not None and layout[0] != "classes"


def read(
    data: str,
    *,
    file_format: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    allow_outside: bool = False,
) -> PairDataset:
    """The pairs in a table, a folder, COCO captions or shards; or images in folders by class, for evaluation.

    Raises:
        TrainfitError: there are none, or they have an error that training cannot pass over.
    """
    dataset = read_dataset(
        data, file_format=file_format, val_fraction=val_fraction, seed=seed, allow_outside=allow_outside
    )
    require_none(dataset.findings, f"trainfit check-data {data} --task pairs")
    return dataset


def check(
    data: str,
    *,
    file_format: str | None = None,
    decode: bool = True,
    allow_outside: bool = False,
    progress: Progress | None = None,
) -> DataCheck:
    """Read the pairs and list their defects; see `tasks.task.Task`.

    Raises:
        TrainfitError: there are none.
    """
    dataset = read_dataset(data, file_format=file_format, allow_outside=allow_outside)
    return data_check(check_dataset(dataset, progress=progress) if decode else dataset)


def summary(dataset: PairDataset) -> str:
    """Images and texts of each split, and the format."""
    texts = sum(len(record.texts) for record in dataset.splits["train"])
    return f"data: {split_sizes(dataset.splits)}, {texts} texts in train ({dataset.format})"


def notes(dataset: PairDataset) -> Sequence[str]:
    """What was left out, mended or held out, a line each; shared texts are counted in one line."""
    lines = note_lines(dataset.findings)
    shared = sum(finding.kind == "duplicate text" for finding in dataset.findings)
    if shared:
        lines.append(f"{shared} texts belong to several images: negatives of each other without --positives texts")
    return lines


def require(dataset: PairDataset, workload: Any) -> None:
    """Refuse data without texts, and a workload that cannot be trained exactly; it reads what else it needs.

    Raises:
        TrainfitError: why not.
    """
    if not dataset.splits["train"]:
        raise TrainfitError(
            f"{dataset.root}: images by class have no texts to train on; `trainfit evaluate` takes them"
        )
    workload.require_trainable()


def compare(dataset: PairDataset, workload: Any, *, data: str, weights: str) -> Sequence[str]:
    """Any model of pairs can be evaluated on any of them."""
    del dataset, workload, data, weights
    return ()


def statistics(records: Sequence[PairRecord]) -> PairStatistics:
    """Counts of images and texts."""
    return statistics_of(records)


def worst_first(records: Sequence[PairRecord]) -> Sequence[PairRecord]:
    """The records in their order: all need the same memory."""
    return records


def metric(records: Sequence[PairRecord], workload: Any, *, dataset: PairDataset | None = None) -> Metric:
    """Recall of retrieval; accuracy of zero-shot classification where the records have classes."""
    del workload
    if any(record.label >= 0 for record in records):
        return ZeroShotMetric(records, dataset.classes if dataset is not None else ())
    return RetrievalMetric()
