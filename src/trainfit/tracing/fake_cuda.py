"""Make fake CUDA tensors behave as they would on a given card, on a machine without one.

A FakeTensor has shapes and strides but no bytes. Python sees it on `cuda`, but much of PyTorch's C++ asks
`tensor.is_cuda()` and then needs a driver: the autograd engine looks for streams, autocast for eligible tensors,
attention, batch norm and dropout for their CUDA kernels. Here C++ sees the device "meta" (`device_for_cpp`) and needs no
driver, and what it would have chosen for CUDA is registered from Python instead.

Everything that the tracer replaces in torch is replaced in this file, in `fakeify` and in `Shadows.patch_numpy`. The
changes are global and permanent: run it in a separate process (`client.run`), after `selftest`. Works with torch 2.11 and
2.15.

Known limits: recurrent layers are traced as unrolled loops instead of cuDNN's; a norm under autocast keeps its input's
dtype; memory that a kernel allocates internally (workspaces, contiguous copies) is not a tensor and is not recorded here.
"""
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.cuda.amp.common
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import _foreach_supported_types as optimizer_foreach_types
from torch.utils._foreach_utils import _foreach_supported_types as foreach_types

from trainfit.gpus.capability import (
    CUDNN_ATTENTION,
    SMALL_SHARED_MEMORY,
    attention_alignment,
    has_bf16,
    has_flash_attention,
)
from trainfit.tracing.fake_autocast import HALF, clear_casts, libraries, register_autocast

aten = torch.ops.aten
PRIM_DEVICE = torch.ops.prim.device.default
CUDA = torch.device("cuda", 0)
META = torch.device("meta")


@dataclass(frozen=True, kw_only=True)
class Target:
    """The card that the trace is for."""

    capability: tuple[int, int]
    """Compute capability, e.g. (8, 6)."""
    fused_attention: bool = True
    """False traces attention as separate matrix products and softmax, as torch before 2.0 ran it."""


def device_for_cpp(tensor: FakeTensor) -> torch.device:
    """The device that C++ sees for a fake tensor: "meta" instead of CUDA, so that it needs no driver."""
    return META if tensor.fake_device.type == "cuda" else tensor.fake_device


