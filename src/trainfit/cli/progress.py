"""Shows on stderr what a command is doing until its answer is there."""

import sys
import threading
import time
from types import TracebackType
from typing import TextIO

FIRST_S = 1.0
"""Seconds before the first line where stderr is not a terminal."""
NEXT_S = 10.0
"""Seconds between two lines there."""


class StatusLine:
    """Notes of what takes seconds. A note that ends with "..." stands for a moment and makes way for the next.

    On a terminal the last line has the time, how many things were done, and the one that is being done. Elsewhere an answer
    that comes at once leaves nothing behind; what takes longer is reported in lines.
    """

    def __init__(self, first: str, stream: TextIO | None = None) -> None:
        """`first` is printed within a second, whatever happens."""
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self._started = self._last_s = time.monotonic()
        self._count = -1
        self._current = first
        self._shown = False
        self._lasting: list[str] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def __enter__(self) -> "StatusLine":
        """Show the first line, and update the time."""
        self.note(self._current)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the last line."""
        self._ended.set()
        with self._lock:
            self._clear()
            self.stream.flush()

    def note(self, line: str) -> None:
        """Show what is done next."""
        with self._lock:
            if line.endswith("..."):
                self._count += 1
                self._current = line.removesuffix("...")
            else:
                self._lasting.append(line)
            self._show()

    def _watch(self) -> None:
        while not self._ended.wait(0.2 if self.is_terminal else FIRST_S):
            with self._lock:
                if not self._ended.is_set():
                    self._show()

    def _show(self) -> None:
        now = time.monotonic()
        if not self.is_terminal and now - self._started < FIRST_S:
            return
        self._clear()
        for line in self._lasting:
            print(line, file=self.stream, flush=True)
        self._lasting.clear()
        status = f"{now - self._started:.0f} s{f', {self._count} done' if self._count > 0 else ''}: {self._current}"
        if self.is_terminal:
            self.stream.write(status[:100])
            self.stream.flush()
        elif self._shown and now - self._last_s < NEXT_S:
            return
        else:
            print(status, file=self.stream, flush=True)
        self._shown = True
        self._last_s = now

    def _clear(self) -> None:
        if self.is_terminal and self._shown:
            self.stream.write("\r\x1b[2K")
            self._shown = False
