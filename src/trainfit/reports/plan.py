"""A plan as text and as JSON, the command that trains with it, and the data of its pictures."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from shlex import quote
from typing import Any

from trainfit.gpus.catalogue import GIB, Gpu, all_gpus, gpu_with_memory
from trainfit.gpus.context import ByteRange
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.memory.predict import RESERVE, has_reserve, process_budget
from trainfit.models.family import family_of
from trainfit.models.setting import Setting
from trainfit.planning.plan import Candidate, Loading, Plan, Saving, knobs
from trainfit.reports.profile import doubts, gib, interval
from trainfit.reports.words import rate
from trainfit.step.names import Checkpointing, Precision
from trainfit.tracing.events import CATEGORIES
from trainfit.training.lines import counted
from trainfit.training.recipe import DEFAULT_EFFECTIVE_BATCH, recipe_type

SCHEMA = 1
ROWS = 14
"""Largest number of rows in the table of candidates."""
CARDS_GIB = (4, 6, 8, 12, 16, 24, 40, 48, 80)


@dataclass(frozen=True, kw_only=True)
class BudgetBar:
    """The fastest candidate that fits cards of one size."""

    card_gib: int
    """Memory of the card in GiB."""
    candidate: Candidate | None
    """The candidate; None if none of those considered fits."""


def plan_text(plan: Plan) -> str:
    """One sentence, the candidates around the chosen one, the frontier, loading, learning rate, assumptions, the command.

    Where nothing fits: the smallest there is, the card that would hold it, and what each knob would free.
    """
    sections = [
        [sentence(plan)],
        *([_rescue(plan)] if plan.chosen is None else []),
        [f"Settings tried ({len(table_rows(plan))} of {len(plan.candidates)} shown)", *_table(plan)],
        *([["Frontier: nothing faster needs less", *_frontier(plan)]] if plan.frontier else []),
        *([["Would free memory, for time", *frees_lines(plan)]] if plan.chosen and plan.savings else []),
        [f"Loading: {loading_text(plan.loading)}", plan.learning_rate],
        ["Assumptions", *(f"  {line}" for line in assumptions(plan))],
        *([["Train with it", f"  {train_command(plan)}"]] if plan.chosen else []),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The whole report as values: `schema` 1; `command` is None where nothing fits. See `planning.plan.to_json` for the file."""
    command = train_command(plan) if plan.chosen else None
    return {"schema": SCHEMA, "categories": CATEGORIES, "command": command, **asdict(plan)}


def sentence(plan: Plan) -> str:
    """One sentence: what fits, how much it needs of the budget, and how fast it is."""
    where = f"{plan.model} on {f'{plan.gpus} x ' if plan.gpus > 1 else ''}{plan.gpu.name}"
    budget = f"of {_interval(plan.budget)} usable{' on each' if plan.gpus > 1 else ''}"
    if plan.chosen is None:
        missing = plan.smallest.needs.high_bytes - plan.budget.low_bytes
        return (
            f"{where}: nothing fits. The smallest there is, {choice(plan.smallest)}, needs "
            f"{_interval(plan.smallest.needs)} {budget}: {gib(missing)} GiB too much."
        )
    assert plan.prediction is not None
    kinds = f"{plan.chosen.setting.precision}, {plan.chosen.setting.optimizer}"
    what = f"{choice(plan.chosen)}, {kinds}: an effective batch of {plan.effective_batch}"
    spare = reserve_text(plan)
    takes = f"where there is room it takes {_interval(plan.prediction.takes)}"
    needs = f"With evaluation it needs {_interval(plan.prediction.needs)} {budget}{spare}; {takes}."
    return f"{where}: {what}. {needs} {_how_fast(plan, plan.chosen)}"


def reserve_text(plan: Plan) -> str:
    """A sentence on the reserve that the plan keeps free on each card, or that the chosen setting leaves less."""
    kept = f"{RESERVE:.0%} of the card kept free"
    assert plan.prediction is not None
    return f", {kept}" if has_reserve(plan.prediction.needs, plan.budget) else f", and not {kept}: it fits, no reserve"


