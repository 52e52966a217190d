"""Classes of image files: the records that are classified, and the results as rows and as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from trainfit.tasks.classes.samples import UNKNOWN, ClassRecord, Ranking
from trainfit.tasks.images import require_header


def file_record(number: int, path: Path) -> ClassRecord:
    """An image file without a class; `number` becomes its `id`.

    Raises:
        TrainfitError: the file is no image that can be read.
    """
    width, height = require_header(path).upright
    return ClassRecord(id=number, path=path, width=width, height=height, label=UNKNOWN)


def rows(path: Path, output: Ranking, classes: Sequence[str], threshold: float) -> list[dict[str, Any]]:
    """One row a class with a probability of at least `threshold`, best first; five at most."""
    pairs = zip(output.classes, output.scores, strict=True)
    return [{"file": str(path), "class": classes[row], "score": round(p, 6)} for row, p in pairs if p >= threshold]


def row_text(row: Mapping[str, Any]) -> str:
    """File, class and probability."""
    return "{file}  {class}  {score:.3f}".format(**row)


def draw(path: Path, rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write the classes of one image into a copy of it in `folder`; returns the picture's path."""
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.open(path).convert("RGB")
    text = "\n".join(f"{row['class']} {row['score']:.2f}" for row in rows)
    ImageDraw.Draw(image).multiline_text((3, 2), text, fill=(230, 30, 30))
    target = folder / f"{path.stem}.png"
    image.save(target)
    return target
