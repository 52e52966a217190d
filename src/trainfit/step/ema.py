"""Exponential moving average of the weights."""

import copy
import math

import torch


def ema_decay(step: int, *, decay: float, tau: float) -> float:
    """Decay of update `step` (0 for the first): decay x (1 - exp(-(step + 1) / tau)).

    Source: rfdetr 1.11.2 training/model_ema.py `ModelEma._get_decay` (`updates` starts at 1 there).
    """
    return decay * (1 - math.exp(-(step + 1) / tau)) if tau else decay


def averaged_copy(model: torch.nn.Module) -> torch.nn.Module:
    """The average's start: a copy of the model in eval mode. Frozen parameters are shared, not copied: no memory."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(averaged: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Averaged = decay x averaged + (1 - decay) x model, in place and without temporaries. Buffers that are no floats
    are copied; frozen parameters are left alone, since rounding would move even an average of equals.
    """
    old, new = averaged.state_dict(), model.state_dict()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    floating = [name for name, value in new.items() if value.is_floating_point() and name not in frozen]
    targets, sources = [old[name] for name in floating], [new[name] for name in floating]
    torch._foreach_mul_(targets, decay)  # pyright: ignore[reportPrivateUsage]
    torch._foreach_add_(targets, sources, alpha=1.0 - decay)  # pyright: ignore[reportPrivateUsage]
    for name, value in new.items():
        if not value.is_floating_point():
            old[name].copy_(value)
