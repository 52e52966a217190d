"""The best evaluation of a run, and how long ago it was."""

from typing import Any


class Best:
    """Score and step of the best weights; both are None before the first evaluation."""

    def __init__(self) -> None:
        """Start without an evaluation."""
        self.score: float | None = None
        self.step: int | None = None

    def take(self, score: float | None, step: int) -> tuple[bool, bool]:
        """Take an evaluation: (whether its score is the best so far, whether its weights are now the best).

        Without a score the last weights are the best.
        """
        better = score is not None and (self.score is None or score > self.score)
        chosen = better or score is None or self.step is None
        if chosen:
            self.score = score
            self.step = step
        return better, chosen

    def stale_epochs(self, step: int, steps_per_epoch: int) -> float:
        """Epochs since the best evaluation; 0 before the first, and where the data define no score."""
        return 0.0 if self.step is None or self.score is None else (step - self.step) / steps_per_epoch

    def state(self) -> dict[str, Any]:
        """Plain values for a saved state."""
        return {"score": self.score, "step": self.step}

    def load(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.score = state["score"]
        self.step = state["step"]
