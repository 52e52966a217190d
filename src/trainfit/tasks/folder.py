"""Reads the files of a data set safely: only regular files inside the data set, parsed within limits."""

import json
import os
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import yaml
from defusedxml.ElementTree import fromstring

from trainfit.errors import TrainfitError
from trainfit.files import NotRegularError, open_regular
from trainfit.tasks.images import ImageDefect, ImageHeader, read_headers

OUTSIDE = "outside the data set"
"""Kind of the findings for files that a data set names but does not hold."""
OUTSIDE_REPAIR = "lies outside of the data set; move it inside, or allow it with --allow-outside"

JSON_BYTES = 8 << 30
LABEL_BYTES = XML_BYTES = 16 << 20
YAML_BYTES = 1 << 20
TEXT_BYTES = 256 << 20
"""The longest files that are read: far above what annotation tools write."""
YAML_DEPTH = 16
"""The deepest nesting of a YOLO data file; the format needs 3."""
XML_ENCODINGS = r"utf-?8|utf-?16|(us-)?ascii|iso-8859-\d+|latin-?1|windows-125\d|cp125\d"
"""Encodings of XML files that are read: the parser would look any name up among Python's codecs, `rot13` too."""
NAME_LENGTH = 1024
"""The longest file name, with its folders, that is looked for."""
SAFE_INTEGER = 2**53
"""Integers up to this size are the same number in every JSON tool (RFC 8259, section 6)."""

SMALL_JSON = 8 << 20
DENSEST_JSON = 16
"""A JSON of more characters has at least so many for each list or object: the smallest COCO annotation with a box has 27,
and an empty list, which takes 2, becomes some 64 bytes of memory."""

_JSON_DIGITS = 18
_short_repr = reprlib.Repr()
_short_repr.maxstring = _short_repr.maxother = 60


class Malformed(Exception):  # noqa: N818 - what a reader turns into a finding, not an error by itself
    """Why a file cannot be used, in one line without the file's name: the reader adds it, and the repair."""


class Outside(Malformed):
    """The file lies outside of the data set."""


class DataFolder:
    """A data set's folder. Files outside of it, by `..`, an absolute path or a link, are read only where that is allowed.

    Known limit: hard links and mounted folders are treated as the data set's own files.
    """

    def __init__(self, root: Path, *, allow_outside: bool = False) -> None:
        """`root` may itself be a link."""
        self.root = root
        self._real_root = os.path.realpath(root)
        self._allow_outside = allow_outside
        self._real_folders: dict[str, str] = {}

    def holds(self, path: Path) -> bool:
        """Whether the path may be read: whether it lies in the folder once links are followed. It need not exist."""
        if self._allow_outside:
            return True
        try:
            real = self._real_path(path)
        except (OSError, ValueError):  # too long a name, a NUL, a lone surrogate: no such file can be
            return False
        return real == self._real_root or real.startswith(self._real_root.rstrip(os.sep) + os.sep)

    def _real_path(self, path: Path) -> str:
        folder, name = os.path.split(os.path.abspath(path))  # noqa: PTH100 - pathlib has no equal that keeps links
        if folder not in self._real_folders:
            self._real_folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._real_folders[folder], name)  # noqa: PTH118
        return os.path.realpath(real) if os.path.islink(real) else real  # noqa: PTH114

    def read_bytes(self, path: Path, limit: int) -> bytes:
        """The content of a regular file of at most `limit` bytes.

        Raises:
            FileNotFoundError: there is no such file.
            Outside: it lies outside of the data set.
            Malformed: it is not a regular file, too long, or cannot be read.
        """
        if not self.holds(path):
            raise Outside(OUTSIDE_REPAIR)
        return read_regular(path, limit)

    def read_text(self, path: Path, limit: int = TEXT_BYTES) -> str:
        """The text of a UTF-8 file, with or without a byte order mark; raises as `read_bytes` does."""
        content = self.read_bytes(path, limit)
        try:
            return content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise Malformed(f"is not UTF-8 text at byte {error.start}; save it as UTF-8") from error

    def read_lines(self, path: Path) -> list[tuple[int, str]]:
        """Number and text of each line of a list that is not blank.

        Raises:
            TrainfitError: the list cannot be read; it names the file.
        """
        try:
            text = self.read_text(path)
        except (FileNotFoundError, Malformed) as error:
            raise named(path, error) from error
        return [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]

    def headers(self, paths: Sequence[Path]) -> list[ImageHeader | ImageDefect]:
        """`read_header` of each path, in order; those outside of the data set are not opened."""
        inside = [self.holds(path) for path in paths]
        read = iter(read_headers([path for path, is_inside in zip(paths, inside, strict=True) if is_inside]))
        outside = ImageDefect(kind=OUTSIDE, message=OUTSIDE_REPAIR)
        return [next(read) if is_inside else outside for is_inside in inside]


