"""Exponential moving average of the weights."""

import math

import torch


def ema_decay(step: int, *, decay: float, tau: float) -> float:
    """Decay of update `step` (0 for the first): decay x (1 - exp(-(step + 1) / tau)).

    Source: rfdetr 1.11.2 training/model_ema.py `ModelEma._get_decay` (`updates` starts at 1 there).
    """
    return decay * (1 - math.exp(-(step + 1) / tau)) if tau else decay


@torch.no_grad()
def update_ema(averaged: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """averaged = decay x averaged + (1 - decay) x model, in place and without temporaries; buffers that are no floats
    are copied."""
    old, new = list(averaged.state_dict().values()), list(model.state_dict().values())
    floating = [(o, n) for o, n in zip(old, new, strict=True) if o.is_floating_point()]
    targets, sources = [o for o, _ in floating], [n for _, n in floating]
    torch._foreach_mul_(targets, decay)
    torch._foreach_add_(targets, sources, alpha=1.0 - decay)
    for o, n in zip(old, new, strict=True):
        if not o.is_floating_point():
            o.copy_(n)
