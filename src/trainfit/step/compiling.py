"""Regional compilation: each of the model's repeated blocks by torch.compile, the rest of the step as it is."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from trainfit.errors import TrainfitError


class _Compiled:
    """Marks the classes that `_compiled` makes."""


@cache
def _compiled(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks of a kind whose forward is compiled, once for all of them.

    A class, so that copies (EMA) run their own weights and activation checkpointing goes around it: what recompute does to
    random numbers and autocast is not for the compiler to trace.
    """
    run: Any = torch.compile(kind.forward)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    return type(f"Compiled{kind.__name__}", (kind, _Compiled), {"forward": forward})


def compile_blocks(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Compile blocks in place, before activation checkpointing is switched on; names of weights stay.

    Numbers are those of the eager blocks within the rounding of their precision, because operations are fused.

    Raises:
        TrainfitError: there are no blocks, or torch.compile does not work on this machine.
    """
    if not blocks:
        raise TrainfitError("--compile: this model has no repeated blocks to compile; leave it out")
    require_compiler(device)
    for block in blocks:
        block.__class__ = _compiled(type(block))


def require_compiler(device: torch.device) -> None:
    """Compile and run a function of one operation.

    Raises:
        TrainfitError: torch.compile does not work here: on the CPU it needs a C++ compiler, on a GPU Triton.
    """

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    try:
        torch.compile(double)(torch.ones(2, device=device))
    except Exception as error:  # of Dynamo, Inductor, Triton and the compiler's process
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise TrainfitError(f"--compile: torch.compile does not work here ({reason:.200}); leave it out") from error
