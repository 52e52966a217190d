"""Top-1 and top-5 accuracy, of all images and of each class."""

from collections.abc import Sequence

from trainfit.step import ranks
from trainfit.tasks.classes.samples import ClassRecord, Ranking
from trainfit.tasks.task import Evaluation, Table

BEST = 5


class Accuracy:
    """Counts by class: memory does not grow with the number of images."""

    def __init__(self, records: Sequence[ClassRecord], classes: Sequence[str], rows: Sequence[int | None]) -> None:
        """`rows` has for each class of the model the class of the records, or None where they have none of that name."""
        self.truth = {record.id: record.label for record in records}
        self.classes = classes
        self.rows = rows
        self.counts = [0.0] * (3 * len(classes))
        """For each class: images, images right at rank 1, images right within the first five."""

    def add(self, outputs: Sequence[Ranking]) -> None:
        """Count the images of a micro-batch."""
        for output in outputs:
            label = self.truth[output.record_id]
            ranked = [self.rows[row] for row in output.classes]
            self.counts[3 * label] += 1
            self.counts[3 * label + 1] += bool(ranked) and ranked[0] == label
            self.counts[3 * label + 2] += label in ranked[:BEST]

    def result(self) -> Evaluation:
        """The shares over all ranks."""
        counts = ranks.sum_numbers(self.counts)
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
        classes = tuple((name, number, None if share is None else 100 * share) for name, number, share in by_class)
        return Evaluation(
            score=top1,
            score_name="top-1",
            figures=figures,
            record=record,
            tables=(
                Table(title="accuracy", columns=("figure", "%"), rows=rows),
                Table(title="classes", columns=("class", "images", "top-1 %"), rows=classes),
            ),
            details=record | {"classes": [{"name": n, "images": k, "top1": s} for n, k, s in by_class]},
        )
