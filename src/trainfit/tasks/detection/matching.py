"""Which detections meet an object: precision-recall and F1 curves, and the confusion matrix. By boxes, at one IoU."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainfit.tasks.confusion import confusion_matrix
from trainfit.tasks.detection.coco_ap import Detections
from trainfit.tasks.detection.samples import ImageRecord
from trainfit.tasks.graphics import Matrix, Plot

IOU = 0.5
"""The least intersection over union of a detection and the object that it meets."""
SCORE = 0.5
"""The least score that the confusion matrix counts: what `trainfit detect` shows unless --threshold is given."""
MOST_CLASSES = 10
"""Classes with a line of their own, those with the most objects."""
RECALLS = np.linspace(0, 1, 101)
Numbers = NDArray[np.floating[Any]]


class Matching:
    """Matches of detections and objects, from which the curves are computed. Host memory: 9 bytes per detection.

    A detection meets the object of its class that it overlaps most, of those that no surer detection has met, as COCO
    matches. Detections that lie in a crowd of their class count neither way.
    """

    def __init__(self, classes: tuple[str, ...], max_detections: int) -> None:
        """Start without detections; of each image and class the surest `max_detections` count."""
        self.classes = classes
        self.max_detections = max_detections
        self.objects = np.zeros(len(classes), np.int64)
        self.confusion = np.zeros((len(classes) + 1, len(classes) + 1), np.int64)
        """Objects by their class and by that of the detection that they met; the last row and column are "none"."""
        self._scores: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.int32]] = []
        self._hits: list[NDArray[np.bool_]] = []

    def add(self, record: ImageRecord, detections: Detections) -> None:
        """Compare the detections of one image with its objects."""
        known = (detections.classes >= 0) & (detections.classes < len(self.classes))
        order = np.argsort(-detections.scores[known], kind="stable")
        boxes = detections.boxes[known][order]
        scores = detections.scores[known][order]
        labels = detections.classes[known][order]
        single = ~record.crowd
        truth = record.boxes[single]
        truth_labels = record.classes[single]
        np.add.at(self.objects, truth_labels, 1)
        overlap = _overlaps(boxes, truth)
        kept = _surest(labels, self.max_detections)
        hits = _hits(overlap, labels, truth_labels, kept)
        crowds = record.boxes[record.crowd]
        inside = _overlaps(boxes, crowds, of_first=True) >= IOU
        in_crowd = (inside & (labels[:, None] == record.classes[record.crowd][None])).any(axis=1)
        counted = kept & (hits | ~in_crowd)
        self._scores.append(scores[counted].astype(np.float32))
        self._labels.append(labels[counted].astype(np.int32))
        self._hits.append(hits[counted])
        sure = (scores >= SCORE) & ~(in_crowd & ~hits)
        _confuse(self.confusion, overlap[sure], labels[sure], truth_labels)

    def curves(self) -> "Curves":
        """Precision and recall of every class."""
        nothing = (np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.bool_))
        scores = np.concatenate([nothing[0], *self._scores])
        labels = np.concatenate([nothing[1], *self._labels])
        hits = np.concatenate([nothing[2], *self._hits])
        order = np.argsort(-scores, kind="stable")
        return Curves(self.classes, self.objects, scores[order], labels[order], hits[order])

    def graphics(self) -> tuple[Plot | Matrix, ...]:
        """The precision-recall and the F1 curves, and the confusion matrix; nothing where there are no objects."""
        return (*self.curves().plots(), self._matrix()) if self.objects.sum() else ()

    def _matrix(self) -> Matrix:
        return confusion_matrix(
            self.confusion,
            self.classes,
            title=f"Confusion matrix (boxes, IoU {IOU:g}, score {SCORE:g} or more)",
            row_name="objects",
            column_name="detections",
            no_row="no object",
            no_column="missed",
        )


class Curves:
    """Precision, recall and F1 of the detections of a data set, best first."""

    def __init__(
        self,
        classes: tuple[str, ...],
        objects: NDArray[np.int64],
        scores: NDArray[np.float32],
        labels: NDArray[np.int32],
        hits: NDArray[np.bool_],
    ) -> None:
        """Take the detections in the order of their scores, and the number of objects of each class."""
        self.classes = classes
        self.objects = objects
        self.scores = scores
        self.labels = labels
        self.hits = hits
        self.present = [c for c in range(len(classes)) if objects[c]]

    def precision(self, c: int) -> Numbers:
        """Precision at the 101 recalls of COCO: the best at this recall or a higher one, 0 where none is reached."""
        hits = self.hits[self.labels == c]
        true_positives = np.cumsum(hits)
        precision = np.maximum.accumulate((true_positives / np.arange(1, len(hits) + 1))[::-1])[::-1]
        places = np.searchsorted(true_positives / self.objects[c], RECALLS, side="left")
        return np.append(precision, 0.0)[np.minimum(places, len(hits))]

    def f1(self, c: int) -> Numbers:
        """F1 of one class where detections of at least each of 101 scores count: 2 TP / (detections + objects)."""
        own = self.labels == c
        true_positives = np.append(0, np.cumsum(self.hits[own]))
        counted = np.searchsorted(-self.scores[own], -RECALLS, side="right")
        return 2 * true_positives[counted] / (counted + self.objects[c])

    def plots(self) -> tuple[Plot, ...]:
        """Both curves: the mean over the classes first, then the classes with the most objects."""
        shown = sorted(self.present, key=lambda c: -self.objects[c])[:MOST_CLASSES]
        precisions = {c: self.precision(c) for c in self.present}
        f1s = {c: self.f1(c) for c in self.present}
        mean = np.mean(list(f1s.values()), axis=0)
        best = int(mean.argmax())
        area = float(np.mean(list(precisions.values())))
        return (
            Plot(
                name="precision-recall",
                title=f"Precision and recall (boxes, IoU {IOU:g})",
                x="recall",
                y="precision",
                lines=self._lines(f"mean, AP50 {100 * area:.1f}", precisions, shown),
            ),
            Plot(
                name="f1",
                title=f"F1 by score: the mean is best, {mean[best]:.2f}, from score {RECALLS[best]:.2f} on",
                x="least score that counts",
                y="F1",
                lines=self._lines("mean of the classes", f1s, shown),
            ),
        )

    def _lines(self, name: str, values: dict[int, Numbers], shown: list[int]) -> Any:
        mean = np.mean(list(values.values()), axis=0)
        alone = [] if len(values) == 1 else [(self.classes[c], _points(values[c])) for c in shown]
        return ((name, _points(mean)), *alone)


def _points(values: Numbers) -> tuple[tuple[float, float], ...]:
    return tuple((round(float(x), 4), round(float(y), 4)) for x, y in zip(RECALLS, values, strict=True))


def _overlaps(boxes: Numbers, others: Numbers, *, of_first: bool = False) -> Numbers:
    """(n, m): intersection over union of boxes; with `of_first` over the area of the first."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)[:, None]
    whole = area if of_first else area + (others[:, 2:] - others[:, :2]).prod(axis=1)[None] - shared
    return shared / np.maximum(whole, 1e-12)


