"""The card catalogue against published numbers, names as typed, and detection on a recorded machine."""

import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import (
    MIB,
    Gpu,
    all_gpus,
    find_gpu,
    gpu_with_memory,
    match_driver_name,
    name_key,
)
from trainfit.gpus.context import (
    CONTEXTS,
    EAGER_CONTEXT,
    EAGER_CONTEXTS,
    UNKNOWN_CONTEXT,
    cublas_workspace_bytes,
    cuda_context_bytes,
    driver_reserved_bytes,
)
from trainfit.gpus.detect import Nvml, detect_gpus

CORES_PER_SM = {(6, 0): 64, (6, 1): 128, (7, 0): 64, (7, 5): 64, (8, 0): 64}
"""CUDA programming guide, arithmetic instructions: fp32 lanes per multiprocessor; 128 from 8.6 on."""


def test_there_are_enough_cards_and_names_mean_one_card() -> None:
    assert len(all_gpus()) >= 60
    keys = [key for gpu in all_gpus() for key in {name_key(name) for name in (gpu.name, *gpu.aliases)}]
    assert sorted(keys) == sorted(set(keys))


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.name)
def test_a_row_is_complete_or_says_why_not(gpu: Gpu) -> None:
    rates = [gpu.fp32_flops_per_s, gpu.tf32_flops_per_s, gpu.fp16_flops_per_s, gpu.bf16_flops_per_s]
    assert gpu.note or None not in (*rates, gpu.bandwidth_bytes_per_s)
    assert gpu.sources
    assert not any(re.search(r"https?:|www\.", source) for source in gpu.sources)
    assert gpu.architecture is not None
    assert gpu.sm_count is not None
    assert (gpu.capability is None) != (gpu.gfx is None)
    assert 0.9 * gpu.nominal_memory_bytes <= gpu.memory_bytes <= gpu.nominal_memory_bytes
    assert gpu.memory_is_nominal == (gpu.memory_bytes == gpu.nominal_memory_bytes)


@pytest.mark.parametrize("gpu", [gpu for gpu in all_gpus() if gpu.capability], ids=lambda gpu: gpu.name)
def test_flags_and_rates_follow_the_capability(gpu: Gpu) -> None:
    assert gpu.capability is not None
    modern = gpu.capability >= (8, 0)
    assert gpu.has_bf16 is modern
    assert gpu.has_flash_attention is modern
    if not modern:
        assert gpu.tf32_flops_per_s is None
        assert gpu.bf16_flops_per_s is None
    elif gpu.tf32_flops_per_s is not None and gpu.fp16_flops_per_s is not None:
        assert gpu.bf16_flops_per_s == gpu.fp16_flops_per_s
        assert gpu.fp16_flops_per_s / gpu.tf32_flops_per_s == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize(
    "gpu", [gpu for gpu in all_gpus() if gpu.capability and gpu.boost_hz], ids=lambda gpu: gpu.name
)
def test_fp32_rate_is_lanes_times_clock(gpu: Gpu) -> None:
    """Catches a digit mistyped in the rate, the SM count or the clock."""
    assert gpu.capability is not None
    assert gpu.sm_count is not None
    assert gpu.boost_hz is not None
    lanes = CORES_PER_SM.get(gpu.capability, 128)
    assert gpu.fp32_flops_per_s == pytest.approx(2 * lanes * gpu.sm_count * gpu.boost_hz, rel=0.02)


