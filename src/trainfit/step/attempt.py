"""Out of memory, told from other errors."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

MESSAGES = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "unable to find an engine to execute this computation",
    "MPS backend out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)
"""What libraries say that fail to allocate outside torch's allocator (cuBLAS, cuDNN) or on other devices: these come as
plain RuntimeErrors, so only their text tells."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: by its type, else by the words of the libraries below torch."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)
    )


def attempt(action: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """The result, or the first line of an out-of-memory error; other errors pass.

    Only text leaves the `except` block: the exception's traceback would keep every tensor of its frames alive.
    """
    try:
        return action(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = str(error).splitlines()[0] if str(error) else type(error).__name__
    return None, message
