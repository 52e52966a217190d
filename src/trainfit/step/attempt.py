"""Recognising out of memory among other errors."""

import re
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

OUT_OF_MEMORY = (
    # torch: c10/cuda/CUDAException.cpp, c10_cuda_check_implementation, with cudaGetErrorString(cudaErrorMemoryAllocation)
    ("CUDA error: out of memory", "CUDA"),
    # torch: c10/cuda/driver_api.h, C10_CUDA_DRIVER_CHECK, and ATen/cuda/Exceptions.h, AT_CUDA_DRIVER_CHECK (both spell it so)
    ("CUDA driver error: out of memory", "the CUDA driver"),
    # torch: ATen/native/cudnn/MHA.cpp, check_cudnn_sdpa_execution
    ("CUDA ran out of memory outside PyTorch's allocator", "cuDNN"),
    # torch: ATen/native/cudnn/Conv_v8.cpp: a plan whose workspace cannot be allocated is left out, and none was left
    ("unable to find an engine to execute this computation", "cuDNN"),
    # cuDNN: cudnnGetErrorString, in "cuDNN error: ..." (ATen/cuda/Exceptions.h, AT_CUDNN_CHECK); ALLOC_FAILED until cuDNN 8
    ("CUDNN_STATUS_ALLOC_FAILED", "cuDNN"),
    ("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "cuDNN"),
    ("CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED", "cuDNN"),
    # torch: ATen/cuda/CUDABlas.cpp, _cublasGetErrorEnum, in "CUDA error: ... when calling `...`" (TORCH_CUDABLAS_CHECK)
    ("CUBLAS_STATUS_ALLOC_FAILED", "cuBLAS"),
    # torch: ATen/cuda/Exceptions.cpp, cusolverGetErrorMessage, in "cusolver error: ..." (TORCH_CUSOLVER_CHECK)
    ("CUSOLVER_STATUS_ALLOC_FAILED", "cuSOLVER"),
    # torch: ATen/native/cuda/CuFFTUtils.h, _cudaGetErrorEnum, in "cuFFT error: ..."
    ("CUFFT_ALLOC_FAILED", "cuFFT"),
    # Triton: third_party/nvidia/backend/driver.c, gpuAssert, with cuGetErrorString
    (r"Triton Error \[CUDA\]: out of memory", "Triton"),
    # NCCL: src/include/checks.h, CUDACHECK: "Cuda failure 2 'out of memory'", without the number in older versions; torch
    # appends it as "Last error" (torch/csrc/distributed/c10d/NCCLUtils.hpp, C10D_NCCL_CHECK). NCCL keeps its last warning
    # alone, and src/include/alloc.h warns once more: "Failed to CUDA malloc 6291456 bytes" (also calloc, host alloc).
    (r"Cuda failure (\d+ )?'out of memory'", "NCCL"),
    (r"Failed to CUDA (\w+ )+\d+ bytes", "NCCL"),
    # torch: c10/core/impl/alloc_cpu.cpp
    ("DefaultCPUAllocator: can't allocate memory", "the host"),
    # libstdc++'s and Thrust's what(), as torch/csrc/Exceptions.h passes it on
    ("std::bad_alloc", "the host or CUDA"),
    # torch: ATen/mps/MPSAllocator.mm
    ("MPS backend out of memory", "MPS"),
)
"""(Pattern in a RuntimeError's text that always means out of memory, the library that raises it). Libraries that allocate
outside torch's allocator raise plain RuntimeErrors. The files named are those of torch 2.15, Triton 3.9 and NCCL 2.30."""

AMBIGUOUS = (
    # cublasCreate and cusolverDnCreate return these if there is no memory for the handle, and also if CUDA is broken.
    (r"CUBLAS_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED)\b", "cuBLAS"),
    (r"CUSOLVER_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR|EXECUTION_FAILED)\b", "cuSOLVER"),
    # cudnnCreate: NOT_INITIALIZED. A library that finds no room for its kernels: INTERNAL_ERROR (pytorch issue 81620). A
    # convolution without room for its workspace: NOT_SUPPORTED (pytorch issue 44473), which is also the answer to shapes
    # and layouts that cuDNN lacks; its longer names (NOT_SUPPORTED_SHAPE ...) name such a cause, and are not matched.
    # A kernel that could not be loaded: EXECUTION_FAILED and its _CUDART, _CUDA_DRIVER, _CUBLAS.
    (r"CUDNN_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR|NOT_SUPPORTED|EXECUTION_FAILED(_\w+)?)\b", "cuDNN"),
)
"""(Pattern of a status that means out of memory only if little memory is free, the library that raises it): each has other
causes too."""

SHORT_BYTES = 2**30
"""Free device memory below which a status of `AMBIGUOUS` counts as out of memory. Loading cuDNN's kernels takes about
500 MB (NVIDIA in pytorch issue 81620); the limit is twice that, because a false positive costs a few retries and a false
negative the run."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means out of memory: by its type, else by the error messages of the libraries that torch calls."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _recognised(str(error)) is not None


def attempt(action: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Run `action`. Returns (result, None), or (None, one line about the out-of-memory error); other errors are raised.

    Only text leaves the `except` block: the exception's traceback would keep every tensor of its frames alive.
    """
    try:
        return action(), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message = _one_line(error)
    return None, message


def _one_line(error: RuntimeError | MemoryError) -> str:
    """The first line of torch's own error (`training.shortage` parses it); of another, which library ran out of memory."""
    lines = str(error).splitlines()
    if isinstance(error, torch.OutOfMemoryError):
        return lines[0] if lines else "out of memory"
    if isinstance(error, MemoryError):
        return f"the host ran out of memory ({lines[0] if lines else 'MemoryError'})"
    library, text = _recognised(str(error)) or ("", "")
    line = next(line for line in lines if text in line)
    return f"{library} ran out of memory ({line})"


def _recognised(message: str) -> tuple[str, str] | None:
    """The library that ran out of memory and the matched text; None for another error."""
    for pattern, library in OUT_OF_MEMORY:
        match = re.search(pattern, message)
        if match:
            return library, match[0]
    for pattern, library in AMBIGUOUS:
        match = re.search(pattern, message)
        if match and _memory_is_short():
            return library, match[0]
    return None


def _memory_is_short() -> bool:
    """Whether the current device has less than `SHORT_BYTES` free: other libraries cannot use what torch has cached.

    Without CUDA such a message can only be a quoted one, and counts as out of memory. A device that no longer responds is
    broken, not full.
    """
    if not torch.cuda.is_available():
        return True
    try:
        free_bytes, _ = torch.cuda.mem_get_info()
    except RuntimeError:
        return False
    return free_bytes < SHORT_BYTES
