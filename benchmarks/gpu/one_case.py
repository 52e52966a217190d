"""One case in this process, which `measure.py` starts: a fresh CUDA context, and nothing else in the allocator.

It imports first, then waits for a line on stdin: so the next case can import while this one runs.
"""

import gzip
import importlib
import json
import os
import pickle
import sys
from functools import cache
from pathlib import Path
from typing import Any

import kernels
import torch
from settings import SUITE, Case

from trainfit.measuring.trial import Windows, run_windows
from trainfit.models.build import build_eval_step, build_step
from trainfit.step.precision import set_matmul_precision
from trainfit.tracing.trace_cache import versions

REHEARSAL = "TRAINFIT_GPU_REHEARSAL"
"""Environment variable that `measure.py --rehearse` sets."""
WINDOWS = Windows(warm_up=3, least=3, most=13, enough_s=10)
HISTORY_WINDOWS = Windows(warm_up=2, least=0, most=0)
"""Two, as a prediction traces them."""


REHEARSED_KERNELS = 4
"""Samples of `kernels.py` in a rehearsal: the CPU takes minutes for all."""


@cache
def rehearsed() -> torch.device | None:
    """In a rehearsal, the device that tensors are on; None: a real GPU, or a dry run."""
    if REHEARSAL not in os.environ:
        return None
    sys.path.insert(0, str(Path(__file__).parent / "stand_in"))
    return importlib.import_module("rehearsal").install()


def measure(case: Case, device: torch.device, history: Path | None) -> dict[str, Any]:
    """Build the step, run windows, and tell what they took. With `history` the allocator's log is written to it."""
    s = case.setting
    training = case.part == "training"
    if history is not None:
        torch.cuda.init()
        torch.cuda.memory._record_memory_history(context=None, max_entries=2_000_000)  # pyright: ignore[reportPrivateUsage]
    found = run_windows(
        lambda: (build_step if training else build_eval_step)(setting=s.to_json(), device=rehearsed() or device),
        device,
        WINDOWS if history is None else HISTORY_WINDOWS,
        images=s.micro_batch * s.accumulation if training else s.eval_micro_batch or s.micro_batch,
        limit_bytes=case.limit_bytes,
    )
    if history is not None:
        history.write_bytes(gzip.compress(pickle.dumps(torch.cuda.memory._snapshot())))  # pyright: ignore[reportPrivateUsage]
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Card and software; a CPU's record says that its times mean nothing for a GPU."""
    own: dict[str, Any] = {"device": device.type, "python": sys.version.split()[0], "versions": versions()}
    if REHEARSAL in os.environ:
        own |= {"stand_in": True, "note": "rehearsal: no GPU, and figures that mean nothing"}
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
        importlib.import_module(case.setting.family.workload)
    sys.stdin.readline()
    rehearsal = rehearsed() is not None
    set_matmul_precision(device)
    if case is None:
        found: dict[str, Any] = {
            "outcome": "ran",
            "kernels": kernels.sample_all(REHEARSED_KERNELS if rehearsal else None),
        }
    else:
        found = {"case": case.to_json(), **measure(case, device, Path(history) if history else None)}
    Path(answer).write_text(json.dumps({"schema": 1, "name": name, "machine": machine(device), **found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
