"""RF-DETR's step on a fixed window."""

from functools import partial

import torch

from trainfit.models.fixed_step import FixedEvaluation, FixedStep, fixed_evaluation, fixed_step
from trainfit.models.images import crowded_sample
from trainfit.models.rfdetr.workload import RfDetr, RfDetrKnobs
from trainfit.models.setting import Setting
from trainfit.models.workload import OptimizerSettings


def build_step(setting: Setting, device: torch.device) -> FixedStep:
    """Training on the largest size with the fullest images."""
    return _step(_workload(setting), setting, device)


def build_eval_step(setting: Setting, device: torch.device) -> FixedEvaluation:
    """Detection at the model's resolution."""
    workload = _workload(setting)
    side = workload.resolution
    sample = crowded_sample(side, side, objects=1, classes=setting.classes, masks=False)
    return fixed_evaluation(setting, _step(workload, setting, device), workload.detect, sample)


def _workload(setting: Setting) -> RfDetr:
    knobs = RfDetrKnobs(
        resolution=setting.resolution,
        num_queries=setting.num_queries,
        groups=setting.groups,
        checkpointing=setting.checkpointing,
        stage=setting.stage,
    )
    return RfDetr(setting.model, tuple(f"class {n}" for n in range(setting.classes)), knobs)


def _step(workload: RfDetr, setting: Setting, device: torch.device) -> FixedStep:
    side = max(workload.sizes(multi_scale=setting.multi_scale))
    sample = crowded_sample(
        side, side, objects=setting.objects_per_image, classes=setting.classes, masks=workload.masks
    )
    return fixed_step(
        setting,
        device,
        model=workload.build(),
        objective=workload.objective,
        window=[sample] * (setting.micro_batch * setting.accumulation),
        ema=True,
        groups=partial(workload.parameter_groups, settings=OptimizerSettings()),
    )
