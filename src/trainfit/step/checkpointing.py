"""Activation checkpointing by blocks, switched on and off in place."""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainfit.errors import TrainfitError
from trainfit.step.names import Checkpointing


class _Again:
    """Marks the classes that `_checkpointed` makes."""


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of blocks of a kind that are recomputed in backward. A class, so that copies (EMA) run their own weights."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = partial(kind.forward, self)
        if self.training and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return run(*args, **kwargs)

    return type(f"Checkpointed{kind.__name__}", (kind, _Again), {"forward": forward})


def checkpoint_first(blocks: Sequence[nn.Module], wanted: Checkpointing) -> None:
    """Recompute the first `wanted` of the blocks in backward, and only those; works at any time between windows.

    The first ones, because theirs is the last backward: what it needs again comes when the others' is gone. Running
    statistics of a BatchNorm within a block move twice a micro-batch. Raises TrainfitError where there are no blocks.
    """
    if wanted not in ("none", "offload", 0) and not blocks:
        raise TrainfitError("--checkpointing: this model has no repeated blocks to recompute; leave it out")
    count = {"none": 0}.get(wanted, len(blocks)) if isinstance(wanted, str) else wanted
    for index, block in enumerate(blocks):
        if (index < count) != isinstance(block, _Again):
            block.__class__ = _checkpointed(type(block)) if index < count else type(block).__mro__[1]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Blocks as most models are built: what stands in a row of modules of one class, outermost first, and trains."""
    return [block for block in _repeated(model) if any(p.requires_grad for p in block.parameters())]


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        parts = list(child.children())
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(parts) > 1 and len({type(p) for p in parts}) == 1:
            yield from parts
        else:
            yield from _repeated(child)
