"""A run as one self-contained HTML page: curves, how the time was spent, memory, out-of-memory errors."""

from collections.abc import Sequence
from html import escape
from itertools import cycle

from trainfit.gpus.catalogue import GIB
from trainfit.reports import svg
from trainfit.reports.graphics_html import graphics_html
from trainfit.reports.run_report import Row, RunReport, facts, oom_words, steps_words, time_shares
from trainfit.reports.words import duration
from trainfit.training.run_files import PICTURES

_BLUE = "#4ea5b7"
_GREY = "#7f8fa9"
_PINK = "#e889ab"
_VIOLET = "#9575cd"
_ORANGE = "#e38a42"
_GREEN = "#6aa84f"
_FIGURES = (_BLUE, _GREY, _PINK, _VIOLET, _ORANGE, _GREEN)
_LONGER = {"rate": "learning rate", "batch": "batch size"}
"""Names of facts that are written out on the page."""
_PILLS = {"finished": "fits", "going on": "fits", "interrupted": "tight", "not started": "tight", "broken off": "not"}


def run_html(report: RunReport) -> str:
    """The whole page."""
    title = f"{report.model}, {report.folder.name}"
    pill = f"<span class='verdict {_PILLS[report.state]}'>{report.state}</span>"
    rows = "".join(
        f"<tr><td class='soft label'>{_LONGER.get(name, name)}</td><td>{escape(words)}</td></tr>"
        for name, words in facts(report)
        if name != "time"  # the page has a bar of it
    )
    charts = _charts(report)
    parts = [
        f"<h1>{escape(title)} {pill}</h1>",
        f"<p class='soft'>{escape(str(report.folder))}: {steps_words(report)}</p>",
        f"<table>{rows}</table>",
        "<h2>Where the time went</h2>" + _time(report) if report.readings else "",
        f"<h2>Over the steps</h2><div class='charts'>{''.join(charts)}</div>" if charts else "",
        _ooms(report.ooms),
        graphics_html(report.folder / PICTURES),
    ]
    return svg.page(title, parts)


def charts_html(report: RunReport) -> str:
    """A page with only the curves."""
    return svg.page(report.model, [f"<div class='charts'>{''.join(_charts(report))}</div>"])


def _charts(report: RunReport) -> list[str]:
    """The curves for which the run has data."""
    charts = (_loss(report), _evaluations(report), _speed(report), _waiting(report), *_device(report))
    return [chart for chart in charts if chart]


def _curve(rows: Sequence[Row], key: str, name: str, color: str, factor: float = 1.0) -> svg.Curve | None:
    """The curve of a value over the steps; None if no row has the value."""
    points = [(row["step"], None if row.get(key) is None else row[key] * factor) for row in rows]
    return svg.Curve(name=name, color=color, points=points) if any(y is not None for _, y in points) else None


def _chart(report: RunReport, caption: str, *curves: svg.Curve | None, zero: bool = True) -> str:
    """A chart of curves over the whole run; empty if there are none."""
    there = [curve for curve in curves if curve is not None]
    marks = [(row["step"] + 1, f"out of memory: {oom_words(row)}") for row in report.ooms]
    if not there or not report.windows:
        return ""
    across = (report.windows[0]["step"], report.windows[-1]["step"])
    return svg.chart(caption, there, across=across, marks=marks, zero=zero)


def _loss(report: RunReport) -> str:
    """Each window, and the mean of a twentieth of the run before it."""
    single = _curve(report.windows, "loss", "window", _GREY)
    rate = _curve(report.windows, "lr", "", _VIOLET)
    losses = [(row["step"], row["loss"]) for row in report.windows if row["loss"] is not None]
    span = max(1, len(losses) // 20)
    means = [
        (losses[i][0], sum(y for _, y in losses[i - span + 1 : i + 1]) / span) for i in range(span - 1, len(losses))
    ]
    mean = svg.Curve(name=f"mean of {span}", color=_ORANGE, points=means) if span > 1 else None
    return _chart(report, "Loss", single, mean, zero=False) + _chart(report, "Learning rate", rate)


def _evaluations(report: RunReport) -> str:
    """A curve for each figure, as percentages."""
    names = dict.fromkeys(name for row in report.evaluations for name in row["figures"])
    rows = [{"step": row["step"], **row["figures"]} for row in report.evaluations]
    curves = [_curve(rows, name, name, color, 100) for name, color in zip(names, cycle(_FIGURES), strict=False)]
    return _chart(report, "Evaluation, %", *curves)


def _speed(report: RunReport) -> str:
    return _chart(report, "Images a second", _curve(report.readings, "images_per_s", "", _GREEN))


def _waiting(report: RunReport) -> str:
    return _chart(report, "Waiting for data, % of the time", _curve(report.readings, "wait_share", "", _PINK, 100))


def _device(report: RunReport) -> list[str]:
    """Charts of memory and GPU; for a run on the CPU, only of the resident memory."""
    resident = _curve(report.readings, "memory_bytes", "resident", _BLUE, 1 / GIB)
    if report.reserved_bytes is None:
        return [_chart(report, "Host memory, GiB", resident)]
    reserved = _curve(report.readings, "reserved_bytes", "reserved", _GREY, 1 / GIB)
    allocated = _curve(report.readings, "allocated_bytes", "allocated", _BLUE, 1 / GIB)
    ends = [report.readings[0]["step"], report.readings[-1]["step"]]
    level = report.predicted["reserved_bytes"] / GIB if report.predicted else 0.0
    predicted = svg.Curve(
        name="reserved, predicted", color=_ORANGE, points=[(x, level) for x in ends], style="stroke-dasharray='6 4'"
    )
    busy = _curve(report.readings, "gpu_utilization", "", _VIOLET, 100)
    return [
        _chart(report, "Peak memory, GiB", reserved, allocated, predicted if report.predicted else None),
        _chart(report, "GPU busy, % of the time", busy),
        _chart(report, "GPU power, W", _curve(report.readings, "gpu_power_w", "", _ORANGE)),
    ]


def _time(report: RunReport) -> str:
    colors = (_GREEN, _PINK, _BLUE, _ORANGE, _GREY)
    spent = [(name, s, color) for (name, s), color in zip(time_shares(report.time), colors, strict=True) if s > 0]
    total = sum(s for _, s, _ in spent)
    bar = "".join(
        f"<i style='width:{100 * s / total:.2f}%;background:{color}' title='{name}'></i>" for name, s, color in spent
    )
    keys = [(f"{name} {100 * s / total:.1f} %", color) for name, s, color in spent]
    return f"<div class='shares'>{bar}</div>{svg.legend(keys)}<p class='soft'>{duration(total)} in all</p>"


def _ooms(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    items = "".join(f"<li>{escape(oom_words(row))}</li>" for row in rows)
    return f"<h2>Out of memory, and what was done</h2><ul>{items}</ul>"