@pytest.mark.parametrize(
    ("name", "field", "published"),
    [
        # NVIDIA Turing whitepaper, reference cards: fp16 tensor with fp32 accumulation
        ("RTX 2080 Ti", "fp16_flops_per_s", 53.8e12),
        ("RTX 2070", "fp16_flops_per_s", 29.9e12),
        # NVIDIA T4 datasheet: 65 mixed-precision TFLOPS, 8.1 fp32, 320 GB/s
        ("T4", "fp16_flops_per_s", 65e12),
        ("T4", "bandwidth_bytes_per_s", 320e9),
        # NVIDIA V100 datasheet: SXM2 125 tensor TFLOPS, 900 GB/s
        ("V100 16GB", "fp16_flops_per_s", 125e12),
        # NVIDIA GA102 whitepaper: 71 with fp32 accumulation, 35.6 TF32, 936 GB/s
        ("RTX 3090", "fp16_flops_per_s", 71e12),
        ("RTX 3090", "tf32_flops_per_s", 35.6e12),
        ("RTX 3090", "bandwidth_bytes_per_s", 936e9),
        # NVIDIA A40 datasheet: 37.4 fp32, 74.8 TF32, 149.7 bf16, 696 GB/s
        ("A40", "bf16_flops_per_s", 149.7e12),
        # NVIDIA A100 datasheet: 312 dense bf16, 156 dense TF32; 1,555 and 2,039 GB/s
        ("A100 40GB", "bf16_flops_per_s", 312e12),
        ("A100 80GB", "bandwidth_bytes_per_s", 2039e9),
        # NVIDIA L40 and L40S datasheets, dense column: 181.05 and 362.05
        ("L40", "bf16_flops_per_s", 181.05e12),
        ("L40S", "bf16_flops_per_s", 362.05e12),
        # NVIDIA L4 datasheet: 300 GB/s (torch's own table says 3350), 242 bf16 with sparsity
        ("L4", "bandwidth_bytes_per_s", 300e9),
        ("L4", "bf16_flops_per_s", 242e12 / 2),
        # NVIDIA Ada whitepaper: RTX 4090 165.2 with fp32 accumulation
        ("RTX 4090", "fp16_flops_per_s", 165.2e12),
        # NVIDIA H100 whitepaper: SXM 989.4 and PCIe 756.5 dense bf16
        ("H100 SXM", "bf16_flops_per_s", 989.4e12),
        ("H100 PCIe", "bf16_flops_per_s", 756.5e12),
        # NVIDIA RTX Blackwell whitepapers: RTX 5090 209.5, RTX PRO 6000 503.8 with fp32 accumulation
        ("RTX 5090", "fp16_flops_per_s", 209.5e12),
        ("RTX 5080", "fp16_flops_per_s", 112.6e12),
        ("RTX PRO 6000 Blackwell", "bf16_flops_per_s", 503.8e12),
        # AMD MI100 and MI300X datasheets
        ("MI100", "bf16_flops_per_s", 92.3e12),
        ("MI300X", "bf16_flops_per_s", 1307.4e12),
    ],
)
def test_published_rates(name: str, field: str, published: float) -> None:
    assert getattr(find_gpu(name), field) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(
    ("driver_name", "capability", "memory_mib", "sm_count"),
    [  # torch.cuda.get_device_properties as public logs print it
        ("Tesla P100-PCIE-16GB", (6, 0), 16280, 56),
        ("GeForce GTX 1080", (6, 1), 8118, 20),
        ("Tesla V100-PCIE-16GB", (7, 0), 16160, 80),
        ("Tesla T4", (7, 5), 15095, 40),
        ("NVIDIA A100-PCIE-40GB", (8, 0), 40326, 108),
        ("NVIDIA GeForce RTX 3060", (8, 6), 11931, 28),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", (8, 6), 8191, 48),
        ("NVIDIA RTX A5000", (8, 6), 24114, 64),
        ("NVIDIA RTX A6000", (8, 6), 48676, 84),
        ("NVIDIA A10G", (8, 6), 22587, 80),
        ("NVIDIA A40", (8, 6), 45416, 84),
        ("NVIDIA GeForce RTX 4080", (8, 9), 16049, 76),
        ("NVIDIA L40S", (8, 9), 45589, 142),
        ("NVIDIA H100 80GB HBM3", (9, 0), 81089, 132),
        ("NVIDIA H100 PCIe", (9, 0), 81008, 114),
        ("NVIDIA H200", (9, 0), 143156, 132),
        ("NVIDIA B200", (10, 0), 182631, 148),
        ("NVIDIA GeForce RTX 5080", (12, 0), 16302, 84),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 97250, 188),
    ],
)
def test_rows_agree_with_recorded_devices(
    driver_name: str, capability: tuple[int, int], memory_mib: int, sm_count: int
) -> None:
    gpu = match_driver_name(driver_name, memory_mib * MIB)
    assert gpu is not None
    assert (gpu.capability, gpu.sm_count) == (capability, sm_count)
    assert gpu.memory_bytes == pytest.approx(memory_mib * MIB, rel=0.02)
    assert gpu.memory_is_nominal or gpu.memory_bytes <= memory_mib * MIB  # the lowest total that was seen


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("1650 ti", "GTX 1650 Ti"),
        ("gtx1080ti", "GTX 1080 Ti"),
        ("1060", "GTX 1060 6GB"),
        ("1660 SUPER", "GTX 1660 Super"),
        ("rtx-4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("nvidia geforce rtx 3090", "RTX 3090"),
        ("3060 12gb", "RTX 3060"),
        ("rtx 3060 laptop gpu", "RTX 3060 Laptop"),
        ("4070_ti_super", "RTX 4070 Ti Super"),
        ("4060 ti 16g", "RTX 4060 Ti 16GB"),
        ("t4", "T4"),
        ("v100", "V100 16GB"),
        ("a100", "A100 40GB"),
        ("A100 80", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("h100", "H100 SXM"),
        ("H100-PCIe", "H100 PCIe"),
        ("rtx 6000 ada", "RTX 6000 Ada"),
        ("quadro rtx 6000", "Quadro RTX 6000"),
        ("Titan RTX", "Titan RTX"),
        ("orin nano", "Jetson Orin Nano 8GB"),
        ("mi250x", "MI250X"),
    ],
)
def test_names_as_typed(typed: str, name: str) -> None:
    assert find_gpu(typed).name == name


