"""Learning rate and random seeds as functions of the optimizer step, so that neither has a state to save."""

import math

import numpy as np
import torch

from trainfit.training.recipe import Recipe


def lr_factor(step: int, recipe: Recipe, *, steps_per_epoch: int, total_steps: int) -> float:
    """What every group's rate is multiplied by in optimizer step `step` (0 for the first).

    A linear warm-up, then a cosine to a floor, or drops to a tenth. A family may have a schedule of its own (`Family.lr_factor`).
    """
    if type(recipe) is not Recipe and recipe.family.lr_factor is not None:
        return recipe.family.lr_factor(step, recipe, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    warmup = recipe.warmup_steps or int(recipe.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return step / max(1, warmup)
    if recipe.schedule == "cosine":
        progress = (step - warmup) / max(1, total_steps - warmup)
        return recipe.lr_min_factor + (1 - recipe.lr_min_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    if recipe.lr_steps:
        return 0.1 ** sum(step >= drop for drop in recipe.lr_steps)
    return 1.0 if step < recipe.lr_drop * steps_per_epoch else 0.1


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its first one times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def mix(seed: int, *numbers: int) -> int:
    """A seed of its own for each purpose: (run's seed, purpose, step or image, ...) -> 63 bits."""
    return int(np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))
