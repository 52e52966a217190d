"""Autocast of fake CUDA tensors: registers from Python the casts that C++ would make (see `fake_cuda`)."""
# pyright: reportPrivateUsage=false

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
_AUTOCAST_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
_casts: dict[int, tuple[Tensor, Tensor]] = {}
libraries: list[torch.library.Library] = []  # a registration lives as long as its Library


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


def _has_float32(x: Any) -> bool:
    if isinstance(x, (list, tuple)):
        return any(_has_float32(each) for each in x)
    return _castable(x) and x.dtype == torch.float32


def _autocasting(op: OpOverload, policy: str) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEY):
            if policy == "FP32_SET_OPT_DTYPE":
                arguments = dict(zip(names, args, strict=False)) | kwargs
                if _castable(args[0]) and args[0].dtype in HALF and arguments.get("dtype") is None:
                    args = args[: names.index("dtype")]
                    kwargs = {**kwargs, "dtype": torch.float32}
                return op(*args, **kwargs)
            low = torch.get_autocast_dtype("cuda")
            wide = policy == "FP32" or (policy == "PROMOTE" and _has_float32([*args, *kwargs.values()]))
            dtype = torch.float32 if wide else low
            return op(*_cast(args, dtype), **{name: _cast(x, dtype) for name, x in kwargs.items()})

    return call


def _autocast_lists() -> dict[str, list[list[str]]]:
    """Operators by autocast policy, from the header that ships with torch: it is the list C++ itself compiles."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    lists: dict[str, list[list[str]]] = {}
    for policy in ("LOWER_PRECISION_FP", "FP32", "FP32_SET_OPT_DTYPE", "PROMOTE"):
        macro = re.search(rf"#define AT_FORALL_{policy}\(_\)(.*?)\n\n", header, re.S)
        assert macro is not None, f"torch's autocast_mode.h has no AT_FORALL_{policy}"
        lists[policy] = [re.split(r"\s*,\s*", entry) for entry in re.findall(r"_\(([^()]*)\)", macro[1])]
    return lists


def _override(library: torch.library.Library, name: str, kernel: Callable[..., Any]) -> None:
    with warnings.catch_warnings():
        # Up to torch 2.11 an override warns even with allow_override.
        warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
        library.impl(name, kernel, allow_override=True)


def register_autocast() -> None:
    library = torch.library.Library("aten", "IMPL", "AutocastCUDA")
    libraries.append(library)
    for policy, entries in _autocast_lists().items():
        for name, *overload in entries:
            packet = getattr(aten, name, None)
            which = overload[0] if overload else "default"
            if packet is None or which not in packet.overloads():
                continue  # The header also names a few functions (e.g. deprecated ones) that are not operators.
            qualified = name if which == "default" else f"{name}.{which}"
            _override(library, qualified, _autocasting(getattr(packet, which), policy))


def _in_fp32(op: OpOverload) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEY):
            out = op(*_cast(args, torch.float32))
            return _cast(out, args[0].dtype) if args[0].is_floating_point() else out

    return call


def register_torchvision() -> None:
    """Register torchvision's autocast kernels, which run in float32, if the traced code has imported torchvision."""
    if "torchvision" not in sys.modules or any(library.ns == "torchvision" for library in libraries):
        return
    library = torch.library.Library("torchvision", "IMPL", "AutocastCUDA")
    libraries.append(library)
    for name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d", "nms"):
        _override(library, name, _in_fp32(getattr(torch.ops.torchvision, name).default))


def clear_casts() -> None:
    """Drop the cached casts of parameters, as leaving autocast does."""
    _casts.clear()
