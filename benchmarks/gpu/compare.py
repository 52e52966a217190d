"""Predictions against what `measure.py` measured: a table by family, and a picture.

    python benchmarks/gpu/compare.py [--measured benchmarks/measured] [--out benchmarks/results]

Writes gpu.txt and gpu.svg. Traces that are not stored take some 20 s each.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

from settings import Case

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import Gpu, match_driver_name
from trainfit.gpus.context import cuda_context_bytes
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.predict import Verdict, assess, trace_requests
from trainfit.memory.profile import last_window
from trainfit.tracing.stored_trace import StoredTrace
from trainfit.tracing.trace_cache import TraceRequest, get_traces

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
COLOURS = {
    "rfdetr": "#1b6ca8", "maskrcnn": "#c8553d", "clip": "#3a7d44", "classifier": "#8e5572", "custom": "#b8860b",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One measured case and its prediction."""

    name: str
    family: str
    ran: bool
    """False: out of memory."""
    verdict: Verdict
    measured_bytes: int
    """Peak reserved."""
    predicted_bytes: int
    """Peak reserved with every unknown at its smallest."""
    high_bytes: int
    """Top of the interval of peak reserved memory."""
    needed_bytes: int
    """Peak allocated, and the context at the end: less would surely not have done."""
    held_bytes: int
    """Peak reserved, and the context at the end: so much surely does."""
    limit_bytes: int
    """The top of what the whole process is predicted to need: "fits" says that so much is there."""
    time_ratio: float | None
    """Predicted time of a window over the measured one; None: no speed on one side."""

    @property
    def error(self) -> float:
        """Relative error of the predicted peak reserved memory; positive: too high."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def high_error(self) -> float:
        """The same of the highest."""
        return self.high_bytes / self.measured_bytes - 1

    @property
    def wrong(self) -> bool:
        """A verdict that the run refutes."""
        return self.verdict == ("does not fit" if self.ran else "fits")


def load(folder: Path) -> dict[Path, list[dict[str, Any]]]:
    """File -> its records of cases that ran on a GPU, or ran out of its memory."""
    return {file: comparable(json.loads(file.read_text())["records"]) for file in sorted(folder.glob("*.json"))}


def comparable(records: Sequence[dict[str, Any]], *, rehearsed: bool = False) -> list[dict[str, Any]]:
    """Without kernels' samples, dry runs on the CPU, rehearsals, and cases that failed for another reason."""
    measured = [r for r in records if "case" in r and r["outcome"] != "error" and r["machine"]["device"] == "cuda"]
    return [r for r in measured if r["machine"].get("stand_in", False) == rehearsed]


def gpu_of(record: Mapping[str, Any]) -> Gpu:
    """The catalogue's card with the memory that the driver gave.

    Raises:
        TrainfitError: the card is not in the catalogue.
    """
    machine = record["machine"]
    found = match_driver_name(machine["card"], machine["total_bytes"])
    if found is None:
        raise TrainfitError(f"{record['name']}: {machine['card']} is not in the catalogue")
    return replace(found, memory_bytes=machine["total_bytes"], memory_is_nominal=False)


def request(record: Mapping[str, Any]) -> TraceRequest:
    """The trace that its prediction is made from."""
    case = Case.from_json(record["case"])
    return trace_requests(case.setting, gpu_of(record))[case.part == "evaluation"]


def judge(record: Mapping[str, Any], stored: StoredTrace) -> Compared:
    """Predict from the trace, with the allocator's settings and limit as measured."""
    case, gpu = Case.from_json(record["case"]), gpu_of(record)
    limit = case.limit_bytes
    config = AllocatorConfig(
        expandable_segments=case.expandable,
        per_process_memory_fraction=None if limit is None else limit / gpu.memory_bytes,
    )
    evaluates = case.part == "evaluation"
    predicted = assess(stored, gpu, config, since=last_window(stored.trace) if evaluates else 0)
    peak, context, speed = record["peak"], record["context_bytes"]["end"], record["speed"]
    images = _images(case)
    ratio = predicted.time.seconds * speed["images_per_s"] / images if predicted.time and speed else None
    return Compared(
        name=case.name,
        family=case.setting.family.name,
        ran=record["outcome"] == "ran",
        verdict=predicted.verdict,
        measured_bytes=peak["reserved_bytes"],
        predicted_bytes=predicted.profile.peak_reserved_bytes,
        high_bytes=predicted.takes.high_bytes - cuda_context_bytes(gpu).high_bytes,
        needed_bytes=peak["allocated_bytes"] + context,
        held_bytes=peak["reserved_bytes"] + context,
        limit_bytes=predicted.needs.high_bytes,
        time_ratio=ratio,
    )


def _images(case: Case) -> int:
    s = case.setting
    return (s.eval_micro_batch or s.micro_batch) if case.part == "evaluation" else s.micro_batch * s.accumulation


def table(rows: Sequence[Compared]) -> str:
    """Errors of peak reserved memory by family, verdicts, the chance to die at the predicted limit, and every case."""
    head = f"{'':12}{'cases':>6}{'median':>8}{'worst':>8}{'lowest':>8}{'low':>6}{'>5% low':>9}"
    lines = [
        "Peak reserved memory, predicted against measured. median, worst: absolute error of the prediction with unknowns at",
        "their smallest; lowest: its lowest error; low, >5% low: share of cases predicted too low, and more than 5 % too low,",
        "and the same for the prediction with unknowns at their largest, which verdicts go by. dies: share of runs that would",
        "run out of memory with the predicted need as their limit (surely, and at most). time: predicted over measured.",
        "",
        f"{head}{'high low':>10}{'>5% low':>9}{'dies':>12}{'verdicts':>10}{'OOM':>5}{'time':>6}",
    ]
    for name in [*COLOURS, "all"]:
        if some := [row for row in rows if name in (row.family, "all")]:
            lines.append(_line(name, some))
    lines += ["", f"{'case':60}{'measured':>10}{'predicted':>11}{'high':>8}  GiB{'error':>8}  verdict"]
    return "\n".join([*lines, *(_case(row) for row in sorted(rows, key=lambda row: (not row.ran, row.error)))]) + "\n"


