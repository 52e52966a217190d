"""What a trace of CLIP leaves out."""

from typing import Any

import torch


def prepare(_capability: tuple[int, int]) -> None:
    """Leave the parameters of models that this process builds as the memory is: a trace does not depend on their values, and
    drawing 150 million takes as long as tracing a window.
    """
    tensor: Any = torch.Tensor
    tensor.normal_ = _unchanged
    tensor.uniform_ = _unchanged


def _unchanged(tensor: torch.Tensor, *_args: object, **_options: object) -> torch.Tensor:
    return tensor
