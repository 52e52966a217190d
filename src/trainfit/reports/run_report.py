"""A run, read from its folder during training or afterwards; as text and as JSON. Needs no torch."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from trainfit.errors import TrainfitError
from trainfit.files import read_json
from trainfit.gpus.catalogue import GIB
from trainfit.reports.run_memory import growth_words
from trainfit.reports.words import duration, printable, rate
from trainfit.tasks.task import percent
from trainfit.training.lines import counted
from trainfit.training.noise_scale import NoiseSample, NoiseScale, noise_line, noise_scale
from trainfit.training.run_files import METRICS, PLAN, RECIPE, TELEMETRY, read_rows
from trainfit.training.shortage import Survival, survival_words

SCHEMA = 1
Row = Mapping[str, Any]
State = Literal["finished", "interrupted", "going on", "broken off", "not started"]


@dataclass(frozen=True, kw_only=True)
class TimeSpent:
    """How the time was spent, in seconds of rank 0; resumed parts are added up."""

    start_s: float
    """Seconds of reading data, building the model, and loading the first window."""
    compute_s: float
    """Seconds of computing."""
    waited_s: float
    """Seconds of waiting for the loader."""
    paused_s: float
    """Seconds of evaluation and saving."""
    other_s: float
    """Seconds between windows: agreeing and writing."""


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """The content of a run folder."""

    folder: Path
    """The run folder."""
    model: str
    """Name of the model."""
    state: State
    """broken off: nothing was written for a long time, without an entry that the run ended."""
    step: int
    """Optimizer steps done."""
    total_steps: int | None
    """Optimizer steps in all; None before the first window is done."""
    windows: tuple[Row, ...]
    """Lines of metrics.jsonl with a loss: step, loss and its parts, gradient_norm, lr, size, images."""
    evaluations: tuple[Row, ...]
    """Lines of metrics.jsonl with an evaluation: `score`, `score_name`, `figures` by name, and the task's own values."""
    readings: tuple[Row, ...]
    """Lines of telemetry.jsonl: one for each reading of speed, memory, GPU; only the last of a step done twice."""
    ooms: tuple[Row, ...]
    """Every out-of-memory error and what was done."""
    time: TimeSpent
    """How the time was spent."""
    images_per_s: float | None
    """Speed of training over the whole run."""
    wait_share: float | None
    """Share of the training time spent waiting for the loader."""
    reserved_bytes: int | None
    """Peak that torch reserved; None on the CPU."""
    allocated_bytes: int | None
    """Largest bytes in tensors."""
    resident_bytes: int | None
    """Largest resident memory of the process; None on a GPU."""
    predicted: Row | None
    """Prediction of the plan that the run was started with."""
    growth: str | None
    """Whether memory grew with the input or without a reason, in words; None: not known."""
    alloc_retries: int | None
    """How often the allocator emptied its cache to satisfy a request."""
    loader: Row | None
    """The last verdict on the loader, its line included."""
    noise: NoiseScale | None
    """The gradient noise scale; None if it was not measured."""
    noise_line: str | None
    """A sentence on the noise scale."""
    unreadable_lines: int
    """Number of lines that a kill cut short, or that are being written."""


def read_run(folder: Path, now: float | None = None) -> RunReport:
    """Read a run folder; `now` is the time (time.time) by which a run counts as still training or stopped.

    Raises:
        TrainfitError: not a run folder.
    """
    recipe = _object(folder / RECIPE)
    plan = _object(folder / PLAN)
    if recipe is None:
        raise TrainfitError(f"{folder} is not a run folder (no {RECIPE}): give the folder that trainfit train wrote")
    metrics, bad_metrics = read_rows(folder / METRICS)
    telemetry, bad_telemetry = read_rows(folder / TELEMETRY)
    readings = [row for row in telemetry if "event" not in row]
    events = {
        name: [r for r in telemetry if r.get("event") == name] for name in ("start", "pause", "oom", "loader", "noise")
    }
    windows = [row for row in metrics if "loss" in row]
    started = events["start"]
    samples = {row["step"]: row for row in events["noise"]}
    scale = noise_scale([NoiseSample(trace=r["trace"], square=r["square"]) for r in samples.values()])
    elapsed_s = _sum(readings, "elapsed_s")
    return RunReport(
        folder=folder,
        model=str(recipe["model"]),
        state=_state(telemetry, time.time() if now is None else now),
        step=windows[-1]["step"] if windows else 0,
        total_steps=started[-1]["total_steps"] if started else None,
        windows=tuple(windows),
        evaluations=tuple(_evaluation(row) for row in metrics if "figures" in row or "bbox_ap" in row),
        readings=tuple(dict(sorted({row["step"]: row for row in readings}.items())).values()),
        ooms=tuple(events["oom"]),
        time=_time(readings, started, events["pause"], elapsed_s),
        images_per_s=_mean_speed(readings),
        wait_share=_sum(readings, "waited_s") / elapsed_s if elapsed_s else None,
        reserved_bytes=_most(readings, "reserved_bytes"),
        allocated_bytes=_most(readings, "allocated_bytes"),
        resident_bytes=None if _most(readings, "reserved_bytes") else _most(readings, "memory_bytes"),
        predicted=plan.get("predicted") if plan else None,
        growth=growth_words(readings, events["pause"]),
        alloc_retries=_most(readings, "alloc_retries"),
        loader=events["loader"][-1] if events["loader"] else None,
        noise=scale,
        noise_line=_hint(scale, started, telemetry),
        unreadable_lines=bad_metrics + bad_telemetry,
    )


