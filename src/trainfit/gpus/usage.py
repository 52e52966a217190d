"""Reads the current utilisation, power and memory of a GPU through NVML."""
# ruff: noqa: N802 - the members of UsageNvml have NVML's own names

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

from trainfit.gpus.detect import Handle, Nvml

Value = TypeVar("Value")


class UsageNvml(Nvml, Protocol):
    """The part of nvidia-ml-py that is used here."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Handle: ...
    def nvmlDeviceGetUtilizationRates(self, handle: Handle) -> Any: ...
    def nvmlDeviceGetPowerUsage(self, handle: Handle) -> int: ...


@dataclass(frozen=True, kw_only=True)
class GpuUsage:
    """One reading; None where the driver does not report a value (no NVML, a MIG slice, power on some laptops)."""

    gpu_utilization: float | None = None
    """Share of the driver's last sample period (1/6 to 1 s) in which any kernel ran (0..1); not the occupancy of the GPU."""
    gpu_power_w: float | None = None
    """Power draw in watts."""
    gpu_memory_used_bytes: int | None = None
    """Memory used by all processes."""


def usage_meter(uuid: str, nvml: UsageNvml | None = None) -> Callable[[], GpuUsage]:
    """Return a function that reads the GPU with this NVML uuid ("GPU-..."). NVML is initialised once.

    Without nvidia-ml-py, a driver or that GPU, every reading is empty.
    """
    try:
        library = nvml or cast(UsageNvml, importlib.import_module("pynvml"))
    except ModuleNotFoundError:
        return GpuUsage
    try:
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByUUID(uuid)
    except library.NVMLError:
        return GpuUsage

    def reading(ask: Callable[[], Value]) -> Value | None:
        try:
            return ask()
        except library.NVMLError:
            return None

    def read() -> GpuUsage:
        percent = reading(lambda: library.nvmlDeviceGetUtilizationRates(handle).gpu)
        milliwatts = reading(lambda: library.nvmlDeviceGetPowerUsage(handle))
        memory = reading(lambda: library.nvmlDeviceGetMemoryInfo(handle, version=library.nvmlMemory_v2))
        return GpuUsage(
            gpu_utilization=None if percent is None else percent / 100,
            gpu_power_w=None if milliwatts is None else milliwatts / 1000,
            gpu_memory_used_bytes=None if memory is None else memory.used,
        )

    return read
