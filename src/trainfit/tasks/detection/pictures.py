"""Detections of image files: the records that are detected in, and the results as rows and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from trainfit.tasks.detection.masks import decode_rle, mask_area
from trainfit.tasks.detection.samples import ImageDetections, ImageRecord, Rle
from trainfit.tasks.drawing import draw_objects
from trainfit.tasks.images import read_rgb, require_header
from trainfit.tasks.palette import color


def file_record(number: int, path: Path) -> ImageRecord:
    """An image file without objects; `number` becomes its `id`.

    Raises:
        TrainfitError: the file is not an image that can be read.
    """
    width, height = require_header(path).upright
    nothing = np.zeros(0)
    return ImageRecord(
        id=number,
        path=path,
        width=width,
        height=height,
        boxes=np.zeros((0, 4)),
        classes=nothing.astype(np.int64),
        crowd=nothing.astype(np.bool_),
        areas=nothing,
        segmentations=(),
        object_ids=nothing.astype(np.int64),
    )


def rows(path: Path, output: ImageDetections, classes: Sequence[str], threshold: float) -> list[dict[str, Any]]:
    """One row per detection with a score of at least `threshold`, best first. `box`: x0, y0, x1, y1 in pixels; `mask`: RLE."""
    order = output.scores.argsort(descending=True, stable=True)
    chosen = [i for i in order.tolist() if output.scores[i] >= threshold]
    return [_row(path, output, i, classes) for i in chosen]


def _row(path: Path, output: ImageDetections, i: int, classes: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "file": str(path),
        "class": classes[int(output.classes[i])],
        "score": round(float(output.scores[i]), 6),
        "box": [round(v, 2) for v in cast(list[float], output.boxes[i].tolist())],
    }
    if output.masks is not None:
        row["mask"] = _plain(output.masks[i])
    return row


def _plain(mask: Rle) -> dict[str, object]:
    """COCO's compressed mask as JSON takes it."""
    return {"size": mask["size"], "counts": mask["counts"].decode()}


def row_text(row: Mapping[str, Any]) -> str:
    """File, class, score and box."""
    return "{file}  {class}  {score:.3f}  {box}".format(**row)


def drawn(path: Path, rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Image.Image:
    """The image with its masks, boxes and labels: one colour a class.

    Raises:
        TrainfitError: the image cannot be read.
    """
    image = read_rgb(path)
    masks = [decode_rle(row["mask"], image.height, image.width) for row in rows if "mask" in row]
    labels = [f"{row['class']} {row['score']:.2f}" for row in rows]
    places = {name: number for number, name in reversed(list(enumerate(classes)))}
    colors = [color(places[row["class"]]) for row in rows]
    return draw_objects(image, [row["box"] for row in rows], labels, colors, masks)


def coco_annotation(row: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """A row as COCO writes an annotation, with its score."""
    x0, y0, x1, y1 = row["box"]
    box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
    annotation = {"category_id": classes.index(row["class"]) + 1, "bbox": box, "score": row["score"], "iscrowd": 0}
    if "mask" not in row:
        return annotation | {"area": round(box[2] * box[3], 2)}
    height, width = row["mask"]["size"]
    return annotation | {"area": mask_area(row["mask"], height, width), "segmentation": row["mask"]}
