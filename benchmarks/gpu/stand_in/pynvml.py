"""Stands in for nvidia-ml-py in a rehearsal: one card of a name and size that the catalogue has. Only `measure.py` uses it."""

from types import SimpleNamespace

from stand_in_card import RESERVED_BYTES, TOTAL_BYTES, USED_BYTES

nvmlMemory_v2 = 2  # noqa: N816 - NVML's own names


class NVMLError(Exception):
    """What NVML raises where there is no driver."""


def nvmlInit() -> None:  # noqa: N802
    """There is nothing to begin."""


def nvmlDeviceGetHandleByIndex(index: int) -> int:  # noqa: N802
    """The index itself."""
    return index


def nvmlDeviceGetMemoryInfo(handle: int, version: int) -> SimpleNamespace:  # noqa: N802
    """Nothing uses the card."""
    del handle, version
    free_bytes = TOTAL_BYTES - RESERVED_BYTES - USED_BYTES
    return SimpleNamespace(total=TOTAL_BYTES, reserved=RESERVED_BYTES, free=free_bytes, used=USED_BYTES)


def nvmlDeviceGetName(handle: int) -> str:  # noqa: N802
    """A card of the catalogue."""
    del handle
    return "NVIDIA H200"


def nvmlSystemGetDriverVersion() -> str:  # noqa: N802
    """Of no driver."""
    return "rehearsal"