def _how_fast(plan: Plan, chosen: Candidate) -> str:
    fastest = max(plan.candidates, key=lambda each: each.images_per_s or 0.0, default=None)
    if chosen.images_per_s is None or fastest is None or not fastest.images_per_s:
        return f"Its speed is unknown: the rates of {plan.gpu.name} are not known."
    slower = 1 - chosen.images_per_s / fastest.images_per_s
    compared = "as fast as any setting tried" if slower < 0.005 else f"{slower:.0%} slower than the fastest setting"
    if slower >= 0.005 and fastest.verdict == "does not fit":
        compared += ", which does not fit"
    return (
        f"It makes about {rate(chosen.images_per_s)} images/s, {compared}." if plan.calibrated else f"It is {compared}."
    )


def loading_text(loading: Loading) -> str:
    """Loader processes and host memory of a plan, and where the numbers come from."""
    processes = counted(loading.workers, "loader process")
    return f"{processes} per GPU, {gib(loading.host_bytes)} GiB of host memory ({loading.reason})"


def choice(candidate: Candidate) -> str:
    """`micro-batch 4 x 2, no checkpointing`: what mostly tells candidates apart, in words."""
    host = ", EMA weights on the host" * candidate.setting.ema_on_host
    host += ", optimizer state on the host" * (candidate.setting.optimizer == "adamw-host")
    return f"{division(candidate.cuts)}, {blocks_text(candidate.setting.checkpointing)}{host}"


def division(cuts: Sequence[int]) -> str:
    """`micro-batch 4 x 2`; `micro-batch 6+6+4` where the last is smaller, or `micro-batch 6 x 5 + 4` of many."""
    if cuts[-1] == cuts[0]:
        return f"micro-batch {cuts[0]} x {len(cuts)}"
    return (
        f"micro-batch {'+'.join(map(str, cuts))}"
        if len(cuts) <= 4
        else f"micro-batch {cuts[0]} x {len(cuts) - 1} + {cuts[-1]}"
    )


def blocks_text(checkpointing: Checkpointing) -> str:
    """Activation checkpointing in words."""
    words = {
        "none": "no checkpointing",
        "all": "all blocks checkpointed",
        "offload": "all blocks checkpointed, saved activations in host memory",
    }
    return words[checkpointing] if isinstance(checkpointing, str) else f"{checkpointing} blocks checkpointed"


def _interval(size: ByteRange) -> str:
    return interval(size.low_bytes, size.high_bytes)


def speed_text(plan: Plan, candidate: Candidate) -> str:
    """Images/s where times are of this card; otherwise relative to the chosen one, or to the smallest where nothing fits."""
    base = (plan.chosen or plan.smallest).images_per_s
    if candidate.images_per_s is None or not base:
        return "-"
    return rate(candidate.images_per_s) if plan.calibrated else f"{candidate.images_per_s / base:.2f}x"


def speed_head(plan: Plan) -> str:
    """What the figures of `speed_text` are."""
    return "images/s" if plan.calibrated else "speed"


def table_rows(plan: Plan) -> tuple[Candidate, ...]:
    """The chosen one (else the smallest), the fastest of the knee, the fastest of all, and the nearest neighbours; fastest first.

    Near: few steps of micro-batch and of checkpointing away, among those considered.
    """
    anchor = plan.chosen or plan.smallest
    micro_batches = sorted({c.setting.micro_batch for c in plan.candidates})
    levels = sorted({_level(c) for c in plan.candidates})

    def distance(candidate: Candidate) -> int:
        places = [(micro_batches.index(c.setting.micro_batch), levels.index(_level(c))) for c in (candidate, anchor)]
        return abs(places[0][0] - places[1][0]) + abs(places[0][1] - places[1][1])

    ordered = sorted(plan.candidates, key=_fastest_first)
    at_knee = next((c for c in ordered if c.setting.micro_batch == plan.knee), anchor)
    wanted = [anchor, at_knee, ordered[0], plan.smallest, *sorted(ordered, key=distance)]
    kept = list(dict.fromkeys(map(id, wanted)))[:ROWS]
    return tuple(c for c in ordered if id(c) in kept)


