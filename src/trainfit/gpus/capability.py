"""Rules that depend on the CUDA compute capability: number formats and kernels, each with its source. Imports no torch."""

from typing import Literal

Capability = tuple[int, int]
"""CUDA compute capability, for instance (8, 6)."""

CUDNN_ATTENTION: tuple[Capability, ...] = ((9, 0), (10, 0))
"""torch tries cuDNN's attention first only on these (pytorch `transformers/cuda/sdp_utils.cpp`, `priority_order`)."""
SMALL_SHARED_MEMORY: tuple[Capability, ...] = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Flash attention's backward does not support large heads on these (`sdp_utils.cpp`, `check_flash_attention_head_dim`)."""


def has_bf16(capability: Capability | None) -> bool:
    """Whether the card computes in bfloat16 without emulation: from 8.0 on, and if the capability is unknown."""
    return capability is None or capability >= (8, 0)


def has_flash_attention(capability: Capability | None) -> bool:
    """Whether torch's flash attention runs: from 8.0 on (`sdp_utils.cpp`, `check_sm_version`)."""
    return capability is not None and capability >= (8, 0)


def auto_precision(capability: Capability | None) -> Literal["fp16", "bf16"]:
    """The precision that `auto` means on a GPU."""
    return "bf16" if has_bf16(capability) else "fp16"


def attention_alignment(capability: Capability, *, half: bool) -> int:
    """The divisor that memory-efficient attention requires of a head's size (`sdp_utils.cpp`, `minimum_gemm_alignment`)."""
    if capability >= (8, 0):
        return 8 if half else 4
    return 8 if half and capability >= (7, 0) else 1


def kernel_class(capability: Capability | None) -> Capability:
    """A representative of all compute capabilities with the same choice of kernels (`fake_cuda.attention_kernel`).

    None (AMD, or a card whose memory alone is known) counts as 8.0.
    """
    if capability is None:
        return (8, 0)
    if capability in CUDNN_ATTENTION:
        return capability
    if capability in SMALL_SHARED_MEMORY:
        return (8, 6)
    if capability >= (8, 0):
        return (8, 0)
    return (7, 5) if capability >= (7, 0) else (6, 1)
