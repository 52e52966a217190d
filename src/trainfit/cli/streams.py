"""Standard output and standard error that are closed, full, or of a narrow encoding."""

import errno
import io
import os
import sys
from typing import TextIO

from trainfit.errors import TrainfitError

BROKEN_PIPE_CODE = 128 + 13
"""The exit code of a program that SIGPIPE ends: the reader of its output has closed the pipe."""


class Stream(io.TextIOWrapper):
    """A standard stream that drops its text once it cannot be written, and remembers why.

    The command then runs to its end, so that its other results (a training, a file) are not lost with the text.
    """

    fault: int | None = None
    """The `errno` of the first failure."""

    def write(self, text: str, /) -> int:
        """Write, or drop the text."""
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is buffered."""
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        self.fault = self.fault or error.errno
        _discard(self.fileno())


def prepare() -> None:
    """Make both streams of this process usable. Characters that their encoding lacks are written as escapes.

    Raises:
        TrainfitError: stdout is closed, so that no result could be printed.
    """
    closed = sys.stdout is None  # pyright: ignore[reportUnnecessaryComparison]
    sys.stderr = _usable(sys.stderr, 2, line_buffering=True)
    sys.stdout = _usable(sys.stdout, 1, line_buffering=os.isatty(1))
    if closed:
        raise TrainfitError("standard output is closed: redirect it to a file or to /dev/null")


def exit_code(code: int) -> int:
    """The exit code of a command that ended with `code`, after its output is written or known to be lost."""
    stdout = sys.stdout
    stdout.flush()
    if not isinstance(stdout, Stream) or stdout.fault is None:
        return code
    if stdout.fault == errno.EPIPE:
        return BROKEN_PIPE_CODE
    reason = os.strerror(stdout.fault)
    print(f"trainfit: error: the result cannot be written to standard output: {reason}", file=sys.stderr)
    return code or TrainfitError.exit_code


def _usable(stream: TextIO | None, descriptor: int, *, line_buffering: bool) -> Stream:
    if stream is None:
        _discard(descriptor)
    raw = io.FileIO(descriptor, "w", closefd=False)
    encoding = "utf-8" if stream is None else stream.encoding
    return Stream(io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)


def _discard(descriptor: int) -> None:
    """Discard what is written to a standard stream, with what its buffer still holds."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    if nowhere != descriptor:
        os.close(nowhere)
