"""Validation pictures of detection: the objects of an image beside what a model detects in it."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from trainfit.tasks.detection.coco_ap import Detections
from trainfit.tasks.detection.masks import draw_masks
from trainfit.tasks.detection.samples import ImageRecord, Polygons, Rle
from trainfit.tasks.drawing import Area, draw_objects, font
from trainfit.tasks.graphics import Picture
from trainfit.tasks.images import read_image
from trainfit.tasks.palette import color

PICTURES = 6
SIDE = 560
"""The longest side of an image in a picture, in pixels."""
LEAST_SCORE = 0.3
MOST_SHOWN = 100
"""Detections of an image that are drawn: the surest."""
_HEAD = 26


def chosen(records: Sequence[ImageRecord]) -> list[ImageRecord]:
    """Records with objects, spread evenly, at most `PICTURES`; the first ones if none has an object."""
    good = [record for record in records if len(record.classes)] or list(records)
    places = np.unique(np.linspace(0, len(good) - 1, PICTURES).round().astype(int)) if good else ()
    return [good[place] for place in places]


def picture(
    number: int, record: ImageRecord, detections: Detections, classes: Sequence[str], *, masks: bool
) -> Picture:
    """The picture of one image, drawn from its file when it is written; masks are drawn where they are compared."""
    return Picture(
        name=f"val-{number}",
        title=record.path.name,
        draw=partial(side_by_side, record, detections, tuple(classes), masks=masks),
    )


def side_by_side(record: ImageRecord, detections: Detections, classes: Sequence[str], *, masks: bool) -> Image.Image:
    """The objects on the left, the detections with a score of at least `LEAST_SCORE` on the right.

    Raises:
        TrainfitError: the image cannot be read.
    """
    image = read_image(record)
    scale = min(3.0, SIDE / max(image.size))
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    order = [i for i in np.argsort(-detections.scores, kind="stable").tolist() if detections.scores[i] >= LEAST_SCORE]
    order = [i for i in order if 0 <= detections.classes[i] < len(classes)][:MOST_SHOWN]
    truth = list(range(len(record.classes)))
    left = _objects(
        image,
        record,
        record.boxes,
        [record.segmentations[i] for i in truth] if masks else None,
        [int(c) for c in record.classes],
        [
            classes[int(c)] + (" (crowd)" if crowd else "")
            for c, crowd in zip(record.classes, record.crowd, strict=True)
        ],
    )
    right = _objects(
        image,
        record,
        detections.boxes[order],
        [detections.masks[i] for i in order] if masks and detections.masks is not None else None,
        [int(detections.classes[i]) for i in order],
        [f"{classes[int(detections.classes[i])]} {detections.scores[i]:.2f}" for i in order],
    )
    sheet = Image.new("RGB", (2 * image.width + 6, image.height + _HEAD), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    heads = (f"truth: {len(truth)}", f"predicted: {len(order)}")
    for x, words, half in zip((0, image.width + 6), heads, (left, right), strict=True):
        pen.text((x + 4, 5), words, fill=(29, 36, 48), font=font(14))
        sheet.paste(half, (x, _HEAD))
    return sheet


def _objects(
    image: Image.Image,
    record: ImageRecord,
    boxes: NDArray[np.floating],
    segmentations: Sequence[Polygons | Rle | None] | None,
    numbers: Sequence[int],
    labels: Sequence[str],
) -> Image.Image:
    """Objects in pixels of the record's image, drawn into a resized copy of it."""
    scale = np.array([image.width / record.width, image.height / record.height] * 2)
    scaled = np.asarray(boxes, np.float64).reshape(-1, 4) * scale
    masks: Sequence[NDArray[np.bool_]] = ()
    if segmentations is not None:
        whole = (0, 0, record.width, record.height)
        size = (image.height, image.width)
        masks = list(draw_masks(segmentations, scaled, region=whole, size=size, image=(record.height, record.width)))
    areas: list[Area] = [(x0, y0, x1, y1) for x0, y0, x1, y1 in scaled.tolist()]
    return draw_objects(image, areas, labels, [color(number) for number in numbers], masks)
