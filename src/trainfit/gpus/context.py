"""What CUDA and its libraries take of a card's memory beside the tensors, with sources."""

from dataclasses import dataclass

from trainfit.gpus.catalogue import MIB, Gpu

JETSON_CAPABILITIES = {(5, 3), (6, 2), (7, 2), (8, 7)}
"""Parts that share their memory with the CPU (NVIDIA, CUDA GPU compute capability, Jetson products)."""


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """A size that is known within limits."""

    low_bytes: int
    """Smallest value seen."""
    high_bytes: int
    """Largest value seen; the one to plan with."""


def cuda_context_bytes() -> ByteRange:
    """CUDA context of a torch >= 2 process: 300 to 600 MiB, outside the caching allocator and never given back.

    It holds the kernels used so far, so it grows through the first step; lazy module loading has been torch's default
    since 1.13 (pytorch PR 86509: 274 MiB after the first tensor, 636 MiB without it). Other points: about 300 MiB
    (pytorch issue 107667), 400 MiB (issue 109888), 426 MiB on an RTX 6000 Ada with torch 2.10 and CUDA 13.0
    (unsloth-zoo PR 1053), 120 to 550 MB for a context without torch, by card (llama.cpp PR 20595).
    """
    return ByteRange(low_bytes=300 * MIB, high_bytes=600 * MIB)


def cublas_workspace_bytes(gpu: Gpu) -> int:
    """Workspace of one cuBLAS handle on one stream; the caching allocator gives it and never gets it back.

    torch 2.15, default of CUBLAS_WORKSPACE_CONFIG: `:4096:2:16:8` (8,519,680 B), 32 MiB for major 9, 10 and 12;
    cublasLt shares it. hipBLASLt on AMD: 76 MiB. A card known by its memory only gets the larger CUDA value.
    """
    if gpu.gfx is not None:
        return 76 * MIB
    if gpu.capability is None or gpu.capability[0] in (9, 10, 12):
        return 32 * MIB
    return (2 * 4096 + 8 * 16) * 1024


def driver_reserved_bytes(gpu: Gpu) -> ByteRange:
    """What the driver keeps of `gpu.memory_bytes`: nothing more where that was measured, else of the nominal size.

    Nominal less measured over the catalogue: from 16 MiB (MI300X) and 69 MiB (Pascal, old drivers) to 543 MiB
    (RTX 5060 Ti) or 2.1 % (RTX 5090); new drivers keep more. On Jetson 8 %: the CPU's carve-outs are taken first.
    """
    if not gpu.memory_is_nominal:
        return ByteRange(low_bytes=0, high_bytes=0)
    share = 0.08 if gpu.capability in JETSON_CAPABILITIES else 0.021
    return ByteRange(low_bytes=16 * MIB, high_bytes=max(576 * MIB, int(gpu.memory_bytes * share)))
