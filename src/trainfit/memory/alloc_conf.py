"""The settings of PyTorch's CUDA caching allocator that change how much memory a step takes, and their text form."""

import re
from dataclasses import dataclass, fields

from trainfit.errors import TrainfitError

MIB = 2**20

_IGNORED = (
    "release_lock_on_cudamalloc",
    "graph_capture_record_stream_reuse",
    "throw_on_cudamalloc_oom",
    "expandable_segments_reserve",
    "expandable_segments_reserve_by_class",
    "pinned_use_cuda_host_register",
    "pinned_num_register_threads",
    "pinned_use_background_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_free_catch_all",
    "pinned_max_round_threshold_mb",
    "pinned_max_cached_size_mb",
)
"""Settings that change no byte of device memory."""

_Value = bool | int | float | tuple[int, ...] | None


@dataclass(frozen=True, kw_only=True)
class AllocatorConfig:
    """What PYTORCH_ALLOC_CONF (older name: PYTORCH_CUDA_ALLOC_CONF) sets, with the defaults of PyTorch 2.11 to 2.15."""

    expandable_segments: bool = False
    """Grow one address range per stream and pool instead of one cudaMalloc per segment."""
    max_split_size_bytes: int | None = None
    """Blocks of this size and above are never split. None: all may be."""
    roundup_power2_divisions: int | tuple[int, ...] = 0
    """Round sizes up to one of this many steps between powers of two. Or 16 such numbers: for sizes below 2 MiB, below
    4 MiB, and so on; the last from 32 GiB on. 0 and 1: to 512 bytes only."""
    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old free segments are given back. Needs a fraction. 0: never."""
    per_process_memory_fraction: float | None = None
    """Share of the device's memory that the process may reserve. None: no limit of PyTorch's own."""
    large_segment_size_bytes: int = 20 * MIB
    """Segment for requests of 1 to 10 MiB, and the page of an expandable large pool."""
    max_non_split_rounding_bytes: int = 20 * MIB
    """A request that may not split a block takes a free one only if that is less than this larger."""
    cudnn_benchmark: bool = False
    """`torch.backends.cudnn.benchmark`, which is not a setting of the allocator: at each convolution's first run the fastest
    algorithm is searched, and then the cache is emptied (pytorch native/cudnn/Conv_v8.cpp, `get_plans_from_find`)."""

    @classmethod
    def from_env_string(cls, text: str) -> "AllocatorConfig":
        """Read `key:value,key:value` as AcceleratorAllocatorConfig::parseArgs and CUDAAllocatorConfig::parseArgs do.

        Raises TrainfitError that names the setting when it is unknown, not modelled, or refused by PyTorch.
        """
        values: dict[str, _Value] = {}
        for setting in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", "".join(text.split())):
            key, _, value = setting.partition(":")
            if key in _IGNORED or setting == "backend:native":
                continue
            names = [field.name for field in fields(cls) if field.name != "cudnn_benchmark"]
            modelled = [name.replace("_bytes", "_mb") for name in names]
            if key not in modelled:
                known = ", ".join(sorted((*modelled, *_IGNORED, "backend:native")))
                raise TrainfitError(f"allocator setting {setting!r} cannot be modelled; use some of {known}")
            try:
                values[key.replace("_mb", "_bytes")] = _parse(key, value)
            except (ValueError, KeyError) as error:
                raise TrainfitError(f"allocator setting {setting!r}: PyTorch refuses this value") from error
        large = values.get("large_segment_size_bytes", 20 * MIB)
        values.setdefault("max_non_split_rounding_bytes", large)
        config = cls(**values)  # pyright: ignore[reportArgumentType]
        if (
            min(config.max_split_size_bytes or MIB * MIB, config.max_non_split_rounding_bytes)
            < config.large_segment_size_bytes
        ):
            least = config.large_segment_size_bytes // MIB
            raise TrainfitError(
                f"allocator settings {text!r}: max_split_size_mb and max_non_split_rounding_mb must be {least} or more"
            )
        return config


def _parse(key: str, value: str) -> _Value:
    """Return a setting's value in bytes or as it is. Raises ValueError or KeyError where PyTorch refuses it."""
    if key == "expandable_segments":
        return {"True": True, "False": False}[value]
    if key == "roundup_power2_divisions":
        return _divisions(value)
    if key.endswith("_mb"):
        _require(key != "large_segment_size_mb" or int(value) > 10)
        return int(value) * MIB
    share = float(value)
    if key == "garbage_collection_threshold":
        _require(0 < share < 1)
        return share
    _require(0 <= share <= 1)
    # In the environment 1 means "no limit of its own", and then PyTorch collects no garbage either.
    return share if share < 1 else None


def _divisions(text: str) -> int | tuple[int, ...]:
    """Read `4` or `[256:1,512:2,>:8]`, sizes in MiB ("parseRoundUpPower2Divisions")."""
    if not text.startswith("["):
        return _power_of_two(text)
    table = [0] * 16
    index = 0
    for i, pair in enumerate(text.strip("[]").split(",")):
        size, divisions = pair.split(":")
        count = 0 if divisions == "0" else _power_of_two(divisions)
        if size == ">":
            table[index + 1 :] = [count] * (15 - index)
            continue
        index = min(_power_of_two(size).bit_length() - 1, 15)
        if i == 0:
            table[:index] = [count] * index
        table[index] = count
    return tuple(table)


def _power_of_two(text: str) -> int:
    _require(int(text).bit_count() == 1)
    return int(text)


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError
