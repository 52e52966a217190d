"""Curves and matrices as images, and the folder of images that an evaluation writes."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainfit.errors import TrainfitError
from trainfit.tasks.graphics import INDEX, Graphic, Matrix, Picture, Plot, record
from trainfit.tasks.palette import hex_color


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
    figure, axes = _figure(6.2, 4.4, plot.title)
    for number, (name, points) in enumerate(plot.lines):
        ink = "#1d2430" if number == 0 else hex_color(number - 1)
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=ink, linewidth=2.5 if number == 0 else 1.2, label=_short(name), zorder=-number)
    axes.set(xlabel=plot.x, ylabel=plot.y, xlim=(0, plot.x_most), ylim=(0, 1))
    axes.grid(color="#e1e4e9")
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    return _image(figure)


def draw_matrix(matrix: Matrix) -> Image.Image:
    """A square a cell, darker the larger its share of the row, with its count."""
    counts = np.array(matrix.values, np.float64).reshape(len(matrix.rows), len(matrix.columns))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = _figure(2.5 + 0.45 * counts.shape[1], 2.2 + 0.45 * counts.shape[0], matrix.title)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(matrix.columns)), list(map(_short, matrix.columns)), rotation=90, parse_math=False)
    axes.set_yticks(range(len(matrix.rows)), list(map(_short, matrix.rows)), parse_math=False)
    axes.set(xlabel=matrix.column_name, ylabel=matrix.row_name)
    for (row, column), count in np.ndenumerate(counts):
        if count:
            ink = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{count:.0f}", ha="center", va="center", color=ink, fontsize=8)
    return _image(figure)


def _figure(width: float, height: float, title: str) -> tuple[Any, Any]:
    """A figure of matplotlib, of a size in inches, with one part."""
    from matplotlib.figure import Figure  # takes a second to import

    figure: Any = Figure(figsize=(width, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure, figure.add_subplot()


def _image(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font lacks: boxes
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _short(name: str) -> str:
    """A name that fits; dollar signs are no formula, and a leading underscore hides nothing from a legend."""
    short = name if len(name) <= 24 else f"{name[:23]}…"
    return short.replace("$", r"\$").replace("_", "\u2009_", 1) if short.startswith("_") else short.replace("$", r"\$")


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
