"""Build a model on the CPU, and move it to a CUDA device that does not exist.

Inside `FakeCuda`, everything made on or moved to `cuda` becomes a fake tensor, and everything else stays real: the
code that builds a model, its optimizer and its EMA copy for training builds them for a trace. As in a real run, a
plain tensor attribute that `Module.to` does not move stays on the CPU.
"""
# pyright: reportPrivateUsage=false

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from trainfit.tracing.fake_cuda import replace
from trainfit.tracing.shadow import drop_value


class FakeCuda(TorchFunctionMode):
    """While a step is built: calls that touch `cuda` run in `fake` (fake tensor mode and recorder), others do not."""

    def __init__(self, *fake: AbstractContextManager[Any]) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func`, under the fake modes if it touches CUDA."""
        kwargs = kwargs or {}
        if func is not Tensor.cuda and not any(_on_cuda(x) for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        outer, inner = self._fake
        with outer, inner:
            return func(*args, **kwargs)


def _on_cuda(x: object) -> bool:
    if isinstance(x, str):
        return x.startswith("cuda")
    return isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type == "cuda")


def patch_modules() -> None:
    """Let `Module.to`, `.half`, ... replace tensors by fake ones, and fake tensors be deep-copied. Global.

    torch itself swaps fake parameters in place, which fails once anything refers to them weakly, and unties tied ones.
    """
    moved = WeakTensorKeyDictionary()

    def move(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
        if tensor in moved:
            return moved[tensor]
        with torch.no_grad():
            new = fn(tensor)
        if new is tensor:
            return tensor
        if isinstance(tensor, nn.Parameter):
            drop_value(new)
            new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        moved[tensor] = new
        return new

    def apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in module.children() if recurse else ():
            child._apply(fn)
        stores: list[Any] = [module._parameters, module._buffers]
        for tensors in stores:
            tensors.update({name: move(tensor, fn) for name, tensor in tensors.items() if tensor is not None})
        return module

    def deepcopy(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) not in memo:
            with torch.no_grad():
                new = tensor.detach().clone(memory_format=torch.preserve_format)
            is_parameter = isinstance(tensor, nn.Parameter)
            new = nn.Parameter(new, tensor.requires_grad) if is_parameter else new.requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = new
        return memo[id(tensor)]

    replace(nn.Module, _apply=apply)
    replace(FakeTensor, __deepcopy__=deepcopy)
