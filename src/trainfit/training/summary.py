"""The result of a training."""

from dataclasses import dataclass
from pathlib import Path

from trainfit.tasks.task import Evaluation
from trainfit.training.shortage import Survival


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a training ended."""

    folder: Path
    """The run folder."""
    model: str
    """Name of the model."""
    steps: int
    """Optimizer steps done, those before a resume included."""
    steps_here: int
    """The steps of them since the start or the resume."""
    total_steps: int
    """Optimizer steps of the whole training."""
    images_per_s: float
    """Speed of training, without evaluation and saving."""
    train_s: float
    """Seconds of training, without evaluation and saving."""
    loader: str
    """Whether the loader or the model set the pace; see `headroom`."""
    noise: str
    """The gradient noise scale; see `noise_scale`."""
    memory_bytes: int
    """See `telemetry.memory_bytes`."""
    evaluation: Evaluation | None
    """The last evaluation; None where there was none since the start or resume."""
    best_score: float | None
    """The score of the best weights (`Evaluation.score`)."""
    best_step: int | None
    """Step of the best evaluation."""
    exported: Path
    """The best weights as the upstream project loads them; written at the end."""
    skipped_images: tuple[str, ...]
    """Files that could not be decoded while training."""
    survived: tuple[Survival, ...]
    """Out-of-memory errors, and what was done; since the start."""
    interrupted: bool
    """Whether the user stopped it before the end; the state is saved."""
