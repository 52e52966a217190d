"""What the smallest training of each model needs, before and with the lean step, and the plan for cards of 4 to 24 GB.

    python benchmarks/lean_table.py needs [--minutes 30]       # goes on where it was interrupted; the most telling cases first
    python benchmarks/lean_table.py plans [--minutes 30]
    python benchmarks/lean_table.py largest [--models rfdetr-seg-medium]     # with the lean step and with --lean off, both now
    python benchmarks/lean_table.py guide     # the RT-DETR-Seg guide's table of what a 4 GB card runs, for 4, 6 and 8 GB
    python benchmarks/lean_table.py report                     # results/lean_table.md

Predicted, by trace and replay, at published settings (multi-scale sizes too): micro-batch 1, two micro-batches a window, every
block recomputed, EMA weights on the host; evaluation of one image follows in the same process. Cards are known by their
nominal memory alone, in bf16. A case takes minutes to trace; results are kept in results/lean_table.jsonl, which also has
those of the step before lean losses and of the first lean step ("before" and "then", made at 89783ba).
"""

import argparse
import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from trainfit.gpus.catalogue import GIB, Gpu, gpu_with_memory
from trainfit.gpus.context import widened
from trainfit.memory.allocator import AllocatorConfig
from trainfit.memory.columns import ColumnTrace
from trainfit.memory.errors import RESIZED_ERROR
from trainfit.memory.host_ema import ema_for_evaluation, without_ema
from trainfit.memory.host_state import with_state_on_host
from trainfit.memory.predict import assess, needed, process_budget, trace_requests, with_context
from trainfit.memory.priced import Pricer
from trainfit.memory.profile import last_window
from trainfit.memory.shipped import is_resized
from trainfit.models.setting import Setting, make_setting
from trainfit.planning.candidates import batches, cuts
from trainfit.planning.make import make_plan
from trainfit.tracing.trace_cache import get_trace

RESULTS = Path(__file__).parent / "results"
LOG, REPORT = RESULTS / "lean_table.jsonl", RESULTS / "lean_table.md"
CARDS = (4, 6, 8, 12, 16, 24)
"""Nominal memory in GB."""
FIRST = ("rfdetr-seg-medium", "rfdetr-seg-2xlarge", "maskrcnn-r50-v2", "rtdetr-seg-large", "rtdetr-seg-nano")
OTHERS = (
    "rfdetr-seg-xlarge", "rfdetr-seg-large", "maskrcnn-r50-v1", "rfdetr-seg-small", "rfdetr-seg-nano", "rtdetr-seg-medium",
    "rtdetr-seg-base", "rtdetr-seg-small", "rfdetr-large", "rfdetr-medium", "rfdetr-small", "rfdetr-nano",
)  # fmt: skip
GUIDE = (
    ("nano", 1, 512), ("small", 1, 512), ("base", 1, 560), ("nano", 2, 384), ("nano", 4, 384), ("nano", 1, 384),
    ("nano", 1, 640), ("nano", 1, 320), ("nano", 1, 256),
)  # fmt: skip
"""(size, micro-batch, resolution) of the guide's table for its GTX 1650 Ti, single stage, without multi-scale; first what
it says runs out of memory."""
SAID = {("nano", 1, 384): "fits", ("nano", 1, 320): "fits", ("nano", 1, 256): "fits"}
"""Verdict of the guide on 4 GB; of the others it says that they run out."""
MOST, WINDOW = 64, 16
"""Micro-batches that are looked for; images of a window."""
STAGES = ("single", "masks", "detector")
Case = tuple[str, str, int]
"""(model, stage, objects in an image)."""


def cases() -> Iterator[Case]:
    """The most telling first: large models in one stage, then the other stages, then fewer objects."""
    models = (*FIRST, *OTHERS)
    yield from ((model, "single", 100) for model in models)
    yield from product([name for name in models if name.startswith("rtdetr")], STAGES[1:], (100,))
    yield from ((model, "single", 10) for model in models)
    yield from product([name for name in models if name.startswith("rtdetr")], STAGES[1:], (10,))


def setting_of(case: Case, **knobs: Any) -> Setting:
    """As published, in bf16."""
    model, stage, objects = case
    if stage != "single":
        knobs["stage"] = stage
    return make_setting(model, objects_per_image=objects, precision="bf16", **knobs)


def needs(case: Case) -> dict[str, Any]:
    """What the least training of a case needs."""
    return needs_of(replace(setting_of(case), accumulation=2, checkpointing="all"))


