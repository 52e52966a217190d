"""COCO average precision of boxes and masks, one image at a time so that host memory stays bounded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as mask_api
from numpy.typing import NDArray

from trainfit.errors import TrainfitError
from trainfit.tasks.detection.masks import Rle
from trainfit.tasks.detection.samples import ImageRecord

IouKind = Literal["bbox", "segm"]
SIZES = 4
"""COCO's object sizes: all, small, medium, large."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Detections:
    """What a model found in one image. Arrays have one row a detection; of equal scores the first wins."""

    image_id: int
    """Id of the image's record."""
    boxes: NDArray[np.floating[Any]]
    """(n, 4): x0, y0, x1, y1 in pixels of the image on disk."""
    scores: NDArray[np.floating[Any]]
    """(n,): larger is surer."""
    classes: NDArray[np.integer[Any]]
    """(n,): index into the class names given to `evaluate`; others are left out, as COCO leaves them out."""
    masks: Sequence[Rle] | None = None
    """n masks (see `trainfit.tasks.detection.masks`), or None from a model that gives boxes only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassAp:
    """The figures of one class. None where the class has no objects (crowds do not count)."""

    name: str
    """Name of the class."""
    ap: float | None
    """Mean over IoU 0.50:0.05:0.95."""
    ap50: float | None
    """AP at an IoU of 0.5."""
    ar: float | None
    """Recall at `ApResult.max_detections`, mean over the same IoUs."""
    objects: int
    """Objects of the class."""
    detections: int
    """Detections of the class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApResult:
    """COCO's twelve figures, in 0..1; None where no object is of that size, so that COCO defines no value (its -1)."""

    iou: IouKind
    """What is compared."""
    max_detections: int
    """The largest number of detections taken for each image and class."""
    ap: float | None
    """Mean over IoU 0.50:0.05:0.95, classes and 101 recalls."""
    ap50: float | None
    """AP at an IoU of 0.5."""
    ap75: float | None
    """AP at an IoU of 0.75."""
    ap_small: float | None
    """Objects below 32**2 pixels; medium: below 96**2; large: the rest."""
    ap_medium: float | None
    """AP of objects from 32**2 to 96**2 pixels."""
    ap_large: float | None
    """AP of objects from 96**2 pixels on."""
    ar_1: float | None
    """Recall with one detection for each image and class, mean over IoUs and classes."""
    ar_10: float | None
    """Recall with ten detections for each image and class."""
    ar_max: float | None
    """Recall at `max_detections`: COCO's AR100 by default. The sizes below are at `max_detections` too."""
    ar_small: float | None
    """Recall of small objects."""
    ar_medium: float | None
    """Recall of medium objects."""
    ar_large: float | None
    """Recall of large objects."""
    per_class: tuple[ClassAp, ...]
    """AP of each class, in the order of the classes."""
    images: int
    """Number of images."""
    objects: int
    """Number of objects, without crowds."""
    crowds: int
    """Number of crowds, which count neither as hits nor as misses."""
    detections: int
    """Number of detections."""