def _evaluation(row: Row) -> Row:
    """An evaluation with its score and figures; until version 0.1 a row had the values of detection alone."""
    if "figures" in row:
        return row
    kinds = [kind for kind in ("bbox", "segm") if f"{kind}_ap" in row]
    figures = {f"{kind} {name.upper()}": row[f"{kind}_{name}"] for kind in kinds for name in ("ap", "ap50")}
    return {**row, "score": row[f"{kinds[-1]}_ap"], "score_name": "AP", "figures": figures}


def _object(path: Path) -> Row | None:
    """The content of a JSON file; None if it does not exist."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise TrainfitError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise TrainfitError(f"{path} is damaged ({error})") from error


def _state(telemetry: Sequence[Row], now: float) -> State:
    """The state by the last start and end; a run without an event for 5 minutes and three times its longest gap has stopped."""
    marks = [row for row in telemetry if row.get("event") in ("start", "end")]
    if not marks:
        return "not started"
    if marks[-1]["event"] == "end":
        return "interrupted" if marks[-1]["interrupted"] else "finished"
    times = [row["time"] for row in telemetry[telemetry.index(marks[-1]) :]]
    longest_s = max((b - a for a, b in pairwise(times)), default=0.0)
    return "going on" if now - times[-1] < max(300.0, 3 * longest_s) else "broken off"


def _time(readings: Sequence[Row], starts: Sequence[Row], pauses: Sequence[Row], elapsed_s: float) -> TimeSpent:
    compute_s = _sum(readings, "compute_s")
    waited_s = _sum(readings, "waited_s")
    return TimeSpent(
        start_s=_sum(starts, "start_s"),
        compute_s=compute_s,
        waited_s=waited_s,
        paused_s=_sum(pauses, "paused_s"),
        other_s=max(0.0, elapsed_s - compute_s - waited_s),
    )


def _hint(scale: NoiseScale | None, starts: Sequence[Row], telemetry: Sequence[Row]) -> str | None:
    if scale is not None and starts:
        return noise_line(scale, starts[-1]["effective_batch"])
    ends = [row for row in telemetry if row.get("event") == "end"]
    return ends[-1]["noise"] if ends else None


def _sum(rows: Sequence[Row], key: str) -> float:
    return sum(row.get(key) or 0.0 for row in rows)


def _most(rows: Sequence[Row], key: str) -> int | None:
    return max((row[key] for row in rows if row.get(key) is not None), default=None)


def _mean_speed(readings: Sequence[Row]) -> float | None:
    """Images of all ranks over seconds."""
    seconds = _sum(readings, "elapsed_s")
    return sum(row["images_per_s"] * row["elapsed_s"] for row in readings) / seconds if seconds else None


def run_json(report: RunReport) -> dict[str, Any]:
    """The report as JSON values: `schema` 1. Infinite values (a noise scale without an upper bound) are null."""
    values = asdict(report) | {"folder": str(report.folder)}
    if report.noise is not None:
        values["noise"] = {k: None if v == float("inf") else v for k, v in asdict(report.noise).items()}
    return {"schema": SCHEMA, **values}


def run_text(report: RunReport) -> str:
    """A sentence, then a line for each fact."""
    lines = [headline(report), *(f"{name:<12}{words}" for name, words in facts(report))]
    lines += [f"{'' if i else 'out of memory':<12}  {line}" for i, line in enumerate(map(oom_words, report.ooms))]
    if report.state in ("interrupted", "broken off"):
        lines.append(f"Go on:      trainfit train --resume {report.folder}")
    return "\n".join(lines)


def facts(report: RunReport) -> list[tuple[str, str]]:
    """(name, words) of what the run recorded, in order; without what it did not record."""
    rows = [
        ("loss", loss_words(report)),
        ("evaluation", evaluation_words(report)),
        ("rate", rate_words(report)),
        ("speed", speed_words(report)),
        ("time", time_words(report.time)),
        ("loader", report.loader["line"] if report.loader else None),
        ("memory", memory_words(report)),
        ("growth", report.growth),
        ("regions", numbers_words(report)),
        ("GPU", gpu_words(report)),
        ("batch", report.noise_line),
        ("left out", counted(report.unreadable_lines, "unreadable line") if report.unreadable_lines else None),
    ]
    return [(name, words) for name, words in rows if words]


def headline(report: RunReport) -> str:
    """Model, folder, state and progress."""
    return f"{report.model}, {report.folder}: {report.state}, {steps_words(report)}."


def steps_words(report: RunReport) -> str:
    """Optimizer steps done, and in all."""
    if report.total_steps is None:
        return counted(report.step, "step")
    return f"{report.step} of {counted(report.total_steps, 'step')}"


def loss_words(report: RunReport) -> str | None:
    """Mean of the first and of the last tenth."""
    losses = [row["loss"] for row in report.windows if row["loss"] is not None]
    if not losses:
        return None
    tenth = max(1, len(losses) // 10)
    broken = len(report.windows) - len(losses)
    means = f"{fmean(losses[:tenth]):.4g} -> {fmean(losses[-tenth:]):.4g}"
    words = f"{means} (mean of the first and of the last {counted(tenth, 'window')})"
    return words + (f"; {broken} windows without a finite loss" if broken else "")


def evaluation_words(report: RunReport) -> str | None:
    """The figures of the last evaluation, and the best score."""
    if not report.evaluations:
        return None
    last = report.evaluations[-1]
    figures = ", ".join(f"{printable(name)} {percent(value)}" for name, value in last["figures"].items())
    scored = [row for row in report.evaluations if row["score"] is not None]
    if not scored:
        return f"step {last['step']}: {figures}"
    best = max(scored, key=lambda row: row["score"])
    return f"step {last['step']}: {figures}; best {best['score_name']} {percent(best['score'])} at step {best['step']}"


def rate_words(report: RunReport) -> str | None:
    """The learning rate from first to last."""
    rates = [row["lr"] for row in report.windows]
    if not rates:
        return None
    if rates[0] == rates[-1]:
        return f"{rates[0]:.3g}"
    return f"{rates[0]:.3g} -> {rates[-1]:.3g}"


def speed_words(report: RunReport) -> str | None:
    """Images a second, and what was predicted where times were calibrated."""
    if report.images_per_s is None:
        return None
    predicted = (report.predicted or {}).get("images_per_s") if (report.predicted or {}).get("calibrated") else None
    return f"{rate(report.images_per_s)} images/s" + (f"; predicted {rate(predicted)}" if predicted else "")


def time_shares(spent: TimeSpent) -> list[tuple[str, float]]:
    """Names and seconds, in the order of a window."""
    return [
        ("compute", spent.compute_s),
        ("waiting for data", spent.waited_s),
        ("evaluation and saving", spent.paused_s),
        ("start", spent.start_s),
        ("other", spent.other_s),
    ]


def time_words(spent: TimeSpent) -> str | None:
    """The whole time, and each share of it."""
    total = sum(seconds for _, seconds in time_shares(spent))
    if not total:
        return None
    return f"{duration(total)}: " + ", ".join(f"{100 * s / total:.0f} % {name}" for name, s in time_shares(spent))


def memory_words(report: RunReport) -> str | None:
    """Peaks, and the prediction where the run had a plan."""
    if report.resident_bytes is not None:
        return f"{report.resident_bytes / GIB:.2f} GiB resident (CPU)"
    if report.reserved_bytes is None or report.allocated_bytes is None:
        return None
    words = f"{report.reserved_bytes / GIB:.2f} GiB reserved, {report.allocated_bytes / GIB:.2f} allocated at most"
    if report.predicted:
        reserved, allocated = (report.predicted[f"{name}_bytes"] for name in ("reserved", "allocated"))
        off = 100 * (reserved / report.reserved_bytes - 1)
        words += f"; predicted {reserved / GIB:.2f} ({off:+.1f} %) and {allocated / GIB:.2f}"
    return words + (f"; {report.alloc_retries} allocator retries" if report.alloc_retries else "")


def numbers_words(report: RunReport) -> str | None:
    """The inputs that determine the memory of windows: in the first and the last reading, and the largest."""
    rows = [row["window_numbers"] for row in report.readings if row.get("window_numbers")]
    if not rows:
        return None
    most = {name: max(row.get(name, 0) for row in rows) for name in rows[0]}
    each = (f"{rows[0][name]:,.0f} -> {rows[-1].get(name, 0):,.0f} {name} (most {most[name]:,.0f})" for name in most)
    return f"a window: {', '.join(each)}"


def gpu_words(report: RunReport) -> str | None:
    """Medians of what the driver readings."""
    readings = {key: [r[key] for r in report.readings if r.get(key) is not None] for key in GPU_UNITS}
    words = [
        f"{median(readings[key]) * factor:.{digits}f} {unit}"
        for key, (factor, digits, unit) in GPU_UNITS.items()
        if readings[key]
    ]
    return ", ".join(words) + " (medians)" if words else None


GPU_UNITS = {
    "gpu_utilization": (100, 0, "% of the time busy"),
    "gpu_power_w": (1, 0, "W"),
    "gpu_memory_used_bytes": (1 / GIB, 2, "GiB in use by all processes"),
}
"""Key -> factor, digits and unit to show it in."""


def oom_words(row: Row) -> str:
    """One out-of-memory error and what was done, or a larger micro-batch tried again."""
    names = [field.name for field in fields(Survival)]
    values: dict[str, Any] = {"cause": "unknown"} | {name: row[name] for name in names if name in row}
    return survival_words(Survival(**values))
