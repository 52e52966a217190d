"""One trial in a separate process, with a new CUDA context and an empty allocator. `measuring.process` starts it."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trainfit.errors import TrainfitError
from trainfit.models.build import build_step
from trainfit.models.setting import setting_from_json
from trainfit.process import end_with_parent
from trainfit.step.attempt import attempt
from trainfit.step.precision import set_matmul_precision


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How many windows a trial runs."""

    warm_up: int = 2
    """Windows that are not timed, because libraries choose and load kernels in them; their memory counts."""
    least: int = 3
    """Smallest number of timed windows."""
    most: int = 10
    """Largest number of timed windows."""
    enough_s: float = 10
    """Seconds, including the warm-up, after which no window beyond `least` begins."""


def run_windows(
    build: Callable[[], Any],
    device: torch.device,
    windows: Windows,
    *,
    images: int,
    limit_bytes: int | None = None,
) -> dict[str, Any]:
    """Build a step, `run` its windows, and return times and memory as JSON values. `images` is the number in one window.

    The whole process is measured: peaks are the largest over the build and all windows, including the warm-up.
    `limit_bytes` limits what the allocator may reserve. On the CPU only times are measured.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.init()
    begin = _reading(0.0) if cuda else None
    if limit_bytes is not None and cuda:
        torch.cuda.set_per_process_memory_fraction(limit_bytes / torch.cuda.mem_get_info()[1])
    rows: list[dict[str, Any]] = []  # after the build, and after each window

    def run() -> None:
        step = build()
        rows.append(_timed(lambda: None, cuda))
        start = time.perf_counter()
        for count in range(windows.warm_up + windows.most):
            if count >= windows.warm_up + windows.least and time.perf_counter() - start > windows.enough_s:
                break
            rows.append(_timed(step.run, cuda))

    _, message = attempt(run)
    end = _reading(0.0) if cuda else None
    seconds = [row["seconds"] for row in rows[1 + windows.warm_up :]] if message is None else []
    return {
        "outcome": "ran" if message is None else "out of memory",
        "message": message,
        "begin": begin,
        "built": rows[0] if rows else None,
        "windows": rows[1:],
        "end": end,
        "peak": _peak([*rows, end]) if end else None,
        "speed": _speed(images, seconds) if seconds else None,
    }


def _timed(action: Callable[[], object], cuda: bool) -> dict[str, Any]:
    """Run an action and read its time and memory. The device is idle before it, because the previous reading waited for it."""
    start = time.perf_counter()
    action()
    if cuda:
        torch.cuda.synchronize()
    seconds = round(time.perf_counter() - start, 6)
    return _reading(seconds) if cuda else {"seconds": seconds}


def _reading(seconds: float) -> dict[str, Any]:
    """The allocator's peaks since the last reading, and the device's free memory now, in bytes."""
    stats = torch.cuda.memory_stats()
    free = torch.cuda.mem_get_info()[0]
    torch.cuda.reset_peak_memory_stats()
    return {
        "seconds": seconds,
        "peak_allocated_bytes": stats.get("allocated_bytes.all.peak", 0),
        "peak_requested_bytes": stats.get("requested_bytes.all.peak", 0),
        "peak_reserved_bytes": stats.get("reserved_bytes.all.peak", 0),
        "allocated_bytes": stats.get("allocated_bytes.all.current", 0),
        "reserved_bytes": stats.get("reserved_bytes.all.current", 0),
        "retries": stats.get("num_alloc_retries", 0),
        "device_allocs": stats.get("num_device_alloc", 0),
        "device_free_bytes": free,
    }


def _peak(rows: list[dict[str, Any]]) -> dict[str, int]:
    keys = ("peak_allocated_bytes", "peak_requested_bytes", "peak_reserved_bytes", "retries")
    return {key.removeprefix("peak_"): max(row[key] for row in rows) for key in keys}


def _speed(images: int, seconds: list[float]) -> dict[str, float]:
    """Images (pairs) per second over the timed windows."""
    rates = sorted(images / each for each in seconds)
    return {"images_per_s": median(rates), "slowest": rates[0], "fastest": rates[-1], "windows": len(rates)}


def main(request: Path, answer: Path) -> None:
    """Measure the setting of `request`; write the record of `run_windows`, or {"outcome": "refused", "message"}, to `answer`."""
    values = json.loads(request.read_text())
    sys.path[:] = values["path"]
    setting = setting_from_json(values["setting"])
    device = torch.device(values["device"])
    set_matmul_precision(device)
    try:
        record = run_windows(
            lambda: build_step(setting=values["setting"], device=device),
            device,
            Windows(**values["windows"]),
            images=setting.micro_batch * setting.accumulation,
            limit_bytes=values["limit_bytes"],
        )
    except TrainfitError as error:
        record = {"outcome": "refused", "message": str(error)}
    answer.write_text(json.dumps(record))


if __name__ == "__main__":
    end_with_parent()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
