"""Memory that no operator's output shows: context, library workspaces, and what kernels allocate within themselves.

Kernels are modelled by the bytes of their outputs, because a trace holds no shapes. Factors marked "from the source" are
read from pytorch's; the others are limits that follow from the algorithm. None is measured yet.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from trainfit.gpus.catalogue import Gpu
from trainfit.gpus.context import (
    ByteRange,
    cublas_workspace_bytes,
    cuda_context_bytes,
    driver_reserved_bytes,
)
from trainfit.memory.columns import Columns, Integers
from trainfit.memory.errors import ErrorClass
from trainfit.memory.overwritten import overwriting_events
from trainfit.memory.ranks import exchange_bytes, nccl_bytes
from trainfit.timing.counts import MATMULS
from trainfit.tracing.events import EMPTY_CACHE, TensorInfo

Within = Literal["reserved", "process", "card"]


@dataclass(frozen=True, kw_only=True)
class HiddenRow:
    """Memory that the traced operators do not show."""

    name: str
    """Name of the row, as reports show it."""
    low_bytes: int
    """The least that it may be."""
    high_bytes: int
    """The most that it may be."""
    within: Within
    """reserved: a part of what the caching allocator reserves; process: beside that; card: not this process's."""
    source: str
    """Where the bounds come from."""


@dataclass(frozen=True, kw_only=True)
class Temporary:
    """What one operator takes from the caching allocator while it runs, in bytes for each byte of an output."""

    low: float
    """The least for each byte."""
    high: float
    """The most for each byte."""
    source: str
    """What it is, and where the bounds come from."""


_SORT = Temporary(low=0, high=2, source="cub radix sort: second buffers of keys and indices, and their histograms")
_FUSED_ATTENTION = Temporary(
    low=0, high=2, source="gradient of the query summed up in float32 (pytorch mem_eff_attention/kernel_backward.h)"
)
TEMPORARIES: Mapping[str, Temporary] = {
    "aten._scaled_dot_product_flash_attention_backward": Temporary(
        low=2,
        high=4,
        source="float32 dq_accum, length rounded up to 128 (pytorch flash_attn/flash_api.cpp, mha_bwd); from the source",
    ),
    "aten._scaled_dot_product_cudnn_attention_backward": Temporary(
        low=2, high=4, source="float32 gradient of the query in the plan's workspace, as flash attention"
    ),
    "aten._scaled_dot_product_efficient_attention_backward": _FUSED_ATTENTION,
    "aten._efficient_attention_backward": _FUSED_ATTENTION,
    "aten.native_layer_norm_backward": Temporary(
        low=0, high=1 / 16, source="partial sums of the weight's and bias's gradients (layer_norm_kernel.cu)"
    ),
    "aten.sort": _SORT,
    "aten.topk": _SORT,
    "aten.argsort": _SORT,
    "aten.unique2": _SORT,
    "aten._unique2": _SORT,
    "aten.nonzero": Temporary(low=0, high=1, source="cub select: flags and block sums"),
    "aten.cumsum": Temporary(low=0, high=1 / 16, source="cub scan: block sums"),
    "aten.index_put": _SORT,
    "aten.embedding_dense_backward": Temporary(low=0, high=1, source="sorted indices (EmbeddingBackwardKernel.cu)"),
}
_CONVOLUTIONS = ("aten.convolution", "aten.convolution_backward")
"""cuDNN's workspace and contiguous copies: nothing, or at most input and output in another layout."""
WINOGRAD = 36 / 16
"""float32 convolutions: bytes of transformed tiles for each byte of image; F(4x4, 3x3) makes 6 x 6 numbers of 4 x 4."""
KERNEL_TEMPORARIES = "kernel temporaries"
"""Name of the row of `reserved_rows` that says how much kernels may hold."""
Bound = Literal["least", "needed", "most"]
"""How much kernels allocate within themselves: as little as they may; as much, but no workspaces of convolutions, which
PyTorch replaces by smaller ones where memory is short (pytorch native/cudnn/Conv_v8.cpp, `try_configs`); as much as all may."""