def _level(candidate: Candidate) -> float:
    """How much is checkpointed, as a number that can be sorted: no block, so many, all, all and what is left offloaded."""
    checkpointing = candidate.setting.checkpointing
    if isinstance(checkpointing, int):
        return float(checkpointing)
    return {"none": 0.0, "all": sys.float_info.max, "offload": float("inf")}[checkpointing]


def _fastest_first(candidate: Candidate) -> tuple[float, int]:
    return -(candidate.images_per_s or 0.0), candidate.needs.high_bytes


def varied(plan: Plan) -> tuple[str, ...]:
    """Names of the setting's fields that tell candidates apart, beside those that have columns of their own."""
    own = ("micro_batch", "accumulation", "checkpointing", "eval_micro_batch")
    values = {
        f.name: {getattr(c.setting, f.name) for c in plan.candidates} for f in fields(Setting) if f.name not in own
    }
    return tuple(name for name, choices in values.items() if len(choices) > 1)


def table_head(plan: Plan) -> tuple[str, ...]:
    """The head of `table_cells`."""
    others = [name.replace("_", " ") for name in varied(plan)]
    return ("", "micro-batch", "checkpointed", *others, "needs GiB", speed_head(plan), "verdict", "why")


def table_cells(plan: Plan, candidate: Candidate) -> tuple[str, ...]:
    """One candidate as a row."""
    mark = "->" if candidate.verdict == "chosen" else ""
    blocks = str(candidate.setting.checkpointing)
    knee = " (knee)" if candidate.setting.micro_batch == plan.knee else ""
    size = division(candidate.cuts).removeprefix("micro-batch ") + knee
    needs = f"{gib(candidate.needs.low_bytes)} or more" if candidate.needs_more else _interval(candidate.needs)
    needs = needs.removesuffix(" GiB")
    others = [_cell(getattr(candidate.setting, name)) for name in varied(plan)]
    return mark, size, blocks, *others, needs, speed_text(plan, candidate), candidate.verdict, candidate.reason


def _table(plan: Plan) -> list[str]:
    head = table_head(plan)
    return columns([head, *(table_cells(plan, c) for c in table_rows(plan))], right=(head.index(speed_head(plan)),))