def _line(name: str, rows: Sequence[Compared]) -> str:
    ran = [row for row in rows if row.ran]
    right = f"{sum(not row.wrong for row in rows)}/{len(rows)}"
    if not ran:
        return f"{name:12}{len(rows):6}{'':60}{right:>10}{len(rows):5}"
    errors, high = [row.error for row in ran], [row.high_error for row in ran]
    worst = max(errors, key=abs)
    surely = _share([row.needed_bytes > row.limit_bytes for row in ran])
    most = _share([row.held_bytes > row.limit_bytes for row in ran])
    times = [row.time_ratio for row in ran if row.time_ratio is not None]
    return (
        f"{name:12}{len(rows):6}{median(map(abs, errors)):8.1%}{worst:+8.1%}{min(errors):+8.1%}"
        f"{_share([e < 0 for e in errors]):6.0%}{_share([e < -0.05 for e in errors]):9.0%}"
        f"{_share([e < 0 for e in high]):10.0%}{_share([e < -0.05 for e in high]):9.0%}"
        f"{f'{surely:.0%}..{most:.0%}':>12}{right:>10}{len(rows) - len(ran):5}"
        f"{f'{median(times):.2f}' if times else '-':>6}"
    )


def _share(those: Sequence[bool]) -> float:
    return sum(those) / len(those)


def _case(row: Compared) -> str:
    measured, error = (
        (f"{row.measured_bytes / GIB:10.2f}", f"{row.error:+8.1%}") if row.ran else (f"{'OOM':>10}", f"{'':8}")
    )
    said = f"{row.verdict}{' - WRONG' if row.wrong else ''}"
    return f"{row.name:60}{measured}{row.predicted_bytes / GIB:11.2f}{row.high_bytes / GIB:8.2f}     {error}  {said}"


def picture(rows: Sequence[Compared]) -> str:
    """SVG: predicted over measured peak reserved memory of the cases that ran, both logarithmic, with a band of 5 %."""
    ran = [row for row in rows if row.ran]
    values = [b / GIB for row in ran for b in (row.measured_bytes, row.predicted_bytes)]
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)) + 0.01)
    side, left, top = 520, 60, 40

    def at(gib: float) -> float:
        return side * (math.log2(gib) - low) / (high - low)

    def x(gib: float) -> str:
        return f"{left + at(gib):.1f}"

    def y(gib: float) -> str:
        return f"{top + side - at(gib):.1f}"

    first, last = 2.0**low, 2.0**high
    band = f"{x(first)},{y(first * 1.05)} {x(last)},{y(last * 1.05)} {x(last)},{y(last / 1.05)} {x(first)},{y(first / 1.05)}"
    marks = [2.0**power for power in range(low, high + 1)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side + 200} {side + 100}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">Peak reserved memory of {len(ran)} runs; band: 5 %</text>',
        *(f'<path d="M{x(m)} {y(first)}V{y(last)}M{x(first)} {y(m)}H{x(last)}" stroke="#ddd"/>' for m in marks),
        *(f'<text x="{x(m)}" y="{top + side + 18}" text-anchor="middle">{m:g}</text>' for m in marks),
        *(f'<text x="{left - 8}" y="{y(m)}" dy="4" text-anchor="end">{m:g}</text>' for m in marks),
        f'<polygon points="{band}" fill="#bbb" fill-opacity="0.5"/>',
        f'<path d="M{x(first)} {y(first)}L{x(last)} {y(last)}" stroke="#666"/>',
        f'<text x="{left + side / 2}" y="{top + side + 40}" text-anchor="middle">measured, GiB</text>',
        f'<text transform="translate(16 {top + side / 2}) rotate(-90)" text-anchor="middle">predicted, GiB</text>',
    ]
    for row in ran:
        place = f'cx="{x(row.measured_bytes / GIB)}" cy="{y(row.predicted_bytes / GIB)}"'
        title = escape(f"{row.name}: {row.error:+.1%}")
        parts.append(
            f'<circle {place} r="4" fill="{COLOURS[row.family]}" fill-opacity="0.8"><title>{title}</title></circle>'
        )
    for i, name in enumerate(sorted({row.family for row in ran})):
        line = top + 20 * i + 10
        parts.append(f'<circle cx="{left + side + 20}" cy="{line}" r="4" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{left + side + 30}" y="{line + 4}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main(argv: list[str]) -> int:
    """Compare all files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=ROOT / "benchmarks" / "measured")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    found = [record for records in load(arguments.measured).values() for record in records]
    if not found:
        print(f"no measurements in {arguments.measured}: measure.py makes them on a machine with a GPU")
        return 0
    try:
        rows = [judge(r, t) for r, t in zip(found, get_traces(map(request, found)), strict=True)]
    except TrainfitError as error:
        print(error, file=sys.stderr)
        return 1
    text = table(rows)
    print(text, end="")
    (arguments.out / "gpu.txt").write_text(text)
    if any(row.ran for row in rows):
        (arguments.out / "gpu.svg").write_text(picture(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