def guide(minutes: float) -> None:
    """What the settings of the guide's table need, with nothing and with every block recomputed."""
    end = time.monotonic() + 60 * minutes
    for size, micro_batch, resolution in GUIDE:
        for checkpointing in ("all", "none"):
            case = (size, micro_batch, resolution, checkpointing)
            if ("guide", "now", *case) in known() or time.monotonic() > end:
                continue
            knobs: dict[str, Any] = {"multi_scale": False, "resolution": resolution, "checkpointing": checkpointing}
            setting = make_setting(
                f"rtdetr-seg-{size}", micro_batch=micro_batch, accumulation=2, precision="bf16", **knobs
            )
            write("guide", "now", case, needs_of(setting))


def needs_of(setting: Setting) -> dict[str, Any]:
    """GiB of training, and of evaluation after it in the same process, at least and at most; and where the peak lies.

    `on_host`: the same with the optimizer's moments in host memory, by the same trace. `update_gib`: the most that is
    allocated between the last backward and the next forward.
    """
    gpu = gpu_with_memory("4GiB")
    pricer = Pricer(gpu=gpu)
    further = RESIZED_ERROR if is_resized(pricer.request(setting, "evaluation")) else 0
    if pricer.known(setting):
        stored = pricer.columns(setting, "evaluation")
    else:
        stored = ColumnTrace.of(get_trace(trace_requests(setting, gpu)[1]))
    found = _assessed(stored, setting, gpu, further)
    on_host = replace(stored, columns=with_state_on_host(stored.columns))
    return found | {"on_host": _assessed(on_host, setting, gpu, further)}


def _assessed(stored: ColumnTrace, setting: Setting, gpu: Gpu, further: float) -> dict[str, Any]:
    """`further`: error of what is needed besides that of any trace."""
    config = AllocatorConfig()
    trace = stored.columns
    end = last_window(trace)
    trained = replace(trace, events=trace.events[:end], marks=tuple(mark for mark in trace.marks if mark[0] < end))
    alone = replace(stored, columns=without_ema(trained))
    training = assess(alone, gpu, config, reserved=widened(needed(alone, gpu, config), further))
    moved = ema_for_evaluation(trace) if setting.keeps_ema else trace
    whole = replace(stored, columns=moved)
    reserved = widened(needed(whole, gpu, config), further)
    both = assess(whole, gpu, config, since=last_window(moved), reserved=reserved)
    peak = training.profile
    update = [row.peak_allocated_bytes for row in peak.phases if row.phase in ("update", "optimizer")]
    return {
        "training": [training.needs.low_bytes / GIB, training.needs.high_bytes / GIB],
        "evaluation": [both.needs.low_bytes / GIB, both.needs.high_bytes / GIB],
        "verdict": [training.verdict, both.verdict],
        "peak": f"{peak.peak.phase}, {peak.peak_module}, {peak.peak_op.removeprefix('aten.')}",
        "peak_gib": peak.peak_allocated_bytes / GIB,
        "update_gib": max(update) / GIB,
    }


def plans(case: Case) -> dict[str, Any]:
    """The plan's choice for each card, effective batch 16."""
    found: dict[str, Any] = {}
    for memory in CARDS:
        plan = make_plan(setting_of(case), gpu_with_memory(f"{memory}GiB"))
        if plan.chosen is None:
            found[str(memory)] = {"least_gib": plan.smallest.needs.high_bytes / GIB}
            continue
        setting = plan.chosen.setting
        found[str(memory)] = {
            "micro_batch": setting.micro_batch,
            "checkpointing": setting.checkpointing,
            "ema_on_host": setting.ema_on_host,
            "optimizer": setting.optimizer,
            "high_gib": plan.chosen.needs.high_bytes / GIB,
            "seconds": plan.chosen.seconds,
        }
    return found


def largest(models: list[str], minutes: float) -> None:
    """The largest micro-batch and the fastest window on each card, lean and not, with nothing and with every block recomputed.

    Both are priced by the same predictor, from a trace at two micro-batches. Evaluation and evictions of knobs are left out.
    """
    end = time.monotonic() + 60 * minutes
    settings = product(models, (100, 10), ("on", "off"), ("none", "all"))
    for model, objects, lean, checkpointing in settings:
        case = (model, objects, lean, checkpointing)
        if ("largest", "now", *case) in known() or time.monotonic() > end:
            continue
        setting = setting_of((model, "single", objects), lean=lean, checkpointing=checkpointing)
        write("largest", "now", case, _by_card(setting))


