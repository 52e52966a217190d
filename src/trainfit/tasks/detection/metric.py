"""COCO average precision as a `Metric`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trainfit.tasks.detection.class_names import positions
from trainfit.tasks.detection.coco_ap import ApResult, Detections, Evaluator, IouKind, gather_detections
from trainfit.tasks.detection.comparison import chosen, picture
from trainfit.tasks.detection.matching import Matching
from trainfit.tasks.detection.samples import ImageDetections, ImageRecord
from trainfit.tasks.graphics import Graphic
from trainfit.tasks.task import Evaluation, Table

WORDS: dict[IouKind, str] = {"bbox": "boxes", "segm": "masks"}


class DetectionMetric:
    """AP of boxes, and of masks where the model has them.

    In one process masks are compared and dropped image by image; over several ranks they are kept, run-length encoded,
    until all ranks are done. Images that nothing was added for count as images without detections.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        classes: Sequence[str],
        *,
        masks: bool,
        max_detections: int,
        model_classes: Sequence[str] | None = None,
    ) -> None:
        """Start without detections.

        Args:
            records: The images, with their objects.
            classes: Names of the records' classes.
            masks: Whether masks are compared too.
            max_detections: Detections that count for each image and class.
            model_classes: Names of the model's classes, where they are others: they are found among `classes` by name, and
                detections of the rest are left out.
        """
        kinds: tuple[IouKind, ...] = ("bbox", "segm") if masks else ("bbox",)
        self.evaluators: dict[IouKind, Evaluator] = {
            kind: Evaluator(records, classes, iou=kind, max_detections=max_detections) for kind in kinds
        }
        self.kept: list[Detections] = []
        self.classes = tuple(classes)
        self.matching = Matching(self.classes, max_detections)
        self.unmatched = {record.id: record for record in records}
        self.pictured: dict[int, tuple[ImageRecord, Detections]] = {
            record.id: (record, nothing_in(record)) for record in chosen(records)
        }
        self.rows: np.ndarray[Any, np.dtype[np.int64]] | None = None
        if model_classes is not None:
            rows = positions(model_classes, classes)
            self.rows = np.asarray([-1 if row is None else row for row in rows], np.int64)

    def add(self, outputs: Sequence[ImageDetections]) -> None:
        """Take the detections of some images."""
        for output in outputs:
            detections = compact(output)
            if self.rows is not None:
                detections = replace(detections, classes=self.rows[detections.classes])
            if _world_size() == 1:
                self._compare(detections)
            else:
                self.kept.append(detections)

    def _compare(self, detections: Detections) -> None:
        for evaluator in self.evaluators.values():
            evaluator.add(detections)
        self.matching.add(self.unmatched.pop(detections.image_id), detections)
        if detections.image_id in self.pictured:
            self.pictured[detections.image_id] = (self.pictured[detections.image_id][0], detections)

    def result(self) -> Evaluation:
        """AP over all records."""
        if _world_size() > 1:
            for detections in gather_detections(self.kept):
                self._compare(detections)
        results: dict[IouKind, ApResult] = {kind: evaluator.result() for kind, evaluator in self.evaluators.items()}
        for record in self.unmatched.values():
            self.matching.add(record, nothing_in(record))
        self.unmatched.clear()
        return evaluation_of(results, self._graphics())

    def _graphics(self) -> tuple[Graphic, ...]:
        masks = "segm" in self.evaluators
        pictures = (
            picture(number, record, detections, self.classes, masks=masks)
            for number, (record, detections) in enumerate(self.pictured.values(), 1)
        )
        return (*pictures, *self.matching.graphics())


def nothing_in(record: ImageRecord) -> Detections:
    """No detections of an image."""
    return Detections(image_id=record.id, boxes=np.zeros((0, 4)), scores=np.zeros(0), classes=np.zeros(0, np.int64))


def _world_size() -> int:
    from trainfit.step import ranks  # here, because a plan reads data without torch

    return ranks.world_size()


def compact(output: ImageDetections) -> Detections:
    """Detections as evaluation keeps them: arrays."""
    arrays = {name: getattr(output, name).numpy() for name in ("boxes", "scores", "classes")}
    return Detections(image_id=output.image_id, masks=output.masks, **arrays)


def evaluation_of(results: dict[IouKind, ApResult], graphics: Sequence[Graphic] = ()) -> Evaluation:
    """AP results as an evaluation: ranked by the AP of masks where there are masks, else by that of boxes."""
    limit = next(iter(results.values())).max_detections
    ranking: IouKind = "segm" if "segm" in results else "bbox"
    figures: dict[str, float | None] = {}
    record: dict[str, Any] = {}
    for kind, result in results.items():
        figures |= {f"{kind} AP": result.ap, f"{kind} AP50": result.ap50}
        record |= {f"{kind}_ap": result.ap, f"{kind}_ap50": result.ap50, f"{kind}_ap75": result.ap75}
        record[f"{kind}_per_class"] = {row.name: row.ap for row in result.per_class}
    return Evaluation(
        score=results[ranking].ap,
        score_name="AP",
        figures=figures,
        record=record,
        tables=tuple(table_of(result) for result in results.values()),
        details={**results},
        graphics=tuple(graphics),
        notes=(f"Up to {limit} detections for each image and class count (COCO's own limit: --max-detections 100).",),
    )


def table_of(result: ApResult) -> Table:
    """COCO's figures in the title, and a row for each class."""
    sizes = (("small", result.ap_small), ("medium", result.ap_medium), ("large", result.ap_large))
    figures = [("AP", result.ap), ("AP50", result.ap50), ("AP75", result.ap75), *sizes]
    figures.append((f"AR@{result.max_detections}", result.ar_max))
    text = "  ".join(f"{name} {'-' if value is None else f'{value:.3f}'}" for name, value in figures)
    return Table(
        title=f"{WORDS[result.iou]}: {text}  ({result.images} images, {result.objects} objects)",
        columns=("class", "AP", "AP50", "AR", "objects", "detections"),
        rows=tuple((row.name, row.ap, row.ap50, row.ar, row.objects, row.detections) for row in result.per_class),
    )
