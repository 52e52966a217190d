"""Files that a command writes its result to."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from trainfit.errors import TrainfitError


def require_writable(files: Iterable[Path | None], *, force: bool) -> None:
    """Refuse result files before the work is done, rather than after it.

    Raises:
        TrainfitError: one exists and `force` is not set, or its folder cannot be written.
    """
    for file in files:
        if file is None:
            continue
        if file.exists() and not force:
            raise TrainfitError(f"{file} exists; choose another name or use --force")
        if file.is_dir() or not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise TrainfitError(f"{file} cannot be written: choose a file in a folder that exists and is writable")


def require_folder(folder: Path | None, name: str) -> None:
    """Make a folder for results before the work is done; `name` is its flag.

    Raises:
        TrainfitError: it cannot be made or written.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainfitError(f"{name} {folder} cannot be made ({error.strerror}): choose another folder") from error
    if not os.access(folder, os.W_OK):
        raise TrainfitError(f"{name} {folder} cannot be written: choose another folder")


def write(file: Path, content: str | bytes) -> None:
    """Write a result and print its path on stderr.

    Raises:
        TrainfitError: the file cannot be written.
    """
    try:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise TrainfitError(f"{file} cannot be written ({error.strerror}): choose another place") from error
    print(f"wrote {file}", file=sys.stderr)