class Evaluator:
    """COCO's figures over all `records`; an image without detections counts as one where nothing was detected.

    It compares one image after the other with its objects, and keeps what matched; masks are dropped at once. Host
    memory: 40 flags and a score for each detection. `max_detections` is COCO's 100 by default. Equal to
    pycocotools' COCOeval for detections in the same order (tests compare); crowds are "don't care" regions. It raises
    TrainfitError for `segm` where an object has no mask, ValueError for an image that is unknown or comes twice and for
    a NaN score.
    """

    def __init__(
        self, records: Sequence[ImageRecord], classes: Sequence[str], *, iou: IouKind, max_detections: int = 100
    ) -> None:
        """Start without detections."""
        self.records = {record.id: record for record in records}
        self.iou: IouKind = iou
        self.classes = classes
        self.max_detections = max_detections
        self.limits = sorted({1, 10, max_detections})
        self.detections = [0] * len(classes)
        self._added: set[int] = set()
        self._matches: list[dict[int, list[Any]]] = [{} for _ in classes]  # by class and image: one a size

    def add(self, image: Detections) -> None:
        """Compare one image's detections."""
        if image.image_id in self._added or image.image_id not in self.records:
            fault = "twice" if image.image_id in self._added else "but no record"
            raise ValueError(f"image {image.image_id} has detections {fault}")
        self._added.add(image.image_id)
        rows = [row for row, c in enumerate(image.classes.tolist()) if 0 <= c < len(self.classes)]
        for row in rows:
            self.detections[int(image.classes[row])] += 1
        self._compare(self.records[image.image_id], image, rows)

    def _compare(self, record: ImageRecord, detections: Detections | None, rows: Sequence[int]) -> None:
        truth = [_true(record, row, self.iou) for row in range(len(record.classes))]
        predicted = [_detection(detections, row, self.iou) for row in rows] if detections else []
        present = sorted({annotation["category_id"] for annotation in (*truth, *predicted)})
        if present:
            matches = _matches(truth, predicted, [_image(record)], present, self.iou, self.limits)
            for number, category in enumerate(present):
                self._matches[category][record.id] = matches[number * SIZES : (number + 1) * SIZES]

    def result(self) -> ApResult:
        """The figures over all records."""
        for record in self.records.values():
            if record.id not in self._added:
                self._compare(record, None, [])
        records = list(self.records.values())
        limits = self.limits
        last = self.limits.index(self.max_detections)
        max_detections = self.max_detections
        classes = self.classes
        iou = self.iou
        precision = np.full((len(classes), 10, 101, SIZES, len(limits)), -1.0)  # -1 is COCO's "no objects"
        recall = np.full((len(classes), 10, SIZES, len(limits)), -1.0)
        objects = [0] * len(classes)
        for record in records:
            for c, crowd in zip(record.classes.tolist(), record.crowd.tolist(), strict=True):
                objects[c] += not crowd
        images = [_image(record) for record in sorted(records, key=lambda record: record.id)]
        nothing = _matches([], [], images[:1], [0], iou, limits)
        for c in range(len(classes)):
            if objects[c]:
                of_class = [self._matches[c].get(image["id"], nothing) for image in images]
                precision[c], recall[c] = _curves(of_class, images, iou, limits)
        per_class = tuple(
            ClassAp(
                name=name,
                ap=_mean(precision[c, :, :, 0, last]),
                ap50=_mean(precision[c, 0, :, 0, last]),
                ar=_mean(recall[c, :, 0, last]),
                objects=objects[c],
                detections=self.detections[c],
            )
            for c, name in enumerate(classes)
        )
        return ApResult(
            iou=iou,
            max_detections=max_detections,
            ap=_mean(precision[..., 0, last]),
            ap50=_mean(precision[:, 0, :, 0, last]),
            ap75=_mean(precision[:, 5, :, 0, last]),
            ap_small=_mean(precision[..., 1, last]),
            ap_medium=_mean(precision[..., 2, last]),
            ap_large=_mean(precision[..., 3, last]),
            ar_1=_mean(recall[..., 0, limits.index(1)]),
            ar_10=_mean(recall[..., 0, limits.index(10)]),
            ar_max=_mean(recall[..., 0, last]),
            ar_small=_mean(recall[..., 1, last]),
            ar_medium=_mean(recall[..., 2, last]),
            ar_large=_mean(recall[..., 3, last]),
            per_class=per_class,
            images=len(records),
            objects=sum(objects),
            crowds=sum(int(record.crowd.sum()) for record in records),
            detections=sum(row.detections for row in per_class),
        )


