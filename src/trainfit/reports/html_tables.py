"""Tables, bars and lists of the HTML reports. Pure text in and out."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from trainfit.gpus.catalogue import MIB


def bars(rows: Sequence[tuple[str, str, float]], colors: Mapping[str, str] | None = None) -> str:
    """A table of (name, figure as text, length) with a bar each; the longest fills its column."""
    most = max((length for _, _, length in rows), default=0) or 1
    cells = [
        f"<tr><td class='name'>{escape(name)}</td><td class='number'>{escape(figure)}</td><td class='wide'>"
        f"<span class='bar' style='width:{100 * length / most:.1f}%;background:{(colors or {}).get(name, 'var(--soft)')}'>"
        "</span></td></tr>"
        for name, figure, length in rows
    ]
    return f"<table>{''.join(cells)}</table>"


def byte_bars(rows: Sequence[tuple[str, int]], colors: Mapping[str, str] | None = None) -> str:
    """`bars` of (name, bytes)."""
    return bars([(name, f"{nbytes / MIB:.1f} MiB", nbytes) for name, nbytes in rows], colors)


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (), marked: int | None = None
) -> str:
    """A table of plain text; columns `numbers` stand to the right, row `marked` is bold."""

    def cells(kind: str, row: Sequence[str]) -> str:
        css = ["class='number'" if i in numbers else "" for i in range(len(row))]
        return "".join(f"<{kind} {c}>{escape(text)}</{kind}>" for c, text in zip(css, row, strict=True))

    strong = "style='font-weight:600'"
    lines = [f"<tr>{cells('th', head)}</tr>"]
    lines += [f"<tr {strong * (i == marked)}>{cells('td', row)}</tr>" for i, row in enumerate(rows)]
    return f"<div style='overflow-x:auto'><table class='grid'>{''.join(lines)}</table></div>"


def bullets(lines: Iterable[str]) -> str:
    """A list of sentences."""
    return "<ul>" + "".join(f"<li>{escape(each)}</li>" for each in lines) + "</ul>"