@dataclass(frozen=True, kw_only=True)
class Completed:
    """A trace with the hidden part of what the caching allocator gives."""

    columns: Columns
    """The trace, kernels at the most they may allocate."""
    least_bytes: Integers
    """Of each tensor, where kernels allocate as little as they may."""
    begins: Integers
    """Index into its events of each event of the trace that it was made from, and of the end."""
    cublas_bytes: int
    """All cuBLAS workspaces in it."""
    kernels: tuple[str, ...]
    """Operators with temporaries in it."""
    largest_bytes: int
    """The largest of these."""


def complete(trace: Columns, gpu: Gpu, *, bound: Bound, half_precision: bool) -> Completed:
    """Insert cuBLAS workspaces, kernels' temporaries and the ends of searches for algorithms into a trace.

    `half_precision`: convolutions run in fp16 or bf16. A workspace comes with the first matrix
    product of the main thread and with that of the autograd thread (a handle each) and stays; a temporary is freed as
    soon as it is there.
    """
    layout_factor = 1 if half_precision else WINOGRAD
    partners = _partners(trace)
    workspace_bytes = cublas_workspace_bytes(gpu)
    rows: list[TensorInfo] = []
    least: list[int] = []
    places: list[int] = []
    events: list[int] = []
    threads: set[bool] = set()
    kernels: dict[str, None] = {}
    largest_bytes = 0
    searched: set[tuple[str, str, int]] = set()

    def add(index: int, row: TensorInfo, *, stays: bool, least_bytes: int) -> None:
        rows.append(row)
        least.append(least_bytes)
        number = len(trace.nbytes) + len(rows)
        events.append(number)
        if not stays:
            events.append(-number)
        places.extend([index + 1] * (len(events) - len(places)))

    for index, tensor in _allocations(trace, {*MATMULS, *_CONVOLUTIONS, *TEMPORARIES}):
        if tensor.op in MATMULS and (tensor.phase == "backward") not in threads:
            threads.add(tensor.phase == "backward")
            workspace = _held_within(tensor, workspace_bytes, "cuBLAS workspace", module="")
            add(index, workspace, stays=True, least_bytes=workspace_bytes)
        if tensor.op in _CONVOLUTIONS:
            if (key := (tensor.op, tensor.module, tensor.nbytes)) not in searched:
                searched.add(key)
                add(index, _held_within(tensor, 0, EMPTY_CACHE), stays=True, least_bytes=0)
            low = 0.0
            other = partners.get((tensor.op, tensor.module), tensor.nbytes)
            nbytes = (bound == "most") * layout_factor * (tensor.nbytes + other)
        elif kernel := TEMPORARIES.get(tensor.op):
            low = kernel.low * tensor.nbytes
            nbytes = (kernel.low if bound == "least" else kernel.high) * tensor.nbytes
        else:
            continue
        if nbytes:
            kernels[tensor.op.removeprefix("aten.")] = None
            largest_bytes = max(largest_bytes, int(nbytes))
            add(index, _held_within(tensor, int(nbytes), f"within {tensor.op}"), stays=False, least_bytes=int(low))
    real, begins = _inserted(overwriting_events(trace), places, events)
    marks = tuple((int(begins[index]), name) for index, name in trace.marks)
    return Completed(
        columns=replace(trace.with_rows(rows), events=real, marks=marks),
        least_bytes=np.append(trace.nbytes, np.array(least, dtype=np.int64)),
        begins=begins,
        cublas_bytes=len(threads) * workspace_bytes,
        kernels=tuple(sorted(kernels)),
        largest_bytes=largest_bytes,
    )


def _inserted(events: Integers, places: list[int], further: list[int]) -> tuple[Integers, Integers]:
    """Events without those that are 0, and with `further`, each before the event that has the index of its place; and the
    index that each event, and the end, has then.
    """
    kept = np.append(0, np.cumsum(events != 0))
    where = np.array(places, dtype=np.int64)
    begins = kept + np.searchsorted(where, np.arange(len(kept)), side="right")
    return np.insert(events[events != 0], kept[where], np.array(further, dtype=np.int64)), begins


