"""CUDA calls of a case, answered on a machine without a GPU: the scripts run from end to end, and their figures mean nothing.

`install` replaces what `one_case.py`, `kernels.py` and `trainfit.measuring.trial` ask of `torch.cuda`; tensors for "cuda" are made
on the CPU. The allocator that is shown counts up by a MiB with every reading, so that each field has a value of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from stand_in_card import RESERVED_BYTES, TOTAL_BYTES, USED_BYTES
from torch.overrides import TorchFunctionMode

MIB = 2**20
CONTEXT_BYTES = 500 * MIB
readings = {"number": 0}


class OnTheCpu(TorchFunctionMode):
    """Whatever is asked for on "cuda" is made on the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with another device."""
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def memory_stats() -> dict[str, int]:
    """The allocator's figures."""
    readings["number"] += 1
    held = (100 + readings["number"]) * MIB
    stats = {"num_alloc_retries": 0, "num_device_alloc": readings["number"]}
    for name, nbytes in (("requested", held - MIB // 2), ("allocated", held), ("reserved", held + 20 * MIB)):
        stats |= {f"{name}_bytes.all.{which}": nbytes for which in ("current", "peak")}
    return stats


def mem_get_info() -> tuple[int, int]:
    """(free, total) bytes of the device."""
    held = (120 + readings["number"]) * MIB
    return TOTAL_BYTES - RESERVED_BYTES - USED_BYTES - CONTEXT_BYTES - held, TOTAL_BYTES


def _nothing(*_args: object, **_kwargs: object) -> None:
    """Answer with nothing."""


def _answer(value: object) -> Callable[..., object]:
    """Answer with `value`."""
    return lambda *_args, **_kwargs: value


def install() -> torch.device:
    """Replace the calls, for this process; the device that tensors are on."""
    properties = type("Properties", (), {"name": "NVIDIA H200", "major": 9, "minor": 0})
    replaced: dict[str, Any] = {
        **dict.fromkeys(("init", "synchronize", "empty_cache", "reset_peak_memory_stats"), _nothing),
        "set_per_process_memory_fraction": _nothing,
        "memory_stats": memory_stats,
        "mem_get_info": mem_get_info,
        "get_device_properties": _answer(properties),
    }
    for name, member in replaced.items():
        setattr(torch.cuda, name, member)
    torch.cuda.memory._record_memory_history = _nothing  # pyright: ignore
    torch.cuda.memory._snapshot = _answer({"segments": [], "device_traces": [[]]})  # pyright: ignore
    OnTheCpu().__enter__()
    return torch.device("cpu")
