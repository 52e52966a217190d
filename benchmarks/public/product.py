"""Steps that trainfit itself trains with, for rows of the models that it has."""

import importlib
from typing import Any

import torch

from trainfit.models.build import build_step
from trainfit.models.setting import make_setting


def build(device: torch.device, model: str, **knobs: Any) -> Any:
    """The training step of a setting, as `tracing.worker` prepares and builds it; see `models.setting`."""
    setting = make_setting(model, **knobs)
    if setting.family.prepare_trace is not None:
        module, _, function = setting.family.prepare_trace.partition(":")
        getattr(importlib.import_module(module), function)(torch.cuda.get_device_capability())
    return build_step(setting=setting.to_json(), device=device)
