"""Steps that trainfit itself trains with, for rows of the models that it has."""

from typing import Any

import torch

from trainfit.models.build import build_step
from trainfit.models.setting import make_setting


def build(device: torch.device, model: str, **knobs: Any) -> Any:
    """The training step of a setting; see `models.setting`."""
    return build_step(setting=make_setting(model, **knobs).to_json(), device=device)
