"""Graphics of a run's best evaluation, as parts of its HTML page: pictures, curves, and the confusion matrix."""

from base64 import b64encode
from collections.abc import Mapping
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

from trainfit.reports import svg
from trainfit.tasks.graphics import read_graphics
from trainfit.tasks.palette import hex_color

_SIDE = 300
_LEFT = 44
_TOP = 10


def graphics_html(folder: Path) -> str:
    """The graphics in a folder; empty if there are none."""
    rows = read_graphics(folder)
    pictures = [_picture(row, folder) for row in rows if row["kind"] == "picture"]
    plots = [_plot(row) for row in rows if row["kind"] == "plot"]
    matrices = [_matrix(row) for row in rows if row["kind"] == "matrix"]
    parts: list[str] = []
    if plots:
        parts.append(f"<h2>Curves</h2><div class='charts'>{''.join(plots)}</div>")
    parts += matrices
    if any(pictures):
        parts.append(f"<h2>Validation pictures</h2>{''.join(pictures)}")
    return "".join(parts)


def _picture(row: Mapping[str, Any], folder: Path) -> str:
    """A picture embedded as JPEG, because PNG files of photographs are ten times as large. Empty if its file is gone."""
    from PIL import Image

    try:
        image = Image.open(folder / f"{row['name']}.png", formats=["PNG"]).convert("RGB")
    except OSError:
        return ""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = b64encode(buffer.getvalue()).decode()
    title = escape(str(row["title"]))
    return (
        f"<figure><img alt='{title}' src='data:image/jpeg;base64,{data}' style='max-width:100%'>"
        f"<p class='soft'>{title}</p></figure>"
    )


def _plot(row: Mapping[str, Any]) -> str:
    """Lines in a square; each has its name as a tooltip."""
    most = row.get("x_most", 1.0)

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + x / most * _SIDE, _TOP + (1 - y) * _SIDE

    shapes: list[str] = []
    for tick in range(6):
        share = tick / 5
        x, y = at(share * most, share)
        shapes.append(svg.line(_LEFT, y, _LEFT + _SIDE, y, "var(--line)", "stroke-width='.5'"))
        shapes.append(svg.line(x, _TOP, x, _TOP + _SIDE, "var(--line)", "stroke-width='.5'"))
        shapes.append(svg.text(_LEFT - 6, y + 4, f"{share:.1f}", anchor="end"))
        shapes.append(svg.text(x, _TOP + _SIDE + 16, f"{share * most:.3g}", anchor="middle"))
    keys: list[tuple[str, str]] = []
    for number, (name, points) in reversed(list(enumerate(row["lines"]))):
        ink = "var(--ink)" if number == 0 else hex_color(number - 1)
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in points)
        width = 2.5 if number == 0 else 1.2
        shapes.append(
            f"<polyline points='{path}' fill='none' stroke='{ink}' stroke-width='{width}'>"
            f"<title>{escape(str(name))}</title></polyline>"
        )
        keys.insert(0, (escape(str(name)), ink))
    caption = escape(str(row["title"]))
    shapes.append(svg.text(_LEFT + _SIDE / 2, _TOP + _SIDE + 34, str(row["x"]), anchor="middle"))
    shapes.append(svg.text(_LEFT + 6, _TOP + 14, str(row["y"]), css="strong"))
    drawing = svg.picture(_LEFT + _SIDE + 16, _TOP + _SIDE + 42, str(row["title"]), shapes)
    return f"<figure style='max-width:420px'><figcaption>{caption}</figcaption>{drawing}{svg.legend(keys)}</figure>"


def _matrix(row: Mapping[str, Any]) -> str:
    """A table whose cells are the darker the larger their share of the row."""
    heads = "".join(f"<th class='number'>{escape(str(name))}</th>" for name in row["columns"])
    lines: list[str] = []
    for name, values in zip(row["rows"], row["values"], strict=True):
        whole = sum(values) or 1
        cells = "".join(
            f"<td class='number' style='background:rgba(78,165,183,{0.75 * value / whole:.2f})'>{value or ''}</td>"
            for value in values
        )
        lines.append(f"<tr><th class='label'>{escape(str(name))}</th>{cells}</tr>")
    about = f"rows: {row['row_name']}, columns: {row['column_name']}"
    return (
        f"<h2>{escape(str(row['title']))}</h2><div style='overflow-x:auto'><table><tr><th class='soft'>"
        f"{escape(about)}</th>{heads}</tr>{''.join(lines)}</table></div>"
    )
