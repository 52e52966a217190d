"""Classes of image files: the records that are classified, and the results as rows and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from trainfit.tasks.classes.samples import UNKNOWN, ClassRecord, Ranking
from trainfit.tasks.drawing import font, ink_on
from trainfit.tasks.images import read_rgb, require_header
from trainfit.tasks.palette import color


def file_record(number: int, path: Path) -> ClassRecord:
    """An image file without a class; `number` becomes its `id`.

    Raises:
        TrainfitError: the file is not an image that can be read.
    """
    width, height = require_header(path).upright
    return ClassRecord(id=number, path=path, width=width, height=height, label=UNKNOWN)


def rows(path: Path, output: Ranking, classes: Sequence[str], threshold: float) -> list[dict[str, Any]]:
    """One row per class with a probability of at least `threshold`, best first, at most five."""
    pairs = zip(output.classes, output.scores, strict=True)
    return [{"file": str(path), "class": classes[row], "score": round(p, 6)} for row, p in pairs if p >= threshold]


def row_text(row: Mapping[str, Any]) -> str:
    """File, class and probability."""
    return "{file}  {class}  {score:.3f}".format(**row)


def drawn(path: Path, rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Image.Image:
    """The image with its classes in the corner.

    Raises:
        TrainfitError: the image cannot be read.
    """
    image = read_rgb(path)
    letters = font(max(10, min(32, round(max(image.size) / 30))))
    pen = ImageDraw.Draw(image)
    y = 2
    for row in rows:
        words = f"{row['class']} {row['score']:.2f}"
        ink = color(classes.index(row["class"]))
        pen.rectangle((2, y, 8 + pen.textlength(words, letters), y + letters.size * 1.3), fill=ink)
        pen.text((5, y), words, fill=ink_on(ink), font=letters)
        y += letters.size * 1.4
    return image
