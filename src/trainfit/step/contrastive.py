"""A window whose loss couples every pair of samples: exact gradient by cached features, at the memory of a micro-batch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainfit.step import ranks
from trainfit.step.names import Precision
from trainfit.step.precision import autocast


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """An objective of kind `coupled`: a loss over the features of all pairs of the window, on all ranks."""

    features: Callable[[torch.nn.Module, Sequence[Any]], tuple[torch.Tensor, torch.Tensor]]
    """(model, micro-batch) -> the two towers' features, each (n, d); moves the samples to the device."""
    rows_loss: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, slice], torch.Tensor]
    """(model, all first features (N, d), all second features (N, d), rows) -> these rows' part of the loss, a scalar:
    the parts of all rows add up to the loss of the window. Reads scale and bias from the model itself."""
    chunk_rows: int = 1024
    """Rows of the N x N logits that exist at a time."""


def accumulate_contrastive(
    model: torch.nn.Module,
    objective: Contrastive,
    micro_batches: Sequence[Sequence[Any]],
    *,
    device: torch.device,
    precision: Precision = "fp32",
    scaler: torch.amp.GradScaler | None = None,
    last_backward: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, torch.Tensor]:
    """Add the window's gradient to `.grad`, equal to that of one big batch on all ranks together.

    Features of every micro-batch but the last are computed without gradients; the loss is taken once, on features that
    are leaves, which gives their gradients, and those of scale and bias, exactly; then each micro-batch runs again with
    gradients, drawing the random numbers that it drew before, and is sent its features' gradients (GradCache, Gao et
    al. 2021, arXiv 2101.06983). The last micro-batch keeps its graph: one micro-batch is the plain step. Buffers
    (BatchNorm's running statistics) move once a micro-batch.
    Where one rank runs out of memory before a collective all raise, so that none waits; behind the last it raises alone.
    Gradients are to be summed over the ranks, not averaged; see `accumulate`.

    Returns:
        {"contrastive": this rank's share of the window's loss}, a scalar on `device`.
    """
    devices = [device] if device.type == "cuda" else []
    cpu_state, device_states = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in devices]

    def forward(micro_batch: Sequence[Any]) -> torch.Tensor:
        with autocast(precision, device.type):
            pair = objective.features(model, micro_batch)
        return torch.stack([f.to(torch.promote_types(f.dtype, torch.float32)) for f in pair], dim=1)

    def features() -> tuple[torch.Tensor | None, torch.Tensor | None]:
        with torch.no_grad():
            cached = [forward(micro_batch) for micro_batch in micro_batches[:-1]]
        last = forward(micro_batches[-1]) if micro_batches else None
        return last, torch.cat([*cached, last.detach()]) if last is not None else None

    last, own = ranks.together(features)
    every, rows = _gather(own, like=next(model.parameters()))
    loss = ranks.together(lambda: _backward_rows(model, objective, every, rows, precision=precision, scaler=scaler))
    assert every.grad is not None
    gradient = _sum(every.grad)[rows]
    if last is None:
        return {"contrastive": loss}
    parts = gradient.split([len(m) for m in micro_batches])
    with last_backward() if len(parts) == 1 else nullcontext():
        last.backward(parts[-1])
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(cpu_state)
        for d, state in zip(devices, device_states, strict=True):
            torch.cuda.set_rng_state(state, d)
        for number, micro_batch in enumerate(micro_batches[:-1], 1):
            again = forward(micro_batch)
            with last_backward() if number == len(parts) - 1 else nullcontext():
                again.backward(parts[number - 1])
    with torch.no_grad():
        for buffer, after in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(after)
    return {"contrastive": loss}


def _backward_rows(
    model: torch.nn.Module,
    objective: Contrastive,
    every: torch.Tensor,
    rows: slice,
    *,
    precision: Precision,
    scaler: torch.amp.GradScaler | None,
) -> torch.Tensor:
    """Backward of the loss of this rank's rows, a chunk at a time; returns its value."""
    total = torch.zeros((), device=every.device)
    every.grad = torch.zeros_like(every)
    for start in range(rows.start, rows.stop, objective.chunk_rows):
        chunk = slice(start, min(start + objective.chunk_rows, rows.stop))
        with autocast(precision, every.device.type):
            loss = objective.rows_loss(model, every[:, 0], every[:, 1], chunk)
        (scaler.scale(loss) if scaler is not None else loss).backward()
        total = total + loss.detach()
    return total


def _gather(own: torch.Tensor | None, *, like: torch.Tensor) -> tuple[torch.Tensor, slice]:
    """Features of all ranks (N, 2, d) as a leaf, and which rows are this rank's.

    A rank's share may have any size or be empty (None), so rows are placed in zeros and summed.
    """
    size, width = (len(own), own.shape[2]) if own is not None else (0, 0)
    found = ranks.sum_over_ranks(
        {f"{r}": float(size if r == ranks.rank() else 0) for r in range(ranks.world_size())}
        | {"width": float(width), "ranks": float(own is not None)}
    )
    start = int(sum(found[f"{r}"] for r in range(ranks.rank())))
    rows = slice(start, start + size)
    if ranks.world_size() == 1 and own is not None:
        return own.requires_grad_(), rows
    total = int(sum(found[f"{r}"] for r in range(ranks.world_size())))
    dtype = torch.promote_types(like.dtype, torch.float32)
    shape = (total, 2, int(found["width"] / max(found["ranks"], 1)))

    def placed() -> torch.Tensor:
        every = torch.zeros(shape, dtype=dtype, device=like.device)
        if own is not None:
            every[rows] = own
        return every

    return _sum(ranks.together(placed)).requires_grad_(), rows


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    if ranks.world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
