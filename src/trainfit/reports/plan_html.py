"""A plan as one self-contained HTML page: inline SVG, light and dark."""

from html import escape

from trainfit.gpus.catalogue import GIB
from trainfit.memory.predict import Prediction
from trainfit.planning.plan import Candidate, Plan
from trainfit.reports import svg
from trainfit.reports.html_tables import bars, bullets, byte_bars, table
from trainfit.reports.plan import (
    assumptions,
    budget_bars,
    choice,
    frees_lines,
    frontier_cells,
    loading_text,
    savings_lines,
    sentence,
    smallest_card,
    speed_head,
    speed_text,
    table_cells,
    table_head,
    table_rows,
    train_command,
)
from trainfit.reports.profile import category_rows, gib, limit_bytes
from trainfit.reports.profile_html import CATEGORY_COLORS, modules, timeline

_WIDTH = 960
_HEIGHT = 320
_LEFT = 56
_TOP = 24
_BOTTOM = 46
_COLORS = {"chosen": "#2f6fdb", "fits": "#3a9a54", "fits, no reserve": "#b8960b", "does not fit": "#c4654f"}
"""Readable on white and on near-black."""


def plan_html(plan: Plan) -> str:
    """The page: verdict, candidates, frontier, other cards, timeline of the step, modules, loading and assumptions."""
    title = f"{plan.model}, effective batch {plan.effective_batch}, on {_cards(plan)}"
    verdict = ("fits", "fits") if plan.chosen else ("nothing fits", "not")
    rows = table_rows(plan)
    parts = [
        f"<h1>{escape(title)} <span class='verdict {verdict[1]}'>{verdict[0]}</span></h1>",
        f"<p>{escape(sentence(plan))}</p>",
        _command(train_command(plan)) if plan.chosen else _rescue(plan),
        f"<h2>Settings tried ({len(rows)} of {len(plan.candidates)} shown)</h2>",
        _considered(plan, rows),
        "<h2>Speed and memory of all candidates</h2>",
        _scatter(plan),
        _frontier(plan),
        "<h2>The fastest of these candidates on cards of other sizes</h2>",
        _cards_bars(plan),
        *(_memory(plan.prediction) if plan.prediction else []),
        *(_frees(plan) if plan.chosen and plan.savings else []),
        "<h2>Loading and learning rate</h2>",
        bullets(
            [
                loading_text(plan.loading),
                plan.learning_rate,
            ]
        ),
        "<h2>Assumptions</h2>",
        bullets(assumptions(plan)),
    ]
    return svg.page(title, parts)


def _cards(plan: Plan) -> str:
    return f"{plan.gpus} x {plan.gpu.name}" if plan.gpus > 1 else plan.gpu.name


def _command(command: str) -> str:
    return (
        "<pre style='overflow-x:auto;padding:.6rem .8rem;background:var(--cache);border-radius:4px;font-size:13px'>"
        f"{escape(command)}</pre>"
    )


def _rescue(plan: Plan) -> str:
    need = plan.smallest.needs.high_bytes
    card = smallest_card(need, plan.smallest.setting.precision)
    card_name = f"{card.name} ({gib(card.memory_bytes)} GiB)" if card else "none"
    savings = "\n".join(savings_lines(plan, need - plan.budget.low_bytes))
    return f"<p>The smallest card of the catalogue that would hold it: {escape(card_name)}.</p>{_command(savings)}"


def _frees(plan: Plan) -> list[str]:
    return ["<h2>Would free memory, for time</h2>", _command("\n".join(frees_lines(plan)))]


def _considered(plan: Plan, rows: tuple[Candidate, ...]) -> str:
    head = table_head(plan)
    speed = head.index(speed_head(plan))
    marked = next((i for i, c in enumerate(rows) if c.verdict == "chosen"), None)
    return table(head, [table_cells(plan, c) for c in rows], numbers=(speed - 1, speed), marked=marked)