def with_cuda_device(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """`kwargs` with CUDA for "meta": a C++ factory that copies the options of a CUDA tensor passes "meta" (`device_for_cpp`)."""
    device = kwargs.get("device")
    return kwargs if device is None or torch.device(device).type != "meta" else {**kwargs, "device": CUDA}


_CONTIGUOUS = {
    aten.native_layer_norm.default, aten.native_layer_norm_backward.default,
    aten.native_group_norm.default, aten.native_group_norm_backward.default,
}  # fmt: skip


def with_cuda_strides(op: OpOverload, out: Any) -> Any:
    """`out` with the strides that the CUDA kernel returns, where torch's shape function gives others.

    Layer and group norm return contiguous tensors for any input (pytorch `native/cuda/layer_norm_kernel.cu`).
    """
    if op not in _CONTIGUOUS or out[0] is None or out[0].is_contiguous():
        return out
    return (torch.empty(out[0].shape, dtype=out[0].dtype, device=out[0].device), *out[1:])


def attention_kernel(
    target: Target, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, dropout: float, causal: bool
) -> str:
    """The kernel that torch picks for scaled_dot_product_attention: "cudnn", "flash", "efficient" or "math".

    Order and conditions: pytorch `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, select_sdp_backend
    (cuDNN comes first on capability 9.0 and 10.0 only). `query` is [batch, heads, length, head_dim].
    """
    if query.dim() != 4:
        return "math"
    half = query.dtype in HALF
    capability = target.capability
    head = query.shape[-1]
    sizes = {head, key.shape[-1], value.shape[-1]}
    train = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    backends = torch.backends.cuda
    if (
        backends.cudnn_sdp_enabled()
        and capability in CUDNN_ATTENTION
        and half
        and all(size % 8 == 0 and size <= (256 if capability == (9, 0) else 128) for size in sizes)
        and not (train and max(sizes) > 128)
        and key.shape[-2] > 1
        and not (query.shape[-2] == 1 and dropout > 0)
    ):
        return "cudnn"
    small_shared_memory = capability in SMALL_SHARED_MEMORY
    if (
        backends.flash_sdp_enabled()
        and half
        and has_flash_attention(capability)
        and mask is None
        and len(sizes) == 1
        and head <= 256
        and not (train and small_shared_memory and (192 < head <= 224 or (head > 224 and dropout > 0)))
        and not (causal and query.shape[-2] != key.shape[-2])
    ):
        return "flash"
    align = attention_alignment(capability, half=half)
    if (
        backends.mem_efficient_sdp_enabled()
        and query.shape[1] == key.shape[1]
        and query.shape[-1] == key.shape[-1]
        and all(size % align == 0 for size in sizes)
        and query.dtype in ((torch.float32, *HALF) if has_bf16(capability) else (torch.float32, torch.float16))
    ):
        return "efficient"
    return "math"


def _additive_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the fused kernels take it: floating point, rows padded to the alignment, expanded to the heads."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    length = mask.shape[-1]
    align = 8 if query.dtype in HALF else 4
    if length % align:
        mask = torch.nn.functional.pad(mask, (0, align - length % align))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _attention(target: Target) -> Callable[..., Tensor]:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not target.fused_attention:
            if enable_gqa:
                repeats = query.shape[1] // key.shape[1]
                key = key.repeat_interleave(repeats, 1)
                value = value.repeat_interleave(repeats, 1)
            return _unfused_attention(query, key, value, attn_mask, dropout_p, is_causal, scale)
        kernel = attention_kernel(target, query, key, value, mask=attn_mask, dropout=dropout_p, causal=is_causal)
        head = query.shape[-1]
        if kernel == "math":
            return aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
        if kernel == "flash":
            padded = [torch.nn.functional.pad(t, (0, -head % 8)) if head % 8 else t for t in (query, key, value)]
            scale = head**-0.5 if scale is None else scale
            out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
            return out[..., :head] if head % 8 else out
        mask = None if attn_mask is None else _additive_mask(attn_mask, query, key)
        train = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        arguments = (query, key, value, mask, train, dropout_p, is_causal)
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(*arguments, False, scale=scale)[0]
        return aten._scaled_dot_product_efficient_attention(*arguments, scale=scale)[0]

    return attention


def _unfused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        boolean = mask.dtype == torch.bool
        scores = scores.masked_fill(mask.logical_not(), float("-inf")) if boolean else scores + mask
    return torch.dropout(scores.softmax(-1), dropout, True) @ value


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool,
) -> Tensor:
    """CuDNN or native, by the conditions of pytorch `native/Normalization.cpp`, _select_batch_norm_backend."""
    if (
        cudnn
        and torch.bfloat16 not in (x.dtype, None if weight is None else weight.dtype)
        and weight is not None
        and bias is not None
        and (x.dtype != torch.float16 or weight.dtype == torch.float32)
        and ((mean is None) == (var is None) and (training or mean is not None))
        and x.dim() >= 3
        and eps >= 1e-5
    ):
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return aten.cudnn_batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]
    return aten.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    if not train or p == 0 or x.numel() == 0:
        return x
    return aten.native_dropout(x, p, train)[0] if p < 1 else x * torch.zeros((), device=x.device, dtype=x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As pytorch `native/Linear.cpp` on CUDA; under a dispatch mode it would add the bias out of place."""
    if bias is not None and x.dim() == 2:
        return torch.addmm(bias, x, weight.t())
    if bias is not None and x.dim() > 2 and x.is_contiguous():
        flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t())
        return aten._unsafe_view(flat, [*x.shape[:-1], len(weight)])
    out = torch.matmul(x, weight.t())
    return out if bias is None else out.add_(bias)


def _softmax(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        """float16 in, float32 out is one kernel on CUDA (pytorch `native/SoftMax.cpp`)."""
        if x.dtype == torch.float16 and dtype == torch.float32:
            return kernel(x, dim, True)
        return kernel(x if dtype is None else x.to(dtype), dim, False)

    return softmax


_installed: list[Target] = []


# ---- installation ---------------------------------------------------------------------------------------------------
def _patch_python(target: Target) -> None:
    group = torch._C._group_tensors_by_device_and_dtype

    def group_by_device(tensors: Any, with_indices: bool = False) -> Any:
        groups = group(tensors, with_indices)
        return {(CUDA if dev.type == "meta" else dev, dtype): members for (dev, dtype), members in groups.items()}

    torch._C._group_tensors_by_device_and_dtype = group_by_device
    for supported in (optimizer_foreach_types, foreach_types):
        supported.append(FakeTensor)
    replace(torch._C, _group_tensors_by_device_and_dtype=group_by_device)
    replace(FakeTensor, is_cuda=property(_is_on("cuda")), is_cpu=property(_is_on("cpu")))
    replace(FakeTensor, to=_to, cuda=_cuda)
    replace(torch, _shape_as_tensor=_shape_as_tensor, clear_autocast_cache=clear_casts)
    replace(torch.cuda.amp.common, amp_definitely_not_available=_constant(False))
    replace(
        torch.cuda,
        is_bf16_supported=lambda including_emulation=True: including_emulation or has_bf16(target.capability),
        get_device_capability=_constant(target.capability),
        current_device=_constant(0),
        synchronize=_constant(None),
        get_rng_state=_constant(torch.zeros(16, dtype=torch.uint8)),
        set_rng_state=_constant(None),
    )


def _constant(value: object) -> Callable[..., object]:
    return lambda *_args, **_kwargs: value


def _to(tensor: FakeTensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, which returns the tensor itself where nothing changes: C++ would compare CUDA with "meta", and copy."""
    if not kwargs.get("copy"):
        options = {name: value for name, value in kwargs.items() if name != "copy"}
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **options)  # pyright: ignore[reportAttributeAccessIssue]
        same_device = device is None or (
            device.type == tensor.device.type and device.index in (None, tensor.device.index)
        )
        if same_device and dtype in (None, tensor.dtype) and layout is None:
            return tensor
    return Tensor.to(tensor, *args, **kwargs)


def _cuda(tensor: FakeTensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return _to(tensor, CUDA)


def _is_on(device_type: str) -> Callable[[FakeTensor], bool]:
    return lambda tensor: tensor.fake_device.type == device_type


def _shape_as_tensor(tensor: Tensor) -> Tensor:
    return torch.tensor(list(tensor.shape))


def replace(owner: object, **members: Any) -> None:
    """Set attributes of a module or class of torch."""
    for name, member in members.items():
        setattr(owner, name, member)


def install(target: Target) -> None:
    """Make this process trace for `target`. The change is global and permanent: a process traces for one target only."""
    if _installed:
        assert _installed == [target], f"this process traces for {_installed[0]}, not for {target}"
        return
    _installed.append(target)
    register_autocast()
    library = torch.library.Library("aten", "IMPL", "AutogradCUDA")
    libraries.append(library)
    attention = _attention(target)
    library.impl("scaled_dot_product_attention", attention, allow_override=True)
    library.impl("batch_norm", _batch_norm, allow_override=True)
    library.impl("dropout", _dropout, allow_override=True)
    library.impl("linear", _linear, allow_override=True)
    library.impl("softmax.int", _softmax(aten._softmax), allow_override=True)
    library.impl("log_softmax.int", _softmax(aten._log_softmax), allow_override=True)
    if not target.fused_attention:  # Its parts are cast one by one: softmax in float32, products in half precision.
        libraries[0].impl("scaled_dot_product_attention", attention, allow_override=True)
    _patch_python(target)
