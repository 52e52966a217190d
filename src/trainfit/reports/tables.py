"""Tables as text."""

from collections.abc import Sequence

from trainfit.reports.words import printable
from trainfit.tasks.task import Cell, Table


def table_text(table: Table) -> str:
    """The title, the column names, and a row each: the first column to the left, the others to the right."""
    texts = [tuple(_text(cell) for cell in row) for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.columns, *texts, strict=True)]
    least = [_least(column) for column in zip(*table.rows, strict=True)] or [5] * len(widths)
    widths[1:] = [max(pair) for pair in zip(widths, least, strict=True)][1:]

    def line(cells: tuple[str, ...]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)])

    return "\n".join([table.title, line(table.columns), *map(line, texts)])


def _text(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.3f}" if isinstance(cell, float) else printable(str(cell))


def _least(column: Sequence[Cell]) -> int:
    """The least width of a column: counts get more room than shares."""
    return 8 if any(isinstance(cell, int) for cell in column) else 5
