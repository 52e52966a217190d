"""Compares the measurements on a card with their predictions. Stored as lines of JSON; imports no torch."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from trainfit.errors import TrainfitError
from trainfit.files import cache_folder, read_json_lines
from trainfit.measuring.search import Measured
from trainfit.timing import roofline
from trainfit.tracing.trace_cache import versions
from trainfit.values import require_valid


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Ratios of measured to predicted figures, over all trials on one card that ran without a memory limit."""

    gpu: str
    """Catalogue name of the card."""
    driver: str
    """Version of its driver."""
    rows: int
    """Number of measured settings."""
    time_factor: float | None
    """Median of measured over predicted seconds; None if no time could be predicted."""
    time_factors: tuple[float, float] | None
    """Smallest and largest of measured over predicted seconds."""
    reserved_factors: tuple[float, float]
    """Smallest and largest of measured over lowest predicted peak of the reserved memory."""


def calibrate(gpu: str, driver: str, rows: Sequence[Measured]) -> Calibration | None:
    """The calibration from trials; None without one that ran and was predicted."""
    pairs = [(row, row.predicted) for row in rows if row.outcome == "ran" and row.predicted is not None]
    memory = [(row.reserved_bytes or 0) / predicted.reserved_low_bytes for row, predicted in pairs]
    times = [p.images_per_s / row.images_per_s for row, p in pairs if p.images_per_s and row.images_per_s]
    if not pairs:
        return None
    return Calibration(
        gpu=gpu,
        driver=driver,
        rows=len(pairs),
        time_factor=median(times) if times else None,
        time_factors=(min(times), max(times)) if times else None,
        reserved_factors=(min(memory), max(memory)),
    )


def load(gpu: str) -> Calibration | None:
    """The calibration of a card, from trials with this version of torch and of the code, and the latest driver."""
    file = stored_at(gpu)
    lines = read(file)
    trials = [record for record in lines if _is_trial(record)]
    _warn(file, len(lines) - len(trials))
    records = [record for record in trials if record["made_by"] == made_by()]
    last = records[-1]["driver"] if records else ""
    latest = {
        json.dumps(record["setting"]): Measured.from_json(record["row"])
        for record in records
        if record["driver"] == last and record["limit_bytes"] is None
    }
    return calibrate(gpu, last, list(latest.values()))


def stored_at(gpu: str) -> Path:
    """The file of a card's trials; the CPU's is named "CPU"."""
    return cache_folder() / "measured" / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}.jsonl"


@cache
def made_by() -> dict[str, str]:
    """Version of torch, and a digest of the code that predicts: predictions of other code are not used for calibration."""
    timing = Path(roofline.__file__).read_bytes()
    code = hashlib.sha256(versions()["trainfit"].encode() + timing).hexdigest()[:16]
    return {"torch": versions()["torch"], "code": code}


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Append a line in one write, and flush it to the disk.

    Raises:
        TrainfitError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as output:
            output.write(f"\n{json.dumps(record)}\n".encode())  # the last line may have been cut off
            os.fsync(output)
    except OSError as error:
        raise TrainfitError(f"{file}: cannot be written ({error.strerror}); set XDG_CACHE_HOME") from error


def read(file: Path) -> list[dict[str, Any]]:
    """All records, oldest first; none if there is no file. Invalid lines are left out with a warning.

    Raises:
        TrainfitError: the file cannot be read.
    """
    try:
        records, bad = read_json_lines(file, allow_blank=True)
    except OSError as error:
        raise TrainfitError(f"{file} cannot be read ({error.strerror}): remove it") from error
    _warn(file, bad)
    return records


def _warn(file: Path, bad: int) -> None:
    if bad:
        logging.getLogger(__name__).warning("%s: %d unreadable line(s) left out", file, bad)


def _is_trial(record: Mapping[str, Any]) -> bool:
    """Whether a record has the fields that `measuring.bench` writes, with values of the types of `Measured`."""
    try:
        row = Measured.from_json(record["row"])
        require_valid(row)
        if row.predicted is not None:
            require_valid(row.predicted)
            factors = (row.images_per_s, row.predicted.images_per_s, row.predicted.reserved_low_bytes)
            if any(value is not None and value <= 0 for value in factors):
                return False
    except (LookupError, TypeError, AttributeError, TrainfitError):
        return False
    limit_bytes = record.get("limit_bytes", "")
    return (
        isinstance(record.get("made_by"), dict)
        and isinstance(record.get("driver"), str)
        and isinstance(record.get("setting"), dict)
        and (limit_bytes is None or type(limit_bytes) is int)
    )
