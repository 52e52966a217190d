"""The device that trials run on, and the memory that they may use. Imports no torch."""

from typing import Literal

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import GIB, gpu_with_memory
from trainfit.gpus.context import cuda_context_bytes
from trainfit.gpus.detect import DetectedGpu, detect_gpus, visible

Device = Literal["auto", "cpu", "cuda"]
"""What users choose: auto is a GPU where there is one, else the CPU."""


def measured_card(device: Device) -> DetectedGpu | None:
    """The first GPU visible in CUDA_VISIBLE_DEVICES; None: the CPU.

    Raises:
        TrainfitError: `device` is "cuda", and there is no NVIDIA GPU.
    """
    if device == "cpu":
        return None
    shown = visible(detect_gpus())
    if not shown and device == "cuda":
        raise TrainfitError("no NVIDIA GPU to measure on; --device cpu measures the CPU's time")
    return shown[0] if shown else None


def cap_bytes(memory: str | None, card: DetectedGpu | None) -> int | None:
    """Bytes that the allocator may reserve in a process with `memory`: all except the CUDA context.

    Raises:
        TrainfitError: there is no GPU, or `memory` is more than the card's memory, or less than a CUDA context.
    """
    if memory is None:
        return None
    if card is None:
        raise TrainfitError("--memory caps the allocator of a GPU; on the CPU leave it out")
    limit_bytes = gpu_with_memory(memory).memory_bytes
    context = cuda_context_bytes(card.gpu).high_bytes
    if not context < limit_bytes < card.total_bytes:
        raise TrainfitError(
            f"--memory {memory}: the CUDA context takes {context / GIB:.2f} GiB, and the card has "
            f"{card.total_bytes / GIB:.2f}"
        )
    return limit_bytes - context