@given(st.sampled_from(all_gpus()), st.sampled_from(["", " ", "-", "_"]), st.booleans())
def test_spelling_does_not_matter(gpu: Gpu, separator: str, upper: bool) -> None:
    typed = gpu.name.replace(" ", separator)
    assert find_gpu(typed.upper() if upper else typed.lower()) is gpu


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("4060 ti", r"several cards: RTX 4060 Ti 8GB \(7\.6 GiB\), RTX 4060 Ti 16GB \(16\.0 GiB\)"),
        ("a2000", r"several cards: RTX A2000 6GB .* RTX A2000 12GB"),
        ("rtx 6000", r"Perhaps you meant Quadro RTX 6000 or RTX 6000 Ada or RTX A6000"),
        ("rtx 4091", r"Perhaps you meant .*RTX 4090"),
        ("gtx 1050", r"Perhaps you meant GTX 1050 Ti;"),
        ("abacus", r"'abacus' is not in the catalogue; --memory 8GiB"),
        ("rtx", r"'rtx' is not in the catalogue;"),
    ],
)
def test_misses_name_the_repair(typed: str, message: str) -> None:
    with pytest.raises(TrainfitError, match=message):
        find_gpu(typed)


@given(st.integers(1, 2**20))
def test_memory_as_typed(size: int) -> None:
    for text in (f"{size}GiB", f"{size} GB", f"{size}g", f"{size * 1024}MiB", f"{size * 1024} MB"):
        gpu = gpu_with_memory(text)
        assert (gpu.memory_bytes, gpu.memory_is_nominal) == (size * 2**30, True)
    assert gpu_with_memory(f"{size}.5GiB").memory_bytes == size * 2**30 + 2**29


@pytest.mark.parametrize("text", ["8", "GiB", "-8GiB", "0GiB", "8TiB", "eight GiB", ""])
def test_memory_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(TrainfitError, match="write it as 8GiB"):
        gpu_with_memory(text)


def test_cublas_workspaces() -> None:
    """PyTorch 2.15: 8,519,680 B below Hopper, 32 MiB for major 9, 10 and 12."""
    sizes = {name: cublas_workspace_bytes(find_gpu(name)) for name in ("t4", "4090", "h100", "b200", "5090")}
    assert sizes == {"t4": 8_519_680, "4090": 8_519_680, "h100": 2**25, "b200": 2**25, "5090": 2**25}
    assert cublas_workspace_bytes(gpu_with_memory("8GiB")) == 2**25


def test_the_context_covers_published_measurements() -> None:
    """426 MiB: RTX 6000 Ada, torch 2.10, CUDA 13.0; 300 and 400 MiB: PyTorch maintainers for lazy loading."""
    context = cuda_context_bytes()
    assert all(context.low_bytes <= size * MIB <= context.high_bytes for size in (300, 400, 426))


@pytest.mark.parametrize("gpu", [gpu for gpu in all_gpus() if not gpu.memory_is_nominal], ids=lambda gpu: gpu.name)
def test_the_driver_keeps_what_it_was_seen_to_keep(gpu: Gpu) -> None:
    """Were only a card's nominal size known, its measured total would lie within the limits."""
    nominal = replace(gpu, memory_bytes=gpu.nominal_memory_bytes, memory_is_nominal=True)
    kept = driver_reserved_bytes(nominal)
    assert kept.low_bytes <= gpu.nominal_memory_bytes - gpu.memory_bytes <= kept.high_bytes
    assert driver_reserved_bytes(gpu).high_bytes == 0


@dataclass(kw_only=True)
class FakeDevice:
    """What NVML tells of one card or slice; not hashable, as its handles are not."""

    name: str
    uuid: str
    total_mib: int
    reserved_mib: int
    used_mib: int = 0
    capability: tuple[int, int] = (8, 6)
    compute: Sequence[tuple[int, int | None]] = ()
    graphics: Sequence[tuple[int, int | None]] = ()
    slices: Sequence["FakeDevice | None"] | None = None
    """None: no MIG on this card; a None inside: a place that no slice takes."""
    sm_count: int = 0


