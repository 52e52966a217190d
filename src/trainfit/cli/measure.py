"""trainfit measure."""

import json
import sys
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic

from trainfit.api import make_bench, planned_setting
from trainfit.cli.arguments import AnySetting
from trainfit.errors import OutOfMemory, TrainfitError
from trainfit.measuring.calibration import load
from trainfit.measuring.card import Device
from trainfit.measuring.search import Measured
from trainfit.models.setting import Setting, named
from trainfit.reports.measure import measured_json, measured_text
from trainfit.values import In


@dataclass(frozen=True, kw_only=True)
class MeasureFlags(Generic[AnySetting]):
    """Speed and memory of a setting on this machine's GPU, beside the prediction; without a GPU, the CPU's speed alone."""

    setting: AnySetting
    """The model, and every knob of its step. --micro-batch is where the search begins if nothing can be predicted."""
    plan: Annotated[Path | None, In("run")] = None
    """File that `trainfit plan --out` wrote: its setting is measured."""
    micro_batches: Annotated[str | None, In("run")] = None
    """Measure these, for instance 1,2,4: instead of the fewest that tell from which micro-batch on speed stops to grow."""
    steps: Annotated[int, In("run")] = 10
    """Timed windows of each trial at most; after 10 s only three are waited for."""
    device: Annotated[Device, In("run")] = "auto"
    """auto: the first GPU that CUDA_VISIBLE_DEVICES shows, else the CPU."""
    memory: Annotated[str | None, In("run")] = None
    """Act as a smaller card, for instance 4GiB: the allocator may not reserve more, kernels are still the large card's."""
    as_json: Annotated[bool, In("output")] = False
    """Print JSON (schema 1) instead of text."""


def measure(arguments: MeasureFlags[Setting], _given: AbstractSet[str]) -> int:
    """Measure a setting on the real device; the exit code is 3 if nothing ran."""
    setting = named(arguments.setting)
    if arguments.plan is not None:
        setting = planned_setting(arguments.plan, setting)
    sizes = _sizes(arguments.micro_batches)
    bench = make_bench(
        setting,
        steps=arguments.steps,
        device=arguments.device,
        memory=arguments.memory,
        show=lambda line: print(line, file=sys.stderr, flush=True),
    )
    rows: list[Measured] = []
    try:
        for row in bench.run(sizes):
            rows.append(row)
    except KeyboardInterrupt:
        print(f"{len(rows)} measured before the stop: {bench.file}", file=sys.stderr)
        raise
    calibration = load(bench.card.gpu.name) if bench.card else None
    if arguments.as_json:
        print(json.dumps(measured_json(bench, rows, calibration)))
    else:
        print(measured_text(bench, rows, calibration))
    return 0 if any(row.outcome == "ran" for row in rows) else OutOfMemory.exit_code


def _sizes(text: str | None) -> Sequence[int]:
    try:
        sizes = [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        sizes = [0]
    if any(size < 1 for size in sizes):
        raise TrainfitError(f"--micro-batches {text!r}: write sizes of at least 1 as 1,2,4")
    return sizes
