"""Detects the GPUs of this machine through NVML, and chooses the card to plan for."""
# ruff: noqa: N802, N815 - the members of Nvml have NVML's own names

import contextlib
import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from trainfit.errors import TrainfitError
from trainfit.gpus.capability import has_bf16, has_flash_attention
from trainfit.gpus.catalogue import FLOPS_RATES, GIB, Gpu, chosen_gpu, match_driver_name, scaled

Handle = Any
"""NVML's device handle; opaque here."""


class Nvml(Protocol):
    """The part of nvidia-ml-py that is used here, so that a recorded machine can stand in for it."""

    NVMLError: type[Exception]
    NVMLError_DriverNotLoaded: type[Exception]
    NVMLError_LibraryNotFound: type[Exception]
    NVMLError_NotFound: type[Exception]
    NVMLError_NotSupported: type[Exception]
    nvmlMemory_v2: int

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str: ...
    def nvmlSystemGetProcessName(self, pid: int) -> str: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Handle: ...
    def nvmlDeviceGetName(self, handle: Handle) -> str: ...
    def nvmlDeviceGetUUID(self, handle: Handle) -> str: ...
    def nvmlDeviceGetMemoryInfo(self, handle: Handle, version: int) -> Any: ...
    def nvmlDeviceGetCudaComputeCapability(self, handle: Handle) -> tuple[int, int]: ...
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Handle) -> Sequence[Any]: ...
    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Handle) -> Sequence[Any]: ...
    def nvmlDeviceGetMigMode(self, handle: Handle) -> Sequence[int]: ...
    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Handle) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Handle, index: int) -> Handle: ...
    def nvmlDeviceGetAttributes(self, handle: Handle) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class GpuProcess:
    """Another process that uses memory of the card."""

    pid: int
    """The driver's process id; in a container, this process itself may appear under another id."""
    name: str | None
    """Name of the program; None if the process runs in another container."""
    used_bytes: int | None
    """Memory that it uses; None if the driver does not report it (Windows)."""


@dataclass(frozen=True, kw_only=True)
class DetectedGpu:
    """A device that can be trained on: a card, or a MIG slice of one."""

    index: int
    """NVML's index of the card. CUDA may number cards otherwise; `uuid` is safe for CUDA_VISIBLE_DEVICES."""
    uuid: str
    """GPU-... or MIG-..."""
    driver_name: str
    """The driver's name of the card."""
    driver_version: str
    """Such as 580.65.06."""
    mig: bool
    """True for a slice."""
    gpu: Gpu
    """Catalogue row with the measured memory; without rates if the catalogue has no such card."""
    free_bytes: int
    """Free memory; memory of this process counts as used."""
    processes: tuple[GpuProcess, ...]
    """Other processes on the card, largest first."""

    @property
    def total_bytes(self) -> int:
        """Memory that programs can use in total: the card's memory less what the driver keeps."""
        return self.gpu.memory_bytes


def detect_gpus(nvml: Nvml | None = None) -> tuple[DetectedGpu, ...]:
    """All NVIDIA devices of this machine, in NVML's order; none if there is no driver.

    A card in MIG mode is listed as its slices.

    Raises:
        TrainfitError: nvidia-ml-py is missing, or the driver does not respond (the memory query needs driver 510 or later,
            and Jetson has none).
    """
    nvml = nvml or _import_nvml()
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        return ()
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        devices: list[DetectedGpu] = []
        for index, handle in enumerate(handles):
            devices += _devices(nvml, index, handle)
        return tuple(devices)
    except nvml.NVMLError as error:
        raise TrainfitError(f"the NVIDIA driver did not respond ({error}): name the card with --gpu") from error
    finally:
        nvml.nvmlShutdown()


def card_of(gpu: str | Gpu | None, memory: str | None, note: Callable[[str], None], *, gpus: int = 1) -> Gpu:
    """The card with a name, a memory size or both, or given as a value; the card of this machine (`gpu_here`) if none is given.

    Raises:
        TrainfitError: the name is unknown, or this machine has no NVIDIA GPU, or fewer than `gpus`.
    """
    if isinstance(gpu, Gpu):
        return gpu
    return gpu_here(note, gpus) if gpu is None and memory is None else chosen_gpu(gpu, memory)


def gpu_here(note: Callable[[str], None], gpus: int = 1) -> Gpu:
    """The card with the least free memory of the first `gpus` that this process can use, with its free memory.

    All ranks train with equal shares, so the smallest card decides. `note` is called if other programs use memory of it.

    Raises:
        TrainfitError: this machine has no NVIDIA GPU, or fewer than `gpus`.
    """
    cards = visible(detect_gpus())
    if not cards:
        raise TrainfitError("this machine has no GPU: name one with --gpu NAME, or give --memory 8GiB")
    if len(cards) < gpus:
        raise TrainfitError(
            f"--gpus {gpus}: this machine has {len(cards)}: name the card of another one with --gpu NAME"
        )
    least = least_free(cards[: max(1, gpus)])
    used_bytes = sum(process.used_bytes or 0 for process in least.processes)
    if used_bytes:
        names = ", ".join(f"{process.name or process.pid}" for process in least.processes)
        note(f"{used_bytes / GIB:.1f} GiB of {least.gpu.name} are used by {names}")
    return with_free_memory(least)


