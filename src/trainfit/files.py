"""The user's cache folder, and small files of users and earlier runs: read whole, within a limit, if they are regular files."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

TEXT_BYTES = 1 << 30
"""The longest file that is read. A log of a million windows has some 400 MB."""


def cache_folder() -> Path:
    """The folder that keeps traces, measurements and the sample set between runs; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainfit"


class NotRegularError(OSError):
    """A pipe, a device or a folder in the place of a file."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or device of that name is not waited for.

    Raises:
        NotRegularError: it is not a regular file.
        OSError: it is missing or cannot be opened.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to returns at once.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise NotRegularError(errno.EINVAL, "it is not a regular file", str(path))


def require_regular(path: Path) -> None:
    """Refuse what is not a regular file before a library opens it, which may wait for ever.

    Raises:
        NotRegularError: it is not a regular file.
        OSError: it is missing or cannot be opened.
    """
    open_regular(path).close()


def read_bytes(path: Path, limit: int = TEXT_BYTES) -> bytes:
    """The content of a regular file of at most `limit` bytes; raises OSError."""
    with open_regular(path) as file:
        length = os.fstat(file.fileno()).st_size
        if length > limit:
            raise OSError(errno.EFBIG, f"it is {length} bytes long, and at most {limit} are read", str(path))
        return file.read(length)


def read_json(path: Path) -> Any:
    """The document of a JSON file in UTF-8.

    Raises:
        OSError: it is missing, no regular file, too long, or cannot be read.
        ValueError: it is not JSON or not UTF-8.
    """
    return parse_json(read_bytes(path))


def parse_json(content: bytes) -> Any:
    """A JSON document in UTF-8, of text that can be written again; raises ValueError."""
    try:
        document = json.loads(content.decode("utf-8"))
        if b"\\u" in content:  # an escape may stand for half a character, which no encoding has
            json.dumps(document, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return document


def read_json_lines(path: Path, *, allow_blank: bool = False) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSON-lines file in their order, and the number of lines that are none.

    A line may be cut short by a kill, not UTF-8, or blank, which counts unless `allow_blank`. Without the file there are
    no rows.

    Raises:
        OSError: it is not a regular file, too long, or cannot be read.
    """
    rows: list[dict[str, Any]] = []
    bad = 0
    try:
        lines = read_bytes(path).splitlines()
    except FileNotFoundError:
        return [], 0
    for line in lines:
        if allow_blank and not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    return rows, bad