def columns(rows: Sequence[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Rows of text in aligned columns; the columns in `right` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    side = [">" if i in set(right) else "<" for i in range(len(widths))]
    return [
        "  ".join(f"{cell:{s}{width}}" for cell, s, width in zip(row, side, widths, strict=True)).rstrip()
        for row in rows
    ]


def _frontier(plan: Plan) -> list[str]:
    return columns([("", *row) for row in frontier_cells(plan)], right=(1,))


def frontier_cells(plan: Plan) -> list[tuple[str, str, str]]:
    """(speed, need, choice) of each candidate of the frontier."""
    unit = " images/s" if plan.calibrated else ""
    return [(speed_text(plan, c) + unit, _interval(c.needs), choice(c)) for c in plan.frontier]


def _rescue(plan: Plan) -> list[str]:
    """The smallest card that the smallest setting fits, and what each knob would free."""
    need = plan.smallest.needs.high_bytes
    card = smallest_card(need, plan.smallest.setting.precision)
    card_name = f"{card.name} ({gib(card.memory_bytes)} GiB)" if card else "none"
    missing = need - plan.budget.low_bytes
    return [f"The smallest card of the catalogue that would hold it: {card_name}.", *savings_lines(plan, missing)]


def frees_lines(plan: Plan) -> list[str]:
    """What knobs would free of the chosen setting's training, and what they would cost in time, the least first."""
    return columns([("", saving.knob, _frees(saving)) for saving in plan.savings])


def _frees(saving: Saving) -> str:
    freed = f"frees {gib(saving.saved_bytes)} GiB"
    if saving.slower is None:
        return freed
    return f"{freed}, {abs(saving.slower):.1%} {'slower' if saving.slower >= 0 else 'faster'}"


def savings_lines(plan: Plan, missing_bytes: int) -> list[str]:
    """What each knob frees, whether that is enough, and whether it changes what is learned."""
    rows = [
        (
            "",
            saving.knob,
            _frees(saving),
            "enough" if saving.saved_bytes >= missing_bytes else "",
            "changes what is learned" if saving.learns_differently else "",
        )
        for saving in plan.savings
    ]
    return columns(rows) if rows else ["No knob frees anything."]


def room_bytes(gpu: Gpu) -> int:
    """Memory of a card that is certainly available to a process, CUDA context included: the budget of a need."""
    return process_budget(gpu, AllocatorConfig()).low_bytes


def smallest_card(need_bytes: int, precision: Precision) -> Gpu | None:
    """The card of the catalogue with the least memory that a need fits and that supports a precision."""
    able = [gpu for gpu in all_gpus() if precision != "bf16" or gpu.has_bf16]
    large_enough = [gpu for gpu in able if room_bytes(gpu) >= need_bytes]
    return min(large_enough, key=lambda gpu: (gpu.memory_bytes, gpu.name), default=None)


def card_room_bytes(size_gib: int) -> int:
    """What any card of the catalogue with so much memory offers, of those whose total was measured.

    A size that no such card has is taken as `--memory` takes it: less what drivers may keep.
    """
    cards = [gpu for gpu in all_gpus() if not gpu.memory_is_nominal and gpu.nominal_memory_bytes == size_gib * GIB]
    return min(map(room_bytes, cards), default=room_bytes(gpu_with_memory(f"{size_gib}GiB")))


def budget_bars(candidates: Sequence[Candidate], sizes_gib: Sequence[int] = CARDS_GIB) -> tuple[BudgetBar, ...]:
    """The fastest candidate that fits all cards of each size; see `card_room_bytes`."""
    bars: list[BudgetBar] = []
    for size in sizes_gib:
        room = card_room_bytes(size)
        fitting = [c for c in candidates if c.needs.high_bytes <= room and not c.needs_more]
        bars.append(BudgetBar(card_gib=size, candidate=min(fitting, key=_fastest_first, default=None)))
    return tuple(bars)


def assumptions(plan: Plan) -> tuple[str, ...]:
    """Assumptions of the plan and of its prediction, and what the trace does not know; each once."""
    made = plan.prediction
    return tuple(dict.fromkeys((*plan.assumptions, *((*made.assumptions, *doubts(made)) if made else ()))))


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def train_command(plan: Plan) -> str:
    """The command that trains with the plan, flags that are not the recipe's defaults; the plan must have a chosen setting."""
    if family_of(plan.model)[0].task is None:
        return f"(trainfit does not train {plan.model} yet: --emit writes this plan for another tool)"
    chosen = knobs(plan)
    family = family_of(plan.model)[0]
    defaults = {field.name: field.default for field in fields(recipe_type(family.setting))}
    defaults |= {
        "effective_batch": None if family.asks_batch else DEFAULT_EFFECTIVE_BATCH,
        "eval_micro_batch": chosen["micro_batch"],
    }
    defaults["micro_batch"] = None  # training chooses one where none is given
    flags = [_flag(name, value) for name, value in chosen.items() if value != defaults[name]]
    assert plan.chosen is not None
    stage = family.needed_flags(plan.chosen.setting)
    launch = f"torchrun --nproc-per-node {plan.gpus} -m trainfit" if plan.gpus > 1 else "trainfit"
    return " ".join([f"{launch} train {plan.model} --data {quote(plan.data or 'DIR')}", *flags, *stage])


def _flag(name: str, value: object) -> str:
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{dashed}" if value else f"--no-{dashed}"
    return f"--{dashed} {quote(str(value))}"
