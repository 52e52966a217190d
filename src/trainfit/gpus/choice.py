"""Chooses the card: by name, by memory size, or the one in this machine."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import GIB, Gpu, find_gpu, gpu_with_memory
from trainfit.gpus.detect import DetectedGpu, detect_gpus


def chosen_gpu(name: str | None, memory: str | None) -> Gpu:
    """The card with a name, a memory size, or both.

    Raises:
        TrainfitError: neither is given, or the name is unknown.
    """
    if memory is None:
        if name is None:
            raise TrainfitError("which card? give --gpu NAME or --memory 8GiB")
        return find_gpu(name)
    by_memory = gpu_with_memory(memory)
    if name is None:
        return by_memory
    gpu = find_gpu(name)
    return replace(
        gpu,
        name=f"{gpu.name} with {memory}",
        memory_is_nominal=True,
        memory_bytes=by_memory.memory_bytes,
        nominal_memory_bytes=by_memory.memory_bytes,
    )


def gpu_here(note: Callable[[str], None]) -> Gpu:
    """The first card of this machine, with its free memory; `note` is called if other programs use memory of it.

    Raises:
        TrainfitError: this machine has no NVIDIA GPU.
    """
    detected = detect_gpus()
    if not detected:
        raise TrainfitError("this machine has no GPU: name one with --gpu NAME, or give --memory 8GiB")
    first = detected[0]
    used_bytes = sum(process.used_bytes or 0 for process in first.processes)
    if used_bytes:
        names = ", ".join(f"{process.name or process.pid}" for process in first.processes)
        note(f"{used_bytes / GIB:.1f} GiB of {first.gpu.name} are used by {names}")
    return with_free_memory(first)


def with_free_memory(detected: DetectedGpu) -> Gpu:
    """The card with its free memory as its memory."""
    return replace(detected.gpu, memory_bytes=detected.free_bytes, memory_is_nominal=False)


def visible(detected: Sequence[DetectedGpu]) -> list[DetectedGpu]:
    """The devices in CUDA_VISIBLE_DEVICES, in its order; all devices if it is not set.

    As in CUDA, the list ends at the first name that no device has.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return list(detected)
    shown: list[DetectedGpu] = []
    for name in map(str.strip, names.split(",")):
        named = [gpu for gpu in detected if name and (name == str(gpu.index) or gpu.uuid.startswith(name))]
        if not named:
            break
        shown += named
    return shown
