"""Detections of image files: the records that are detected in, and the results as rows and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageDraw

from trainfit.tasks.detection.masks import Rle
from trainfit.tasks.detection.samples import ImageDetections, ImageRecord
from trainfit.tasks.images import require_header


def file_record(number: int, path: Path) -> ImageRecord:
    """An image file without objects; `number` becomes its `id`.

    Raises:
        TrainfitError: the file is no image that can be read.
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
    """One row a detection with a score of at least `threshold`, best first. `box`: x0, y0, x1, y1 in pixels; `mask`: RLE."""
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


def draw(path: Path, rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Draw the boxes of one image into a copy of it in `folder`; returns the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.open(path).convert("RGB")
    pen = ImageDraw.Draw(image)
    for row in rows:
        pen.rectangle(row["box"], outline=(230, 30, 30), width=2)
        pen.text((row["box"][0] + 3, row["box"][1] + 2), f"{row['class']} {row['score']:.2f}", fill=(230, 30, 30))
    target = folder / f"{path.stem}.png"
    image.save(target)
    return target
