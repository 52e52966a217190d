"""Plans for the GPUs of this machine, the data and the free memory, where a recipe leaves the cut of its batch open."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainfit.errors import TrainfitError
from trainfit.gpus.catalogue import GIB, Gpu
from trainfit.gpus.detect import detect_gpus, least_free, visible, with_free_memory
from trainfit.models.setting import Setting
from trainfit.planning.dataset import for_data
from trainfit.planning.make import make_plan
from trainfit.planning.on_cpu import cut_for_host_memory
from trainfit.planning.plan import Candidate, Plan
from trainfit.tasks.task import Dataset
from trainfit.training.recipe import Recipe, batch_of, setting_of
from trainfit.values import given

if TYPE_CHECKING:
    import torch

CHOSEN = ("micro_batch", "checkpointing", "ema_on_host", "optimizer")
"""Knobs that training takes from the plan: they change memory and time, but not what is learned."""
BY_HAND = frozenset({"micro_batch", "accumulation", "plan"})
"""Nothing is planned if one of these is given."""


def planned_here(
    recipe: Recipe, dataset: Dataset, device: "torch.device", gpus: int, note: Callable[[str], None]
) -> Mapping[str, Any]:
    """Values of `CHOSEN` for a recipe that does not say how to cut its batch.

    The plan is for the card with the least free memory of those that are used; on the CPU it is for the host's free memory.
    What cannot be planned is reported with the reason, and training starts with its defaults.

    Args:
        recipe: What is to be trained.
        dataset: Its data.
        device: Where training runs.
        gpus: Cards that train together.
        note: Called with the plan in a line, and before anything that takes seconds.

    Raises:
        TrainfitError: the recipe has values that training refuses too.
    """
    if BY_HAND & given(recipe):
        return {}
    setting = for_data(setting_of(recipe, len(dataset.classes)), dataset)
    batch = batch_of(recipe.family, recipe.effective_batch)
    try:
        if device.type == "cuda":
            chosen, text = _for_cards(recipe, setting, batch, gpus, note)
        else:
            keeps = "checkpointing" in given(recipe)
            chosen, text = cut_for_host_memory(setting, -(-batch // gpus), checkpointing_given=keeps)
    except TrainfitError as error:
        note(f"not planned ({error}): micro-batch and checkpointing are the defaults; --micro-batch N sets one")
        return {}
    note(text)
    values = chosen.to_json()
    return {name: values[name] for name in CHOSEN if name in values and name not in given(recipe)}


def _for_cards(
    recipe: Recipe, setting: Setting, batch: int, gpus: int, note: Callable[[str], None]
) -> tuple[Setting, str]:
    """The plan's setting, or the smallest where nothing is sure to fit, and the plan in a line."""

    def lasting(text: str) -> None:
        if not text.endswith("..."):
            note(text)

    only = recipe.checkpointing if "checkpointing" in given(recipe) else None
    card = smallest_card(gpus)
    plan = make_plan(setting, card, effective_batch=batch, gpus=gpus, checkpointing=only, note=lasting)
    chosen = plan.chosen or plan.smallest
    return chosen.setting, line(plan, chosen)


def smallest_card(gpus: int) -> Gpu:
    """The card with the least free memory among the first `gpus` that this process can use, with that as its memory.

    Raises:
        TrainfitError: the driver does not show them.
    """
    cards = visible(detect_gpus())
    if not cards:
        raise TrainfitError("the driver shows no GPU")
    return with_free_memory(least_free(cards[:gpus]))


def line(plan: Plan, chosen: Candidate) -> str:
    """The plan in one line, for the user."""
    setting = chosen.setting
    cut = f"micro-batch {setting.micro_batch} x {setting.accumulation}"
    if plan.gpus > 1:
        cut += f" on each of {plan.gpus} GPUs"
    if setting.checkpointing not in ("none", 0):
        cut += f", checkpointing {setting.checkpointing}"
    if setting.optimizer == "adamw-host":
        cut += ", optimizer adamw-host"
    low, high, usable = (
        f"{size / GIB:.1f}" for size in (chosen.needs.low_bytes, chosen.needs.high_bytes, plan.budget.low_bytes)
    )
    if plan.chosen is None:
        return f"no setting is sure to fit: starting with the smallest, {cut}, which needs {low}-{high} GiB of {usable} GiB"
    return f"planned: {cut}, {low}-{high} of {usable} GiB (--micro-batch N overrides)"
