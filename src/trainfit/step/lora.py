"""Low-rank adapters (LoRA, arXiv 2106.09685) of linear layers, added in place so that all names of weights stay.

Of peft's the names change with the wrapped module, and the layers that recompute, freeze, load and export by name would have to
know of it; what is needed of it here is these few lines. DoRA is not among them.
"""

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

DOWN, UP = "lora_down", "lora_up"
"""Parameters of an adapted layer: (rank, inputs), and (outputs, rank), which begins as zeros."""


class _Adapted:
    """Marks the classes that `_adapted` makes."""


@cache
def _adapted(kind: type[nn.Linear]) -> type[nn.Linear]:
    """The class of linear layers of a kind with an adapter. A class, so that copies (EMA) run their own weights."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        low = functional.linear(x, self.lora_down)
        return kind.forward(self, x) + functional.linear(low, self.lora_up)

    return type(f"Adapted{kind.__name__}", (kind, _Adapted), {"forward": forward})


def adapt(layers: Iterable[nn.Linear], rank: int) -> None:
    """Add an adapter to each layer and leave the layer's own weights as they are; its output does not change yet.

    The product of the adapter is added as it is: a scale of 1, as peft's with `lora_alpha` equal to the rank.
    """
    for layer in layers:
        layer.requires_grad_(False)
        down = torch.empty((rank, layer.in_features), dtype=layer.weight.dtype)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        layer.register_parameter(DOWN, nn.Parameter(down))
        layer.register_parameter(UP, nn.Parameter(torch.zeros((layer.out_features, rank), dtype=layer.weight.dtype)))
        layer.__class__ = _adapted(type(layer))


def has_adapters(model: nn.Module) -> bool:
    """Whether a layer of the model was adapted."""
    return any(isinstance(module, _Adapted) for module in model.modules())


def is_adapter(name: str) -> bool:
    """Whether a weight belongs to an adapter, by its name."""
    return name.rpartition(".")[2] in (DOWN, UP)


def merged(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with each adapter added to its layer's: what a model without adapters loads for the same outputs."""
    whole = {name: value for name, value in weights.items() if not is_adapter(name)}
    for name, up in weights.items():
        if is_adapter(name) and name.endswith(UP):
            layer = name.removesuffix(UP)
            whole[f"{layer}weight"] = whole[f"{layer}weight"] + up @ weights[f"{layer}{DOWN}"]
    return whole
