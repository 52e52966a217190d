"""The learning rate as open_clip's trainer sets it. Imports no torch."""

import math
from typing import Any


def lr_factor(step: int, recipe: Any, *, steps_per_epoch: int, total_steps: int) -> float:
    """What every group's rate is multiplied by in optimizer step `step` (0 for the first).

    Source: open_clip 3.3 open_clip_train/scheduler.py `cosine_lr` and `const_lr`, which warm up from 1 / warm-up steps.
    """
    del steps_per_epoch
    warmup = recipe.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "cosine":
        floor = recipe.lr_min_factor
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))
    return 1.0
