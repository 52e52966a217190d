"""Top-1 and top-5 accuracy, of all images and of each class."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainfit.step import ranks
from trainfit.tasks.classes.samples import ClassRecord, Ranking
from trainfit.tasks.confusion import confusion_matrix
from trainfit.tasks.graphics import Graphic
from trainfit.tasks.task import Evaluation, Table

BEST = 5
MOST_CONFUSED = 200
"""With more classes than these the ranks exchange no confusion matrix."""


class Accuracy:
    """Counts by class: memory does not grow with the number of images. Up to `MOST_CONFUSED` classes with the confusion matrix."""

    def __init__(self, records: Sequence[ClassRecord], classes: Sequence[str], rows: Sequence[int | None]) -> None:
        """`rows` has for each class of the model the class of the records, or None where they have none of that name."""
        self.truth = {record.id: record.label for record in records}
        self.classes = classes
        self.rows = rows
        self.counts = [0.0] * (3 * len(classes))
        """For each class: images, images right at rank 1, images right within the first five."""
        side = len(classes) + 1 if len(classes) <= MOST_CONFUSED else 0
        self.confusion = np.zeros((side, side))
        """Images by true and first class; the last column is for classes that the data do not have."""

    def add(self, outputs: Sequence[Ranking]) -> None:
        """Count the images of a micro-batch."""
        for output in outputs:
            label = self.truth[output.record_id]
            ranked = [self.rows[row] for row in output.classes]
            self.counts[3 * label] += 1
            self.counts[3 * label + 1] += bool(ranked) and ranked[0] == label
            self.counts[3 * label + 2] += label in ranked[:BEST]
            if self.confusion.size and ranked:
                self.confusion[label, -1 if ranked[0] is None else ranked[0]] += 1

    def result(self) -> Evaluation:
        """The shares over all ranks."""
        number = 3 * len(self.classes)
        total = ranks.sum_numbers([*self.counts, *self.confusion.flatten().tolist()])
        counts = total[:number]
        images, right, among = (sum(counts[k::3]) for k in range(3))
        top1 = right / images if images else None
        top5 = among / images if images else None
        by_class = [
            (name, int(counts[3 * row]), counts[3 * row + 1] / counts[3 * row] if counts[3 * row] else None)
            for row, name in enumerate(self.classes)
        ]
        shares = [share for _, _, share in by_class if share is not None]
        balanced = sum(shares) / len(shares) if shares else None
        figures = {"top-1": top1, "top-5": top5, "mean of classes": balanced}
        record = {"top1": top1, "top5": top5, "balanced": balanced}
        rows = tuple((name, None if value is None else 100 * value) for name, value in figures.items())
        classes = tuple((name, n, None if share is None else 100 * share) for name, n, share in by_class)
        return Evaluation(
            score=top1,
            score_name="top-1",
            figures=figures,
            record=record,
            tables=(
                Table(title="accuracy", columns=("figure", "%"), rows=rows),
                Table(title="classes", columns=("class", "images", "top-1 %"), rows=classes),
            ),
            graphics=first_choices(np.array(total[number:]).reshape(self.confusion.shape), self.classes),
            details=record | {"classes": [{"name": n, "images": k, "top1": s} for n, k, s in by_class]},
        )


def first_choices(counts: NDArray[np.float64], classes: Sequence[str]) -> tuple[Graphic, ...]:
    """The confusion matrix of images by true and first class; none where nothing was counted."""
    if not counts.any():
        return ()
    matrix = confusion_matrix(
        counts.astype(np.int64),
        classes,
        title="Confusion matrix (first choice)",
        row_name="images of",
        column_name="taken for",
        no_row=None,
        no_column="none of these",
    )
    return (matrix,)
