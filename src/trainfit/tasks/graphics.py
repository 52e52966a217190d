"""Graphics of an evaluation: pictures of samples, curves and matrices, as values and as files. No torch."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a plan knows evaluations, and should not wait for Pillow
    from PIL import Image

INDEX = "graphics.json"
"""The file of a folder of graphics that says what is in it, with the values of curves and matrices."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """An image that is drawn when it is written."""

    name: str
    """The file's name without suffix; unique in an evaluation."""
    title: str
    """Title of the picture."""
    draw: "Callable[[], Image.Image]"
    """Raises TrainfitError where its file cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Lines in a square: y is between 0 and 1, x between 0 and `x_most`."""

    name: str
    """Name of the file."""
    title: str
    """Title of the plot."""
    x: str
    """What the x axis is."""
    y: str
    """What the axes are."""
    lines: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]
    """(name, points (x, y)); the first line stands for all."""
    x_most: float = 1.0
    """The right end of the x axis."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Counts by two properties."""

    name: str
    """Name of the file."""
    title: str
    """Title of the matrix."""
    row_name: str
    """What the rows are."""
    column_name: str
    """What the columns are."""
    rows: tuple[str, ...]
    """Names of the rows."""
    columns: tuple[str, ...]
    """Names of the columns."""
    values: tuple[tuple[int, ...], ...]
    """A tuple a row."""


Graphic = Picture | Plot | Matrix


def record(graphic: Graphic) -> dict[str, Any]:
    """JSON values of a graphic: `kind`, and its fields."""
    values = {field.name: getattr(graphic, field.name) for field in dataclasses.fields(graphic) if field.name != "draw"}
    return {"kind": type(graphic).__name__.lower(), **values}


def read_graphics(folder: Path) -> list[dict[str, Any]]:
    """What `write_graphics` noted; empty where there is nothing, or nothing whole."""
    try:
        index = json.loads((folder / INDEX).read_text())
        return [row for row in index["graphics"] if row["kind"] in ("picture", "plot", "matrix")]
    except (OSError, ValueError, LookupError, TypeError):
        return []
