"""Names of choices that every room knows. Imports nothing."""

from typing import Literal

Precision = Literal["auto", "fp32", "fp16", "bf16"]
"""auto: bf16 on CUDA capability 8.0 and later, fp16 on older GPUs, fp32 on the CPU."""
MATMUL_PRECISION: Literal["highest", "high"] = "high"
"""`torch.set_float32_matmul_precision` on CUDA: "high" lets float32 matrix products run as TF32 where the GPU has it
(capability 8.0 and above), as upstream trains. Convolutions do so by torch's default."""
Checkpointing = int | Literal["none", "all", "offload"]
"""Blocks of the model, from the first, whose forward is recomputed in backward; offload: all of them, and what is still
kept for backward is in host memory (`step.offload`)."""
Optimizer = Literal[
    "adamw-fused", "adamw-host", "adamw-foreach", "adamw-8bit", "sgd", "sgd-plain", "adam", "adagrad", "rmsprop"
]
"""adamw-host is adamw-fused with its moments in host memory (`step.host_adamw`): the same values, less memory, more time;
adamw-8bit is bitsandbytes' (extra `8bit`); sgd has momentum 0.9, sgd-plain none. The others are torch's at their defaults."""
UNIT_BYTES = 8 * 2**20
"""Parameters that an optimizer updates together where it does so part by part (`step.units`). It bounds copies of them, with
gradients and state for AdamW four times this. A larger parameter is a part of its own."""
