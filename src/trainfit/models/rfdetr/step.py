"""RF-DETR's step on a fixed window."""

from functools import partial

import torch
from rfdetr.models import _assignment  # pyright: ignore[reportPrivateUsage]
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensor

from trainfit.models.fixed_step import FixedStep, fixed_evaluation, fixed_step
from trainfit.models.images import crowded_sample
from trainfit.models.rfdetr.family import RfDetrSetting
from trainfit.models.rfdetr.matching import solves_on_device
from trainfit.models.rfdetr.workload import RfDetr, make_workload
from trainfit.models.workload import OptimizerSettings


def build_step(setting: RfDetrSetting, device: torch.device) -> FixedStep:
    """Training on the largest size with the fullest images."""
    return _step(_workload(setting), setting, device)


def build_eval_step(setting: RfDetrSetting, device: torch.device) -> FixedStep:
    """Detection at the model's resolution."""
    workload = _workload(setting)
    side = workload.resolution
    sample = crowded_sample(side, side, objects=1, classes=setting.classes, masks=False)
    return fixed_evaluation(setting, _step(workload, setting, device), workload.detect, sample)


def _workload(setting: RfDetrSetting) -> RfDetr:
    return make_workload(setting.model, tuple(f"class {n}" for n in range(setting.classes)), setting.to_json())


def _step(workload: RfDetr, setting: RfDetrSetting, device: torch.device) -> FixedStep:
    side = max(workload.sizes())
    sample = crowded_sample(
        side, side, objects=setting.objects_per_image, classes=setting.classes, masks=workload.masks
    )
    step = fixed_step(
        setting,
        device,
        model=workload.build(),
        objective=workload.objective,
        window=[sample] * (setting.micro_batch * setting.accumulation),
        groups=partial(workload.parameter_groups, settings=OptimizerSettings()),
        blocks=workload.blocks,
    )
    if isinstance(next(step.model.parameters()), FakeTensor):
        on_device = solves_on_device(torch.cuda.get_device_capability())
        _assignment._solve_to_indices = _solve_on_device if on_device else _solve_on_host  # pyright: ignore[reportPrivateUsage]
    return step


def _solve_on_device(costs: torch.Tensor, matches: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def _solve_on_host(costs: torch.Tensor, _matches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve with SciPy, as upstream does where its Triton kernel does not run: row and column of every match.

    `costs` is (problems, queries, targets) with fewer targets than queries; both results are (problems, targets).
    """
    solved = [linear_sum_assignment(cost) for cost in costs.cpu().numpy()]
    rows, columns = (torch.stack([torch.as_tensor(pair[side]) for pair in solved]) for side in (0, 1))
    return rows, columns
