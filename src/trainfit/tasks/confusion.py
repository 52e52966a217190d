"""Counts by true and found class as a confusion matrix of a size that can be read."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainfit.tasks.graphics import Matrix

MOST = 25
"""Classes with a row of their own, those of the most objects; the others share one."""


def confusion_matrix(
    counts: NDArray[np.int64],
    classes: Sequence[str],
    *,
    title: str,
    row_name: str,
    column_name: str,
    no_row: str | None,
    no_column: str,
) -> Matrix:
    """The matrix of counts.

    Args:
        counts: (classes + 1, classes + 1): true class by found class; the last row and column are "none".
        classes: Their names.
        title: Of the matrix.
        row_name: What a row counts.
        column_name: What a column counts.
        no_row: Name of the last row; None: it is left out.
        no_column: Name of the last column.
    """
    number = len(classes)
    rows = np.sort(np.argsort(-counts[:number].sum(1), kind="stable")[:MOST])
    rest = np.setdiff1d(np.arange(number), rows)
    shared = [rest.tolist()] if rest.size else []
    names = [classes[int(row)] for row in rows] + (["others"] if rest.size else [])
    columns = [*([row] for row in rows.tolist()), *shared, [number]]
    groups = columns if no_row is not None else columns[:-1]
    return Matrix(
        name="confusion",
        title=title,
        row_name=row_name,
        column_name=column_name,
        rows=tuple(names if no_row is None else [*names, no_row]),
        columns=(*names, no_column),
        values=tuple(tuple(int(counts[np.ix_(one, other)].sum()) for other in columns) for one in groups),
    )