class FakeError(Exception):
    """NVMLError."""


class NotFoundError(FakeError):
    """NVMLError_NotFound."""


class NotSupportedError(FakeError):
    """NVMLError_NotSupported."""


class DriverNotLoadedError(FakeError):
    """NVMLError_DriverNotLoaded."""


class FakeNvml:
    """NVML of a machine that is written down."""

    NVMLError: type[Exception] = FakeError
    NVMLError_DriverNotLoaded: type[Exception] = DriverNotLoadedError
    NVMLError_LibraryNotFound: type[Exception] = DriverNotLoadedError
    NVMLError_NotFound: type[Exception] = NotFoundError
    NVMLError_NotSupported: type[Exception] = NotSupportedError
    nvmlMemory_v2: int = pynvml.nvmlMemory_v2  # noqa: N815

    def __init__(self, *cards: FakeDevice, driver: bool = True) -> None:
        self.cards, self.driver, self.open = cards, driver, 0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.driver:
            raise DriverNotLoadedError
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.65.06"

    def nvmlSystemGetProcessName(self, pid: int) -> str:  # noqa: N802
        if pid > 1_000_000:
            raise NotFoundError
        return f"/usr/bin/program{pid}"

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeDevice:  # noqa: N802
        return self.cards[index]

    def nvmlDeviceGetName(self, handle: FakeDevice) -> str:  # noqa: N802
        return handle.name

    def nvmlDeviceGetUUID(self, handle: FakeDevice) -> str:  # noqa: N802
        return handle.uuid

    def nvmlDeviceGetMemoryInfo(self, handle: FakeDevice, version: int) -> Any:  # noqa: N802
        assert version == pynvml.nvmlMemory_v2
        if handle.total_mib == 0:
            raise NotSupportedError("Not Supported")
        free_mib = handle.total_mib - handle.reserved_mib - handle.used_mib
        return SimpleNamespace(
            total=handle.total_mib * MIB,
            reserved=handle.reserved_mib * MIB,
            free=free_mib * MIB,
            used=handle.used_mib * MIB,
        )

    def nvmlDeviceGetCudaComputeCapability(self, handle: FakeDevice) -> tuple[int, int]:  # noqa: N802
        return handle.capability

    def nvmlDeviceGetComputeRunningProcesses(self, handle: FakeDevice) -> Sequence[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in handle.compute]

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: FakeDevice) -> Sequence[Any]:  # noqa: N802
        return [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in handle.graphics]

    def nvmlDeviceGetMigMode(self, handle: FakeDevice) -> Sequence[int]:  # noqa: N802
        if handle.slices is None:
            raise NotSupportedError
        return [int(len(handle.slices) > 0), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: FakeDevice) -> int:  # noqa: N802
        return len(handle.slices or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: FakeDevice, index: int) -> FakeDevice:  # noqa: N802
        assert handle.slices is not None
        if (found := handle.slices[index]) is None:
            raise NotFoundError
        return found

    def nvmlDeviceGetAttributes(self, handle: FakeDevice) -> Any:  # noqa: N802
        return SimpleNamespace(multiprocessorCount=handle.sm_count)


def test_two_cards_and_the_processes_of_others() -> None:
    nvml = FakeNvml(
        FakeDevice(
            name="NVIDIA GeForce RTX 3090",
            uuid="GPU-a",
            total_mib=24576,
            reserved_mib=330,
            used_mib=3000,
            compute=[(os.getpid(), 900 * MIB), (4242, 2000 * MIB), (2_000_000, None)],
            graphics=[(4242, 2000 * MIB), (77, 60 * MIB)],
        ),
        FakeDevice(name="NVIDIA GeForce RTX 9090", uuid="GPU-b", total_mib=65536, reserved_mib=500, capability=(13, 0)),
    )
    known, unknown = detect_gpus(nvml)
    assert (known.gpu.name, known.uuid, known.index, known.mig) == ("RTX 3090", "GPU-a", 0, False)
    assert known.total_bytes == (24576 - 330) * MIB
    assert known.free_bytes == (24576 - 330 - 3000) * MIB
    assert not known.gpu.memory_is_nominal
    assert known.driver_version == "580.65.06"
    assert [(each.pid, each.name, each.used_bytes) for each in known.processes] == [
        (4242, "/usr/bin/program4242", 2000 * MIB),
        (77, "/usr/bin/program77", 60 * MIB),
        (2_000_000, None, None),
    ]
    assert (unknown.gpu.name, unknown.total_bytes) == ("NVIDIA GeForce RTX 9090", (65536 - 500) * MIB)
    assert (unknown.gpu.capability, unknown.gpu.has_bf16, unknown.gpu.fp16_flops_per_s) == ((13, 0), True, None)
    assert nvml.open == 0


