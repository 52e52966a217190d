"""Curves and matrices as images, and the folder of images that an evaluation writes."""

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from trainfit.errors import TrainfitError
from trainfit.tasks.drawing import Color, color, font, ink_on
from trainfit.tasks.graphics import INDEX, Graphic, Matrix, Picture, Plot, record

_TWICE = 2
"""Charts are drawn at twice their size and reduced, which smooths their lines."""


def drawn(graphic: Graphic) -> Image.Image:
    """A graphic as an image.

    Raises:
        TrainfitError: the file that a picture shows cannot be read.
    """
    if isinstance(graphic, Picture):
        return graphic.draw()
    return draw_plot(graphic) if isinstance(graphic, Plot) else draw_matrix(graphic)


def draw_plot(plot: Plot) -> Image.Image:
    """Lines over a grid, with a legend beside it."""
    left = 56
    top = 34
    side = 360
    legend = 200
    image, pen = _canvas(left + side + legend, top + side + 46)
    _write(pen, (left, 8), plot.title, 15)
    for tick in range(6):
        share = tick / 5
        x = left + share * side
        y = top + (1 - share) * side
        _line(pen, [(left, y), (left + side, y)], (225, 228, 233), 1)
        _line(pen, [(x, top), (x, top + side)], (225, 228, 233), 1)
        _write(pen, (left - 8, y), f"{share:.1f}", 11, anchor="rm")
        _write(pen, (x, top + side + 6), f"{share:.1f}", 11, anchor="mt")
    _write(pen, (left + side / 2, top + side + 26), plot.x, 12, anchor="mt")
    _write(pen, (left - 44, top - 6), plot.y, 12, anchor="lb")
    for number, (name, points) in reversed(list(enumerate(plot.lines))):
        ink = line_color(number)
        path = [(left + x * side, top + (1 - y) * side) for x, y in points]
        _line(pen, path, ink, 3 if number == 0 else 1.5)
        row = top + 8 + 18 * number
        _line(pen, [(left + side + 14, row), (left + side + 34, row)], ink, 3)
        _write(pen, (left + side + 40, row), name if len(name) <= 24 else f"{name[:23]}…", 12, anchor="lm")
    return image.reduce(_TWICE)


def line_color(number: int) -> Color:
    """The colour of a plot's line: the first, which stands for all, is dark."""
    return (29, 36, 48) if number == 0 else color(number - 1)


def draw_matrix(matrix: Matrix) -> Image.Image:
    """A square a cell, darker the larger its share of the row, with its count."""
    cell = max(26, min(64, 560 // max(1, len(matrix.columns))))
    names = [*matrix.rows, *matrix.columns]
    margin = min(180, 16 + max((round(font(12).getlength(_short(name))) for name in names), default=0))
    left = margin + 26
    top = 40
    width = left + cell * len(matrix.columns) + 16
    height = top + cell * len(matrix.rows) + margin + 30
    image, pen = _canvas(max(width, 360), height)
    _write(pen, (10, 8), matrix.title, 15)
    for i, (name, values) in enumerate(zip(matrix.rows, matrix.values, strict=True)):
        whole = sum(values) or 1
        _write(pen, (left - 6, top + (i + 0.5) * cell), _short(name), 12, anchor="rm")
        for j, value in enumerate(values):
            share = value / whole
            fill = (round(255 - 216 * share), round(255 - 172 * share), round(255 - 102 * share))
            corner = (left + j * cell, top + i * cell)
            square = [_TWICE * v for v in (*corner, corner[0] + cell - 1, corner[1] + cell - 1)]
            pen.rectangle(square, fill=fill, outline=(225, 228, 233))
            if value:
                middle = (corner[0] + cell / 2, corner[1] + cell / 2)
                _write(pen, middle, f"{value}", 12 if value < 10_000 else 9, ink=ink_on(fill), anchor="mm")
    foot = top + cell * len(matrix.rows)
    for j, name in enumerate(matrix.columns):
        words = Image.new("L", (2 * margin, 40), 0)
        ImageDraw.Draw(words).text((2 * margin - 4, 20), _short(name), fill=255, font=font(24), anchor="rm")
        turned = words.rotate(90, expand=True)
        place = (round(2 * (left + (j + 0.5) * cell)) - 20, 2 * foot + 4)
        image.paste((70, 78, 92), place, turned)
    _write(pen, (left, height - 22), f"rows: {matrix.row_name}; columns: {matrix.column_name}", 12)
    return image.reduce(_TWICE)


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def _canvas(width: float, height: float) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (round(_TWICE * width), round(_TWICE * height)), (255, 255, 255))
    return image, ImageDraw.Draw(image)


def _line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], ink: Color, width: float) -> None:
    for (x0, y0), (x1, y1) in pairwise(points):
        ends = (_TWICE * x0, _TWICE * y0, _TWICE * x1, _TWICE * y1)
        pen.line(ends, fill=ink, width=round(_TWICE * width))


def _write(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    words: str,
    size: int,
    *,
    ink: Color = (70, 78, 92),
    anchor: str = "la",
) -> None:
    at = (_TWICE * place[0], _TWICE * place[1])
    pen.text(at, words, fill=ink, font=font(_TWICE * size), anchor=anchor)


def write_graphics(graphics: Sequence[Graphic], folder: Path, note: Callable[[str], None]) -> None:
    """Write PNG files and `INDEX` into a folder, which is made; what it held of these names is replaced.

    A picture whose file can no longer be read is left out, and noted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index: list[dict[str, Any]] = []
    for graphic in graphics:
        try:
            image = drawn(graphic)
        except TrainfitError as error:
            note(f"{graphic.name}: {error}")
            continue
        image.save(folder / f"{graphic.name}.png", compress_level=3)
        index.append(record(graphic))
    text = json.dumps({"schema": 1, "graphics": index})
    (folder / INDEX).write_text(text + "\n")
