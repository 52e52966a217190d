"""Optimizers whose state is allocated before the first step, so that training needs no more memory after it."""

from typing import Any, TypeVar

import torch

from trainfit.errors import TrainfitError
from trainfit.step.host_adamw import HostAdamW
from trainfit.step.names import Optimizer

Adam = TypeVar("Adam", torch.optim.Adam, torch.optim.AdamW)


def make_optimizer(kind: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of parameter groups that each have an "lr".

    Raises:
        TrainfitError: bitsandbytes is missing.
    """
    if kind == "sgd":
        return make_sgd(groups)
    if kind == "sgd-plain":
        return torch.optim.SGD(groups, momentum=0.0, fused=True)
    if kind == "adagrad":
        return torch.optim.Adagrad(groups, foreach=True)  # its constructor allocates the state
    if kind == "rmsprop":
        return make_rmsprop(groups)
    if kind == "adamw-host":
        return HostAdamW(groups)
    if kind == "adamw-8bit":
        return make_adamw_8bit(groups)
    if kind == "adam":
        return with_moments(torch.optim.Adam(groups, fused=True), fused=True)
    return make_adamw(groups, fused=kind == "adamw-fused")


def make_adamw(groups: list[dict[str, Any]], *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW, fused or foreach."""
    optimizer = torch.optim.AdamW(groups, fused=True) if fused else torch.optim.AdamW(groups, foreach=True)
    return with_moments(optimizer, fused=fused)


def with_moments(optimizer: Adam, *, fused: bool) -> Adam:
    """Allocate Adam's or AdamW's state as torch 2.15 optim/adam.py `_init_group` does: foreach has its step count on the CPU."""
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
    """Fused SGD with momentum 0.9. With a buffer of zeros the first step gives what it would without: 0.9 x 0 + gradient."""
    optimizer = torch.optim.SGD(groups, momentum=0.9, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter] = {"momentum_buffer": buffer}
    return optimizer


def make_rmsprop(groups: list[dict[str, Any]]) -> torch.optim.RMSprop:
    """RMSprop, not centred and without momentum; the state is that of torch 2.15 optim/rmsprop.py `_init_group`."""
    optimizer = torch.optim.RMSprop(groups, foreach=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.get_default_dtype()),
                "square_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }
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


@torch.no_grad()
def with_state(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Allocate the state of any optimizer as its first step would, without changing its parameters.

    It takes a step with zero gradients at a learning rate of zero and without weight decay, and resets the step counts. A
    first step starts from moments and momentum buffers of zero.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [{key: group[key] for key in ("lr", "weight_decay") if key in group} for group in optimizer.param_groups]
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update(dict.fromkeys(values, 0.0))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update(values)
    for parameter in parameters:
        parameter.grad = None
        count = optimizer.state[parameter].get("step")
        if isinstance(count, torch.Tensor):
            count.zero_()
        elif count is not None:
            optimizer.state[parameter]["step"] = 0
    return optimizer
