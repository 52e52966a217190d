"""trainfit train."""

import os
import signal
import sys
from collections.abc import Set as AbstractSet

from trainfit.cli.signals import StopAfterStep
from trainfit.planning.plan import with_plan
from trainfit.training.recipe import Recipe
from trainfit.values import given_by_flags


def train(recipe: Recipe, given: AbstractSet[str]) -> int:
    """Train a model on your data, with the exact gradient of the effective batch.

    Ctrl-C saves the state and stops, a second stops at once; --resume continues.
    """
    if (
        "torch" not in sys.modules and os.environ.get("RANK", "0") == "0"
    ):  # the import takes seconds, on a busy disk many
        print("starting: importing PyTorch", file=sys.stderr, flush=True)
    with StopAfterStep() as signals:
        from trainfit.planning.here import planned_here
        from trainfit.reports.progress import TerminalProgress
        from trainfit.reports.run_summary import summary_text
        from trainfit.step import ranks
        from trainfit.training.fit import fit

        with TerminalProgress() as progress:
            named = {"model"} if recipe.model else set[str]()  # it is given without a flag
            chosen = with_plan(given_by_flags(recipe, given | named))
            summary = fit(chosen, progress=progress, stop=signals.requested, choose=planned_here)
    if ranks.rank() == 0:
        print(summary_text(summary))
    # Another rank may have received the signal.
    return 128 + (signals.received or signal.SIGINT) if summary.interrupted else 0
