"""The device that trials run on, and how much of it they may have. Imports no torch."""

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import GIB, gpu_with_memory
from trainfit.gpus.choice import visible
from trainfit.gpus.context import cuda_context_bytes
from trainfit.gpus.detect import DetectedGpu, detect_gpus


def measured_card(device: str) -> DetectedGpu | None:
    """The first GPU that CUDA_VISIBLE_DEVICES shows; None: the CPU.

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
    """What the allocator of a process that has `memory` may reserve: all but the CUDA context.

    Raises:
        TrainfitError: there is no GPU, or `memory` is more than it has, or less than a CUDA context.
    """
    if memory is None:
        return None
    if card is None:
        raise TrainfitError("--memory caps the allocator of a GPU; on the CPU leave it out")
    wanted = gpu_with_memory(memory).memory_bytes
    context = cuda_context_bytes(card.gpu).high_bytes
    if not context < wanted < card.total_bytes:
        least, most = context / GIB, card.total_bytes / GIB
        raise TrainfitError(f"--memory {memory}: the CUDA context takes {least:.2f} GiB, and the card has {most:.2f}")
    return wanted - context
