"""Detections as rows and as pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image, ImageDraw

from trainfit.tasks.detection.masks import Rle
from trainfit.tasks.detection.samples import ImageDetections


def detection_lines(
    path: Path, found: ImageDetections, classes: Sequence[str], threshold: float
) -> list[dict[str, object]]:
    """One row a detection with a score of at least `threshold`, best first. `box`: x0, y0, x1, y1 in pixels; `mask`: RLE."""
    order = torch.argsort(found.scores, descending=True, stable=True)
    return [
        {
            "file": str(path),
            "class": classes[int(found.classes[i])],
            "score": round(float(found.scores[i]), 6),
            "box": [round(v, 2) for v in cast(list[float], found.boxes[i].tolist())],
            **({"mask": _plain(found.masks[i])} if found.masks is not None else {}),
        }
        for i in order.tolist()
        if found.scores[i] >= threshold
    ]


def _plain(mask: Rle) -> dict[str, object]:
    """COCO's compressed mask as JSON takes it."""
    return {"size": mask["size"], "counts": mask["counts"].decode()}


def draw_boxes(path: Path, rows: Sequence[dict[str, Any]], folder: Path) -> Path:
    """Draw the rows of one image into a copy of it in `folder`; returns the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.open(path).convert("RGB")
    pen = ImageDraw.Draw(image)
    for row in rows:
        pen.rectangle(row["box"], outline=(230, 30, 30), width=2)
        pen.text((row["box"][0] + 3, row["box"][1] + 2), f"{row['class']} {row['score']:.2f}", fill=(230, 30, 30))
    target = folder / f"{path.stem}.png"
    image.save(target)
    return target
