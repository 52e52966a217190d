"""What a step asks of a GPU besides memory: kernels, FLOPs and bytes by operator, for the timing model."""
# pyright: reportPrivateUsage=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
# These read from (or write to) their first argument only as much as they return (or are given).
_SPARSE = {aten.index, aten.index_select, aten.gather, aten.embedding, aten.take, aten.index_put_, aten.scatter_}
# pytorch native/cuda/MultiTensorApply.cuh: chunks of 65536 elements, 320 of them a launch.
_CHUNK, _CHUNKS_PER_LAUNCH = 1 << 16, 320


@dataclass(frozen=True, kw_only=True)
class OpCount:
    """All calls of one operator in one phase of a step, with one data type."""

    op: str
    """E.g. "aten.convolution", "aten.convolution.grouped"."""
    phase: str
    """"inputs", "forward", "backward", "update" or "optimizer"."""
    dtype: str
    """Of its first floating point tensor (else of its first tensor), e.g. "bfloat16"."""
    count: int
    """Kernels launched."""
    flops: float
    """By the formulas of torch.utils.flop_counter; 0 for an operator without one."""
    bytes: float
    """Read and written, if every operand passes the memory bus once."""


class Counter:
    """Sums up operators."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str, str], list[float]] = {}

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
        if packet in _NO_KERNEL or (not outputs and not op._schema.is_mutable) or _is_view(op):
            return
        floating = next((t for t in (*inputs, *outputs) if t.is_floating_point()), (*inputs, *outputs)[0])
        name = str(packet)
        if packet in (aten.convolution, aten.convolution_backward) and args[-1 if len(args) == 9 else -2] != 1:
            name += ".grouped"
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        launches = 1
        if packet.__name__.startswith(("_foreach", "_fused", "_amp_foreach")):
            first = max((x for x in args if isinstance(x, (list, tuple))), key=len)
            chunks = sum(-(-t.numel() // _CHUNK) for t in first if isinstance(t, Tensor))
            launches = max(1, -(-chunks // _CHUNKS_PER_LAUNCH))
        sums = self._sums.setdefault((name, phase, str(floating.dtype).removeprefix("torch.")), [0, 0, 0])
        for index, value in enumerate((launches, flops, _traffic(packet, inputs, outputs))):
            sums[index] += value

    def counts(self) -> tuple[OpCount, ...]:
        """The sums, largest traffic first."""
        rows = [
            OpCount(op=op, phase=phase, dtype=dtype, count=int(count), flops=flops, bytes=traffic)
            for (op, phase, dtype), (count, flops, traffic) in self._sums.items()
        ]
        return tuple(sorted(rows, key=lambda row: -row.bytes))


def _is_view(op: OpOverload) -> bool:
    returns = [result.alias_info for result in op._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)


def _traffic(packet: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    sizes = [min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in (*inputs, *outputs)]
    if packet in _SPARSE and inputs:
        moved = [size for t, size in zip((*inputs, *outputs), sizes, strict=True) if t is not inputs[0]]
        return sum(moved) + max(moved, default=0)
    return sum(sizes)