def gather_detections(detections: Iterable[Detections]) -> list[Detections]:
    """The detections of all ranks, on every rank, each image once (samplers repeat images to fill the last batch).

    A collective call where torch.distributed is initialised; elsewhere it only drops the repeats.
    """
    mine = list(detections)
    ranks = [mine]
    import torch.distributed as dist  # here, because a plan reads data without torch

    if dist.is_available() and dist.is_initialized():
        ranks: list[list[Detections]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(ranks, mine)
    first: dict[int, Detections] = {}
    for image in chain.from_iterable(ranks):
        first.setdefault(image.image_id, image)
    return list(first.values())


def _true(record: ImageRecord, row: int, iou: IouKind) -> dict[str, Any]:
    if iou == "segm" and record.segmentations[row] is None:
        raise TrainfitError(f"{record.path.name} object {row} has no mask: evaluate boxes, or add its mask")
    annotation = {"image_id": record.id, "category_id": int(record.classes[row]), "bbox": _box(record.boxes[row])}
    figures = {"area": float(record.areas[row]), "iscrowd": int(record.crowd[row])}
    mask = record.segmentations[row]
    if isinstance(mask, tuple):  # the library takes lists
        return annotation | figures | {"segmentation": [polygon.tolist() for polygon in mask]}
    return annotation | figures | {"segmentation": mask}


def _detection(image: Detections, row: int, iou: IouKind) -> dict[str, Any]:
    box = _box(image.boxes[row])
    annotation: dict[str, Any] = {"image_id": image.image_id, "category_id": int(image.classes[row]), "bbox": box}
    annotation |= {"score": float(image.scores[row])}
    if iou == "bbox":  # COCO sizes a detection by what is compared: its box or its mask
        return annotation | {"area": box[2] * box[3]}
    assert image.masks is not None, "evaluating masks takes detections with masks"
    return annotation | {"area": float(mask_api.area(image.masks[row])), "segmentation": image.masks[row]}


def _box(corners: NDArray[Any]) -> list[float]:
    x0, y0, x1, y1 = corners.tolist()
    return [x0, y0, x1 - x0, y1 - y0]


def _image(record: ImageRecord) -> dict[str, int]:
    return {"id": record.id, "height": record.height, "width": record.width}


def _matches(
    truth: list[dict[str, Any]],
    predicted: list[dict[str, Any]],
    images: list[dict[str, int]],
    categories: list[int],
    iou: IouKind,
    limits: list[int],
) -> list[Any]:
    """The library's record of which detection met which object: by category, then by size, then by image."""
    truth_set = _coco(truth, images, categories)
    predicted_set = _coco(predicted, images, categories)
    run = COCOeval_faster(truth_set, predicted_set, iou, print_function=_silent, separate_eval=True)
    run.params.maxDets = limits
    run.evaluate()
    return run._evalImgs_cpp  # pyright: ignore[reportPrivateUsage]


def _curves(
    matches: list[list[Any]], images: list[dict[str, int]], iou: IouKind, limits: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision (10 IoUs, 101 recalls, 4 sizes, limits) and recall (10, 4, limits) of one class; -1 is "no objects".

    `matches` has a row an image, in the order of `images`, with a match record a size.
    """
    empty = _coco([], images, [0])
    run = COCOeval_faster(empty, empty, iou, print_function=_silent, separate_eval=True)
    run.params.maxDets = limits
    run._paramsEval = run.params  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    run._evalImgs_cpp = [row[size] for size in range(SIZES) for row in matches]  # pyright: ignore[reportPrivateUsage]
    run.accumulate()
    return run.eval["precision"][:, :, 0], run.eval["recall"][:, 0]


def _coco(annotations: list[dict[str, Any]], images: list[dict[str, int]], categories: list[int]) -> COCO:
    for number, annotation in enumerate(annotations, 1):  # COCO's matching takes id 0 for "not matched"
        annotation["id"] = number
    dataset = {"images": images, "annotations": annotations, "categories": [{"id": c} for c in categories]}
    return COCO(dataset, print_function=_silent)


def _silent(*_: object) -> None:
    """The library's progress lines, dropped."""


def _mean(figures: NDArray[np.float64]) -> float | None:
    defined = figures[figures > -1]
    return float(defined.mean()) if defined.size else None
