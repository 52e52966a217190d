"""Exponential moving average of the weights."""

import copy
import math
from typing import Any

import torch


def ema_decay(step: int, *, decay: float, tau: float) -> float:
    """Decay of update `step` (0 for the first): decay x (1 - exp(-(step + 1) / tau)).

    Source: `ModelEMA` of YOLOv5 (utils/torch_utils.py), where `updates` starts at 1.
    """
    return decay * (1 - math.exp(-(step + 1) / tau)) if tau else decay


def ema_copy(model: torch.nn.Module, *, on_host: bool = False) -> torch.nn.Module:
    """The model with the initial EMA weights, in eval mode. Frozen parameters are shared, not copied: they take no memory.

    With `on_host` the copy, including frozen parameters, is in host memory; every update then copies the model to the host.
    """
    if on_host:
        tensors: dict[int, Any] = {id(p): torch.nn.Parameter(p.detach().cpu().clone()) for p in model.parameters()}
        tensors |= {id(b): b.cpu().clone() for b in model.buffers()}
    else:
        tensors = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, tensors).eval().requires_grad_(False)


@torch.no_grad()
def update_ema(ema: torch.nn.Module, model: torch.nn.Module, decay: float) -> None:
    """Update in place: ema += (1 - decay) x (model - ema); buffers that are not floating point are copied.

    Makes no temporaries, and one operator at the end updates all weights, so that a failure before it changes nothing.
    """
    pairs = list(zip(ema.state_dict().values(), model.state_dict().values(), strict=True))
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)
    floating = [(old, new) for old, new in pairs if old.is_floating_point()]
    targets = [old for old, _ in floating]
    sources = [new.to(old.device) for old, new in floating]
    torch._foreach_lerp_(targets, sources, 1.0 - decay)  # pyright: ignore[reportPrivateUsage]
