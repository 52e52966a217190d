"""A plan as one self-contained picture: the memory and speed of settings, against the memory of the card."""

from html import escape

from trainfit.gpus.catalogue import GIB
from trainfit.planning.plan import Candidate, Plan
from trainfit.reports import svg
from trainfit.reports.plan import choice, speed_text, table_rows
from trainfit.reports.profile import gib

STYLE = """
:root { --ink: #1d2430; --paper: #ffffff; --soft: #5b6472; --line: #d8dde5; --limit: #d92d20; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --paper: #14181f; --soft: #a4adbb; --line: #343b47;
  --limit: #ff7a6e; } }
text { fill: var(--soft); font: 13px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif; }
.head { fill: var(--ink); font-size: 17px; font-weight: 600; } .strong { fill: var(--ink); font-weight: 600; }
.limit { fill: var(--limit); } .end { text-anchor: end; }
"""
COLORS = {"chosen": "#2f6fdb", "fits": "#3a9a54", "fits, no reserve": "#b8960b", "does not fit": "#c4654f"}
"""Legible on white and on near-black."""
ROWS = 9
_WIDTH = 900
_LEFT = 300
_RIGHT = 760
_TOP = 92
_STEP = 30


def plan_svg(plan: Plan) -> str:
    """The chosen setting (else the smallest) among the settings nearest to it, fastest first."""
    rows = _shown(plan)
    budget = plan.budget.low_bytes
    most = max(budget, *(c.needs.high_bytes for c in rows))
    height = _TOP + _STEP * len(rows) + 58
    cards = f"{plan.gpus} x {plan.gpu.name}" if plan.gpus > 1 else plan.gpu.name
    title = f"{plan.model} on {cards}, effective batch {plan.effective_batch}"
    unit = "images/s" if plan.calibrated else "speed"

    def x(nbytes: float) -> float:
        return _LEFT + nbytes / (1.04 * most) * (_RIGHT - _LEFT)

    shapes = [
        f"<rect width='{_WIDTH}' height='{height}' rx='8' fill='var(--paper)'/>",
        svg.text(24, 34, title, css="head"),
        svg.text(24, 56, _sentence(plan)),
        svg.text(24, _TOP - 10, "setting"),
        svg.text(_WIDTH - 24, _TOP - 10, unit, anchor="end"),
    ]
    foot = _TOP + _STEP * len(rows)
    for tick in svg.ticks(1.04 * most / GIB):
        shapes.append(svg.line(x(tick * GIB), _TOP, x(tick * GIB), foot, "var(--line)", "stroke-width='1'"))
        shapes.append(svg.text(x(tick * GIB), foot + 18, f"{tick:g}", anchor="middle"))
    shapes.append(svg.text((_LEFT + _RIGHT) / 2, foot + 38, "GiB that training and evaluation need", anchor="middle"))
    for number, candidate in enumerate(rows):
        shapes += _row(
            plan, candidate, _TOP + _STEP * number, x(candidate.needs.low_bytes), x(candidate.needs.high_bytes)
        )
    shapes.append(svg.line(x(budget), _TOP - 4, x(budget), foot, "var(--limit)", "stroke-width='2'"))
    shapes.append(svg.text(x(budget), _TOP - 10, f"{gib(budget)} GiB usable", anchor="middle", css="limit"))
    shapes += _legend(rows, foot + 38)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' role='img' "
        f"aria-label='{escape(title, quote=True)}'><style>{STYLE}</style>{''.join(shapes)}</svg>\n"
    )


def _shown(plan: Plan) -> list[Candidate]:
    """The fastest, the chosen one, and of the frontier; fastest first."""
    rows = table_rows(plan)
    anchor = plan.chosen or plan.smallest
    wanted = [anchor, rows[0], *plan.frontier, *rows]
    kept = set(list(dict.fromkeys(map(id, wanted)))[:ROWS])
    both = {id(c): c for c in (*rows, *plan.frontier, anchor)}
    return sorted((c for key, c in both.items() if key in kept), key=lambda c: -(c.images_per_s or 0.0))


def _sentence(plan: Plan) -> str:
    if plan.chosen is None:
        return f"Nothing fits: the smallest setting needs up to {gib(plan.smallest.needs.high_bytes)} GiB."
    needs = f"{gib(plan.chosen.needs.low_bytes)}-{gib(plan.chosen.needs.high_bytes)} GiB"
    return f"Fastest that fits: {choice(plan.chosen)}, {plan.chosen.setting.precision}; needs {needs}. Predicted without the GPU."


def _row(plan: Plan, candidate: Candidate, y: float, low: float, high: float) -> list[str]:
    """A bar up to the low end of a need; its lighter last part reaches to the high end."""
    color = COLORS[candidate.verdict]
    css = "strong" if candidate.verdict == "chosen" else ""
    top = y + 6
    return [
        svg.text(24, y + 20, _label(candidate), css=css),
        f"<rect x='{_LEFT}' y='{top:.1f}' width='{low - _LEFT:.1f}' height='18' fill='{color}'/>",
        f"<rect x='{low:.1f}' y='{top:.1f}' width='{high - low:.1f}' height='18' fill='{color}' opacity='.45'/>",
        svg.text(_WIDTH - 24, y + 20, speed_text(plan, candidate), anchor="end", css=css),
    ]


def _label(candidate: Candidate) -> str:
    """A short form of `choice` without what is usual."""
    words = choice(candidate).replace(", no checkpointing", "").replace(", EMA weights on the host", ", EMA on host")
    return words.replace(", all blocks checkpointed", ", checkpointing").replace(
        ", saved activations in host memory", ", offload"
    )


def _legend(rows: list[Candidate], y: float) -> list[str]:
    shapes: list[str] = []
    x = 24.0
    for name, color in COLORS.items():
        if any(candidate.verdict == name for candidate in rows):
            shapes.append(f"<rect x='{x}' y='{y - 10}' width='12' height='12' rx='2' fill='{color}'/>")
            shapes.append(svg.text(x + 17, y, name))
            x += 30 + 7.4 * len(name)
    return shapes
