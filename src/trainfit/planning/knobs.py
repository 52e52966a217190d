"""What may be turned: cuts of a window, and knobs that free memory. Pure functions over settings."""

from collections.abc import Iterator
from dataclasses import replace

from trainfit.models.setting import Setting

FREE = ("ema-on-host",)
"""Knobs that change memory and time alone and go with any checkpointing: the plan turns them by itself."""
STATE = "state-on-host"
"""AdamW's moments in host memory: the same values, bit for bit."""
MEMORY = (*FREE, STATE, "checkpointing")
"""All knobs that change memory and time alone."""


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
