"""AdamW whose state is there before the first step."""

from typing import Any

import torch


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
