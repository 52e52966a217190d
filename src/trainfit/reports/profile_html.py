"""A prediction as one HTML page that needs nothing else: inline SVG, light and dark."""

from collections.abc import Sequence
from html import escape
from itertools import accumulate, groupby

from trainfit.gpus.catalogue import GIB, MIB
from trainfit.memory.events import CATEGORIES
from trainfit.memory.hidden import HiddenRow
from trainfit.memory.predict import Prediction
from trainfit.memory.profile import Profile, Sample
from trainfit.reports.profile import category_rows, doubts, gib, interval, limit_bytes, scale_bytes, sentence

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 340, 56, 34, 26
_COLORS = ("#4ea5b7", "#7f8fa9", "#e889ab", "#b39ddb", "#e38a42", "#c9b458", "#6aa84f", "#8c6d5a", "#9e9e9e", "#bdbdbd")
"""One for each of CATEGORIES; parameters, gradients, optimizer state and activations as the Ultra-Scale Playbook has them."""
_BARS: dict[str, str] = dict(zip(CATEGORIES, _COLORS, strict=True))
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #ffffff; --soft: #667085; --line: #d8dde5; --limit: #d92d20;
  --cache: #e4e8ee; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --paper: #14181f; --soft: #98a2b3; --line: #343b47;
  --limit: #ff6b5e; --cache: #262d38; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 1000px; padding: 0 20px; }
