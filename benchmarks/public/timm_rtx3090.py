"""834 timm models on an RTX 3090 in 2022: does the largest batch fit, does the next one not, and seconds a step.

The records of `benchmarks/timm_rtx3090.py`, which are traced once and committed. The overhead of that stack (1,824 MiB:
context, cuDNN, benchmark spikes of torch 1.12) and the efficiencies of the roofline were fitted on the 110 `fitted` models
alone; the rows judged here are the other two groups.
"""

from dataclasses import dataclass
from functools import cache

import benchmarks.timm_rtx3090 as ladder

from trainfit.timing.roofline import step_seconds

MOBILE = (
    "efficientnet",
    "mobilenet",
    "mnasnet",
    "ghostnet",
    "mixnet",
    "rexnet",
    "lcnet",
    "fbnet",
    "spnasnet",
    "tinynet",
    "hardcorenas",
)
ATTENTION = (
    "vit",
    "deit",
    "swin",
    "xcit",
    "cait",
    "beit",
    "pit_",
    "twins",
    "visformer",
    "levit",
    "crossvit",
    "mvit",
    "poolformer",
    "coat",
    "tnt",
    "volo",
    "jx_nest",
    "nest",
    "convit",
    "gcvit",
    "maxvit",
    "coatnet",
)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Verdicts at the card's limit and the time of a step."""

    name: str
    group: str
    fits_right: bool
    """Of the batch that ran."""
    next_right: bool
    """Of the next batch of the ladder, which ran out of memory."""
    measured_s: float
    predicted_s: float
    batch: int


def group_of(model: str) -> str:
    """The class that a model's name tells."""
    if any(word in model for word in MOBILE):
        return "mobile CNN"
    if any(word in model for word in ATTENTION):
        return "attention"
    return "CNN"


@cache
def judged() -> list[Judged]:
    """The tested and the fresh models."""
    tested, fitted, fresh, _ = ladder.load()
    overhead = ladder.fitted_overhead_mib(fitted)
    records = [*tested, *fresh]
    false_fits, false_nots = ladder.wrong(records, overhead)
    return [
        Judged(
            name=record.model,
            group=group_of(record.model),
            fits_right=record.model not in false_nots,
            next_right=record.model not in false_fits,
            measured_s=record.measured_s,
            predicted_s=step_seconds(record.ops, ladder.GPU).seconds,
            batch=record.batch,
        )
        for record in records
    ]
