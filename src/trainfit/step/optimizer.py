"""AdamW whose state is there before the first step."""

from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.step.names import Optimizer


def make_optimizer(kind: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of parameter groups that each have an "lr".

    Raises:
        TrainfitError: bitsandbytes is missing.
    """
    if kind == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, foreach=True)
    if kind == "adamw-8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise TrainfitError("--optimizer adamw-8bit needs bitsandbytes: pip install 'trainfit[8bit]'") from error
        return AdamW8bit(groups)
    if kind == "adamw-foreach":
        return torch.optim.AdamW(groups, foreach=True)
    return make_adamw(groups)


def make_adamw(groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Fused AdamW with its state allocated now, so that the first `step` is not the first to need that memory.

    The state is what torch 2.15 optim/adamw.py `_init_group` makes for `fused=True`.
    """
    optimizer = torch.optim.AdamW(groups, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer
