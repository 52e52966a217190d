"""Make fake CUDA tensors behave as they would on a given card, on a machine without one.

A FakeTensor has shapes and strides but no bytes. Python sees it on `cuda`, but much of PyTorch's C++ asks
`tensor.is_cuda()` and then wants a driver: the autograd engine looks for streams, autocast for eligible tensors,
attention, batch norm and dropout for their CUDA kernels. Here C++ is told "meta" (`answer_device`), so that it wants
nothing, and what it would have decided for CUDA is registered again from Python.

What the tracer replaces in torch is replaced in this file, in `fakeify` and in `Shadows.patch_numpy`, global and for
good: use a process of its own (`trace_in_subprocess`), behind `selftest`. Seen working on torch 2.15.

Known limits: recurrent layers are traced as unrolled loops instead of cuDNN's; a norm under autocast keeps its input's
dtype; what a kernel allocates within itself (workspaces, contiguous copies) is not a tensor and is not seen here.
"""
# pyright: reportPrivateUsage=false

import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.cuda.amp.common
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import _foreach_supported_types as optimizer_foreach_types
from torch.utils._foreach_utils import _foreach_supported_types as foreach_types

aten = torch.ops.aten
PRIM_DEVICE = torch.ops.prim.device.default
CUDA = torch.device("cuda", 0)
META = torch.device("meta")
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The card that the trace is for."""

    capability: tuple[int, int]
    """Compute capability, e.g. (8, 6)."""
    fused_attention: bool = True
    """False traces attention as separate matrix products and softmax, as torch before 2.0 ran it."""


def answer_device(tensor: FakeTensor) -> torch.device:
    """What C++ is told when it asks a fake tensor for its device: "meta" for CUDA, so that it wants no driver."""
    return META if tensor.fake_device.type == "cuda" else tensor.fake_device


def on_cuda(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A C++ factory that copies the options of a CUDA tensor asks for "meta" (`answer_device`): give it CUDA."""
    device = kwargs.get("device")
    return kwargs if device is None or torch.device(device).type != "meta" else {**kwargs, "device": CUDA}


_CONTIGUOUS = {
    aten.native_layer_norm.default, aten.native_layer_norm_backward.default,
    aten.native_group_norm.default, aten.native_group_norm_backward.default,
}  # fmt: skip


def laid_out(op: OpOverload, out: Any) -> Any:
    """`out` with the strides that the CUDA kernel gives it, where torch's shape function says otherwise.

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
    half, capability = query.dtype in HALF, target.capability
    head, sizes = query.shape[-1], {query.shape[-1], key.shape[-1], value.shape[-1]}
    train = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    backends = torch.backends.cuda
    if (
        backends.cudnn_sdp_enabled()
        and capability in ((9, 0), (10, 0))
        and half
        and all(size % 8 == 0 and size <= (256 if capability == (9, 0) else 128) for size in sizes)
        and not (train and max(sizes) > 128)
        and key.shape[-2] > 1
        and not (query.shape[-2] == 1 and dropout > 0)
    ):
        return "cudnn"
    small_shared_memory = capability in ((8, 6), (8, 9), (12, 0), (12, 1))
    if (
        backends.flash_sdp_enabled()
        and half
        and capability >= (8, 0)
        and mask is None
        and len(sizes) == 1
        and head <= 256
        and not (train and small_shared_memory and (192 < head <= 224 or (head > 224 and dropout > 0)))
        and not (causal and query.shape[-2] != key.shape[-2])
    ):
        return "flash"
    align = (8 if half else 4) if capability >= (8, 0) else (8 if half and capability >= (7, 0) else 1)
    if (
        backends.mem_efficient_sdp_enabled()
        and query.shape[1] == key.shape[1]
        and query.shape[-1] == key.shape[-1]
        and all(size % align == 0 for size in sizes)
        and query.dtype in ((torch.float32, *HALF) if capability >= (8, 0) else (torch.float32, torch.float16))
    ):
        return "efficient"
    return "math"


def _additive_mask(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask as the fused kernels take it: floating point, rows padded to the alignment, expanded to the heads."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    length, align = mask.shape[-1], 8 if query.dtype in HALF else 4
    if length % align:
        mask = torch.nn.functional.pad(mask, (0, align - length % align))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _fused_attention(target: Target) -> Callable[..., Tensor]:
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
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(attn_mask.logical_not(), float("-inf")) if boolean else scores + attn_mask
    return torch.dropout(scores.softmax(-1), dropout_p, True) @ value


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


# ---- autocast -------------------------------------------------------------------------------------------------------
_AUTOCAST_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
_casts: dict[int, tuple[Tensor, Tensor]] = {}
_libraries: list[torch.library.Library] = []  # a registration lives as long as its Library
_installed: list[Target] = []


def _castable(x: object) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda" and x.is_floating_point()


def _cast(x: Any, dtype: torch.dtype) -> Any:
    """`x` with every eligible tensor in it cast; a parameter's cast is kept until autocast is left, as C++ does."""
    if isinstance(x, (list, tuple)):
        return type(x)(_cast(each, dtype) for each in x)
    if not _castable(x) or x.dtype in (torch.float64, dtype):
        return x
    keep = dtype in HALF and x.dtype == torch.float32 and x.requires_grad and x.is_leaf and x._base is None
    if not (keep and torch.is_autocast_cache_enabled()):
        return x.to(dtype)
    if id(x) not in _casts:
        _casts[id(x)] = (x, x.to(dtype))
    return _casts[id(x)][1]


def _widest(x: Any) -> bool:
    if isinstance(x, (list, tuple)):
        return any(_widest(each) for each in x)
    return _castable(x) and x.dtype == torch.float32