def _by_card(setting: Setting) -> dict[str, Any]:
    """Of each card: the largest micro-batch up to MOST, the micro-batch of the fastest window of WINDOW images, and its seconds."""
    found: dict[str, Any] = {}
    for memory in CARDS:
        gpu = gpu_with_memory(f"{memory}GiB")
        pricer = Pricer(gpu=gpu)
        budget = process_budget(gpu, AllocatorConfig()).low_bytes
        sizes = range(2, MOST + 1)  # the need grows with the micro-batch; 1 has a trace of its own
        fitting = bisect_left(
            sizes, True, key=lambda m: pricer.needs(replace(setting, micro_batch=m)).high_bytes > budget
        )
        most = sizes[fitting - 1] if fitting else 1
        parts = [cuts(WINDOW, m) for m in batches(WINDOW) if 2 <= m <= most]
        seconds = {part[0]: pricer.seconds(_cut(setting, part), part).seconds for part in parts} if fitting else {}
        fastest = min(seconds, key=lambda m: seconds[m]) if seconds else None
        found[str(memory)] = {"most": most, "fastest": fastest, "seconds": fastest and seconds[fastest]}
        if getattr(setting, "lean", "off") == "on":
            free = bisect_left(sizes, True, key=lambda m: _need_without_loss(pricer, setting, m) > budget)
            found[str(memory)]["without_loss"] = sizes[free - 1] if free else 1
    return found


def _need_without_loss(pricer: Pricer, setting: Setting, micro_batch: int) -> int:
    """What training would need if the criterion, matching included, held nothing at all: no loss can be leaner."""
    stored = pricer.columns(replace(setting, micro_batch=micro_batch), "training")
    trace = stored.columns
    is_loss = np.array(["Criterion" in name for name in trace.names])[trace.module]
    without = replace(stored, columns=replace(trace, nbytes=np.where(is_loss, 0, trace.nbytes)))
    return with_context(needed(without, pricer.gpu, pricer.config), pricer.gpu).high_bytes


def _cut(setting: Setting, part: tuple[int, ...]) -> Setting:
    return replace(setting, micro_batch=part[0], accumulation=len(part))


def known() -> dict[tuple[Any, ...], Mapping[str, Any]]:
    """Results so far; of a case that was done twice the later one."""
    rows = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    return {(row["kind"], row["when"], *row["case"]): row["found"] for row in rows}


def work(kind: str, minutes: float, names: list[str]) -> None:
    """Do cases that are not done, in order, until the time is over; each is written down at once."""
    end = time.monotonic() + 60 * minutes
    for case in cases():
        if time.monotonic() > end:
            return
        if (kind, "now", *case) in known() or (names and case[0] not in names):
            continue
        write(kind, "now", case, needs(case) if kind == "needs" else plans(case))


def write(kind: str, when: str, case: tuple[Any, ...], found: Mapping[str, Any]) -> None:
    """Note a result."""
    with LOG.open("a") as file:
        file.write(json.dumps({"kind": kind, "when": when, "case": case, "found": found}) + "\n")
    print(kind, when, *case, json.dumps(found), flush=True)


