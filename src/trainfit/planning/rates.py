"""Learning rates of a recipe at other effective batches."""

from math import sqrt
from typing import Any

from trainfit.models.setting import Setting
from trainfit.training.recipe import recipe_type


def scaled_rates(setting: Setting, effective_batch: int) -> dict[str, Any]:
    """The recipe's rates for an effective batch that they are not for, three digits each; nothing where they hold as they are."""
    factor = rate_factor(setting, effective_batch)
    if factor is None or factor == 1:
        return {}
    kind = recipe_type(setting.family.setting)
    defaults = {name: getattr(kind, name) for name in ("lr", *setting.family.rates)}
    return {name: float(f"{rate * factor:.3g}") for name, rate in defaults.items()}


def rate_factor(setting: Setting, effective_batch: int) -> float | None:
    """The factor for the recipe's learning rates at an effective batch; None if the family has no recipe."""
    reference = setting.family.reference_batches
    if reference is None:
        return None
    ratio = effective_batch / min(max(effective_batch, reference[0]), reference[1])
    return ratio if setting.optimizer.startswith("sgd") else sqrt(ratio)


def learning_rate(setting: Setting, effective_batch: int) -> str:
    """What the effective batch means for the learning rate, in a sentence."""
    rule = "The learning rate follows the effective batch, not how it is cut"
    reference = setting.family.reference_batches
    if reference is None:
        return f"{rule}."
    least, largest = reference
    if least <= effective_batch <= largest:
        return f"{rule}: upstream takes the recipe's rate for {least} as for {largest}, so it stays."
    nearest = largest if effective_batch > largest else least
    ratio = effective_batch / nearest
    if setting.optimizer.startswith("sgd"):
        return f"{rule}: the recipe's is for {nearest}; for SGD multiply it by {ratio:.3g} (linear; Goyal 2017)."
    return f"{rule}: the recipe's is for {nearest}; for Adam multiply it by {sqrt(ratio):.3g} (root; Malladi 2022)."
