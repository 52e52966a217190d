"""Names that settings are written in; imports nothing, so that the command line starts without torch."""

from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp16"]
"""auto: bf16 on CUDA capability 8.0 and later, fp16 on older GPUs, fp32 on the CPU."""
