"""A prediction as one self-contained HTML page: inline SVG, light and dark."""

from collections.abc import Sequence
from html import escape
from itertools import accumulate, groupby

from trainfit.gpus.catalogue import GIB, MIB
from trainfit.memory.hidden import HiddenRow
from trainfit.memory.predict import Prediction
from trainfit.memory.profile import Profile, ProfileSample
from trainfit.reports import svg
from trainfit.reports.html_tables import bullets, byte_bars
from trainfit.reports.profile import category_rows, doubts, gib, limit_bytes, scale_bytes, sentence, spread
from trainfit.tracing.events import CATEGORIES

_WIDTH = 960
_HEIGHT = 340
_LEFT = 56
_TOP = 34
_BOTTOM = 26
_COLORS = ("#4ea5b7", "#7f8fa9", "#e889ab", "#b39ddb", "#e38a42", "#c9b458", "#6aa84f", "#8c6d5a", "#9e9e9e", "#bdbdbd")
"""One for each of CATEGORIES; parameters, gradients, optimizer state and activations as the Ultra-Scale Playbook has them."""
CATEGORY_COLORS: dict[str, str] = dict(zip(CATEGORIES, _COLORS, strict=True))
_CACHED = "reserved, not allocated"


def profile_html(prediction: Prediction) -> str:
    """Timeline by category with the limit and the peak, categories, modules, hidden memory, evaluation, assumptions."""
    training = prediction.training
    setting = prediction.setting
    title = f"{setting.model}, micro-batch {setting.micro_batch}, {prediction.gpu.name}"
    css = {"fits": "fits", "tight": "tight", "does not fit": "not"}[prediction.verdict]
    evaluation = prediction.evaluation
    parts = [
        f"<h1>{escape(title)} <span class='verdict {css}'>{prediction.verdict}</span></h1>",
        f"<p>{escape(sentence(prediction))}</p>",
        "<h2>One window of training, GiB</h2>",
        timeline(training.profile, limit_bytes(prediction)),
        "<h2>At the peak</h2>",
        byte_bars(category_rows(training.profile), CATEGORY_COLORS),
        "<h2>By module, at the peak</h2>",
        modules(training.profile),
        "<h2>Overheads outside the trace</h2>",
        _hidden(training.hidden),
        "<h2>Evaluation</h2>",
        f"<p>{evaluation.verdict}; needs {spread(evaluation.needs)}, "
        f"allocates {gib(evaluation.profile.peak_allocated_bytes)} GiB at most.</p>",
        "<h2>Assumptions</h2>",
        bullets((*prediction.assumptions, *doubts(prediction))),
    ]
    return svg.page(title, parts)


def timeline(profile: Profile, limit: int) -> str:
    """Bands stacked by category over the events of the window, reserved memory behind them, and their legend."""
    top, in_picture = scale_bytes(profile, limit)
    top = round(top * 1.06)
    samples = profile.timeline
    first = samples[0].event
    last = samples[-1].event

    def x(sample: ProfileSample) -> float:
        return _LEFT + (sample.event - first) / max(1, last - first) * (_WIDTH - _LEFT)

    def y(nbytes: float) -> float:
        return _HEIGHT - _BOTTOM - nbytes / top * (_HEIGHT - _BOTTOM - _TOP)

    stacks = [(0, *accumulate(sample.category_bytes)) for sample in samples]
    shapes = [svg.area([(x(s), y(0), y(s.reserved_bytes)) for s in samples], "var(--cache)", _CACHED)]
    for i, color in enumerate(_COLORS):
        if any(sample.category_bytes[i] for sample in samples):
            edges = [(x(s), y(stack[i]), y(stack[i + 1])) for s, stack in zip(samples, stacks, strict=True)]
            shapes.append(svg.area(edges, color, CATEGORIES[i]))
    for tick in svg.ticks(top / GIB):
        height = y(tick * GIB)
        shapes.append(svg.text(_LEFT - 6, height + 4, f"{tick:g}", anchor="end"))
        shapes.append(svg.line(_LEFT, height, _WIDTH, height, "var(--line)", "stroke-width='.5'"))
    for phase, group in groupby(samples, key=lambda sample: sample.phase):
        stretch = list(group)
        left = x(stretch[0])
        shapes.append(svg.line(left, _TOP, left, _HEIGHT - _BOTTOM, "var(--soft)", "stroke-dasharray='2 4'"))
        if x(stretch[-1]) - left > 7 * len(phase):
            shapes.append(svg.text(left + 4, _HEIGHT - 8, phase))
    shapes += _limit(limit, y(limit) if in_picture else None)
    if profile.peak.event >= first:
        shapes.append(_peak(profile, x(profile.peak), y(profile.peak_requested_bytes)))
    return svg.picture(_WIDTH, _HEIGHT, "Memory over one window", shapes) + _legend(profile)


def _limit(limit: int, height: float | None) -> list[str]:
    """The budget line; None if it is above the picture."""
    if height is None:
        above = f"limit {gib(limit)} GiB, above the picture"
        return [svg.text(_WIDTH - 6, 12, above, anchor="end", css="limit")]
    return [
        svg.line(_LEFT, height, _WIDTH, height, "var(--limit)", "stroke-width='1.5'"),
        svg.text(_WIDTH - 6, height - 5, f"limit {gib(limit)} GiB", anchor="end", css="limit"),
    ]


def _peak(profile: Profile, x: float, y: float) -> str:
    right = x > _WIDTH / 2
    label = f"peak {gib(profile.peak_allocated_bytes)} GiB: {profile.peak.phase}, {profile.peak_module}"
    text = svg.text(x - 8 if right else x + 8, _TOP - 6, label, anchor="end" if right else "start", css="strong")
    return (
        svg.line(x, _TOP - 14, x, y, "var(--ink)", "")
        + f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='var(--ink)'/>"
        + text
    )


def _legend(profile: Profile) -> str:
    shown = [name for i, name in enumerate(CATEGORIES) if any(s.category_bytes[i] for s in profile.timeline)]
    return svg.legend([*((name, CATEGORY_COLORS[name]) for name in shown), (_CACHED, "var(--cache)")])


def modules(profile: Profile) -> str:
    """What is alive at the peak by top-level module; the innermost ones unfold."""
    top, deep = ([(row.module, row.bytes) for row in rows] for rows in (profile.modules, profile.deep_modules))
    unfolds = f"<details><summary>All {len(deep)} modules</summary>{byte_bars(deep)}</details>"
    return byte_bars(top) + unfolds


def _hidden(rows: Sequence[HiddenRow]) -> str:
    cells = [
        f"<tr><td>{row.name}</td><td class='number'>{row.low_bytes / MIB:.1f} to {row.high_bytes / MIB:.1f} MiB</td>"
        f"<td>{row.within}</td><td class='soft'>{escape(row.source)}</td></tr>"
        for row in rows
    ]
    return f"<table><tr><th></th><th></th><th>part of</th><th>source</th></tr>{''.join(cells)}</table>"
