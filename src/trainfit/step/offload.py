"""Keeps the tensors that forward saves for backward in page-locked host memory instead of on the GPU.

Copies run on the stream of the step, so that memory is free for the next operator as soon as a tensor is copied: copies do
not overlap with computation, and the time is that of the link. PyTorch's own `save_on_cpu` copies a tensor once for each
operator that saved it, including the model's parameters.
"""
# pyright: reportPrivateUsage=false

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from trainfit.step.contrastive import Contrastive, Tower
from trainfit.step.terms import Objective

LEAST_BYTES = 1024
"""Smaller tensors stay on the GPU: copying one takes as long as copying a hundred times as much. A larger limit could lie
between the sizes of one tensor at two micro-batches, and traces of steps that keep different tensors cannot be scaled to each
other (`memory.scaling`)."""


@dataclass(kw_only=True, eq=False)
class _Stored:
    """One storage in host memory."""

    flat: torch.Tensor
    """The whole storage, in one dimension."""
    device: torch.device
    """Device that the storage came from."""


@dataclass(kw_only=True, eq=False)
class _View:
    """Replaces a saved tensor in autograd's graph."""

    stored: _Stored
    """The storage that the tensor is a view of."""
    size: torch.Size
    """Size of the tensor."""
    stride: tuple[int, ...]
    """Its strides, in elements."""
    offset: int
    """Its first element in the storage."""


@dataclass(kw_only=True, eq=False)
class _Host:
    """Pack and unpack hooks (`torch.autograd.graph.saved_tensors_hooks`) of one forward."""

    device: torch.device
    """Device whose tensors are kept in host memory."""
    stays: set[int]
    """Storages that stay on the device: parameters and buffers."""
    copies: dict[tuple[int, torch.dtype, int], tuple[weakref.ref[Any], weakref.ref[_Stored]]] = field(
        default_factory=dict[tuple[int, torch.dtype, int], tuple[weakref.ref[Any], weakref.ref[_Stored]]]
    )
    """(storage, dtype, version) -> the storage and its copy, while both are alive."""
    latest: tuple[_Stored, torch.Tensor] | None = None
    """The tensor copied back last: operators that saved the same tensor often follow one another."""

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _View:
        """Return what autograd keeps instead of a tensor."""
        storage = tensor.untyped_storage()
        on_device = tensor.device == self.device and storage._cdata not in self.stays
        if not on_device or storage.nbytes() < LEAST_BYTES or tensor.layout != torch.strided:
            return tensor
        key = (storage._cdata, tensor.dtype, tensor._version)
        alive, copied = self.copies.get(key, (None, None))
        stored = copied() if copied is not None and alive is not None and alive() is storage else None
        if stored is None:
            stored = self._copy(tensor, storage.nbytes() // tensor.element_size())
            self.copies[key] = (weakref.ref(storage), weakref.ref(stored))
        return _View(stored=stored, size=tensor.shape, stride=tensor.stride(), offset=int(tensor.storage_offset()))

    @torch.no_grad()
    def _copy(self, tensor: torch.Tensor, length: int) -> _Stored:
        flat = tensor.detach().as_strided((length,), (1,), 0)
        host = torch.empty(length, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return _Stored(flat=host.copy_(flat, non_blocking=True), device=tensor.device)

    @torch.no_grad()
    def unpack(self, packed: torch.Tensor | _View) -> torch.Tensor:
        """Restore the tensor on the device."""
        if isinstance(packed, torch.Tensor):
            return packed
        stored = packed.stored
        if self.latest is None or self.latest[0] is not stored:
            self.latest = None  # free it before the next is allocated
            flat = torch.empty(len(stored.flat), dtype=stored.flat.dtype, device=stored.device)
            self.latest = (stored, flat.copy_(stored.flat, non_blocking=True))
        return self.latest[1].as_strided(packed.size, packed.stride, packed.offset)


def offloaded(objective: Objective | Contrastive) -> Objective | Contrastive:
    """The objective with saved tensors in host memory: the same loss values and the same gradient."""
    if isinstance(objective, Objective):
        return replace(objective, terms=_on_host(objective.terms))
    if isinstance(objective.features, Sequence):
        return replace(objective, features=tuple(_tower(tower) for tower in objective.features))
    return replace(objective, features=_on_host(objective.features))


def _tower(tower: Tower) -> Tower:
    with_terms = None if tower.with_terms is None else _on_host(tower.with_terms)
    return replace(tower, features=_on_host(tower.features), with_terms=with_terms)


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` (model, ...) in the hooks."""

    def run(model: torch.nn.Module, *args: Any) -> Any:
        host = _Host(device=next(model.parameters()).device, stays=_storages([*model.parameters(), *model.buffers()]))
        with torch.autograd.graph.saved_tensors_hooks(host.pack, host.unpack):
            return function(model, *args)

    return run


def _storages(tensors: Iterable[torch.Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}
