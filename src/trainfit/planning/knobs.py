"""What may be turned: cuts of a window, and knobs that free memory. Pure functions over settings."""

from collections.abc import Iterator
from dataclasses import replace

from trainfit.models.registry import family, published
from trainfit.models.setting import Setting

FREE = ("ema-on-host",)
"""Knobs that change memory and time alone: the plan turns them by itself."""
LEARNS = ("multi-scale", "groups", "queries", "resolution", "encoder", "optimizer")
"""Knobs that change what is learned: turned for those who name them with --allow, in this order."""


def batches(share: int) -> tuple[int, ...]:
    """Micro-batches worth considering for a GPU's `share` of a window, ascending: the least for each number of cuts."""
    return tuple(sorted({-(-share // parts) for parts in range(1, share + 1)}))


def coupled_batches(share: int) -> tuple[int, ...]:
    """The same for a window that is one loss, where each has to be traced by itself: powers of two, 256 at most, and 1."""
    largest = min(256, 1 << (share.bit_length() - 1))
    return tuple(sorted({1, *(largest >> k for k in range(6) if largest >> k)}))


def cuts(share: int, micro_batch: int) -> tuple[int, ...]:
    """Images of each micro-batch; they add up to `share`, the last may be smaller."""
    whole, rest = divmod(share, micro_batch)
    return (micro_batch,) * whole + ((rest,) if rest else ())


def turned(setting: Setting, knob: str) -> Iterator[tuple[str, Setting]]:
    """(flag, setting) for each turn of one knob that frees memory, the gentlest first; nothing where it has no effect."""
    of_rfdetr = family(setting.model) == "rfdetr"
    if knob == "ema-on-host" and (of_rfdetr if setting.ema is None else setting.ema) and not setting.ema_on_host:
        yield "--ema-on-host", replace(setting, ema_on_host=True)
    if knob == "optimizer" and setting.optimizer.startswith("adamw") and setting.optimizer != "adamw-8bit":
        yield "--optimizer adamw-8bit", replace(setting, optimizer="adamw-8bit")
    if knob == "resolution" and (size := published(setting.model)) is not None:
        now = setting.resolution or size.resolution
        for share in (0.75, 0.5):
            side = max(size.block, int(now * share) // size.block * size.block)
            if side < now:
                yield f"--resolution {side}", replace(setting, resolution=side)
    if not of_rfdetr:
        return
    if knob == "multi-scale" and setting.multi_scale:
        yield "--no-multi-scale", replace(setting, multi_scale=False)
    if knob == "groups":
        for groups in (4, 1):
            if groups < (setting.groups or 13):
                yield f"--groups {groups}", replace(setting, groups=groups)
    if knob == "queries" and (size := published(setting.model)) is not None:
        half = (setting.num_queries or size.queries) // 2
        if half:
            yield f"--num-queries {half}", replace(setting, num_queries=half)
    if knob == "encoder" and not setting.freeze_encoder and setting.stage != "masks":
        yield "--freeze-encoder", replace(setting, freeze_encoder=True)