def read_regular(path: Path, limit: int, *, first: int | None = None) -> bytes:
    """The content of a regular file, or its `first` bytes; a pipe or device of the name is not waited for.

    Raises as `DataFolder.read_bytes` does.
    """
    try:
        with open_regular(path) as file:
            length = os.fstat(file.fileno()).st_size
            if length > limit:
                raise Malformed(f"is {length} bytes long, and at most {limit} are read; split it")
            return file.read(length if first is None else first)
    except FileNotFoundError:
        raise
    except NotRegularError as error:
        raise Malformed("is not a regular file; remove it or put the file there") from error
    except (OSError, ValueError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or "out of memory"
        raise Malformed(f"cannot be read: {reason}") from error


def named(path: Path, error: Exception) -> TrainfitError:
    """The error of a file without which nothing can be read."""
    return TrainfitError(f"{path}: {'no such file' if isinstance(error, FileNotFoundError) else error}")


def parse_json(text: str) -> Any:
    """A JSON document; an integer of more than 18 digits becomes a float, as it does in JavaScript.

    Raises:
        Malformed: broken, nested deeper than Python's recursion limit, denser than `DENSEST_JSON`, or larger than the memory.
    """
    if not text or text.isspace():
        raise Malformed("the annotation file is empty; export the annotations again")
    if len(text) > SMALL_JSON and (count := text.count("[") + text.count("{")) * DENSEST_JSON > len(text):
        raise Malformed(f"has {count} lists and objects in {len(text)} characters: no annotations; export them again")
    try:
        return json.loads(text, parse_int=_integer_or_float)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise Malformed(f"broken JSON at {where}: {error.msg}; export the annotations again") from error
    except (RecursionError, MemoryError, ValueError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error) or "out of memory"
        raise Malformed(f"broken JSON: {reason}; export the annotations again") from error


def _integer_or_float(digits: str) -> int | float:
    return int(digits) if len(digits) <= _JSON_DIGITS else float(digits)


class _PlainLoader(yaml.BaseLoader):
    """Texts, lists and mappings alone: no types are guessed (`no`, dates, 1e3), no aliases, no deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Count the depth on the way down."""
        if self.check_event(yaml.AliasEvent):
            raise Malformed("broken YAML: aliases (`*name`) are not read; write the values out")
        if self.depth == YAML_DEPTH:
            raise Malformed(f"broken YAML: nested deeper than {YAML_DEPTH}; repair the file")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def parse_yaml(text: str) -> Any:
    """A YAML document whose scalars are all texts, as written.

    Raises:
        Malformed: broken, nested deeper than `YAML_DEPTH`, or with aliases.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        where = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        raise Malformed(f"broken YAML{where}; repair the file") from error


def parse_xml(content: bytes) -> Element:
    """The root element of an XML document; entities are refused.

    Raises:
        Malformed: broken, or in an encoding that is not read.
    """
    declared = re.match(rb"\s*<\?xml[^>]*encoding\s*=\s*[\"']([^\"'>]*)", content[:1000])
    encoding = declared[1].decode("ascii", "replace") if declared else "utf-8"
    if not re.fullmatch(XML_ENCODINGS, encoding, re.IGNORECASE):
        raise Malformed(f"broken XML: the encoding {shown(encoding)} is not read; save it as UTF-8")
    try:
        return fromstring(content)
    except Exception as error:  # the parser's, the codec's and the guard's against entities have no common class
        raise Malformed(f"broken XML: {error or type(error).__name__}") from error


def number(value: object) -> float | None:
    """A JSON number as a float (NaN and infinity too), None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def integer(value: object) -> int | None:
    """A JSON integer of up to 2**53, written `1` or `1.0`; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -SAFE_INTEGER <= value <= SAFE_INTEGER:
        return None
    return int(value) if value == int(value) else None


def pixels(text: str | None) -> int:
    """A count of pixels written in plain digits, 0 for anything else."""
    return int(text) if text and re.fullmatch("[0-9]{1,9}", text.strip()) else 0


def is_text(value: object) -> bool:
    """Whether a value is text that can be written as UTF-8: a lone surrogate cannot."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_file_name(name: str) -> bool:
    """Whether a file of this name can be looked for."""
    return 0 < len(name) <= NAME_LENGTH and "\0" not in name and is_text(name)


def is_file(path: Path) -> bool:
    """Whether a regular file is there; False for a name that no file can have, for which `Path.is_file` raises."""
    return os.path.isfile(path)  # noqa: PTH113


def shown(value: object) -> str:
    """A value of a file for a message: at most some 80 characters, whatever it is."""
    return _short_repr.repr(value)[:80]