h1 { font-size: 1.35rem; margin-bottom: .3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.verdict { display: inline-block; padding: 0 .6em; border-radius: 1em; color: #fff; font-weight: 600; }
.fits { background: #2e7d32; } .tight { background: #b26a00; } .not { background: #c62828; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .strong { fill: var(--ink); } svg .limit { fill: var(--limit); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; white-space: nowrap; } .soft { color: var(--soft); }
.wide { width: 55%; } summary { margin: .6rem 0; cursor: pointer; } .name { overflow-wrap: anywhere; }
.bar { display: block; height: .8em; margin-top: .35em; border-radius: 2px; min-width: 1px; }
.key { display: inline-block; margin-right: 1.1em; } .key i { display: inline-block; width: .8em; height: .8em;
  margin-right: .35em; border-radius: 2px; }
"""


def profile_html(prediction: Prediction) -> str:
    """Timeline by category with the limit and the peak, categories, modules, hidden memory, evaluation, assumptions."""
    training, setting = prediction.training, prediction.setting
    title = f"{setting.model}, micro-batch {setting.micro_batch}, {prediction.gpu.name}"
    css = {"fits": "fits", "tight": "tight", "does not fit": "not"}[prediction.verdict]
    evaluation = prediction.evaluation
    parts = [
        f"<h1>{escape(title)} <span class='verdict {css}'>{prediction.verdict}</span></h1>",
        f"<p>{escape(sentence(prediction))}</p>",
        "<h2>One window of training, GiB</h2>",
        _timeline(training.profile, limit_bytes(prediction)),
        _legend(training.profile),
        "<h2>At the peak</h2>",
        _bars(category_rows(training.profile)),
        "<h2>By module, at the peak</h2>",
        _modules(training.profile),
        "<h2>What no operator shows</h2>",
        _hidden(training.hidden),
        "<h2>Evaluation</h2>",
        f"<p>{evaluation.verdict}; needs {interval(evaluation.low_bytes, evaluation.high_bytes)}, "
        f"allocates {gib(evaluation.profile.peak_allocated_bytes)} GiB at most.</p>",
        "<h2>Assumptions</h2>",
        "<ul>"
        + "".join(f"<li>{escape(line)}</li>" for line in (*prediction.assumptions, *doubts(prediction)))
        + "</ul>",
    ]
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
    return f"<!doctype html><html lang='en'><head>{head}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def _timeline(profile: Profile, limit: int) -> str:
    """Bands stacked by category over the events of the window, reserved memory behind them."""
    top, in_picture = scale_bytes(profile, limit)
    top = round(top * 1.06)
    samples = profile.timeline
    first, last = samples[0].event, samples[-1].event

    def x(sample: Sample) -> float:
        return _LEFT + (sample.event - first) / max(1, last - first) * (_WIDTH - _LEFT)

    def y(nbytes: float) -> float:
        return _HEIGHT - _BOTTOM - nbytes / top * (_HEIGHT - _BOTTOM - _TOP)

    stacks = [(0, *accumulate(sample.category_bytes)) for sample in samples]
    shapes = [_area([(x(s), y(0), y(s.reserved_bytes)) for s in samples], "var(--cache)")]
    for i, color in enumerate(_COLORS):
        if any(sample.category_bytes[i] for sample in samples):
            band = [(x(s), y(stack[i]), y(stack[i + 1])) for s, stack in zip(samples, stacks, strict=True)]
            shapes.append(_area(band, color, CATEGORIES[i]))
    for tick in _ticks(top / GIB):
        shapes.append(_text(_LEFT - 6, y(tick * GIB) + 4, f"{tick:g}", anchor="end"))
        shapes.append(_line(_LEFT, y(tick * GIB), _WIDTH, y(tick * GIB), "var(--line)", "stroke-width='.5'"))
    for phase, group in groupby(samples, key=lambda sample: sample.phase):
        stretch = list(group)
        shapes.append(
            _line(x(stretch[0]), _TOP, x(stretch[0]), _HEIGHT - _BOTTOM, "var(--soft)", "stroke-dasharray='2 4'")
        )
        if x(stretch[-1]) - x(stretch[0]) > 7 * len(phase):
            shapes.append(_text(x(stretch[0]) + 4, _HEIGHT - 8, phase))
    if in_picture:
        shapes.append(_line(_LEFT, y(limit), _WIDTH, y(limit), "var(--limit)", "stroke-width='1.5'"))
        shapes.append(_text(_WIDTH - 6, y(limit) - 5, f"limit {gib(limit)} GiB", anchor="end", css="limit"))
    else:
        shapes.append(_text(_WIDTH - 6, 12, f"limit {gib(limit)} GiB, above the picture", anchor="end", css="limit"))
    if profile.peak.event >= first:
        shapes.append(_peak(profile, x(profile.peak), y(profile.peak_requested_bytes)))
    return (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='Memory over one window'>{''.join(shapes)}</svg>"
    )


def _ticks(top: float) -> list[float]:
    """At most six round numbers from 0 to `top`."""
    step = next(m * 10**e for e in range(-4, 6) for m in (1, 2, 5) if 5 * m * 10**e >= top)
    return [i * step for i in range(int(top / step) + 1)]


def _peak(profile: Profile, x: float, y: float) -> str:
    right = x > _WIDTH / 2
    label = f"peak {gib(profile.peak_allocated_bytes)} GiB: {profile.peak.phase}, {profile.peak_module}"
    text = _text(x - 8 if right else x + 8, _TOP - 6, label, anchor="end" if right else "start", css="strong")
    return (
        _line(x, _TOP - 14, x, y, "var(--ink)", "")
        + f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.5' fill='var(--ink)'/>"
        + text
    )


def _area(points: Sequence[tuple[float, float, float]], color: str, title: str = "reserved, not allocated") -> str:
    """A band between two curves; `points` are (x, lower y, upper y)."""
    path = [f"{x:.1f},{upper:.1f}" for x, _, upper in points] + [
        f"{x:.1f},{lower:.1f}" for x, lower, _ in reversed(points)
    ]
    return f"<polygon points='{' '.join(path)}' fill='{color}'><title>{title}</title></polygon>"


def _line(x0: float, y0: float, x1: float, y1: float, color: str, more: str) -> str:
    return f"<line x1='{x0:.1f}' y1='{y0:.1f}' x2='{x1:.1f}' y2='{y1:.1f}' stroke='{color}' {more}/>"


def _text(x: float, y: float, text: str, *, anchor: str = "start", css: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' class='{css}'>{escape(text)}</text>"


def _legend(profile: Profile) -> str:
    shown = [name for i, name in enumerate(CATEGORIES) if any(s.category_bytes[i] for s in profile.timeline)]
    keys = [*((name, _BARS[name]) for name in shown), ("reserved, not allocated", "var(--cache)")]
    return "<p>" + "".join(f"<span class='key'><i style='background:{c}'></i>{n}</span>" for n, c in keys) + "</p>"


def _bars(rows: Sequence[tuple[str, int]]) -> str:
    most = max(1, *(nbytes for _, nbytes in rows))
    cells = [
        f"<tr><td class='name'>{escape(name)}</td><td class='number'>{nbytes / MIB:.1f} MiB</td><td class='wide'>"
        f"<span class='bar' style='width:{100 * nbytes / most:.1f}%;background:{_BARS.get(name, 'var(--soft)')}'></span>"
        "</td></tr>"
        for name, nbytes in rows
    ]
    return f"<table>{''.join(cells)}</table>"


def _modules(profile: Profile) -> str:
    """The top-level modules; the innermost ones unfold."""
    top, deep = ([(row.module, row.bytes) for row in rows] for rows in (profile.modules, profile.deep_modules))
    return f"{_bars(top)}<details><summary>All {len(deep)} modules</summary>{_bars(deep)}</details>"


def _hidden(rows: Sequence[HiddenRow]) -> str:
    cells = [
        f"<tr><td>{row.name}</td><td class='number'>{row.low_bytes / MIB:.1f} to {row.high_bytes / MIB:.1f} MiB</td>"
        f"<td>{row.within}</td><td class='soft'>{escape(row.source)}</td></tr>"
        for row in rows
    ]
    return f"<table><tr><th></th><th></th><th>part of</th><th>source</th></tr>{''.join(cells)}</table>"
