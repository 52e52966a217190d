"""What stands in for parts of RF-DETR that a trace cannot run."""

from typing import Any

import torch
from rfdetr.models import _assignment  # pyright: ignore[reportPrivateUsage]
from rfdetr.models.transformer import Transformer
from scipy.optimize import linear_sum_assignment
from torch.nn.modules import module

from trainfit.models.rfdetr.matching import solves_on_device


def prepare(capability: tuple[int, int]) -> None:
    """Replace upstream's matching kernel in this process, which traces for a card of this capability."""
    solve = solve_on_device if solves_on_device(capability) else solve_on_host
    _assignment._solve_to_indices = solve  # pyright: ignore[reportPrivateUsage]
    upstream: Any = Transformer
    upstream._two_stage_batching_eligible = _as_without_hooks


HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks")
"""Where torch keeps hooks for the modules of the process, as the recorder of a trace has them."""
_two_stage_batching_eligible = Transformer._two_stage_batching_eligible  # pyright: ignore[reportPrivateUsage]


def _as_without_hooks(transformer: Any) -> bool:
    """Whether all query groups' proposals are made at once: upstream does it one by one while modules are watched."""
    hooks = {name: getattr(module, name) for name in HOOKS}
    for name in HOOKS:
        setattr(module, name, {})
    try:
        return _two_stage_batching_eligible(transformer)
    finally:
        for name, registered in hooks.items():
            setattr(module, name, registered)


def solve_on_device(costs: torch.Tensor, matches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for upstream's Triton kernel, which a trace cannot run: the costs stay on the device.

    `costs` is (problems, queries, targets); row and column of every match, both (problems, matches) on the host, are any
    assignment: a trace does not know the costs. The kernel takes targets by queries, contiguous
    (torch_linear_assignment 0.1.0, `_triton.batch_linear_assignment`).
    """
    _, queries, targets = costs.shape
    if targets < queries:
        costs = costs.transpose(1, 2).contiguous()
    index = torch.arange(matches).repeat(costs.shape[0], 1)
    return index, index.clone()


def solve_on_host(costs: torch.Tensor, _matches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve with SciPy, as upstream does where its Triton kernel does not run: row and column of every match.

    `costs` is (problems, queries, targets) with fewer targets than queries; both results are (problems, targets).
    """
    solved = [linear_sum_assignment(cost) for cost in costs.cpu().numpy()]
    rows, columns = (torch.stack([torch.as_tensor(pair[side]) for pair in solved]) for side in (0, 1))
    return rows, columns
