"""Plans made by hand, for reports and for what writes plans for other tools."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from test_profile import make_prediction
from trainfit.gpus.catalogue import GIB, find_gpu
from trainfit.gpus.context import ByteRange
from trainfit.models.setting import Setting, make_setting
from trainfit.planning.plan import Candidate, Loading, Plan, Saving
from trainfit.step.names import Checkpointing

MICRO_BATCHES = (1, 2, 4, 6, 8, 16)


def make_candidate(
    setting: Setting, share: int, micro_batch: int, blocks: Checkpointing, budget_bytes: int, *, timed: bool = True
) -> Candidate:
    """Need: 0.6 GiB and 0.4 an image, half of that with all blocks checkpointed; up to a tenth more."""
    part = {"none": 0.4, "all": 0.2}.get(str(blocks), 0.3)
    low = int((0.6 + part * micro_batch) * GIB)
    high = low + low // 10
    cuts = (micro_batch,) * (share // micro_batch) + ((share % micro_batch,) if share % micro_batch else ())
    speed = (40 if blocks == "none" else 30) * micro_batch / (micro_batch + 1)
    over = (high - budget_bytes) / GIB
    return Candidate(
        setting=replace(setting, micro_batch=micro_batch, accumulation=len(cuts), checkpointing=blocks),
        cuts=cuts,
        needs=ByteRange(low_bytes=low, high_bytes=high),
        seconds=share / speed if timed else None,
        images_per_s=speed if timed else None,
        verdict="fits" if over <= 0 else "does not fit",
        reason="slower" if over <= 0 else f"up to {over:.2f} GiB short",
    )


def make_plan(
    chosen: tuple[int, Checkpointing] | None = (6, "none"),
    *,
    model: str = "rfdetr-nano",
    effective_batch: int = 16,
    gpus: int = 1,
    budget_gib: float = 3.5,
    timed: bool = True,
    blocks: Sequence[Checkpointing] = ("none", "all"),
    micro_batches: Sequence[int] = MICRO_BATCHES,
    calibrated: bool = False,
    **knobs: Any,
) -> Plan:
    """A plan for an RTX 3090; `chosen` is one of its candidates, None where nothing fits."""
    setting = make_setting(model=model, precision=knobs.pop("precision", "bf16"), **knobs)
    budget = ByteRange(low_bytes=int(budget_gib * GIB), high_bytes=int((budget_gib + 0.2) * GIB))
    share = -(-effective_batch // gpus)
    sizes = [b for b in micro_batches if b <= share]
    made = [make_candidate(setting, share, b, c, budget.low_bytes, timed=timed) for c in blocks for b in sizes]
    at = [c for c in made if chosen == (c.setting.micro_batch, c.setting.checkpointing)]
    if at:
        made[made.index(at[0])] = replace(at[0], verdict="chosen", reason="the fastest that fits")
        at = [c for c in made if c.verdict == "chosen"]
    fits = [c for c in made if c.verdict != "does not fit"]
    front = [
        c
        for c in fits
        if not any(
            (o.images_per_s or 0) >= (c.images_per_s or 0) and o.needs.high_bytes < c.needs.high_bytes for o in fits
        )
    ]
    return Plan(
        model=model,
        gpu=find_gpu("RTX 3090"),
        gpus=gpus,
        effective_batch=effective_batch,
        budget=budget,
        chosen=at[0] if at else None,
        prediction=make_prediction(4000) if at else None,
        knee=8 if timed else None,
        frontier=tuple(sorted(front, key=lambda c: -(c.images_per_s or 0))),
        candidates=tuple(made),
        smallest=min(made, key=lambda c: c.needs.high_bytes),
        savings=()
        if at
        else (
            Saving(knob="--groups 1", saved_bytes=GIB, learns_differently=True),
            Saving(knob="--ema-on-host", saved_bytes=GIB // 8, learns_differently=False),
        ),
        loading=Loading(workers=3, host_bytes=2 * GIB, reason="4 cores, 1 kept for the trainer"),
        learning_rate="The recipe's 1e-4 is for an effective batch of 16: it stays.",
        calibrated=calibrated,
        assumptions=("Kernels start as fast as on a desktop of 2024.",),
    )
