"""Finds the nearest setting that the traces of the package cover, for a provisional answer before a setting is traced."""

from dataclasses import fields, replace

from trainfit.gpus.catalogue import GIB
from trainfit.gpus.context import ByteRange
from trainfit.memory.priced import Pricer
from trainfit.models.setting import Setting

SCALED = frozenset(
    {
        "model",
        "micro_batch",
        "accumulation",
        "eval_micro_batch",
        "precision",
        "checkpointing",
        "ema_on_host",
        "classes",
        "objects_per_image",
    }
)
"""Fields for which a stored trace covers other values than the default."""


def nearest(setting: Setting, pricer: Pricer) -> tuple[Setting, str] | None:
    """The setting with as many knobs at their defaults as it takes, and the flags of those knobs; None: there is no such trace.

    First each knob alone is put to its default, then all; a number of recomputed blocks becomes none, which needs more.
    """
    others = {
        each.name: each.default
        for each in fields(setting)
        if each.name not in SCALED and getattr(setting, each.name) != each.default
    }
    if setting.checkpointing not in ("none", "all"):
        others["checkpointing"] = "none"
    for changed in (*({name: value} for name, value in others.items()), others):
        candidate = replace(setting, **changed)
        if changed and pricer.answers(candidate):
            return candidate, ", ".join(f"--{name.replace('_', '-')}" for name in changed)
    return None


def needs_text(needs: ByteRange) -> str:
    """The memory that a setting needs, in words."""
    return f"needs {needs.low_bytes / GIB:.2f} to {needs.high_bytes / GIB:.2f} GiB"
