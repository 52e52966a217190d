"""The table and the picture of `python -m benchmarks.public`."""

import shutil
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, median

from benchmarks.public import left_out as by_cause
from benchmarks.public import timm_rtx3090
from benchmarks.public.judge import Pair, figures, ordered, others, verdicts
from benchmarks.public.rows import Row
from benchmarks.public.traces import failure

RESULTS = Path(__file__).parents[1] / "results/public.md"
DOCS = Path(__file__).parents[2] / "docs"
"""Its guide on predictions shows the picture."""
HEAD = "| source | quantity | class | rows | median | mean | p95 | low by > 2 % | > 5 % | inside | below | width |"


def text(pairs: Sequence[Pair], left_out: Sequence[Row]) -> str:
    """All tables as Markdown."""
    lines = [HEAD, "|" + "---|" * HEAD.count("| ")]
    for (source, quantity), of_source in _grouped(pairs, lambda row: (row.source, row.quantity)):
        groups = _grouped(of_source, lambda row: (row.group, ""))
        lines += [_line(source, quantity, group, rows) for (group, _), rows in groups]
        if len(groups) > 1:
            lines.append(_line(source, quantity, "**all**", of_source))
    lines.append(_line("**all**", "", "", pairs))
    lines += [
        "",
        *by_cause.lines(pairs),
        "",
        *_other_predictors(pairs),
        "",
        *_verdict_lines(pairs),
        "",
        *_time_lines(pairs),
    ]
    sources = [row for row in left_out if row.case is None]
    if sources:
        lines += ["", f"Not judged, because `gpus/context.py` has them as its source: {len(sources)} contexts of a T4."]
    left_out = [row for row in left_out if row.case is not None]
    if left_out:
        reasons = [f"{row.name} ({failure(row.case)})" for row in left_out if row.case is not None]
        lines += ["", f"Without a trace: {'; '.join(reasons)}"]
    return "\n".join(lines)


def _grouped(pairs: Sequence[Pair], key: Callable[[Row], tuple[str, str]]) -> list[tuple[tuple[str, str], list[Pair]]]:
    found = sorted(pairs, key=lambda pair: key(pair[0]))
    return [(name, list(group)) for name, group in groupby(found, key=lambda pair: key(pair[0]))]


def _line(source: str, quantity: str, group: str, pairs: Sequence[Pair]) -> str:
    if all(row.oom for row, _ in pairs):
        return f"| {source} | {quantity} | {group} | 0 |  |  |  |  |  |  |  |  |"
    f = figures(pairs)
    shares = (f.median_error, f.mean_error, f.p95_error, f.low_2, f.low_5, f.inside, f.below, f.width)
    return f"| {source} | {quantity} | {group} | {f.rows} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |"


def _other_predictors(pairs: Sequence[Pair]) -> list[str]:
    rows = [pair for pair in pairs if pair[0].others_mib]
    if not rows:
        return []
    ours = figures(rows)
    table = ["| the same xMem rows | median | mean |", "|---|---|---|"]
    table.append(f"| trainfit | {100 * ours.median_error:.1f} % | {100 * ours.mean_error:.1f} % |")
    return table + [
        f"| {name} | {100 * mid:.1f} % | {100 * mean:.1f} % |" for name, (mid, mean) in others(rows).items()
    ]


def _verdict_lines(pairs: Sequence[Pair]) -> list[str]:
    lines = [
        '| verdicts at a limit | number | right | tight | wrong "runs out" | wrong "runs" | right if not tight '
        "| by the middle | at best |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    found = verdicts(pairs)
    if found.number:
        cells = (
            found.number,
            f"{found.right / found.number:.1%}",
            found.tight,
            found.false_nots,
            found.false_fits,
            f"{found.right / (found.number - found.tight):.1%}",
            f"{found.middle_right / found.number:.1%}",
            f"{found.best_right / found.number:.1%}",
        )
        lines.append(f"| xmem, capped reruns | {' | '.join(map(str, cells))} |")
    judged = timm_rtx3090.judged()
    for group in (*sorted({each.group for each in judged}), ""):
        of_group = [each for each in judged if group in ("", each.group)]
        nots, runs = (sum(not getattr(each, side) for each in of_group) for side in ("fits_right", "next_right"))
        name = f"timm_rtx3090, {group or '**all**'}"
        lines.append(
            f"| {name} | {2 * len(of_group)} | {1 - (nots + runs) / (2 * len(of_group)):.1%} | - | {nots} | {runs} | - | - | - |"
        )
    return lines


def _time_lines(pairs: Sequence[Pair]) -> list[str]:
    lines = ["| time a step | rows | median error | mean | ratio | pairs | in order |", "|---|---|---|---|---|---|---|"]
    timed = [
        (row.source + ", fitted" * row.fitted_time, p.seconds, row.seconds)
        for row, p in pairs
        if row.seconds is not None
    ]
    for source in sorted({source for source, _, _ in timed}):
        lines.append(_time_line(source, [(p, m) for name, p, m in timed if name == source]))
    judged = timm_rtx3090.judged()
    lines.append(
        _time_line(
            "timm_rtx3090, an image", [(each.predicted_s / each.batch, each.measured_s / each.batch) for each in judged]
        )
    )
    return lines


def _time_line(name: str, both: Sequence[tuple[float, float]]) -> str:
    ratios = [predicted / measured for predicted, measured in both]
    errors = [abs(ratio - 1) for ratio in ratios]
    number, share = ordered([p for p, _ in both], [m for _, m in both])
    return f"| {name} | {len(both)} | {median(errors):.1%} | {fmean(errors):.1%} | {median(ratios):.2f} | {number} | {share:.1%} |"


def write(tables: str, pairs: Sequence[Pair]) -> None:
    """Write the tables and the picture to `benchmarks/results`."""
    note = (
        "Made by `python -m benchmarks.public --write`; [docs/prediction.md](../../docs/prediction.md) explains the columns, and "
        "[public_before.md](public_before.md) has the rows before. It also says which figures were chosen after these rows had "
        "been seen, and which contexts come from their sources; of the times one efficiency is fitted, on the rows that are "
        "called so."
    )
    RESULTS.write_text(f"# Predictions against public measurements\n\n{note}\n\n![](public.png)\n\n{tables}\n")
    _draw(pairs)


def _draw(pairs: Sequence[Pair]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
    for (source, _), rows in _grouped(pairs, lambda row: (row.source, "")):
        done = [(row.measured_mib / 1024, p.likely_mib / 1024) for row, p in rows if not row.oom]
        axes.loglog([m for m, _ in done], [p for _, p in done], ".", label=source)
    ends = [0.5, 40]
    axes.plot(ends, ends, color="k", lw=0.8)
    axes.fill_between(ends, [0.95 * end for end in ends], [1.05 * end for end in ends], color="0.85", label="5 % band")
    axes.set(xlabel="measured, GiB", ylabel="predicted, GiB", xlim=(0.9, 24), ylim=(0.9, 24))
    ticks = [1, 2, 5, 10, 20]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.set_ticks([], minor=True)
    axes.legend()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=90)
    shutil.copy(RESULTS.with_suffix(".png"), DOCS / RESULTS.with_suffix(".png").name)
    pyplot.close(figure)
