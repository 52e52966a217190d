"""Counts the kernels, FLOPs and bytes of a step by operator, for the timing model."""
# pyright: reportPrivateUsage=false

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from trainfit.timing.counts import FROM_HOST, TO_HOST, OpCount

aten = torch.ops.aten
_NO_KERNEL = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten.as_strided_,
}
# These read from (or write to) their first argument only as much as they return (or are given).
_SPARSE = {aten.index, aten.index_select, aten.gather, aten.embedding, aten.take, aten.index_put_, aten.scatter_}
# pytorch native/cuda/MultiTensorApply.cuh: chunks of 65536 elements, 320 chunks per launch.
_CHUNK_ELEMENTS = 1 << 16
_CHUNKS_PER_LAUNCH = 320


class Counter:
    """Adds up the calls of each operator. Calls that differ in FLOPs per byte by more than a factor of two have separate
    rows, so that what bounds a row (arithmetic or memory) is what bounds each of its calls.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str, int], list[float]] = {}

    def add(
        self,
        op: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Any,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        phase: str,
    ) -> None:
        """Count one call of `op`, whose tensors on the device are `inputs` and `outputs`."""
        packet = op.overloadpacket
        to_host = packet is aten._to_copy and not outputs
        if packet in _NO_KERNEL or not (outputs or to_host or op._schema.is_mutable) or _is_view(op):
            return
        floating = next((t for t in (*inputs, *outputs) if t.is_floating_point()), (*inputs, *outputs)[0])
        pinned = _pinned(packet, args, inputs)
        name = str(packet) + (".to_host" if to_host else pinned or _grouping(packet, args))
        flops = _flops(packet, args, kwargs, out)
        launches = 1
        if packet.__name__.startswith(("_foreach", "_fused", "_amp_foreach")):
            first = max((x for x in args if isinstance(x, (list, tuple))), key=len)
            chunks = sum(-(-t.numel() // _CHUNK_ELEMENTS) for t in first if isinstance(t, Tensor))
            launches = max(1, -(-chunks // _CHUNKS_PER_LAUNCH))
        traffic = _traffic(packet, inputs, () if pinned else outputs)
        intensity = math.frexp(flops / traffic)[1] if traffic else 0
        key = (name, phase, str(floating.dtype).removeprefix("torch."), intensity)
        sums = self._sums.setdefault(key, [0, 0, 0])
        for index, value in enumerate((launches, flops, traffic)):
            sums[index] += value

    def counts(self) -> tuple[OpCount, ...]:
        """The sums, largest traffic first."""
        rows = [
            OpCount(op=op, phase=phase, dtype=dtype, count=int(count), flops=flops, bytes=traffic)
            for (op, phase, dtype, _), (count, flops, traffic) in self._sums.items()
        ]
        return tuple(sorted(rows, key=lambda row: -row.bytes))


def _grouping(packet: Any, args: Sequence[Any]) -> str:
    """The input channels of a convolution's groups, if it has groups: kernels for some widths are far slower."""
    if packet not in (aten.convolution, aten.convolution_backward) or args[-1 if len(args) == 9 else -2] == 1:
        return ""
    weight = args[1 if packet is aten.convolution else 2]
    return f".grouped{weight.shape[1]}"


def _pinned(packet: Any, args: Sequence[Any], inputs: Sequence[Tensor]) -> str:
    """Which way a copy between the device and host memory goes, if the call is one; `inputs` are the tensors on the device."""
    if packet is not aten.copy_:
        return ""
    target, source = (any(tensor is each for each in inputs) for tensor in args[:2])
    if target == source:
        return ""
    return FROM_HOST if target else TO_HOST


def _flops(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> float:
    if packet is aten.convolution_backward:
        # Each of the two gradients takes as many as forward; torch's formula (2.15) gives the weight's `groups` times that.
        gradient, images, weight = args[:3]
        transposed = args[7]
        output_mask = args[-1]
        pixels = images.numel() // images.shape[1] if transposed else gradient.numel() // gradient.shape[1]
        return 2 * pixels * weight.numel() * sum(output_mask[:2])
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def _is_view(op: OpOverload) -> bool:
    returns = [result.alias_info for result in op._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def _traffic(packet: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    sizes = [min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*inputs, *outputs)]
    if packet in _SPARSE and inputs:
        moved = [size for t, size in zip((*inputs, *outputs), sizes, strict=True) if t is not inputs[0]]
        return sum(moved) + max(moved, default=0)
    return sum(sizes)
