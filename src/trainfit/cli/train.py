"""trainfit train."""

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import tyro

from trainfit.planning.plan import with_plan
from trainfit.training.recipe import Recipe


def train(recipe: Annotated[Recipe, tyro.conf.arg(name="")]) -> int:
    """Train a detector on your data, with the exact gradient of the effective batch.

    Ctrl-C saves the state and stops; a second Ctrl-C stops at once. Go on with --resume RUN.
    """
    from trainfit.reports.progress import TerminalProgress
    from trainfit.reports.run_summary import summary_text
    from trainfit.step import ranks
    from trainfit.training.fit import fit

    received: list[int] = []

    trainer = os.getpid()

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != trainer:  # a loader process, which inherits this handler: the trainer decides
            return
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping: the state is saved after this step (once more: stop at once)", file=sys.stderr)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with TerminalProgress() as progress:
            summary = fit(with_plan(recipe), progress=progress, stop=lambda: bool(received))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if ranks.rank() == 0:
        print(summary_text(summary))
    return 128 + received[0] if summary.interrupted else 0
