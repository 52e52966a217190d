"""The catalogue of GPUs: published rates and the memory that the driver reports, found by name in any usual spelling."""

import difflib
import json
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from trainfit.errors import TrainfitError

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One device as torch sees it (one die of an MI250X, one of the four GPUs of an A16).

    Rates are peaks without sparsity; None where no document states one, and `note` says why.
    """

    name: str
    """Canonical name, unique in the catalogue."""
    aliases: tuple[str, ...] = ()
    """Other names, the driver's among them."""
    architecture: str | None = None
    """Turing, Ampere, CDNA 3, ..."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None for AMD, or when only the memory is known."""
    gfx: str | None = None
    """AMD's name of the instruction set, such as gfx90a."""
    memory_bytes: int
    """Memory that the driver offers to programs; the nominal size if `memory_is_nominal`."""
    nominal_memory_bytes: int
    """Memory on the board, less ECC if that is on by default and uses it."""
    memory_is_nominal: bool
    """True: no total was measured, so that `driver_reserved_bytes` must be subtracted from `memory_bytes`."""
    bandwidth_bytes_per_s: float | None = None
    """Peak rate of the device memory."""
    fp32_flops_per_s: float | None = None
    """FLOP/s of the ordinary units; a multiply-add counts as two."""
    tf32_flops_per_s: float | None = None
    """FLOP/s of the matrix units on fp32 input rounded to TF32; None if they have no TF32."""
    fp16_flops_per_s: float | None = None
    """FLOP/s of the matrix units in fp16 with fp32 accumulation (half rate on GeForce from Turing on); None without such."""
    bf16_flops_per_s: float | None = None
    """FLOP/s of the matrix units in bfloat16; None without such."""
    sm_count: int | None = None
    """Streaming multiprocessors, or AMD's compute units."""
    boost_hz: float | None = None
    """Clock in Hz at which the fp32 rate is stated."""
    has_bf16: bool | None = None
    """Whether it has bfloat16 in hardware: capability 8.0 and above, AMD CDNA; None if unknown."""
    has_flash_attention: bool | None = None
    """Whether torch's flash kernel runs: capability 8.0 and above, gfx90a and gfx942; None if unknown."""
    sources: tuple[str, ...] = ()
    """Documents with the numbers."""
    note: str = ""
    """Remarks about the numbers, for instance why a rate is missing."""


FLOPS_RATES = ("fp32_flops_per_s", "tf32_flops_per_s", "fp16_flops_per_s", "bf16_flops_per_s")
"""The fields of `Gpu` that are arithmetic rates."""


def scaled(rate: float | None, factor: float | None) -> float | None:
    """The product; None if either is unknown."""
    return None if rate is None or factor is None else rate * factor


def _gpu(row: dict[str, Any], documents: dict[str, str]) -> Gpu:
    own = {key: row[key] for key in ("name", "architecture", "gfx", "memory_is_nominal", "sm_count", "note")}
    kinds = ("fp32", "tf32", "fp16", "bf16")
    flops: dict[str, Any] = {f"{kind}_flops_per_s": scaled(row[f"{kind}_tflops"], 1e12) for kind in kinds}
    return Gpu(
        **own,
        **flops,
        aliases=tuple(row["aliases"]),
        capability=row["capability"] and tuple(row["capability"]),
        memory_bytes=row["memory_mib"] * MIB,
        nominal_memory_bytes=row["nominal_memory_mib"] * MIB,
        bandwidth_bytes_per_s=scaled(row["bandwidth_gb_per_s"], 1e9),
        boost_hz=scaled(row["boost_mhz"], 1e6),
        has_bf16=row["bf16"],
        has_flash_attention=row["flash_attention"],
        sources=tuple(documents[code] for code in row["sources"]),
    )


@cache
def all_gpus() -> tuple[Gpu, ...]:
    """Every row of `catalogue.json`, in its order. Rates that documents state with sparsity are halved there."""
    table = json.loads(resources.files("trainfit.gpus").joinpath("catalogue.json").read_text("utf-8"))
    return tuple(_gpu(row, table["sources"]) for row in table["gpus"])


def name_key(name: str) -> str:
    """A name without vendor, series and punctuation: "NVIDIA GeForce RTX-4090" and "4090" give the same key."""
    text = re.sub(r"\bmig \d.*|\b(graphics|gpu|generation|edition|design|with)\b", "", name.lower().replace("_", " "))
    text = re.sub(r"\b(\d+) ?(gib|g)\b", r"\1gb", text)
    text = re.sub(r"mobile|notebook", "laptop", re.sub(r"[^a-z0-9]", "", text))
    return re.sub(r"^(nvidia|amd|geforce|instinct|tesla|rtx|gtx)+", "", text)


def _keys(gpu: Gpu) -> set[str]:
    """The keys of a card's names, also with its memory as a suffix, with and without GB."""
    keys = {name_key(name) for name in (gpu.name, *gpu.aliases)}
    memory = f"{gpu.nominal_memory_bytes // GIB}gb"
    keys |= {key + memory for key in keys if "gb" not in key}
    return keys | {key.removesuffix("gb") for key in keys}


def _candidates(key: str) -> tuple[Gpu, ...]:
    """Cards whose key is `key`, or `key` followed only by a memory size or a bus."""
    variant = re.compile(re.escape(key) + r"([1-9]\d*gb|pcie|sxm\d?|nvl)*")
    return tuple(gpu for gpu in all_gpus() if any(variant.fullmatch(each) for each in _keys(gpu)))


