"""Parts of a self-contained HTML page: its style, light and dark, and the shapes of inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor
from statistics import fmean

STYLE = """
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
.label { white-space: nowrap; } .grid { white-space: nowrap; }
.grid td:last-child { white-space: normal; min-width: 13em; }
.wide { width: 55%; } summary { margin: .6rem 0; cursor: pointer; } .name { overflow-wrap: anywhere; }
.bar { display: block; height: .8em; margin-top: .35em; border-radius: 2px; min-width: 1px; }
.key { display: inline-block; margin-right: 1.1em; } .key i { display: inline-block; width: .8em; height: .8em;
  margin-right: .35em; border-radius: 2px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 1rem 2rem; }
figure { margin: 0; } figcaption { font-weight: 600; } figure p { margin: 0; font-size: 13px; }
.shares { display: flex; height: 1.4em; border-radius: 3px; overflow: hidden; } .shares i { display: block; }
"""


def ticks(top: float, low: float = 0.0) -> list[float]:
    """Round numbers from `low` to `top`, at most six.

    Raises:
        ValueError: they are further apart than a float can tell.
    """
    steps = (m * 10**e for e in range(-12, 308) for m in (1, 2, 5))
    step = next((step for step in steps if 5 * step >= top - low), None)
    if step is None:
        raise ValueError(f"{low:g} and {top:g} are too far apart")
    return [i * step for i in range(ceil(low / step), floor(top / step) + 1)]


def area(points: Sequence[tuple[float, float, float]], color: str, title: str) -> str:
    """A band between two curves; `points` are (x, lower y, upper y)."""
    path = [f"{x:.1f},{upper:.1f}" for x, _, upper in points] + [
        f"{x:.1f},{lower:.1f}" for x, lower, _ in reversed(points)
    ]
    return f"<polygon points='{' '.join(path)}' fill='{color}'><title>{title}</title></polygon>"


def line(x0: float, y0: float, x1: float, y1: float, color: str, more: str) -> str:
    """A straight line; `more` are further attributes."""
    return f"<line x1='{x0:.1f}' y1='{y0:.1f}' x2='{x1:.1f}' y2='{y1:.1f}' stroke='{color}' {more}/>"


def text(x: float, y: float, words: str, *, anchor: str = "start", css: str = "") -> str:
    """A text at a point."""
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' class='{css}'>{escape(words)}</text>"


def picture(width: int, height: int, label: str, shapes: Sequence[str]) -> str:
    """Shapes as one picture."""
    return f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{escape(label)}'>{''.join(shapes)}</svg>"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    name: str
    """Its name in the legend."""
    color: str
    """Its CSS colour."""
    points: Sequence[tuple[float, float | None]]
    """(x, y), x rising; a y of None is a gap."""
    style: str = ""
    """Further attributes of the line."""


def chart(
    caption: str,
    curves: Sequence[Curve],
    *,
    across: tuple[float, float],
    marks: Sequence[tuple[float, str]] = (),
    zero: bool = True,
) -> str:
    """Curves over steps in half a page's width, thinned to `_POINTS` means each.

    Args:
        caption: HTML above the picture.
        curves: At least one of them has a point.
        across: The first and the last step of the scale.
        marks: (x, words): vertical lines.
        zero: Whether the scale begins at zero.
    """
    width = 470
    height = 210
    left = 52
    top = 10
    bottom = 24
    thin = [(curve, thinned(curve.points)) for curve in curves]
    values = [y for _, points in thin for _, y in points if y is not None]
    low = 0.0 if zero else min(values)
    high = max(values)
    high = high + 0.04 * (high - low) if high > low else low + (abs(low) or 1.0)
    first = across[0]
    last = max(across[1], across[0] + 1)

    def at(x: float, y: float) -> tuple[float, float]:
        place = left + (x - first) / (last - first) * (width - left - 18)
        return place, height - bottom - (y - low) / (high - low) * (height - bottom - top)

    shapes: list[str] = []
    for tick in ticks(high, low):
        y = at(first, tick)[1]
        shapes += [line(left, y, width, y, "var(--line)", "stroke-width='.5'")]
        shapes += [text(left - 6, y + 4, f"{tick:.6g}", anchor="end")]
    shapes += [text(at(t, low)[0], height - 7, f"{t:g}", anchor="middle") for t in ticks(last, first) if t == int(t)]
    for x, words in marks:
        place = at(x, low)[0]
        mark = line(place, top, place, height - bottom, "var(--limit)", "stroke-dasharray='3 3'")
        shapes.append(f"<g>{mark}<title>{escape(words)}</title></g>")
    for curve, points in thin:
        for gap, group in groupby(points, key=lambda point: point[1] is None):
            if not gap:
                shapes.append(_stretch(curve, [(x, y, *at(x, y)) for x, y in group if y is not None]))
    names = [(curve.name, curve.color) for curve in curves if curve.name]
    return (
        f"<figure><figcaption>{caption}</figcaption>{picture(width, height, caption, shapes)}{legend(names)}</figure>"
    )


_POINTS = 240


def thinned(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """The points, or means of neighbours if there are more than `_POINTS`."""
    size = ceil(len(points) / _POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    known = [(group[-1][0], [y for _, y in group if y is not None]) for group in groups]
    return [(x, fmean(values) if values else None) for x, values in known]


def _stretch(curve: Curve, points: Sequence[tuple[float, float, float, float]]) -> str:
    """A line without gaps, with a tooltip at each point; `points` are (step, value, x, y)."""
    path = " ".join(f"{x:.1f},{y:.1f}" for _, _, x, y in points)
    dots = [
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{2 if len(points) < 25 else 4}' "
        f"fill='{curve.color if len(points) < 25 else 'transparent'}'>"
        f"<title>{escape(curve.name)} {value:.4g} at step {step:g}</title></circle>"
        for step, value, x, y in points
    ]
    drawn = f"<polyline points='{path}' fill='none' stroke='{curve.color}' stroke-width='1.5' {curve.style}/>"
    return drawn + "".join(dots)


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """Names and their colours."""
    return "<p>" + "".join(f"<span class='key'><i style='background:{c}'></i>{n}</span>" for n, c in keys) + "</p>"


def page(title: str, parts: Sequence[str]) -> str:
    """The whole page."""
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>{escape(title)}</title>"
    return f"<!doctype html><html lang='en'><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
