"""CSV, TSV and JSON Lines: a row for each image and text."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from trainfit.errors import TrainfitError
from trainfit.tasks.folder import JSON_BYTES, DataFolder, Malformed, named, shown
from trainfit.tasks.pairs.grouped import Grouped

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
IMAGE_COLUMNS = ("filepath", "image", "image_path", "file_name", "filename", "path", "file")
"""open_clip's own name first (3.3 open_clip_train/params.py --csv-img-key); the first that is there is taken."""
TEXT_COLUMNS = ("title", "caption", "text", "captions", "texts")
"""The same for --csv-caption-key. A list in JSON Lines is several texts of the image."""
SEPARATORS = ("\t", ",", ";", "|")
"""The one that the header line has most of is taken."""


@dataclass(frozen=True, kw_only=True)
class TableColumns:
    """Which columns of a table hold images and texts, and what separates them; empty: found by looking."""

    image: str = ""
    """Name of the column of images."""
    text: str = ""
    """Name of the column of texts."""
    separator: str = ""
    """One character."""


def parse_columns(given: str) -> TableColumns:
    """`IMAGE,TEXT` or `IMAGE,TEXT,SEPARATOR`, for instance `url,alt,;` or `filepath,title,tab`.

    Raises:
        TrainfitError: it is written in another way.
    """
    image, _, rest = given.partition(",")
    text, _, separator = rest.partition(",")
    separator = "\t" if separator in ("tab", "\\t") else separator
    if not image or not text or len(separator) > 1:
        raise TrainfitError(f"--format table:{given}: write table:IMAGE,TEXT or table:IMAGE,TEXT,SEPARATOR")
    return TableColumns(image=image, text=text, separator=separator)


ANY = TableColumns()
"""The first known names that are there."""


def read_table(path: Path, folder: DataFolder, grouped: Grouped, chosen: TableColumns = ANY) -> None:
    """Add every row of a table; image files are relative to the table's folder.

    Raises:
        TrainfitError: the table cannot be read, or has no column for images or texts.
    """
    try:
        text = folder.read_text(path, JSON_BYTES)
    except (FileNotFoundError, Malformed) as error:
        raise named(path, error) from error
    lines = path.suffix in (".jsonl", ".ndjson")
    rows = _json_lines(path, text) if lines else _rows(path, text, chosen.separator)
    columns: tuple[str, str] | None = None
    for number, row in rows:
        columns = columns or _columns(path, row, chosen)
        where = f"{path.name} line {number}"
        image = row.get(columns[0])
        if not isinstance(image, str) or not image.strip():
            grouped.skip("no image", where, f"{columns[0]} is {shown(image)}; left out")
            continue
        value: Any = row.get(columns[1])
        texts = cast("list[Any]", value) if isinstance(value, list) else [value]
        grouped.add(path.parent / image.strip(), [each for each in texts if isinstance(each, str)], where)


def _rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    header = text.partition("\n")[0]
    separator = separator or max(SEPARATORS, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise TrainfitError(f"{path} line {reader.line_num}: {error}; save it as CSV again") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainfitError(f"{path} line {number}: broken JSON ({error}); write one object a line") from error
        if not isinstance(row, dict):
            raise TrainfitError(f"{path} line {number}: {shown(row)} is not a JSON object; write one object a line")
        yield number, cast("dict[str, Any]", row)


def _columns(path: Path, row: Mapping[str, Any], chosen: TableColumns) -> tuple[str, str]:
    names = [name for name in row if name]
    for_images = (chosen.image,) if chosen.image else IMAGE_COLUMNS
    for_texts = (chosen.text,) if chosen.text else TEXT_COLUMNS
    image = next((name for name in for_images if name in row), None)
    text = next((name for name in for_texts if name in row), None)
    if image is None or text is None:
        kind, known = ("images", for_images) if image is None else ("texts", for_texts)
        repair = "give --format table:IMAGE,TEXT with the names of two of them"
        others = f" (or {', '.join(known[1:])})" if known[1:] else ""
        raise TrainfitError(
            f"{path} has no column for {kind} named {known[0]}{others}: it has "
            f"{', '.join(map(shown, names[:10])) or 'none'}; {repair}"
        )
    return image, text
