"""Reports the progress within a window that takes long."""

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

from trainfit.step.training_step import TrainingStep
from trainfit.training.packets import Spooled

EVERY_S = 25.0
"""Seconds between two lines. Together with `workers.NOTE_S`, a run is never silent for more than a minute."""


class WindowProgress:
    """Reports how many images of a window are done, once the window takes longer than `EVERY_S`.

    Known limit: one micro-batch that takes minutes is not reported before its end.
    """

    def __init__(self, step: TrainingStep, note: Callable[[str], None]) -> None:
        """Watch the micro-batches of this step; `note` receives the lines."""
        self._note = note
        step.after_micro_batch = self._count
        self.begin(0, ())

    def begin(self, number: int, loaded: Sequence[Any]) -> None:
        """Window `number`, counted from 1, begins with what was loaded for this rank.

        Where that waits in a file, what a micro-batch read of it is given back to the system.
        """
        self._release = loaded.release if isinstance(loaded, Spooled) else _nothing
        self._number = number
        self._images = len(loaded)
        self._done = 0
        self._began = self._noted = monotonic()

    def _count(self, images: int) -> None:
        self._release()
        self._done += images
        if self._done > self._images:  # memory ran out and the window started again
            self._done = images
        now = monotonic()
        if now - self._noted > EVERY_S:
            self._noted = now
            passed = f"after {now - self._began:.0f} s"
            self._note(f"window {self._number}: {self._done} of {self._images} images {passed}")


def _nothing() -> None:
    pass