def _surest(labels: NDArray[np.integer[Any]], most: int) -> NDArray[np.bool_]:
    """Which of the detections, best first, are among the first `most` of their class."""
    kept = np.ones(len(labels), np.bool_)
    for c in np.unique(labels):
        kept[np.flatnonzero(labels == c)[most:]] = False
    return kept


def _hits(
    overlap: Numbers,
    labels: NDArray[np.integer[Any]],
    truth_labels: NDArray[np.integer[Any]],
    kept: NDArray[np.bool_],
) -> NDArray[np.bool_]:
    """Which detections, best first, meet an object of their class that no earlier one has met."""
    free = (overlap >= IOU) & (labels[:, None] == truth_labels[None]) & kept[:, None]
    hits = np.zeros(len(labels), np.bool_)
    for i in np.flatnonzero(free.any(axis=1)):
        candidates = np.where(free[i], overlap[i], -1)
        j = len(candidates) - 1 - int(candidates[::-1].argmax())  # of equal overlaps COCO takes the last
        if candidates[j] >= IOU:
            hits[i] = True
            free[:, j] = False
    return hits


def _confuse(
    confusion: NDArray[np.int64],
    overlap: Numbers,
    labels: NDArray[np.integer[Any]],
    truth_labels: NDArray[np.integer[Any]],
) -> None:
    """Add one image: pairs of equal class first, then by overlap, each detection and object once."""
    rows, columns = np.nonzero(overlap > IOU)
    order = np.lexsort((-overlap[rows, columns], labels[rows] != truth_labels[columns]))
    free = np.ones(len(labels), np.bool_)
    missed = np.ones(len(truth_labels), np.bool_)
    for k in order:
        i = rows[k]
        j = columns[k]
        if free[i] and missed[j]:
            free[i] = missed[j] = False
            confusion[truth_labels[j], labels[i]] += 1
    classes = len(confusion) - 1
    confusion[:classes, -1] += np.bincount(truth_labels[missed], minlength=classes)
    confusion[-1, :classes] += np.bincount(labels[free], minlength=classes)
