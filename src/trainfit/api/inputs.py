"""What the calls have in common: the card and the setting that they are given in several forms."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from trainfit.gpus.catalogue import Gpu
from trainfit.gpus.choice import chosen_gpu, gpu_here
from trainfit.models.setting import Setting, make_setting, named
from trainfit.planning.dataset import for_data, read_data
from trainfit.tasks.task import Dataset

Device = Literal["auto", "cpu", "cuda"]


def silent(_line: str) -> None:
    """Show nothing."""


def card_of(gpu: str | Gpu | None, memory: str | None, note: Callable[[str], None]) -> Gpu:
    """The card by name, by memory or as a value; the first of this machine where none is given."""
    if isinstance(gpu, Gpu):
        return gpu
    return gpu_here(note) if gpu is None and memory is None else chosen_gpu(gpu, memory)


def setting_of(model: str | Setting, knobs: dict[str, Any]) -> Setting:
    """The setting of a model's name with these knobs, or a setting with these changes."""
    if isinstance(model, str):
        return make_setting(model, **knobs)
    return named(replace(model, **knobs))


def on_data(setting: Setting, data: str | Path | None, *, allow_outside: bool) -> tuple[Setting, Dataset | None]:
    """The setting with what a data set determines of it, and the data set; without data both as they are."""
    if data is None:
        return setting, None
    dataset = read_data(setting, str(data), allow_outside=allow_outside)
    return for_data(setting, dataset), dataset
