"""Candidates of a plan: how a window may be cut, which knobs free memory, and how candidates compare. Pure functions."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from trainfit.models.setting import Setting
from trainfit.planning.plan import Candidate

FREE = ("ema-on-host",)
"""Knobs that change only memory and time and go with any checkpointing: the plan turns them by itself."""
STATE = "state-on-host"
"""The knob that keeps AdamW's moments in host memory: the same values, bit for bit."""
MEMORY = (*FREE, STATE, "checkpointing")
"""All knobs that change only memory and time."""
KNEE = 0.03
"""Gain in speed that is not worth more memory, or a trace."""


def batches(share: int) -> tuple[int, ...]:
    """Micro-batches worth considering for a GPU's `share` of a window, ascending: the least for each number of cuts."""
    return tuple(sorted({-(-share // parts) for parts in range(1, share + 1)}))


def cuts(share: int, micro_batch: int) -> tuple[int, ...]:
    """Images of each micro-batch; they add up to `share`, the last may be smaller."""
    whole, rest = divmod(share, micro_batch)
    return (micro_batch,) * whole + ((rest,) if rest else ())


def turned(setting: Setting, knob: str) -> Iterator[tuple[str, Setting]]:
    """(flag, setting) for each turn of one knob that frees memory, the gentlest first; nothing where it has no effect."""
    if knob == "ema-on-host" and setting.keeps_ema and not setting.ema_on_host:
        yield "--ema-on-host", replace(setting, ema_on_host=True)
    if knob == STATE and setting.optimizer == "adamw-fused":
        yield "--optimizer adamw-host", replace(setting, optimizer="adamw-host")
    if knob == "checkpointing" and setting.checkpointing != "offload":
        if setting.checkpointing != "all":
            yield "--checkpointing all", replace(setting, checkpointing="all")
        yield "--checkpointing offload", replace(setting, checkpointing="offload")
    if knob == "optimizer" and setting.optimizer.startswith("adamw") and setting.optimizer != "adamw-8bit":
        yield "--optimizer adamw-8bit", replace(setting, optimizer="adamw-8bit")
    yield from setting.family.turns(setting, knob)


def describe(setting: Setting) -> str:
    """The knobs by which candidates of one search differ, in a few words."""
    blocks = {"none": "", "all": ", all blocks recomputed", "offload": ", activations on the host"}
    recomputed = blocks.get(str(setting.checkpointing), f", {setting.checkpointing} blocks recomputed")
    return f"micro-batch {setting.micro_batch}{recomputed}{', EMA weights on the host' if setting.ema_on_host else ''}"


def least_of(candidates: Iterable[Candidate]) -> Candidate:
    """The candidate that needs the least memory."""
    return min(candidates, key=lambda each: (each.needs_more, each.needs.high_bytes))


def frontier(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates that fit and of which no other needs less memory and is at least as fast; fastest first."""
    best: list[Candidate] = []
    for each in sorted(
        (c for c in candidates if c.verdict != "does not fit"), key=lambda c: (seconds_of(c), c.needs.high_bytes)
    ):
        if not best or each.needs.high_bytes < best[-1].needs.high_bytes:
            best.append(each)
    return tuple(best)


def explained(each: Candidate, best: Candidate | None, chosen: Candidate | None, budget_bytes: int) -> Candidate:
    """The candidate with the reason for which it was chosen or not, in words and numbers."""
    if best is not None and chosen is not None and each.setting == best.setting:
        return replace(chosen, verdict="chosen", reason=f"smallest within {KNEE:.0%} of the fastest that fits")
    if each.verdict == "does not fit":
        over = (each.needs.high_bytes - budget_bytes) / 2**30
        bound = "at least" if each.needs_more else "up to"
        return replace(each, reason=f"{bound} {over:.2f} GiB short")
    if best is None:
        return replace(each, reason="training fits, evaluation does not")
    slower = seconds_of(each) / seconds_of(best) - 1
    if abs(slower) <= 0.0005:
        return replace(each, reason="as fast, and needs more")
    if slower < 0:
        return replace(each, reason=f"{-slower:.1%} faster, and needs more")
    return replace(each, reason=f"{slower:.0%} slower")


def seconds_of(candidate: Candidate) -> float:
    """Seconds of a window, for a card whose rates are known."""
    assert candidate.seconds is not None
    return candidate.seconds


def faster(one: Candidate | None, other: Candidate | None) -> Candidate | None:
    """The faster of two candidates; either may be None."""
    if one is None or other is None:
        return one or other
    return one if seconds_of(one) <= seconds_of(other) else other