def test_cards_that_share_a_name_are_told_apart_by_memory() -> None:
    both = [
        FakeDevice(name="NVIDIA GeForce RTX 4060 Ti", uuid=f"{s}", total_mib=s, reserved_mib=300) for s in (8188, 16380)
    ]
    assert [found.gpu.name for found in detect_gpus(FakeNvml(*both))] == ["RTX 4060 Ti 8GB", "RTX 4060 Ti 16GB"]


def test_mig_slices_stand_for_the_card() -> None:
    one = FakeDevice(
        name="NVIDIA A100-SXM4-80GB MIG 1g.10gb", uuid="MIG-1", total_mib=9728, reserved_mib=0, sm_count=14
    )
    three = FakeDevice(
        name="NVIDIA A100-SXM4-80GB MIG 3g.40gb", uuid="MIG-3", total_mib=40192, reserved_mib=0, sm_count=42
    )
    card = FakeDevice(
        name="NVIDIA A100-SXM4-80GB",
        uuid="GPU-a",
        total_mib=81920,
        reserved_mib=800,
        capability=(8, 0),
        slices=[one, None, three],
    )
    small, large = detect_gpus(FakeNvml(card))
    assert (small.uuid, small.mig, small.total_bytes) == ("MIG-1", True, 9728 * MIB)
    assert (large.gpu.sm_count, large.gpu.capability) == (42, (8, 0))
    assert small.gpu.bf16_flops_per_s == pytest.approx(312e12 * 14 / 108)
    assert small.gpu.bandwidth_bytes_per_s is not None
    assert math.isclose(small.gpu.bandwidth_bytes_per_s, 2039e9 / 8, rel_tol=0.06)


def test_mig_mode_without_slices() -> None:
    card = FakeDevice(
        name="NVIDIA H100 PCIe", uuid="GPU-a", total_mib=81559, reserved_mib=551, capability=(9, 0), slices=[]
    )
    (found,) = detect_gpus(FakeNvml(card))
    assert (found.gpu.name, found.mig, found.total_bytes) == ("H100 PCIe", False, 81008 * MIB)
    assert detect_gpus(FakeNvml(replace(card, slices=[None]))) == ()  # in MIG mode, and nothing to train on


def test_no_driver_is_no_gpu_and_a_silent_one_is_an_error() -> None:
    assert detect_gpus(FakeNvml(driver=False)) == ()
    silent = FakeNvml(FakeDevice(name="Orin", uuid="GPU-o", total_mib=0, reserved_mib=0))
    with pytest.raises(TrainfitError, match=r"driver did not respond \(Not Supported\): name the card with --gpu"):
        detect_gpus(silent)
    assert silent.open == 0


def test_a_missing_package_names_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(TrainfitError, match=r"pip install 'trainfit\[gpu\]'"):
        detect_gpus()


def test_the_protocol_is_nvidias_own() -> None:
    used = [*Nvml.__annotations__, *(name for name in vars(Nvml) if name.startswith("nvml"))]
    assert len(used) > 20
    assert [name for name in used if not hasattr(pynvml, name)] == []


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has an NVIDIA driver")
def test_a_machine_without_a_driver() -> None:
    assert detect_gpus() == ()


def test_the_context_is_that_of_the_kind_of_card() -> None:
    """A T4 took 135 MiB, an RTX 3090 with CUDA 11.1 1,687; a card that was never measured gets the widest range."""
    turing, unknown = cuda_context_bytes(find_gpu("RTX 2080 Ti")), cuda_context_bytes(find_gpu("H100"))
    assert turing.low_bytes <= 135 * MIB <= turing.high_bytes < unknown.high_bytes
    assert cuda_context_bytes(find_gpu("A100 40GB"), cuda=(11, 3)) == cuda_context_bytes(cuda=(10, 2)) == EAGER_CONTEXT
    assert cuda_context_bytes(find_gpu("RTX 3090"), cuda=(11, 1)).high_bytes == 1687 * MIB
    assert cuda_context_bytes(find_gpu("RTX 3090"), cuda=(12, 4)).high_bytes < 400 * MIB
    assert cuda_context_bytes(gpu_with_memory("8GiB")) == cuda_context_bytes() == unknown
    for row in (*CONTEXTS.values(), *EAGER_CONTEXTS.values(), UNKNOWN_CONTEXT, EAGER_CONTEXT):
        assert row.low_bytes <= row.likely_bytes <= row.high_bytes
        assert row.source
