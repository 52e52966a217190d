"""`measure`: speed and memory of a setting on this machine."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainfit.api.planning import setting_of
from trainfit.errors import TrainfitError
from trainfit.measuring.bench import Bench
from trainfit.measuring.card import Device, cap_bytes, measured_card
from trainfit.measuring.search import Measured
from trainfit.memory.alloc_conf import AllocatorConfig
from trainfit.models.family import family_of
from trainfit.models.setting import Setting, setting_from_json
from trainfit.planning.plan import Plan, read_plan


def measure(
    model: str | Setting = "",
    *,
    plan: str | Path | Plan | None = None,
    micro_batches: Sequence[int] = (),
    steps: int = 10,
    device: Device = "auto",
    memory: str | None = None,
    show: Callable[[str], None] = lambda _: None,
    **knobs: Any,
) -> tuple[Measured, ...]:
    """Measure speed and memory on this machine, each trial in a clean process: `trainfit measure`.

    Args:
        model: Name of a model, or a setting; it may be left out with `plan`.
        plan: A plan, or the file of one, whose setting is measured instead of `knobs`.
        micro_batches: Those to measure; without them the fewest that show from which one on speed stops to grow.
        steps: Timed windows of each trial at most; after 10 s only three are waited for.
        device: "auto" is the first GPU that CUDA_VISIBLE_DEVICES shows, else the CPU.
        memory: Act as a smaller card, for instance "4GiB".
        show: Called with a line of progress.
        knobs: Knobs of the model's family.

    Raises:
        TrainfitError: no such model or device, or a setting that cannot be built.
    """
    setting = setting_of(model, knobs) if plan is None else planned_setting(plan, model)
    bench = make_bench(setting, steps=steps, device=device, memory=memory, show=show)
    return tuple(bench.run(micro_batches))


def planned_setting(plan: str | Path | Plan, model: str | Setting = "") -> Setting:
    """The setting that a plan chose; `model` must be the plan's, where it is given.

    Raises:
        TrainfitError: not a plan file, nothing fits, or another model's plan.
    """
    if isinstance(plan, Plan):
        if plan.chosen is None:
            raise TrainfitError(f"nothing fits {plan.gpu.name}: the plan of {plan.model} has no setting to measure")
        source = "plan"
        setting = plan.chosen.setting
    else:
        source = f"--plan {plan}"
        setting = setting_from_json(read_plan(Path(plan))["setting"], f"{source}, setting")
    wanted = model.model if isinstance(model, Setting) else model
    if wanted and family_of(wanted)[1] != setting.model:
        raise TrainfitError(f"{source} is for {setting.model}, not {wanted}")
    return setting


def make_bench(
    setting: Setting, *, steps: int, device: Device, memory: str | None, show: Callable[[str], None]
) -> Bench:
    """The bench that `measure` runs; `Bench.run` gives each trial as it ends.

    Raises:
        TrainfitError: no such device, or `memory` is not a part of its memory.
    """
    if steps < 1:
        raise TrainfitError(f"--steps must be at least 1, not {steps}")
    card = measured_card(device)
    return Bench(
        setting=setting,
        card=card,
        limit_bytes=cap_bytes(memory, card),
        config=AllocatorConfig.from_env_string(
            os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
        ),
        windows={"most": steps, "least": min(3, steps)},
        show=show,
    )
