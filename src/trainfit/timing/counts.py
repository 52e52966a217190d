"""Operator counts: the input of the timing model that a trace records."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

MATMULS = frozenset(
    f"aten.{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "_scaled_mm", "_int_mm")
)
"""Operators that cuBLAS runs."""
TO_HOST = ".to_pinned"
"""Suffix of copies to page-locked host memory."""
FROM_HOST = ".from_pinned"
"""Suffix of copies from page-locked host memory."""


@dataclass(frozen=True, kw_only=True)
class OpCount:
    """All calls of one operator in one phase of a step, with one data type and about the same FLOPs per byte."""

    op: str
    """E.g. "aten.mm"; of a convolution with groups also their input channels: "aten.convolution.grouped1" (depthwise);
    "aten._to_copy.to_host": a copy to the CPU's memory; see also `TO_HOST`."""
    phase: str
    """"inputs", "forward", "backward", "update" or "optimizer"."""
    dtype: str
    """Data type of its first floating point tensor (else of its first tensor), e.g. "bfloat16"."""
    count: int
    """Kernels launched."""
    flops: float
    """By the formulas of torch.utils.flop_counter; 0 for an operator without one."""
    bytes: float
    """Read and written, if every operand passes the memory bus once."""

    def to_row(self) -> tuple[Any, ...]:
        """The values in order, for JSON."""
        return astuple(self)

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> "OpCount":
        """Read what `to_row` returned."""
        op, phase, dtype, count, flops, nbytes = row
        return cls(op=op, phase=phase, dtype=dtype, count=count, flops=flops, bytes=nbytes)