def _allocations(trace: Columns, ops: Set[str]) -> Iterator[tuple[int, TensorInfo]]:
    """(event, tensor) for each allocation by one of some operators; of matrix products only the first in each phase."""
    known = np.array([name in ops for name in trace.names], dtype=bool)
    products = np.array([name in MATMULS for name in trace.names], dtype=bool)
    tensors = np.abs(trace.events) - 1
    indices = np.flatnonzero((trace.events > 0) & known[trace.op[tensors]])
    of_product = products[trace.op[tensors[indices]]]
    _, first = np.unique(trace.phase[tensors[indices[of_product]]], return_index=True)
    wanted = ~of_product
    wanted[np.flatnonzero(of_product)[first]] = True
    for index in indices[wanted].tolist():
        yield index, trace.tensor(int(tensors[index]))


def _held_within(tensor: TensorInfo, nbytes: int, name: str, module: str | None = None) -> TensorInfo:
    """What the operator that makes `tensor` takes beside it."""
    return TensorInfo(
        id=tensor.id,
        nbytes=nbytes,
        category="workspace",
        op=name,
        module=tensor.module if module is None else module,
        phase=tensor.phase,
        stream=tensor.stream,
    )


def _partners(trace: Columns) -> dict[tuple[str, str], int]:
    """(convolution's operator, module) -> bytes of its other image: forward's output for backward, and the reverse.

    What backward returns is the gradient of the input, which is as large as the input.
    """
    forward, backward = _CONVOLUTIONS
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for _, tensor in _allocations(trace, set(_CONVOLUTIONS)):
        key = (forward if tensor.op == backward else backward, tensor.module)
        sizes[key] = max(sizes[key], tensor.nbytes)
    return sizes


def hidden_rows(gpu: Gpu, gpus: int = 1) -> tuple[HiddenRow, ...]:
    """What the traced step's allocator never gets: the process's own, one of `gpus`, and what others hold of the card."""
    context = cuda_context_bytes(gpu)
    driver = driver_reserved_bytes(gpu)
    rows = [_row("CUDA context", context, "process", context.source)]
    if gpu.memory_is_nominal:
        rows.append(_row("driver", driver, "card", "nominal memory less the driver's total, over the catalogue"))
    if gpus > 1:
        rows.append(
            _row("NCCL", nccl_bytes(gpu), "process", "2 to 32 channels of 24 MiB (NVIDIA/nccl issues 986, 1685)")
        )
        rows.append(
            _row("gradient exchange", exchange_bytes(), "process", "the buffer that a bucket of gradients is sent from")
        )
    return tuple(rows)


def reserved_rows(low: Completed, high: Completed, *, reserved_bytes: int, error: ErrorClass) -> tuple[HiddenRow, ...]:
    """What the allocator gives besides tensors, and how far `reserved_bytes`, the peak of the replay of `low`, may be off."""
    workspaces = ByteRange(low_bytes=low.cublas_bytes, high_bytes=high.cublas_bytes)
    temporaries = ByteRange(low_bytes=low.largest_bytes, high_bytes=high.largest_bytes)
    off = ByteRange(low_bytes=-int(error.below * reserved_bytes), high_bytes=int(error.above * reserved_bytes))
    default = "torch 2.15's default CUBLAS_WORKSPACE_CONFIG: one each for forward and backward"
    largest = f"bounds of the largest at one time, of {', '.join(high.kernels) or 'no operator'}"
    return (
        _row("cuBLAS workspaces", workspaces, "reserved", default),
        _row(KERNEL_TEMPORARIES, temporaries, "reserved", largest),
        _row("error of the model", off, "reserved", error.source),
    )


def _row(name: str, size: ByteRange, within: Within, source: str) -> HiddenRow:
    return HiddenRow(name=name, low_bytes=size.low_bytes, high_bytes=size.high_bytes, within=within, source=source)
