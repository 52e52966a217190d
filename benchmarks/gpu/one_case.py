"""One case in this process, which `measure.py` starts: a fresh CUDA context, and nothing else in the allocator.

It imports first, then waits for a line on stdin: so the next case can import while this one runs.
"""

import gzip
import importlib
import json
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import kernels
import torch
from settings import SUITE, Case

from trainfit.memory.trace_cache import versions
from trainfit.models.registry import build_eval_step, build_step, family
from trainfit.training.oom import attempt

WARM_UP = 3
"""Windows that are not timed: libraries choose and load their kernels."""
LEAST, MOST, ENOUGH_S = 6, 16, 10
"""Windows in all; none is begun after so many seconds but the least."""
HISTORY_WINDOWS = 2
"""As a prediction traces them."""


def measure(case: Case, device: torch.device, history: Path | None) -> dict[str, Any]:
    """Build the step, run windows, and tell what they took. With `history` the allocator's log is written to it."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.init()
    begin = _reading(0.0) if cuda else None
    if case.limit_bytes is not None and cuda:
        torch.cuda.set_per_process_memory_fraction(case.limit_bytes / torch.cuda.mem_get_info()[1])
    if history is not None:
        torch.cuda.memory._record_memory_history(context=None, max_entries=2_000_000)  # pyright: ignore[reportPrivateUsage]
    rows: list[dict[str, Any]] = []  # after the build, and after each window
    build = build_step if case.part == "training" else build_eval_step

    def run() -> None:
        step = build(setting=case.setting.to_json(), device=device)
        rows.append(_timed(lambda: None, cuda))
        start = time.perf_counter()
        for count in range(MOST if history is None else HISTORY_WINDOWS):
            if count >= LEAST and time.perf_counter() - start > ENOUGH_S:
                break
            rows.append(_timed(step.run, cuda))

    _, message = attempt(run)
    end = _reading(0.0) if cuda else None
    if history is not None:
        history.write_bytes(gzip.compress(pickle.dumps(torch.cuda.memory._snapshot())))  # pyright: ignore[reportPrivateUsage]
    seconds = [row["seconds"] for row in rows[1 + WARM_UP :]] if message is None else []
    return {
        "outcome": "ran" if message is None else "out of memory",
        "message": message,
        "begin": begin,
        "built": rows[0] if rows else None,
        "windows": rows[1:],
        "end": end,
        "peak": _peak([*rows, end]) if end else None,
        "speed": _speed(case, seconds) if seconds else None,
    }


def _timed(action: Callable[[], object], cuda: bool) -> dict[str, Any]:
    start = time.perf_counter()
    action()
    if cuda:
        torch.cuda.synchronize()
    seconds = round(time.perf_counter() - start, 6)
    return _reading(seconds) if cuda else {"seconds": seconds}


def _reading(seconds: float) -> dict[str, Any]:
    """The allocator's peaks since the last reading, and the device's free memory now, in bytes."""
    stats, free = torch.cuda.memory_stats(), torch.cuda.mem_get_info()[0]
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


def _speed(case: Case, seconds: list[float]) -> dict[str, float]:
    """Images (pairs) a second over the timed windows."""
    s = case.setting
    window = s.micro_batch * s.accumulation if case.part == "training" else s.eval_micro_batch or s.micro_batch
    rates = sorted(window / each for each in seconds)
    return {"images_per_s": median(rates), "slowest": rates[0], "fastest": rates[-1], "windows": len(rates)}


def machine(device: torch.device) -> dict[str, Any]:
    """Card and software; a CPU's record says that its times mean nothing for a GPU."""
    own: dict[str, Any] = {"device": device.type, "python": sys.version.split()[0], "versions": versions()}
    if device.type == "cpu":
        return own | {"note": "dry run: CPU time, no memory; it says nothing about a GPU"}
    properties = torch.cuda.get_device_properties(0)
    return own | {
        "card": properties.name,
        "capability": [properties.major, properties.minor],
        "total_bytes": torch.cuda.mem_get_info()[1],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "conv_tf32": torch.backends.cudnn.allow_tf32,
    }


def main(name: str, device_name: str, answer: str, history: str) -> None:
    """Measure the case `name` (or "kernels") and write JSON to `answer`."""
    device = torch.device(device_name)
    case = next((case for case in SUITE if case.name == name), None)
    if case is not None:
        importlib.import_module(f"trainfit.models.{family(case.setting.model)}.step")
    sys.stdin.readline()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as `trainfit train` does
    if case is None:
        found: dict[str, Any] = {"outcome": "ran", "kernels": kernels.sample_all()}
    else:
        found = {"case": case.to_json(), **measure(case, device, Path(history) if history else None)}
    Path(answer).write_text(json.dumps({"schema": 1, "name": name, "machine": machine(device), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
