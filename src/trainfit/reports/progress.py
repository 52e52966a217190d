"""Training progress in the terminal: one live line, or plain lines if there is no terminal."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from trainfit.reports.words import duration, printable, rate
from trainfit.training.telemetry import StepUpdate

GIB = 2**30
PLAIN_EVERY_S = 10.0
"""Least seconds between two lines without a terminal."""


class TerminalProgress:
    """A `training.telemetry.Progress` on stderr; a context manager that leaves the terminal as it was."""

    def __init__(self, console: Console | None = None) -> None:
        """Show on `console`, by default stderr."""
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, auto_refresh=False, transient=True) if self.console.is_terminal else None
        self.printed = -PLAIN_EVERY_S

    def __enter__(self) -> "TerminalProgress":
        """Start the live line."""
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the live line."""
        if self.live:
            self.live.stop()

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(Text(printable(text)))

    def step(self, update: StepUpdate) -> None:
        """Show the line of the last step."""
        self._show(step_line(update), always=update.step == update.total_steps)

    def evaluated(self, done: int, total: int) -> None:
        """Show how far the evaluation is."""
        self._show(f"evaluating: {done}/{total} images", always=False)

    def _show(self, line: str, *, always: bool) -> None:
        if self.live:
            self.live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif always or time.monotonic() - self.printed >= PLAIN_EVERY_S:
            self.printed = time.monotonic()
            self.console.print(Text(line))


def step_line(update: StepUpdate) -> str:
    """One line: step, loss, speed, remaining time, memory, and share of waiting for data."""
    return (
        f"epoch {update.epoch + 1}/{update.epochs}  step {update.step}/{update.total_steps}  "
        f"loss {update.loss:.4g}  {rate(update.images_per_s)} images/s  {duration(update.remaining_s)} left  "
        f"{update.memory_bytes / GIB:.2f} GiB  data wait {update.wait_share:.0%}"
    )
