"""Memory of CUDA and its libraries on a card, besides that of tensors, with sources."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainfit.gpus.catalogue import MIB, Gpu

JETSON_CAPABILITIES = {(5, 3), (6, 2), (7, 2), (8, 7)}
"""Parts that share their memory with the CPU (NVIDIA, CUDA GPU compute capability, Jetson products)."""


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """A size that is known as an interval."""

    low_bytes: int
    """Smallest value seen."""
    high_bytes: int
    """Largest value seen; the one to plan with."""


def widened(size: ByteRange, share: float) -> ByteRange:
    """The interval with a share more to both sides."""
    return ByteRange(low_bytes=int((1 - share) * size.low_bytes), high_bytes=int((1 + share) * size.high_bytes))


@dataclass(frozen=True, kw_only=True)
class ContextBytes(ByteRange):
    """Memory of the CUDA context of one process, with its source."""

    likely_bytes: int
    """The value used in predicted totals."""
    source: str
    """Card, driver or CUDA version, and where it was published."""


LAZY_LOADING = (11, 7)
"""CUDA version from which kernels are loaded when they are first used (torch's default since 1.13)."""


def _mib(low: int, likely: int, high: int, source: str) -> ContextBytes:
    return ContextBytes(low_bytes=low * MIB, likely_bytes=likely * MIB, high_bytes=high * MIB, source=source)


CONTEXTS: Mapping[tuple[int, int], ContextBytes] = {
    (7, 0): _mib(300, 350, 400, "V100, torch 1.1: 300 to 400 MiB (pytorch issue 20532)"),
    (7, 5): _mib(
        105, 135, 300, "T4, torch 2.11, CUDA 12.8: 105 MiB at first, 131 with cuBLAS, 135 with cuDNN (torch-preflight)"
    ),
    (8, 0): _mib(524, 524, 590, "A100 40 GB, 2025: used less reserved is 524 MiB in 8 of 12 runs, 526 to 590 in 4"),
    (8, 6): _mib(256, 286, 390, "RTX 3090, torch 2.7, CUDA 12.8: 256 MiB bare (InvokeAI issue 9413); RTX 3060: at most 390"),
    (8, 9): _mib(256, 426, 460, "RTX 6000 Ada, torch 2.10: 426 MiB bare (unsloth-zoo PR 1053); RTX 4060: at most 460"),
}  # fmt: skip
"""By CUDA capability. A range is what was seen, not a bound; kernels are loaded as they are first used, so it grows in the
first step. Bare: before any kernel; cuBLAS and cuDNN add 30 MiB on a T4, which is added for the RTX 3090. The RTX 3060's and
4060's: less than the card's memory by what runs out of memory had taken (xMem, CUDA 12.4)."""
UNKNOWN_CONTEXT = _mib(
    300,
    450,
    600,
    "no measurement of this kind of card: 300 to 600 MiB seen with torch >= 2 (pytorch issues 107667, 109888)",
)
"""Other points: 274 MiB after the first tensor, 636 MiB without lazy loading (pytorch PR 86509); 120 to 550 MB for a context
without torch, by card (llama.cpp PR 20595)."""
EAGER_CONTEXT = _mib(
    1000, 1100, 1300, "CUDA before 11.7 loads all kernels at once: over 1,000 MiB (pytorch issue 107667)"
)
EAGER_CONTEXTS: Mapping[tuple[int, int], ContextBytes] = {
    (6, 1): _mib(721, 721, 721, "GTX 1080, torch 1.8, CUDA 10.1: 721 MiB (pytorch issue 55277)"),
    (7, 0): CONTEXTS[(7, 0)],
    (7, 5): _mib(878, 878, 878, "RTX 2080 Ti, torch 1.6, CUDA 10.1: 1,035 MiB less a tensor of 157 (pytorch issue 49877)"),
    (8, 6): _mib(
        1487, 1587, 1687, "RTX 3090: 1,644 MiB less a tensor of 157 with CUDA 11.0 (pytorch issue 49877), 1,687 with 11.1 (55277)"
    ),
}  # fmt: skip
"""By CUDA capability, with versions of CUDA that load all kernels at once: each of these cards was seen with one or two versions,
and torch has added kernels with each of its own (934, 992 and 1,106 MiB with 1.8, 1.10 and 1.11: pytorch issue 74536)."""


def cuda_context_bytes(gpu: Gpu | None = None, *, cuda: tuple[int, int] | None = None) -> ContextBytes:
    """The CUDA context of a process with torch, which is outside the caching allocator and never freed.

    `cuda` is the version of CUDA that torch was built with; by default one that loads kernels lazily. A card of a kind that
    was never measured, or None, gets the widest range.
    """
    eager = cuda is not None and cuda < LAZY_LOADING
    measured, unknown = (EAGER_CONTEXTS, EAGER_CONTEXT) if eager else (CONTEXTS, UNKNOWN_CONTEXT)
    if gpu is None or gpu.capability is None:
        return unknown
    return measured.get(gpu.capability, unknown)


def cublas_workspace_bytes(gpu: Gpu) -> int:
    """Workspace of one cuBLAS handle on one stream, which comes from the caching allocator and is never freed.

    torch 2.15, default of CUBLAS_WORKSPACE_CONFIG: `:4096:2:16:8` (8,519,680 B), 32 MiB for major 9, 10 and 12;
    cublasLt shares it. hipBLASLt on AMD: 76 MiB. A card of which only the memory is known gets the larger CUDA value.
    """
    if gpu.gfx is not None:
        return 76 * MIB
    if gpu.capability is None or gpu.capability[0] in (9, 10, 12):
        return 32 * MIB
    return (2 * 4096 + 8 * 16) * 1024


def driver_reserved_bytes(gpu: Gpu) -> ByteRange:
    """Memory that the driver keeps of `gpu.memory_bytes`: nothing more if that was measured, else a part of the nominal size.

    Nominal less measured over the catalogue: from 16 MiB (MI300X) and 69 MiB (Pascal, old drivers) to 543 MiB
    (RTX 5060 Ti) or 2.1 % (RTX 5090); new drivers keep more. On Jetson 8 %: the CPU's carve-outs are taken first.
    """
    if not gpu.memory_is_nominal:
        return ByteRange(low_bytes=0, high_bytes=0)
    share = 0.08 if gpu.capability in JETSON_CAPABILITIES else 0.021
    return ByteRange(low_bytes=16 * MIB, high_bytes=max(576 * MIB, int(gpu.memory_bytes * share)))