def find_gpu(name: str) -> Gpu:
    """Find a card by name, in any usual spelling: "1650 ti", "rtx-4090", "A100-SXM4-80GB".

    A name of several cards is an error, except for common ones: "a100" is the 40 GB part, "v100" the 16 GB one, "1060" the
    6 GB one, "3080" the 10 GB one, "h100" the SXM one and "gh200" the 96 GB one (each an alias in the catalogue). The Turing
    Quadro is "quadro rtx 6000"; "rtx 6000" alone is ambiguous.

    Raises:
        TrainfitError: no card or several cards have the name; the message lists the nearest.
    """
    refuse_other_accelerators(name)
    key = name_key(name)
    exact = [gpu for gpu in all_gpus() if key in _keys(gpu)]
    matches = exact or list(_candidates(key)) if key else []
    if len(matches) == 1:
        return matches[0]
    if matches:
        listed = ", ".join(f"{gpu.name} ({gpu.memory_bytes / GIB:.1f} GiB)" for gpu in matches)
        raise TrainfitError(f"GPU {name!r} names several cards: {listed}; give one of these to --gpu")
    raise TrainfitError(f"GPU {name!r} is not in the catalogue{_nearest(key)}; --memory 8GiB works for any card")


OTHERS = {
    "Apple": r"\bapple\b|^m[1-5]( (pro|max|ultra))?$|\bmps\b",
    "Google TPU": r"\btpu\b",
    "Intel": r"\bintel\b|\bgaudi ?\d?\b|\barc a\d+",
    "AWS Trainium": r"\btrainium|\binferentia|\btrn\d",
    "Huawei Ascend": r"\bascend\b",
}
"""Maker -> how people write its accelerators, in lower case."""
CLOUDS = r"^(google )?colab|^kaggle"


def refuse_other_accelerators(name: str) -> None:
    """Say what holds for accelerators that are no GPU of NVIDIA or AMD, and for names of services.

    Raises:
        TrainfitError: it is one of these.
    """
    typed = " ".join(name.lower().replace("-", " ").replace("_", " ").split())
    for maker, pattern in OTHERS.items():
        if re.search(pattern, typed):
            raise TrainfitError(
                f"GPU {name!r}: memory is predicted for NVIDIA's GPUs by PyTorch's CUDA allocator, and for AMD's by the same "
                f"rules; {maker} has another allocator, and trainfit does not train on it. --memory 8GiB is what an NVIDIA GPU "
                "of that size would do"
            )
    if typed in ("rocm", "amd", "radeon"):
        listed = ", ".join(gpu.name for gpu in all_gpus() if gpu.gfx)
        raise TrainfitError(
            f"GPU {name!r}: name the card: {listed}. Plans for AMD use the CUDA allocator's rules and were never measured"
        )
    if re.search(CLOUDS, typed):
        raise TrainfitError(
            f"GPU {name!r} is a service with several GPUs: give --gpu t4, --gpu l4 or --gpu a100, as nvidia-smi names it there"
        )


def _nearest(key: str) -> str:
    """A hint with the cards whose name contains the typed one, else those with the most similar spelling."""
    by_key: dict[str, str] = {}
    for gpu in all_gpus():
        by_key |= dict.fromkeys(_keys(gpu), gpu.name)
    inside = [each for each in by_key if key in each] if len(key) >= 4 else []
    close = inside or difflib.get_close_matches(key, sorted(by_key), n=3)
    names = sorted({by_key[each] for each in close})
    return f". Perhaps you meant {' or '.join(names[:5])}" if names else ""


def match_driver_name(name: str, total_bytes: int) -> Gpu | None:
    """The card with a driver's name, the nearest in memory if several cards share the name, or None."""
    return min(_candidates(name_key(name)), key=lambda gpu: abs(gpu.nominal_memory_bytes - total_bytes), default=None)


def gpu_with_memory(text: str, *, flag: str = "--memory") -> Gpu:
    """A card of which only the memory is known: "8GiB", "8 GB", "8192MiB"; `flag` is the user's flag, for messages.

    GB and MB are read as GiB and MiB, because an "8 GB" card has 8 GiB. The size is nominal.

    Raises:
        TrainfitError: the text is not a memory size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(?:I?B)?\s*", text, re.IGNORECASE)
    size_bytes = 0
    if match:
        unit_bytes = GIB if match[2] in "gG" else MIB
        size_bytes = int(float(match[1]) * unit_bytes)
    if not size_bytes:
        raise TrainfitError(f"{flag} {text!r} is not a memory size: write it as 8GiB or 8192MiB")
    return Gpu(
        name=f"{size_bytes / GIB:g} GiB card",
        memory_bytes=size_bytes,
        nominal_memory_bytes=size_bytes,
        memory_is_nominal=True,
        note="Only the memory was given.",
    )


def chosen_gpu(name: str | None, memory: str | None) -> Gpu:
    """The card with a name, a memory size, or both.

    Raises:
        TrainfitError: neither is given, or the name is unknown.
    """
    if memory is None:
        if name is None:
            raise TrainfitError("which card? give --gpu NAME or --memory 8GiB")
        return find_gpu(name)
    by_memory = gpu_with_memory(memory)
    if name is None:
        return by_memory
    gpu = find_gpu(name)
    return replace(
        gpu,
        name=f"{gpu.name} with {memory}",
        memory_is_nominal=True,
        memory_bytes=by_memory.memory_bytes,
        nominal_memory_bytes=by_memory.memory_bytes,
    )