def report() -> None:
    """Write the tables."""
    rows = known()
    lines = [
        "Predicted by `benchmarks/lean_table.py`, never measured on a GPU: micro-batch 1, every block recomputed, EMA",
        "weights on the host, published resolution with multi-scale sizes, bf16. GiB of the process, CUDA context included,",
        "at least to at most, evaluation in the same process. A 4 GB card of unknown driver gives 3.44 GiB for sure, 3.98 at best.",
        "",
        "Before: the step without lean losses (710376a). Then: with them (89783ba). Both by the predictor of 89783ba, which counts",
        "what a step takes where there is room, not the least that it runs in, and whose traces of RF-DETR miss what training",
        "holds while it chooses queries (rtdetr-seg-large: 0.6 GiB). Now: with the choice of queries in pieces and recomputed;",
        "on the host: with `--optimizer adamw-host`. The last column is what is allocated at most in the update, and at the peak.",
        "",
        "## The least that a training needs, GiB",
        "",
        "| model | stage | objects | before | then | now | on 4 GB | moments on the host | on 4 GB | update, peak |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases():
        before, then, now = (rows.get(("needs", when, *case)) for when in ("before", "then", "now"))
        if now is None and then is None:
            continue
        cells = [_least(before), _least(then), _least(now), "-", "-", "-", "-"]
        if now is not None:
            cells[3:] = [_worst(now["verdict"]), _least(now["on_host"]), _worst(now["on_host"]["verdict"])]
            cells.append(f"{now['update_gib']:.2f}, {now['peak_gib']:.2f}")
        lines.append(f"| {case[0]} | {case[1]} | {case[2]} | {' | '.join(cells)} |")
    if any(kind == "plans" for kind, *_ in rows):
        lines += _plan_table(rows)
    if any(kind == "largest" for kind, *_ in rows):
        lines += _largest_table(rows)
    lines += [
        "",
        "## The RT-DETR-Seg guide's table, single stage, without multi-scale: GiB with no block and with every block recomputed",
        "",
        "| size, micro-batch at resolution | guide, 4 GB | nothing recomputed | everything recomputed | 4 GB | 6 GB | 8 GB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_guide_row(row, rows) for row in GUIDE if ("guide", "now", *row, "all") in rows]
    REPORT.write_text("\n".join(lines) + "\n")


def _plan_table(rows: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> list[str]:
    lines = ["", "## The plan for a card, effective batch 16: micro-batch, blocks recomputed", ""]
    lines += [
        f"| model | stage | objects | {' | '.join(f'{m} GB' for m in CARDS)} |",
        "|---|---|---|" + "---|" * len(CARDS),
    ]
    for case in cases():
        found = rows.get(("plans", "now", *case))
        if found is not None:
            lines.append(f"| {case[0]} | {case[1]} | {case[2]} | {' | '.join(_plan(found[str(m)]) for m in CARDS)} |")
    return lines


def _largest_table(rows: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Largest micro-batch, and seconds of the fastest window of 16 images, with upstream's criterion and lean",
        "",
    ]
    lines += [
        "Training alone, by one predictor; -: micro-batch 2 does not fit. Times are of an RTX 3060's rates, predicted. In square",
        "brackets: the largest micro-batch if losses and matching held nothing at all. Where it is less than twice that of",
        "upstream's criterion, no loss can double the micro-batch: what fills the card is the model. At 10 objects and",
        "micro-batch 4 the losses hold 0.21 of the 6.08 GiB at the peak of rfdetr-seg-medium, upstream's 0.59 of 6.47.",
        "",
        f"| model | objects | recomputed | {' | '.join(f'{m} GB' for m in CARDS)} |",
        "|---|---|---|" + "---|" * len(CARDS),
    ]
    for kind, _, *case in list(rows):
        if (
            kind != "largest"
            or case[2] != "on"
            or (upstream := rows.get((kind, "now", *case[:2], "off", case[3]))) is None
        ):
            continue
        lean = rows[kind, "now", *case]
        cells = [f"{_most(upstream[str(m)])} -> {_most(lean[str(m)])}{_bound(lean[str(m)])}" for m in CARDS]
        lines.append(f"| {case[0]} | {case[1]} | {case[3]} | {' | '.join(cells)} |")
    return lines


def _most(found: Mapping[str, Any]) -> str:
    seconds = found["seconds"]
    return "-" if seconds is None else f"{found['most']} ({seconds:.2f} s)"


def _bound(found: Mapping[str, Any]) -> str:
    return f" [{found['without_loss']}]" if "without_loss" in found and found["seconds"] is not None else ""


def _guide_row(row: tuple[str, int, int], rows: Mapping[tuple[Any, ...], Mapping[str, Any]]) -> str:
    found = {each: rows.get(("guide", "now", *row, each)) for each in ("none", "all")}
    cells = [_least(each) for each in found.values()]
    for memory in (4, 6, 8):
        budget = process_budget(gpu_with_memory(f"{memory}GiB"), AllocatorConfig()).low_bytes / GIB
        fitting = [name for name, each in found.items() if each is not None and each["evaluation"][1] <= budget]
        cells.append({"none": "fits", "all": "fits, recomputed"}[fitting[0]] if fitting else "runs out")
    size, micro_batch, resolution = row
    return f"| {size}, {micro_batch} at {resolution} | {SAID.get(row, 'runs out')} | {' | '.join(cells)} |"


def _least(found: Mapping[str, Any] | None) -> str:
    """Of training and the evaluation after it."""
    return "-" if found is None else f"{found['evaluation'][0]:.2f}-{found['evaluation'][1]:.2f}"


def _worst(verdicts: list[str]) -> str:
    return max(verdicts, key=["fits", "tight", "does not fit"].index)


def _plan(found: Mapping[str, Any]) -> str:
    if "micro_batch" not in found:
        return f"least {found['least_gib']:.2f} GiB"
    host = ", EMA on host" * found["ema_on_host"] + ", moments on host" * (found.get("optimizer") == "adamw-host")
    return f"{found['micro_batch']}, {found['checkpointing']}{host}; {found['high_gib']:.1f} GiB"


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["needs", "plans", "largest", "guide", "report"])
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--models", nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.what == "guide":
        guide(arguments.minutes)
    elif arguments.what == "largest":
        largest(arguments.models or ["rfdetr-seg-medium"], arguments.minutes)
    elif arguments.what != "report":
        work(arguments.what, arguments.minutes, arguments.models)
    report()


if __name__ == "__main__":
    main()
