"""How far a prediction may be off, to each side, by what is known of a step before it runs. The figures are not computed from the
rows of `benchmarks/public`, whose errors had been seen when the rule was chosen.

Two causes are told apart.

- *Which cached block serves which request* moves what is reserved to both sides, in every step.
- *Workspaces of cuDNN* only add, where convolutions run that may ask for them: dense ones, and all that compute in float32, where
  Winograd, Fourier transforms and copies into another layout need room (a depthwise convolution itself does not, but the 1 x 1
  convolutions beside it do). Nobody publishes which algorithm cuDNN takes.

Source: 160 peaks of timm models on an A100 40 GB (nvidia-smi, an older torch; not published with this project): the
median error is 1.3 % for transformers, 1.7 % for mobile CNNs, 2.1 % for hybrids and 5.0 % for dense CNNs; over all of them
the 90th percentile, 8.6 %, is 3.9 times the median, 2.2 %.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainfit.timing.counts import MATMULS, OpCount

NORMAL = 1.960 / 0.674
"""95th percentile over median of the sizes of normally distributed errors: for steps without workspaces."""
SPREAD = 8.6 / 2.2
"""90th percentile over median of the source's errors, among which workspaces make a long tail: for steps with them."""
NEEDS_ERROR = 0.03
"""Relative error, to both sides, of the smallest capacity that a replay survives; a plan keeps this share of it free. Chosen with
xMem's capped reruns in sight."""
RESIZED_ERROR = 0.02
"""Further error of it where a stored trace is moved to another size of the image (code that works in pieces makes more or fewer
of them there) or from bf16 to fp16. Of 203 needs of such traces, against traces of their own, the lowest was 5.4 % too low, the
highest 7.2 % too high."""
ALLOCATED_ERROR = 0.01
"""Relative error of the peak of tensors; a trace agrees with a run on the CPU to 0.1 MiB, and an operator's own temporaries
are bounds."""
MOSTLY = 0.75
"""Share of the FLOPs from which one kind of work gives a step its class."""
DENSE_MEDIAN = 0.05
"""Median of the source's errors of dense CNNs."""


@dataclass(frozen=True, kw_only=True)
class ErrorClass:
    """Steps whose errors have the same causes."""

    name: str
    """Name of the class, as tables show it."""
    too_high: float
    """Predicted over measured less 1, at most."""
    too_low: float
    """1 less predicted over measured, at most."""

    @property
    def below(self) -> float:
        """Share of the prediction that the measurement may lie below it."""
        return self.too_high / (1 + self.too_high)

    @property
    def above(self) -> float:
        """Share of the prediction that the measurement may lie above it."""
        return self.too_low / (1 - self.too_low)

    @property
    def source(self) -> str:
        """The bounds and their source in words, for reports."""
        return f"{self.name}: -{self.below:.1%} to +{self.above:.1%}, from the errors of such models on an A100"


def _without_workspaces(name: str, median: float) -> ErrorClass:
    return ErrorClass(name=name, too_high=NORMAL * median, too_low=NORMAL * median)


def _with_workspaces(name: str, median: float) -> ErrorClass:
    return ErrorClass(name=name, too_high=SPREAD * median, too_low=SPREAD * DENSE_MEDIAN)


MATRIX_PRODUCTS = _without_workspaces("matrix products", 0.013)
DEPTHWISE = _without_workspaces("depthwise convolutions", 0.017)
HYBRID = _without_workspaces("matrix products and convolutions", 0.021)
DENSE = _with_workspaces("dense convolutions", DENSE_MEDIAN)
FLOAT32_DEPTHWISE = _with_workspaces("depthwise convolutions in float32", 0.017)
FLOAT32_HYBRID = _with_workspaces("matrix products and convolutions in float32", 0.021)


def class_of(ops: Sequence[OpCount]) -> ErrorClass:
    """The class of a step by what its operators compute."""
    convolutions = [row for row in ops if row.op.startswith("aten.convolution")]
    products = sum(row.flops for row in ops if row.op in MATMULS or "attention" in row.op)
    convolved = sum(row.flops for row in convolutions)
    if products >= MOSTLY * (products + convolved):
        return MATRIX_PRODUCTS
    in_float32 = any(row.dtype == "float32" for row in convolutions)
    if any(row.op.endswith(".grouped1") for row in convolutions):
        return FLOAT32_DEPTHWISE if in_float32 else DEPTHWISE
    if convolved >= MOSTLY * (products + convolved):
        return DENSE
    return FLOAT32_HYBRID if in_float32 else HYBRID
