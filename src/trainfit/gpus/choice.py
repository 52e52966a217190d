"""The card that a user means: by name, by memory size, or the one of this machine."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import GIB, Gpu, find_gpu, gpu_with_memory
from trainfit.gpus.detect import DetectedGpu, detect_gpus


def chosen_gpu(name: str | None, memory: str | None) -> Gpu:
    """The card of a name, of a memory size, or of both.

    Raises:
        TrainfitError: neither is given, or the name is not known.
    """
    if memory is None:
        if name is None:
            raise TrainfitError("which card? give --gpu NAME or --memory 8GiB")
        return find_gpu(name)
    given = gpu_with_memory(memory)
    if name is None:
        return given
    gpu = find_gpu(name)
    size = {"memory_bytes": given.memory_bytes, "nominal_memory_bytes": given.memory_bytes}
    return replace(gpu, name=f"{gpu.name} with {memory}", memory_is_nominal=True, **size)


def gpu_here(note: Callable[[str], None]) -> Gpu:
    """The first card of this machine, with what is free of its memory; `note` is called where programs hold some.

    Raises:
        TrainfitError: there is none.
    """
    here = detect_gpus()
    if not here:
        raise TrainfitError("no GPU is here: name one with --gpu NAME, or give --memory 8GiB")
    taken = sum(process.used_bytes or 0 for process in here[0].processes)
    if taken:
        names = ", ".join(f"{process.name or process.pid}" for process in here[0].processes)
        note(f"{taken / GIB:.1f} GiB of {here[0].gpu.name} are taken by {names}")
    return with_free_memory(here[0])


def with_free_memory(detected: DetectedGpu) -> Gpu:
    """The card, whose memory is what is free of it."""
    return replace(detected.gpu, memory_bytes=detected.free_bytes, memory_is_nominal=False)


def visible(detected: Sequence[DetectedGpu]) -> list[DetectedGpu]:
    """Those that CUDA_VISIBLE_DEVICES shows to this process, in its order; all of them where it is not set.

    As CUDA does, it ends at the first name that no device has.
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
