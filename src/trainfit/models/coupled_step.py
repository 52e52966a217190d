"""The training step of a coupled window whose last micro-batch is smaller, to be traced (`memory.composed`)."""

from collections.abc import Mapping
from typing import Any

import torch

from trainfit.models import build
from trainfit.models.build import FixedStep


def build_eval_step(*, setting: Mapping[str, Any], device: torch.device, samples: int) -> FixedStep:
    """The evaluation of a setting after a training window of so many samples (`build.build_eval_step`)."""
    return _shortened(build.build_eval_step(setting=setting, device=device), samples)


def build_step(*, setting: Mapping[str, Any], device: torch.device, samples: int) -> FixedStep:
    """The training step of a setting with a window of so many samples (`build.build_step`)."""
    return _shortened(build.build_step(setting=setting, device=device), samples)


def _shortened(step: FixedStep, samples: int) -> FixedStep:
    assert len(step.window) - step.micro_batch < samples <= len(step.window), "the window has another cut"
    step.window = step.window[:samples]
    return step