def _autocasting(op: OpOverload, policy: str) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEY):
            if policy == "FP32_SET_OPT_DTYPE":
                given = dict(zip(names, args, strict=False)) | kwargs
                if _castable(args[0]) and args[0].dtype in HALF and given.get("dtype") is None:
                    args, kwargs = args[: names.index("dtype")], {**kwargs, "dtype": torch.float32}
                return op(*args, **kwargs)
            low = torch.get_autocast_dtype("cuda")
            wide = policy == "FP32" or (policy == "PROMOTE" and _widest([*args, *kwargs.values()]))
            dtype = torch.float32 if wide else low
            return op(*_cast(args, dtype), **{name: _cast(x, dtype) for name, x in kwargs.items()})

    return call


def _autocast_lists() -> dict[str, list[list[str]]]:
    """Operators by autocast policy, from the header that ships with torch: it is the list C++ itself compiles."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    lists: dict[str, list[list[str]]] = {}
    for policy in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        macro = re.search(rf"#define AT_FORALL_{policy}\(_\)(.*?)\n\n", header, re.S)
        assert macro is not None, f"AT_FORALL_{policy} is gone from torch's autocast_mode.h"
        lists[policy] = [re.split(r"\s*,\s*", entry) for entry in re.findall(r"_\(([^()]*)\)", macro[1])]
    return lists


def _override(library: torch.library.Library, name: str, kernel: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        # Up to torch 2.11 an override warns, though it is asked for.
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        library.impl(name, kernel, allow_override=True)


def _register_autocast() -> None:
    library = torch.library.Library("aten", "IMPL", "AutocastCUDA")
    _libraries.append(library)
    for policy, entries in _autocast_lists().items():
        for name, *overload in entries:
            packet = getattr(aten, name, None)
            which = overload[0] if overload else "default"
            if packet is None or which not in packet.overloads():
                continue  # The header names a few functions (e.g. deprecated ones) that are no operators.
            qualified = name if which == "default" else f"{name}.{which}"
            _override(library, qualified, _autocasting(getattr(packet, which), policy))


def _in_fp32(op: OpOverload) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEY):
            out = op(*_cast(args, torch.float32))
            return _cast(out, args[0].dtype) if args[0].is_floating_point() else out

    return call


def register_torchvision() -> None:
    """Torchvision's autocast kernels (float32 inside), if the traced code has imported torchvision."""
    if "torchvision" not in sys.modules or any(library.ns == "torchvision" for library in _libraries):
        return
    library = torch.library.Library("torchvision", "IMPL", "AutocastCUDA")
    _libraries.append(library)
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d", "nms"):
        _override(library, name, _in_fp32(getattr(torch.ops.torchvision, name).default))


# ---- installation ---------------------------------------------------------------------------------------------------
def _patch_python(target: Target) -> None:
    group = torch._C._group_tensors_by_device_and_dtype

    def group_by_device(tensors: Any, with_indices: bool = False) -> Any:
        groups = group(tensors, with_indices)
        return {(CUDA if dev.type == "meta" else dev, dtype): found for (dev, dtype), found in groups.items()}

    torch._C._group_tensors_by_device_and_dtype = group_by_device
    for supported in (optimizer_foreach_types, foreach_types):
        supported.append(FakeTensor)
    replace(torch._C, _group_tensors_by_device_and_dtype=group_by_device)
    replace(FakeTensor, is_cuda=property(_is_on("cuda")), is_cpu=property(_is_on("cpu")))
    replace(torch, _shape_as_tensor=_shape_as_tensor, clear_autocast_cache=_casts.clear)
    replace(torch.cuda.amp.common, amp_definitely_not_available=_answer(False))
    replace(
        torch.cuda,
        is_bf16_supported=lambda including_emulation=True: including_emulation or target.capability >= (8, 0),
        get_device_capability=_answer(target.capability),
        current_device=_answer(0),
        synchronize=_answer(None),
        get_rng_state=_answer(torch.zeros(16, dtype=torch.uint8)),
        set_rng_state=_answer(None),
    )


def _answer(value: object) -> Callable[..., object]:
    return lambda *_args, **_kwargs: value


def _is_on(device_type: str) -> Callable[[FakeTensor], bool]:
    return lambda tensor: tensor.fake_device.type == device_type


def _shape_as_tensor(tensor: Tensor) -> Tensor:
    return torch.tensor(list(tensor.shape))


def replace(owner: object, **members: Any) -> None:
    """Set attributes of a module or class of torch."""
    for name, member in members.items():
        setattr(owner, name, member)


def install(target: Target) -> None:
    """Make this process trace for `target`: global and for good, so a process traces for one target only."""
    if _installed:
        assert _installed == [target], f"this process traces for {_installed[0]}, not for {target}"
        return
    _installed.append(target)
    _register_autocast()
    library = torch.library.Library("aten", "IMPL", "AutogradCUDA")
    _libraries.append(library)
    attention = _fused_attention(target) if target.fused_attention else _unfused_attention
    library.impl("scaled_dot_product_attention", attention, allow_override=True)
    library.impl("batch_norm", _batch_norm, allow_override=True)
    library.impl("dropout", _dropout, allow_override=True)
    library.impl("linear", _linear, allow_override=True)
    library.impl("softmax.int", _softmax(aten._softmax), allow_override=True)
    library.impl("log_softmax.int", _softmax(aten._log_softmax), allow_override=True)
    if not target.fused_attention:  # Its parts are cast one by one: softmax in float32, products in half precision.
        _libraries[0].impl("scaled_dot_product_attention", attention, allow_override=True)
    _patch_python(target)
