"""Number formats of the forward pass, and what each needs around it."""

from contextlib import AbstractContextManager, nullcontext

import torch

from trainfit.errors import TrainfitError
from trainfit.gpus.capability import auto_precision, has_bf16
from trainfit.step.names import MATMUL_PRECISION, Precision

AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """`auto` becomes bf16 on CUDA capability >= 8.0, fp16 on older cards (bf16 is only emulated there), fp32 elsewhere.

    Raises:
        TrainfitError: bf16 on a card that only emulates it, or fp16 without a GPU.
    """
    if device.type != "cuda":
        if precision == "fp16":
            raise TrainfitError("--precision fp16 needs a CUDA GPU; use fp32 or bf16 on the CPU")
        return "fp32" if precision == "auto" else precision
    capability = torch.cuda.get_device_capability(device)
    if precision == "auto":
        return auto_precision(capability)
    if precision == "bf16" and not has_bf16(capability):
        raise TrainfitError(f"--precision bf16 needs CUDA capability 8.0, this GPU has {capability}; use fp16 or auto")
    return precision


def set_matmul_precision(device: torch.device) -> None:
    """Set the precision of float32 matrix products on CUDA to `MATMUL_PRECISION`, for the whole process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision(MATMUL_PRECISION)


def autocast(precision: Precision, device_type: str) -> AbstractContextManager[object]:
    """The autocast context of one micro-batch's forward; a null context for fp32."""
    if precision not in AUTOCAST_DTYPE:
        return nullcontext()
    return torch.autocast(device_type, dtype=AUTOCAST_DTYPE[precision])


def grad_scaler(precision: Precision, device_type: str) -> torch.amp.GradScaler:
    """A loss scaler, enabled for fp16 only (bf16 has the range of fp32)."""
    return torch.amp.GradScaler(device_type, enabled=precision == "fp16")


def start_scaler(scaler: torch.amp.GradScaler, device: torch.device) -> None:
    """Allocate the scaler's two scalars on the device if needed: both or, if memory runs out, none.

    `GradScaler.scale` allocates them when it is first called, and would never allocate the second if that had failed
    (torch 2.15 amp/grad_scaler.py, `_lazy_init_scale_growth_tracker`).
    """
    if scaler.is_enabled() and scaler._growth_tracker is None:  # pyright: ignore[reportPrivateUsage]
        scaler._scale = None  # pyright: ignore[reportPrivateUsage]
        scaler.scale(torch.zeros((), device=device))
