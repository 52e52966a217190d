"""Optimizers whose state is there before the first step, so that this step is not the first to need the memory."""

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
        return make_sgd(groups)
    if kind == "adamw-8bit":
        return make_adamw_8bit(groups)
    return make_adamw(groups, fused=kind == "adamw-fused")


def make_adamw(groups: list[dict[str, Any]], *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW, fused or foreach.

    The state is what torch 2.15 optim/adamw.py `_init_group` makes: the step count of the foreach form is on the CPU.
    """
    optimizer = torch.optim.AdamW(groups, fused=True) if fused else torch.optim.AdamW(groups, foreach=True)
    count_dtype = torch.float32 if fused else torch.get_default_dtype()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=count_dtype, device=parameter.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
    return optimizer


def make_sgd(groups: list[dict[str, Any]]) -> torch.optim.SGD:
    """Fused SGD with momentum 0.9. A buffer of zeros is what the first step would make: 0.9 x 0 + gradient."""
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter] = {"momentum_buffer": buffer}
    return optimizer


def make_adamw_8bit(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW with 8-bit state, from bitsandbytes.

    Raises:
        TrainfitError: bitsandbytes is missing.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainfitError("--optimizer adamw-8bit needs bitsandbytes: pip install 'trainfit[8bit]'") from error
    optimizer = AdamW8bit(groups)
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, group_index, index)
    return optimizer
