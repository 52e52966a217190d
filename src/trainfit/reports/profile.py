"""A prediction as text and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby, pairwise
from typing import Any

from trainfit.gpus.catalogue import GIB, MIB
from trainfit.gpus.context import ByteRange
from trainfit.memory.hidden import HiddenRow
from trainfit.memory.predict import MemoryPrediction, Prediction, has_reserve, is_likelier_to_fit
from trainfit.memory.profile import ModuleRow, Profile, ProfileSample
from trainfit.reports.words import rate
from trainfit.timing.roofline import stated_error
from trainfit.tracing.events import CATEGORIES

SCHEMA = 1
_WIDTH = 72
_HEIGHT = 12
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_MODULES_SHOWN = 8


def profile_json(prediction: Prediction) -> dict[str, Any]:
    """The prediction as JSON values: `schema` 1; a sample's `category_bytes` are in the order of `categories`."""
    return {"schema": SCHEMA, "categories": CATEGORIES, **asdict(prediction)}


def profile_text(prediction: Prediction) -> str:
    """One sentence, memory by category, memory that no operator shows, and the last window as a picture."""
    training = prediction.training
    evaluation = prediction.evaluation
    profile = training.profile
    sections = [
        [sentence(prediction)],
        ["At the peak of training", *_rows(category_rows(profile))],
        [f"By module, the largest {_MODULES_SHOWN}", *_rows(_pairs(profile.modules[:_MODULES_SHOWN]))],
        ["Overheads outside the trace", *hidden_lines(training.hidden)],
        ["One window of training, GiB: █ allocated, ░ reserved", *timeline_lines(profile, limit_bytes(prediction))],
        [
            f"Evaluation, micro-batch {_eval_micro_batch(prediction)}: {evaluation.verdict}, "
            f"{spread(evaluation.needs)}; "
            f"it allocates {gib(evaluation.profile.peak_allocated_bytes)} GiB at most"
        ],
        ["Assumptions", *(f"  {line}" for line in (*prediction.assumptions, *doubts(prediction)))],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def sentence(prediction: Prediction) -> str:
    """Model, card, verdict, needs, and what dominates."""
    setting = prediction.setting
    training = prediction.training
    spare = ""
    if prediction.verdict == "fits" and not has_reserve(prediction.needs, prediction.budget):
        spare = ", no reserve"
    if prediction.verdict == "tight":
        likelier = is_likelier_to_fit(prediction.needs, prediction.budget)
        spare = ", likelier to fit than not" if likelier else ", likelier to run out than to fit"
    where = f"{setting.model}, micro-batch {setting.micro_batch}, on {prediction.gpu.name}"
    what = f"{where}: {prediction.verdict}{spare}."
    needs = prediction.needs
    budget = prediction.budget
    bound = ", an upper bound," if training.upper_bounds else ""
    have = f"of {spread(budget)} usable"
    numbers = f"It needs {spread(needs)}{bound} {have}; where there is room it takes {spread(prediction.takes)}."
    return f"{what} {numbers} {_peak(training)}{_trouble(prediction)}{_speed(prediction)}"


def _speed(prediction: Prediction) -> str:
    time = prediction.training.time
    setting = prediction.setting
    if time is None:
        return ""
    images = setting.micro_batch * setting.accumulation
    known = stated_error(prediction.gpu)
    within = "" if time.calibrated or known is None else f" ({known.median:.0%} off in the median of {known.rows} rows)"
    return f" A step takes about {time.seconds:.2g} s, {rate(images / time.seconds)} images/s, bound by {time.bound}{within}."


def _peak(memory: MemoryPrediction) -> str:
    profile = memory.profile
    largest = max(zip(profile.peak.category_bytes, CATEGORIES, strict=True))
    share = largest[0] / profile.peak_requested_bytes
    where = f"in {profile.peak.phase} at {profile.peak_module}, {profile.peak_op}"
    return f"The peak is {where}; {share:.0%} of it is {largest[1]}."


def _trouble(prediction: Prediction) -> str:
    """Sentences on training that runs out of memory, or on evaluation if only that does."""
    for name, memory in (("training", prediction.training), ("evaluation", prediction.evaluation)):
        if memory.oom is not None:
            wanted = memory.oom.wanted_bytes / MIB
            reserved = gib(memory.oom.reserved_bytes)
            return f" At best {name} dies asking for {wanted:.1f} MiB while {reserved} GiB are reserved."
        if memory.retries:
            return f" At best {name} empties the allocator's cache {memory.retries} times, which stalls the GPU."
    return ""


def gib(nbytes: float) -> str:
    """GiB with two decimals."""
    return f"{nbytes / GIB:.2f}"


def interval(low_bytes: int, high_bytes: int) -> str:
    """`1.20 to 1.50 GiB`."""
    return f"{gib(low_bytes)} GiB" if low_bytes == high_bytes else f"{gib(low_bytes)} to {gib(high_bytes)} GiB"


def spread(size: ByteRange) -> str:
    """The interval of a range."""
    return interval(size.low_bytes, size.high_bytes)


def limit_bytes(prediction: Prediction) -> int:
    """Memory that is certainly available to tensors and the allocator's cache: the limit in pictures."""
    context = next(row for row in prediction.training.hidden if row.within == "process")
    return max(0, prediction.budget.low_bytes - context.high_bytes)


def category_rows(profile: Profile) -> list[tuple[str, int]]:
    """(name, bytes): categories at the peak, largest first, and what the allocator adds; the sum is what is reserved."""
    rows = [(name, n) for n, name in zip(profile.peak.category_bytes, CATEGORIES, strict=True) if n]
    rows.sort(key=lambda row: -row[1])
    return [
        *rows,
        ("allocator: rounding", profile.peak_allocated_bytes - profile.peak_requested_bytes),
        ("allocator: cached, fragmented", profile.peak_reserved_bytes - profile.peak_allocated_bytes),
        ("reserved, at most", profile.peak_reserved_bytes),
    ]


def _pairs(rows: Sequence[ModuleRow]) -> list[tuple[str, int]]:
    return [(row.module, row.bytes) for row in rows]


def _rows(rows: Sequence[tuple[str, int]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {nbytes / MIB:>9.1f} MiB" for name, nbytes in rows]


def hidden_lines(rows: Sequence[HiddenRow]) -> list[str]:
    """One line per row: name, range in MiB, what it is a part of, and the source of the numbers."""
    width = max(len(row.name) for row in rows)
    return [
        f"  {row.name:<{width}}  {row.low_bytes / MIB:>7.1f} to {row.high_bytes / MIB:>7.1f} MiB  {row.within:<8}  {row.source}"
        for row in rows
    ]


def _eval_micro_batch(prediction: Prediction) -> int:
    return prediction.setting.eval_micro_batch or prediction.setting.micro_batch


def doubts(prediction: Prediction) -> list[str]:
    """Sentences on operators whose values or shapes are unknown to the trace."""
    training = prediction.training
    made_up = [op for op in training.made_up if op not in training.upper_bounds]
    return [
        *(
            [f"Largest shape assumed, an upper bound: {', '.join(training.upper_bounds)}."]
            * bool(training.upper_bounds)
        ),
        *([f"Placeholder values for data-dependent operators: {', '.join(made_up)}."] * bool(made_up)),
    ]


def scale_bytes(profile: Profile, limit: int) -> tuple[int, bool]:
    """(top of a picture, is the limit in it?): a limit far above the curve would flatten it."""
    highest = max(sample.reserved_bytes for sample in profile.timeline)
    return (max(highest, limit), True) if limit <= 1.6 * highest else (highest, False)


def timeline_lines(profile: Profile, limit: int) -> list[str]:
    """The last window in block characters, 12 lines and the phases; `limit` is drawn where it is near."""
    top, in_picture = scale_bytes(profile, limit)
    columns = _columns(profile.timeline)
    allocated = [max(s.allocated_bytes for s in column) / top * _HEIGHT for column in columns]
    reserved = [max(s.reserved_bytes for s in column) / top * _HEIGHT for column in columns]
    limit_line = min(_HEIGHT - 1, int(limit / top * _HEIGHT)) if in_picture else -1
    lines: list[str] = []
    for line in reversed(range(_HEIGHT)):
        empty = "─" if line == limit_line else " "
        cells = [_cell(a - line, r - line, empty) for a, r in zip(allocated, reserved, strict=True)]
        note = " limit" if line == limit_line else ""
        lines.append(f"{gib(top * (line + 1) / _HEIGHT):>8} ┤{''.join(cells)}{note}")
    lines.append(" " * 9 + "└" + _phase_axis(columns))
    if not in_picture:
        lines.append(f"         the limit, {gib(limit)} GiB, is above the picture")
    return lines


def _columns(timeline: Sequence[ProfileSample]) -> list[Sequence[ProfileSample]]:
    """Groups of samples, equal in number, at most `_WIDTH` of them."""
    count = min(_WIDTH, len(timeline))
    edges = [i * len(timeline) // count for i in range(count + 1)]
    return [timeline[a:b] for a, b in pairwise(edges)]


def _cell(allocated: float, reserved: float, empty: str) -> str:
    if allocated >= 1:
        return "█"
    if allocated > 0:
        return _EIGHTHS[max(1, int(allocated * 8))]
    return "░" if reserved > 0 else empty


def _phase_axis(columns: Sequence[Sequence[ProfileSample]]) -> str:
    """The name of each phase under its columns, if there is room for it."""
    axis = ""
    for phase, stretch in groupby(column[0].phase for column in columns):
        width = len(list(stretch))
        axis += (phase + "─" if len(phase) < width else "").ljust(width, "─")
    return axis