def least_free(cards: Sequence[DetectedGpu]) -> DetectedGpu:
    """The card with the least free memory, which decides what ranks with equal shares can do."""
    return min(cards, key=lambda card: card.free_bytes)


def with_free_memory(detected: DetectedGpu) -> Gpu:
    """The card with its free memory as its memory."""
    return replace(detected.gpu, memory_bytes=detected.free_bytes, memory_is_nominal=False)


def visible(detected: Sequence[DetectedGpu]) -> list[DetectedGpu]:
    """The devices in CUDA_VISIBLE_DEVICES, in its order; all devices if it is not set.

    As in CUDA, the list ends at the first name that no device has.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return list(detected)
    shown: list[DetectedGpu] = []
    for name in map(str.strip, names.split(",")):
        named = [gpu for gpu in detected if name and (name == str(gpu.index) or gpu.uuid.startswith(name))]
        if not named:
            break
        shown += named
    return shown


def _import_nvml() -> Nvml:
    try:
        return cast(Nvml, importlib.import_module("pynvml"))
    except ModuleNotFoundError as error:
        raise TrainfitError("finding GPUs needs nvidia-ml-py: pip install 'trainfit[gpu]'") from error


def _devices(nvml: Nvml, index: int, card: Handle) -> list[DetectedGpu]:
    """The card, or its slices if it is in MIG mode (without slices, CUDA cannot use the card)."""
    gpu = _card(nvml, card)
    slices = _mig_slices(nvml, card)
    devices = [(card, gpu)] if slices is None else [(handle, _slice(nvml, handle, gpu)) for handle in slices]
    return [
        DetectedGpu(
            index=index,
            uuid=nvml.nvmlDeviceGetUUID(handle),
            driver_name=nvml.nvmlDeviceGetName(handle),
            driver_version=nvml.nvmlSystemGetDriverVersion(),
            mig=handle is not card,
            gpu=device,
            free_bytes=_memory(nvml, handle).free,
            processes=_other_processes(nvml, handle),
        )
        for handle, device in devices
    ]


def _memory(nvml: Nvml, handle: Handle) -> Any:
    """Memory information, version 2: version 1 counts the driver's memory as available to programs."""
    return nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)


def _card(nvml: Nvml, handle: Handle) -> Gpu:
    """The catalogue's row with the measured memory, or the driver's information for a card that is not in the catalogue."""
    name = nvml.nvmlDeviceGetName(handle)
    memory = _memory(nvml, handle)
    capability = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    row = match_driver_name(name, memory.total) or Gpu(
        name=name,
        capability=capability,
        memory_bytes=memory.total,
        nominal_memory_bytes=memory.total,
        memory_is_nominal=True,
        has_bf16=has_bf16(capability),
        has_flash_attention=has_flash_attention(capability),
        note="Not in the catalogue: no rates.",
    )
    return replace(row, memory_bytes=memory.total - memory.reserved, memory_is_nominal=False)


def _mig_slices(nvml: Nvml, card: Handle) -> list[Handle] | None:
    try:
        if not nvml.nvmlDeviceGetMigMode(card)[0]:
            return None
    except nvml.NVMLError_NotSupported:  # most cards have no MIG
        return None
    slices: list[Handle] = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(card)):
        with contextlib.suppress(nvml.NVMLError_NotFound):  # NVML numbers slots, used or not
            slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index))
    return slices


def _slice(nvml: Nvml, handle: Handle, card: Gpu) -> Gpu:
    """A MIG slice: rates scaled by its share of SMs, and bandwidth by its share of memory."""
    memory = _memory(nvml, handle)
    usable_bytes = memory.total - memory.reserved
    sm_count = nvml.nvmlDeviceGetAttributes(handle).multiprocessorCount
    share = sm_count / card.sm_count if card.sm_count else None
    return replace(
        card,
        **{rate: scaled(getattr(card, rate), share) for rate in FLOPS_RATES},
        name=nvml.nvmlDeviceGetName(handle),
        memory_bytes=usable_bytes,
        nominal_memory_bytes=memory.total,
        sm_count=sm_count,
        bandwidth_bytes_per_s=scaled(card.bandwidth_bytes_per_s, usable_bytes / card.memory_bytes),
    )


def _other_processes(nvml: Nvml, handle: Handle) -> tuple[GpuProcess, ...]:
    """Other processes on the device; one that draws and computes is in both of NVML's lists, with the same memory."""
    running = [
        *nvml.nvmlDeviceGetComputeRunningProcesses(handle),
        *nvml.nvmlDeviceGetGraphicsRunningProcesses(handle),
    ]
    used = {process.pid: process.usedGpuMemory for process in running if process.pid != os.getpid()}
    processes = [GpuProcess(pid=pid, name=_process_name(nvml, pid), used_bytes=size) for pid, size in used.items()]
    return tuple(sorted(processes, key=lambda process: -(process.used_bytes or 0)))


def _process_name(nvml: Nvml, pid: int) -> str | None:
    try:
        return nvml.nvmlSystemGetProcessName(pid)
    except nvml.NVMLError_NotFound:  # the process runs in another container
        return None
