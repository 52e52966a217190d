"""Activation checkpointing of a model's blocks, turned on and off in place."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainfit.errors import TrainfitError
from trainfit.step.names import Checkpointing

_several_times: WeakSet[nn.Module] = WeakSet()


class _Recomputed:
    """Base class that marks the classes made by `_checkpointed`."""


def is_recomputed(block: nn.Module) -> bool:
    """Whether `checkpoint_first` switched it on for a block."""
    return isinstance(block, _Recomputed)


def runs_several_times(block: nn.Module) -> None:
    """Say that a block runs several times in one forward.

    Under autocast its parameters' gradients are then summed in half precision, as they are where nothing is recomputed.
    """
    _several_times.add(block)


def _with_own_casts(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a block, with which autocast's half-precision copies of its parameters end.

    Autocast keeps a copy of each parameter until it is left, at the end of the whole forward, although a block that is
    recomputed makes its own again. Known limit: a parameter that is used twice in one forward gets the float32 sum of its
    gradients.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        was_enabled = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return forward(*args, **kwargs)
        finally:
            torch.set_autocast_cache_enabled(was_enabled)

    return run


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `kind` whose forward is recomputed in backward. A class, so that copies (EMA) run with their own weights."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(kind.forward if self in _several_times else _with_own_casts(kind.forward), self)
        if self.training and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return run(*args, **kwargs)

    return type(f"Checkpointed{kind.__name__}", (kind, _Recomputed), {"forward": forward})


def checkpoint_first(blocks: Sequence[nn.Module], checkpointing: Checkpointing) -> None:
    """Recompute the first blocks in backward, as many as `checkpointing` says; may be called at any time between windows.

    The first blocks are chosen because their backward comes last: the activations of the others are free by then. Running
    statistics of a BatchNorm within a block are updated twice per micro-batch.

    Raises:
        TrainfitError: the model has no repeated blocks.
    """
    if checkpointing not in ("none", "offload", 0) and not blocks:
        raise TrainfitError("--checkpointing: this model has no repeated blocks to recompute; leave it out")
    if checkpointing == "none":
        count = 0
    elif isinstance(checkpointing, str):
        count = len(blocks)
    else:
        count = checkpointing
    for index, block in enumerate(blocks):
        if index < count and not isinstance(block, _Recomputed):
            block.__class__ = _checkpointed(type(block))
        elif index >= count and isinstance(block, _Recomputed):
            block.__class__ = type(block).__mro__[1]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of most models: trainable members of the outermost ModuleLists and Sequentials of one class."""
    return [block for block in _repeated(model) if any(p.requires_grad for p in block.parameters())]


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        parts = list(child.children())
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(parts) > 1 and len({type(p) for p in parts}) == 1:
            yield from parts
        else:
            yield from _repeated(child)
