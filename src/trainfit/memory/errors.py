"""How far a prediction may be off, by the kind of work that a step is made of. The figures are not computed from the rows of
`benchmarks/public`, whose errors had been seen when the rule was chosen.

Source: 160 peaks of timm models on an A100 40 GB (nvidia-smi, an older torch; not published with this project): the
median error is 1.3 % for transformers, 1.7 % for mobile CNNs, 2.1 % for hybrids and 5.0 % for dense CNNs; over all of them
the 90th percentile, 8.6 %, is 3.9 times the median, 2.2 %. The interval of a class is 3.9 times its median to both sides.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainfit.timing.counts import MATMULS, OpCount

SPREAD = 8.6 / 2.2
"""90th percentile over median of the source's errors."""
NEEDS_ERROR = 0.03
"""Relative error, to both sides, of the smallest capacity that a replay survives; a plan keeps this share of it free. Chosen with
xMem's capped reruns in sight."""
ALLOCATED_ERROR = 0.01
"""Relative error of the peak of tensors; a trace agrees with a run on the CPU to 0.1 MiB, and an operator's own temporaries
are bounds."""


@dataclass(frozen=True, kw_only=True)
class ErrorClass:
    """Models whose errors are alike."""

    name: str
    median: float
    """Median of the source's relative errors of reserved memory."""

    @property
    def spread(self) -> float:
        """Half of the interval, as a share of the prediction."""
        return SPREAD * self.median

    @property
    def source(self) -> str:
        """The source in words, for reports."""
        return f"{self.name}: {self.spread:.1%}, {SPREAD:.1f} times the median error of such models on an A100"


MATRIX_PRODUCTS = ErrorClass(name="matrix products", median=0.013)
DEPTHWISE = ErrorClass(name="depthwise convolutions", median=0.017)
HYBRID = ErrorClass(name="matrix products and convolutions", median=0.021)
DENSE = ErrorClass(name="dense convolutions", median=0.05)
MOSTLY = 0.75
"""Share of the FLOPs from which one kind of work gives a step its class."""


def class_of(ops: Sequence[OpCount]) -> ErrorClass:
    """The class of a step by what its operators compute."""
    products = sum(row.flops for row in ops if row.op in MATMULS or "attention" in row.op)
    convolutions = sum(row.flops for row in ops if row.op.startswith("aten.convolution"))
    if products >= MOSTLY * (products + convolutions):
        return MATRIX_PRODUCTS
    if any(row.op.startswith("aten.convolution") and row.op.endswith(".grouped1") for row in ops):
        return DEPTHWISE
    return DENSE if convolutions >= MOSTLY * (products + convolutions) else HYBRID