def _scatter(plan: Plan) -> str:
    """All candidates by need (right) and speed (up), with the frontier as a curve and the budget as a line."""
    known = [c for c in plan.candidates if c.images_per_s]
    if not known:
        return f"<p>How fast they are is not known: the rates of {escape(plan.gpu.name)} are not.</p>"
    base = 1.0 if plan.calibrated else (plan.chosen or plan.smallest).images_per_s or 1.0
    budget = plan.budget.low_bytes
    most = max(c.needs.high_bytes for c in known)
    in_picture = budget <= 1.6 * most
    right = 1.06 * (max(most, budget) if in_picture else most)
    top = 1.1 * max(c.images_per_s or 0.0 for c in known) / base

    def x(nbytes: float) -> float:
        return _LEFT + nbytes / right * (_WIDTH - _LEFT - 10)

    def y(speed: float) -> float:
        return _HEIGHT - _BOTTOM - speed / top * (_HEIGHT - _BOTTOM - _TOP)

    def at(c: Candidate) -> tuple[float, float]:
        return x(c.needs.high_bytes), y((c.images_per_s or 0.0) / base)

    shapes = _axes([(x(t * GIB), f"{t:g}") for t in svg.ticks(right / GIB)], [(y(t), f"{t:g}") for t in svg.ticks(top)])
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(at, plan.frontier))
    shapes.append(f"<polyline points='{path}' fill='none' stroke='{_COLORS['fits']}' stroke-width='1.5'/>")
    if in_picture:
        shapes.append(svg.line(x(budget), _TOP, x(budget), _HEIGHT - _BOTTOM, "var(--limit)", "stroke-width='1.5'"))
        anchor = "start" if x(budget) < _WIDTH / 2 else "end"
        shapes.append(svg.text(x(budget), _TOP - 8, f"budget {gib(budget)} GiB", anchor=anchor, css="limit"))
    else:
        words = f"budget {gib(budget)} GiB, right of the picture"
        shapes.append(svg.text(_WIDTH - 6, _TOP - 8, words, anchor="end", css="limit"))
    shapes += [_dot(plan, c, *at(c)) for c in sorted(known, key=lambda c: c.verdict == "chosen")]
    reference = "chosen" if plan.chosen else "smallest"
    unit = "images/s" if plan.calibrated else f"speed, 1 is the {reference} one"
    shapes.append(
        svg.text(_WIDTH / 2, _HEIGHT - 4, f"upwards: {unit}; to the right: GiB needed at most", anchor="middle")
    )
    keys = [(name, color) for name, color in _COLORS.items() if any(c.verdict == name for c in known)]
    return svg.picture(_WIDTH, _HEIGHT, "Speed against memory", shapes) + svg.legend(keys)


def _axes(across: list[tuple[float, str]], up: list[tuple[float, str]]) -> list[str]:
    """Grid and numbers; (place, words) each."""
    shapes: list[str] = []
    for x, words in across:
        shapes.append(svg.text(x, _HEIGHT - _BOTTOM + 18, words, anchor="middle"))
        shapes.append(svg.line(x, _TOP, x, _HEIGHT - _BOTTOM, "var(--line)", "stroke-width='.5'"))
    for y, words in up:
        shapes.append(svg.text(_LEFT - 6, y + 4, words, anchor="end"))
        shapes.append(svg.line(_LEFT, y, _WIDTH, y, "var(--line)", "stroke-width='.5'"))
    return shapes


def _dot(plan: Plan, candidate: Candidate, x: float, y: float) -> str:
    is_chosen = candidate.verdict == "chosen"
    title = (
        f"{choice(candidate)}: {speed_text(plan, candidate)}, {gib(candidate.needs.high_bytes)} GiB, {candidate.reason}"
    )
    ring = "stroke='var(--ink)' stroke-width='1.5'" if is_chosen else ""
    return (
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{6 if is_chosen else 4}' fill='{_COLORS[candidate.verdict]}' {ring}>"
        f"<title>{escape(title)}</title></circle>"
    )


def _frontier(plan: Plan) -> str:
    if not plan.frontier:
        return ""
    rows = frontier_cells(plan)
    shown = table(("speed", "needs", "nothing faster needs less"), rows, numbers=(0,))
    return f"<details><summary>The frontier, {len(rows)} candidates</summary>{shown}</details>"


def _cards_bars(plan: Plan) -> str:
    per_size = budget_bars(plan.candidates)
    rows = [
        (
            f"{bar.card_gib} GB: {choice(bar.candidate) if bar.candidate else 'none of them fits'}",
            *_speed(plan, bar.candidate),
        )
        for bar in per_size
    ]
    note = (
        f"At the speed of {plan.gpu.name}, so that memory alone makes the difference; on any card of that size whose memory "
        "was measured, without a desktop. What was not considered above may fit too."
    )
    return f"{bars(rows)}<p class='soft'>{escape(note)}</p>"


def _speed(plan: Plan, candidate: Candidate | None) -> tuple[str, float]:
    """The speed as text, and as the length of a bar."""
    if candidate is None:
        return "-", 0.0
    text = speed_text(plan, candidate)
    return (f"{text} images/s" if plan.calibrated and text != "-" else text), candidate.images_per_s or 0.0


def _memory(prediction: Prediction) -> list[str]:
    profile = prediction.training.profile
    return [
        "<h2>One window of training with the chosen setting, GiB</h2>",
        timeline(profile, limit_bytes(prediction)),
        "<h2>At the peak</h2>",
        byte_bars(category_rows(profile), CATEGORY_COLORS),
        "<h2>By module, at the peak</h2>",
        modules(profile),
    ]
