"""Traces of the public sources' steps, kept on the disk: tracing takes seconds each, and replaying them milliseconds.

A stored trace is used whatever has changed in trainfit since: remove the folder after a change of the tracer.
"""

import gzip
import hashlib
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from benchmarks.public.rows import Case
from benchmarks.timm_rtx3090 import scaled, weights_of_any_values

from trainfit.files import cache_folder
from trainfit.tracing.events import Trace
from trainfit.tracing.fake_cuda import Target
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace import trace_step

TIMEOUT_S = 900
FIXED = ("parameters", "buffers", "gradients", "optimizer state", "EMA")
"""Categories whose bytes do not depend on the batch."""


def folder() -> Path:
    """Where they are kept."""
    return cache_folder() / "public" / f"torch-{torch.__version__.partition('+')[0]}"


def path_of(case: Case) -> Path:
    """Where the trace of a case is kept."""
    return folder() / f"{hashlib.sha256(case.name.encode()).hexdigest()[:24]}.json.gz"


def load(case: Case) -> StoredTrace | None:
    """The trace of a case; None where it was never made or could not be made."""
    path = path_of(case)
    if not path.exists():
        return None
    record = json.loads(gzip.decompress(path.read_bytes()))
    return None if "error" in record else StoredTrace.from_record(record["trace"])


def failure(case: Case) -> str:
    """Why there is no trace of a case."""
    path = path_of(case)
    return json.loads(gzip.decompress(path.read_bytes())).get("error", "") if path.exists() else "not traced"


def make(cases: Iterable[Case]) -> None:
    """Trace those that are missing, each in a process of its own, with what was imported before."""
    torch.set_num_threads(1)
    missing = [case for case in {c.name: c for c in cases}.values() if not path_of(case).exists()]
    for case in missing:
        importlib.import_module(f"benchmarks.public.{case.source}")
    context = multiprocessing.get_context("fork")
    for number, case in enumerate(missing):
        start = time.perf_counter()
        process = context.Process(target=_trace, args=(case,))
        process.start()
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            _store(case, {"error": f"not traced in {TIMEOUT_S} s"})
        seconds = time.perf_counter() - start
        print(
            f"{number + 1:4} of {len(missing)} {case.source} {dict(case.arguments)} {seconds:.1f} s",
            file=sys.stderr,
            flush=True,
        )


def _trace(case: Case) -> None:
    source = importlib.import_module(f"benchmarks.public.{case.source}")

    def build(device: torch.device) -> Any:
        with weights_of_any_values():
            return source.build(device, **case.arguments)

    target = Target(capability=case.capability, fused_attention=case.fused_attention)
    try:
        made = trace_step(build, target=target, steps=case.steps)
    except Exception as error:
        _store(case, {"error": f"{type(error).__name__}: {error}"[:400]})
        return
    _store(case, {"trace": made.to_record()})


def _store(case: Case, record: dict[str, Any]) -> None:
    path = path_of(case)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"case": case.name, **record}, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), compresslevel=3))


def at_batch(trace: Trace, traced_batch: int, batch: int) -> Trace:
    """The trace of the same step at another batch; `traced_batch` is a prime that no other size is a multiple of."""
    return trace if batch == traced_batch else scaled(trace, traced_batch, batch, fixed=FIXED)
