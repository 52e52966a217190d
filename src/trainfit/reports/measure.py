"""Measurements as text and JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainfit.gpus.context import cuda_context_bytes
from trainfit.measuring.bench import Bench
from trainfit.measuring.calibration import Calibration, made_by
from trainfit.measuring.search import Measured, Predicted, knee, speeds
from trainfit.reports.profile import gib
from trainfit.reports.words import rate

SCHEMA = 1
_CPU_HEAD = ("micro-batch", "images/s", "slowest to fastest")
_GPU_HEAD = (*_CPU_HEAD, "predicted", "reserved GiB", "predicted", "allocated GiB", "predicted", "context GiB")


def measured_json(bench: Bench, rows: Sequence[Measured], calibration: Calibration | None) -> dict[str, Any]:
    """All measurements as JSON values, with `schema` 1; `knee` is None if nothing ran."""
    card = bench.card
    return {
        "schema": SCHEMA,
        "setting": bench.setting.to_json(),
        "device": "cuda" if card else "cpu",
        "gpu": card.gpu.name if card else None,
        "driver": card.driver_version if card else None,
        "torch": made_by()["torch"],
        "limit_bytes": bench.limit_bytes,
        "knee": knee(speeds(rows)),
        "rows": [asdict(row) for row in rows],
        "calibration": asdict(calibration) if calibration else None,
        "file": str(bench.file),
    }


def measured_text(bench: Bench, rows: Sequence[Measured], calibration: Calibration | None) -> str:
    """A sentence with the result, the rows of `rows_text`, and notes on how to use the numbers."""
    ordered = sorted(rows, key=lambda row: row.micro_batch)
    sections = [
        [sentence(bench, ordered)],
        *_sections(ordered, with_memory=bench.card is not None),
        _notes(bench, rows, calibration),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def rows_text(rows: Sequence[Measured]) -> str:
    """A table with a row per micro-batch, and why others did not run; as `measured_text` without the device and notes."""
    with_memory = any(row.reserved_bytes is not None for row in rows)
    ordered = sorted(rows, key=lambda row: row.micro_batch)
    return "\n\n".join("\n".join(lines) for lines in _sections(ordered, with_memory=with_memory) if lines)


def rows_json(rows: Sequence[Measured]) -> dict[str, Any]:
    """The rows as JSON values, with `schema` 1 and the knee, which is None if nothing ran."""
    return {"schema": SCHEMA, "knee": knee(speeds(rows)), "rows": [asdict(row) for row in rows]}


def _sections(ordered: Sequence[Measured], *, with_memory: bool) -> list[list[str]]:
    """The lines of the table, and those of the failures."""
    head = _GPU_HEAD if with_memory else _CPU_HEAD
    cells = [head, *(_cells(row)[: len(head)] for row in ordered if row.outcome == "ran")]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    table = ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)) for line in cells]
    failed = [f"micro-batch {row.micro_batch}: {_failure(row)}" for row in ordered if row.outcome != "ran"]
    return [table if len(cells) > 1 else [], failed]


def sentence(bench: Bench, rows: Sequence[Measured]) -> str:
    """A sentence with model, device, the knee and the fastest micro-batch."""
    device = f"{bench.card.gpu.name} (driver {bench.card.driver_version})" if bench.card else "the CPU"
    subject = f"{bench.setting.model} on {device}, torch {made_by()['torch']}"
    speed_of = speeds(rows)
    chosen = knee(speed_of)
    if chosen is None:
        return f"{subject}: nothing ran."
    best = max(speed_of, key=lambda size: speed_of[size])
    least = f"micro-batch {chosen} is the smallest within 3 % of the best speed, {rate(speed_of[chosen])} images/s"
    if len(speed_of) > 1 and chosen == max(speed_of):
        return f"{subject}: {least}; no larger one ran, and speed still grew."
    return f"{subject}: {least}" + ("." if best == chosen else f" (the best: {rate(speed_of[best])} at {best}).")


def _cells(row: Measured) -> tuple[str, ...]:
    predicted = row.predicted
    reserved, allocated, context = (_gib(n) for n in (row.reserved_bytes, row.allocated_bytes, row.context_bytes))
    return (
        str(row.micro_batch),
        rate(row.images_per_s),
        f"{rate(row.slowest)} to {rate(row.fastest)}",
        rate(predicted.images_per_s) if predicted and predicted.images_per_s else "-",
        reserved,
        _range(predicted),
        allocated,
        _gib(predicted.allocated_bytes if predicted else None),
        context,
    )


def _failure(row: Measured) -> str:
    failure = f"{row.outcome}: {row.message}"
    if row.predicted:
        failure += f" (predicted: {row.predicted.verdict}, {_range(row.predicted)} GiB reserved)"
    return failure


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else gib(nbytes)


def _range(predicted: Predicted | None) -> str:
    return f"{gib(predicted.reserved_low_bytes)} to {gib(predicted.reserved_high_bytes)}" if predicted else "-"


def _notes(bench: Bench, rows: Sequence[Measured], calibration: Calibration | None) -> list[str]:
    lines: list[str] = []
    if bench.card is None:
        lines.append("This is CPU time: it says nothing about a GPU. Memory was not measured.")
    elif stalled := [str(row.micro_batch) for row in rows if row.retries]:
        lines.append(
            f"The allocator had to empty its cache, which stalls the GPU, at micro-batch {', '.join(stalled)}."
        )
    if bench.card and bench.card.processes:
        names = ", ".join(f"{each.name or 'a program'} ({each.pid})" for each in bench.card.processes)
        lines.append(f"Other programs were on the card: {names}. Speed and context are less sure.")
    if bench.limit_bytes is not None:
        context = gib(cuda_context_bytes(bench.card.gpu if bench.card else None).high_bytes)
        lines.append(
            f"The allocator was held to {gib(bench.limit_bytes)} GiB; {context} more are left to the CUDA context. Kernels were "
            "still chosen for the large card, at its speed: memory may be less on the small one, and its own speed is another."
        )
    if calibration:
        lines.append(_calibrated(calibration))
    return [*lines, f"Kept in {bench.file}"]


def _calibrated(calibration: Calibration) -> str:
    low, high = calibration.reserved_factors
    memory = f"reserved memory {low:.2f} to {high:.2f} times the lowest predicted"
    time = "no time was predicted"
    if calibration.time_factor is not None and calibration.time_factors is not None:
        spread = "{:.2f} to {:.2f}".format(*calibration.time_factors)
        time = f"a step takes {calibration.time_factor:.2f} times the predicted time (median; {spread})"
    return f"Of {calibration.rows} settings measured on this card: {time}; {memory}. Later plans for it know that."
